"""Latent steering vectors: one vector per sentence, with which the frozen model writes that sentence.

The vector is added after one block at every token, and optimised so that greedy decoding from the start token gives the
sentence (Subramani et al. 2022, Extracting Latent Steering Vectors from Pretrained Language Models, arXiv 2205.05124).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn

from rt_lens.common.files import read_safetensors, write_atomically
from rt_lens.common.inputs import text_list
from rt_lens.common.progress import Bar
from rt_lens.models.backends import backend_of
from rt_lens.models.context import current_context
from rt_lens.models.forward import check_layers, model_name
from rt_lens.models.generation import generate_tokens
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import in_batches, pad, pad_id_of
from rt_lens.models.tokens.chats import tokenizer_of
from rt_lens.models.tokens.texts import text_of
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.weights import trainable_params

_SCHEMA = 1


@dataclass(frozen=True)
class LatentVectors:
    """One vector per sentence, at one block, and how well it gives the sentence back.

    Attributes:
        sentences: the texts.
        vectors: Float[Tensor, "sentence d_model"].
        layer: block after which a vector is added, at every token.
        losses: mean negative log-likelihood of each sentence's tokens under its vector, in nats.
        recovered: whether greedy decoding gives each sentence's tokens.
        steps: of the optimiser, for each sentence: until it was recovered, or all.
        seconds: for each sentence: its share of the time.
        model: name of the model.
        seed: of the start vectors.
        start: text between the start token and the sentence.

    Example:
        >>> found = latent_vectors(model, ["It rained.", "The sun shone."], layer=15, steps=2, progress=False)
        >>> found.vectors.shape, found.steps, len(found.decode(model))
        (torch.Size([2, 576]), (2, 2), 2)
        >>> between = found.between(0, 1, shares=[0.0, 0.5, 1.0])
        >>> bool((between[0] == found.vectors[0]).all()), len(found.decode(model, between))
        (True, 3)
        >>> again = LatentVectors.load(found.save("sentences.safetensors"))
        >>> again.sentences == found.sentences, bool((again.vectors == found.vectors).all())
        (True, True)
    """

    sentences: tuple[str, ...]
    vectors: Float[Tensor, "sentence d_model"] = field(repr=False)
    layer: int
    losses: tuple[float, ...]
    recovered: tuple[bool, ...]
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    model: str
    seed: int
    start: str = ""

    def decode(
        self, model: Model, vectors: Float[Tensor, "vector d_model"] | None = None, *, max_new_tokens: int | None = None
    ) -> list[str]:
        """The texts that the model writes greedily from its start token, with one vector each.

        Args:
            model: the one that the vectors are of.
            vectors: others, such as mixtures, at the same block; by default those of the sentences.
            max_new_tokens: by default the number of tokens of the sentence, or for other vectors of the longest one.

        Raises:
            ValueError: for a model of another width.
        """
        chosen = self.vectors if vectors is None else vectors
        if chosen.shape[1] != model.cfg.d_model:
            raise ValueError(
                f"vectors must have the model's width of {model.cfg.d_model}, got {chosen.shape[1]} ({self.model})."
            )
        sizes = [len(_ids(model, sentence)) for sentence in self.sentences]
        most = max_new_tokens or max(sizes)
        start = [_start(model, self.start)] * len(chosen)
        with model.hooks(fwd_hooks=[_hook(self.layer, AddByRow(chosen.to(model.cfg.device)))]):
            written = generate_tokens(model, start, most)
        if vectors is None and max_new_tokens is None:
            written = [ids[:size] for ids, size in zip(written, sizes, strict=True)]
        return [text_of(model, ids) for ids in written]

    def between(self, one: int, other: int, shares: Sequence[float]) -> Float[Tensor, "share d_model"]:
        """Mixtures of two sentences' vectors: share 0 is the first, 1 the second."""
        weights = torch.tensor(list(shares), dtype=self.vectors.dtype, device=self.vectors.device)[:, None]
        return (1 - weights) * self.vectors[one] + weights * self.vectors[other]

    def cosines(self) -> Float[Tensor, "sentence sentence"]:
        """Cosine of each pair of vectors."""
        unit = self.vectors / self.vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return unit @ unit.T

    def table(self) -> list[dict[str, Any]]:
        """A row per sentence: sentence, layer, recovered, loss, steps, seconds, seed."""
        return [
            {"sentence": sentence, "layer": self.layer, "recovered": recovered, "loss": loss, "steps": steps,
             "seconds": seconds, "seed": self.seed}
            for sentence, recovered, loss, steps, seconds in zip(
                self.sentences, self.recovered, self.losses, self.steps, self.seconds, strict=True
            )
        ]  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file, in one rename."""
        about = {name: value for name, value in vars(self).items() if name != "vectors"}
        header = {"rt_lens": json.dumps({"schema": _SCHEMA, "kind": "latent_vectors", **about})}
        return write_atomically(Path(path), save({"vectors": self.vectors.cpu().contiguous()}, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> LatentVectors:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is truncated, or no file of latent vectors.
        """
        tensors, header = read_safetensors(Path(path), "latent vectors")
        try:
            stored = json.loads(header["rt_lens"])
            if (stored.pop("kind"), stored.pop("schema")) != ("latent_vectors", _SCHEMA):
                raise KeyError("kind")
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
            }
            found = cls(vectors=tensors["vectors"], **values)
            if len({len(found.vectors), *(len(value) for value in values.values() if isinstance(value, tuple))}) != 1:
                raise ValueError("lengths")
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"path must be a file of latent vectors of schema {_SCHEMA}, got {path}.") from None
        return found


@torch.inference_mode(mode=False)
@torch.enable_grad()
def latent_vectors(
    model: Model,
    sentences: Sequence[str],
    *,
    layer: int,
    steps: int = 300,
    learning_rate: float = 0.5,
    start: str = "\n",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> LatentVectors:
    """Finds for each sentence a vector with which the model writes it (Subramani et al. 2022, arXiv 2205.05124).

    Adam lowers the cross-entropy of the sentence's tokens, each predicted from those before it and the vector. What is
    below the block does not depend on the vector and runs once. A sentence whose every token is the likeliest is
    recovered, and leaves the batch.

    Args:
        model: HookedTransformer or TransformerBridge; left as it was.
        sentences: texts to write, without the start token.
        layer: block after which the vector is added.
        steps: of the optimiser, at most.
        learning_rate: Adam's at the start; it falls linearly to a tenth.
        start: text after the start token. The very first token is an attention sink in many models, with a residual far
            longer than elsewhere (25,094 against 133 after block 12 of the bundled one), which no vector turns; so by
            default the sentence starts on a new line.
        batch_size: sentences at a time.
        seed: for the vectors' small random start.
        progress: show a bar.

    Raises:
        ValueError: for an empty sentence, one that is longer than the context, or a layer outside the model.
        FloatingPointError: a loss that is not finite; names the sentence.

    Example:
        >>> found = latent_vectors(model, ["It rained all day."], layer=15, steps=3, progress=False)
        >>> found.recovered, found.table()[0]["steps"]
        ((False,), 3)
    """
    check_layers(model, [layer])
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate!r}.")
    sentences = text_list(sentences, "sentences")
    encoded = [_ids(model, sentence) for sentence in sentences]
    for sentence, ids in zip(sentences, encoded, strict=True):
        if not ids or len(ids) >= model.cfg.n_ctx:
            raise ValueError(
                f"sentences must have from 1 to {model.cfg.n_ctx - 1} tokens, got {len(ids)}: {sentence[:60]!r}."
            )
    run = _Run(model, encoded, sentences, layer, steps, learning_rate, _start(model, start), seed)
    batches = in_batches([len(ids) for ids in encoded], batch_size)
    with trainable_params(model, {}, TuneConfig()):
        for numbers in Bar(batches, desc="latent vectors", unit="batch", disable=not progress):
            run.find(numbers)
    return LatentVectors(
        tuple(sentences), run.vectors, layer, tuple(run.losses), tuple(run.recovered), tuple(run.steps),
        tuple(run.seconds), model_name(model), seed, start,
    )  # fmt: skip


class AddByRow:
    """Adds to each row of the caller's list its own vector, at every token.

    Example:
        >>> import torch
        >>> AddByRow(torch.eye(2))(torch.zeros(2, 1, 2), None).tolist()
        [[[1.0, 0.0]], [[0.0, 1.0]]]
    """

    def __init__(self, vectors: Float[Tensor, "row d_model"]) -> None:
        self.vectors = vectors

    def __call__(self, activation: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        context = current_context()
        rows = range(len(activation)) if context is None or context.rows is None else context.rows
        return activation + self.vectors[list(rows), None].to(activation)

    def treats(self, row: int) -> int:
        """No two rows are treated alike."""
        return row


def _hook(layer: int, edit: AddByRow) -> FwdHook:
    return f"blocks.{layer}.hook_resid_post", edit


class _Run:
    """The search for the vectors of a list of sentences; what was found of each."""

    def __init__(
        self, model: Model, encoded: Sequence[Sequence[int]], sentences: Sequence[str], layer: int, steps: int,
        learning_rate: float, start: Sequence[int], seed: int,
    ) -> None:  # fmt: skip
        self.start = start
        self.model, self.encoded, self.sentences = model, encoded, sentences
        self.layer, self.most, self.learning_rate = layer, steps, learning_rate
        noise = torch.Generator().manual_seed(seed)
        random = torch.randn(len(encoded), model.cfg.d_model, generator=noise, device="cpu")
        self.vectors = 0.01 * random.to(model.cfg.device)
        self.losses, self.recovered = [math.inf] * len(encoded), [False] * len(encoded)
        self.steps, self.seconds = [0] * len(encoded), [0.0] * len(encoded)

    def find(self, numbers: Sequence[int]) -> None:
        """The vectors of one batch of sentences. Adam is elementwise, so a row does not notice the others."""
        vectors = nn.Parameter(self.vectors[list(numbers)].clone())
        optimiser = torch.optim.Adam([vectors], lr=self.learning_rate)
        below, mask, targets = self._below(numbers)
        open_rows = list(range(len(numbers)))
        for step in range(self.most + 1):
            began = time.monotonic()
            nll, right = self._read(vectors[open_rows], below[open_rows], mask[open_rows], targets[open_rows])
            self._keep(numbers, open_rows, vectors, nll, right, step)
            left = [row for row, done in zip(open_rows, right.tolist(), strict=True) if not done]
            if left and step < self.most:
                optimiser.zero_grad()
                torch.autograd.backward(nll.sum(), inputs=[vectors])
                self._adam(optimiser, vectors, left, step)
            spent = (time.monotonic() - began) / len(open_rows)
            for row in open_rows:
                self.seconds[numbers[row]] += spent
            if not (open_rows := left):
                break

    def _adam(self, optimiser: torch.optim.Adam, vectors: nn.Parameter, left: Sequence[int], step: int) -> None:
        """A step of the rows that are left; those recovered stay as they are."""
        optimiser.param_groups[0]["lr"] = self.learning_rate * (1 - 0.9 * step / self.most)
        before = vectors.detach().clone()
        optimiser.step()
        done = [row for row in range(len(vectors)) if row not in left]
        with torch.no_grad():
            vectors[done] = before[done]

    def _below(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The residual after the block without a vector, the mask, and each token's next one (-100 for none)."""
        device, before = self.model.cfg.device, [-100] * (len(self.start) - 1)
        batch = pad([[*self.start, *self.encoded[n][:-1]] for n in numbers], pad_id_of(self.model)).to(device)
        targets = pad([[*before, *self.encoded[n]] for n in numbers], -100).to(device).tokens
        backend = backend_of(self.model)
        with torch.no_grad(), backend.quick():
            below = backend.residual(batch.tokens, batch.mask, stop=self.layer + 1)
        return below, batch.mask, targets

    def _read(
        self, vectors: Float[Tensor, "row d_model"], below: Float[Tensor, "row pos d_model"],
        mask: Int[Tensor, "row pos"], targets: Int[Tensor, "row pos"],
    ) -> tuple[Float[Tensor, "row"], Tensor]:  # fmt: skip
        """Mean negative log-likelihood of each sentence, and whether all its tokens are the likeliest."""
        backend = backend_of(self.model)
        with backend.quick():
            final = backend.residual(below + vectors[:, None], mask, start=self.layer + 1)
            logits = backend.unembed(final[targets >= 0]).float()
        tokens, row_of = targets[targets >= 0], (targets >= 0).nonzero()[:, 0]
        nll = -logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        sizes = (targets >= 0).sum(1)
        means = torch.zeros(len(vectors), device=nll.device).index_add(0, row_of, nll) / sizes
        hits = torch.zeros(len(vectors), device=nll.device).index_add(0, row_of, (logits.argmax(-1) == tokens).float())
        return means, hits == sizes

    def _keep(
        self, numbers: Sequence[int], rows: Sequence[int], vectors: Tensor, nll: Tensor, right: Tensor, step: int
    ) -> None:
        """What is known of each sentence now: the vector of its lowest loss, or the one that gives it back."""
        for row, loss, done in zip(rows, nll.tolist(), right.tolist(), strict=True):
            number = numbers[row]
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss must be finite, got {loss} in step {step} of {self.sentences[number][:60]!r}. Lower "
                    "learning_rate."
                )
            self.steps[number] = step
            if done or loss < self.losses[number]:
                self.losses[number], self.recovered[number] = loss, done
                self.vectors[number] = vectors[row].detach()


def _ids(model: Model, sentence: str) -> list[int]:
    return list(tokenizer_of(model).encode(sentence, add_special_tokens=False))


def _start(model: Model, text: str = "") -> list[int]:
    """The token from which texts start, that of the tokenizer or its end-of-text token (GPT-2), and a text after it."""
    tokenizer = tokenizer_of(model)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [int(token), *tokenizer.encode(text, add_special_tokens=False)]
    raise ValueError("model must have a tokenizer with a start or an end-of-text token, got one with neither.")
