"""Instructions that Triton has no name for: one file each, the PTX text and its operands."""
