"""How strongly an intervention acts, and the strength at which it does a given damage.

Arms compared at different damage are not compared: a stronger dose of the worse one can score higher. Damage here is
KL(untuned || intervention) per token on neutral texts. Give it plain ones and the untuned model's own responses to
neutral prompts: a system prompt, or an edit of generated tokens, acts on the latter alone. KL grows about with the
square of a small strength, so a secant between logarithms finds the strength for a budget in a few evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rt_lens.arms.intervention import (
    Intervention,
    Interventions,
    SystemPrompt,
    applied,
    check_intervention,
    each_of,
)
from rt_lens.common.statistics.intervals import Interval
from rt_lens.evaluation.texts import PerplexityResult, Scored, perplexity, scored_list
from rt_lens.models.prompts import SharedBelow
from rt_lens.models.protocol import Model
from rt_lens.steering.edits import Edit
from rt_lens.tuning.delta import WeightDelta

LARGEST = 64.0
"""The largest strength that is tried: further from what an arm was made for, it is another arm."""
SMALLEST = 1e-4
MAX_EVALUATIONS = 16


def scaled(intervention: Interventions, strength: float) -> Interventions:
    """An intervention at another strength: the multiplier of edits, or a factor of weight deltas; of several, all.

    Args:
        intervention: a WeightDelta, hooks as `add` gives, None, or a tuple of these.
        strength: 1 leaves it as it is, 0 makes it act on nothing.

    Raises:
        ValueError: for a hook that is a function of your own, which has no multiplier, a SystemPrompt, or a strength
            not finite.

    Example:
        >>> (_, edit), = scaled(add(vectors, [21], multiplier=-2.0), 0.5)
        >>> edit.multiplier
        -1.0
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength}.")
    parts = each_of(intervention)
    acting = tuple(_scaled(part, strength) for part in parts)
    return acting if parts is intervention else acting[0]


def has_strength(intervention: Interventions) -> bool:
    """Whether an intervention can be scaled. A system prompt is what it is, and so is anything together with one.

    Example:
        >>> has_strength(add(vectors, [21])), has_strength(rtl.arms.SystemPrompt("You are a pirate."))
        (True, False)
    """
    return not any(isinstance(part, SystemPrompt) for part in each_of(intervention))


def _scaled(intervention: Intervention, strength: float) -> Intervention:
    check_intervention(intervention, "intervention")
    if intervention is None:
        return None
    if isinstance(intervention, SystemPrompt):
        raise ValueError(
            "intervention must have a strength, got a SystemPrompt, which has none. Measure it as it is (compare_arms)."
        )
    if isinstance(intervention, WeightDelta):
        return strength * intervention
    return [(name, _scaled_edit(name, edit, strength)) for name, edit in intervention]


def _scaled_edit(name: str, edit: Any, strength: float) -> Edit:
    if not isinstance(edit, Edit):
        raise ValueError(
            f"intervention must consist of edits, as `add`, `ablate` and the like give, to have a strength, got a "
            f"{type(edit).__name__} at {name}. Bind an operator of your own with `rtl.steering.Edit`."
        )
    return replace(edit, multiplier=edit.multiplier * strength)


class KLMeter:
    """KL(untuned || intervention) on texts, whose untuned log-probabilities are computed once for all interventions.

    Args:
        model: the untuned model.
        texts: plain texts such as `neutral_paragraphs()`, and a Response for each of the model's own answers.
        seed: seed for the bootstraps.

    Example:
        >>> meter = KLMeter(model, texts)
        >>> meter(add(vectors, [21], 2.0)).mean > meter(add(vectors, [21], 1.0)).mean > 0
        True
    """

    def __init__(self, model: Model, texts: Iterable[Scored], *, seed: int = 0) -> None:
        self.model, self.texts, self.seed = model, scored_list(texts, "texts"), seed
        self._shared = SharedBelow(model)
        self._untuned: PerplexityResult | None = None

    def __call__(self, intervention: Interventions) -> Interval:
        """Mean KL per token, in nats, with its 95 % interval over texts."""
        if self._untuned is None:
            with self._shared:
                self._untuned = perplexity(self.model, self.texts, keep=True, seed=self.seed)
        with self._shared, applied(self.model, *each_of(intervention)):
            measured = perplexity(self.model, self.texts, reference=self._untuned, seed=self.seed)
        assert measured.mean_kl is not None
        return measured.mean_kl


@dataclass(frozen=True)
class Calibrated:
    """An intervention at the strength whose KL is a budget, or the reason why it has none.

    Attributes:
        budget: the KL asked for, in nats per token.
        strength: factor of the intervention that was given; None if no strength reaches the budget.
        intervention: the one at that strength; None if there is none.
        kl: KL reached on the texts of the calibration; None if there is none.
        held_out: KL reached on other texts; None if none were given, or there is no strength.
        evaluations: strength -> mean KL, of all that was tried.
        reason: why no strength reaches the budget; empty if one does.

    Example:
        >>> near, far = calibrate(add(vectors, [21], -1.0), KLMeter(model, texts), [0.01, 1000.0])
        >>> near.reached, 0.5 < near.strength < 4, near.reason
        (True, True, '')
        >>> far.reached, far.intervention, far.reason
        (False, None, 'KL is at most ... up to 64 times its strength.')
    """

    budget: float
    strength: float | None
    intervention: Interventions = field(repr=False)
    kl: Interval | None
    held_out: Interval | None
    evaluations: Mapping[float, float] = field(repr=False)
    reason: str = ""

    @property
    def reached(self) -> bool:
        """Whether a strength was found."""
        return self.strength is not None


def calibrate(
    intervention: Interventions,
    meter: KLMeter,
    kl: float | Sequence[float],
    *,
    held_out: KLMeter | None = None,
    tolerance: float = 0.03,
) -> list[Calibrated]:
    """Finds the strengths of an intervention whose KL is each of some budgets.

    Args:
        intervention: hooks, a weight delta, or a tuple of both, which are scaled together.
        meter: measures KL on the texts of the calibration. Use them for nothing else.
        kl: one budget or several, in nats per token.
        held_out: measures the KL reached on other texts.
        tolerance: largest relative difference from a budget on the calibration's texts.

    Returns:
        One result for each budget, in order. A budget that no strength up to 64 reaches is a result with a reason, not
        an error.

    Raises:
        ValueError: for a budget or tolerance that is not above 0, or an intervention without a strength.

    Example:
        >>> meter, others = KLMeter(model, texts), KLMeter(model, neutral)
        >>> (found,) = calibrate(add(vectors, [21], 1.0), meter, 0.01, held_out=others)
        >>> abs(found.kl.mean / 0.01 - 1) < 0.03
        True
    """
    budgets = [float(budget) for budget in (kl if isinstance(kl, Sequence) else [kl])]
    for name, values in (("kl", budgets), ("tolerance", [tolerance])):
        if wrong := [value for value in values if not (value > 0 and math.isfinite(value))]:
            raise ValueError(f"{name} must be above 0, got {wrong[0]}.")
    search = _Search(intervention, meter, math.log1p(tolerance))
    return [search.calibrated(budget, held_out) for budget in budgets]


class _Search:
    """The strengths tried so far, which all budgets share."""

    def __init__(self, intervention: Interventions, meter: KLMeter, tolerance: float) -> None:
        self.intervention, self.meter, self.tolerance = intervention, meter, tolerance
        self.tried: dict[float, Interval] = {}

    def calibrated(self, budget: float, held_out: KLMeter | None) -> Calibrated:
        strength: float | None = 1.0
        for _ in range(MAX_EVALUATIONS):
            if strength is None or self._is_near(budget):
                break
            if strength not in self.tried:
                self.tried[strength] = self.meter(scaled(self.intervention, strength))
            strength = self._next(budget)
        evaluations = {strength: kl.mean for strength, kl in sorted(self.tried.items())}
        found = self._nearest(budget)
        if not self._is_near(budget):
            return Calibrated(budget, None, None, None, None, evaluations, self._reason(budget))
        acting = scaled(self.intervention, found)
        elsewhere = None if held_out is None else held_out(acting)
        return Calibrated(budget, found, acting, self.tried[found], elsewhere, evaluations)

    def _next(self, budget: float) -> float | None:
        """The strength to try: between two that bracket the budget, or beyond the nearest; None at the ends."""
        above = min((s for s in self.tried if self._kl(s) >= budget), default=None)
        below = max((s for s in self.tried if self._kl(s) < budget and (above is None or s < above)), default=None)
        if above is None:
            assert below is not None
            return None if below >= LARGEST else min(LARGEST, below * min(4.0, self._step(below, budget)))
        if below is None:
            return None if above <= SMALLEST else max(SMALLEST, above * max(0.125, self._step(above, budget)))
        return self._between(below, above, budget)

    def _between(self, below: float, above: float, budget: float) -> float:
        """The secant's crossing, at least a tenth of the way from either end, so that the bracket shrinks."""
        low, high = math.log(max(self._kl(below), 1e-12)), math.log(min(self._kl(above), 1e6))
        share = min(0.9, max(0.1, (math.log(budget) - low) / (high - low)))
        return math.exp((1 - share) * math.log(below) + share * math.log(above))

    def _step(self, strength: float, budget: float) -> float:
        """The factor to the budget, if KL goes on growing as between the two strengths nearest; at first, squared."""
        power, kl = 2.0, max(self._kl(strength), 1e-12)
        others = [s for s in self.tried if s != strength and 0 < self._kl(s) < math.inf]
        if others:
            other = min(others, key=lambda s: abs(math.log(s / strength)))
            power = math.log(self._kl(other) / kl) / math.log(other / strength)
        return float((budget / kl) ** (1 / min(4.0, max(1.0, power))))

    def _kl(self, strength: float) -> float:
        kl = self.tried[strength].mean
        return kl if math.isfinite(kl) else math.inf

    def _nearest(self, budget: float) -> float:
        return min(self.tried, key=lambda strength: self._distance(strength, budget))

    def _is_near(self, budget: float) -> bool:
        return bool(self.tried) and self._distance(self._nearest(budget), budget) <= self.tolerance

    def _distance(self, strength: float, budget: float) -> float:
        kl = self._kl(strength)
        return abs(math.log(kl / budget)) if 0 < kl < math.inf else math.inf

    def _reason(self, budget: float) -> str:
        highest = max(self.tried, key=self._kl)
        if self._kl(highest) < budget:
            return f"KL is at most {self._kl(highest):.2g} up to {max(self.tried):g} times its strength."
        lowest = min(self.tried, key=self._kl)
        if self._kl(lowest) > budget:
            return f"KL is at least {self._kl(lowest):.2g} down to {min(self.tried):g} times its strength."
        return f"KL jumps over {budget:g} within {len(self.tried)} strengths that were tried."
