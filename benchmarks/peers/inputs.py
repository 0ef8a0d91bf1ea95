"""The inputs that every tool reads: texts, token ids and vectors in one folder. Knows no tool, and no rt_lens."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

MULTIPLIERS = {"sweep_1": (1.0,), "sweep_4": (-2.0, -1.0, 1.0, 2.0)}
N_FIRST_PAIRS = 16


@dataclass(frozen=True)
class Inputs:
    """What the tasks read.

    Attributes:
        model: a Hugging Face folder with tokenizer.
        pairs: contrast pairs, as the fields of rt_lens's `Pair`.
        positive: their positive sides with the chat template applied.
        negative: their negative sides.
        layers: blocks whose vectors are extracted.
        prompts: chats whose greedy responses do not end within `new_tokens`.
        new_tokens: tokens to generate.
        steer_layer: block after which its vector is added.
        vectors: file with the vectors of all blocks, by the name of the hook point.
        tuning_prompts: chats of equal length in tokens.
        tuning_answers: texts that continue them, of equal length in tokens.
        tuning_tokens: ids of both together, by row.
        answer_tokens: how many of them are the answer's.
        tuning_steps: steps of AdamW.
        sweep_prompts: chats.
        sweep_layers: blocks to steer, one at a time.
        sweep_words: the two next tokens whose logits are compared.
        sweep_tokens: their ids.
    """

    model: str
    pairs: list[dict[str, str]]
    positive: list[str]
    negative: list[str]
    layers: list[int]
    prompts: list[str]
    new_tokens: int
    steer_layer: int
    vectors: str
    tuning_prompts: list[str]
    tuning_answers: list[str]
    tuning_tokens: list[list[int]]
    answer_tokens: int
    tuning_steps: int
    sweep_prompts: list[str]
    sweep_layers: list[int]
    sweep_words: tuple[str, str]
    sweep_tokens: tuple[int, int]

    def first(self, n_pairs: int = N_FIRST_PAIRS) -> Inputs:
        """The same with the first pairs only."""
        return replace(
            self, pairs=self.pairs[:n_pairs], positive=self.positive[:n_pairs], negative=self.negative[:n_pairs]
        )

    def load_vectors(self) -> dict[int, Tensor]:
        """Block -> vector."""
        return {int(name.split(".")[1]): vector for name, vector in load_file(self.vectors).items()}

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Inputs:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
