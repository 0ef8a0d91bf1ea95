"""Runs the arms of an experiment at equal damage and writes the results to disk.

The order of the stages keeps the test clean: vectors and weights see the training topics, every choice sees the
validation topics, and the test topics are asked once, at the end. The strength of each arm is set on texts that
nothing else uses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from rt_lens.arms.calibration import has_strength, scaled
from rt_lens.arms.comparison import ArmScores
from rt_lens.arms.equal_damage import KLCurves, KLEvaluator
from rt_lens.arms.inside import InsideMeter
from rt_lens.arms.intervention import Interventions, applied, each_of
from rt_lens.arms.registry import ArmUnavailable, History, RegisteredArm, registered_arm
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.files import together, write_atomically
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.common.store import Store
from rt_lens.data.builtin import (
    calibration_paragraphs,
    neutral_paragraphs,
)
from rt_lens.data.questions import Answer
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.fluency import repetition
from rt_lens.evaluation.texts import Scored, perplexity
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.heeding import measure_personas
from rt_lens.experiment.making import ArmMaker, Material, check_room, inside_responses, own_responses
from rt_lens.experiment.protocols import family_of
from rt_lens.experiment.reproducibility import recorded, settings_of
from rt_lens.experiment.search import RULE, Search
from rt_lens.models.checksums import parameters_sha256
from rt_lens.models.forward import check_layers, model_name
from rt_lens.models.generation import as_chat
from rt_lens.models.load import load_model
from rt_lens.models.prompts import SharedBelow
from rt_lens.models.tokens.chats import answered
from rt_lens.results.persona_effect import persona_warnings
from rt_lens.results.schema import SCHEMA, files_of_run
from rt_lens.results.writing import plain, tables_of, write_results
from rt_lens.steering.binding import add
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.tracking import check_installed, reporting
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.reading import logit_lens, separability, token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors

_Pair: TypeAlias = tuple[tuple[str, str], tuple[str, str]]
"""Arm and direction, twice."""
_SEED_DRAWS = [
    *("the pairs of the vectors", "the targets", "the neutral responses", "the order of the batches"),
    *("the factors of a low-rank change", "the random direction"),
]


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
    """Runs the arms in both directions at equal damage, and writes vectors, deltas, responses and `results.json`.

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
        run = _Run(experiment, aside, source, progress, out)
        results = run.run()
    run.parts.remove()
    return results


class _Run:
    """The stages of an experiment, in order. Each is timed."""

    def __init__(
        self, experiment: Experiment, out: Path, source: str | Path | None, progress: bool, kept: Path
    ) -> None:
        self.experiment, self.out, self.progress, self.kept = experiment, out, progress, kept
        self.search: dict[str, Any] | None = None
        self.reproducibility = recorded(experiment, source)  # now, since the file can be edited during the run
        self.judge = experiment.made_judge  # refuses a missing key before anything is loaded
        check_installed(experiment.report.to)
        self.seconds: dict[str, float] = {}
        self.history: dict[ArmLabel, list[dict[str, Any]]] = {}
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
            for blocks in experiment.blocks.values():
                check_layers(self.model, blocks)
        if self.family.asks_model:
            with self._stage("calibrate"):
                self.protocol = self.family.protocol(self.model)
            if self.progress:
                print(self.protocol.why, flush=True)
        check_room(experiment, self.model, self.protocol)
        persona_effect = self._persona_effect()
        with self._stage("extract"):
            vectors = self._extracted(seed)
            vectors.save(self.out / "vectors.safetensors")
            by_seed = {other: vectors if other == seed else self._extracted(other) for other in experiment.seeds}
            separated = separability(self.model, vectors, self.protocol.unseen)
        with self._stage("choose"):
            doses = self._dose_response(vectors)
            choices: dict[str, Any] = {direction: self._choice(doses, direction) for direction in DIRECTIONS}
        if experiment.search.trials:
            with self._stage("search"):
                self._search(vectors, choices)
        with self._stage("evaluate"):
            evaluator = self._measured_untuned(vectors)
        self.parts = self._parts()
        for other in experiment.seeds:
            self._arms_of_seed(other, by_seed[other], vectors, choices, evaluator)
        curves = evaluator.curves()
        scores = curves.at(experiment.compare.stated)
        results = self._results(scores, self._pairs(curves)) | {
            "persona_effect": persona_effect,
            "at_kl": self._at_kl(curves),
            "search": self.search,
            "inside": None if self.inside is None else plain(self.inside.rows),
            "choices": {**choices, "rule": self._rule()},
            "separability": separated.to_dict("records"),
            "dose_response": doses.to_dict("records"),
            "bound": experiment.choose.bound,
            "history": self._history(),
            "logit_lens": logit_lens(self.model, vectors).to_dict("records"),
            "seconds": {stage: round(value, 1) for stage, value in self.seconds.items()},
        }
        files = [file.name for file in self.out.iterdir()]
        others = {kl: curves.at(kl, same=False) for kl in experiment.compare.kl if kl != experiment.compare.stated}
        write_results(self.out, results, scores, self._projections(vectors), at_budgets=others, files=files)
        return plain(results)

    def _parts(self) -> Store:
        """What is measured of each arm, on disk until the run has ended: one that was stopped goes on from there.

        The file is named after the settings, so that a run with others neither takes nor loses it.
        """
        settings = {
            "experiment": settings_of(self.experiment), "versions": _versions(),
            "pairs": self.experiment.pairs.sha256,
            "weights": parameters_sha256(self.model),
        }  # fmt: skip
        written = json.dumps(plain(settings), sort_keys=True, default=str)
        name = hashlib.sha256(written.encode()).hexdigest()[:8]
        return Store(self.kept / f"unfinished-{name}.json", json.loads(written), kind="run")

    def _history(self) -> list[dict[str, Any]]:
        """The losses of all tuning runs, in an order that does not depend on where the run was stopped."""
        labels = [ArmLabel(*run) for run in self.experiment.tuning_runs]
        labels += [label for label in self.history if label not in labels]
        return [{**label._asdict(), **row} for label in labels for row in self.history.get(label, [])]

    def _persona_effect(self) -> dict[str, Any] | None:
        """What the personas do to the untuned score, said at once; None for honesty, which is calibrated instead."""
        if self.family.asks_model:
            return None
        with self._stage("personas"):
            effect = measure_personas(self.experiment, self.model).row()
        if self.progress:
            for sentence in persona_warnings(effect):
                print(sentence.replace("−", "-"), flush=True)
        return effect

    def _extracted(self, seed: int) -> SteeringVectors:
        pairs = self.protocol.train.sample(self.experiment.extract.n_pairs, seed)
        return extract_vectors(self.model, pairs, seed=seed)

    def _results(self, scores: ArmScores, pairs: Sequence[_Pair]) -> dict[str, Any]:
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
                pairs, [(name, task.made[0].name) for name, task in self.protocol.tasks.items()]
            ).to_dict("records"),
        }  # fmt: skip

    def _pairs(self, curves: KLCurves) -> list[_Pair]:
        """The pairs of arms that are compared: each against rep-tuned and against untuned, as stated before the run.

        An arm without a strength does its own damage, so it is compared with the untuned model alone.
        """
        stated, strengths = self.experiment.compare.stated, curves.strengths
        alone = set(strengths.loc[strengths["budget"].isna(), "arm"])
        measured = {(row["arm"], row["direction"]) for row in curves.at(stated).answers}
        pairs: list[_Pair] = []
        for direction, arm in itertools.product(DIRECTIONS, self.experiment.arms):
            if arm not in {"rep_tuned", *alone}:
                pairs.append((("rep_tuned", direction), (arm, direction)))
            pairs.append(((arm, direction), ("untuned", "none")))
        return [pair for pair in pairs if measured.issuperset(pair)]

    def _at_kl(self, curves: KLCurves) -> dict[str, Any]:
        """The curves over the budgets, and how the strengths were set."""
        compare = self.experiment.compare
        return {
            **asdict(compare),
            "arms": {name: registered_arm(name).description for name in self.experiment.arms},
            "table": curves.summary().to_dict("records"),
            "strengths": curves.strengths.to_dict("records"),
        }

    def _measured_untuned(self, vectors: SteeringVectors) -> KLEvaluator:
        protocol, compare = self.protocol, self.experiment.compare
        evaluator = KLEvaluator(
            self.model, {**protocol.tasks, **protocol.checks}, compare.kl,
            calibration=self._calibration(), texts=[*self.test_texts, *self.own_responses[1]],
            always=None if compare.side_effects == "every" else list(protocol.tasks), stated=compare.stated,
            seed=self.experiment.test.seed,
        )  # fmt: skip
        first = evaluator.curves().scores.answers[0]
        prompt, response = first["prompt"], first["response"]
        untuned = prompt, answered(self.model, as_chat(self.model, [prompt])[0], response)
        self.shown: str
        self.shown_text: str
        self.shown, self.shown_text = protocol.shown or untuned
        self._project("untuned", vectors)
        responses = inside_responses(self.experiment, self.model, protocol)
        seed = self.experiment.test.seed
        self.inside = InsideMeter(self.model, vectors, responses, seed=seed) if responses else None
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
        choose, settings = self.experiment.choose, self.experiment.settings
        own = [f"{arm} {settings[arm]['layer']}" for arm in self.experiment.arms if "layer" in settings.get(arm, {})]
        but = f", but for those whose settings name one ({', '.join(own)})" if own else ""
        return (
            f"Only layers and multipliers whose perplexity on {len(self.choice_texts)} neutral paragraphs is at most "
            f"{choose.bound:g} times that of the untuned model are allowed. The choice is the one that moves the mean "
            f"score of {len(self.protocol.choosing.asked)} validation prompts most in the direction; among equals, the "
            f"smaller multiplier. Arms take its layer{but}; their strengths are set by KL."
        )

    def _choice(self, doses: pd.DataFrame, direction: str) -> dict[str, Any]:
        sign = 1 if direction == "toward" else -1
        allowed = doses[doses["admissible"] & (doses["multiplier"] * sign > 0)]
        within = not allowed.empty
        if not within:  # the comparison sets the strength, so only the layer is at stake
            moving = doses[doses["multiplier"] * sign > 0]
            allowed = moving[moving["multiplier"].abs() == moving["multiplier"].abs().min()]
        ranked = allowed.assign(moved=sign * allowed["mean"], size=allowed["multiplier"].abs())
        best = ranked.sort_values(["moved", "size"], ascending=[False, True]).iloc[0]
        unsteered = float(doses.loc[doses["multiplier"] == 0, "mean"].iloc[0])
        moved = sign * (float(best["mean"]) - unsteered)
        n, settings = int(best["n"]), f"{len(allowed)} setting{'s' * (len(allowed) != 1)}"
        why = (
            f"It moves the mean score of {n} validation prompts from {unsteered:.2f} to {best['mean']:.2f}, the "
            f"largest change of {settings} "
            if moved > 0
            else f"No setting moves the mean score of {n} validation prompts ({unsteered:.2f}) that way; with this one "
            f"it is {best['mean']:.2f}, the nearest of {settings} "
        ) + ("within the bound" if within else "at the smallest multiplier; none keeps perplexity within the bound")
        return {"layer": int(best["layer"]), "multiplier": float(best["multiplier"]), "why": why}

    def _search(self, vectors: SteeringVectors, choices: Mapping[str, Any]) -> None:
        """Searches the arms' settings, and goes on with those found."""
        experiment, task = self.experiment, self.protocol.choosing
        if not self.family.asks_model:
            task = replace(task, questions=self.family.parts()[1].topics[: experiment.search.n_prompts])
        layers = {direction: choices[direction]["layer"] for direction in DIRECTIONS}
        found = Search(
            experiment, self.model, self.protocol, vectors, layers, task, self._calibration(),
            self.kept / "search.journal", progress=self.progress,
        ).run()  # fmt: skip
        self.experiment = replace(experiment, settings={**experiment.settings, **found.settings})
        write_atomically(self.out / "settings.toml", found.toml().encode())
        self.search = {
            "trials": experiment.search.trials, "seed": experiment.search.seed, "rule": RULE,
            "budget": experiment.compare.stated, "table": found.table(), "toml": found.toml(),
        }  # fmt: skip

    def _calibration(self) -> list[Scored]:
        """The texts that set strengths."""
        return [*calibration_paragraphs()[: self.experiment.compare.n_texts], *self.own_responses[0]]

    @cached_property
    def own_responses(self) -> tuple[list[Scored], list[Scored]]:
        """The untuned model's responses to neutral prompts: those that set strengths, and those that report the KL."""
        return own_responses(self.experiment, self.model)

    def _arms_of_seed(
        self,
        seed: int,
        vectors: SteeringVectors,
        shown: SteeringVectors,
        choices: Mapping[str, Any],
        evaluator: KLEvaluator,
    ) -> None:
        """Makes and measures the arms of one seed, on the vectors, targets and neutral responses of that seed.

        Each arm is measured as soon as it is made, so that memory holds one delta at a time, and those that another
        arm is made of.

        Args:
            seed: seed for everything that is random.
            vectors: those of the seed.
            shown: vectors for the projections, the same for all arms.
            choices: direction -> layer and multiplier.
            evaluator: measures the arms.
        """
        seeds, arms = self.experiment.tune_seeds, [registered_arm(name) for name in self.experiment.arms]
        layers = {direction: choices[direction]["layer"] for direction in DIRECTIONS}
        material = Material(self.experiment, self.model, self.protocol, seed)

        def remember(arm: str, direction: Direction, history: History) -> None:
            self.history[ArmLabel(arm, direction, seed)] = [dict(row) for row in history]

        maker = ArmMaker(self.experiment, material, vectors, layers, remember=remember, progress=self.progress)
        for direction in (direction for direction in DIRECTIONS if seed in seeds[direction]):
            for arm in arms:
                first = seed == seeds[direction][0]
                if first or arm.seeded:
                    self._arm(arm, ArmLabel(arm.name, direction, seed), maker, evaluator, shown if first else None)
            maker.forget_data()

    def _arm(
        self,
        arm: RegisteredArm,
        label: ArmLabel,
        maker: ArmMaker,
        evaluator: KLEvaluator,
        shown: SteeringVectors | None,
    ) -> None:
        """Makes and measures one arm; of the first seed, the rep-tuned delta is saved and the projections are read."""
        key, is_shown = f"{label}, seed {label.seed}", shown is not None and arm.name in ("steered", "rep_tuned")
        if self.progress:
            print(f"{key} {'was measured before the run was stopped' if key in self.parts else '...'}", flush=True)
        try:
            made = self._made(arm, label, maker) if key not in self.parts or is_shown else None
            if key not in self.parts:
                with self._stage("evaluate"):
                    evaluator.measure(str(label), made, label.seed)
        except ArmUnavailable as reason:
            made = None
            if key not in self.parts:
                evaluator.unavailable(str(label), str(reason), label.seed)
        if key in self.parts:
            part = self.parts.get(key)
            evaluator.add(part["rows"])
            self.history = {ArmLabel(*of): rows for of, rows in part["history"]} | self.history
            if self.inside is not None and part.get("inside"):
                self.inside.add(part["inside"])
        else:
            own = [[list(of), rows] for of, rows in self.history.items() if of.seed == label.seed]
            rows = evaluator.since_last()
            inside = self._inside(label, made, rows["strengths"]) if shown is not None else None
            self.parts.keep(key, {"rows": rows, "history": own, "inside": inside})
        if is_shown and made is not None:
            assert shown is not None
            self._show(label, shown, self._stated(self.parts.get(key)["rows"]["strengths"], made))

    def _inside(
        self, label: ArmLabel, made: Interventions, strengths: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """What happens inside at the stated budget; None for an arm that was not made, or does not reach it."""
        reached = any(row["budget"] == self.experiment.compare.stated and row["strength"] for row in strengths)
        if self.inside is None or made is None or not (reached or not has_strength(made)):
            return None
        acting = self._stated(strengths, made)
        with self._stage("evaluate"):
            return plain(self.inside.measure(str(label), acting, label.seed))

    def _made(self, arm: RegisteredArm, label: ArmLabel, maker: ArmMaker) -> Interventions:
        name = f"{self.experiment.name}: {label}, seed {label.seed}"
        with self._stage("tune" if arm.tunes else "choose"), reporting(self.experiment.report.to, name):
            return maker.make(arm.name, label.direction)  # type: ignore[arg-type]

    def _show(self, label: ArmLabel, shown: SteeringVectors, acting: Interventions) -> None:
        """Saves a delta, and reads the projections of the arms that are shown."""
        if isinstance(acting, WeightDelta):
            acting.save(self.out / f"{label.stem}.safetensors")
        if label.arm == "rep_tuned" or label.direction == "away":
            self._project(f"{label.arm} {label.direction}", shown, acting)

    def _stated(self, strengths: Sequence[Mapping[str, Any]], made: Interventions) -> Interventions:
        """The arm at the stated budget; as it was made, if it does not reach it."""
        for row in strengths:
            if row["budget"] == self.experiment.compare.stated and row["strength"] is not None:
                return scaled(made, row["strength"])
        return made

    def _project(self, name: str, vectors: SteeringVectors, intervention: Interventions = None) -> None:
        """Layer x token projections of one text, the same text for all arms."""
        with applied(self.model, *each_of(intervention)):
            self.shown_tokens, values = token_projections(self.model, vectors, self.shown_text)
        self.projections[name] = [[round(value, 3) for value in row] for row in values.tolist()]

    def _projections(self, vectors: SteeringVectors) -> dict[str, Any]:
        layers = [int(name.split(".")[1]) for name in vectors.hook_names]
        return {"prompt": self.shown, "tokens": self.shown_tokens, "layers": layers, "arms": self.projections}


def _repetition(answers: Sequence[Answer]) -> float:
    return float(np.mean([repetition(answer.text) for answer in answers]))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("rt_lens", "torch", "transformer-lens", "transformers", "vaderSentiment", "scipy", "plotly"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "source"
    return versions
