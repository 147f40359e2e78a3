"""Measurements: `python -m benchmarks` lists them, `python -m benchmarks NAME [--json out.json]` runs one.

A benchmark is a module here with `main(argv)`. It checks its answer before it times anything, runs what it compares in
turns in one process (`common.interleave`), and reports ratios of minima.
"""
