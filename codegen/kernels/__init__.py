"""Kernel families. `reference` runs anywhere Triton does and is what every other family is tested against."""
