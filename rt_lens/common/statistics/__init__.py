"""Intervals, tests, effect sizes, power and calibration, thin over scipy and statsmodels. This room knows no model."""
