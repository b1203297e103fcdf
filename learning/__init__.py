"""Pruning and mask learning: `python -m learning`; from Python `learning.prune.prune`, `learning.calibration.calibrate`."""
