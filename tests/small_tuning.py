"""A tuning run in small, for the tests that break it off.

6 training rows by 2 are 3 steps an epoch, so that checkpoints after 3 and 6 lie on its border and others do not.
"""

from __future__ import annotations

from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.targets import Target

TARGETS = [Target(f"Question {i}: what is it?", f" It is thing {i}, I think.") for i in range(7)]
NEUTRAL = [Target(f"Add {i} and 1.", f" That makes {i + 1}.") for i in range(4)]
CONFIG = TuneConfig(
    layers=[1], trained_layers=[1], max_steps=8, epochs=20, batch_size=2, validate_every=2, patience=9,
    learning_rate=3e-3,
)  # fmt: skip


def answer_of(model, target: Target) -> list[int]:
    """The answer's tokens with the end that a whole one is learnt with."""
    return model.tokenizer.encode(target.answer) + [model.tokenizer.eos_token_id] * target.ended
