"""The figures on tuned models against their tables: the same numbers, one colour per arm, clear refusals."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from drawn import HOSTILE, check_drawn_as_it_is

from rt_lens.plots import tuned, tuned_steered
from rt_lens.plots.style import ARM_COLOURS, SPARE_COLOURS, arm_colours
from rt_lens.plots.tuned import block_search, kinds, variants
from rt_lens.plots.tuned_steered import effect_against_side_effect, resistance

VARIANTS = ("untuned", "steered", "token only", "cosine only", "both shared", "both separate", "KL-regularised", "LoRA")
SIGNS = {"suppress": -0.2, "toward": 1.0, "away": -1.0}
SCORES = {
    "untuned": (0.31, 0.11),
    "toward_tuned": (0.7, 0.03),
    "away_tuned": (-0.35, 0.05),
    "suppress_tuned": (0.2, 0.02),
}
MULTIPLIERS = (-4, -2, 0, 2, 4)
KINDS = ("stories", "instructions", "customer letters")
ARMS = ("rep_tuned", "steered", "KL-regularised")


def variant_rows() -> list[dict]:
    rows = []
    for direction, sign in SIGNS.items():
        for place, variant in enumerate(VARIANTS):
            mean, perplexity, kl = 0.31 + 0.07 * sign * place, 21.4 + place, 0.04 * place
            row = {"direction": direction, "variant": variant, "n": 216, "seeds": [0, 1]}
            for name, value, spread in (("", mean, 0.07), ("perplexity", perplexity, 1.1), ("kl", kl, 0.02)):
                ends = (f"{name}_low", f"{name}_high") if name else ("low", "high")
                row |= {name or "mean": value, ends[0]: value - spread, ends[1]: value + 1.2 * spread}
            rows.append(row)
    return rows


def resistance_rows() -> list[dict]:
    rows = []
    for arm, (start, slope) in SCORES.items():
        for multiplier in MULTIPLIERS:
            mean = start + slope * multiplier
            ends = {"low": mean - 0.09, "high": mean + 0.08}
            rows.append({"arm": arm, "multiplier": multiplier, "n": 72, "mean": mean, "seed": 0} | ends)
    return rows


def moved_rows() -> list[dict]:
    return [
        {"arm": arm, "multiplier": 4, "n": 72, "mean": 8 * slope, "low": 8 * slope - 0.1, "high": 8 * slope + 0.12}
        for arm, (_, slope) in SCORES.items()
    ]


def search_rows() -> list[dict]:
    rows = []
    for place, (cosine, token) in enumerate((("v o", "gate up down"), ("q k", "v o"), ("", "down"), ("down", "q"))):
        mean = (0.2, 0.4, 0.1, 0.3)[place]
        row = {"cosine": cosine, "token": token, "n": 48, "mean": mean, "low": mean - 0.1, "high": mean + 0.15}
        losses = {"total_loss": 5.0 + place, "token_loss": 2.2 - 0.1 * place, "cosine_loss": 0.2 + 0.02 * place}
        rows.append(row | losses | {"seed": 3})
    return rows


def side_effect_rows() -> list[dict]:
    rows = []
    for arm, slope, cost in (("kl_then_steer", 0.1, 0.008), ("steered", 0.12, 0.03)):
        for multiplier in MULTIPLIERS:
            row = {"arm": arm, "multiplier": multiplier, "n": 72, "n_side_effect": 30, "seed": 0}
            for name, value, spread in (
                ("effect", 0.2 + slope * multiplier, 0.08),
                ("side_effect", cost * multiplier**2, 0.01),
            ):
                row |= {name: value, f"{name}_low": value - spread, f"{name}_high": value + 2 * spread}
            rows.append(row)
    return rows


def kind_rows() -> list[dict]:
    rows = []
    for strength, kind in enumerate(KINDS, start=1):
        for place, arm in enumerate(ARMS, start=1):
            for direction in ("away", "toward"):
                mean = SIGNS[direction] * strength * place / 20
                row = {"kind": kind, "arm": arm, "direction": direction, "n": 40, "seeds": [0, 1]}
                rows.append(row | {"mean": mean, "low": mean - 0.1, "high": mean + 0.08})
    return rows


FIGURES = {
    "variants": lambda: variants(variant_rows()),
    "resistance": lambda: resistance(resistance_rows(), moved_rows()),
    "resistance alone": lambda: resistance(resistance_rows()),
    "block_search": lambda: block_search(search_rows()),
    "effect_against_side_effect": lambda: effect_against_side_effect(side_effect_rows()),
    "kinds": lambda: kinds(kind_rows()),
}
TABLES = {
    "variants": (variant_rows, variants, "table"),
    "resistance": (resistance_rows, resistance, "table"),
    "moved": (moved_rows, lambda rows: resistance(resistance_rows(), rows), "moved"),
    "block_search": (search_rows, block_search, "table"),
    "effect_against_side_effect": (side_effect_rows, effect_against_side_effect, "table"),
    "kinds": (kind_rows, kinds, "table"),
}


def reading(figure: go.Figure) -> str:
    return figure.layout.title.subtitle.text.replace("<br>", " ")


def floats(values) -> list[float]:
    return [float(value) for value in values]


def same(drawn, wanted) -> None:
    np.testing.assert_allclose(floats(drawn), floats(wanted), atol=1e-9)


def compare(trace: go.Scatter, rows: pd.DataFrame, name: str, *, low: str, high: str, axis: str = "x") -> None:
    """The trace's points and whiskers are the rows' name, low and high."""
    bars, points = trace[f"error_{axis}"], np.array(floats(trace[axis]))
    same(points, rows[name])
    same(points - floats(bars.arrayminus), rows[low])
    same(points + floats(bars.array), rows[high])


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_only_returned(name, only_returned):
    figure = FIGURES[name]()
    assert figure.layout.title.text and "n = " in reading(figure) and "eed" in reading(figure)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_not_changed_and_a_list_draws_the_same(name):
    rows, draw, _ = TABLES[name]
    frame = pd.DataFrame(rows())
    before = frame.copy(deep=True)
    assert draw(frame).to_json() == draw(rows()).to_json()
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_missing_empty_or_double_is_named(name):
    rows, draw, argument = TABLES[name]
    for column in rows()[0]:
        if (name, column) == ("block_search", "seed"):
            continue
        with pytest.raises(ValueError, match=rf"{argument} must have the columns .* Add {column}\."):
            draw([{key: value for key, value in row.items() if key != column} for row in rows()])
    with pytest.raises(ValueError, match=f"{argument} must have at least one row, got none"):
        draw([])
    with pytest.raises(ValueError, match=f"{argument} must have one row for each .*, got .* more than once"):
        draw([*rows(), rows()[0]])


@pytest.mark.parametrize("name", TABLES)
def test_a_word_among_numbers_is_named(name):
    rows, draw, argument = TABLES[name]
    with pytest.raises(ValueError, match=rf"{argument} must hold numbers in the column n, got"):
        draw([rows()[0] | {"n": "many"}, *rows()[1:]])


@pytest.mark.parametrize("room", [tuned, tuned_steered])
def test_the_examples_run(room):
    tried = doctest.testmod(room)
    assert tried.attempted > 3 and not tried.failed


def test_variants_draws_scores_and_costs_with_their_whiskers():
    figure, frame = variants(variant_rows()), pd.DataFrame(variant_rows())
    assert [note.text for note in figure.layout.annotations] == [
        f"direction: {d}" for d in ("toward", "away", "suppress")
    ]
    columns = [("mean", "low", "high")] + [(name, f"{name}_low", f"{name}_high") for name in ("perplexity", "kl")]
    traces = iter(figure.data)
    for direction in ("toward", "away", "suppress"):
        rows = frame[frame["direction"] == direction]
        for name, low, high in columns:
            trace = next(traces)
            assert tuple(trace.y) == VARIANTS
            compare(trace, rows, name, low=low, high=high)
            assert trace.marker.color[:2] == (ARM_COLOURS["untuned"], ARM_COLOURS["steered"])
            assert "n = 216, seeds 0, 1" in trace.hovertext[3]
    assert next(traces, None) is None
    assert "LoRA, toward<br>score 0.800 [0.730, 0.884]" in figure.data[0].hovertext[-1]
    assert figure.layout.yaxis.autorange == "reversed", "the first variant is at the top"
    assert "n = 216; seeds 0, 1." in reading(figure)


def test_variants_marks_the_untuned_values():
    shapes = variants(variant_rows()).layout.shapes
    assert [shape.x0 for shape in shapes] == pytest.approx([0.31, 21.4, 0.0] * 3)
    # KL against itself is 0, measured or not; an unknown perplexity has no line.
    bare = {"kl": None, "kl_low": None, "kl_high": None, "perplexity": None}
    rows = [row | (bare if row["variant"] == "untuned" else {}) for row in variant_rows()]
    assert [shape.x0 for shape in variants(rows).layout.shapes] == pytest.approx([0.31, 0.0] * 3)


def test_variants_lets_one_untuned_row_serve_every_direction():
    (untuned, *_), tuned_rows = variant_rows(), [row for row in variant_rows() if row["variant"] != "untuned"]
    figure = variants([untuned | {"direction": "none"}, *tuned_rows])
    assert len(figure.data) == 9 and all(trace.y[0] == "untuned" for trace in figure.data)
    assert [shape.x0 for shape in figure.layout.shapes] == pytest.approx([0.31, 21.4, 0.0] * 3)
    with pytest.raises(ValueError, match="must have a row of the variant 'untuned', got steered, "):
        variants(tuned_rows)


def test_variants_puts_a_ruined_perplexity_on_a_log_axis():
    rows = variant_rows()
    assert variants(rows).layout.xaxis2.type is None
    ruined = variants([*rows[:3], rows[3] | {"perplexity": 900.0}, *rows[4:]])
    assert ruined.layout.xaxis2.type == "log" and ruined.layout.xaxis.type is None
    assert "log scale" in ruined.layout.xaxis8.title.text and 900.0 in floats(ruined.data[7].x)


def test_variants_leaves_out_what_was_not_measured():
    rows = variant_rows()
    rows[2] |= {"kl": None, "kl_low": None, "kl_high": None}
    kl = variants(rows).data[8]
    assert [np.isnan(value) for value in floats(kl.x)] == [place == 2 for place in range(len(VARIANTS))]
    assert "KL – nats" in kl.hovertext[2]


def test_resistance_draws_scores_in_a_scale_centred_on_zero():
    figure = resistance(resistance_rows())
    (heat,) = figure.data
    frame = pd.DataFrame(resistance_rows())
    wanted = frame.pivot(index="arm", columns="multiplier", values="mean").loc[list(SCORES)]
    np.testing.assert_allclose(np.asarray(heat.z), wanted)
    assert list(heat.y) == list(SCORES) and figure.layout.yaxis.autorange == "reversed"
    assert list(figure.layout.xaxis.ticktext) == ["−4", "−2", "0", "2", "4"]
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == pytest.approx(0.82)
    assert heat.text[0][0] == "−0.13" and heat.text[1][4] == "0.82"
    assert heat.hovertext[2][1] == "away_tuned, multiplier -2<br>score -0.450 [-0.540, -0.370]<br>n = 72"
    assert "n = 72; seed 0." in reading(figure) and "Right" not in reading(figure)


def test_resistance_draws_how_far_steering_moves_each_arm():
    figure = resistance(resistance_rows(), moved_rows()[::-1])
    dots = figure.data[1:]
    assert [dot.y[0] for dot in dots] == list(SCORES)
    for dot, row in zip(dots, moved_rows(), strict=True):
        compare(dot, pd.DataFrame([row]), "mean", low="low", high="high")
        assert dot.marker.color == dot.error_x.color == ARM_COLOURS[row["arm"]] and "n = 72" in dot.hovertext
    assert "score at +4 minus at −4" in figure.layout.xaxis2.title.text
    assert [shape.x0 for shape in figure.layout.shapes] == [0] and "nearer to 0" in reading(figure)
    assert figure.layout.yaxis2.matches == "y", "both panels have the same rows"


def test_resistance_names_no_single_dose_where_arms_have_their_own():
    moved = moved_rows()
    moved[1]["multiplier"] = 2
    figure = resistance(resistance_rows(), moved)
    assert "score at +m minus at −m" in figure.layout.xaxis2.title.text
    assert "multiplier 2 against −2" in figure.data[2].hovertext


def test_resistance_refuses_a_moved_arm_that_the_table_lacks():
    with pytest.raises(ValueError, match=r"moved must be of arms in the table \(untuned, toward_tuned.*got ablated"):
        resistance(resistance_rows(), [*moved_rows(), moved_rows()[0] | {"arm": "ablated"}])


def test_resistance_leaves_a_hole_where_nothing_was_measured():
    rows = resistance_rows()
    figure = resistance([*rows[:7], *rows[8:]])
    assert np.argwhere(np.isnan(np.asarray(figure.data[0].z))).tolist() == [[1, 2]]
    assert figure.data[0].text[1][2] == "" and "Grey: not measured" in reading(figure)
    assert "Grey" not in reading(resistance(rows))


def test_block_search_sorts_by_effect_and_draws_the_losses():
    figure = block_search(search_rows())
    frame = pd.DataFrame(search_rows()).sort_values("mean", ascending=False)
    effect, *losses = figure.data
    compare(effect, frame, "mean", low="low", high="high")
    assert list(effect.y)[:2] == ["cosine: q k | token: v o", "cosine: down | token: q"]
    assert effect.y[-1] == "cosine: none | token: down" and figure.layout.yaxis.autorange == "reversed"
    assert [trace.name for trace in losses] == ["total_loss", "token_loss", "cosine_loss"]
    for trace in losses:
        assert trace.y == effect.y
        same(trace.x, frame[trace.name])
    assert "effect 0.400 [0.300, 0.550], n = 48" in effect.hovertext[0]
    assert "n = 48; seed 3." in reading(figure) and [shape.x0 for shape in figure.layout.shapes] == [0]


def test_block_search_takes_weights_of_the_kl_and_perplexities():
    rows = [row | {"kl": "q k", "perplexity": 20.0 + place} for place, row in enumerate(search_rows())]
    figure = block_search([*rows, rows[0] | {"kl": None, "perplexity": None}])
    labels = figure.data[0].y
    assert "cosine: v o | token: gate up down | kl: q k" in labels
    assert "cosine: v o | token: gate up down | kl: none" in labels
    assert figure.data[-1].name == "perplexity"
    assert sorted(floats(figure.data[-1].x))[:4] == [20.0, 21.0, 22.0, 23.0]
    assert len(block_search([row | {"perplexity": None} for row in rows]).data) == 4


def test_block_search_without_effects_sorts_by_the_total_loss():
    nothing = {"n": None, "mean": None, "low": None, "high": None}
    rows = [row | nothing for row in search_rows()][::-1]
    figure = block_search(rows)
    assert [trace.name for trace in figure.data] == ["total_loss", "token_loss", "cosine_loss"]
    assert floats(figure.data[0].x) == [5.0, 6.0, 7.0, 8.0]
    assert "No effect was measured" in reading(figure) and not figure.layout.shapes
    unused = [row | {"cosine_loss": None} for row in rows]
    assert [trace.name for trace in block_search(unused).data] == ["total_loss", "token_loss"]
    with pytest.raises(ValueError, match="table must hold a number .*, got only empty values"):
        block_search([row | {"total_loss": None, "token_loss": None, "cosine_loss": None} for row in rows])


def test_block_search_puts_the_unmeasured_last():
    rows = search_rows()
    rows[1] |= {"mean": None, "low": None, "high": None}
    assert block_search(rows).data[0].y[-1] == "cosine: q k | token: v o"


def test_effect_against_side_effect_draws_each_arm_through_its_multipliers():
    figure = effect_against_side_effect(side_effect_rows()[::-1], effect="joy", side_effect="KL (nats)")
    frame = pd.DataFrame(side_effect_rows())
    assert [trace.name for trace in figure.data] == ["steered", "kl_then_steer"]
    for trace in figure.data:
        own = frame[frame["arm"] == trace.name]
        assert list(trace.text) == ["−4", "−2", "0", "2", "4"]
        compare(trace, own, "effect", low="effect_low", high="effect_high")
        compare(trace, own, "side_effect", low="side_effect_low", high="side_effect_high", axis="y")
        assert trace.line.color == ARM_COLOURS[trace.name]
    hover = figure.data[0].hovertext[0]
    assert "joy -0.280 [-0.360, -0.120], n = 72" in hover and "KL (nats) 0.480 [0.470, 0.500], n = 30" in hover
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("joy", "KL (nats)")
    assert "At the same effect, the lower line has the smaller side effect." in reading(figure)
    assert "Effect: n = 72. Side effect: n = 30. Seed 0." in reading(figure)


def test_effect_against_side_effect_keeps_all_whiskers_in_view_and_labels_off_the_lines():
    figure = effect_against_side_effect(side_effect_rows())
    low, high = figure.layout.yaxis.range
    assert low < -0.01 and high > 0.5
    upper, lower = figure.data
    assert (upper.textposition[0], upper.textposition[-1]) == ("top right", "top left")
    assert (lower.textposition[0], lower.textposition[-1]) == ("bottom left", "bottom right")
    mirrored = effect_against_side_effect([row | {"effect": -row["effect"]} for row in side_effect_rows()])
    assert mirrored.data[0].textposition[0] == "top left"


def test_effect_against_side_effect_leaves_a_gap_where_nothing_was_measured():
    rows = side_effect_rows()
    rows[1] |= {"side_effect": None, "side_effect_low": None, "side_effect_high": None}
    line = effect_against_side_effect(rows).data[1]
    assert [np.isnan(value) for value in floats(line.y)] == [False, True, False, False, False]
    assert not line.connectgaps and "KL on neutral prompts (nats) –, n" in line.hovertext[1]


def test_kinds_draws_every_change_beside_its_kind():
    figure, drawn = kinds(kind_rows()), 0
    frame = pd.DataFrame(kind_rows())
    assert list(figure.layout.yaxis.ticktext) == list(KINDS) and figure.layout.yaxis.range == (2.5, -0.5)
    for trace in figure.data:
        if trace.x[0] is None:
            continue
        direction = {"x": "toward", "x2": "away"}[trace.xaxis]
        own = frame[(frame["arm"] == trace.name) & (frame["direction"] == direction)]
        compare(trace, own, "mean", low="low", high="high")
        assert [round(place) for place in floats(trace.y)] == [0, 1, 2]
        assert trace.marker.color == trace.error_x.color == arm_colours(ARMS)[trace.name]
        assert "n = 40, seeds 0, 1" in trace.hovertext[0]
        drawn += len(trace.x)
    assert drawn == len(frame)
    places = [place for trace in figure.data if trace.xaxis == "x" and trace.y[0] is not None for place in trace.y]
    assert len(set(places)) == 9, "arms of a kind do not cover each other"
    assert figure.layout.xaxis.matches == figure.layout.xaxis2.matches == "x", "directions have one scale"
    assert sum(shape.x0 == 0 == shape.x1 for shape in figure.layout.shapes) == 2
    assert [trace.name for trace in figure.data if trace.x[0] is None] == ["steered", "rep_tuned", "KL-regularised"]
    assert "n = 40; seeds 0, 1." in reading(figure)


def test_kinds_takes_an_arm_that_was_not_measured_everywhere():
    rows = [row for row in kind_rows() if (row["kind"], row["arm"]) != ("stories", "steered")]
    rows[0] |= {"mean": None, "low": None, "high": None}
    traces = [
        trace for trace in kinds(rows).data if trace.name == "steered" and len(trace.x) and trace.x[0] is not None
    ]
    assert [[round(place) for place in trace.y] for trace in traces] == [[1, 2], [1, 2]]


def test_no_stranger_gets_the_colour_of_an_arm_beside_it():
    names = ["steered", "away_tuned", "ablated", "kl_then_steer", "LoRA", "suppress_tuned"]
    colours = arm_colours(names)
    assert len({colours[name] for name in names}) == len(names)
    assert [arm_colours(["untuned", "ablated"])["ablated"], colours["steered"]] == [SPARE_COLOURS[0], "#E69F00"]
    assert len(set(ARM_COLOURS.values())) == len(ARM_COLOURS)


def test_the_old_names_of_columns_and_arms_still_work():
    new = side_effect_rows()
    old = [{key.replace("side_effect", "damage"): value for key, value in row.items()} for row in new]
    with pytest.warns(
        UserWarning, match="'n_damage, damage, .*' is now 'n_side_effect, side_effect, .*'; the old name still works"
    ):
        drawn = effect_against_side_effect(old)
    assert drawn.to_json() == effect_against_side_effect(new).to_json()
    colours = arm_colours(["out_tuned", "ablated"])
    assert colours["out_tuned"] == ARM_COLOURS["suppress_tuned"] != colours["ablated"]


def test_strangers_still_get_colours_when_the_known_arms_took_them_all():
    colours = arm_colours([*ARM_COLOURS, *(f"arm {place}" for place in range(6))])
    assert {colours[f"arm {place}"] for place in range(6)} <= set(SPARE_COLOURS)


def test_names_that_look_like_markup_are_drawn_as_they_are():
    def hostile(rows: list[dict], **named: str) -> list[dict]:
        return [{**row, **{key: HOSTILE for key, old in named.items() if row[key] == old}} for row in rows]

    check_drawn_as_it_is(variants(hostile(variant_rows(), variant="LoRA"), title=HOSTILE))
    check_drawn_as_it_is(block_search([{**search_rows()[0], "cosine": HOSTILE, "perplexity": 1.0}]))
    check_drawn_as_it_is(kinds(hostile(kind_rows(), kind="stories", arm="steered")))
    arm = resistance_rows()[0]["arm"]
    rows, moved = hostile(resistance_rows(), arm=arm), hostile(moved_rows(), arm=arm)
    check_drawn_as_it_is(resistance(rows, moved, title=HOSTILE))
    rows = hostile(side_effect_rows(), arm=side_effect_rows()[0]["arm"])
    check_drawn_as_it_is(effect_against_side_effect(rows, effect=HOSTILE, side_effect=HOSTILE, title=HOSTILE), least=6)
