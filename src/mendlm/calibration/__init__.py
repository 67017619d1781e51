"""Calibration: text that runs through the model block by block, and what is learnt from it."""
