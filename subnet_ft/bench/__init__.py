"""Benchmarks: times and bytes, side by side with what people use instead, in one run on one machine."""

from subnet_ft.bench.run import PARTS, lines_for_terminal, run_bench

__all__ = ["PARTS", "lines_for_terminal", "run_bench"]
