"""Files, progress, statistics and the checks of what callers give. This room knows no model."""
