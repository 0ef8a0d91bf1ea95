"""Whether the personas move the score: what a run measures of it, keeps in results.json, and says before all else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from llama_folder import llama_folder
from small_runs import make_at_kl, make_board, make_content, write_run

import rt_lens.evaluation.answering as answering
from rt_lens.apps.report.page import write_report
from rt_lens.apps.report.verdict import notice, spoken
from rt_lens.data.builtin import new_behaviour
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.evaluation.registry import unmade_scorer
from rt_lens.experiment.check import measure_behaviour
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.heeding import direction_of, measure_personas, persona_task
from rt_lens.experiment.plan import plan_of
from rt_lens.experiment.protocols import parts
from rt_lens.experiment.run import _Run
from rt_lens.results.persona_effect import persona_warnings
from rt_lens.results.schema import checked, load_results
from rt_lens.results.writing import plain


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Experiment:
    """What `rt-lens new` writes, on a tiny model, with short responses."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "sea.toml").write_text(new_behaviour("sea"), encoding="utf-8")
    experiment = load_experiment(folder / "sea.toml", model=str(llama_folder(folder / "tiny-llama")))
    return replace(
        experiment, test=replace(experiment.test, max_new_tokens=2), choose=replace(experiment.choose, layers=(1,)),
        tune=replace(experiment.tune, layers=(2,)),
    )  # fmt: skip


class ByPersona:
    """Scores a response by its persona: `level` of the side and of the response's place in it."""

    reads = "text"

    def __init__(self, positive: Any, negative: Any, untuned: Any, *, name: str = "scored", share: bool = False):
        self.levels, self.name, self.share = {"p": positive, "c": negative, "": untuned}, name, share

    def __call__(self, answers):
        sides = ["p" if "pirate" in a.question.system.lower() else "c" * bool(a.question.system) for a in answers]
        levels = [self.levels[side] for side in sides]
        return [level(number) if callable(level) else level for number, level in enumerate(levels)]


def effect_of(example: Experiment, tiny: Any, *levels: Any, n_topics: int = 24, **names: Any) -> dict[str, Any]:
    scorer = ByPersona(*levels, **names)
    return plain(measure_personas(replace(example, scorer=scorer), tiny, n_topics).row())


def some(level: float) -> Any:
    return lambda number: level + 0.1 * (number % 3)


def test_every_topic_is_asked_three_times_in_one_batch_of_validation_first_and_never_of_the_test(
    example, tiny, monkeypatch
):
    batches = []
    generate = answering.generate

    def counted(model, prompts, **settings):
        batches.append((len(prompts), settings["batch_size"]))
        return generate(model, prompts, **settings)

    monkeypatch.setattr(answering, "generate", counted)
    effect = measure_personas(replace(example, scorer=ByPersona(some(1), some(-1), some(0))), tiny)
    assert batches == [(72, 128)] and effect.max_new_tokens == 2
    train, validation, test = parts(example)
    asked = effect.untuned.prompts
    assert asked == effect.positive.prompts == effect.negative.prompts and len(set(asked)) == 24
    assert set(asked[:8]) == set(validation.topics) and set(asked[8:]) == set(train.topics)
    assert not set(asked) & set(test.topics)
    few = measure_personas(replace(example, scorer=ByPersona(some(1), some(-1), some(0))), tiny, n_topics=5)
    assert set(few.untuned.prompts) < set(validation.topics)


def test_a_run_keeps_what_check_measures(example, tiny):
    scored = replace(example, scorer=ByPersona(some(0.5), some(-0.5), some(0)))
    row = plain(measure_personas(scored, tiny).row())
    assert row["difference"] == pytest.approx(1.0) and row["n"] == 24 and row["moves"] == 1 and row["p"] < 0.001
    assert [(side["side"], round(side["mean"], 2)) for side in row["sides"]] == [
        ("untuned", 0.1), ("positive", 0.6), ("negative", -0.4)
    ]  # fmt: skip
    assert "positive minus negative is 1.00 (n = 24 topics" in measure_behaviour(scored, tiny)[0].text
    assert row["low"] is None  # each difference is 1.00: no spread, and p alone shows it
    assert persona_warnings(row) == []


def test_personas_that_do_nothing_are_said_with_n_and_interval(example, tiny):
    row = effect_of(example, tiny, some(0), lambda number: 0.1 * ((number + 1) % 3), some(0))
    assert row["moves"] == 0 and row["low"] < 0 < row["high"]
    (sentence,) = persona_warnings(row)
    size = f"{row['difference']:.2f} [{row['low']:.2f}, {row['high']:.2f}]".replace("-", "−")
    assert sentence.startswith("The personas are not shown to move the score: on the untuned model, positive minus")
    assert f"negative is {size} (n = 24 topics outside the test, seed 0, p = {row['p']:.3f})" in sentence


def test_few_topics_say_that_they_can_show_nothing(example, tiny):
    row = effect_of(example, tiny, some(0.5), some(-0.5), some(0), n_topics=5)
    assert row["p"] > 0.05 and persona_warnings(row)[0].endswith("With 5 topics no difference could be shown.")
    six = effect_of(example, tiny, some(0.5), some(-0.5), some(0), n_topics=6)
    assert six["p"] < 0.05 and persona_warnings(six) == []


def test_the_wrong_way_round_is_said(example, tiny):
    (sentence,) = persona_warnings(effect_of(example, tiny, some(-0.5), some(0.5), some(0)))
    assert sentence.startswith("The personas move the score the wrong way") and "−1.00 [–] (n = 24 topics" in sentence


@pytest.mark.parametrize(
    ("untuned", "end", "says"),
    [(0.0, "low", "so no arm can lower it: read toward, not away."), (1.0, "high", "read away, not toward.")],
)
def test_a_score_at_an_end_of_its_range_is_said_even_where_the_personas_work(example, tiny, untuned, end, says):
    row = effect_of(example, tiny, 1.0, 0.0, untuned, share=True)
    assert row["moves"] == 1 and row["test"] == "McNemar, exact" and row["end"] == end and row["n_at_end"] == 24
    (sentence,) = persona_warnings(row)
    interval = "0.00 [0.00, 0.14]" if end == "low" else "1.00 [0.86, 1.00]"
    assert f"at the {end} end of the scorer's range (0 to 1), at 24 of 24 responses: {interval} (n = 24" in sentence
    assert sentence.endswith(says)


def test_a_tenth_away_from_the_end_is_room_enough(example, tiny):
    """21 of 24 is below nine tenths, and 22 is not."""
    for n_at_end, end in ((21, ""), (22, "high")):
        row = effect_of(example, tiny, 1.0, 0.0, lambda number, n=n_at_end: float(number < n), share=True)
        assert (row["end"], row["n_at_end"]) == (end, n_at_end if end else 0)


def test_a_score_of_unknown_range_has_no_end(example, tiny):
    row = effect_of(example, tiny, some(0.5), some(-0.5), 0.0)
    assert row["range"] is None and row["end"] == ""
    lexicon = effect_of(example, tiny, 1.0, -1.0, -1.0, name="lexicon")
    assert lexicon["range"] == [-1.0, 1.0] and "(−1 to 1)" in persona_warnings(lexicon)[0]


@pytest.mark.parametrize(("share", "interval"), [(False, "0.00 [–]"), (True, "0.00 [−0.14, 0.14]")])
def test_a_scorer_that_gives_one_number_is_the_one_thing_said(example, tiny, share, interval):
    row = effect_of(example, tiny, 1.0, 1.0, 1.0, share=share)
    (sentence,) = persona_warnings(row)
    assert sentence.startswith("The scorer 'scored' gives 1.00 to all 72 responses of the untuned model")
    assert f"positive minus negative is {interval} (n = 24 topics outside the test, seed 0, p = 1.000)" in sentence


def test_a_tie_of_a_share_is_compared_too(example, tiny):
    row = effect_of(example, tiny, lambda number: 0.5 if number == 0 else 1.0, 0.0, some(0), share=True)
    assert row["moves"] == 1 and row["test"].startswith("paired permutation")


def test_pairs_without_personas_are_asked_as_their_sides_are(example):
    """Sides that differ in the user message and the prefill: each is asked as it is, and the topic alone is untuned."""
    pairs = [Pair("", "", f"Sea {n}?", "Aye,", negative_user=f"Farm {n}?", negative_prefill="Yes,") for n in range(10)]
    other = replace(example, pairs=ContrastPairs("sides", tuple(pairs)))
    asked = persona_task(other, unmade_scorer("vader")).asked
    n = len(asked) // 3
    assert {(question.prompt[:3], question.prefill) for question in asked[:n]} == {("Sea", "")}
    assert {(question.prompt[:3], question.prefill) for question in asked[n : 2 * n]} == {("Sea", "Aye,")}
    assert {(question.prompt[:4], question.prefill) for question in asked[2 * n :]} == {("Farm", "Yes,")}


def test_an_interval_that_includes_0_shows_nothing_whatever_p_says(example, tiny):
    between = measure_personas(replace(example, scorer=ByPersona(some(1), some(0), some(0))), tiny).between
    assert direction_of(between) == 1
    assert direction_of(between._replace(low=-0.1, high=2.0)) == 0
    assert direction_of(between._replace(p=0.06)) == 0


def test_the_plan_counts_it(example):
    plan = plan_of(example)
    assert plan.stages["personas"].tokens > 72 * example.test.max_new_tokens
    longer = plan_of(replace(example, test=replace(example.test, max_new_tokens=32)))
    assert longer.stages["personas"].tokens - plan.stages["personas"].tokens == 72 * 30


# In results.json, in the report and on the terminal


ROW = {
    "scorer": "vader", "seed": 0, "max_new_tokens": 24, "n": 24, "difference": 0.04, "low": -0.1, "high": 0.18,
    "p": 0.6, "test": "paired permutation", "moves": 0, "alike": False, "range": [-1.0, 1.0], "end": "", "n_at_end": 0,
    "sides": [{"side": s, "n": 24, "mean": 0.2, "low": 0.1, "high": 0.3} for s in ("untuned", "positive", "negative")],
}  # fmt: skip


def run_with(row: dict[str, Any] | None, folder: Path) -> Path:
    board = make_board(0, shift=0.6)
    return write_run(folder, board, at_kl=make_at_kl(board), persona_effect=row)


def test_it_stands_before_the_picture_and_is_the_first_thing_said(tmp_path):
    run = run_with(ROW, tmp_path / "run")
    page = write_report(run).read_text(encoding="utf-8")
    first, picture = page.index("Read this first</h2>"), page.index("Which arm moves the behaviour most?</h2>")
    assert first < page.index("positive minus negative is 0.04 [−0.10, 0.18] (n = 24 topics") < picture
    said = spoken(load_results(run).content)
    assert said[0].startswith("The personas are not shown to move the score") and "0.04 [-0.10, 0.18]" in said[0]


def test_where_the_personas_work_nothing_stands_before_the_picture(tmp_path):
    shown = {**ROW, "difference": 0.5, "low": 0.3, "high": 0.7, "p": 0.001, "moves": 1}
    run = run_with(shown, tmp_path / "run")
    assert "Read this first" not in write_report(run).read_text(encoding="utf-8")
    assert spoken(load_results(run).content)[0].startswith("Toward, at a KL of")


def test_older_runs_have_none_and_a_damaged_entry_is_refused_by_name():
    board = make_board(0)
    older = make_content(board)
    del older["persona_effect"]
    assert checked(older)["persona_effect"] is None
    assert notice(checked(make_content(board))) == []
    for key in ("n", "moves", "sides", "end"):
        row = {name: value for name, value in ROW.items() if name != key}
        with pytest.raises(ValueError, match=f"results.json: persona_effect must have the key {key}"):
            checked(make_content(board, persona_effect=row))
    with pytest.raises(ValueError, match="persona_effect: sides must have the key mean"):
        checked(make_content(board, persona_effect={**ROW, "sides": [{"side": "untuned", "n": 1}]}))


# Why a layer was chosen


@pytest.mark.parametrize(
    ("means", "direction", "why"),
    [
        ((0.2, 0.4, 0.7), "toward", "It moves the mean score of 8 validation prompts from 0.40 to 0.70, the largest"),
        ((0.4, 0.4, 0.4), "toward", "No setting moves the mean score of 8 validation prompts (0.40) that way; with"),
        ((0.5, 0.4, 0.7), "away", "No setting moves the mean score of 8 validation prompts (0.40) that way; with this"),
    ],
)
@pytest.mark.parametrize("within", [True, False])
def test_a_choice_claims_no_move_where_there_is_none(means, direction, why, within):
    doses = pd.DataFrame(
        {"layer": 1, "multiplier": multiplier, "mean": mean, "n": 8, "admissible": within or not multiplier}
        for multiplier, mean in zip((-1.0, 0.0, 1.0), means, strict=True)
    )
    choice = _Run._choice(None, doses, direction)  # type: ignore[arg-type]
    assert choice["why"].startswith(why)
    assert ("none keeps perplexity within the bound" in choice["why"]) != within
    best = {"toward": means[2], "away": means[0]}[direction]
    assert f"{best:.2f}, the " in choice["why"] and "1 setting " in choice["why"]


def test_words_of_the_page_for_gaps(tmp_path):
    """An arm that misses the KL has a dash in the table of one prompt, and an empty response is said to be empty."""
    board = make_board(0, shift=0.6)
    gone = [row for row in board.answers if row["arm"] != "steered"]
    for row in itertools.islice((row for row in gone if row["arm"] == "rep_tuned"), 1):
        row["response"] = " \n"
    rows = board.scores[board.scores["arm"] != "steered"]
    texts = board.texts[board.texts["arm"] != "steered"]
    at_kl = make_at_kl(board)
    fewer = replace(board, scores=rows, texts=texts, answers=gone)
    page = write_report(write_run(tmp_path / "run", fewer, at_kl=at_kl)).read_text(encoding="utf-8")
    table = page[page.index("One prompt, every arm</h2>") : page.index("Results</h2>")]
    assert "A dash: the arm does not reach it." in table
    assert '<th scope="row">steered</th><td>–</td><td>–</td>' in table and "<i>(empty)</i>" in table
