"""Text to tokens, through a model's own chat template and tokenizer. This room never runs a model."""
