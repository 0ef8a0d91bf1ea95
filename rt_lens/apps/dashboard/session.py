"""The state that all tabs share: one model, vectors, tuned arms, a finished run, and the queue of jobs."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rt_lens.apps.dashboard.work import Jobs, turn_of
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.data.builtin import behaviours
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.protocols import parts
from rt_lens.models.forward import model_name
from rt_lens.models.prompts import SharedBelow
from rt_lens.models.protocol import Model
from rt_lens.results.schema import Results
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of

N_PAIRS = 96
SEED = 0
MOST_ASIDE = 16  # sets of vectors, of some megabytes each on a large model


class Session:
    """The state behind the pages.

    Args:
        model: used by one job at a time; None for a run whose model is not on this machine.
        vectors: behaviour -> its vectors.
        run: a finished run, whose vectors and tuned arms the pages offer too.
        experiments: files of behaviours beside the built-in ones, or experiments from `load_experiment`.

    Raises:
        ValueError: if the vectors are of another model.
    """

    def __init__(
        self,
        model: Model | None,
        vectors: Mapping[str, SteeringVectors],
        run: Results | None = None,
        experiments: Sequence[str | Path | Experiment] = (),
    ) -> None:
        self._model, self.run, self.jobs = model, run, Jobs(turn_of(model))
        loaded = [item if isinstance(item, Experiment) else load_experiment(item) for item in experiments]
        self._experiments = {experiment.name: experiment for experiment in loaded}
        self._pairs: dict[str, tuple[ContrastPairs, ContrastPairs]] = {}
        # The vectors at the start, and those that a user has put in their place.
        self._vectors, self._kept = dict(vectors), dict[str, SteeringVectors]()
        self._origins = dict.fromkeys(self._vectors, "the vectors given at the start")
        self._aside: dict[str, tuple[str, SteeringVectors]] = {}
        self._numbers = itertools.count()
        self._deltas = dict[str, WeightDelta]()
        if run is not None and (file := run.file("vectors.safetensors")).is_file():
            of_run = str(run.content["behaviour"])
            self._vectors.setdefault(of_run, SteeringVectors.load(file))
            self._origins.setdefault(of_run, "the vectors of the run")
        if model is not None:
            for loaded_vectors in self._vectors.values():
                loaded_vectors.check_fits(model)

    @property
    def has_model(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> Any:
        """The model, for jobs only.

        Raises:
            ValueError: if it is not on this machine.
        """
        if self._model is None:
            raise ValueError(f"{self.name} is not on this machine. Name a model that is, with --model.")
        return self._model

    @cached_property
    def shared(self) -> SharedBelow:
        """What the blocks below the steered one have read: moving a control does not read the prompt there again."""
        return SharedBelow(self.model)

    @cached_property
    def name(self) -> str:
        return (
            model_name(self._model) if self._model is not None else str(self.run.content["model"]) if self.run else ""
        )

    @property
    def n_layers(self) -> int:
        if self._model is not None:
            return int(self._model.cfg.n_layers)
        return 1 + max((layer_of(name) for vectors in self._vectors.values() for name in vectors.hook_names), default=0)

    @property
    def usual_layer(self) -> int:
        """A depth at which steering tends to work, in shallow and deep models."""
        return self.at_depth(0.7)

    def at_depth(self, share: float) -> int:
        """The block at this share of the depth: 0 is the first, 1 the last."""
        return round(share * (self.n_layers - 1))

    def behaviours(self) -> list[str]:
        """The behaviours: those with vectors first, then those with contrast pairs."""
        return list(dict.fromkeys([*self._vectors, *self._kept, *self.with_pairs()]))

    def with_pairs(self) -> list[str]:
        """The behaviours with a file, and so with contrast pairs, prompts and a scorer."""
        return list(dict.fromkeys([*self._experiments, *behaviours()]))

    def experiment(self, behaviour: str) -> Experiment:
        """The experiment of the behaviour's file.

        Raises:
            ValueError: if it has no file.
        """
        if behaviour not in self.with_pairs():
            raise ValueError(
                f"behaviour must be one of {', '.join(self.with_pairs())}, which have pairs and prompts, got "
                f"{behaviour!r}. Open the dashboard with its file in `behaviours` to add it."
            )
        return self._experiments.get(behaviour) or load_experiment(behaviour)

    def pairs(self, behaviour: str) -> tuple[ContrastPairs, ContrastPairs]:
        """Training and validation pairs; the dashboard never uses the test topics of a behaviour."""
        if behaviour not in self._pairs:  # a split compares thousands of combinations
            self._pairs[behaviour] = parts(self.experiment(behaviour))[:2]
        return self._pairs[behaviour]

    def vectors(self, behaviour: str) -> SteeringVectors:
        """The vectors in use; without any, it extracts mean differences of training pairs (for jobs only)."""
        kept = self._kept.get(behaviour)
        if kept is None and behaviour not in self._vectors:
            train, _ = self.pairs(behaviour)
            self._vectors[behaviour] = extract_vectors(self.model, train.sample(N_PAIRS, SEED), seed=SEED)
        return kept if kept is not None else self._vectors[behaviour]

    def has_vectors(self, behaviour: str) -> bool:
        return behaviour in self._kept or behaviour in self._vectors

    def set_aside(self, behaviour: str, vectors: SteeringVectors) -> str:
        """Keeps vectors that no page uses yet, and returns their key. Beyond `MOST_ASIDE` the oldest are dropped."""
        key = f"{next(self._numbers)}-{secrets.token_hex(4)}"
        self._aside[key] = (behaviour, vectors)
        for old in list(self._aside)[:-MOST_ASIDE]:
            del self._aside[old]
        return key

    def aside(self, key: str) -> tuple[str, SteeringVectors]:
        """The behaviour and the vectors of this key from `set_aside`.

        Raises:
            ValueError: if they are no longer kept.
        """
        if key not in self._aside:
            raise ValueError(
                "These vectors are no longer kept: the dashboard was restarted, or computed "
                f"{MOST_ASIDE} newer ones. Compute them again."
            )
        return self._aside[key]

    def keep_vectors(self, behaviour: str, vectors: SteeringVectors) -> None:
        """Makes all pages use these vectors, until `forget_kept`."""
        self._kept[behaviour] = vectors

    def has_kept(self, behaviour: str) -> bool:
        """Whether a user has replaced the vectors that the behaviour had at the start."""
        return behaviour in self._kept

    def forget_kept(self, behaviour: str) -> None:
        """Makes all pages use the vectors that the behaviour had at the start."""
        self._kept.pop(behaviour, None)

    def origin(self, behaviour: str) -> str:
        """Describes the vectors at the start: "the vectors of the run", for example."""
        return self._origins.get(behaviour, "the default vectors")

    def deltas(self) -> list[str]:
        """Names of the tuned arms: those of the run, and those tuned in this session."""
        return list(dict.fromkeys([*self._files(), *self._deltas]))

    def delta(self, name: str) -> WeightDelta:
        """The weight change of a tuned arm.

        Raises:
            ValueError: if there is no such arm.
        """
        if name not in self._deltas:
            files = self._files()
            if name not in files:
                raise ValueError(f"arm must be one of {', '.join(self.deltas()) or 'none yet'}, got {name!r}.")
            assert self.run is not None
            self._deltas[name] = WeightDelta.load(self.run.file(files[name].name))
        return self._deltas[name]

    def keep_delta(self, name: str, delta: WeightDelta) -> None:
        """Makes all pages offer the weight change as an arm."""
        self._deltas[name] = delta

    def _files(self) -> dict[str, Path]:
        folder = self.run.folder if self.run is not None else None
        return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*_tuned_*.safetensors"))}


def tuned_label(name: str) -> ArmLabel:
    """The label of a tuned arm; a suffix of the dashboard, such as `(mood) 2`, stays with the arm.

    Example:
        >>> tuned_label("rep_tuned_away (mood) 2")
        ArmLabel(arm='rep_tuned (mood) 2', direction='away', seed=0)
    """
    stem, *suffix = name.split(" ", 1)
    label = ArmLabel.parse(stem)
    return label._replace(arm=" ".join([label.arm, *suffix]))


def provenance_text(vectors: SteeringVectors) -> str:
    """The origin of vectors in short: `mean_diff, 96 pairs, seed 0`."""
    provenance = vectors.provenance
    return f"{provenance.method}, {provenance.n_pairs} pairs, seed {provenance.seed}"
