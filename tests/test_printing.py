"""Files of the size, the format and the text that were asked for, made by the real browser."""

from __future__ import annotations

import json
import re
import struct
import sys
from html import unescape

import plotly.graph_objects as go
import pytest
from full_disk import full_disk

import rt_lens as rtl
from rt_lens import plots

TITLE = "A title that is much too long for a column, and so comes in lines"


@pytest.fixture
def figure() -> go.Figure:
    rows = [
        {"layer": layer, "accuracy": 0.5 + layer / 50, "low": 0.4, "high": 1.0, "n": 40, "seed": 0}
        for layer in range(12)
    ]
    return plots.separability(rows, title=TITLE)


def test_a_png_has_the_width_on_paper_times_its_scale_and_a_white_ground(figure, tmp_path):
    before = figure.to_json()
    path = rtl.save_figure(figure, tmp_path / "made" / "layers.png", width_mm=127, height_mm=50.8, scale=2.0)
    content = path.read_bytes()
    assert path == tmp_path / "made" / "layers.png" and content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (960, 384), "5 by 2 inches at 96 x 2 dots"
    assert figure.to_json() == before, "the caller's figure is as it was"
    assert not [name for name in path.parent.iterdir() if name != path]


def test_a_background_with_a_meaning_is_kept(figure, tmp_path):
    figure.update_layout(plot_bgcolor="#D0D0D0", paper_bgcolor="#000000")
    layout = json.loads(rtl.save_figure(figure, tmp_path / "layers.json").read_text())["layout"]
    assert (layout["plot_bgcolor"], layout["paper_bgcolor"]) == ("#D0D0D0", "white")


def test_a_pdf_is_a_pdf_of_the_width_on_paper(figure, tmp_path):
    content = rtl.save_figure(figure, tmp_path / "layers.pdf", width_mm=127).read_bytes()
    assert content.startswith(b"%PDF-")
    (box,) = re.findall(rb"/MediaBox ?\[0 0 ([\d.]+) [\d.]+\]", content)
    assert float(box) == pytest.approx(360, abs=1), "5 inches of 72 points"


def test_an_svg_holds_the_text_in_lines_that_fit(figure, tmp_path):
    content = rtl.save_figure(figure, tmp_path / "layers.SVG", width_mm=85).read_text()
    assert "layer (block index)" in content
    lines = re.findall(r"<tspan[^>]*>([^<]*)</tspan>", content)
    (first,) = [place for place, line in enumerate(lines) if line.startswith("A title")]
    broken = [line for line in lines[first : first + 3] if line and line in TITLE]
    assert len(broken) >= 2 and TITLE.startswith(" ".join(broken))
    assert max(map(len, broken)) * 0.5 * 19 < 85 / 25.4 * 96 / 0.8


def test_html_and_json_need_no_browser(figure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    page = rtl.save_figure(figure, tmp_path / "layers.html").read_text()
    assert "plotly.js v" in page and '<script src="http' not in page
    stored = json.loads(rtl.save_figure(figure, tmp_path / "layers.json").read_text())
    assert stored["layout"]["paper_bgcolor"] == "white"
    assert stored["data"] == json.loads(figure.to_json())["data"]


def test_without_kaleido_the_mend_is_named(figure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ImportError, match=r"pip install 'rt_lens\[print\]', or write \.html"):
        rtl.save_figure(figure, tmp_path / "layers.png")
    assert not list(tmp_path.iterdir())


def test_without_a_browser_the_mend_is_named(figure, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no_browser"))
    with pytest.raises(FileNotFoundError, match=r"needs Chromium or Chrome.*no_browser.*set BROWSER_PATH"):
        rtl.save_figure(figure, tmp_path / "layers.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["layers.gif", "layers", "layers.png.txt"])
def test_another_ending_is_refused(figure, tmp_path, name):
    with pytest.raises(ValueError, match=rf"path must end in \.png, \.svg, \.pdf, \.html or \.json, got '{name}'"):
        rtl.save_figure(figure, tmp_path / name)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ({"width_mm": 5.0}, "width_mm must be at least 50 mm.*, got 5"),
        ({"width_mm": float("nan")}, "width_mm must be at least 50 mm.*, got nan"),
        ({"height_mm": -3.0}, "height_mm must be at least 50 mm.*, got -3"),
        ({"scale": float("nan")}, "scale must be a positive number, got nan"),
        ({"scale": 0.0}, "scale must be a positive number, got 0"),
    ],
)
def test_a_size_without_room_is_refused(figure, tmp_path, size, wanted):
    for name in ("layers.json", "layers.png"):
        with pytest.raises(ValueError, match=wanted):
            rtl.save_figure(figure, tmp_path / name, **size)
    assert not list(tmp_path.iterdir())


def test_lines_part_no_tag_count_what_is_seen_and_hold_a_word_at_least(tmp_path):
    title = 'Score of <b>every</b> arm, <span style="color:red">every other</span> set of 5 &lt; 6 questions'
    large = {"text": "So large that no letter fits", "font_size": 400}
    figure = go.Figure(layout={"title": {"text": title, "font_size": 19, "subtitle": large}})
    content = rtl.save_figure(figure, tmp_path / "tags.svg", width_mm=60).read_text()
    shown = unescape(re.sub(r"<[^>]*>", "", re.sub(r'<tspan class="line"[^>]*>', "|", content)))
    assert "|Score of every arm, every|other set of 5 < 6|questions|So|large|that|no|letter|fits" in shown
    assert "color:red" not in shown, "no markup is read as text"


def test_a_full_disk_keeps_the_old_file(figure, tmp_path):
    path = rtl.save_figure(figure, tmp_path / "layers.html")
    old = path.read_bytes()
    with full_disk(100_000), pytest.raises(OSError, match=r"."):
        rtl.save_figure(figure, path)
    assert path.read_bytes() == old
    assert [name.name for name in tmp_path.iterdir()] == ["layers.html"]
