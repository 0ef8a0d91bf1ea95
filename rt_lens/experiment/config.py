"""An experiment's settings, read from its TOML file and checked before anything is loaded."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from rt_lens.arms.equal_damage import BUDGETS
from rt_lens.arms.registry import check_arms, registered_arm
from rt_lens.common.files import as_name, check_name
from rt_lens.data.builtin import behaviour_content, behaviour_file, behaviours, data_path, prompt_kinds
from rt_lens.data.contrast_pairs import ContrastPairs, pairs_from_table
from rt_lens.data.honesty import Fact, answer_pairs, load_facts, persona_pairs
from rt_lens.data.questions import Question, load_questions
from rt_lens.data.readers import read_lines
from rt_lens.evaluation.permissions import Permissions, check_model
from rt_lens.evaluation.registry import ScorerLike, make_scorer, unmade_scorer
from rt_lens.evaluation.scorers import Scorer
from rt_lens.experiment.toml_types import check_types, json_schema
from rt_lens.models.registry import DEFAULT_MODEL
from rt_lens.tuning.config import TuneConfig, modern
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.tracking import TRACKERS

DIRECTIONS: tuple[Direction, ...] = ("toward", "away")
T = TypeVar("T")
Categorised = TypeVar("Categorised", Question, Fact)


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the topics for training and validation; the rest is the test part.

    Attributes:
        train: share of the topics that vectors and weights come from.
        validation: share on which settings are chosen.
        seed: of the split.
    """

    train: float = 0.4
    validation: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class ExtractConfig:
    """What the vectors are extracted from. They are validated on one held-out pair per validation topic.

    Attributes:
        n_pairs: training pairs.
    """

    n_pairs: int = 96


@dataclass(frozen=True)
class HonestyConfig:
    """Which honesty protocol to run, and on which items.

    Attributes:
        protocol: `persona` (true or false, by letters, under personas: Ackerman 2024), `likelihood` (right answers
            against wrong ones), or `auto`: the first of these in which the model is above chance.
        held_out: categories that no vector, weight or choice sees.
        n_calibration: number of facts, and of questions, on which the model is measured before the run.
        n_items: largest number of items in each set of the test.
        prefill: of each response to a question (likelihood protocol).
        filter_pairs: keep only the pairs that the model answers as both personas ask (persona protocol).
        soft: give both letters a probability of one half in the targets of the persona protocol, so that they train
            only the form of the output.
    """

    protocol: Literal["auto", "persona", "likelihood"] = "auto"
    held_out: tuple[str, ...] = ("animals", "language", "physics")
    n_calibration: int = 60
    n_items: int = 60
    prefill: str = ""
    filter_pairs: bool = True
    soft: bool = False

    def __post_init__(self) -> None:
        if self.protocol not in ("auto", "persona", "likelihood"):
            raise ValueError(f"protocol must be one of 'auto', 'persona', 'likelihood', got {self.protocol!r}.")
        if isinstance(self.held_out, str):
            raise ValueError(f"held_out must be a list, got {self.held_out!r}. Write held_out = [{self.held_out!r}].")
        if not self.held_out:
            raise ValueError("held_out must name at least one category, got an empty list.")
        for name in ("n_calibration", "n_items"):
            if getattr(self, name) < 4:
                raise ValueError(f"{name} must be at least 4, got {getattr(self, name)}.")


@dataclass(frozen=True)
class ChooseConfig:
    """What plain steering is tried with, on validation prompts.

    Attributes:
        layers: blocks to steer after.
        multipliers: in lengths of the vector.
        bound: largest allowed rise of perplexity, as a ratio.
        n_prompts: validation prompts.
        n_paragraphs: plain paragraphs on which perplexity is measured.
        max_new_tokens: length of a response.
    """

    layers: tuple[int, ...] = (18, 21)
    multipliers: tuple[float, ...] = (1.5, 3.0)
    bound: float = 1.1
    n_prompts: int = 16
    n_paragraphs: int = 6
    max_new_tokens: int = 24


@dataclass(frozen=True)
class TestConfig:
    """How the test prompts are asked. Perplexity and KL are measured on paragraphs that no choice has seen.

    Attributes:
        topics: test prompts in the place of the test part of `[pairs]`; none of them is a topic of the pairs. In a file
            a list, or the name of a text file, one per line, in its folder or built in (`fresh/mood.txt`).
        n_prompts: the first so many are asked.
        max_new_tokens: length of a response.
        n_facts: plain questions, and sums.
        n_instructions: instructions to follow.
        n_texts: paragraphs on which KL and perplexity are reported.
        kinds: prompts unlike the topics, asked at the stated KL and scored alike: some of `stories`, `instructions`,
            `opinions` and `arithmetic`, 40 of each (`prompt_kinds`).
        seed: of the bootstraps.

    Raises:
        ValueError: for an unknown kind.
    """

    topics: tuple[str, ...] = ()
    n_prompts: int = 60
    max_new_tokens: int = 24
    n_facts: int = 25
    n_instructions: int = 20
    n_texts: int = 18
    kinds: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in prompt_kinds()]:
            raise ValueError(f"test.kinds must be some of {', '.join(prompt_kinds())}, got {unknown[0]!r}.")


@dataclass(frozen=True)
class CompareConfig:
    """How the arms are compared at equal damage.

    Attributes:
        kl: budgets, in nats per token from the untuned model.
        stated: the budget of tables and comparisons, chosen before the run; one of `kl`.
        side_effects: `every` measures facts, arithmetic and instructions at every budget, `stated` at that one.
        n_texts: plain paragraphs, and as many responses, on which strengths are set; as many others report the KL.
        max_new_tokens: length of these responses.
        n_personas: training personas that the prompted arm tries.
        n_inside: validation prompts on whose responses the inside of the arms is read, at the stated budget.
    """

    kl: tuple[float, ...] = BUDGETS
    stated: float = 0.01
    side_effects: Literal["every", "stated"] = "every"
    n_texts: int = 24
    max_new_tokens: int = 24
    n_personas: int = 6
    n_inside: int = 12

    def __post_init__(self) -> None:
        if not self.kl or any(not 0 < budget < math.inf for budget in self.kl):
            raise ValueError(f"compare.kl must be budgets above 0, got {list(self.kl)}. Try kl = [0.003, 0.01, 0.03].")
        if self.stated not in self.kl:
            raise ValueError(f"compare.stated must be one of compare.kl, {list(self.kl)}, got {self.stated:g}.")
        if self.side_effects not in ("every", "stated"):
            raise ValueError(f"compare.side_effects must be 'every' or 'stated', got {self.side_effects!r}.")
        for name in ("n_texts", "max_new_tokens", "n_personas", "n_inside"):
            if getattr(self, name) < 1:
                raise ValueError(f"compare.{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class ReportConfig:
    """Where the losses of a run's arms go besides its files.

    Attributes:
        to: trackers: some of `wandb`, `tensorboard` and `trackio`.
    """

    to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.to, str):
            raise ValueError(f"report.to must be a list, got {self.to!r}. Write to = [{self.to!r}].")
        if unknown := [name for name in self.to if name not in TRACKERS]:
            raise ValueError(
                f"report.to must be some of {', '.join(TRACKERS)}, got {unknown[0]!r}. Name some of these."
            )


@dataclass(frozen=True)
class SearchConfig:
    """The search over each arm's own settings that comes before a run.

    Attributes:
        trials: for each arm, the same number; 0 runs the settings of the file.
        n_prompts: validation prompts on which a trial is measured, in both directions.
        seed: of the values that are tried, and of all that is random in a trial.
    """

    trials: int = 0
    n_prompts: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """The settings of a behaviour's whole experiment.

    Attributes:
        name: of the behaviour.
        description: in a sentence.
        pairs: contrast pairs.
        scorer: name, `[scorer]` table or Scorer.
        tune: settings of the rep-tuned arm.
        tune_seeds: direction -> seeds. A seed controls everything that is random: the pairs of the vectors, the
            training and validation targets, the neutral answers, the order of the batches. All arms of one seed share
            these.
        token: settings in which the token-tuned arm differs from `tune`, such as its learning rate. It never has a
            cosine loss.
        arms: names of the arms to compare, see `rt_lens.arms.registry`.
        settings: arm -> values of its knobs, which a search has found; an arm without any runs with the settings above.
        model: name or path for `load_model`.
        dtype: of the model's weights.
        chat_template_kwargs: keywords for the chat template besides the messages.
        honesty: settings of the honesty experiment, whose pairs are made from facts; None for every other behaviour.
            `rt_lens.experiment.protocols.family_of` says what follows from it.
        judge: a `[judge]` table with the settings of an `EndpointJudge`, or a Scorer; it judges the role-plays too.
        permissions: which judges the file may use; None for an experiment that was not read from a file.

    Example:
        >>> experiment = load_experiment("mood")
        >>> experiment.tune_seeds["away"], experiment.choose.layers
        ((0, 1, 2), (18, 21))
        >>> {arm: config.cosine_weight > 0 for arm, config in experiment.tuned_arms.items()}
        {'token_tuned': False, 'rep_tuned': True}
    """

    name: str
    description: str
    pairs: ContrastPairs
    scorer: ScorerLike
    tune: TuneConfig
    tune_seeds: Mapping[str, tuple[int, ...]]
    token: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ("prompted", "steered", "token_tuned", "rep_tuned", "random")
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model: str = DEFAULT_MODEL
    dtype: str = "float32"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    honesty: HonestyConfig | None = None
    judge: Mapping[str, Any] | Scorer | None = None
    split: SplitConfig = field(default_factory=SplitConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    test: TestConfig = field(default_factory=TestConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    permissions: Permissions | None = field(default=None, repr=False, compare=False)

    @property
    def tuned_arms(self) -> dict[str, TuneConfig]:
        """Arm -> its tuning settings. One that is made of another arm is here if it has settings of its own.

        Raises:
            ValueError: for a setting of `token` or `settings` that is out of range.
        """
        base = {"token_tuned": replace(self.tune, cosine_weight=0.0, **self.token), "rep_tuned": self.tune}
        arms = {arm: registered_arm(arm) for arm in dict.fromkeys([*self.arms, *self.settings])}
        alike = {
            arm: replace(base[way.like], **way.differs)
            for arm, way in arms.items() if way.like is not None and arm not in base
        }  # fmt: skip
        made_of = {arm: arms[arm].uses for arm in self.settings if self.settings[arm]}
        of_others = {arm: base[used] for arm, uses in made_of.items() for used in uses if used in base}
        tuned = base | alike | of_others
        return {arm: _with_settings(config, self.settings.get(arm, {})) for arm, config in tuned.items()}

    @property
    def tuning_runs(self) -> list[tuple[str, str, int]]:
        """Arm, direction and seed of each tuning run that the arms need, once each."""
        runs: dict[tuple[str, str, int], None] = {}
        for direction, seeds in self.tune_seeds.items():
            for seed, arm in itertools.product(seeds, self.arms):
                uses = registered_arm(arm).uses
                names = [arm] if arm in self.tuned_arms else uses
                needed = itertools.product(names, DIRECTIONS if uses else (direction,))
                runs |= dict.fromkeys((name, way, seed) for name, way in needed if name in self.tuned_arms)
        return list(runs)

    @property
    def blocks(self) -> dict[str, list[int]]:
        """Setting -> the blocks of the model that it names."""
        named = {"choose.layers": list(self.choose.layers), "tune.layers": list(self.tune.layers)}
        for arm, config in self.tuned_arms.items():
            table = f"settings.{arm}" if self.settings.get(arm) else "tune"
            named |= {f"{table}.layers": list(config.layers), f"{table}.trained_layers": list(config.blocks)}
        steering = {f"settings.{arm}.layer": [own["layer"]] for arm, own in self.settings.items() if "layer" in own}
        return named | steering

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of both directions, sorted."""
        return tuple(sorted({seed for seeds in self.tune_seeds.values() for seed in seeds}))

    @cached_property
    def made_scorer(self) -> Scorer:
        """The scorer. It is made on first use and only once, since it can load a model."""
        return make_scorer(self.scorer)

    @cached_property
    def made_judge(self) -> Scorer | None:
        """The judge. It is made on first use and only once."""
        return None if self.judge is None else make_scorer(judge_table(self.judge))

    def unmade(self) -> Experiment:
        """The same experiment for a plan: scorer and judge say what they read, and are never made.

        Raises:
            ValueError: for a table from which no scorer can be made.
        """
        judge = None if self.judge is None else unmade_scorer(judge_table(self.judge))
        return replace(self, scorer=unmade_scorer(self.scorer), judge=judge)


def _with_settings(config: TuneConfig, settings: Mapping[str, Any]) -> TuneConfig:
    """The tuning settings with those found. Blocks to train follow the layers of the loss, unless both were found."""
    following = {"trained_layers": None} if "layers" in settings else {}
    known = {entry.name for entry in fields(TuneConfig)}  # the others, such as a multiplier, the arm itself reads
    return replace(config, **(following | {name: value for name, value in settings.items() if name in known}))


def judge_table(judge: Mapping[str, Any] | Scorer) -> ScorerLike:
    """The scorer, or the `[scorer]` table, of a `[judge]` table."""
    return {"kind": "endpoint_judge", **judge} if isinstance(judge, Mapping) else judge


def load_experiment(
    name_or_path: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    search: int | None = None,
    permissions: Permissions | None = None,
) -> Experiment:
    """Reads the experiment of a TOML file, or of a built-in behaviour.

    Args:
        name_or_path: for example `mood`, or `my_behaviour.toml`.
        model: overrides the model of the file.
        dtype: overrides that of the file.
        chat_template_kwargs: override those of the file.
        search: overrides `search.trials` of the file.
        permissions: which judges behind endpoints the file may use. Defaults to what the user's settings allow.

    Raises:
        ValueError: for an unknown behaviour, an unknown table or key (the message names the nearest), a value out of
            range, or something that only the user can allow (see `rt_lens.evaluation.permissions`).

    Warns:
        UserWarning: for a key that has a new name; the old one is read all the same.

    Example:
        >>> experiment = load_experiment("mood", dtype="bfloat16")
        >>> experiment.name, experiment.dtype, experiment.scorer
        ('mood', 'bfloat16', {'kind': 'vader'})
        >>> load_experiment("moood")
        Traceback (most recent call last):
        ValueError: ...Did you mean 'mood'?
    """
    path = behaviour_file(name_or_path)
    content = _with_new_names(behaviour_content(path), path)
    permissions = Permissions.of_user() if permissions is None else permissions
    tables = {"pairs", "scorer", "model", "split", "extract", "choose", "tune", "test", "compare", "search"}
    tables |= {"settings", "honesty", "judge", "report"}
    _refuse_unknown(path.name, content, {"name", "description", "arms"} | tables)
    name = check_name(content["name"], f"name in {path.name}") if "name" in content else as_name(path.stem)
    for table in ("pairs", "model", "tune", "judge", "settings", "search"):
        _refuse_no_table(table, content.get(table, {}))
    tuning = dict(content.get("tune", {}))
    seeds, token = _seeds(tuning.pop("seeds", [0, 1, 2])), tuning.pop("token", {})
    honesty = _table(HonestyConfig, "honesty", content["honesty"]) if "honesty" in content else None
    judge = _judge(path, content, permissions)
    scorer = permissions.checked(content.get("scorer", "vader"), path)
    unmade = unmade_scorer(scorer)  # refuses a wrong table before anything is loaded
    if honesty is None:
        _refuse_unreadable(scorer, unmade)
    pairs = honesty_pairs(honesty) if honesty else pairs_from_table(name, content.get("pairs", {}), source=path.name)
    model_table = content.get("model", {})
    _refuse_unknown("[model]", model_table, {"name", "dtype", "chat_template_kwargs"})
    if model is None:
        model = str(model_table.get("name", DEFAULT_MODEL))
        check_model(model, path)
    experiment = Experiment(
        name=name,
        description=_text("description", content.get("description", "")),
        pairs=pairs,
        scorer=scorer,
        tune=_table(TuneConfig, "tune", tuning),
        tune_seeds=seeds,
        token=_token_settings(token),
        arms=_arms(content.get("arms", Experiment.arms)),
        settings=_settings(content.get("settings", {})),
        model=model,
        dtype=dtype or model_table.get("dtype", "float32"),
        chat_template_kwargs=chat_template_kwargs or model_table.get("chat_template_kwargs", {}),
        honesty=honesty,
        judge=judge,
        split=_table(SplitConfig, "split", content.get("split", {})),
        extract=_table(ExtractConfig, "extract", content.get("extract", {})),
        choose=_table(ChooseConfig, "choose", content.get("choose", {})),
        test=_test(content.get("test", {}), path, pairs, honesty),
        compare=_table(CompareConfig, "compare", content.get("compare", {})),
        search=_table(
            SearchConfig, "search", content.get("search", {}) | ({} if search is None else {"trials": search})
        ),
        report=_table(ReportConfig, "report", content.get("report", {})),
        permissions=permissions,
    )
    _ = experiment.tuned_arms  # refuses a value out of range now, and not after an hour
    return experiment


_OLD_NAMES = {"opener": "prefill", "correct_only": "filter_pairs"}
"""Keys of [honesty] in older files -> keys now.

Older names in [pairs] are read by `rt_lens.data.readers`, in [scorer] by `rt_lens.evaluation.registry`, and in [tune]
by `rt_lens.tuning.config.modern`.
"""


def _with_new_names(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The content of a file with the names of this version; each old one gets a one-line warning."""
    content = dict(content)
    if isinstance(honesty := content.get("honesty"), Mapping):
        for old, new in _OLD_NAMES.items():
            if old in honesty and new in honesty:
                raise ValueError(
                    f"config: [honesty] must not have both {new!r} and its old name {old!r}. Remove {old!r}."
                )
            if old in honesty:
                warnings.warn(f"{path.name}: {old!r} is now {new!r}; the old name still works.", stacklevel=3)
        content["honesty"] = {_OLD_NAMES.get(key, key): value for key, value in honesty.items()}
    if isinstance(tune := content.get("tune"), Mapping):
        token = tune.get("token")
        content["tune"] = modern({**tune, "token": modern(token)} if isinstance(token, Mapping) else tune)
    return content


# Both arms share one TuningData: the layers and positions of the cosine loss, and the targets.
_SHARED = {
    "direction", "layers", "hook", "positions", "centred", "cosine_weight", "precision", "prefix_cache", "n_targets",
    "target_tokens", "target_temperature", "validation_share", "seed",
}  # fmt: skip


def _token_settings(values: Any) -> dict[str, Any]:
    """The settings of the table `[tune.token]`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"tune.token must be a table [tune.token], got {values!r}. Write its settings below it.")
    if shared := sorted(_SHARED & set(values)):
        raise ValueError(
            f"[tune.token] must not have {shared[0]!r}, which both arms share. Set it in [tune], or leave it out."
        )
    _refuse_unknown("[tune.token]", values, {entry.name for entry in fields(TuneConfig)} - _SHARED)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _test(table: Any, path: Path, pairs: ContrastPairs, honesty: HonestyConfig | None) -> TestConfig:
    """The table `[test]`, with its topics read."""
    if not isinstance(table, Mapping) or "topics" not in table:
        return _table(TestConfig, "test", table)
    if honesty is not None:
        raise ValueError(
            "test.topics must be left out, since [honesty] brings its own questions, got some. Remove them."
        )
    topics = table["topics"]
    if isinstance(topics, str):
        topics = [line.strip() for _, line in read_lines(_beside(path, topics), "test.topics")]
    if not isinstance(topics, list) or not topics or not all(isinstance(topic, str) and topic for topic in topics):
        raise ValueError(f"test.topics must be a list of texts, or a file of them, got {table['topics']!r}. Name some.")
    known = {topic.casefold() for topic in pairs.topics}
    if leaked := [topic for topic in topics if topic.casefold() in known]:
        raise ValueError(
            f"test.topics must not be topics of [pairs], which training and validation see, got {leaked[0]!r} in both. "
            "Remove it from one."
        )
    rest = _table(TestConfig, "test", {key: value for key, value in table.items() if key != "topics"})
    return replace(rest, topics=tuple(topics))


def _beside(path: Path, name: str) -> Path:
    """A file in the folder of a behaviour's file, or a built-in one. A file from others must not read elsewhere."""
    folder = path.parent.resolve()
    found = (folder / name).resolve()
    if not found.is_relative_to(folder) or ".." in Path(name).parts:
        raise ValueError(
            f"test.topics must be a file in the folder of {path.name}, got {name!r}, which leads out of it. Copy "
            "it there."
        )
    return found if found.is_file() else data_path(name)


def _settings(tables: Any) -> dict[str, dict[str, Any]]:
    """The tables `[settings.ARM]`: values of the knobs of each arm."""
    found: dict[str, dict[str, Any]] = {}
    for arm, values in tables.items():
        check_arms([arm])
        if not isinstance(values, Mapping):
            raise ValueError(f"settings.{arm} must be a table [settings.{arm}], got {values!r}.")
        knobs = registered_arm(arm).knobs
        _refuse_unknown(f"[settings.{arm}]", values, set(knobs))
        for name, value in values.items():
            if not knobs[name].allows(value):
                raise ValueError(
                    f"settings.{arm}.{name} must be {knobs[name].allowed}, got {value!r}. Change it, or leave it out."
                )
        found[arm] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return found


def _judge(path: Path, content: Mapping[str, Any], permissions: Permissions) -> Mapping[str, Any] | None:
    """The `[judge]` table, checked against the permissions.

    Refuses a judge that cannot be made, and tables that nothing would read, before anything is loaded.
    """
    if "honesty" in content:
        unread, reason = {"pairs", "scorer"}, "[honesty] brings its own"
    else:
        unread, reason = {"judge"}, "only [honesty] has role-plays to judge"
    if tables := sorted(unread & set(content)):
        raise ValueError(f"config: {path.name} must not have the table [{tables[0]}], since {reason}. Remove it.")
    if "judge" not in content:
        return None
    judge = permissions.checked({**content["judge"], "kind": "endpoint_judge"}, path)
    unmade_scorer(judge)
    return {key: value for key, value in judge.items() if key != "kind"}  # type: ignore[union-attr]


TABLES: dict[str, type] = {
    "split": SplitConfig, "extract": ExtractConfig, "choose": ChooseConfig, "tune": TuneConfig, "test": TestConfig,
    "compare": CompareConfig, "search": SearchConfig, "report": ReportConfig, "honesty": HonestyConfig,
}  # fmt: skip
"""Tables of a behaviour's file -> their types."""


def behaviour_schema() -> dict[str, Any]:
    """The JSON Schema of a behaviour's TOML file.

    Example:
        >>> schema = behaviour_schema()
        >>> schema["properties"]["extract"]["properties"]["n_pairs"]["type"]
        'integer'
    """
    return json_schema(TABLES, behaviours())


def honesty_pairs(config: HonestyConfig) -> ContrastPairs:
    """The pairs of the honesty experiment, from the categories that are not held out."""
    if config.protocol == "persona":
        return persona_pairs(seen(load_facts(), config))
    return answer_pairs(seen(questions_of(config), config))


def questions_of(config: HonestyConfig) -> list[Question]:
    """The built-in questions, with this experiment's prefill, and one wording of each right option."""
    questions = load_questions("honesty")
    return [replace(question, prefill=config.prefill, right=question.right[:1]) for question in questions]


def seen(items: Sequence[Categorised], config: HonestyConfig, *, held_out: bool = False) -> list[Categorised]:
    """The items of the categories that are not held out, or of those that are.

    Raises:
        ValueError: for a held-out category that has no items.
    """
    known = {item.category for item in items}
    if unknown := sorted(set(config.held_out) - known):
        raise ValueError(f"held_out must name categories of {', '.join(sorted(known))}, got {', '.join(unknown)}.")
    return [item for item in items if (item.category in config.held_out) == held_out]


def _arms(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"arms must be a list of names, got {names!r}. Write for example arms = ['steered'].")
    check_arms(names)
    return tuple(names)


def _seeds(seeds: Any) -> dict[str, tuple[int, ...]]:
    """Direction -> seeds, from one list for both directions or a table with a list for each."""
    by_direction = seeds if isinstance(seeds, dict) else dict.fromkeys(DIRECTIONS, seeds)
    _refuse_unknown("tune.seeds", by_direction, set(DIRECTIONS))
    for direction in DIRECTIONS:
        given = by_direction.get(direction)
        if given is None or given == []:
            raise ValueError(
                f"tune.seeds must have at least one seed for {direction!r}, got none. Write for example seeds = [0]."
            )
        whole = isinstance(given, list) and all(_is_number(seed, whole=True) for seed in given)
        if not whole or len(set(given)) < len(given):
            raise ValueError(
                f"tune.seeds must be a list of different whole numbers for {direction!r}, got {given!r}. Write for "
                "example seeds = [0, 1, 2]."
            )
    return {direction: tuple(by_direction[direction]) for direction in DIRECTIONS}


def _refuse_no_table(name: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"config: {name} must be a table [{name}], got {values!r}. Write its settings below it.")


def _table(kind: type[T], name: str, values: Any) -> T:
    _refuse_no_table(name, values)
    _refuse_unknown(f"[{name}]", values, {entry.name for entry in fields(kind)})  # type: ignore[arg-type]
    if kind in (SplitConfig, ExtractConfig, ChooseConfig, TestConfig, SearchConfig):  # the others check themselves
        for key, value in values.items():
            _check_value(f"{name}.{key}", value, getattr(kind, key))
    try:
        table = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError:
        table = None
    check_types(kind, name, values)
    if table is None:
        raise ValueError(f"config: [{name}] must have values of the right types, got {dict(values)!r}. Correct one.")
    return table


def _check_value(name: str, value: Any, default: Any) -> None:
    """Refuses a value of another type than the setting's default, an empty list, and a count below 1."""
    if default == ():
        rule, allowed = "a list of names", isinstance(value, list) and all(isinstance(item, str) for item in value)
    elif isinstance(default, tuple):
        whole = isinstance(default[0], int)
        rule = f"a list of at least one {'block' if whole else 'number'}"
        allowed = isinstance(value, list) and bool(value) and all(_is_number(item, whole) for item in value)
    elif isinstance(default, int):
        least = 0 if name.endswith((".seed", ".n_texts", ".trials")) else 1
        rule = f"a whole number from {least} on"
        allowed = _is_number(value, whole=True) and value >= least
    else:
        rule, allowed = "a number", _is_number(value)
    if not allowed:
        example = list(default) if isinstance(default, tuple) else default
        key = name.rpartition(".")[2]
        raise ValueError(f"{name} must be {rule}, got {value!r}. Write for example {key} = {example}.")


def _is_number(value: Any, whole: bool = False) -> bool:
    return type(value) is int or (type(value) is float and not whole)  # true and false are no numbers here


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}. Put it in quotes.")
    return value


def _refuse_unreadable(scorer: Any, unmade: Scorer) -> None:
    """Refuses a scorer that reads more of an answer than the text of a response to a topic."""
    pairs = isinstance(scorer, Mapping) and scorer.get("pairs") is True
    if unmade.reads == "text" and unmade.name not in ("contains_answer", "follows_instruction") and not pairs:
        return
    what = "with pairs = true, which compares two responses" if pairs else "which reads a question's options or check"
    raise ValueError(
        f"scorer must read the text of one response, since a topic of [pairs] has nothing else, got {unmade.name!r}, "
        f"{what}. Take for example kind = 'pattern', 'lexicon' or 'logit_judge'."
    )


def _refuse_unknown(table: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ValueError(f"config: unknown key {key!r} in {table}. {hint}")
