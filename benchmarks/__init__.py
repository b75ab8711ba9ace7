"""Measure time, memory and errors; scripts/bench_*.py are the command lines."""
