"""An experiment as its TOML file says it, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from rt_lens.common.files import as_name, check_name
from rt_lens.data.builtin import behaviour_file
from rt_lens.data.contrast_pairs import ContrastPairs, pairs_from_table
from rt_lens.data.honesty import Fact, answer_pairs, load_facts, persona_pairs
from rt_lens.data.questions import Question, load_questions
from rt_lens.data.readers import read_toml
from rt_lens.evaluation.permissions import Permissions, check_model
from rt_lens.evaluation.registry import ScorerLike, make_scorer, unmade_scorer
from rt_lens.evaluation.scorers import Scorer
from rt_lens.models.registry import DEFAULT_MODEL
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.losses import Direction

DIRECTIONS: tuple[Direction, ...] = ("toward", "away")
T = TypeVar("T")
Categorised = TypeVar("Categorised", Question, Fact)


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the topics: the test part gets the rest."""

    train: float = 0.4
    validation: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class ExtractConfig:
    """How many pairs the vectors are made from, and measured on (one held-out pair per validation topic)."""

    n_pairs: int = 96


@dataclass(frozen=True)
class HonestyConfig:
    """Which honesty protocol to run, and on what.

    Attributes:
        protocol: `persona` (true or false, by letters, under personas: Ackerman 2024), `likelihood` (right answers
            against wrong ones), or `auto`: the first of them that the model is shown to be above chance at.
        held_out: categories that no vector, weight or choice may see.
        n_calibration: facts, and questions, on which it is measured what the model can do.
        n_items: at most so many items in each set of the test.
        prefill: words that each answer to a question begins with (likelihood protocol).
        filter_pairs: keep the pairs that the model itself answers as both personas ask (persona protocol).
        soft: targets of the persona protocol are half and half, and only hold the output's form.
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
            raise ValueError(f"protocol: {self.protocol!r} came; 'auto', 'persona' or 'likelihood' is wanted.")
        if isinstance(self.held_out, str):
            raise ValueError(f"held_out: {self.held_out!r} came; a list is wanted, as in ['{self.held_out}'].")
        if not self.held_out or min(self.n_calibration, self.n_items) < 4:
            raise ValueError("held_out, n_calibration, n_items: a category, and at least 4 of each, are wanted.")


@dataclass(frozen=True)
class ChooseConfig:
    """Layers and multipliers to try on validation prompts, and the most that perplexity may rise (as a ratio)."""

    layers: tuple[int, ...] = (18, 21)
    multipliers: tuple[float, ...] = (1.5, 3.0)
    bound: float = 1.1
    n_prompts: int = 16
    n_paragraphs: int = 6
    max_new_tokens: int = 24


@dataclass(frozen=True)
class TestConfig:
    """How the test prompts are asked; the paragraphs for perplexity and KL are those that no choice has seen."""

    n_prompts: int = 60
    max_new_tokens: int = 24
    n_facts: int = 25
    n_instructions: int = 20
    n_texts: int = 18
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """One behaviour's whole experiment, as its TOML file says.

    Attributes:
        name: of the behaviour.
        description: in a sentence.
        pairs: contrast pairs.
        scorer: name, `[scorer]` table or Scorer.
        tune: settings of the rep-tuned arm.
        tune_seeds: direction -> seeds. Each draws all that is random: the pairs of the vectors, the targets and those
            for validation, the neutral answers, the order of the batches. The arms share what their seed drew.
        token: what the token-tuned arm has otherwise than `tune`, beside having no cosine loss: its own rate, say.
        model: name or path for `load_model`.
        dtype: of its weights.
        chat_template_kwargs: what its chat template is given besides the messages.
        honesty: set for the honesty experiment, whose pairs follow from facts.
        judge: a `[judge]` table: an `EndpointJudge`'s settings, or a Scorer, who then judges the role-plays too.
        permissions: what the file that it was read from may use; None where it was read from none.
    """

    name: str
    description: str
    pairs: ContrastPairs
    scorer: ScorerLike
    tune: TuneConfig
    tune_seeds: Mapping[str, tuple[int, ...]]
    token: Mapping[str, Any] = field(default_factory=dict)
    model: str = DEFAULT_MODEL
    dtype: str = "float32"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    honesty: HonestyConfig | None = None
    judge: Mapping[str, Any] | Scorer | None = None
    split: SplitConfig = field(default_factory=SplitConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    test: TestConfig = field(default_factory=TestConfig)
    permissions: Permissions | None = field(default=None, repr=False, compare=False)

    @property
    def tuned_arms(self) -> dict[str, TuneConfig]:
        """Each tuned arm's settings, by its name.

        Raises:
            ValueError: for a setting of `token` that is out of range.
        """
        return {"token_tuned": replace(self.tune, cosine_weight=0.0, **self.token), "rep_tuned": self.tune}

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of either direction, in order."""
        return tuple(sorted({seed for seeds in self.tune_seeds.values() for seed in seeds}))

    @cached_property
    def made_scorer(self) -> Scorer:
        """The scorer, made once, and only where it is used: it may take a model of its own."""
        return make_scorer(self.scorer)

    @cached_property
    def made_judge(self) -> Scorer | None:
        """The judge, made once."""
        return None if self.judge is None else make_scorer(judge_table(self.judge))

    def unmade(self) -> Experiment:
        """The same with scorer and judge that say what they read, and are never made: for a plan.

        Raises:
            ValueError: for a table that no scorer can be made of.
        """
        judge = None if self.judge is None else unmade_scorer(judge_table(self.judge))
        return replace(self, scorer=unmade_scorer(self.scorer), judge=judge)


def judge_table(judge: Mapping[str, Any] | Scorer) -> ScorerLike:
    """What a scorer is made of for a `[judge]` table."""
    return {"kind": "endpoint_judge", **judge} if isinstance(judge, Mapping) else judge


def load_experiment(
    name_or_path: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    permissions: Permissions | None = None,
) -> Experiment:
    """Reads an experiment's TOML file, or a shipped behaviour's.

    Args:
        name_or_path: for example `mood`, or `my_behaviour.toml`.
        model: overrides the file's model.
        dtype: overrides the file's.
        chat_template_kwargs: override the file's.
        permissions: which judges behind endpoints the file may use; what the user's settings allow for None.

    Raises:
        ValueError: unknown behaviour, a table or key that is not known (the nearest is named), a value out of range, or
            something that only the user may allow (see `rt_lens.evaluation.permissions`).
    """
    path = behaviour_file(name_or_path)
    content = read_toml(path)
    permissions = Permissions.of_user() if permissions is None else permissions
    tables = {"pairs", "scorer", "model", "split", "extract", "choose", "tune", "test", "honesty", "judge"}
    _refuse_unknown(path.name, content, {"name", "description"} | tables)
    name = check_name(content["name"], f"name in {path.name}") if "name" in content else as_name(path.stem)
    tuning = dict(content.get("tune", {}))
    seeds, token = _seeds(tuning.pop("seeds", [0, 1, 2])), tuning.pop("token", {})
    honesty = _table(HonestyConfig, "honesty", content["honesty"]) if "honesty" in content else None
    judge = _judge(path, content, honesty, permissions)
    scorer = permissions.checked(content.get("scorer", "vader"), path)
    unmade_scorer(scorer)  # refuses a wrong table now, with nothing loaded
    if honesty is None:
        pairs = pairs_from_table(name, content.get("pairs", {}), source=path.name)
    else:
        pairs = honesty_pairs(honesty)
    of_model = content.get("model", {})
    _refuse_unknown("[model]", of_model, {"name", "dtype", "chat_template_kwargs"})
    if model is None:
        model = str(of_model.get("name", DEFAULT_MODEL))
        check_model(model, path)
    made = Experiment(
        name=name,
        description=content.get("description", ""),
        pairs=pairs,
        scorer=scorer,
        tune=_table(TuneConfig, "tune", tuning),
        tune_seeds=seeds,
        token=_token_settings(token),
        model=model,
        dtype=dtype or of_model.get("dtype", "float32"),
        chat_template_kwargs=chat_template_kwargs or of_model.get("chat_template_kwargs", {}),
        honesty=honesty,
        judge=judge,
        split=_table(SplitConfig, "split", content.get("split", {})),
        extract=_table(ExtractConfig, "extract", content.get("extract", {})),
        choose=_table(ChooseConfig, "choose", content.get("choose", {})),
        test=_table(TestConfig, "test", content.get("test", {})),
        permissions=permissions,
    )
    _ = made.tuned_arms  # refuses what is out of range now, not after an hour
    return made


# What both arms read is prepared once: where a cosine is read, and what is learnt.
_SHARED = {
    "direction", "layers", "hook", "positions", "centred", "cosine_weight", "precision", "prefix_cache", "n_targets",
    "target_tokens", "target_temperature", "validation_share", "seed",
}  # fmt: skip


def _token_settings(values: Any) -> dict[str, Any]:
    """The table `[tune.token]`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"tune.token must be a table [tune.token], got {values!r}. Write its settings below it.")
    if shared := sorted(_SHARED & set(values)):
        raise ValueError(
            f"[tune.token] must not have {shared[0]!r}, which both arms share. Set it in [tune], or leave it out."
        )
    _refuse_unknown("[tune.token]", values, {entry.name for entry in fields(TuneConfig)} - _SHARED)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _judge(
    path: Path, content: Mapping[str, Any], honesty: HonestyConfig | None, permissions: Permissions
) -> Mapping[str, Any] | None:
    """The `[judge]` table as it may be used.

    Refuses, before anything is loaded, a judge that cannot be made, and tables that nothing would read.
    """
    unread = {"judge"} if honesty is None else {"pairs", "scorer"}
    if found := sorted(unread & set(content)):
        why = "only [honesty] has role-plays to judge" if honesty is None else "[honesty] brings its own"
        raise ValueError(f"config: {path.name} has [{found[0]}], and {why}. Leave it out.")
    if "judge" not in content:
        return None
    judge = permissions.checked({**content["judge"], "kind": "endpoint_judge"}, path)
    unmade_scorer(judge)
    return {key: value for key, value in judge.items() if key != "kind"}  # type: ignore[union-attr]


def honesty_pairs(config: HonestyConfig) -> ContrastPairs:
    """The pairs that vectors of the honesty experiment are made from, of the categories that are not held out."""
    if config.protocol == "persona":
        return persona_pairs(seen(load_facts(), config))
    return answer_pairs(seen(questions_of(config), config))


def questions_of(config: HonestyConfig) -> list[Question]:
    """The shipped questions, with the prefill of this experiment, and one way to say each option."""
    asked = load_questions("honesty")
    return [replace(question, prefill=config.prefill, right=question.right[:1]) for question in asked]


def seen(items: Sequence[Categorised], config: HonestyConfig, *, held_out: bool = False) -> list[Categorised]:
    """The items of the categories that may be seen, or of those held out.

    Raises:
        ValueError: for a category held out that there is none of.
    """
    known = {item.category for item in items}
    if unknown := sorted(set(config.held_out) - known):
        raise ValueError(f"held_out: {', '.join(unknown)} came; categories are {', '.join(sorted(known))}.")
    return [item for item in items if (item.category in config.held_out) == held_out]


def _seeds(seeds: Any) -> dict[str, tuple[int, ...]]:
    """Seeds for each direction, from one list for both or a table with a list for each."""
    each = seeds if isinstance(seeds, dict) else dict.fromkeys(DIRECTIONS, seeds)
    _refuse_unknown("tune.seeds", each, set(DIRECTIONS))
    for direction in DIRECTIONS:
        if not each.get(direction):
            raise ValueError(f"tune.seeds: none for {direction!r}. Give at least one, as in seeds = [0].")
    return {direction: tuple(each[direction]) for direction in DIRECTIONS}


def _table(kind: type[T], name: str, values: Any) -> T:
    if not isinstance(values, Mapping):
        raise ValueError(f"config: {name} = {values!r} came; a table [{name}] is wanted.")
    _refuse_unknown(f"[{name}]", values, {entry.name for entry in fields(kind)})  # type: ignore[arg-type]
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"config: [{name}] holds a value of the wrong type ({error}).") from None


def _refuse_unknown(where: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ValueError(f"config: {where} has an unknown key {key!r}. {hint}")
