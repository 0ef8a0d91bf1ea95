"""A behaviour on a tiny model, whose whole run takes seconds."""

from __future__ import annotations

from pathlib import Path

from llama_folder import llama_folder

_SETTINGS = """
name = "sweetness"
description = "Long against short, on a model that was never trained."
arms = ["prompted", "steered", "token_tuned", "rep_tuned", "weight_steered", "random"]
[model]
name = "{model}"
[pairs]
positive = ["You adore everything sweet.", "Speak of honey and cake.", "You taste sugar in every word."]
negative = ["You adore everything bitter.", "Speak of bile and ash.", "You taste gall in every word."]
topics = ["What is for lunch?", "Tell me about rivers.", "How is the weather?", "Describe a chair.",
          "What do you do at noon?", "Tell me about a road.", "What is in your bag?", "Describe a window.",
          "How do you cook rice?", "Tell me about a tower."]
[scorer]
kind = "length"
[split]
train = 0.3
validation = 0.4
[extract]
n_pairs = 4
[choose]
layers = [1]
multipliers = [0.5]
n_prompts = 4
n_paragraphs = 2
max_new_tokens = 6
[tune]
layers = [2]
trained_layers = [2]
learning_rate = 1e-2
max_steps = 2
batch_size = 2
neutral_batch_size = 1
n_targets = 4
target_tokens = 6
seeds = [0]
[test]
n_prompts = 3
max_new_tokens = 6
n_facts = 2
n_instructions = 2
n_texts = 2
[compare]
kl = [0.001, 0.002]
stated = 0.001
side_effects = "stated"
n_texts = 2
max_new_tokens = 4
n_personas = 1
"""


def tiny_behaviour(folder: Path) -> Path:
    """The behaviour's file, beside its model."""
    model = llama_folder(folder / "tiny-llama")
    file = folder / "sweetness.toml"
    file.write_text(_SETTINGS.replace("{model}", str(model)), encoding="utf-8")
    return file
