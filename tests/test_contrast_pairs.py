"""Contrast pairs: read whole, split with nothing shared, written through the template with only the persona changed."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rt_lens.data.contrast_pairs import ContrastPairs, Pair, load_pairs, pairs_from_table
from rt_lens.experiment.config import load_experiment

ROWS = [
    {"positive": "You are glad.", "negative": "You are sad.", "user": "Tell me of rain.", "prefill": "The rain"},
    {"positive": "Be merry.", "negative": "Be gloomy.", "user": "Was ist für dich „Glück“?", "prefill": ""},
]
TABLE = {"positive": ["glad", "merry"], "negative": ["sad", "gloomy"], "topics": ["rain", "tea", "cats"]}


def product(topics: int, personas: int, prefills: int) -> ContrastPairs:
    return pairs_from_table(
        "made up",
        {
            "positive": [f"p{i}" for i in range(personas)],
            "negative": [f"n{i}" for i in range(personas)],
            "topics": [f"t{i}" for i in range(topics)],
            "prefills": [f"o{i}" for i in range(prefills)],
        },
    )


def write_csv(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# Reading


def test_the_shipped_mood_is_every_combination_of_its_lists(pairs):
    prefills, personas = (
        {pair.prefill for pair in pairs.pairs},
        {(pair.positive, pair.negative) for pair in pairs.pairs},
    )
    assert pairs.name == "mood"
    assert len(pairs) == len(set(pairs.pairs)) == len(pairs.topics) * len(personas) * len(prefills) > 100
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


def test_an_prefill_may_be_left_out_or_null_and_fields_that_are_not_used_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"positive": "a", "negative": "b", "user": "c", "prefill": None, "note": 3}))
    with pytest.warns(
        UserWarning, match=r"pairs: mine\.jsonl has fields that are not used: note\. The fields used are positive"
    ):
        assert load_pairs(path).pairs == (Pair("a", "b", "c", ""),)


@pytest.mark.parametrize(
    ("name", "near"),
    [("prefil", "prefill"), ("Prefill", "prefill"), ("Group", "group"), ("negativ_user", "negative_user")],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_misspelt_field_is_refused_with_the_nearest_name(tmp_path, name, near, ending):
    path, row = tmp_path / f"mine.{ending}", {"positive": "a", "negative": "b", "user": "c", name: "d"}
    write_csv(path, [row]) if ending == "csv" else path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"pairs: mine\.{ending}, line 1 .*got '{name}'\. Did you mean '{near}'\?"):
        load_pairs(path)


def test_a_group_may_be_a_number_in_json(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join(json.dumps({"positive": "a", "negative": "b", "user": f"u{i}", "group": i // 2}) for i in (0, 1))
    )
    assert [pair.group for pair in load_pairs(path).pairs] == ["0", "0"]


@pytest.mark.usefixtures("as_a_user")
def test_an_empty_cell_of_a_table_is_refused_as_a_side():
    for side in ("negative", "prefill", "negative_user"):
        with pytest.raises(
            ValueError, match=rf"pairs: {side} at index 1 of 'mine' must be a string, got nan\. Leave out"
        ):
            ContrastPairs(
                "mine",
                (Pair("a", "b", "c"), Pair(**{"positive": "a", "negative": "b", "user": "c", side: float("nan")})),
            )


def test_a_toml_file_gives_every_combination_with_the_personas_aligned(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[pairs]\npositive=["a","b"]\nnegative=["c","d"]\ntopics=["x","y","z"]\nprefills=["", "So"]\n')
    loaded = load_pairs(path)
    assert len(loaded) == len(set(loaded.pairs)) == 2 * 3 * 2
    assert {(pair.positive, pair.negative) for pair in loaded.pairs} == {("a", "c"), ("b", "d")}
    assert loaded.topics == ["x", "y", "z"]


OLD = {"positive": "a", "negative": "b", "user": "c", "opener": "d", "negative_opener": "e"}


@pytest.mark.parametrize("ending", ["toml", "jsonl", "csv"])
def test_openers_are_read_as_prefills_with_a_hint(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    if ending == "toml":
        path.write_text('[pairs]\npositive=["a"]\nnegative=["b"]\ntopics=["c"]\nopeners=["d"]\n')
    else:
        write_csv(path, [OLD, OLD]) if ending == "csv" else path.write_text("\n".join([json.dumps(OLD)] * 2))
    with pytest.warns(UserWarning, match=r"'openers?' is now 'prefills?'; the old name still works\.") as caught:
        pairs = load_pairs(path).pairs
    assert {pair.prefill for pair in pairs} == {"d"}
    if ending != "toml":
        assert {pair.negative_prefill for pair in pairs} == {"e"}
    assert len(caught) == (1 if ending == "toml" else 2)  # once for each name, not for each row


def test_an_old_and_a_new_name_together_are_refused(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({**OLD, "prefill": "f"}))
    with (
        pytest.warns(UserWarning, match="'opener' is now"),
        pytest.raises(ValueError, match=r"pairs: mine\.jsonl, line 1 must have either 'prefill' or 'opener', got both"),
    ):
        load_pairs(tmp_path / "mine.jsonl")


@pytest.mark.parametrize("side", ["positive", "negative", "user"])
def test_a_row_without_a_side_is_refused_with_its_line_in_the_file(tmp_path, side):
    lame = {**ROWS[1], side: " "}
    (tmp_path / "mine.jsonl").write_text("\n".join(["", json.dumps(ROWS[0]), "", json.dumps(lame)]))
    write_csv(tmp_path / "mine.csv", [ROWS[0], lame])
    with pytest.raises(ValueError, match=rf"pairs: mine\.jsonl, line 4 must have the fields positive.*got no '{side}'"):
        load_pairs(tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match=rf"pairs: mine\.csv, line 3 must have the fields .*got no '{side}'"):
        load_pairs(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"positive": "a"', r"must be a JSON object, got .*Expecting"),
        ('["a", "b", "c"]', r"must be a JSON object, got '\["),
        ('{"positive": "a", "positive": "b"}', "the name 'positive' occurs twice"),
        ('{"positive": "a", "negative": "b", "user": "cut \\ud83d"}', "must be a JSON object, .*surrogates"),
        ('{"positive": 1, "negative": "b", "user": "c"}', r"must have a text as 'positive', got 1\. Put it in quotes"),
        ('{"positive": "a", "negative": "b", "user": "c", "prefill": 3}', "must have a text as 'prefill', got 3"),
        ('{"positive": "a", "negative": NaN, "user": "c"}', "must have the fields .*got no 'negative'"),
        ('{"positive": "a", "negative": null, "user": "c"}', "must have the fields .*got no 'negative'"),
    ],
)
def test_a_line_that_is_no_pair_is_refused_with_its_place(tmp_path, line, says):
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line)
    with pytest.raises(ValueError, match=rf"pairs: mine\.jsonl, line 2 .*{says}"):
        load_pairs(tmp_path / "mine.jsonl")


def test_an_unknown_behaviour_and_an_unknown_ending_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"behaviour must be .*got 'moode'\. Did you mean 'mood'\?"):
        load_pairs("moode")
    (tmp_path / "mine.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"pairs must be a \.toml, \.jsonl, \.json, \.csv or \.tsv file, got mine\.txt"
    ):
        load_pairs(tmp_path / "mine.txt")


def test_toml_that_is_none_is_refused_with_file_and_line(tmp_path):
    (tmp_path / "mine.toml").write_text('[pairs]\npositive = "a" "b"\n')
    with pytest.raises(ValueError, match=r"config must be valid TOML, got .*mine\.toml: .*line"):
        load_pairs(tmp_path / "mine.toml")


@pytest.mark.parametrize("side", ["positive", "negative", "topics"])
@pytest.mark.parametrize("wrong", [[], "one string"])
def test_a_table_without_a_list_is_refused_by_its_name(side, wrong):
    with pytest.raises(
        ValueError, match=rf"pairs: mine\.toml must have the lists positive, negative and topics, got no {side}\."
    ):
        pairs_from_table("mine", {**TABLE, side: wrong}, "mine.toml")


def test_a_table_with_one_string_for_prefills_is_refused():
    with pytest.raises(ValueError, match=r"prefills of mine\.toml must be a list, got 'So'"):
        pairs_from_table("mine", {**TABLE, "prefills": "So"}, "mine.toml")


def test_personas_that_do_not_align_are_refused():
    with pytest.raises(ValueError, match=r"as many positive as negative personas, got 2 and 1\. Align"):
        pairs_from_table("mine", {**TABLE, "negative": ["sad"]})


def test_no_pair_and_an_empty_side_are_refused():
    with pytest.raises(ValueError, match=r"pairs must hold at least one pair, got none for 'mine'"):
        ContrastPairs("mine", ())
    with pytest.raises(
        ValueError, match=r"pairs: negative at index 1 of 'mine' must be a string, got an empty one\. Fill it in"
    ):
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
def test_parts_of_a_product_share_no_topic_and_no_persona_or_prefill_where_there_are_enough(t, p, o, share, seed):
    assume(0 < round(share * t) < t)
    whole = product(t, p, o)
    train, test = whole.split(share, seed=seed)
    assert set(train.topics) | set(test.topics) == set(whole.topics)
    assert len(train.topics) == round(share * t)
    for n, key in ((t, "user"), (p, "positive"), (p, "negative"), (o, "prefill")):
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
    with pytest.raises(ValueError, match=r"shares must be positive numbers with a sum below 1, got .* split\(0\.7\)"):
        pairs.split(*shares)


def test_too_few_topics_are_refused():
    with pytest.raises(
        ValueError, match=r"shares must leave every part a topic, got .* of 2 topics\. Give more topics"
    ):
        product(2, 3, 1).split(0.1)


# Splitting rows that are no product


def shared(parts, key) -> bool:
    """Whether two parts have a filled-in value in common."""
    values = [{key(pair) for pair in part.pairs} - {""} for part in parts]
    return any(one & other for one, other in itertools.combinations(values, 2))


def rows(*pairs: Pair) -> ContrastPairs:
    return ContrastPairs("rows", pairs)


def test_a_hundred_rows_of_which_two_share_an_prefill_all_find_a_part():
    whole = rows(*(Pair("glad", "sad", f"t{i}", f"o{max(i, 1)}") for i in range(100)))  # as one reported: 9, 2 and 15
    parts = whole.split(0.4, 0.2, seed=0)
    assert [len(part) for part in parts] == [40, 20, 40]
    assert parts.left_out == 0
    assert not shared(parts, lambda pair: pair.user) and not shared(parts, lambda pair: pair.prefill)


def test_five_prefills_in_equal_numbers_are_kept_apart_and_a_persona_of_all_rows_is_not(recwarn):
    whole = rows(*(Pair("glad", "sad", f"t{i}", f"o{i % 5}") for i in range(100)))
    parts = whole.split(0.4, 0.2, seed=1)
    assert [len(part) for part in parts] == [40, 20, 40]
    assert not shared(parts, lambda pair: pair.prefill)
    assert shared(parts, lambda pair: pair.positive)
    assert not recwarn  # that one persona is everywhere is known to whoever wrote it


def test_personas_that_tie_all_topics_together_are_shared_and_that_is_told():
    draw = random.Random(0)
    whole = rows(*(Pair(f"p{p}", f"n{p}", f"t{i}") for i in range(50) for p in draw.sample(range(4), 2)))
    with pytest.warns(
        UserWarning, match=r"split: the parts of 'rows' have no topic in common, but they share positive personas"
    ):
        parts = whole.split(0.4, 0.2, seed=0)
    assert [len(part) for part in parts] == [40, 20, 40]
    assert not shared(parts, lambda pair: pair.user)


def test_a_negative_persona_of_all_rows_leaves_the_positive_ones_apart():
    parts = rows(*(Pair(f"p{i // 2}", "plain", f"t{i}", "It was") for i in range(100))).split(0.7, seed=0)
    assert [len(part) for part in parts] == [70, 30]
    assert not shared(parts, lambda pair: pair.positive)


def test_groups_and_messages_stay_together_even_where_they_overlap():
    # Messages 0 and 1 are one group, 1 stands in another group with 2, and so on: chains of four.
    whole = rows(*(Pair("a", "b", f"t{(i + 1) // 2}-{i // 6}", group=f"g{i // 2}-{i // 6}") for i in range(120)))
    parts = whole.split(0.5, 0.25, seed=3)
    assert [len(part) for part in parts] == [60, 30, 30]
    assert not shared(parts, lambda pair: pair.user) and not shared(parts, lambda pair: pair.group)


def test_unlike_groups_come_as_near_to_the_shares_as_they_can():
    sizes = [5, 4, 3, 3, 3]  # 5 + 4 against 3 + 3 + 3; the largest first alone would give 8 and 10
    whole = rows(
        *(Pair("a", "b", f"{group}-{i}", group=str(group)) for group, size in enumerate(sizes) for i in range(size))
    )
    assert {len(part) for part in whole.split(0.5, seed=0)} == {9}


def test_one_of_several_groups_that_is_too_large_takes_no_part_away():
    whole = rows(*(Pair("a", "b", f"t{i}", group="g" if i < 70 else "") for i in range(100)))
    sizes = [len(part) for part in whole.split(0.4, 0.2, seed=0)]
    assert sum(sizes) == 100 and max(sizes) == 70 and min(sizes) > 0


def test_repeated_rows_of_a_table_of_one_persona_are_shared_out_by_their_number():
    whole = rows(*(Pair("a", "b", f"t{i}") for i in range(10) for _ in range(50 if i == 0 else 5)))
    sizes = [len(part) for part in whole.split(0.5, seed=0)]
    assert sorted(sizes) == [45, 50] or sorted(sizes) == [47, 48]


def test_sides_that_say_the_same_across_rows_are_kept_apart_where_they_can_be():
    whole = rows(*(Pair("", "", f"t{i}", negative_user=f"t{i ^ 1}") for i in range(40)))  # pairs, each way round
    parts = whole.split(0.5, seed=0)
    assert [len(part) for part in parts] == [20, 20]
    assert not {pair.user for pair in parts[0].pairs} & {pair.negative_user for pair in parts[1].pairs}


def test_too_few_topics_for_the_parts_are_refused_among_rows():
    with pytest.raises(ValueError, match=r"shares must leave every part a topic, got .* of 1 topics\. Give more"):
        rows(Pair("a", "b", "t"), Pair("c", "d", "t")).split(0.5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(*[st.integers(0, 12)] * 4), min_size=8, max_size=60, unique=True),
    st.sampled_from([(0.5,), (0.4, 0.2), (0.7,), (0.25, 0.25, 0.25)]),
    st.integers(0, 9),
)
def test_no_row_is_lost_or_doubled_and_no_topic_is_in_two_parts(drawn, shares, seed):
    whole = rows(*(Pair(f"p{p}", f"n{p}", f"t{t}", f"o{o}", group=f"g{g}" if g > 9 else "") for t, p, o, g in drawn))
    try:
        parts = whole.split(*shares, seed=seed)
    except ValueError as refused:
        assert "Give more" in str(refused)  # noqa: PT017
        return
    assert all(len(part) for part in parts) and len(parts) == len(shares) + 1
    assert Counter(pair for part in parts for pair in part.pairs) == Counter(whole.pairs) or parts.left_out
    assert sum(map(len, parts)) + parts.left_out == len(whole)
    assert not shared(parts, lambda pair: pair.user) and not shared(parts, lambda pair: pair.group)
    assert whole.split(*shares, seed=seed) == parts


# Splitting products


def test_a_product_says_how_many_pairs_fall_to_no_part_and_warns_where_few_are_left(pairs):
    parts = pairs.split(0.4, 0.2, seed=0)
    assert parts.left_out == len(pairs) - sum(map(len, parts)) > 0
    with pytest.warns(
        UserWarning, match=r"split: 40 of the 80 pairs of 'made up' are left out, and a part has only 20"
    ):
        product(40, 2, 1).split(0.5)


@pytest.mark.parametrize(
    ("name", "checksums"),
    [
        ("mood", ["9da5222142d5", "6d863e72d2c1", "ae33082fecec"]),
        ("formality", ["4cc948c04b03", "d89ef7caed67", "0cfcf9bdfb4b"]),
        ("honesty", ["ffef72ab1d60", "aeb443a22c5b", "ffd2e49fe4fc"]),
        ("language", ["23cbe57ead12", "986b22b6937a", "89d6d039d9e2"]),
        ("refusal", ["a070073047ed", "81bfd3041d25", "2defa67838cb"]),
    ],
)
def test_the_parts_of_the_built_in_behaviours_are_those_that_published_numbers_rest_on(name, checksums):
    parts = load_experiment(name).pairs.split(0.4, 0.2, seed=0)
    assert [part.sha256[:12] for part in parts] == checksums


def test_a_few_rows_that_repeat_make_a_product_no_less_one():
    whole = product(10, 2, 1)
    doubled = ContrastPairs("doubled", (*whole.pairs, *whole.pairs[:2]))
    train, test = doubled.split(0.5, seed=0)
    assert not {pair.positive for pair in train.pairs} & {pair.positive for pair in test.pairs}
    assert set(whole.split(0.5, seed=0)[0].pairs) == set(train.pairs)


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
    with pytest.raises(ValueError, match=r"n must be at least 1 pair, got 0"):
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
        assert positive.endswith(f"<|im_start|>assistant\n{pair.prefill}")
