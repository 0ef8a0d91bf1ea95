"""What is refused wherever steering vectors are used, with one wording for each refusal. It runs no model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from rt_lens.models.protocol import Model
from rt_lens.vectors.operators import Ablate, Clamp, Erase, Operator, Strength
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of

_MID = "hook_resid_mid"
_READ_ONLY = ".hook_in"  # of a bridge's norm or MLP


def refuse_heads(vectors: Mapping[str, Tensor]) -> None:
    """Refuses vectors of heads where one of the residual stream is needed.

    Raises:
        ValueError: names the hook point.
    """
    for name, vector in vectors.items():
        if vector.ndim > 1:
            raise ValueError(
                f"vectors must have one vector per hook point, of size d_model, got one for each head at {name}. "
                "Extract them with hook='resid_post' or hook='attn_out'."
            )


def refuse_head_hook(hook_name: str) -> None:
    """Refuses a hook point where each head has its own activations, before anything is read there.

    Raises:
        ValueError: names the hook point.
    """
    if hook_name.endswith((".hook_q", ".hook_k", ".hook_v", ".hook_z")):
        raise ValueError(
            f"hook must be a point with one activation per token, of size d_model, got {hook_name}, which has one for "
            "each head. Use hook='attn_out'; `separability` takes vectors of heads."
        )


def refuse_several_per_layer(hook_names: Iterable[str]) -> None:
    """Refuses several vectors in one block where a table has one row for each layer.

    Raises:
        ValueError: names the first such layer.
    """
    layers = [layer_of(name) for name in hook_names]
    if repeated := {layer for layer in layers if layers.count(layer) > 1}:
        raise ValueError(
            f"vectors must have one vector per layer, got several at layer {min(repeated)}. "
            "Use vectors.select(layers, hook)."
        )


def one_per_layer(model: Model, vectors: SteeringVectors) -> dict[str, Float[Tensor, "d_model"]]:
    """The vectors in float32 on the CPU, if they fit the model and there is one of size d_model for each layer.

    Raises:
        ValueError: says which of these does not hold.
    """
    vectors.check_fits(model)
    refuse_several_per_layer(vectors.hook_names)
    refuse_heads(vectors.vectors)
    return {name: vector.detach().cpu().float() for name, vector in vectors.vectors.items()}


def must_reach_stream(hook_name: str, operator: Operator, multiplier: Strength, hook_names: Collection[str]) -> bool:
    """Whether an edit is wrong where it changes only what the MLP reads, and not the residual stream.

    A whole projection that is done again at the block's end gives the same either way.

    Args:
        hook_name: hook point of the edit.
        operator: what it does there.
        multiplier: how strongly.
        hook_names: hook points at which the same is done.
    """
    projects = isinstance(operator, Ablate | Clamp | Erase) and not isinstance(multiplier, Tensor) and multiplier == 1
    repeated = hook_name.replace("resid_mid", "resid_post") in hook_names
    return hook_name.endswith(_MID) and not (projects and repeated)


def refuse_read_only(hook_name: str) -> None:
    """Refuses a hook point that can be read but not written.

    A bridge calls by the name of `hook_resid_mid` what the next norm or the MLP reads (`ln2.hook_in`, `mlp.hook_in`),
    past which the residual stream goes on.

    Raises:
        ValueError: says where to edit instead.
    """
    if hook_name.endswith(_READ_ONLY):
        raise ValueError(
            "hook must be a point on the residual stream, got resid_mid of a TransformerBridge, which is only what the "
            "MLP reads. Edit at attn_out or resid_post, or load the model with backend='hooked'."
        )
