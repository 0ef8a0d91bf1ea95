"""Steering vectors: one direction per hook point, with where it came from. Plain data; no model is run here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from rt_lens.common.files import read_safetensors, write_atomically
from rt_lens.models.activations import check_hook_names
from rt_lens.models.protocol import Model
from rt_lens.vectors.operators import Ablate

_SCHEMA = 1
_ERASER = "eraser/"


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
        seed: seed for the pairs' selection.
        version: of rt_lens.
        position_tokens: the tokens read in the first pair's positive side, as the model's tokenizer writes them.
        prompts_sha256: checksum of the texts as the model read them, through its chat template.
        dtype: of the model's weights; float32 for files that do not name it.

    Example:
        >>> vectors.provenance.behaviour, vectors.provenance.n_pairs
        ('mood', 16)
        >>> Provenance.from_json(vectors.provenance.to_json()) == vectors.provenance
        True
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
    position_tokens: tuple[str, ...] = ()
    prompts_sha256: str = ""
    dtype: str = "float32"

    def to_json(self) -> dict[str, Any]:
        """As a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Provenance:
        """What `to_json` gave, each value checked.

        Raises:
            ValueError: a value that is missing, unknown or of another type.
        """
        known = {part.name: part for part in fields(cls)}
        if unknown := set(stored) - set(known):
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"provenance must have the keys {', '.join(known)}, got {names}.")
        checked: dict[str, Any] = {}
        for name, part in known.items():
            if name not in stored:
                if part.default is MISSING:
                    raise ValueError(f"provenance must have the key {name!r}, got none.")
                continue
            value: Any = tuple(stored[name]) if isinstance(stored[name], list) else stored[name]
            kind = {"n_pairs": int, "seed": int, "position_tokens": tuple}.get(name, str)
            tokens = value if isinstance(value, tuple) else ()
            if not isinstance(value, kind) or not all(isinstance(token, str) for token in tokens):
                raise ValueError(f"provenance: {name} must be of type {kind.__name__}, got {value!r}.")
            checked[name] = value
        return cls(**checked)


@dataclass(frozen=True)
class Eraser:
    """What takes a concept out of activations: h - left (right . (h - centre)) (LEACE, Belrose et al. 2023).

    Attributes:
        left: Float[Tensor, "*heads d"], the direction that is removed.
        right: Float[Tensor, "*heads d"], the direction that reads.
        centre: Float[Tensor, "*heads d"].
    """

    left: Float[Tensor, "*heads d"]
    right: Float[Tensor, "*heads d"]
    centre: Float[Tensor, "*heads d"]


@dataclass(frozen=True)
class SteeringVectors:
    """Directions keyed by hook name. They can be added, subtracted, negated and multiplied by numbers.

    Attributes:
        vectors: hook name -> Float[Tensor, "d_model"], or Float[Tensor, "head d_head"] at `attn.hook_z`.
        provenance: where they came from.
        erasers: hook name -> Eraser, for method `leace`; arithmetic drops them.

    Raises:
        ValueError: if there is none, one is not finite, or widths at one kind of hook point differ.

    Example:
        >>> vectors["blocks.18.hook_resid_post"].shape
        torch.Size([576])
        >>> path = vectors.save("mood.safetensors")
        >>> mood = SteeringVectors.load(path)
        >>> (mood - 0.5 * mood).provenance.behaviour
        'mood - (0.5 * (mood))'
        >>> round(mood.cosine(-mood)["blocks.18.hook_resid_post"], 4)
        -1.0
    """

    vectors: dict[str, Float[Tensor, "*heads d"]] = field(repr=False)
    provenance: Provenance
    erasers: dict[str, Eraser] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("vectors must have at least one hook point, got none.")
        kinds: dict[str, set[torch.Size]] = {}
        for name, vector in self.vectors.items():
            kinds.setdefault(name.split(".", 2)[-1], set()).add(vector.shape)
            if not torch.isfinite(vector).all():
                raise ValueError(f"vectors must be finite, got NaN or infinite values at {name}. Extract them again.")
        for name, eraser in self.erasers.items():
            for part in vars(eraser).values():
                if name not in self.vectors or part.shape != self.vectors[name].shape or not torch.isfinite(part).all():
                    raise ValueError(
                        f"erasers must have the shape of their vectors and be finite, got another at {name}. Extract "
                        "them again."
                    )
        if any(len(shapes) > 1 for shapes in kinds.values()):
            shapes_by_name = {name: tuple(vector.shape) for name, vector in self.vectors.items()}
            raise ValueError(f"vectors must have one shape at one kind of hook point, got {shapes_by_name}.")

    @property
    def d_model(self) -> int:
        """Width of the vectors; at `attn.hook_z` that of all heads together."""
        return next(iter(self.vectors.values())).numel()

    @property
    def hook_names(self) -> list[str]:
        return list(self.vectors)

    @property
    def kind(self) -> str:
        """The kind of hook point that all of them are at, as `add` and others take it; `resid_post` if they differ."""
        kinds = {name.split(".", 2)[-1] for name in self.vectors}
        return kinds.pop() if len(kinds) == 1 else "resid_post"

    def __getitem__(self, hook_name: str) -> Float[Tensor, "*heads d"]:
        if hook_name not in self.vectors:
            near = get_close_matches(hook_name, self.vectors, n=3) or self.hook_names[:3]
            raise KeyError(f"hook_name must be one that has a vector, got {hook_name!r}. Nearest: {', '.join(near)}.")
        return self.vectors[hook_name]

    def at_layers(self, layers: Iterable[int] | None, hook: str = "resid_post") -> dict[str, Tensor]:
        """The vectors of some blocks at one kind of hook point. If None, all blocks; `any` means all kinds.

        Raises:
            ValueError: if a layer has no vector; the message says which have.
        """
        known: dict[int, list[str]] = {}
        for name in self.vectors:
            if name.startswith("blocks.") and (hook == "any" or name.split(".", 2)[2] == _kind(hook)):
                known.setdefault(layer_of(name), []).append(name)
        if not known:
            raise ValueError(
                f"hook must be a kind of hook point that has vectors, got {_kind(hook)}. These vectors are at "
                f"{', '.join(self.hook_names[:3])}."
            )
        chosen = list(known) if layers is None else list(layers)
        for layer in chosen:
            if layer not in known:
                middle, blocks = sorted(known)[len(known) // 2], f"{min(known)}..{max(known)}"
                if min(known) < layer < max(known):
                    blocks = ", ".join(map(str, sorted(known)))
                raise ValueError(
                    f"layers contains {layer}, but these vectors are of blocks {blocks} ({self.provenance.model}). "
                    f"Try layers=[{middle}]."
                )
        if not chosen:
            raise ValueError("layers must name at least one block, got an empty list.")
        return {name: self.vectors[name] for layer in chosen for name in known[layer]}

    def select(self, layers: Iterable[int], hook: str = "resid_post") -> SteeringVectors:
        """The same vectors at some blocks only."""
        chosen = self.at_layers(layers, hook)
        return SteeringVectors(chosen, self.provenance, {n: e for n, e in self.erasers.items() if n in chosen})

    def everywhere(self, model: Model, layer: int, hook: str = "resid_post") -> SteeringVectors:
        """One block's vector at every point of a model's residual stream (to ablate it with hook="any")."""
        (vector,) = self.at_layers([layer], hook).values()
        kinds = ("resid_pre", "resid_mid", "resid_post")
        names = [name for block in range(model.cfg.n_layers) for kind in kinds for name in hook_names([block], kind)]
        return SteeringVectors({name: vector for name in names if name in model.hook_dict}, self.provenance)

    def __add__(self, other: SteeringVectors) -> SteeringVectors:
        return self._combined(other, "+", lambda first, second: first + second)

    def __sub__(self, other: SteeringVectors) -> SteeringVectors:
        return self._combined(other, "-", lambda first, second: first - second)

    def __neg__(self) -> SteeringVectors:
        return self._changed(lambda vector: -vector, behaviour=f"-({self.provenance.behaviour})")

    def __mul__(self, factor: float) -> SteeringVectors:
        return self._changed(lambda vector: factor * vector, behaviour=f"{factor:g} * ({self.provenance.behaviour})")

    __rmul__ = __mul__

    def unit(self) -> SteeringVectors:
        """Each vector with length 1 (each head's own, at `attn.hook_z`); zeros stay zeros."""
        return self._changed(
            lambda vector: vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-30),
            method=f"{self.provenance.method}, unit norm",
        )

    def cosine(self, other: SteeringVectors) -> dict[str, float]:
        """Cosine with other vectors, at each hook point that both have; heads of `attn.hook_z` count as one vector.

        Raises:
            ValueError: if they share no hook point, or the widths differ.
        """
        shared = self._shared(other)
        pairs = {name: (self[name].flatten(), other[name].flatten()) for name in shared}
        return {name: float(torch.cosine_similarity(a, b.to(a), dim=0, eps=1e-30)) for name, (a, b) in pairs.items()}

    def without(self, *nuisances: SteeringVectors) -> SteeringVectors:
        """With the directions of others projected out, at each hook point.

        Args:
            nuisances: for example another behaviour's vectors, or `covariate_vectors` of text length.

        Raises:
            ValueError: if a nuisance lacks one of these hook points, or nothing is left.
        """
        if not nuisances:
            raise ValueError("nuisances must be at least one set of vectors to project out, got none.")
        cleaned = {}
        for name, vector in self.vectors.items():
            for nuisance in nuisances:
                if name not in nuisance.vectors:
                    raise ValueError(
                        f"nuisances must have a vector at {name}, but {nuisance.provenance.behaviour} has none. "
                        "Extract them at the same hook points, or use select."
                    )
            directions = torch.stack([nuisance[name].to(vector) for nuisance in nuisances], dim=-2)
            cleaned[name] = project_out(vector, directions)
            if cleaned[name].norm() <= 1e-5 * vector.norm():
                behaviours = ", ".join(nuisance.provenance.behaviour for nuisance in nuisances)
                raise ValueError(
                    f"nuisances must leave something of {self.provenance.behaviour}, but nothing is left at {name} "
                    f"without {behaviours}. Leave one of them out."
                )
        names = " and ".join(nuisance.provenance.behaviour for nuisance in nuisances)
        return SteeringVectors(cleaned, replace(self.provenance, method=f"{self.provenance.method} without {names}"))

    def _changed(self, change: Callable[[Tensor], Tensor], **provenance: Any) -> SteeringVectors:
        changed = {name: change(vector) for name, vector in self.vectors.items()}
        return SteeringVectors(changed, replace(self.provenance, **provenance))

    def _combined(
        self, other: SteeringVectors, sign: str, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> SteeringVectors:
        first, second = self.provenance, other.provenance
        provenance: dict[str, Any] = {"behaviour": f"{first.behaviour} {sign} ({second.behaviour})"}
        for name in ("model", "method", "position", "processing"):
            if getattr(first, name) != getattr(second, name):
                provenance[name] = f"{getattr(first, name)} {sign} ({getattr(second, name)})"
        if first.data_sha256 != second.data_sha256:
            provenance["n_pairs"] = first.n_pairs + second.n_pairs
            provenance["data_sha256"] = hashlib.sha256((first.data_sha256 + second.data_sha256).encode()).hexdigest()
        combined = {name: combine(self[name], other[name].to(self[name])) for name in self._shared(other)}
        return SteeringVectors(combined, replace(first, **provenance))

    def _shared(self, other: SteeringVectors) -> list[str]:
        shared = [name for name in self.vectors if name in other.vectors]
        if not shared:
            raise ValueError(
                f"vectors must share a hook point, got {', '.join(self.hook_names[:2])} ... and "
                f"{', '.join(other.hook_names[:2])} ... Extract both at the same hook points."
            )
        for name in shared:
            if self[name].shape != other[name].shape:
                raise ValueError(
                    f"vectors must have one shape at {name}, got {tuple(self[name].shape)} ({self.provenance.model}) "
                    f"and {tuple(other[name].shape)} ({other.provenance.model}). Extract both from one model."
                )
        return shared

    def described(self) -> dict[str, Any]:
        """Where they came from, with a checksum of their numbers: what a file made with them keeps."""
        content = hashlib.sha256()
        for name, vector in self.vectors.items():
            content.update(name.encode() + vector.detach().cpu().float().numpy().tobytes())
        provenance = self.provenance.to_json()
        if provenance["dtype"] == "float32":  # as a checkpoint from before there was a dtype has it, so that it resumes
            del provenance["dtype"]
        return {**provenance, "sha256": content.hexdigest()}

    def check_fits(self, model: Model) -> None:
        """Refuses a model with another d_model or without these hook points.

        Raises:
            ValueError: says what the vectors were made for and what this model has.
        """
        for name, vector in self.vectors.items():
            heads = name.endswith(".hook_z")
            shape = (model.cfg.n_heads, model.cfg.d_head) if heads else (model.cfg.d_model,)
            if tuple(vector.shape) != shape:
                theirs, ours = (" x ".join(map(str, sizes)) for sizes in (vector.shape, shape))
                raise ValueError(
                    f"vectors were extracted from a model with {'heads' if heads else 'd_model'} {theirs} "
                    f"({self.provenance.model}); this model has {ours}. Extract vectors from this model first."
                )
        try:
            check_hook_names(model, self.hook_names)
        except ValueError as refusal:
            raise ValueError(
                f"vectors must be at hook points of this model. {refusal} Extract vectors from this model first."
            ) from None

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with its provenance, in one rename."""
        header = {"rt_lens": json.dumps({"schema": _SCHEMA, "kind": "steering_vectors", **self.provenance.to_json()})}
        # Cloned: safetensors refuses one vector under two names.
        tensors = {name: vector.detach().cpu().clone().contiguous() for name, vector in self.vectors.items()}
        for name, eraser in self.erasers.items():
            for part, tensor in vars(eraser).items():
                tensors[f"{_ERASER}{part}/{name}"] = tensor.detach().cpu().clone().contiguous()
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
            provenance = Provenance.from_json(stored)
            parts = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_ERASER)}
            erasers = {
                name: Eraser(*(parts.pop(f"{_ERASER}{part}/{name}") for part in ("left", "right", "centre")))
                for name in tensors
                if f"{_ERASER}left/{name}" in parts
            }
            if parts:
                raise KeyError(next(iter(parts)))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise ValueError(
                f"path must be a file of steering vectors of schema {_SCHEMA}, got {path}. For other tools' files use "
                "import_vectors."
            ) from None
        check_stored_names(tensors, path)
        # safetensors gives names in the order of letters, block 10 before block 2.
        forward = {name: tensors[name] for name in sorted(tensors, key=forward_order)}
        return cls(forward, provenance, erasers)


def project_out(vector: Float[Tensor, "*heads d"], nuisances: Float[Tensor, "*heads k d"]) -> Float[Tensor, "*heads d"]:
    """A vector without its components in the span of others."""
    return Ablate(nuisances.movedim(-2, 0))(vector[None, None])[0, 0]


def orthogonalised(sets: Sequence[SteeringVectors]) -> list[SteeringVectors]:
    """Several sets of vectors, each without the directions of those before it (Gram-Schmidt, in the order given).

    Raises:
        ValueError: if a set lacks a hook point of an earlier one, or nothing is left of it.

    Example:
        >>> formality = extract_vectors(model, load_pairs("formality").sample(8), layers=[21])
        >>> mood, rest = orthogonalised([vectors, formality])
        >>> abs(mood.cosine(rest)["blocks.21.hook_resid_post"]) < 1e-4
        True
    """
    done: list[SteeringVectors] = []
    for vectors in sets:
        done.append(vectors.without(*done) if done else vectors)
    return done


def _kind(hook: str) -> str:
    """What follows the block in a hook name: `resid_post` -> `hook_resid_post`, `z` -> `attn.hook_z`."""
    if "hook_" in hook:
        return hook
    return f"attn.hook_{hook}" if hook in ("q", "k", "v", "z") else f"hook_{hook}"


def hook_names(layers: Sequence[int], hook: str = "resid_post") -> list[str]:
    """Hook names of blocks at one kind of hook point.

    Example:
        >>> hook_names([18, 21]), hook_names([18], "z")
        (['blocks.18.hook_resid_post', 'blocks.21.hook_resid_post'], ['blocks.18.attn.hook_z'])
    """
    return [f"blocks.{layer}.{_kind(hook)}" for layer in layers]


def layer_of(hook_name: str) -> int:
    """The block of a hook name.

    Example:
        >>> layer_of("blocks.18.hook_resid_post")
        18
    """
    return int(hook_name.split(".")[1])


def forward_order(hook_name: str) -> tuple[int, int]:
    """Where in a forward pass a hook point comes: sorts hook names."""
    parts = hook_name.split(".")
    if parts[0] != "blocks":
        return (-1, 0) if "embed" in hook_name else (10**6, 0)
    kinds = ["hook_resid_pre", "hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
    return int(parts[1]), kinds.index(parts[-1]) if parts[-1] in kinds else 0


def check_stored_names(names: Iterable[str], path: str | Path) -> None:
    """Refuses a file whose tensors are named as no hook point of a block is.

    Raises:
        ValueError: names the first that is wrong.
    """
    for name in names:
        if not re.fullmatch(r"blocks\.\d{1,4}\.(\w+\.)?hook_\w+", name, re.ASCII):
            raise ValueError(
                f"{path} must name its tensors after hook points of blocks, such as blocks.18.hook_resid_post, got "
                f"{name[:80]!r}."
            )
