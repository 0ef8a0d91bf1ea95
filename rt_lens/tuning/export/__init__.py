"""Export: a model and a change of its weights -> files that Hugging Face's transformers and peft open without rt_lens.

This subpackage writes folders; it never tunes, measures or builds a model with hook points.
"""
