"""Steering vectors in other tools' files, in and out: GGUF control vectors and plain files of tensors.

No model is known here. A file may come from a stranger: nothing in it is run, made a Python object, or used as a path.
"""

from rt_lens.vectors.interop.gguf import load_gguf, save_gguf
from rt_lens.vectors.interop.tensors import import_vectors

__all__ = ["import_vectors", "load_gguf", "save_gguf"]
