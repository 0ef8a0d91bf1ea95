"""Files, progress, statistics, and checks of arguments. This room knows no model."""
