"""Export: a model and a change of its weights -> files that Hugging Face's transformers and peft open without rt_lens.

This room writes folders; it never tunes, measures or builds a model with hook points.
"""

from rt_lens.tuning.export.hf import export_hf
from rt_lens.tuning.export.peft import Adapter, export_peft

__all__ = ["Adapter", "export_hf", "export_peft"]
