"""Makes the arms of one seed from an experiment's settings. A run does so once, a search for every trial."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Room
from rt_lens.arms.registry import ArmInputs, History, registered_arm
from rt_lens.data.builtin import calibration_prompts, neutral_prompts
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.evaluation.texts import Response, Scored
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.protocols import Protocol
from rt_lens.models.generation import generate
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.chats import chat_text
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Target, TokenTarget, write_neutral, write_targets
from rt_lens.tuning.tuning_data import TuningData, prepare_data
from rt_lens.vectors.steering_vectors import SteeringVectors

Remember: TypeAlias = Callable[[str, Direction, History], None]


def personas_of(protocol: Protocol, direction: Direction) -> list[str]:
    """All training personas of a direction's side, in the order of the pairs."""
    side = 0 if direction == "toward" else 1
    personas = dict.fromkeys(pair.sides[side][0] for pair in protocol.train.pairs)
    return [persona for persona in personas if persona.strip()]


def room_of(model: Model, protocol: Protocol) -> Room:
    """What the settings of arms have to fit into."""
    return Room(model.cfg.n_layers, min(len(personas_of(protocol, direction)) for direction in DIRECTIONS))


def check_room(experiment: Experiment, model: Model, protocol: Protocol) -> None:
    """Refuses settings for which the model or the behaviour has no room.

    Raises:
        ValueError: names the setting.
    """
    room = room_of(model, protocol)
    for arm, settings in experiment.settings.items():
        for name, value in settings.items():
            if not registered_arm(arm).knobs[name].fits(value, room):
                raise ValueError(
                    f"settings.{arm}.{name} must fit a model of {room.n_layers} blocks and {room.n_personas} training "
                    f"personas on each side, got {value}. Numbers begin at 0."
                )


def own_responses(experiment: Experiment, model: Model) -> tuple[list[Scored], list[Scored]]:
    """The untuned model's own responses to neutral prompts: to set strengths on, and to report the KL on."""
    compare = experiment.compare
    prompts = calibration_prompts()[: 2 * compare.n_texts]
    given: list[Scored] = [*_answered(model, prompts, "", compare.max_new_tokens)]
    return given[::2], given[1::2]


def inside_responses(experiment: Experiment, model: Model, protocol: Protocol) -> dict[str, list[Response]]:
    """Responses to validation prompts, on which the inside of the arms is read: the model's own, and its personas'.

    A protocol whose prompts have options has none; then neutral prompts are answered, without personas. Empty where the
    model has no response of its own.
    """
    n, tokens = experiment.compare.n_inside, experiment.compare.max_new_tokens
    prompts = [question.prompt for question in protocol.choosing.asked if not question.options][:n]
    found = {"own": _answered(model, prompts or calibration_prompts()[:n], "", tokens)}
    chosen = random.Random(experiment.split.seed)
    for direction in DIRECTIONS if prompts and found["own"] else ():
        if personas := personas_of(protocol, direction):
            found[direction] = _answered(model, prompts, [chosen.choice(personas) for _ in prompts], tokens)
    return {name: responses for name, responses in found.items() if responses}


def _answered(model: Model, prompts: Sequence[str], personas: str | Sequence[str], tokens: int) -> list[Response]:
    systems = [personas] * len(prompts) if isinstance(personas, str) else personas
    chats = [chat_text(model, prompt, system=system) for prompt, system in zip(prompts, systems, strict=True)]
    texts = generate(model, chats, chat=False, max_new_tokens=tokens)
    return [Response(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text.strip()]


class Material:
    """What the tuned arms of one seed read: targets and neutral responses. The untuned model writes them once."""

    def __init__(self, experiment: Experiment, model: Model, protocol: Protocol, seed: int) -> None:
        self.model, self.protocol = model, protocol
        self.config = replace(experiment.tune, seed=seed)
        self._neutral: list[Target] = []
        self._targets: dict[Direction, tuple[list[TokenTarget], list[TokenTarget]]] = {}

    def neutral(self, configs: Sequence[TuneConfig]) -> list[Target]:
        """Neutral prompts answered by the untuned model, as many as the steps of one run can read."""
        read = [config.max_steps * config.neutral_batch_size for config in configs if config.kl_weight]
        prompts = neutral_prompts()[: max(read, default=0)]
        if len(prompts) > len(self._neutral):
            self._neutral = write_neutral(self.model, prompts, self.config)
        return self._neutral if prompts else []

    def targets(self, direction: Direction) -> tuple[list[TokenTarget], list[TokenTarget]]:
        """Training and validation targets."""
        if direction not in self._targets:
            train, validation = self.protocol.targets(direction, self.config.seed)
            few = replace(self.config, n_targets=max(4, round(self.config.n_targets * self.config.validation_share)))
            written = self._written(train, direction, self.config), self._written(validation, direction, few)
            self._targets[direction] = written
        return self._targets[direction]

    def data(self, direction: Direction, vectors: SteeringVectors, configs: Sequence[TuneConfig]) -> TuningData:
        """The data of all arms of one direction, cached up to the first block that any of them trains."""
        train, validation = self.targets(direction)
        reading = [config for config in configs if config.cosine_weight] or configs[:1]
        shared = replace(
            reading[0], direction=direction, seed=self.config.seed, residual_loss="cosine", token_loss="cross_entropy",
            layers=tuple(sorted({layer for config in reading for layer in config.layers})),
            trained_layers=tuple(sorted({block for config in configs for block in config.blocks})),
            kl_weight=max(config.kl_weight for config in configs),
        )  # fmt: skip
        return prepare_data(self.model, vectors, train, shared, validation=validation, neutral=self.neutral(configs))

    def _written(
        self, targets: ContrastPairs | list[TokenTarget], direction: Direction, config: TuneConfig
    ) -> list[TokenTarget]:
        if isinstance(targets, ContrastPairs):
            return [*write_targets(self.model, targets, direction, config)]
        return targets


class ArmMaker:
    """Makes the arms of one seed. What several of them need is made once.

    Args:
        experiment: its arms and settings.
        material: of the seed.
        vectors: of the seed.
        layers: direction -> the layer chosen on validation prompts.
        remember: is called with arm, direction and delta of each tuning run.
        progress: show bars.

    Attributes:
        trained_tokens: response tokens that its tuning runs have read in training steps.
    """

    def __init__(
        self,
        experiment: Experiment,
        material: Material,
        vectors: SteeringVectors,
        layers: Mapping[Direction, int],
        *,
        remember: Remember = lambda arm, direction, history: None,
        progress: bool = False,
    ) -> None:
        self.experiment, self.material, self.vectors, self.layers = experiment, material, vectors, layers
        self.remember, self.progress = remember, progress
        seed = material.config.seed
        self.configs = {arm: replace(config, seed=seed) for arm, config in experiment.tuned_arms.items()}
        self.trained_tokens = 0
        self._data: dict[Direction, TuningData] = {}
        self._kept: dict[tuple[str, str, Direction], Interventions] = {}

    def make(self, arm: str, direction: Direction) -> Interventions:
        """The arm in a direction, with its own settings."""
        return self._made(arm, arm, direction)

    def forget_data(self) -> None:
        """Frees the data of both directions."""
        self._data.clear()

    def data(self, direction: Direction) -> TuningData:
        """What all tuned arms read."""
        if direction not in self._data:
            self._data[direction] = self.material.data(direction, self.vectors, list(self.configs.values()))
        return self._data[direction]

    def _made(self, arm: str, owner: str, direction: Direction) -> Interventions:
        """An arm with the settings of its owner: itself, or one with settings of its own that is made of it."""
        if (arm, owner, direction) not in self._kept:
            made = registered_arm(arm).way(self._inputs(arm, owner, direction))
            if not self._is_used(arm, owner):
                return made
            self._kept[arm, owner, direction] = made
        return self._kept[arm, owner, direction]

    def _is_used(self, arm: str, owner: str) -> bool:
        """Whether another arm is made of it."""
        return any(
            arm in registered_arm(other).uses and owner == self._owner(other, arm) for other in self.experiment.arms
        )

    def _owner(self, arm: str, used: str) -> str:
        return arm if self.experiment.settings.get(arm) else used

    def _inputs(self, arm: str, owner: str, direction: Direction) -> ArmInputs:
        settings = self.experiment.settings.get(owner, {})
        configs = self.configs if owner == arm else {**self.configs, arm: self.configs[owner]}

        def make(used: str, way: Direction) -> Interventions:
            return self._made(used, self._owner(arm, used), way)

        def tuned(way: Direction, history: History, tokens: int) -> None:
            self.trained_tokens += tokens
            self.remember(owner, way, history)

        return ArmInputs(
            model=self.material.model, direction=direction, seed=self.material.config.seed, vectors=self.vectors,
            layer=self.layers[direction], personas=self._personas(direction, settings),
            validation=self.material.protocol.choosing, configs=configs, data=self.data, make=make,
            settings=settings, targets=self.material.targets,
            neutral=lambda: self.material.neutral(list(self.configs.values())), tuned=tuned, progress=self.progress,
        )  # fmt: skip

    def _personas(self, direction: Direction, settings: Mapping[str, Any]) -> list[str]:
        """That of the settings, or some to choose from, the same for all seeds."""
        personas = personas_of(self.material.protocol, direction)
        if "persona" in settings and personas:
            return [personas[settings["persona"]]]
        n = min(self.experiment.compare.n_personas, len(personas))
        return random.Random(self.experiment.split.seed).sample(sorted(personas), n)
