"""Steering vectors in other tools' files, in and out: GGUF control vectors and plain files of tensors.

No model is known here. A file may come from a stranger: nothing in it is run, made a Python object, or used as a path.
"""
