"""Steering vectors: one direction per hook point, with where it came from. Plain data; no model is run here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_SCHEMA = 1


@dataclass(frozen=True)
class Provenance:
    """What a set of vectors is and how it was made; stored in every file.

    Attributes:
        model: name of the model.
        behaviour: what the vectors point towards.
        method: for example `mean_diff`.
        position: which token was read, in words.
        processing: weight processing of the model (`none` for Hugging Face's numbers).
        n_pairs: number of contrast pairs.
        data_sha256: checksum of the pairs.
        seed: of the pairs' selection.
        version: of rt_lens.
    """

    model: str
    behaviour: str
    method: str
    position: str
    processing: str
    n_pairs: int
    data_sha256: str
    seed: int
    version: str


@dataclass(frozen=True)
class SteeringVectors:
    """Directions keyed by hook name.

    Attributes:
        vectors: hook name -> Float[Tensor, "d_model"].
        provenance: where they came from.

    Raises:
        ValueError: if there is none, one is not finite or zero, or the widths differ.

    Example:
        >>> vectors = SteeringVectors.load("mood.safetensors")
        >>> vectors["blocks.18.hook_resid_post"].shape
        torch.Size([576])
    """

    vectors: dict[str, Float[Tensor, "d_model"]] = field(repr=False)
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("vectors: there is none. Give at least one hook point.")
        if len({vector.shape for vector in self.vectors.values()}) > 1:
            raise ValueError(f"vectors: shapes differ: { ({n: tuple(v.shape) for n, v in self.vectors.items()}) }.")
        for name, vector in self.vectors.items():
            if not torch.isfinite(vector).all():
                raise ValueError(f"vectors: {name} holds NaN or infinite values. Extract it again.")
            if vector.norm() == 0:
                raise ValueError(f"vectors: {name} is all zeros, which has no direction. Are the two sides the same?")

    @property
    def d_model(self) -> int:
        return next(iter(self.vectors.values())).shape[0]

    @property
    def hook_names(self) -> list[str]:
        return list(self.vectors)

    def __getitem__(self, hook_name: str) -> Float[Tensor, "d_model"]:
        if hook_name not in self.vectors:
            near = get_close_matches(hook_name, self.vectors, n=3) or self.hook_names[:3]
            raise KeyError(f"vectors: none for {hook_name!r}. Near: {', '.join(near)}.")
        return self.vectors[hook_name]

    def at_layers(self, layers: Iterable[int] | None, hook: str = "resid_post") -> dict[str, Tensor]:
        """The vectors of some blocks at one kind of hook point; all blocks for None.

        Raises:
            ValueError: if a layer has no vector; the message says which have.
        """
        ours = [name for name in self.vectors if name.startswith("blocks.") and name.endswith(f".hook_{hook}")]
        known = {int(name.split(".")[1]): name for name in ours}
        if not known:
            raise ValueError(f"hook: no vector at hook_{hook}. These vectors are at {', '.join(self.hook_names[:3])}.")
        chosen = list(known) if layers is None else list(layers)
        for layer in chosen:
            if layer not in known:
                middle, blocks = sorted(known)[len(known) // 2], f"{min(known)}..{max(known)}"
                if min(known) < layer < max(known):
                    wrong = f"has no vector among these vectors' blocks {', '.join(map(str, sorted(known)))}"
                else:
                    wrong = f"is outside these vectors' blocks {blocks}"
                raise ValueError(f"layers: {layer} {wrong} ({self.provenance.model}). Use layers=[{middle}], say.")
        if not chosen:
            raise ValueError("layers: the list is empty. Name at least one block.")
        return {known[layer]: self.vectors[known[layer]] for layer in chosen}

    def select(self, layers: Iterable[int], hook: str = "resid_post") -> SteeringVectors:
        """The same vectors at some blocks only."""
        return SteeringVectors(self.at_layers(layers, hook), self.provenance)

    def check_fits(self, model: Any) -> None:
        """Refuses a model of another width or without these hook points.

        Raises:
            ValueError: says what the vectors were made for and what this model has.
        """
        if model.cfg.d_model != self.d_model:
            raise ValueError(
                f"vectors: made for d_model {self.d_model} ({self.provenance.model}), this model has "
                f"{model.cfg.d_model}. Extract vectors on this model first."
            )
        for name in self.vectors:
            if name not in model.hook_dict:
                near = get_close_matches(name, model.hook_dict, n=1)
                raise ValueError(
                    f"vectors: the hook point {name} is not in this model ({model.cfg.n_layers} blocks). "
                    f"Nearest: {', '.join(near) or 'none'}. Extract vectors on this model first."
                )

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with its provenance, in one rename."""
        header = {"rt_lens": json.dumps({"schema": _SCHEMA, "kind": "steering_vectors", **asdict(self.provenance)})}
        # Cloned: safetensors refuses one vector under two names.
        tensors = {name: vector.detach().cpu().clone().contiguous() for name, vector in self.vectors.items()}
        return write_atomically(Path(path), save(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> SteeringVectors:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is truncated, or no file of steering vectors.
        """
        tensors, header = read_safetensors(Path(path), "vectors")
        try:
            stored = json.loads(header["rt_lens"])
            if (stored.pop("kind"), stored.pop("schema")) != ("steering_vectors", _SCHEMA):
                raise KeyError("kind")
            provenance = Provenance(**stored)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
            raise ValueError(f"vectors: {path} is not a file of steering vectors of schema {_SCHEMA}.") from None
        return cls(tensors, provenance)


def hook_names(layers: Sequence[int], hook: str = "resid_post") -> list[str]:
    """Hook names of blocks: `hook_names([18])` is `["blocks.18.hook_resid_post"]`."""
    return [f"blocks.{layer}.hook_{hook}" for layer in layers]


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes to a temporary name beside `path`, then renames: a reader finds the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}-{uuid4().hex}"  # not mkstemp, whose files only their owner may read
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_safetensors(path: Path, argument: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in list(stored.keys())}, stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{argument}: {path} is truncated or no safetensors file ({error}). Make it again.") from None
