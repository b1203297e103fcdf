"""Triton kernels of one-shot pruning: what would be thousands of small launches for each weight."""
