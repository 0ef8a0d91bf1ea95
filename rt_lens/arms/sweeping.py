"""Steering over layers x multipliers x prompts, with any metric: resumable, and tidy in the end."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rt_lens.common.files import write_atomically
from rt_lens.common.inputs import text_list
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.data.questions import Question, as_questions
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.registry import ScorerLike, make_scorer
from rt_lens.evaluation.scorers import Likelihood, Scorer
from rt_lens.models.checksums import (
    Untellable,
    buffers_sha256,
    hooks_of,
    measure_sha256,
    parameters_sha256,
    tensors_sha256,
)
from rt_lens.models.context import token_context
from rt_lens.models.forward import logits_where, model_name
from rt_lens.models.generation import as_chat
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import batches
from rt_lens.models.tokens.chats import tokenizer_of
from rt_lens.steering.binding import add, steered
from rt_lens.steering.edits import FwdHook
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of

Metric = Callable[[Any, Sequence[str]], Sequence[float]]
"""A model (under whatever hooks) and prompts go in, one number for each prompt comes out."""


@dataclass(frozen=True)
class Answers:
    """Metric: a score of each prompt's answer.

    Attributes:
        scorer: a name, a `[scorer]` table, a function from answer to number, or a Scorer.
        max_new_tokens: length of an answer.
        batch_size: answers per batch.
    """

    scorer: ScorerLike = "vader"
    max_new_tokens: int = 24
    batch_size: int = 64

    @cached_property
    def made(self) -> Scorer:
        """The scorer, made once: it may take a model of its own."""
        return make_scorer(self.scorer)

    def __call__(self, model: Model, prompts: Sequence[str]) -> list[float]:
        score, asked = self.made, as_questions(prompts)
        answers = ask(
            model, asked, {score.reads}, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )  # fmt: skip
        return [float(value) for value in score(answers)]


@dataclass(frozen=True)
class Options:
    """Metric: the share of likelihood that a question's right options have among all its options.

    Attributes:
        questions: with their options; their prompts are what is swept over.
        form: `answers` or `letters`, see `likelihoods`.
        batch_size: questions per batch.
    """

    questions: tuple[Question, ...]
    form: Literal["answers", "letters"] = "answers"
    batch_size: int = 16

    def __call__(self, model: Model, prompts: Sequence[str]) -> list[float]:
        known = {question.prompt: question for question in self.questions}
        if missing := [prompt for prompt in prompts if prompt not in known]:
            raise ValueError(
                f"prompts: {missing[0][:60]!r} is none of the metric's questions. Sweep over their prompts."
            )
        asked = [known[prompt] for prompt in prompts]
        score = Likelihood("share", self.form)
        return score(ask(model, asked, {score.reads}, batch_size=4 * self.batch_size))


@dataclass(frozen=True)
class LogitDifference:
    """Metric: logit of one next token minus that of another, after each prompt.

    Attributes:
        positive: text of which the first token counts for the behaviour, with its leading space.
        negative: text of which the first token counts against it.
        batch_size: prompts per batch.
    """

    positive: str
    negative: str
    batch_size: int = 32

    @torch.no_grad()
    def __call__(self, model: Model, prompts: Sequence[str]) -> list[float]:
        tokenizer = tokenizer_of(model)
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (self.positive, self.negative)]
        if [] in encoded or encoded[0][0] == encoded[1][0]:
            raise ValueError(
                f"metric: {self.positive!r} and {self.negative!r} came, which do not begin with two different tokens. "
                "Give texts that do, with their leading spaces."
            )
        (first, *_), (second, *_) = encoded
        found = [0.0] * len(prompts)
        for batch in batches(model, as_chat(model, prompts), self.batch_size):
            last = torch.zeros_like(batch.mask, dtype=torch.bool)
            last[:, -1] = True
            with token_context(batch.mask, rows=batch.rows, n_rows=len(prompts)):
                logits = torch.cat(list(logits_where(model, batch.tokens, batch.mask, last)))
            for row, difference in zip(batch.rows, (logits[:, first] - logits[:, second]).tolist(), strict=True):
                found[row] = difference
        return found


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        table: a row per layer, multiplier and prompt: layer, multiplier, prompt (its number), score.
        prompts: what was asked.
        metric: its name.
        seed: of the bootstraps.
    """

    table: pd.DataFrame = field(repr=False)
    prompts: list[str] = field(repr=False)
    metric: str
    seed: int

    def summary(self) -> pd.DataFrame:
        """A row per layer and multiplier: n, mean, low, high (bootstrap 95 % interval over prompts), seed."""
        rows = []
        for (layer, multiplier), cell in self.table.groupby(["layer", "multiplier"], sort=True):
            found = mean_interval(cell["score"].to_numpy(float), self.seed)
            rows.append({"layer": layer, "multiplier": multiplier, **found._asdict(), "seed": self.seed})
        return pd.DataFrame(rows)

    def dose_response(self, layer: int) -> DoseResponse:
        """How the metric follows the multiplier at one layer.

        Raises:
            ValueError: if the layer was not swept, or had fewer than three multipliers.
        """
        cells = self.table[self.table["layer"] == layer]
        grid = cells.pivot(index="prompt", columns="multiplier", values="score").sort_index(axis=1)
        if len(grid.columns) < 3:
            swept = sorted(self.table["layer"].unique().tolist())
            raise ValueError(
                f"layer: {layer} has {len(grid.columns)} multipliers; at least 3 are wanted. Layers swept: {swept}."
            )
        doses = grid.columns.to_numpy(float)
        by_prompt = grid.to_numpy(float)
        drawn = np.random.default_rng(self.seed).integers(0, len(by_prompt), (1000, len(by_prompt)))
        low, high = np.quantile([_rank(doses, means) for means in by_prompt[drawn].mean(1)], [0.025, 0.975])
        centred = doses - doses.mean()
        moved = by_prompt - by_prompt[:, :1]  # so that a prompt which does not move has a slope of 0, not of -1e-17
        slopes = moved @ centred / (centred @ centred)
        return DoseResponse(
            layer,
            Interval(len(by_prompt), _rank(doses, by_prompt.mean(0)), float(low), float(high)),
            mean_interval(slopes, self.seed),
            share_interval(int((slopes < 0).sum()), len(slopes)),
            cells.assign(wrong_way=cells["prompt"].map(dict(zip(grid.index, slopes < 0, strict=True)))),
            self.summary().query("layer == @layer"),
            self.seed,
        )


@dataclass(frozen=True)
class DoseResponse:
    """How the metric follows the multiplier at one layer.

    Attributes:
        layer: block index.
        spearman: rank correlation of multiplier and mean metric (0 if nothing moves); bootstrap interval over prompts.
        slope: metric per unit of the multiplier (steerability, Tan et al. 2024), mean over prompts.
        wrong_way: share of the prompts whose own slope is below zero, with a Wilson interval.
        table: columns layer, multiplier, prompt (its number), score, wrong_way: for `plots.steerability`.
        summary: columns layer, multiplier, n, mean, low, high, seed: for `plots.steerability` too.
        seed: of the bootstrap.
    """

    layer: int
    spearman: Interval
    slope: Interval
    wrong_way: Interval
    table: pd.DataFrame = field(repr=False, compare=False)
    summary: pd.DataFrame = field(repr=False, compare=False)
    seed: int

    def __str__(self) -> str:
        rank, slope, wrong = self.spearman, self.slope, self.wrong_way
        return (
            f"Layer {self.layer}: Spearman {rank.mean:.2f} [{rank.low:.2f}, {rank.high:.2f}], slope {slope.mean:.2f} "
            f"[{slope.low:.2f}, {slope.high:.2f}] per unit, {wrong.mean:.0%} of prompts move the wrong way "
            f"[{wrong.low:.0%}, {wrong.high:.0%}] (n = {rank.n}, seed {self.seed})"
        )


def _rank(doses: Float[np.ndarray, "dose"], means: Float[np.ndarray, "dose"]) -> float:
    return float(stats.spearmanr(doses, means).statistic) if np.ptp(means) > 0 else 0.0


def sweep(
    model: Model,
    vectors: SteeringVectors,
    prompts: Iterable[str],
    *,
    layers: Iterable[int] | None = None,
    multipliers: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
    metric: str | Metric = "vader",
    steer: Callable[..., list[FwdHook]] = add,
    hook: str = "resid_post",
    path: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Steers at each layer with each multiplier and measures every prompt.

    All multipliers of a layer run as one list of prompts, each with its own; multiplier 0 runs once for all layers.

    Args:
        model: HookedTransformer or TransformerBridge, with whatever hooks it carries.
        vectors: the directions.
        prompts: user messages.
        layers: block indices; every block that has a vector for None.
        multipliers: in units of the vectors' own lengths.
        metric: name of a scorer for greedy answers, or a function from model and prompts to a number for each
            (`Answers`, `LogitDifference`, your own; it must keep the prompts' order, as rt_lens's functions do).
        steer: `add`, `add_preserving_norm`, or another function with the keywords layers, multiplier and hook.
        hook: kind of hook point.
        path: JSON file to keep finished layers in; a sweep of the same settings, weights and hooks goes on from there.
            Hooks are told apart by their code and by all that they hold, so that one which has counted or gathered
            something counts as another; metrics by their code, and the tensors and functions that they hold.
        seed: of the bootstrap intervals.
        progress: show a bar.

    Returns:
        A Sweep; `plots.sweep(found.summary())` draws its heat map.

    Raises:
        ValueError: if there is no prompt or multiplier, a layer has no vector, or `path` holds another sweep, or
            something on the model could not be told from others when the sweep goes on.

    Example:
        >>> found = sweep(model, vectors, test.topics[:16], layers=[14, 18, 22], path="runs/sweep.json")
        >>> print(found.dose_response(18).spearman)
    """
    prompts = text_list(prompts, "prompts")
    doses = sorted({float(multiplier) for multiplier in multipliers})
    if not doses or not np.isfinite(doses).all():
        raise ValueError(f"multipliers: {list(multipliers)} came; finite numbers, at least one, are wanted.")
    measure = metric if callable(metric) else Answers(metric)
    chosen = list(dict.fromkeys(layer_of(name) for name in vectors.at_layers(layers, hook)))
    vectors.select(chosen, hook).check_fits(model)
    bound = partial(steer, hook=hook)
    done = (
        _Done() if path is None else _Kept(Path(path), _settings(model, vectors, prompts, doses, measure, bound), model)
    )
    with Bar(chosen, desc="sweep", unit="layer", disable=not progress) as bar:
        for layer in bar:
            if done.has(layer):
                continue
            if 0.0 in doses and done.baseline is None:
                done.baseline = _measured(measure, model, prompts)
            done.keep(layer, _one_layer(model, vectors, prompts, layer, doses, measure, bound, done.baseline))
            bar.set_postfix(layer=layer)
    rows = [
        {"layer": layer, "multiplier": dose, "prompt": number, "score": score}
        for layer in chosen
        for dose, scores in zip(doses, done.layers[str(layer)], strict=True)
        for number, score in enumerate(scores)
    ]
    return Sweep(pd.DataFrame(rows), prompts, _metric_name(measure), seed)


def _one_layer(
    model: Model,
    vectors: SteeringVectors,
    prompts: Sequence[str],
    layer: int,
    doses: Sequence[float],
    measure: Metric,
    steer: Callable[..., list[FwdHook]],
    baseline: Sequence[float] | None,
) -> list[list[float]]:
    """Scores of each dose, each a list over prompts."""
    steps = [dose for dose in doses if dose]
    by_row: Float[Tensor, "row"] = torch.tensor(steps).repeat_interleave(len(prompts))
    scores: list[float] = []
    if steps:
        with steered(model, steer(vectors, layers=[layer], multiplier=by_row)):
            scores = _measured(measure, model, list(prompts) * len(steps))
    parts = [scores[i : i + len(prompts)] for i in range(0, len(scores), len(prompts))]
    if baseline is not None:
        parts.insert(doses.index(0.0), list(baseline))
    return parts


def _measured(measure: Metric, model: Model, prompts: Sequence[str]) -> list[float]:
    scores = [float(value) for value in measure(model, prompts)]
    if len(scores) != len(prompts):
        raise ValueError(f"metric: {len(scores)} numbers came for {len(prompts)} prompts. Give one for each, in order.")
    return scores


def _settings(
    model: Model, vectors: SteeringVectors, prompts: Sequence[str], doses: Sequence[float], measure: Any, steer: Any
) -> dict[str, Any]:
    """What makes two sweeps the same."""
    erasers = [(name, part) for name, eraser in vectors.erasers.items() for part in vars(eraser).values()]
    try:
        on_model = {"weights": parameters_sha256(model), "buffers": buffers_sha256(model), "hooks": hooks_of(model)}
    except Untellable as error:
        raise ValueError(
            f"path: {error} when the sweep goes on. Let it hold numbers, tensors and functions, or leave path out."
        ) from None
    return {
        "schema": 2,
        "kind": "sweep",
        "model": model_name(model),
        **on_model,
        "vectors": vectors.described(),
        "prompts_sha256": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "multipliers": list(doses),
        "metric": _described(measure),
        "steer": _described(steer),
        "code": {
            "metric": measure_sha256(measure, model),
            "steer": measure_sha256(steer, model),
            "vectors": tensors_sha256(erasers),  # which the vectors' own checksum leaves out
        },
    }


@torch.no_grad()
def _fingerprint(model: Model) -> list[float]:
    """What files of schema 1 keep of the weights and hooks: some logits after a fixed text."""
    (batch,) = batches(model, ["The weather in the hills was"], 1)
    last = torch.zeros_like(batch.mask, dtype=torch.bool)
    last[:, -1] = True
    with token_context(batch.mask):
        (logits,) = logits_where(model, batch.tokens, batch.mask, last)
    return logits[0, :: max(1, logits.shape[1] // 16)].float().tolist()


_NEW = ("weights", "buffers", "hooks", "code")  # in a file's settings since schema 2


def _described(value: Any) -> Any:
    """A metric or function as JSON, the same in every process."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: _described(getattr(value, part.name)) for part in fields(value)}
        return {"kind": type(value).__name__, **parts}
    if isinstance(value, partial):
        return {"kind": "partial", "of": _described([value.func, value.args, value.keywords])}
    if callable(value):
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        if "<" in name:  # a lambda, or made in a function: two of them have one name
            raise ValueError(
                f"path: {name} could not be told from others when the sweep goes on. Use a function of a module, or a "
                "dataclass with __call__, or leave path out."
            )
        return name
    if isinstance(value, Mapping):
        return {str(key): _described(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_described(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _metric_name(measure: Any) -> str:
    if isinstance(measure, Answers):
        return measure.made.name
    return getattr(measure, "__name__", type(measure).__name__)


class _Done:
    """Finished layers, in memory."""

    def __init__(self) -> None:
        self.baseline: list[float] | None = None
        self.layers: dict[str, list[list[float]]] = {}

    def has(self, layer: int) -> bool:
        return str(layer) in self.layers

    def keep(self, layer: int, scores: list[list[float]]) -> None:
        self.layers[str(layer)] = scores


class _Kept(_Done):
    """Finished layers on disk too, written after each."""

    def __init__(self, path: Path, settings: dict[str, Any], model: Model) -> None:
        super().__init__()
        self.path, self.settings = path, json.loads(json.dumps(settings))
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            theirs, self.baseline, self.layers = dict(stored["settings"]), stored["baseline"], dict(stored["layers"])
            older = theirs["schema"] == 1
            fingerprint = np.asarray(theirs.pop("fingerprint"), dtype=float) if older else None
        except (KeyError, TypeError, ValueError):  # no JSON, no text, or JSON of something else
            raise ValueError(f"path: {path} is no file of a sweep. Give another name, or remove it.") from None
        if differing := self._differing(theirs, fingerprint, model):
            raise ValueError(
                f"path: {path} holds a sweep with other {', '.join(differing)}. Give another name, or remove it."
            )
        if fingerprint is not None:
            self.settings = dict(stored["settings"])  # no more is known of the layers in it
            warnings.warn(
                f"path: {path} was written by an older rt_lens and says less about the model's weights and hooks. "
                "Only what it says was compared. Remove it if either may have changed.",
                stacklevel=4,
            )

    def _differing(
        self, theirs: Mapping[str, Any], fingerprint: Float[np.ndarray, "_"] | None, model: Model
    ) -> list[str]:
        """What the file says otherwise, in words; one of schema 1 has a few logits for the weights and hooks."""
        changed = [name for name, value in self.settings.items() if name in theirs and theirs[name] != value]
        changed += [name for name in self.settings if name not in theirs and (fingerprint is None or name not in _NEW)]
        code = self.settings["code"] if "code" in changed else {}
        words = [name for name in changed if name not in ("schema", *_NEW)]
        words += [name for name, value in code.items() if theirs.get("code", {}).get(name) != value]
        on_model = [name for name in ("weights", "buffers", "hooks") if name in changed]
        if fingerprint is not None:
            here = np.asarray(_fingerprint(model))
            same = here.shape == fingerprint.shape and np.allclose(fingerprint, here, rtol=0, atol=0.01)
            on_model = [] if same else ["logits"]
        if on_model:
            words.append(f"weights, hooks or precision of the model (its {' and '.join(on_model)})")
        return list(dict.fromkeys(words))

    def keep(self, layer: int, scores: list[list[float]]) -> None:
        super().keep(layer, scores)
        content = {"settings": self.settings, "baseline": self.baseline, "layers": self.layers}
        write_atomically(self.path, json.dumps(content).encode())
