"""Hugging Face folders as TransformerBridges, whose logits are compared with transformers' before use.

A bridge has its own code for attention and norms, family by family. A model that it computes wrongly is refused here.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rt_lens.models.backends.base import allowed_error, positions_of
from rt_lens.models.backends.plain import separate_fused
from rt_lens.models.forward import unknown_hook
from rt_lens.models.llama import FAMILIES


class CheckedBridge(TransformerBridge):
    """A TransformerBridge that refuses hooks at unknown points and keeps its tokenizer, as a HookedTransformer does.

    TransformerBridge itself ignores such hooks silently, so an edit would do nothing.
    """

    @property
    def tokenizer(self) -> Any:
        """Hugging Face's, as it is: a bridge's own setter would rebuild it, to add a start token to every text."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def hooks(self, fwd_hooks: Sequence[Any] = (), bwd_hooks: Sequence[Any] = (), *args: Any, **kwargs: Any) -> Any:
        self._check_known([*fwd_hooks, *bwd_hooks])
        hooked: AbstractContextManager[Any] = super().hooks(list(fwd_hooks), list(bwd_hooks), *args, **kwargs)
        return hooked

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        self._check_known([*kwargs.get("fwd_hooks", ()), *kwargs.get("bwd_hooks", ())])
        return super().run_with_hooks(*args, **kwargs)

    def process_weights(self, *args: Any, **kwargs: Any) -> Any:
        separate_fused(self)
        return super().process_weights(*args, **kwargs)

    def _check_known(self, hooks: Sequence[Any]) -> None:
        known = self.hook_dict if hooks else {}
        for name, _ in hooks:
            if isinstance(name, str) and name not in known:
                raise ValueError(unknown_hook("hooks", name, self))


def bridge_from_folder(
    folder: Path,
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
) -> TransformerBridge:
    """The TransformerBridge of a Hugging Face folder, without its tokenizer (see `give_tokenizer`).

    Args:
        folder: with a `config.json` and weights.
        name: its name in messages.
        device: torch device.
        dtype: type of the weights.
        trust_remote_code: run the folder's own Python code.
        device_map: where each part goes, instead of `device`.
        offload_folder: folder for the parts that go on the disk.

    Raises:
        ValueError: no bridge covers its architecture, it needs its own Python code, it is no language model that reads
            from left to right, or the bridge's logits differ from transformers'.
    """
    loader = _Loader(device if device_map is None else None, name)
    placed: dict[str, Any] = {"device": device}
    if device_map is not None:
        placed = {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
        if offload_folder is not None:  # which TransformerLens 3 does not take
            placed["offload_folder"] = str(offload_folder)
    try:
        bridge = TransformerBridge.boot_transformers(
            str(folder), dtype=dtype, trust_remote_code=trust_remote_code, tokenizer=_stand_in(),
            model_class=loader, **placed,  # type: ignore[arg-type]
        )  # fmt: skip
    except KeyError as error:
        unknown = next(iter(error.args), None)
        if unknown not in _rope_types(folder):
            raise
        raise ValueError(
            f"model: {name} must have a rope_type that the installed transformers knows, got {unknown!r}. Install a "
            "release that knows it."
        ) from None
    except ValueError as error:
        if "Could not determine supported architecture" in str(error):
            architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
            raise ValueError(
                f"model: {name} must be of an architecture that HookedTransformer or TransformerBridge covers, got "
                f"{' or '.join(architectures or ['none'])}. Use a model of another family."
            ) from None
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model: {name} must be of an architecture that transformers knows, got one that brings Python code of its "
            "own. If you trust its author, load it with load_model(..., trust_remote_code=True)."
        ) from None
    _compare(bridge, loader, name)
    bridge.__class__ = CheckedBridge
    return bridge


class _Loader:
    """Takes the place of transformers' model class: loads the model, and keeps its logits before the bridge wraps it.

    Attributes:
        expected: the logits of each probe.
        failure: the exception, if the model gave none.
    """

    def __init__(self, device: str | None, name: str) -> None:
        self.device, self.name = device, name  # no device if transformers places the parts
        self.expected: list[Float[Tensor, "real d_vocab"]] = []
        self.failure: Exception | None = None

    def from_pretrained(self, folder: str, **settings: Any) -> Any:
        from transformer_lens.model_bridge.sources import transformers as sources

        architecture = sources.determine_architecture_from_hf_config(settings["config"])
        model_class: Any = sources.get_hf_model_class_for_architecture(architecture)
        if model_class not in (AutoModelForCausalLM, AutoModelForImageTextToText):
            raise ValueError(
                f"model: {self.name} must be a language model that reads from left to right, got {architecture} "
                f"({model_class.__name__}). Use a model of another family."
            )
        read: Any = model_class.from_pretrained
        model, found = read(folder, **settings, output_loading_info=True, ignore_mismatched_sizes=True)
        _refuse_other_weights(Path(folder).name, model.config.model_type, found)
        model = model.eval() if self.device is None else model.eval().to(self.device)
        parameters = inspect.signature(model.forward).parameters
        try:
            for tokens, mask in _probes(model.get_input_embeddings().num_embeddings, self.device or "cpu"):
                positions = {"position_ids": positions_of(mask)} if "position_ids" in parameters else {}
                with torch.no_grad():
                    logits = model(tokens, attention_mask=mask, use_cache=False, **positions).logits
                self.expected.append(logits[mask.bool()])
        except Exception as failure:  # any error of unknown code: the numbers are then unverified
            self.failure = failure
        return model


def _refuse_other_weights(folder: str, family: str, found: Mapping[str, Any]) -> None:
    """Raises a ValueError for weights that are missing or of another shape, which transformers makes up at random.

    What a folder holds besides is refused where rt_lens knows all that the family has.
    """
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model: {folder} must hold the weight {missing[0]}, got none. Download the folder again, or save it with "
            "save_pretrained."
        )
    for name, stored, described in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"model: {name} of {folder} must have the shape {tuple(described)} that its config.json describes, got "
            f"{tuple(stored)}. Correct the config.json."
        )
    if (more := sorted(found["unexpected_keys"])) and family in FAMILIES:
        raise ValueError(
            f"model: {folder} must hold only weights that its config.json describes, got {', '.join(more[:4])} too. "
            "Correct the configuration, or save the model again with save_pretrained."
        )


def _rope_types(folder: Path) -> set[str]:
    """The kinds of rotary embeddings that a folder's configuration names, in any of its spellings."""
    found: set[str] = set()

    def read(part: dict[str, Any]) -> dict[str, Any]:
        found.update(part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str))
        return part

    json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=read)
    return found


def _probes(d_vocab: int, device: Any) -> list[tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]]:
    """Tokens spread over the vocabulary, with masks: a single row, and two rows of which one is padded on the left."""
    tokens = torch.linspace(0, d_vocab - 1, 48, device="cpu").long().view(2, 24).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    return [(tokens[:1], mask[:1]), (tokens, mask)]


@torch.no_grad()
def _compare(bridge: TransformerBridge, loader: _Loader, name: str) -> None:
    """Raises a ValueError for a bridge whose logits differ from transformers' logits of the same weights."""
    family = type(bridge.original_model).__name__
    try:
        if loader.failure is not None:
            raise loader.failure
        d_vocab = bridge.original_model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        logits = [
            bridge(tokens, attention_mask=mask)[mask.bool()]
            for tokens, mask in _probes(d_vocab, loader.device or "cpu")
        ]
    except Exception as failure:
        warnings.warn(
            f"model: {name} ({family}) cannot be compared with transformers ({type(failure).__name__}: "
            f"{str(failure)[:120]}), so its numbers are unverified. Compare some logits yourself before you use them.",
            stacklevel=2,
        )
        return
    for where, ours, theirs in zip(("", " of a batch padded on the left"), logits, loader.expected, strict=True):
        error = _relative_error(ours, theirs)
        if not error < allowed_error(theirs.dtype):
            raise ValueError(
                f"model: {name} must compute what transformers computes, got other logits{where} from "
                f"TransformerLens's bridge of {family} (relative error {error:.2g}). Use a model of another family, or "
                "a release of transformer-lens that fixes this one."
            )


def _relative_error(ours: Float[Tensor, "n d"], theirs: Float[Tensor, "n d"]) -> float:
    """Norm of the difference over the norm of transformers' logits, where these are finite."""
    finite: Bool[Tensor, "n d"] = theirs.isfinite()
    ours, theirs = ours[finite].double(), theirs[finite].double()
    return float((ours - theirs).norm() / theirs.norm())


def _stand_in() -> Any:
    """A small tokenizer for the bridge to test while it is built, since not every tokenizer passes its tests."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="b", pad_token="b", unk_token="a")
