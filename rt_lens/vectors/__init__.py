"""Vectors: finding a behaviour's direction, knowing whether to believe it, reading with it. It knows no hook."""
