"""The rows of tools/bench_observability.py, a module a group."""
