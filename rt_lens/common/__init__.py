"""Files, progress, statistics, and checks of arguments. This subpackage knows no model."""
