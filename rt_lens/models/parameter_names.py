"""What the name of a parameter says: its block, what it is within the block, and how its numbers lie in memory.

Four styles are known: HookedTransformer (`blocks.3.attn.W_Q`), TransformerBridge (Hugging Face's names with
`_original_component` in between), GPT-2 (`transformer.h.3.attn.c_attn.weight`) and the Llama and NeoX styles of Hugging
Face (`model.layers.3.self_attn.q_proj.weight`, `gpt_neox.layers.3.mlp.dense_h_to_4h.weight`). It knows no tuning.
"""

from __future__ import annotations

import re

from jaxtyping import Float
from torch import Tensor

# `_original_component` is what a TransformerBridge puts between a module and its owner.
_WRAPPER = "._original_component"
# Blocks are `blocks` in TransformerLens, `layers` or, in GPT-2, `h` on Hugging Face.
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)\.(.+)$")
_IN_A_BLOCK: dict[str, tuple[str, ...]] = {
    r"(?:c_attn|qkv|qkv_proj|query_key_value)\.weight$": ("q", "k", "v"),  # before v_proj, with which qkv_proj ends
    r"attn\.W_Q$|q_proj\.weight$|att(?:n|ention)\.q\.weight$": ("q",),
    r"attn\._?W_K$|k_proj\.weight$|att(?:n|ention)\.k\.weight$": ("k",),
    r"attn\._?W_V$|v_proj\.weight$|att(?:n|ention)\.v\.weight$": ("v",),
    r"attn\.W_O$|att(?:n|ention)\.(?:o|o_proj|out_proj|c_proj|dense)\.weight$": ("o",),
    r"gate_up_proj\.weight$": ("gate", "up"),
    r"(?:mlp|ffn)\.(?:.*W_gate|.*gate_proj\.weight|gate\.weight)$": ("gate",),
    r"(?:mlp|ffn)\.(?:.*W_in|.*up_proj\.weight|in\.weight|.*c_fc\.weight|.*dense_h_to_4h\.weight)$"
    r"|(?:^|\.)fc(?:1|_in)\.weight$": ("up",),
    r"(?:mlp|ffn)\..*(?:W_out|down_proj\.weight|c_proj\.weight|dense_4h_to_h\.weight)$"
    r"|(?:^|\.)fc(?:2|_out)\.weight$": ("down",),
    r"\._?b_\w+$|\.bias$|^ln\w*\.b$": ("bias",),
    r"^ln\w*\.w$|norm\w*\.w(?:eight)?$|ln_\d\.weight$": ("norm",),
}
_TABLES = r"(?:^|\.)(?:embed_tokens|embed_positions|embed_in|word_embeddings|wte|wpe)\.weight$"  # [token, d_model]
_EMBEDDING = re.compile(_TABLES)
_OUTSIDE: dict[str, tuple[str, ...]] = {
    rf"(?:^|\.)(?:pos_)?embed\.W_(?:E|pos)$|{_TABLES}": ("embed",),
    r"(?:^|\.)(?:unembed\.)?b_U$|\.bias$|(?:^|\.)ln\w*\.b$": ("bias",),
    r"(?:^|\.)ln\w*\.w$|(?:norm\w*|ln_f)\.w(?:eight)?$": ("norm",),
}
_OWN_AXES = re.compile(r"\._?W_\w+$")  # TransformerLens's own layout: [.., in, out], with an axis of heads in attention


def block_and_modules(name: str) -> tuple[int | None, tuple[str, ...]]:
    """The block of a parameter and which of `q, k, v, o, gate, up, down, bias, norm` it is within the block.

    A fused matrix is several of them. What lies outside the blocks has no block and is `embed`, `bias`, `norm` or
    nothing.

    Args:
        name: as `model.named_parameters()` gives it.

    Example:
        >>> block_and_modules("blocks.3.attn.W_Q"), block_and_modules("transformer.h.3.attn.c_attn.weight")
        ((3, ('q',)), (3, ('q', 'k', 'v')))
        >>> block_and_modules("gpt_neox.layers.2.mlp.dense_h_to_4h.weight"), block_and_modules("unembed.W_U")
        ((2, ('up',)), (None, ()))
    """
    plain = plain_name(name)
    in_block = _BLOCK.search(plain)
    table, rest = (_OUTSIDE, plain) if in_block is None else (_IN_A_BLOCK, in_block[2])
    modules = next((modules for pattern, modules in table.items() if re.search(pattern, rest)), ())
    return (None if in_block is None else int(in_block[1])), modules


def plain_name(name: str) -> str:
    """A name without the wrappers that a TransformerBridge puts between a module and its owner.

    Example:
        >>> plain_name("model.layers.0._original_component.mlp._original_component.up_proj.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return name.replace(_WRAPPER, "")


def module_label(name: str) -> str:
    """One label for a parameter in a table: `q`, `up`, `q+k+v` for a fused matrix, `other` for what has no name here.

    Example:
        >>> [module_label(name) for name in ("blocks.0.mlp.W_in", "h.0.attn.c_attn.weight", "unembed.W_U")]
        ['up', 'q+k+v', 'other']
    """
    return "+".join(block_and_modules(name)[1]) or "other"


def keeps_heads_apart(name: str) -> bool:
    """Whether a weight has TransformerLens's layout, [in, out] or with an axis of heads, and not Hugging Face's.

    Example:
        >>> keeps_heads_apart("blocks.0.attn.W_Q"), keeps_heads_apart("model.layers.0.self_attn.q_proj.weight")
        (True, False)
    """
    return _OWN_AXES.search(name) is not None


def as_matrix(name: str, weight: Tensor) -> Float[Tensor, "out into"]:
    """A weight as it maps a column, all heads together; Hugging Face's weights are returned as they are stored.

    Example:
        >>> import torch
        >>> as_matrix("blocks.0.attn.W_Q", torch.zeros(4, 32, 8)).shape  # [head, d_model, d_head]
        torch.Size([32, 32])
        >>> as_matrix("model.layers.0.mlp.up_proj.weight", torch.zeros(96, 32)).shape
        torch.Size([96, 32])
    """
    if not keeps_heads_apart(name):
        return weight
    if weight.ndim == 2:
        return weight.T
    return weight.flatten(0, 1).T if name.endswith("W_O") else weight.movedim(1, 2).flatten(0, 1)


def from_matrix(name: str, matrix: Float[Tensor, "out into"], shape: tuple[int, ...]) -> Tensor:
    """`as_matrix` undone: the weight, of the parameter's own shape.

    Example:
        >>> import torch
        >>> weight = torch.randn(4, 32, 8)
        >>> torch.equal(from_matrix("blocks.0.attn.W_Q", as_matrix("blocks.0.attn.W_Q", weight), (4, 32, 8)), weight)
        True
    """
    if not keeps_heads_apart(name):
        return matrix
    if len(shape) == 2:
        return matrix.T
    if name.endswith("W_O"):
        return matrix.T.reshape(shape)
    return matrix.reshape(shape[0], shape[2], shape[1]).movedim(2, 1)


def written_by_read(name: str, weight: Tensor, *, input_first: bool = False) -> Float[Tensor, "write read"]:
    """A weight as a matrix of rows that are written to and columns that are read from; one column for a bias or norm.

    Args:
        name: of the parameter.
        weight: its numbers, or a change of them.
        input_first: whether it is stored as [in, out], as GPT-2's are (`Slot.input_first`).

    Example:
        >>> import torch
        >>> written_by_read("h.0.mlp.c_fc.weight", torch.zeros(32, 128), input_first=True).shape  # reads 32, writes 128
        torch.Size([128, 32])
        >>> written_by_read("blocks.0.mlp.b_out", torch.zeros(32)).shape
        torch.Size([32, 1])
    """
    modules = block_and_modules(name)[1]
    if modules in (("bias",), ("norm",)) or weight.ndim < 2:
        return weight.reshape(-1, 1)
    if not modules:
        return weight.flatten(1)
    return weight.T if input_first or _EMBEDDING.search(plain_name(name)) else as_matrix(name, weight)


def reads_from_stream(name: str) -> bool:
    """Whether a weight reads from the residual stream: q, k, v, gate, up, or a fused matrix of these.

    Example:
        >>> reads_from_stream("blocks.0.attn.W_Q"), reads_from_stream("blocks.0.attn.W_O")
        (True, False)
    """
    modules = set(block_and_modules(name)[1])
    return bool(modules) and modules <= {"q", "k", "v", "gate", "up"}


def writes_to_stream(name: str) -> bool:
    """Whether a weight or bias writes into the residual stream: o, down, their biases, the embeddings.

    Example:
        >>> writes_to_stream("blocks.0.mlp.b_out"), writes_to_stream("blocks.0.mlp.b_in")
        (True, False)
    """
    if block_and_modules(name)[1] == ("bias",):
        name = re.sub(r"(^|\.)(_?)b_(\w+)$", r"\1\2W_\3", re.sub(r"bias$", "weight", name))  # whose bias it is
    return block_and_modules(name)[1] in (("o",), ("down",), ("embed",))
