"""The losses of a batch, and their gradients, each into the weights that it may train. Knows no optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rt_lens.models.divergence import kl_divergence
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import pad_id_of
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.config import LOSSES, TuneConfig
from rt_lens.tuning.direction_targets import ResolvedTarget
from rt_lens.tuning.losses import break_loss, cosine_loss, preference_loss, shift_loss, token_loss
from rt_lens.tuning.references import likelihoods
from rt_lens.tuning.tuning_data import Batch, Row, TuningData, logits_of, read, unmixed


class Objective:
    """The weighted losses of a run."""

    edited = False
    """Whether hooks are part of what is tuned, so that the KL on neutral prompts is computed under them too."""

    def __init__(
        self,
        model: Model,
        targets: Sequence[ResolvedTarget],
        config: TuneConfig,
        data: TuningData,
        trained: Mapping[str, Mapping[str, nn.Parameter]],
        *,
        steered: bool = False,
    ) -> None:
        """Losses over prepared data.

        Args:
            model: with the leaves of `trained` in it.
            targets: where cosines are read.
            config: weights of the losses.
            data: its centres and first block.
            trained: loss -> the parameters that it trains.
            steered: the KL is KL(tuned and steered || untuned), as in KL-then-steer, and not KL(untuned || tuned), of
                the tuned model alone.
        """
        self.model, self.config, self.data, self.steered = model, config, data, steered
        self.targets = targets if config.cosine_weight else []
        self.names = list(dict.fromkeys(name for target in self.targets for name in target.names))
        self.vectors = [{n: v.to(model.cfg.device) for n, v in target.vectors.items()} for target in self.targets]
        self.groups = {loss: list(parameters.values()) for loss, parameters in trained.items()}
        self.together = len({tuple(map(id, group)) for group in self.groups.values()}) == 1
        self.pad_id = pad_id_of(model)
        self.progress = 1.0

    def at(self, step: int, steps: int) -> None:
        """Says which step follows, of how many: some losses are scheduled."""
        self.progress = step / steps

    def gradients(self, rows: Sequence[Row], neutral: Sequence[Row], hooks: Sequence[FwdHook]) -> dict[str, float]:
        """Adds the gradients of a step to the parameters', a few rows at a time, and returns its losses.

        Averages are over the whole step, so that any micro-batch size gives the same gradients.
        """
        losses: dict[str, float] = {}
        for terms in self._terms(rows, neutral, hooks):
            self._backward(terms)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0.0) + float(term.detach())
        return self._named(losses)

    @torch.no_grad()
    def values(
        self, rows: Sequence[Row], neutral: Sequence[Row], hook_lists: Sequence[Sequence[FwdHook]]
    ) -> dict[str, float]:
        """The losses over all these rows, as means over several lists of hooks, with the weights of the last step."""
        losses: dict[str, float] = {}
        self.progress = 1.0
        for hooks in hook_lists:
            for terms in self._terms(rows, neutral, hooks):
                for name, term in terms.items():
                    losses[name] = losses.get(name, 0.0) + float(term) / len(hook_lists)
        return self._named(losses)

    def _named(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The losses by the names of a history, and their weighted sum."""
        total = sum(self._weight(name) * value for name, value in losses.items())
        return {**{self.config.loss_name(name): value for name, value in losses.items()}, "total": total}

    def _weight(self, loss: str) -> float:
        """A loss's weight now. Circuit breakers go from what is to go towards what is to stay (Zou et al. 2024)."""
        schedule = {}
        if self.config.residual_loss == "circuit_breaker":
            schedule = {"cosine": 1 - self.progress / 2, "kl": self.progress / 2}
        return self.config.weight(loss) * schedule.get(loss, 1.0)

    def _terms(
        self, rows: Sequence[Row], neutral: Sequence[Row], hooks: Sequence[FwdHook]
    ) -> Iterator[dict[str, Tensor]]:
        """The losses in portions that sum to their averages over all rows."""
        positions = rows[0].places if rows else ()
        counts = {position: sum(int(row.places[position].sum()) for row in rows) for position in positions}
        predicted, of_neutral = (sum(int(row.predicts.sum()) for row in part) for part in (rows, neutral))
        preference = self.config.token_weight > 0 and self.config.token_loss == "preference"
        if self.names or (self.config.token_weight and not preference):
            for part in self._parts(rows):
                yield self._dual(self._batch(part), counts, predicted, hooks)
        for part in self._parts(rows) if preference else ():
            yield {"token": self._preference(part, hooks) / len(rows)}
        for part in self._parts(neutral):
            retain = self.config.residual_loss == "circuit_breaker"
            loss = self._retain if retain else self._kl
            yield {"kl": loss(self._batch(part), hooks if self.steered or self.edited else ()) / of_neutral}

    def _parts(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        # A validation's many rows take no more memory than a step's.
        size = self.config.micro_batch_size or max(self.config.batch_size, self.config.neutral_batch_size)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _batch(self, rows: Sequence[Row]) -> Batch:
        return Batch.of(rows, self.pad_id, self.model.cfg.device)

    def _dual(
        self, batch: Batch, counts: Mapping[str, int], predicted: int, hooks: Sequence[FwdHook]
    ) -> dict[str, Tensor]:
        """Loss at the hook points and cross-entropy, from one forward pass."""
        config, terms = self.config, {}
        reads_tokens = config.token_weight > 0 and config.token_loss == "cross_entropy"
        with self._precision():
            activations, final = read(
                self.model, batch, self.names, self.data.first_block, final=reads_tokens, hooks=hooks
            )
            logits = None if final is None else logits_of(self.model, final)
        if self.targets:
            of_targets = [
                target.weight * self._residual(target, vectors, activations, batch) / counts[target.positions]
                for target, vectors in zip(self.targets, self.vectors, strict=True)
            ]
            terms["cosine"] = torch.stack(of_targets).sum()
        if logits is not None:
            losses = token_loss(logits.float(), batch.choices, batch.shares, config.free_nats)
            terms["token"] = losses.sum() / predicted
        return terms

    def _residual(
        self, target: ResolvedTarget, vectors: Mapping[str, Tensor], activations: Mapping[str, Tensor], batch: Batch
    ) -> Tensor:
        """The loss at the hook points, summed over positions, averaged over hook points."""
        mask = batch.places[target.positions]
        if self.config.residual_loss != "cosine":
            loss = shift_loss if self.config.residual_loss == "lorra" else break_loss
            return torch.stack(
                [loss(activations[name][mask].float(), batch.aims[name]).sum() for name in vectors]
            ).mean()
        centres = self.data.centres if self.config.centred else {}
        sums = [
            cosine_loss(
                activations[name][mask].float(), vector, target.direction, centres.get((target.positions, name))
            ).sum()
            for name, vector in vectors.items()
        ]
        return torch.stack(sums).mean()

    def _preference(self, rows: Sequence[Row], hooks: Sequence[FwdHook]) -> Tensor:
        """The preference loss, summed over pairs of answers."""
        given, rejected = self._batch(rows), self._batch([row.rejected for row in rows if row.rejected is not None])
        with self._precision():
            first = self.data.first_block
            likely, unlikely = (likelihoods(self.model, batch, first, hooks) for batch in (given, rejected))
        return preference_loss(likely, unlikely, given.likelihood, rejected.likelihood, self._beta()).sum()

    def _beta(self) -> float:
        return self.config.beta

    def _retain(self, batch: Batch, hooks: Sequence[FwdHook]) -> Tensor:
        """Distance to the untuned residuals of neutral text, summed over positions, averaged over hook points."""
        with self._precision():
            activations, _ = read(self.model, batch, self.names, self.data.first_block, final=False, hooks=hooks)
        distances = [shift_loss(activations[n][batch.predicts].float(), batch.aims[n]).sum() for n in self.names]
        return torch.stack(distances).mean()

    def _kl(self, batch: Batch, hooks: Sequence[FwdHook]) -> Tensor:
        """KL to the untuned model, summed over positions; both sides in the weights' own precision."""
        assert batch.reference is not None
        with unmixed(self.model):
            _, final = read(self.model, batch, [], self.data.first_block, final=True, hooks=hooks)
            assert final is not None
            tuned = logits_of(self.model, final).float().log_softmax(-1)
            with torch.no_grad():
                untuned = logits_of(self.model, batch.reference).float().log_softmax(-1)
        return (kl_divergence(untuned, tuned) if self.steered else kl_divergence(tuned, untuned)).sum()

    def _precision(self) -> AbstractContextManager[Any]:
        kind = torch.device(self.model.cfg.device).type
        if self.config.precision == "float32":
            return nullcontext()
        if self.config.precision == "auto" and not (kind == "cuda" and torch.cuda.is_bf16_supported()):
            return nullcontext()
        return torch.autocast(kind, torch.bfloat16)

    def _backward(self, terms: Mapping[str, Tensor]) -> None:
        """Each loss into its own parameters; in one pass where all losses train the same ones."""
        weighted = {name: self._weight(name) * terms[name] for name in LOSSES if name in terms}
        if self.together:
            torch.autograd.backward(torch.stack(list(weighted.values())).sum())
            return
        for left, (name, term) in enumerate(reversed(list(weighted.items()))):
            torch.autograd.backward(term, inputs=self.groups[name], retain_graph=left + 1 < len(weighted))
