"""Whether a format trains as FP32 does in the recipes that people run; ``python -m benchmarks.recipes``."""
