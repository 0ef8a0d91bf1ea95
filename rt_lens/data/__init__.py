"""Data: contrast pairs, questions, facts, the built-in behaviours, and readers of people's own files."""
