"""The rows of tools/bench_engine.py, a module a group."""
