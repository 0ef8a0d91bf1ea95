"""Searches each arm's own settings before a run: as many trials for every arm, on validation prompts alone.

A trial makes the arm in both directions with one set of settings, sets its strength so that KL is the stated budget,
and has two goals: a large effect on validation prompts, and a small KL on the untuned model's own responses to them,
which the budget on neutral texts does not hold. No knob changes how many tokens an arm is trained on. The first trial
is the file's own settings. Optuna's TPE draws the others, and its journal keeps each finished trial: a search that was
stopped goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import Timeout

from rt_lens.arms.calibration import KLMeter, calibrate, has_strength
from rt_lens.arms.equal_damage import standing_alone
from rt_lens.arms.intervention import Interventions, applied, each_of
from rt_lens.arms.registry import ArmUnavailable, RegisteredArm, registered_arm
from rt_lens.common.files import lock_of
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import Interval, mean_interval
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.evaluation.texts import Scored
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.making import ArmMaker, Material, room_of
from rt_lens.experiment.protocols import Protocol
from rt_lens.models.checksums import measure_sha256, parameters_sha256
from rt_lens.models.protocol import Model
from rt_lens.results.writing import plain
from rt_lens.tuning.loop import LossNotFinite
from rt_lens.tuning.losses import Direction
from rt_lens.vectors.steering_vectors import SteeringVectors

if TYPE_CHECKING:
    from optuna import Study

_RANDOM_TRIALS = 6  # before TPE learns from them
RULE = (
    "Of each arm's trials the one with the largest effect on validation prompts at the stated budget, mean of both "
    "directions; of equals, the one with the smaller KL on these prompts."
)


@dataclass(frozen=True)
class Trial:
    """One set of settings of an arm, and what came of it.

    Attributes:
        arm: its name.
        number: from 0, the file's own settings.
        settings: of the arm's knobs.
        effect: change of the score in each direction's sense, mean of both directions, over validation prompts; None if
            the trial failed.
        own_kl: KL on the untuned responses to these prompts, nats per token, mean of both directions; 0 where prompts
            have options and no responses.
        trained_tokens: response tokens that its tuning runs have read in training steps.
        seconds: of the trial.
        reason: why it failed; empty if it did not.

    Example:
        >>> trial = Trial("steered", 1, {"layer": 20}, Interval(24, 0.2, 0.1, 0.3), 0.02, 0, 9.5)
        >>> trial.done, trial.as_row()["effect"]
        (True, 0.2)
    """

    arm: str
    number: int
    settings: Mapping[str, Any]
    effect: Interval | None = None
    own_kl: float = 0.0
    trained_tokens: int = 0
    seconds: float = 0.0
    reason: str = ""

    @property
    def done(self) -> bool:
        """Whether it was measured."""
        return self.effect is not None

    def as_row(self) -> dict[str, Any]:
        """The columns of `search` in results.json, but `front` and `chosen`."""
        n, effect, low, high = self.effect or (None,) * 4
        return plain(
            {**asdict(self), "settings": dict(self.settings), "n": n, "effect": effect, "low": low, "high": high}
        )


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        settings: arm -> settings of the trial chosen, for `Experiment.settings`. An arm without a finished trial, or
            whose file settings were best, keeps the file's.
        trials: of all arms.
        chosen: arm -> number of the trial chosen.
        front: arm -> numbers of the trials that no other beats in both goals.

    Example:
        >>> trials = [Trial("steered", n, {"layer": 20 + n}, Interval(24, n / 10, 0.0, 0.3), 0.02) for n in (0, 1)]
        >>> found_of(trials).settings, found_of(trials).front
        ({'steered': {'layer': 21}}, {'steered': [1]})
    """

    settings: Mapping[str, Mapping[str, Any]]
    trials: Sequence[Trial]
    chosen: Mapping[str, int]
    front: Mapping[str, Sequence[int]]

    def table(self) -> list[dict[str, Any]]:
        """A row per trial, with `front` and `chosen`."""
        return [
            {**trial.as_row(), "front": trial.number in self.front.get(trial.arm, ()),
             "chosen": self.chosen.get(trial.arm) == trial.number}
            for trial in self.trials
        ]  # fmt: skip

    def toml(self) -> str:
        """The settings as tables to paste into a behaviour's file."""
        tables = []
        for arm, settings in self.settings.items():
            lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
            tables.append("\n".join([f"[settings.{arm}]", *lines]))
        return "\n\n".join(tables) + "\n"


def found_of(trials: Sequence[Trial]) -> Found:
    """What a search has found, of its trials.

    Example:
        >>> found_of([Trial("steered", 0, {}, reason="KL is at most 0.002 up to 64 times its strength.")]).settings
        {}
    """
    settings, chosen, front = {}, {}, {}
    for arm in dict.fromkeys(trial.arm for trial in trials):
        done = [trial for trial in trials if trial.arm == arm and trial.effect is not None]
        if not done:
            continue
        best = max(done, key=lambda trial: (trial.effect.mean, -trial.own_kl, -trial.number))  # type: ignore[union-attr]
        chosen[arm] = best.number
        front[arm] = [trial.number for trial in done if not any(_beats(other, trial) for other in done)]
        if best.settings:
            settings[arm] = best.settings
    return Found(settings, trials, chosen, front)


def _beats(one: Trial, other: Trial) -> bool:
    assert one.effect is not None
    assert other.effect is not None
    better = one.effect.mean - other.effect.mean, other.own_kl - one.own_kl
    return min(better) >= 0 and max(better) > 0


class Search:
    """The search of one experiment.

    Args:
        experiment: its arms, knobs and `search`.
        model: the untuned model.
        protocol: that the experiment runs.
        vectors: of the behaviour.
        layers: direction -> the layer chosen on validation prompts, for arms whose settings name none.
        task: validation prompts; its first scorer counts.
        calibration: texts on which strengths are set.
        path: Optuna's journal; made if it is not there.
        progress: show a bar.

    Raises:
        ValueError: for a journal of another search, or one that another process is writing.
        ImportError: without Optuna.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        protocol: Protocol,
        vectors: SteeringVectors,
        layers: Mapping[Direction, int],
        task: EvalTask,
        calibration: Sequence[Scored],
        path: Path,
        *,
        progress: bool = False,
    ) -> None:
        self.experiment, self.model, self.protocol = experiment, model, protocol
        self.vectors, self.layers, self.path, self.progress = vectors, layers, path, progress
        self.material = Material(experiment, model, protocol, experiment.search.seed)
        self.room = room_of(model, protocol)
        self.weights = parameters_sha256(model)
        self.bench = _Bench(experiment, model, task, calibration)

    def run(self) -> Found:
        """Every arm's trials, those of the journal included; arms take turns, so that a search cut short is equal."""
        arms = [arm for arm in map(registered_arm, self.experiment.arms) if arm.knobs]
        n_trials = self.experiment.search.trials
        with _journal(self.path) as storage:
            studies = {arm.name: _study(storage, arm, self._settings(arm)) for arm in arms}
            kept = {name: _trials(study) for name, study in studies.items()}
            done = sum(min(n_trials, len(trials)) for trials in kept.values())
            with Bar(
                total=n_trials * len(arms), initial=done, desc="search", unit="trial", disable=not self.progress
            ) as bar:
                for number in range(n_trials):
                    for arm in arms:
                        if number >= len(kept[arm.name]):
                            bar.set_postfix(arm=arm.name)
                            kept[arm.name].append(self._next(studies[arm.name], arm, kept[arm.name]))
                            bar.update()
        return found_of([trial for trials in kept.values() for trial in trials[:n_trials]])

    def _next(self, study: Study, arm: RegisteredArm, before: Sequence[Trial]) -> Trial:
        """Draws the settings of the next trial, measures them, and keeps both in the journal."""
        number = len(before)
        params, distributions, settings = self._drawn(study, arm, number) if number else ({}, {}, {})
        same = next((trial for trial in before if trial.settings == settings), None)
        trial = replace(same, number=number, seconds=0.0) if same else self._measured(arm, number, settings)
        _keep(study, trial, params, distributions)
        return trial

    def _drawn(self, study: Study, arm: RegisteredArm, number: int) -> tuple[Any, Any, dict[str, Any]]:
        """Values of the knobs. They depend on the seed and the trials before alone, and nothing is written."""
        import optuna

        drawn_by = f"{self.experiment.search.seed} {arm.name} {number}"
        seed = int(hashlib.sha256(drawn_by.encode()).hexdigest()[:8], 16)
        sampler = optuna.samplers.TPESampler(n_startup_trials=_RANDOM_TRIALS, seed=seed)
        scratch = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        scratch.add_trials(study.get_trials(deepcopy=False))
        trial = scratch.ask()
        settings = {name: knob.draw(trial, name, self.room) for name, knob in arm.knobs.items()}
        return trial.params, trial.distributions, settings

    def _measured(self, arm: RegisteredArm, number: int, settings: Mapping[str, Any]) -> Trial:
        start = time.perf_counter()
        others = {name: values for name, values in self.experiment.settings.items() if name != arm.name}
        own = {arm.name: settings or self.experiment.settings.get(arm.name, {})}
        tried = replace(self.experiment, arms=(arm.name,), settings=others | own)
        maker = ArmMaker(tried, self.material, self.vectors, self.layers)
        outcome: dict[str, Any]
        try:
            found = {direction: self.bench.measure(maker.make(arm.name, direction)) for direction in DIRECTIONS}
        except (ArmUnavailable, LossNotFinite, _OutOfReach) as reason:
            outcome = {"reason": str(reason)}
        else:
            moved = np.mean([found["toward"][0], -found["away"][0]], axis=0)
            own_kl = float(np.mean([kl for _, kl in found.values()]))
            outcome = {"effect": mean_interval(moved, self.experiment.search.seed), "own_kl": own_kl}
        seconds = round(time.perf_counter() - start, 1)
        return Trial(arm.name, number, settings, trained_tokens=maker.trained_tokens, seconds=seconds, **outcome)

    def _settings(self, arm: RegisteredArm) -> dict[str, Any]:
        """What makes two searches of an arm the same, beside the number of trials."""
        experiment, task = self.experiment, self.bench.task
        settings = {
            **{name: asdict(getattr(experiment, name)) for name in ("tune", "split", "extract", "choose")},
            "token": experiment.token, "settings": experiment.settings.get(arm.name, {}),
            "compare": asdict(experiment.compare) | {"kl": None, "side_effects": None, "n_inside": None},
            "search": asdict(experiment.search) | {"trials": None},
            "pairs": experiment.pairs.sha256,
            "prompts": task.prompts, "scorer": [task.made[0].name, measure_sha256(task.made[0], self.model)],
            "weights": self.weights, "layers": self.layers,
            "knobs": {name: repr(knob) for name, knob in arm.knobs.items()}, "room": asdict(self.room),
        }  # fmt: skip
        return json.loads(json.dumps(plain(settings)))


class _OutOfReach(Exception):
    """No strength reaches the budget."""


class _Bench:
    """What all trials are measured on: the effect on validation prompts at the stated budget, and KL on responses."""

    def __init__(self, experiment: Experiment, model: Model, task: EvalTask, calibration: Sequence[Scored]) -> None:
        self.model, self.budget, self.task = model, experiment.compare.stated, task
        self.meter = KLMeter(model, calibration)
        answers = self._answers()
        self.untuned = np.array(task.made[0](answers), dtype=float)
        own = standing_alone(answers)
        self.own = KLMeter(model, own) if own else None

    def measure(self, made: Interventions) -> tuple[np.ndarray, float]:
        """The change of each prompt's score, and the KL on the untuned responses."""
        acting = made
        if has_strength(made):
            (found,) = calibrate(made, self.meter, self.budget)
            if not found.reached:
                raise _OutOfReach(found.reason)
            acting = found.intervention
        with applied(self.model, *each_of(acting)):
            scores = np.array(self.task.made[0](self._answers()), dtype=float)
        return scores - self.untuned, 0.0 if self.own is None else self.own(acting).mean

    def _answers(self) -> list[Any]:
        reads = {self.task.made[0].reads}
        return ask(self.model, list(self.task.asked), reads, max_new_tokens=self.task.max_new_tokens)


@contextmanager
def _journal(path: Path) -> Iterator[Any]:
    """Optuna's journal, for this process alone. A line that a killed process has not finished is cut off."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError:
        raise ImportError("search.trials needs optuna. Run pip install 'rt_lens[search]'.") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with lock_of(path).acquire(timeout=0):
            if path.exists():
                content = path.read_bytes()
                if not content.endswith(b"\n"):
                    path.write_bytes(content[: content.rfind(b"\n") + 1])
            yield JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    except Timeout:
        raise ValueError(
            f"out must be a folder in which no other search runs, got {path.parent}. Wait for it, or choose another."
        ) from None


def _study(storage: Any, arm: RegisteredArm, settings: Mapping[str, Any]) -> Study:
    """The arm's study in the journal; refused if it was made with other settings."""
    import optuna

    study = optuna.create_study(
        storage=storage, study_name=arm.name, directions=["maximize", "minimize"], load_if_exists=True
    )
    kept = study.user_attrs.get("settings")
    if kept is None:
        study.set_user_attr("settings", settings)
    elif differing := sorted(name for name in kept | settings if kept.get(name) != settings.get(name)):
        raise ValueError(
            f"out must be a folder whose search.journal was made with the same settings, got another "
            f"{', '.join(differing)} for {arm.name}. Choose another folder, or delete the journal to search anew."
        )
    return study


def _keep(study: Study, trial: Trial, params: Any, distributions: Any) -> None:
    """One line of the journal."""
    import optuna

    row = {**asdict(trial), "effect": trial.effect and list(trial.effect)}
    finished = optuna.trial.TrialState.COMPLETE if trial.done else optuna.trial.TrialState.FAIL
    values = [trial.effect.mean, trial.own_kl] if trial.effect is not None else None
    study.add_trial(
        optuna.trial.create_trial(
            state=finished, values=values, params=params, distributions=distributions, user_attrs={"trial": plain(row)}
        )
    )


def _trials(study: Study) -> list[Trial]:
    """The finished trials of a study, in order."""
    rows = [dict(trial.user_attrs["trial"]) for trial in study.get_trials(deepcopy=False)]
    return [
        Trial(**{
            **row, "effect": row["effect"] and Interval(*row["effect"]),
            "settings": {
                name: tuple(value) if isinstance(value, list) else value for name, value in row["settings"].items()
            },
        })
        for row in rows
    ]  # fmt: skip
