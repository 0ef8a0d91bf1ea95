"""Runs the arms of an experiment at equal damage and writes the results to disk.

The order of the stages keeps the test clean: vectors and weights see the training topics, every choice sees the
validation topics, and the test topics are asked once, at the end. The strength of each arm is set on texts that
nothing else uses.
"""

from __future__ import annotations

import itertools
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from rt_lens.arms.calibration import Calibrated
from rt_lens.arms.comparison import ArmScores
from rt_lens.arms.equal_damage import KLCurves, KLEvaluator
from rt_lens.arms.intervention import Interventions, applied, each_of
from rt_lens.arms.registry import ArmInputs, ArmUnavailable, RegisteredArm, registered_arm
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.files import together, write_atomically
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.builtin import (
    calibration_paragraphs,
    calibration_prompts,
    neutral_paragraphs,
    neutral_prompts,
)
from rt_lens.data.questions import Answer
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.fluency import repetition
from rt_lens.evaluation.texts import Response, Scored, perplexity
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.heeding import measure_personas
from rt_lens.experiment.protocols import family_of
from rt_lens.experiment.reproducibility import recorded
from rt_lens.models.forward import check_layers, model_name
from rt_lens.models.generation import as_chat, generate
from rt_lens.models.load import load_model
from rt_lens.models.prompts import SharedBelow
from rt_lens.models.tokens.chats import answered
from rt_lens.results.persona_effect import persona_warnings
from rt_lens.results.schema import SCHEMA, files_of_run
from rt_lens.results.writing import plain, tables_of, write_results
from rt_lens.steering.binding import add
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Target, write_neutral
from rt_lens.tuning.tuning_data import TuningData, prepare_data
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
        persona_effect = self._persona_effect()
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
        for other in experiment.seeds:
            self._arms_of_seed(other, by_seed[other], vectors, choices, evaluator)
        curves = evaluator.curves()
        scores = curves.at(experiment.compare.stated)
        results = self._results(scores, self._pairs(curves)) | {
            "persona_effect": persona_effect,
            "at_kl": self._at_kl(curves),
            "choices": {**choices, "rule": self._rule()},
            "separability": separated.to_dict("records"),
            "dose_response": doses.to_dict("records"),
            "bound": experiment.choose.bound,
            "history": self.history,
            "logit_lens": logit_lens(self.model, vectors).to_dict("records"),
            "seconds": {stage: round(value, 1) for stage, value in self.seconds.items()},
        }
        files = [file.name for file in self.out.iterdir()]
        write_results(self.out, results, scores, self._projections(vectors), files=files)
        return plain(results)

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
        paragraphs, (calibrating, reporting) = calibration_paragraphs(), self._own_responses()
        evaluator = KLEvaluator(
            self.model, {**protocol.tasks, **protocol.checks}, compare.kl,
            calibration=[*paragraphs[: compare.n_texts], *calibrating], texts=[*self.test_texts, *reporting],
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
            "smaller multiplier. Arms take its layer; their strengths are set by KL."
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

    def personas(self, direction: Direction) -> list[str]:
        """Some training personas of a direction's side, the same for all seeds."""
        side = 0 if direction == "toward" else 1
        personas = dict.fromkeys(pair.sides[side][0] for pair in self.protocol.train.pairs)
        named = sorted(persona for persona in personas if persona.strip())
        n = min(self.experiment.compare.n_personas, len(named))
        return random.Random(self.experiment.split.seed).sample(named, n)

    def _own_responses(self) -> tuple[list[Scored], list[Scored]]:
        """The untuned model's own responses to neutral prompts: to set strengths on, and to report the KL on."""
        compare = self.experiment.compare
        prompts = calibration_prompts()[: 2 * compare.n_texts]
        responses = generate(self.model, prompts, max_new_tokens=compare.max_new_tokens)
        given: list[Scored] = [Response(*pair) for pair in zip(prompts, responses, strict=True) if pair[1].strip()]
        return given[::2], given[1::2]

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
        maker = _Maker(self, seed, vectors, choices, keeps={used for arm in arms for used in arm.uses})
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
        maker: _Maker,
        evaluator: KLEvaluator,
        shown: SteeringVectors | None,
    ) -> None:
        """Makes and measures one arm; of the first seed, the rep-tuned delta is saved and the projections are read."""
        if self.progress:
            print(f"{label}, seed {label.seed} ...", flush=True)
        try:
            with self._stage("tune" if arm.tunes else "choose"):
                made = maker.make(arm.name, label.direction)  # type: ignore[arg-type]
        except ArmUnavailable as reason:
            evaluator.unavailable(str(label), str(reason), label.seed)
            return
        with self._stage("evaluate"):
            found = evaluator.measure(str(label), made, label.seed)
        if shown is None or arm.name not in ("steered", "rep_tuned"):
            return
        acting = self._stated(found, made)
        if isinstance(acting, WeightDelta):
            acting.save(self.out / f"{label.stem}.safetensors")
        if arm.name == "rep_tuned" or label.direction == "away":
            self._project(f"{label.arm} {label.direction}", shown, acting)

    def _stated(self, found: Sequence[Calibrated], made: Interventions) -> Interventions:
        """The arm at the stated budget; as it was made, if it does not reach it."""
        for result in found:
            if result.reached and result.budget == self.experiment.compare.stated:
                (acting,) = each_of(result.intervention)
                return acting
        return made

    def neutral(self, configs: Sequence[TuneConfig]) -> list[Target]:
        """Neutral prompts answered by the untuned model, as many as the steps of one run can read."""
        if not any(config.kl_weight for config in configs):
            return []
        n_prompts = max(config.max_steps * config.neutral_batch_size for config in configs if config.kl_weight)
        return write_neutral(self.model, neutral_prompts()[:n_prompts], configs[0])

    def tuning_data(
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

    def _project(self, name: str, vectors: SteeringVectors, intervention: Interventions = None) -> None:
        """Layer x token projections of one text, the same text for all arms."""
        with applied(self.model, *each_of(intervention)):
            self.shown_tokens, values = token_projections(self.model, vectors, self.shown_text)
        self.projections[name] = [[round(value, 3) for value in row] for row in values.tolist()]

    def _projections(self, vectors: SteeringVectors) -> dict[str, Any]:
        layers = [int(name.split(".")[1]) for name in vectors.hook_names]
        return {"prompt": self.shown, "tokens": self.shown_tokens, "layers": layers, "arms": self.projections}


class _Maker:
    """Makes the arms of one seed. What several of them need is made once."""

    def __init__(
        self,
        run: _Run,
        seed: int,
        vectors: SteeringVectors,
        choices: Mapping[str, Any],
        *,
        keeps: set[str],
    ) -> None:
        self.run, self.seed, self.vectors, self.choices, self.keeps = run, seed, vectors, choices, keeps
        self.configs = {arm: replace(config, seed=seed) for arm, config in run.experiment.tuned_arms.items()}
        self._neutral: list[Target] | None = None
        self._data: dict[Direction, TuningData] = {}
        self._kept: dict[tuple[str, Direction], Interventions] = {}

    def make(self, arm: str, direction: Direction) -> Interventions:
        """The arm in a direction."""
        if (arm, direction) in self._kept:
            return self._kept[arm, direction]
        made = registered_arm(arm).way(self._inputs(direction))
        if arm in self.keeps:
            self._kept[arm, direction] = made
        return made

    def forget_data(self) -> None:
        """Frees the data of both directions."""
        self._data.clear()

    def _inputs(self, direction: Direction) -> ArmInputs:
        run = self.run
        return ArmInputs(
            model=run.model, direction=direction, seed=self.seed, vectors=self.vectors,
            layer=self.choices[direction]["layer"], personas=run.personas(direction),
            validation=run.protocol.choosing, configs=self.configs, data=self._data_of, make=self.make,
            tuned=self._remember, progress=run.progress,
        )  # fmt: skip

    def _data_of(self, direction: Direction) -> TuningData:
        configs = list(self.configs.values())
        if self._neutral is None:
            self._neutral = self.run.neutral(configs)
        if direction not in self._data:
            self._data[direction] = self.run.tuning_data(direction, self.vectors, configs, self._neutral)
        return self._data[direction]

    def _remember(self, arm: str, direction: Direction, delta: WeightDelta) -> None:
        label = ArmLabel(arm, direction, self.seed)
        self.run.history += [{**label._asdict(), **row} for row in delta.history]


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
