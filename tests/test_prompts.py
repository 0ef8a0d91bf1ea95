"""Contrast pairs: read whole, split with nothing shared, written through the template with only the persona changed."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rt_lens.prompts import ContrastPairs, Pair, load_pairs, pairs_from_table

ROWS = [
    {"positive": "You are glad.", "negative": "You are sad.", "user": "Tell me of rain.", "opener": "The rain"},
    {"positive": "Be merry.", "negative": "Be gloomy.", "user": "Was ist für dich „Glück“?", "opener": ""},
]
TABLE = {"positive": ["glad", "merry"], "negative": ["sad", "gloomy"], "topics": ["rain", "tea", "cats"]}


def product(topics: int, personas: int, openers: int) -> ContrastPairs:
    return pairs_from_table(
        "made up",
        {
            "positive": [f"p{i}" for i in range(personas)],
            "negative": [f"n{i}" for i in range(personas)],
            "topics": [f"t{i}" for i in range(topics)],
            "openers": [f"o{i}" for i in range(openers)],
        },
    )


def write_csv(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# Reading


def test_the_shipped_mood_is_every_combination_of_its_lists(pairs):
    openers, personas = {pair.opener for pair in pairs.pairs}, {(pair.positive, pair.negative) for pair in pairs.pairs}
    assert pairs.name == "mood"
    assert len(pairs) == len(set(pairs.pairs)) == len(pairs.topics) * len(personas) * len(openers) > 100
    assert all(positive != negative for positive, negative in personas)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_of_ones_own_gives_its_rows_in_order(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    if ending == "csv":
        write_csv(path, ROWS)
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    for given_path in (path, str(path)):
        loaded = load_pairs(given_path)
        assert loaded.name == "mine"
        assert loaded.pairs == tuple(Pair(**row) for row in ROWS)


def test_an_opener_may_be_left_out_and_other_fields_are_ignored(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"positive": "a", "negative": "b", "user": "c", "note": 3}))
    assert load_pairs(path).pairs == (Pair("a", "b", "c", ""),)


def test_a_toml_file_gives_every_combination_with_the_personas_aligned(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[pairs]\npositive=["a","b"]\nnegative=["c","d"]\ntopics=["x","y","z"]\nopeners=["", "So"]\n')
    loaded = load_pairs(path)
    assert len(loaded) == len(set(loaded.pairs)) == 2 * 3 * 2
    assert {(pair.positive, pair.negative) for pair in loaded.pairs} == {("a", "c"), ("b", "d")}
    assert loaded.topics == ["x", "y", "z"]


@pytest.mark.parametrize("side", ["positive", "negative", "user"])
def test_a_row_without_a_side_is_refused_with_its_line_in_the_file(tmp_path, side):
    lame = {**ROWS[1], side: " "}
    (tmp_path / "mine.jsonl").write_text("\n".join(["", json.dumps(ROWS[0]), "", json.dumps(lame)]))
    write_csv(tmp_path / "mine.csv", [ROWS[0], lame])
    with pytest.raises(ValueError, match=rf"pairs: mine\.jsonl, line 4 lacks the side '{side}'\. Each needs positive"):
        load_pairs(tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match=rf"pairs: mine\.csv, line 3 lacks the side '{side}'"):
        load_pairs(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    "line", ['{"positive": "a"', '["a", "b", "c"]', '{"positive": 1, "negative": "b", "user": "c"}']
)
def test_a_line_that_is_no_pair_is_refused_with_its_place(tmp_path, line):
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line)
    with pytest.raises(ValueError, match=r"pairs: mine\.jsonl, line 2 .*Each needs positive, negative and user"):
        load_pairs(tmp_path / "mine.jsonl")


def test_an_unknown_behaviour_and_an_unknown_ending_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"behaviour: 'moode' .*Did you mean 'mood'\?"):
        load_pairs("moode")
    (tmp_path / "mine.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"pairs: mine\.txt has an unknown ending. Give a \.toml, \.jsonl or \.csv file"
    ):
        load_pairs(tmp_path / "mine.txt")


def test_toml_that_is_none_is_refused_with_file_and_line(tmp_path):
    (tmp_path / "mine.toml").write_text('[pairs]\npositive = "a" "b"\n')
    with pytest.raises(ValueError, match=r"config: .*mine\.toml is not valid TOML: .*line"):
        load_pairs(tmp_path / "mine.toml")


@pytest.mark.parametrize("side", ["positive", "negative", "topics"])
@pytest.mark.parametrize("wrong", [[], "one string"])
def test_a_table_without_a_list_is_refused_by_its_name(side, wrong):
    with pytest.raises(ValueError, match=rf"pairs: mine\.toml lacks a list pairs\.{side}\. Both sides and the topics"):
        pairs_from_table("mine", {**TABLE, side: wrong}, "mine.toml")


def test_a_table_with_one_string_for_openers_is_refused():
    with pytest.raises(ValueError, match=r"pairs\.openers"):
        pairs_from_table("mine", {**TABLE, "openers": "So"})


def test_personas_that_do_not_align_are_refused():
    with pytest.raises(ValueError, match=r"pairs: 2 positive and 1 negative personas came. Align them"):
        pairs_from_table("mine", {**TABLE, "negative": ["sad"]})


def test_no_pair_and_an_empty_side_are_refused():
    with pytest.raises(ValueError, match=r"pairs: 'mine' has none. Give at least one"):
        ContrastPairs("mine", ())
    with pytest.raises(ValueError, match=r"pairs: number 1 of 'mine' has an empty 'negative' side. Fill it in"):
        ContrastPairs("mine", (Pair("a", "b", "c"), Pair("a", " ", "c")))


# Checksum


def test_the_checksum_knows_content_and_order_and_not_the_name():
    some = product(3, 2, 1)
    assert ContrastPairs("other", some.pairs).sha256 == some.sha256
    assert ContrastPairs("made up", some.pairs[::-1]).sha256 != some.sha256
    assert ContrastPairs("made up", some.pairs[:-1]).sha256 != some.sha256


# Splitting and sampling


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 4), st.floats(0.2, 0.8), st.integers(0, 99))
def test_parts_of_a_product_share_no_topic_and_no_persona_or_opener_where_there_are_enough(t, p, o, share, seed):
    assume(0 < round(share * t) < t)
    whole = product(t, p, o)
    train, test = whole.split(share, seed=seed)
    assert set(train.topics) | set(test.topics) == set(whole.topics)
    assert len(train.topics) == round(share * t)
    for n, key in ((t, "user"), (p, "positive"), (p, "negative"), (o, "opener")):
        ours, theirs = ({getattr(pair, key) for pair in part.pairs} for part in (train, test))
        if 0 < round(share * n) < n:
            assert not ours & theirs, key
        else:
            assert ours == theirs, key
    assert set(train.pairs) | set(test.pairs) <= set(whole.pairs)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.floats(0.2, 0.8), st.integers(0, 99))
def test_rows_that_share_nothing_are_split_without_loss(n, share, seed):
    assume(0 < round(share * n) < n)
    whole = ContrastPairs("rows", tuple(Pair(f"p{i}", f"n{i}", f"t{i}") for i in range(n)))
    train, test = whole.split(share, seed=seed)
    assert Counter(train.pairs + test.pairs) == Counter(whole.pairs)


def test_a_split_repeats_with_its_seed_and_changes_with_another(pairs):
    assert pairs.split(0.7, seed=1) == pairs.split(0.7, seed=1)
    assert pairs.split(0.7, seed=1)[0].topics != pairs.split(0.7, seed=2)[0].topics


def test_a_split_into_three(pairs):
    parts = pairs.split(0.6, 0.2)
    assert len(parts) == 3
    assert sum(len(part.topics) for part in parts) == len(pairs.topics)
    assert len(parts[0].topics) == pytest.approx(0.6 * len(pairs.topics), abs=1)


@pytest.mark.parametrize("shares", [(), (0.0,), (1.0,), (0.7, 0.3), (-0.5,)])
def test_shares_that_leave_nothing_are_refused(pairs, shares):
    with pytest.raises(ValueError, match=r"shares: .* came; positive numbers with a sum below 1 are wanted, say 0\.7"):
        pairs.split(*shares)


def test_too_few_topics_are_refused():
    with pytest.raises(ValueError, match=r"shares: 2 topics cannot be split at .*Give more topics"):
        product(2, 3, 1).split(0.1)


def test_a_split_that_leaves_a_part_no_pair_is_refused_with_the_reason():
    # Each topic comes with one persona only, so that keeping both apart can leave a part with none.
    lame = ContrastPairs("lame", tuple(Pair(f"p{i % 2}", f"n{i % 2}", f"t{i}") for i in range(3)))
    refused = 0
    for seed in range(20):
        try:
            lame.split(0.5, seed=seed)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("shares: ")  # noqa: PT017
            assert "Give more" in str(error)  # noqa: PT017
    assert refused


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(0, 99))
def test_a_sample_takes_topics_evenly(n, seed):
    whole = product(5, 3, 2)
    sample = whole.sample(n, seed)
    assert len(sample) == min(n, 30)
    assert len(set(sample.pairs)) == len(sample)
    assert set(sample.pairs) <= set(whole.pairs)
    counts = Counter(dict.fromkeys(whole.topics, 0))
    counts.update(pair.user for pair in sample.pairs)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert whole.sample(n, seed) == sample


def test_a_sample_of_none_is_refused(pairs):
    with pytest.raises(ValueError, match=r"n: 0 came, a number of pairs of at least 1 is wanted"):
        pairs.sample(0)


# Through a model's chat template


def test_texts_are_aligned_and_differ_in_the_persona_only(tiny):
    pairs = ContrastPairs("rows", tuple(Pair(**row) for row in ROWS))
    texts = pairs.texts(tiny)
    assert texts.positive[0] == (
        "<|im_start|>system\nYou are glad.<|im_end|>\n<|im_start|>user\nTell me of rain.<|im_end|>\n"
        "<|im_start|>assistant\nThe rain"
    )
    for pair, positive, negative in zip(pairs.pairs, *texts, strict=True):
        assert positive.replace(pair.positive, pair.negative) == negative != positive
        assert positive.endswith(f"<|im_start|>assistant\n{pair.opener}")
