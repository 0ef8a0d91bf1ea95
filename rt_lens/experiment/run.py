"""The four arms, run: results on disk.

The rule that keeps the results honest is written into the order of things here: vectors and weights see the training
topics, every choice sees the validation topics, and the test topics are asked once, at the end.
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
from rt_lens.common.files import together, write_atomically
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.builtin import neutral_paragraphs, neutral_prompts
from rt_lens.data.questions import Answer
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.fluency import repetition
from rt_lens.evaluation.texts import perplexity
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.protocols import answers_protocol, protocol_of
from rt_lens.experiment.reproducibility import recorded
from rt_lens.models.forward import check_layers, model_name
from rt_lens.models.generation import as_chat
from rt_lens.models.load import load_model
from rt_lens.models.tokens.chats import answered
from rt_lens.results.schema import files_of_run
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

_SEED_DRAWS = ["the pairs of the vectors", "the targets", "the neutral answers", "the order of the batches"]
_PAIRED = (("rep_tuned", "token_tuned"), ("rep_tuned", "steered"), ("token_tuned", "untuned"), ("steered", "untuned"))


def check_writable(folder: Path) -> Path:
    """Makes the folder and writes a file there, before any long work.

    Raises:
        ValueError: if that fails; nothing else has been done by then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", b"").unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder} ({error.strerror}). Give another folder with --out.") from None
    return folder


def run_experiment(
    experiment: Experiment, out: Path, *, source: str | Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Runs the four arms in both directions and writes vectors, deltas, responses and `results.json` to `out`.

    Args:
        experiment: from `load_experiment`.
        out: folder; checked before the long work. A run that was there stays as it is until this one is done, and goes
            then; files that are of no run stay. If this one is broken off, a message says where the vectors and deltas
            are that were made by then.
        source: what `load_experiment` was given, so that the results say how to make them again; a shipped behaviour is
            known without.
        progress: show bars and the stages.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: for an unwritable folder, a source that is no file, too few topics, or layers outside the model.

    Example:
        >>> run_experiment(load_experiment("my.toml"), Path("runs/my"), source="my.toml")
    """
    check_writable(out)
    with together(out, files_of_run, last="results.json", kept="out: the run was") as aside:
        return _Run(experiment, aside, source, progress).run()


class _Run:
    """The experiment's stages, in order; each is timed."""

    def __init__(self, experiment: Experiment, out: Path, source: str | Path | None, progress: bool) -> None:
        self.experiment, self.out, self.progress = experiment, out, progress
        self.again = recorded(experiment, source)  # now, for the file may be edited while it runs
        self.judge = experiment.made_judge  # refuses a missing key before anything is loaded
        self.seconds: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.projections: dict[str, list[list[float]]] = {}
        if experiment.honesty is None:
            self.protocol = answers_protocol(experiment)  # refuses too few topics before anything is loaded
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
        if experiment.honesty is not None:
            with self._stage("calibrate"):
                self.protocol = protocol_of(experiment, self.model)
            if self.progress:
                print(self.protocol.why, flush=True)
        with self._stage("extract"):
            vectors = self._extracted(seed)
            vectors.save(self.out / "vectors.safetensors")
            drawn = {other: vectors if other == seed else self._extracted(other) for other in experiment.seeds}
            separated = separability(self.model, vectors, self.protocol.unseen)
        with self._stage("choose"):
            doses = self._dose_response(vectors)
            choices: dict[str, Any] = {direction: self._choice(doses, direction) for direction in DIRECTIONS}
        with self._stage("evaluate"):
            board = self._measured_untuned(vectors)
            for direction in DIRECTIONS:
                for other in experiment.tune_seeds[direction]:
                    hooks = self._steering(drawn[other], choices[direction])
                    board.measure("steered", hooks, direction=direction, seed=other)
            self._project("steered away", vectors, self._steering(vectors, choices["away"]))
        for other in experiment.seeds:
            self._tuned_arms(other, drawn[other], vectors, board)
        results = self._results(board.scoreboard()) | {
            "choices": {**choices, "rule": self._rule()},
            "separability": separated.to_dict("records"),
            "dose_response": doses.to_dict("records"),
            "bound": experiment.choose.bound,
            "history": self.history,
            "logit_lens": logit_lens(self.model, vectors).to_dict("records"),
            "seconds": {stage: round(value, 1) for stage, value in self.seconds.items()},
        }
        made = [file.name for file in self.out.iterdir()]
        write_results(self.out, results, board.scoreboard(), self._projections(vectors), files=made)
        return plain(results)

    def _extracted(self, seed: int) -> SteeringVectors:
        pairs = self.protocol.train.sample(self.experiment.extract.n_pairs, seed)
        return extract_vectors(self.model, pairs, seed=seed)

    def _results(self, board: ArmScores) -> dict[str, Any]:
        """What the arms scored: the behaviour's own sets, and side effects apart."""
        experiment = self.experiment
        tables = tables_of(board, exams=list(self.protocol.exams), writing=self.protocol.writing)
        return {
            "schema": 1,
            "behaviour": experiment.name,
            "description": experiment.description,
            "model": model_name(self.model),
            "versions": _versions(),
            "seed": experiment.split.seed,
            "seed_draws": _SEED_DRAWS,
            "again": self.again,
            "protocol": {
                "name": self.protocol.name, "why": self.protocol.why, "calibration": self.protocol.calibration,
                "settings": self.protocol.settings, "chance": self.protocol.chance,
            },
            **tables,
            # By the score that counts in each set: every further row would cost all others significance.
            "comparisons": board.comparisons(
                _pairs(), [(name, exam.made[0].name) for name, exam in self.protocol.exams.items()]
            ).to_dict("records"),
        }  # fmt: skip

    def _measured_untuned(self, vectors: SteeringVectors) -> ArmEvaluator:
        protocol = self.protocol
        board = ArmEvaluator(
            self.model, {**protocol.exams, **protocol.checks}, self.test_texts, seed=self.experiment.test.seed
        )
        board.measure("untuned")
        first = board.scoreboard().answers[0]
        prompt, response = first["prompt"], first["response"]
        untuned = prompt, answered(self.model, as_chat(self.model, [prompt])[0], response)
        self.shown: str
        self.shown_text: str
        self.shown, self.shown_text = protocol.shown or untuned
        self._project("untuned", vectors)
        return board

    def _dose_response(self, vectors: SteeringVectors) -> pd.DataFrame:
        """Score and perplexity over layers and multipliers, on validation prompts; one batch per layer."""
        choose, exam = self.experiment.choose, self.protocol.choosing
        multipliers = sorted({0.0, *choose.multipliers, *(-m for m in choose.multipliers)})
        asked, (score, *_), rows = list(exam.asked), exam.made, []
        untuned = perplexity(self.model, self.choice_texts).perplexity.mean
        for layer in choose.layers:
            each = torch.tensor([m for m in multipliers for _ in asked])
            with self.model.hooks(fwd_hooks=add(vectors, [layer], each)):
                said = ask(
                    self.model, asked * len(multipliers), {score.reads}, max_new_tokens=exam.max_new_tokens,
                    batch_size=128,
                )  # fmt: skip
            for place, multiplier in enumerate(multipliers):
                mine = said[place * len(asked) : (place + 1) * len(asked)]
                with self.model.hooks(fwd_hooks=add(vectors, [layer], multiplier)):
                    steered = perplexity(self.model, self.choice_texts).perplexity.mean if multiplier else untuned
                found = mean_interval(score(mine), self.experiment.split.seed)
                rows.append(
                    {"layer": layer, "multiplier": multiplier, **found._asdict(), "perplexity": steered,
                     "repetition": _repetition(mine) if score.reads == "text" else None,
                     "admissible": steered <= choose.bound * untuned}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def _rule(self) -> str:
        choose = self.experiment.choose
        return (
            f"Of the layers and multipliers whose perplexity on {len(self.choice_texts)} neutral paragraphs is at most "
            f"{choose.bound:g} times the untuned model's, the one that moves the mean score of "
            f"{len(self.protocol.choosing.asked)} validation prompts furthest in the direction; of equals, the smaller "
            "multiplier."
        )

    def _choice(self, doses: pd.DataFrame, direction: str) -> dict[str, Any]:
        sign = 1 if direction == "toward" else -1
        allowed = doses[doses["admissible"] & (doses["multiplier"] * sign > 0)]
        if allowed.empty:
            raise ValueError(
                f"choose.multipliers: none for {direction!r} keeps perplexity within "
                f"{self.experiment.choose.bound:g} times the untuned model's. "
                "Offer smaller multipliers, or raise choose.bound."
            )
        ranked = allowed.assign(moved=sign * allowed["mean"], size=allowed["multiplier"].abs())
        best = ranked.sort_values(["moved", "size"], ascending=[False, True]).iloc[0]
        unsteered = float(doses.loc[doses["multiplier"] == 0, "mean"].iloc[0])
        why = (
            f"It moves the mean score of {int(best['n'])} validation prompts from {unsteered:.2f} to "
            f"{best['mean']:.2f}, the furthest of {len(allowed)} within the bound"
        )
        return {"layer": int(best["layer"]), "multiplier": float(best["multiplier"]), "why": why}

    def _tuned_arms(self, seed: int, drawn: SteeringVectors, shown: SteeringVectors, board: ArmEvaluator) -> None:
        """Both tuned arms of one seed, on the same vectors, targets and neutral answers, all of which the seed draws.

        Each is measured as soon as it is tuned, so that one delta at a time is held.

        Args:
            seed: of all that is random.
            drawn: the seed's own vectors.
            shown: vectors on which projections are drawn, the same for all arms.
            board: to measure on.
        """
        seeds = self.experiment.tune_seeds
        arms = {arm: replace(config, seed=seed) for arm, config in self.experiment.tuned_arms.items()}
        with self._stage("tune"):
            neutral = self._neutral(list(arms.values()))
        for direction in (direction for direction in DIRECTIONS if seed in seeds[direction]):
            with self._stage("tune"):
                material = self._material(direction, drawn, list(arms.values()), neutral)
            for arm, config in arms.items():
                with self._stage("tune"):
                    aimed = replace(config, direction=direction)
                    delta = tune(self.model, drawn, material, aimed, progress=self.progress)
                with self._stage("evaluate"):
                    board.measure(arm, delta, direction=direction, seed=seed)
                named = {"arm": arm, "direction": direction, "seed": seed}
                self.history += [{**named, **row} for row in delta.history]
                if arm == "rep_tuned" and seed == seeds[direction][0]:
                    delta.save(self.out / f"rep_tuned_{direction}.safetensors")
                    self._project(f"rep_tuned {direction}", shown, delta)

    def _neutral(self, configs: Sequence[TuneConfig]) -> list[Target]:
        """As many neutral prompts as one run's steps can read, answered by the untuned model."""
        if not any(config.kl_weight for config in configs):
            return []
        enough = max(config.max_steps * config.neutral_batch_size for config in configs if config.kl_weight)
        return write_neutral(self.model, neutral_prompts()[:enough], configs[0])

    def _material(
        self, direction: Direction, vectors: SteeringVectors, configs: Sequence[TuneConfig], neutral: Sequence[Target]
    ) -> TuningData:
        """What all arms of one seed and direction read, cut off before the first block that any of them trains."""
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

    def _project(self, name: str, vectors: SteeringVectors, worn: Intervention = None) -> None:
        """Layer x token projections of one text, the same for all arms."""
        with applied(self.model, worn):
            self.shown_tokens, values = token_projections(self.model, vectors, self.shown_text)
        self.projections[name] = [[round(value, 3) for value in row] for row in values.tolist()]

    def _projections(self, vectors: SteeringVectors) -> dict[str, Any]:
        layers = [int(name.split(".")[1]) for name in vectors.hook_names]
        return {"prompt": self.shown, "tokens": self.shown_tokens, "layers": layers, "arms": self.projections}


def _repetition(answers: Sequence[Answer]) -> float:
    return float(np.mean([repetition(answer.text) for answer in answers]))


def _pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """What is compared with what, in each direction."""
    return [
        ((a, direction), (b, "none" if b == "untuned" else direction)) for direction in DIRECTIONS for a, b in _PAIRED
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("rt_lens", "torch", "transformer-lens", "transformers", "vaderSentiment", "scipy", "plotly"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found
