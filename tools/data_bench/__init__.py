"""The rows of tools/bench_data.py, a module a group of rows."""
