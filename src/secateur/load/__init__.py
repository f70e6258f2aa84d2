"""READING it: models, calibration and evaluation data."""
