"""Steering: operators bound to hook points, with where, when and how strongly they act. It changes no weight.

Every function returns a list of `(hook name, Edit)` for `model.hooks(fwd_hooks=...)`. Lists can be concatenated with
`+`; at one hook point edits act in the order of the list. Layers, heads, positions and schedules mean the same in all
of them:

- `layers`: block indices. Defaults to every block that has a vector.
- `hook`: kind of hook point: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or `z` (one per head).
- `positions`: `all`; `prompt`, every token that the model is given, with a prefill where there is one; `generated`,
  every token that it writes; `last`, the last token that it is given, as everywhere in rt_lens
  (`rt_lens.models.positions` defines the words); a list of token indices in the prompt, padding not counted, negative
  from its end; or a boolean mask over these indices, by row or for all rows. A token keeps its index whether or not
  there is padding or a key-value cache. `generated` begins with the first new token as the model reads it; that token
  itself was chosen at `last`.
- `schedule`: index of a generated token (0 for the first) -> scaling factor at that token; the prompt has 1.
- `heads`: head indices, with hook `z`. Defaults to all.
"""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
