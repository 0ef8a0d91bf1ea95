"""Reading activations: batched `run_with_cache` over texts. Knows nothing of vectors or steering."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from rt_lens.forward import quick
from rt_lens.tokens import batches, encode, pad, pad_id_of, tokenizer_of


def check_hook_names(model: Any, hook_names: Sequence[str]) -> None:
    """Refuses hook names that the model has not.

    Raises:
        ValueError: names the nearest ones; also if there is no name at all.
    """
    if not hook_names:
        raise ValueError("hook: the list is empty. Name at least one hook point.")
    for name in hook_names:
        if name not in model.hook_dict:
            near = get_close_matches(name, model.hook_dict, n=3)
            raise ValueError(f"hook: {name!r} is not in this model ({model.cfg.n_layers} blocks). Near: {near}.")


@torch.no_grad()
def last_token_activations(
    model: Any, texts: Sequence[str], hook_names: Sequence[str], *, batch_size: int = 32, progress: bool = False
) -> dict[str, Float[Tensor, "text d_model"]]:
    """Activations at the last token of each text.

    Texts are sorted by length and padded on the left; nothing after the last hook point is computed.

    Args:
        model: HookedTransformer or TransformerBridge.
        texts: through the chat template already, special tokens included.
        hook_names: for example `["blocks.18.hook_resid_post"]`.
        batch_size: texts per forward pass.
        progress: show a bar.

    Returns:
        hook name -> Float[Tensor, "text d_model"] in the order of `texts`, float32 on the CPU.

    Raises:
        ValueError: for an unknown hook name or an empty list of texts.
    """
    check_hook_names(model, hook_names)
    in_blocks = all(name.startswith("blocks.") for name in hook_names)
    stop = 1 + max(int(name.split(".")[1]) for name in hook_names) if in_blocks else model.cfg.n_layers
    found = {name: torch.empty(len(texts), model.cfg.d_model) for name in hook_names}
    with quick(model), tqdm(total=len(texts), desc="activations", unit="text", disable=not progress) as bar:
        for batch in batches(model, texts, batch_size):
            _, cache = model.run_with_cache(
                batch.tokens,
                attention_mask=batch.mask,
                names_filter=list(hook_names),
                stop_at_layer=stop if stop < model.cfg.n_layers else None,
                return_type=None,
            )
            for name in hook_names:
                found[name][list(batch.rows)] = cache[name][:, -1].float().cpu()
            bar.update(len(batch.rows))
    return found


@torch.no_grad()
def token_activations(
    model: Any, text: str, hook_names: Sequence[str]
) -> tuple[list[str], dict[str, Float[Tensor, "pos d_model"]]]:
    """Activations at every token of one text.

    Returns:
        The tokens as strings, and hook name -> Float[Tensor, "pos d_model"].
    """
    check_hook_names(model, hook_names)
    ids = encode(model, text)
    batch = pad([ids], pad_id_of(model)).to(model.cfg.device)
    with quick(model):
        _, cache = model.run_with_cache(
            batch.tokens, attention_mask=batch.mask, names_filter=list(hook_names), return_type=None
        )
    words = [tokenizer_of(model).decode([token]) for token in ids]
    return words, {name: cache[name][0].float().cpu() for name in hook_names}
