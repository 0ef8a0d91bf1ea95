"""The figures on text itself, against the tokens and numbers they draw."""

from __future__ import annotations

import itertools
import re
import unicodedata

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from drawn import HOSTILE, as_drawn, check_drawn_as_it_is
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rt_lens import plots
from rt_lens.plots import text
from rt_lens.plots.style import ARM_COLOURS

TOKENS = [
    "<|im_start|>",
    "user",
    "\n",
    "Tell",
    " me",
    "\t",
    "  ",
    " <b>",
    "<script>",
    "alert",
    " 😀",
    "日本",
    "\n\n",
    " so",
]
VALUES = np.r_[-300.0, np.linspace(-4, 6, len(TOKENS) - 1)]


def trace_rows(places: int = 6, arms=("untuned", "steered")) -> list[dict]:
    return [
        {"arm": arm, "index": place, "token": f" {arm[0]}{place}", "projection": 2.0 * index - 0.5 * place, "seed": 3}
        for place in range(places)
        for index, arm in enumerate(arms)
    ]


FIGURES = {
    "coloured": lambda: plots.coloured_tokens(TOKENS, {"untuned": VALUES, "steered": VALUES + 1}),
    "coloured, one token": lambda: plots.coloured_tokens(["Hi"], {"untuned": np.array([3.0])}),
    "trace": lambda: plots.trace(trace_rows()),
    "trace of one token": lambda: plots.trace(trace_rows(1, ("untuned",))),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_returned_and_nothing_else_happens(draw, only_returned):
    assert isinstance(draw(), go.Figure)


def test_every_token_is_coloured_by_its_own_number():
    figure = plots.coloured_tokens(TOKENS, {"untuned": VALUES, "steered": torch.from_numpy(VALUES + 1)})
    *blocks, scale = figure.data
    assert scale.marker.coloraxis == "coloraxis"
    for cells, values in zip(blocks, (VALUES, VALUES + 1), strict=True):
        np.testing.assert_array_equal(cells.customdata, values)
        lowest, highest = (re.findall(r"\d+", cells.marker.color[place]) for place in (1, -1))  # after the first token
        assert int(lowest[2]) > int(lowest[0]) and int(highest[0]) > int(highest[2]), "blue below zero, red above"
        assert [f"{value:.3f}" in said for value, said in zip(values, cells.hovertext, strict=True)] == [True] * 14
    assert figure.data[1].hovertext[4] == f"steered<br>·me, token 4<br>projection {VALUES[4] + 1:.3f} activation units"
    assert [title.text for title in figure.layout.annotations] == ["untuned", "steered"]


def test_the_scale_is_centred_and_the_first_token_does_not_set_it():
    figure = plots.coloured_tokens(TOKENS, {"untuned": VALUES, "steered": VALUES + 1})
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-7.0, 7.0)
    assert "first token exceeds the colour scale" in figure.layout.title.subtitle.text
    calm = plots.coloured_tokens(["a", "b"], {"untuned": np.array([1.0, -2.0])})
    assert calm.layout.coloraxis.cmax == 2.0
    assert "scale" not in calm.layout.title.subtitle.text


def test_the_text_is_read_in_order_without_overlap():
    tokens = [f" word{number}" for number in range(120)]
    cells = plots.coloured_tokens(tokens, {"untuned": np.ones(120)}).data[0]
    places = list(zip(cells.y, cells.base, cells.x, strict=True))
    assert places[0][:2] == (0, 0)
    for (line, start, width), (next_line, next_start, _) in itertools.pairwise(places):
        assert (next_line, next_start) in {(line, start + width), (line + 1, 0)}
    assert max(start + width for _, start, width in places) <= text.COLUMNS
    assert max(line for line, _, _ in places) == 11, "120 words of 6 to 8 letters"
    assert "".join(cells.text).replace("\u00a0", " ") == "".join(tokens)


def test_a_newline_ends_its_line():
    cells = plots.coloured_tokens(["a", "\n", "b", "c\n", "\n", "d"], {"untuned": np.ones(6)}).data[0]
    assert list(cells.y) == [0, 0, 1, 1, 2, 3]
    assert list(cells.text) == ["a", "⏎", "b", "c⏎", "⏎", "d"]


def test_whitespace_is_marked_only_where_it_would_be_invisible():
    cells = plots.coloured_tokens([" me", "\t", "  ", "", "a\tb"], {"untuned": np.ones(5)}).data[0]
    assert list(cells.text) == ["\u00a0me", "⇥", "··", "∅", "a⇥b"]


def test_what_looks_like_markup_is_drawn_and_measured_as_it_is():
    cells = plots.coloured_tokens(TOKENS, {"untuned": VALUES}).data[0]
    assert TOKENS[8] == "<script>" and cells.text[8] == "&lt;script&gt;"
    assert cells.x[8] == len("<script>")
    check_drawn_as_it_is(plots.coloured_tokens([HOSTILE], {HOSTILE: np.ones(1)}, title=HOSTILE), least=3)
    rows = [{"arm": HOSTILE, "index": 0, "token": HOSTILE, "projection": 1.0}]
    check_drawn_as_it_is(plots.trace(rows, title=HOSTILE), least=4)
    (cut,) = plots.trace(rows).layout.xaxis.ticktext
    assert as_drawn(cut) == HOSTILE[:8] + "…"


def test_wide_letters_take_two_columns_and_accents_none():
    assert unicodedata.normalize("NFD", "é") != "é"
    cells = plots.coloured_tokens(
        [" 😀", "日本", "e\u0301", "é"], {"untuned": np.ones(4)}
    ).data[0]  # fmt: skip
    assert list(cells.x) == [3, 4, 1, 1]


@pytest.mark.parametrize("letter", ["a", "<", "日"])
def test_a_token_longer_than_a_line_is_cut_but_not_within_an_entity(letter):
    (label,) = plots.coloured_tokens([letter * 500], {"untuned": np.ones(1)}).data[0].text
    meant = as_drawn(label)
    assert meant.endswith("…")
    assert set(meant[:-1]) == {letter}


@settings(max_examples=30)
@given(tokens=st.lists(st.text(max_size=100), min_size=1, max_size=8))
def test_any_text_fits_the_page(tokens):
    labels = [text._label(token) for token in tokens]
    starts, lines = text._wrapped_positions(tokens, labels)
    assert all(start + text._width(label) <= text.COLUMNS for start, label in zip(starts, labels, strict=True))
    assert lines == sorted(lines)
    assert len(set(zip(starts, lines, strict=True))) == len(tokens) or any(text._width(label) == 0 for label in labels)


def test_letters_stand_out_from_their_colour():
    """WCAG AA wants 4.5 of small text; where the scale's own middle tones allow no more, the better ink is taken."""
    values = np.linspace(-1, 1, 41)
    cells = plots.coloured_tokens(["x"] * 41, {"untuned": values}).data[0]
    inks = dict(zip(values.round(2), cells.textfont.color, strict=True))
    assert inks[-1.0] == inks[1.0] == "white"
    assert inks[0.0] == inks[0.4] == inks[-0.4] == "#222222"


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("tokens", "projections", "message"),
    [
        ([], {"a": np.ones(0)}, "tokens must be a list of at least one token, got none"),
        ("Hello", {"a": np.ones(5)}, "tokens must be a list .*, got one string"),
        (["a"], {}, "projections must map at least one name"),
        (["a", "b"], {"x": np.ones((3, 2))}, r"\['x'\] must have shape \(2,\), .*, got \(3, 2\).*take one row"),
        (["a", "b"], {"x": np.array([1.0, np.nan])}, r"\['x'\] must hold finite numbers, got nan at token 1"),
    ],
)
def test_coloured_tokens_refuses_what_does_not_fit(tokens, projections, message):
    with pytest.raises(ValueError, match=message):
        plots.coloured_tokens(tokens, projections)


def test_the_old_name_of_a_column_still_works():
    old = [{"place" if key == "index" else key: value for key, value in row.items()} for row in trace_rows()]
    with pytest.warns(UserWarning, match="'place' is now 'index'; the old name still works"):
        drawn = plots.trace(old)
    assert drawn.to_json() == plots.trace(trace_rows()).to_json()


def test_a_trace_shows_the_table():
    rows = trace_rows()
    figure = plots.trace(rows)
    for line in figure.data:
        own = [row for row in rows if row["arm"] == line.name]
        assert list(line.x) == [row["index"] for row in own]
        assert list(line.y) == [row["projection"] for row in own]
        assert line.line.color == ARM_COLOURS[line.name]
        axis = figure.layout[line.xaxis.replace("x", "xaxis")]
        assert list(axis.ticktext) == [row["token"].replace(" ", "·") for row in own]
        assert list(axis.tickvals) == list(line.x)
    assert figure.data[1].hovertext[2] == "steered<br>·s2, new token 2<br>projection 1.000 activation units"
    assert "12 tokens. Seed 3." in figure.layout.title.subtitle.text
    assert [note.text for note in figure.layout.annotations] == ["untuned", "steered", "new tokens, in order"]


def test_a_traces_axes_hold_still_while_tokens_arrive():
    rows = trace_rows(20)
    frames = [plots.trace(rows[:count]).layout for count in range(12, 41, 4)]
    assert {layout.xaxis.range for layout in frames} == {(-0.5, 19.5)}
    assert len({layout.yaxis.range for layout in frames}) <= 3
    assert len({layout.height for layout in frames}) == 1
    assert plots.trace(trace_rows(21)).layout.xaxis.range == (-0.5, 39.5)


@example([5e-324])
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_a_traces_axis_holds_every_value_and_zero(values):
    low, high = text._steps(np.array(values))
    assert low < 0 < high
    assert low <= min(values)
    assert max(values) <= high


def test_a_long_trace_names_what_fits():
    axis = plots.trace(trace_rows(170, ("untuned",))).layout.xaxis
    assert list(axis.tickvals) == list(range(0, 170, 3))


def test_a_trace_refuses_two_tokens_of_one_place():
    with pytest.raises(ValueError, match="got untuned, 0 more than once"):
        plots.trace(trace_rows(2) * 2)
