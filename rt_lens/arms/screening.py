"""Which rows of a data set push along a direction, before anything is tuned on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.metrics import roc_auc_score

from rt_lens.common.statistics.intervals import Interval, mean_interval
from rt_lens.models.activations import read_activations
from rt_lens.models.generation import generate
from rt_lens.models.positions import numbers_in, position_of, rows_of
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.chats import answered
from rt_lens.tuning.targets import Target
from rt_lens.vectors.guards import refuse_heads
from rt_lens.vectors.steering_vectors import SteeringVectors

_DRAWS = 1000


@dataclass(frozen=True)
class Screening:
    """How far each row's answer lies along the vector from what the model would answer itself.

    Attributes:
        table: a row per target: row (its index), difference, projection, own_projection (in lengths of the vector),
            prompt, answer, own_answer.
        behaviour: of the vectors.
        layer: block whose output is read.
        seed: of the bootstraps.

    Example:
        >>> targets = [Target(chat_text(model, "How was it?"), answer) for answer in ("Wonderful!", "Awful.")]
        >>> screening = screen(model, targets, vectors, layer=21)
        >>> screening.highest(1)["answer"].tolist()
        ['Wonderful!']
        >>> print(screening)
        2 rows along 'mood' at layer 21: mean difference ...
    """

    table: pd.DataFrame = field(repr=False)
    behaviour: str
    layer: int
    seed: int

    @property
    def difference(self) -> Interval:
        """Mean difference over rows (the projection difference of Chen et al. 2025), bootstrap interval over rows."""
        return mean_interval(self.table["difference"].to_numpy(float), self.seed)

    def highest(self, n: int) -> pd.DataFrame:
        """The rows that lie furthest along the vector, the furthest first."""
        return self.table.sort_values("difference", ascending=False, kind="stable").head(n)

    def auc(self, labels: Sequence[bool]) -> Interval:
        """Chance that a row with the label differs more than one without, with a bootstrap interval over rows.

        Args:
            labels: for each row whether it shows the behaviour.

        Raises:
            ValueError: if there is not one for each row, or all are the same.
        """
        given, values = np.asarray(labels, dtype=bool), self.table["difference"].to_numpy(float)
        if len(given) != len(values) or given.all() or not given.any():
            raise ValueError(
                f"labels must be one for each of {len(values)} rows, some true and some false, got {len(given)} of "
                f"which {int(given.sum())} are true. Give them in the order of the rows."
            )
        generator = np.random.default_rng(self.seed)
        sides = [np.flatnonzero(given == side) for side in (True, False)]
        draws = [np.concatenate([generator.choice(side, len(side)) for side in sides]) for _ in range(_DRAWS)]
        low, high = np.quantile([roc_auc_score(given[rows], values[rows]) for rows in draws], [0.025, 0.975])
        return Interval(len(values), float(roc_auc_score(given, values)), float(low), float(high))

    def __str__(self) -> str:
        mean = self.difference
        return (
            f"{mean.n} rows along {self.behaviour!r} at layer {self.layer}: mean difference {mean.mean:.2f} "
            f"[{mean.low:.2f}, {mean.high:.2f}] lengths of the vector from the model's own answers (seed {self.seed})."
        )


def screen(
    model: Model,
    targets: Sequence[Target],
    vectors: SteeringVectors,
    *,
    layer: int,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Screening:
    """Reads each answer, and the model's own greedy answer to the same prompt, along the vector.

    Both are means over the answer's tokens of the untuned model's activations (persona vectors, Chen et al. 2025,
    arXiv 2507.21509). A row that differs far from the model's own answer will move a model along the vector that is
    tuned on it.

    Args:
        model: HookedTransformer or TransformerBridge, untuned.
        targets: the data, as `load_targets` reads it.
        vectors: of the behaviour.
        layer: block whose output is read.
        max_new_tokens: length of the model's own answers.
        batch_size: texts per forward pass; it affects speed only.
        seed: of the bootstraps.
        progress: show bars.

    Raises:
        ValueError: for no target, one without an answer, or a layer without a vector.

    Example:
        >>> targets = [Target(chat_text(model, "How was it?"), answer) for answer in ("Wonderful!", "Awful.")]
        >>> differences = screen(model, targets, vectors, layer=21).table["difference"]
        >>> bool(differences[0] > differences[1])
        True
    """
    if not targets or any(not target.answer.strip() for target in targets):
        raise ValueError(
            f"targets must be at least one, each with an answer, got {len(targets)}, of which "
            f"{sum(not target.answer.strip() for target in targets)} are without. Leave these out."
        )
    vectors.check_fits(model)
    ((name, vector),) = vectors.at_layers([layer]).items()
    refuse_heads({name: vector})
    prompts = list(dict.fromkeys(target.prompt for target in targets))
    answers = generate(
        model, prompts, chat=False, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    own = dict(zip(prompts, answers, strict=True))
    mine = [replace(target, answer=own[target.prompt]) for target in targets]
    projections = {
        side: _projections(model, rows, name, batch_size, progress) @ vector.numpy() / float(vector.norm()) ** 2
        for side, rows in (("projection", targets), ("own_projection", mine))
    }
    table = pd.DataFrame(
        {
            "row": range(len(targets)), "difference": projections["projection"] - projections["own_projection"],
            **projections, "prompt": [str(target.prompt) for target in targets],
            "answer": [target.answer for target in targets], "own_answer": [target.answer for target in mine],
        }
    )  # fmt: skip
    return Screening(table, vectors.provenance.behaviour, layer, seed)


def _projections(
    model: Model, targets: Sequence[Target], name: str, batch_size: int, progress: bool
) -> Float[np.ndarray, "row d_model"]:
    """Mean activation over the tokens of each answer; of the last token before it where the answer is empty."""
    texts = [answered(model, target.prompt, target.answer) for target in targets]
    starts = [_start(text, target.prompt) for text, target in zip(texts, targets, strict=True)]
    named, last = position_of("mean response"), position_of("last")
    reads = [
        [numbers_in(row, named if row.prompt_end < len(row.text) else last, f"row {number}")]
        for number, row in enumerate(rows_of(model, texts, starts))
    ]
    activations = read_activations(model, texts, [name], reads, batch_size=batch_size, progress=progress)
    return activations[name][:, 0].double().numpy()


def _start(text: str, prompt: str) -> int:
    """The character at which the answer begins: after what the text shares with the prompt."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt))
    )
    return min(shared, len(text))
