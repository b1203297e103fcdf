"""Triton kernels of mask learning: a soft mask is drawn, used and forgotten inside one pass over a weight."""
