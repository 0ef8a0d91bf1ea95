"""What an intervention does to prompts with two answers: does it turn one into the other, and at what cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rt_lens.arms.calibration import scaled
from rt_lens.arms.intervention import Interventions, applied, each_of
from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.data.two_answers import TwoAnswers
from rt_lens.models.protocol import Model
from rt_lens.tuning.answer_edits import encoded_answers
from rt_lens.tuning.losses import faithfulness_loss

STRENGTHS = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class AnswerEffects:
    """Logit differences of the two answers without an intervention, with it, and with its opposite.

    Attributes:
        differences: strength (-1, 0, 1) -> Float[Tensor, "prompt"], logit of the positive minus the negative answer.
        others: strength (-1, 1) -> Float[Tensor, "prompt"], KL from the untuned model over all other tokens, in nats.
        seed: of the bootstraps.

    Example:
        >>> pairs = load_two_answers("indirect_object", part="test")[:6]
        >>> effects = answer_effects(model, pairs, add(vectors, [21], 0.5))
        >>> effects.table()[0]["n"], effects.opposite.n, effects.others[1.0].shape
        (6, 6, torch.Size([6]))
    """

    differences: Mapping[float, Float[Tensor, "prompt"]]
    others: Mapping[float, Float[Tensor, "prompt"]]
    seed: int

    @property
    def opposite(self) -> Interval:
        """Share of prompts on which the intervention raises the difference and its opposite lowers it."""
        low, untuned, high = (self.differences[strength] for strength in STRENGTHS)
        return share_interval(int(((low < untuned) & (untuned < high)).sum()), len(untuned))

    @property
    def shift(self) -> Interval:
        """Half the distance between the intervention's and its opposite's difference, in logits: mean over prompts."""
        return mean_interval(((self.differences[1.0] - self.differences[-1.0]) / 2).tolist(), self.seed)

    @property
    def faithfulness(self) -> Interval:
        """KL over all other tokens, mean over prompts and both signs."""
        return mean_interval(((self.others[1.0] + self.others[-1.0]) / 2).tolist(), self.seed)

    def table(self) -> list[dict[str, Any]]:
        """A row per strength: n; difference, low, high (logits); positive, positive_low, positive_high (share of
        prompts on which the positive answer is the likelier); others, others_low, others_high (nats); seed."""
        rows = []
        for strength, differences in self.differences.items():
            n, mean, low, high = mean_interval(differences.tolist(), self.seed)
            _, share, share_low, share_high = share_interval(int((differences > 0).sum()), n)
            other = mean_interval(self.others[strength].tolist(), self.seed) if strength in self.others else None
            rows.append(
                {"strength": strength, "n": n, "difference": mean, "low": low, "high": high, "positive": share,
                 "positive_low": share_low, "positive_high": share_high,
                 "others": 0.0 if other is None else other.mean, "others_low": None if other is None else other.low,
                 "others_high": None if other is None else other.high, "seed": self.seed}
            )  # fmt: skip
        return rows


def answer_effects(
    model: Model, pairs: Sequence[TwoAnswers], intervention: Interventions, *, batch_size: int = 16, seed: int = 0
) -> AnswerEffects:
    """Measures an intervention and its opposite on prompts with two answers (Stoehr et al. 2024, 2410.04962).

    Args:
        model: HookedTransformer or TransformerBridge; left as it was.
        pairs: the prompts. Their answers' first tokens are compared.
        intervention: hooks as `add` or `scale` give, or a WeightDelta; its strength is taken as 1 and as -1.
        batch_size: prompts in a forward pass.
        seed: of the bootstraps.

    Raises:
        ValueError: for an intervention without a strength, or pairs that `encoded_answers` refuses.

    Example:
        >>> pairs = load_two_answers("capitals", part="validation")[:4]
        >>> effects = answer_effects(model, pairs, rtl.steering.scale({"blocks.20.hook_mlp_out": 0.5}))
        >>> sorted(effects.differences)
        [-1.0, 0.0, 1.0]
    """
    answers = encoded_answers(model, pairs)
    logits = {}
    for strength in STRENGTHS:
        acting = scaled(intervention, strength) if strength else None
        with applied(model, *each_of(acting)):
            logits[strength] = answers.all_logits(model, batch_size)
    tokens = answers.answers.cpu()
    of_answers = {strength: found.gather(1, tokens) for strength, found in logits.items()}
    return AnswerEffects(
        {strength: found[:, 0] - found[:, 1] for strength, found in of_answers.items()},
        {strength: faithfulness_loss(logits[strength], logits[0.0], tokens) for strength in (-1.0, 1.0)},
        seed,
    )
