"""Text to tokens, through a model's own chat template and tokenizer. This subpackage never runs a model."""
