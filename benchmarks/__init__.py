"""Measurements: `python -m benchmarks` lists the suites and tools, `python -m benchmarks NAME [--json out.json]` runs one.

A suite is a module of this package with `main(argv)`. It checks its answer before it times anything, runs the
implementations in turns (`tools.common.interleave`), and reports ratios of minima. `results/` holds reports.
"""
