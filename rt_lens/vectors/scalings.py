"""Scalings: one learned factor per hook point, with where it came from. Plain data; no model is run here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from rt_lens.common.files import read_safetensors, write_atomically
from rt_lens.models.activations import check_hook_names
from rt_lens.models.protocol import Model
from rt_lens.vectors.steering_vectors import Provenance, check_stored_names, forward_order, layer_of

_SCHEMA = 1
EVERYWHERE = "all"
"""The role of a scaling that acts on every token."""


@dataclass(frozen=True)
class Scaling:
    """What multiplies activations: h (1 + s alpha), alpha learned per hook point (Stoehr et al. 2024, 2410.04962).

    Attributes:
        alphas: role -> hook name -> Float[Tensor, ""], or Float[Tensor, "head 1"] at `attn.hook_z`. The role `all`
            stands for every token; others are phrases of a template (`TwoAnswers.roles`).
        provenance: where they came from; `method` is `scaling`, `n_pairs` the number of prompts.

    Raises:
        ValueError: if there is none, or one is not finite.

    Example:
        >>> import torch
        >>> mlp, attention = "blocks.12.hook_mlp_out", "blocks.14.hook_attn_out"
        >>> alphas = {"all": {mlp: torch.tensor(-0.5), attention: torch.tensor(0.0)}}
        >>> scaling = Scaling(alphas, vectors.provenance)
        >>> scaling.n_active, [row["alpha"] for row in scaling.table()]
        (1, [-0.5, 0.0])
        >>> Scaling.load(scaling.save("scaling.safetensors")).alphas == alphas
        True
    """

    alphas: Mapping[str, Mapping[str, Float[Tensor, "..."]]] = field(repr=False)
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.alphas or not all(self.alphas.values()):
            raise ValueError("alphas must have at least one hook point for each role, got none.")
        for role, of_role in self.alphas.items():
            for name, alpha in of_role.items():
                if not torch.isfinite(alpha).all():
                    raise ValueError(f"alphas must be finite, got NaN or infinite values at {name} ({role}).")

    @property
    def n_parameters(self) -> int:
        """How many factors were learned."""
        return sum(alpha.numel() for of_role in self.alphas.values() for alpha in of_role.values())

    @property
    def n_active(self) -> int:
        """How many of them are not 0."""
        return sum(int(alpha.count_nonzero()) for of_role in self.alphas.values() for alpha in of_role.values())

    @property
    def everywhere(self) -> Mapping[str, Float[Tensor, "..."]]:
        """Hook name -> alpha of a scaling that acts on every token, as `steering.scale` takes it.

        Raises:
            ValueError: for a scaling by roles, which needs to know where these stand in a prompt.
        """
        if set(self.alphas) != {EVERYWHERE}:
            raise ValueError(
                f"alphas must act on every token, got those of the roles {', '.join(self.alphas)}. Learn them with "
                "positions='all', or use `rtl.tuning.scale_roles` with prompts that have these roles."
            )
        return self.alphas[EVERYWHERE]

    def table(self) -> list[dict[str, Any]]:
        """A row per factor: role, layer, component (`attn_out`, `mlp_out` or `head 3`), alpha, n (prompts), seed."""
        rows = []
        about = {"n": self.provenance.n_pairs, "seed": self.provenance.seed}
        for role, of_role in self.alphas.items():
            for name, alpha in of_role.items():
                kind = name.rpartition("hook_")[2]
                for head, value in enumerate(alpha.flatten().tolist()):
                    component = f"head {head}" if kind == "z" else kind
                    rows.append(
                        {"role": role, "layer": layer_of(name), "component": component, "alpha": value, **about}
                    )
        return rows

    def check_fits(self, model: Model) -> None:
        """Refuses a model without these hook points, or with another number of heads.

        Raises:
            ValueError: says what the scaling was made for.
        """
        made_for = f"The scaling was learned on {self.provenance.model}."
        for of_role in self.alphas.values():
            try:
                check_hook_names(model, list(of_role))
            except ValueError as refusal:
                raise ValueError(f"alphas must be at hook points of this model. {refusal} {made_for}") from None
            for name, alpha in of_role.items():
                if alpha.ndim and alpha.shape[0] != model.cfg.n_heads:
                    raise ValueError(
                        f"alphas must have one factor for each of {model.cfg.n_heads} heads, got {alpha.shape[0]} at "
                        f"{name}. {made_for}"
                    )

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with its provenance, in one rename."""
        header = {"schema": _SCHEMA, "kind": "scaling", "roles": list(self.alphas), **self.provenance.to_json()}
        tensors = {
            f"{number}/{name}": alpha.detach().cpu().clone().contiguous()
            for number, of_role in enumerate(self.alphas.values())
            for name, alpha in of_role.items()
        }
        return write_atomically(Path(path), save(tensors, metadata={"rt_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> Scaling:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is truncated, or no file of a scaling.
        """
        tensors, header = read_safetensors(Path(path), "scaling")
        try:
            stored = json.loads(header["rt_lens"])
            if (stored.pop("kind"), stored.pop("schema")) != ("scaling", _SCHEMA):
                raise KeyError("kind")
            roles = stored.pop("roles")
            provenance = Provenance.from_json(stored)
            alphas: dict[str, dict[str, Tensor]] = {role: {} for role in roles}
            for key in sorted(tensors, key=lambda key: forward_order(key.partition("/")[2])):
                number, _, name = key.partition("/")
                alphas[roles[int(number)]][name] = tensors[key]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise ValueError(f"path must be a file of a scaling of schema {_SCHEMA}, got {path}.") from None
        for of_role in alphas.values():
            check_stored_names(of_role, path)
        return cls(alphas, provenance)
