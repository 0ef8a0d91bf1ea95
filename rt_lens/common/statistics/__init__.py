"""Intervals, tests, effect sizes, power and calibration, on scipy and statsmodels. This package knows no model."""
