"""Runs the four arms of an experiment and writes the results to disk.

The order of the stages keeps the test clean: vectors and weights see the training topics, every choice sees the
validation topics, and the test topics are asked once, at the end.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rt_lens.arms.comparison import ArmEvaluator, ArmScores
from rt_lens.arms.intervention import Intervention, applied
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.files import together, write_atomically
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.builtin import neutral_paragraphs, neutral_prompts
from rt_lens.data.questions import Answer
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.fluency import repetition
from rt_lens.evaluation.texts import perplexity
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.protocols import family_of
from rt_lens.experiment.reproducibility import recorded
from rt_lens.models.forward import check_layers, model_name
from rt_lens.models.generation import as_chat
from rt_lens.models.load import load_model
from rt_lens.models.prompts import SharedBelow
from rt_lens.models.tokens.chats import answered
from rt_lens.results.schema import SCHEMA, files_of_run
from rt_lens.results.writing import plain, tables_of, write_results
from rt_lens.steering.binding import add
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.loop import tune
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Target, write_neutral
from rt_lens.tuning.tuning_data import TuningData, prepare_data
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.reading import logit_lens, separability, token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors

_SEED_DRAWS = ["the pairs of the vectors", "the targets", "the neutral responses", "the order of the batches"]
_PAIRED = (("rep_tuned", "token_tuned"), ("rep_tuned", "steered"), ("token_tuned", "untuned"), ("steered", "untuned"))


def check_writable(folder: Path) -> Path:
    """Creates the folder and writes a file there, before any long work.

    Raises:
        ValueError: if that fails; nothing else has happened by then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", b"").unlink()
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written, got {folder} ({error.strerror}). Choose a different "
            "one with --out."
        ) from None
    return folder


def run_experiment(
    experiment: Experiment, out: Path, *, source: str | Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Runs the four arms in both directions and writes vectors, deltas, responses and `results.json` to `out`.

    Args:
        experiment: from `load_experiment`.
        out: folder; checked before the long work. An earlier run in it stays unchanged until this one has finished and
            replaces it; other files stay. If this run is interrupted, a message says where its vectors and deltas are.
        source: the argument of `load_experiment`, from which the results record how to repeat the run. Not needed for a
            built-in behaviour.
        progress: show bars and the stages.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: for a folder that cannot be written, a source that is no file, too few topics, or layers outside the
            model.

    Example:
        >>> from dataclasses import replace
        >>> from pathlib import Path
        >>> experiment = load_experiment("mood")
        >>> small = replace(experiment, test=replace(experiment.test, n_prompts=1000))
        >>> run_experiment(small, Path("runs/small"), progress=False)
        Traceback (most recent call last):
        ValueError: test.n_prompts must be at most ..., the number of topics in the test part, got 1000...
    """
    check_writable(out)
    with together(out, files_of_run, last="results.json", kept="out: the run was") as aside:
        return _Run(experiment, aside, source, progress).run()


class _Run:
    """The stages of an experiment, in order. Each is timed."""

    def __init__(self, experiment: Experiment, out: Path, source: str | Path | None, progress: bool) -> None:
        self.experiment, self.out, self.progress = experiment, out, progress
        self.reproducibility = recorded(experiment, source)  # now, since the file can be edited during the run
        self.judge = experiment.made_judge  # refuses a missing key before anything is loaded
        self.seconds: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.projections: dict[str, list[list[float]]] = {}
        self.family = family_of(experiment)
        if not self.family.asks_model:
            self.protocol = self.family.protocol()  # refuses too few topics before anything is loaded
        paragraphs, chosen = neutral_paragraphs(), experiment.choose.n_paragraphs
        self.choice_texts = paragraphs[:chosen]
        self.test_texts = paragraphs[chosen : chosen + experiment.test.n_texts]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.progress and name not in self.seconds:
            print(f"{name} ...", flush=True)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> dict[str, Any]:
        experiment, seed = self.experiment, self.experiment.split.seed
        with self._stage("load"):
            self.model = load_model(
                experiment.model, dtype=experiment.dtype, chat_template_kwargs=experiment.chat_template_kwargs
            )
            check_layers(self.model, experiment.choose.layers)
            check_layers(self.model, experiment.tune.layers)
            for config in experiment.tuned_arms.values():
                check_layers(self.model, config.blocks)
        if self.family.asks_model:
            with self._stage("calibrate"):
                self.protocol = self.family.protocol(self.model)
            if self.progress:
                print(self.protocol.why, flush=True)
        with self._stage("extract"):
            vectors = self._extracted(seed)
            vectors.save(self.out / "vectors.safetensors")
            by_seed = {other: vectors if other == seed else self._extracted(other) for other in experiment.seeds}
            separated = separability(self.model, vectors, self.protocol.unseen)
        with self._stage("choose"):
            doses = self._dose_response(vectors)
            choices: dict[str, Any] = {direction: self._choice(doses, direction) for direction in DIRECTIONS}
        with self._stage("evaluate"):
            evaluator = self._measured_untuned(vectors)
            for direction in DIRECTIONS:
                for other in experiment.tune_seeds[direction]:
                    hooks = self._steering(by_seed[other], choices[direction])
                    evaluator.measure("steered", hooks, direction=direction, seed=other)
            self._project("steered away", vectors, self._steering(vectors, choices["away"]))
        for other in experiment.seeds:
            self._tuned_arms(other, by_seed[other], vectors, evaluator)
        results = self._results(evaluator.scores()) | {
            "choices": {**choices, "rule": self._rule()},
            "separability": separated.to_dict("records"),
            "dose_response": doses.to_dict("records"),
            "bound": experiment.choose.bound,
            "history": self.history,
            "logit_lens": logit_lens(self.model, vectors).to_dict("records"),
            "seconds": {stage: round(value, 1) for stage, value in self.seconds.items()},
        }
        files = [file.name for file in self.out.iterdir()]
        write_results(self.out, results, evaluator.scores(), self._projections(vectors), files=files)
        return plain(results)

    def _extracted(self, seed: int) -> SteeringVectors:
        pairs = self.protocol.train.sample(self.experiment.extract.n_pairs, seed)
        return extract_vectors(self.model, pairs, seed=seed)

    def _results(self, scores: ArmScores) -> dict[str, Any]:
        """The scores of the arms: the sets of the behaviour, and the side effects separately."""
        experiment = self.experiment
        tables = tables_of(scores, tasks=list(self.protocol.tasks), writing=self.protocol.writing)
        return {
            "schema": SCHEMA,
            "behaviour": experiment.name,
            "description": experiment.description,
            "model": model_name(self.model),
            "versions": _versions(),
            "seed": experiment.split.seed,
            "seed_draws": _SEED_DRAWS,
            "reproducibility": self.reproducibility,
            "protocol": {
                "name": self.protocol.name, "why": self.protocol.why, "calibration": self.protocol.calibration,
                "settings": self.protocol.settings, "chance": self.protocol.chance,
            },
            **tables,
            # Only by the first scorer of each set: with every further row Holm's correction gets stricter.
            "comparisons": scores.comparisons(
                _pairs(), [(name, task.made[0].name) for name, task in self.protocol.tasks.items()]
            ).to_dict("records"),
        }  # fmt: skip

    def _measured_untuned(self, vectors: SteeringVectors) -> ArmEvaluator:
        protocol = self.protocol
        evaluator = ArmEvaluator(
            self.model, {**protocol.tasks, **protocol.checks}, self.test_texts, seed=self.experiment.test.seed
        )
        evaluator.measure("untuned")
        first = evaluator.scores().answers[0]
        prompt, response = first["prompt"], first["response"]
        untuned = prompt, answered(self.model, as_chat(self.model, [prompt])[0], response)
        self.shown: str
        self.shown_text: str
        self.shown, self.shown_text = protocol.shown or untuned
        self._project("untuned", vectors)
        return evaluator

    def _dose_response(self, vectors: SteeringVectors) -> pd.DataFrame:
        """Score and perplexity over layers and multipliers, on validation prompts; one batch per layer."""
        choose, task = self.experiment.choose, self.protocol.choosing
        multipliers = sorted({0.0, *choose.multipliers, *(-m for m in choose.multipliers)})
        questions, (score, *_), rows = list(task.asked), task.made, []
        n = len(questions)
        untuned = perplexity(self.model, self.choice_texts).perplexity.mean
        shared = SharedBelow(self.model)
        for number, layer in enumerate(choose.layers):
            shared.floor = min(choose.layers[number:])
            by_row = torch.tensor([m for m in multipliers for _ in questions], device="cpu")
            with shared, self.model.hooks(fwd_hooks=add(vectors, [layer], by_row)):
                all_answers = ask(
                    self.model, questions * len(multipliers), {score.reads}, max_new_tokens=task.max_new_tokens,
                    batch_size=128,
                )  # fmt: skip
            for index, multiplier in enumerate(multipliers):
                answers = all_answers[index * n : (index + 1) * n]
                with shared, self.model.hooks(fwd_hooks=add(vectors, [layer], multiplier)):
                    steered = perplexity(self.model, self.choice_texts).perplexity.mean if multiplier else untuned
                interval = mean_interval(score(answers), self.experiment.split.seed)
                rows.append(
                    {"layer": layer, "multiplier": multiplier, **interval._asdict(), "perplexity": steered,
                     "repetition": _repetition(answers) if score.reads == "text" else None,
                     "admissible": steered <= choose.bound * untuned}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def _rule(self) -> str:
        choose = self.experiment.choose
        return (
            f"Only layers and multipliers whose perplexity on {len(self.choice_texts)} neutral paragraphs is at most "
            f"{choose.bound:g} times that of the untuned model are allowed. The choice is the one that moves the mean "
            f"score of {len(self.protocol.choosing.asked)} validation prompts most in the direction; among equals, the "
            "smaller multiplier."
        )

    def _choice(self, doses: pd.DataFrame, direction: str) -> dict[str, Any]:
        sign = 1 if direction == "toward" else -1
        allowed = doses[doses["admissible"] & (doses["multiplier"] * sign > 0)]
        if allowed.empty:
            raise ValueError(
                f"choose.multipliers must have one for {direction!r} that keeps perplexity within "
                f"{self.experiment.choose.bound:g} times that of the untuned model, got none. "
                "Give smaller multipliers, or raise choose.bound."
            )
        ranked = allowed.assign(moved=sign * allowed["mean"], size=allowed["multiplier"].abs())
        best = ranked.sort_values(["moved", "size"], ascending=[False, True]).iloc[0]
        unsteered = float(doses.loc[doses["multiplier"] == 0, "mean"].iloc[0])
        why = (
            f"It moves the mean score of {int(best['n'])} validation prompts from {unsteered:.2f} to "
            f"{best['mean']:.2f}, the largest change of {len(allowed)} settings within the bound"
        )
        return {"layer": int(best["layer"]), "multiplier": float(best["multiplier"]), "why": why}

    def _tuned_arms(self, seed: int, vectors: SteeringVectors, shown: SteeringVectors, evaluator: ArmEvaluator) -> None:
        """Tunes and measures both tuned arms of one seed on the vectors, targets and neutral responses of that seed.

        Each arm is measured as soon as it is tuned, so that memory holds one delta at a time.

        Args:
            seed: seed for everything that is random.
            vectors: those of the seed.
            shown: vectors for the projections, the same for all arms.
            evaluator: measures the arms.
        """
        seeds = self.experiment.tune_seeds
        arms = {arm: replace(config, seed=seed) for arm, config in self.experiment.tuned_arms.items()}
        with self._stage("tune"):
            neutral = self._neutral(list(arms.values()))
        for direction in (direction for direction in DIRECTIONS if seed in seeds[direction]):
            with self._stage("tune"):
                data = self._tuning_data(direction, vectors, list(arms.values()), neutral)
            for arm, config in arms.items():
                with self._stage("tune"):
                    directed = replace(config, direction=direction)
                    delta = tune(self.model, vectors, data, directed, progress=self.progress)
                with self._stage("evaluate"):
                    evaluator.measure(arm, delta, direction=direction, seed=seed)
                label = ArmLabel(arm, direction, seed)
                self.history += [{**label._asdict(), **row} for row in delta.history]
                if arm == "rep_tuned" and seed == seeds[direction][0]:
                    delta.save(self.out / f"{label.stem}.safetensors")
                    self._project(f"rep_tuned {direction}", shown, delta)

    def _neutral(self, configs: Sequence[TuneConfig]) -> list[Target]:
        """Neutral prompts answered by the untuned model, as many as the steps of one run can read."""
        if not any(config.kl_weight for config in configs):
            return []
        n_prompts = max(config.max_steps * config.neutral_batch_size for config in configs if config.kl_weight)
        return write_neutral(self.model, neutral_prompts()[:n_prompts], configs[0])

    def _tuning_data(
        self, direction: Direction, vectors: SteeringVectors, configs: Sequence[TuneConfig], neutral: Sequence[Target]
    ) -> TuningData:
        """The data of all arms of one seed and direction, cached up to the first block that any of them trains."""
        train, validation = self.protocol.targets(direction, configs[0].seed)
        shared = replace(
            self.experiment.tune,
            direction=direction,
            seed=configs[0].seed,
            trained_layers=tuple(sorted({block for config in configs for block in config.blocks})),
            kl_weight=max(config.kl_weight for config in configs),
        )
        return prepare_data(self.model, vectors, train, shared, validation=validation, neutral=neutral)

    def _steering(self, vectors: SteeringVectors, choice: Mapping[str, Any]) -> list[FwdHook]:
        return add(vectors, [choice["layer"]], choice["multiplier"])

    def _project(self, name: str, vectors: SteeringVectors, intervention: Intervention = None) -> None:
        """Layer x token projections of one text, the same text for all arms."""
        with applied(self.model, intervention):
            self.shown_tokens, values = token_projections(self.model, vectors, self.shown_text)
        self.projections[name] = [[round(value, 3) for value in row] for row in values.tolist()]

    def _projections(self, vectors: SteeringVectors) -> dict[str, Any]:
        layers = [int(name.split(".")[1]) for name in vectors.hook_names]
        return {"prompt": self.shown, "tokens": self.shown_tokens, "layers": layers, "arms": self.projections}


def _repetition(answers: Sequence[Answer]) -> float:
    return float(np.mean([repetition(answer.text) for answer in answers]))


def _pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The pairs of arms that are compared, in each direction."""
    return [
        ((a, direction), (b, "none" if b == "untuned" else direction)) for direction in DIRECTIONS for a, b in _PAIRED
    ]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("rt_lens", "torch", "transformer-lens", "transformers", "vaderSentiment", "scipy", "plotly"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "source"
    return versions
