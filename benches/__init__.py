"""Measurements behind ``docs/benchmarks.md``; run with ``make bench``."""
