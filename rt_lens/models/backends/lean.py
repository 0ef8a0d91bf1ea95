"""Llama-style blocks without hook points: the same numbers with a fifth of the operations around the matrix products.

A block that nobody listens inside has no need to call its hook points, to lay heads out on an axis of their own before
each of them, or to make a tensor for each step of a norm. What is left is written out here once, for the blocks of
either kind of model: seven products, two norms, the rotation of queries and keys, and torch's fused attention. Where
the matrices that read the same input lie one after the other in memory, as `hooked_folder` lays them, one product does
the work of several: four for a block, which counts where there are few rows. For a single new token the queries that
share a key are laid out as the rows of one small product, so that keys and values are read once instead of copied for
each head.

The plain path (TransformerLens's or Hugging Face's own blocks) stays: it runs where somebody listens, and the tests
compare this one with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rt_lens.models.backends.products import product


class Weights(NamedTuple):
    """The weights of one block, matrices as [out, in]; `middle` is a bias that follows the product of gate and up.

    `qkv` and `gate_up` are views of several matrices as one, and of their biases; None where memory does not allow it.
    """

    first_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    second_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    middle: Tensor | None = None
    down_bias: Tensor | None = None
    qkv: Joined | None = None
    gate_up: Joined | None = None


class Joined(NamedTuple):
    """Several matrices [out, in] as one, with their biases as one, and the rows of each."""

    matrix: Tensor
    bias: Tensor | None
    rows: list[int]


def joined(matrices: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Joined | None:
    """A view of matrices that lie one after the other in one memory, and of their biases; None where they do not."""
    matrix, bias = _in_one(matrices), _in_one([bias for bias in biases if bias is not None])
    if matrix is None or (bias is None) != all(each is None for each in biases):
        return None
    if bias is not None and len(bias) != len(matrix):
        return None
    return Joined(matrix, bias, [len(each) for each in matrices])


def _in_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The parts as a view along the first axis, if each begins in memory where the one before it ends."""
    if not parts or any(not part.is_contiguous() for part in parts):
        return None
    memory, first = {part.untyped_storage().data_ptr() for part in parts}, parts[0]
    follows = all(a.data_ptr() + a.numel() * a.element_size() == b.data_ptr() for a, b in pairwise(parts))
    if len(memory) > 1 or not follows or len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        return None
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _products(
    x: Tensor, whole: Joined | None, matrices: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The product of one input with each matrix."""
    if whole is not None:
        return product(x, whole.matrix, whole.bias).split(whole.rows, -1)
    return [product(x, matrix, bias) for matrix, bias in zip(matrices, biases, strict=True)]


def queries_keys_values(
    weights: Weights, residual: Float[Tensor, "batch pos d_model"], eps: float, d_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each as [batch, pos, head, d_head], before rotation."""
    x = norm(residual, weights.first_norm, eps)
    matrices, biases = (weights.q, weights.k, weights.v), (weights.q_bias, weights.k_bias, weights.v_bias)
    q, k, v = (each.view(*residual.shape[:2], -1, d_head) for each in _products(x, weights.qkv, matrices, biases))
    return q, k, v


def after_attention(
    weights: Weights, residual: Float[Tensor, "batch pos d_model"], z: Float[Tensor, "batch pos heads"], eps: float
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the block, from what attention has read."""
    residual = residual + product(z, weights.o, weights.o_bias)
    x = norm(residual, weights.second_norm, eps)
    matrices, biases = (weights.gate, weights.up), (weights.gate_bias, weights.up_bias)
    gate, up = _products(x, weights.gate_up, matrices, biases)
    gate = F.silu(gate)
    middle = gate * up if gate.requires_grad or up.requires_grad else gate.mul_(up)
    if weights.middle is not None:
        middle = middle + weights.middle
    return residual + product(middle, weights.down, weights.down_bias)


def norm(x: Float[Tensor, "... d_model"], weight: Float[Tensor, "d_model"], eps: float) -> Float[Tensor, "... d_model"]:
    """Root mean square norm; in 16 bits its statistics are in float32."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def rotated(
    x: Float[Tensor, "batch pos head d"], cos: Float[Tensor, "#batch pos 1 d"], sin: Float[Tensor, "#batch pos 1 d"]
) -> Float[Tensor, "batch pos head d"]:
    """Rotary embedding, with sines whose first half has its sign turned (`signed`)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def signed(sin: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Sines as `rotated` takes them."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def attended(
    q: Float[Tensor, "batch pos head d"],
    k: Float[Tensor, "batch all_pos kv_head d"],
    v: Float[Tensor, "batch all_pos kv_head d"],
    allowed: Tensor | None,
    causal: bool,
    scale: float,
) -> Float[Tensor, "batch pos heads"]:
    """What attention reads for each token, its heads side by side."""
    batch, pos, heads, d = q.shape
    k, v, groups = k.transpose(1, 2), v.transpose(1, 2), k.shape[2]
    if pos == 1:  # the queries of a group differ as those of several tokens would
        together = q.reshape(batch, groups, heads // groups, d)
        z = F.scaled_dot_product_attention(together, k, v, attn_mask=allowed, scale=scale)
        return z.reshape(batch, 1, heads * d)
    if groups != heads and allowed is not None and q.is_cuda:  # with a mask CUDA has no fused kernel for groups
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != heads
    )
    return z.transpose(1, 2).reshape(batch, pos, heads * d)
