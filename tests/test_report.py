"""The page says what the files say, opens offline, and no text in it can do anything."""

from __future__ import annotations

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from full_disk import full_disk

from rt_lens.apps.report.labels import side_effect_of
from rt_lens.apps.report.page import write_report
from rt_lens.apps.report.reproducibility import repeat
from rt_lens.apps.report.sections import sections
from rt_lens.apps.report.sentences import headline, summary_sentences
from rt_lens.apps.report.uncertainty import uncertainty_sentences
from rt_lens.results.schema import checked

HOSTILE = ("<script>alert(1)</script>", "</script>", "<b>", '"><img src=x onerror=alert(2)>', "]]><!--")
_MEANS = {
    ("untuned", "none"): (0.31, 21.4, 0.0, 0.93),
    ("steered", "toward"): (0.62, 22.6, 0.19, 0.90),
    ("steered", "away"): (-0.08, 23.1, 0.24, 0.88),
    ("token_tuned", "toward"): (0.48, 21.6, 0.03, 0.93),
    ("token_tuned", "away"): (0.12, 21.7, 0.04, 0.92),
    ("rep_tuned", "toward"): (0.71, 21.8, 0.07, 0.92),
    ("rep_tuned", "away"): (-0.27, 21.9, 0.08, 0.91),
}


def make_results() -> dict[str, Any]:
    """Made-up numbers of a believable run on three seeds and two sets of prompts, as older versions wrote them."""
    names = ("mean", "perplexity", "kl", "facts")
    summary: list[dict[str, Any]] = [
        {
            "arm": arm,
            "direction": direction,
            "set": prompts,
            "scorer": "vader",
            "n": 216,
            "seeds": [0, 1, 2],
            **dict(zip(names, (measures[0] * scale, *measures[1:]), strict=True)),
            "low": measures[0] * scale - 0.06,
            "high": measures[0] * scale + 0.06,
            "perplexity_low": measures[1] - 0.4,
            "perplexity_high": measures[1] + 0.4,
            "facts_low": measures[3] - 0.05,
            "facts_high": measures[3] + 0.03,
            "repetition": 0.1,
            "n_texts": 18,
            "n_facts": 25,
        }
        for prompts, scale in (("test", 1.0), ("unlike", 0.8))
        for (arm, direction), measures in _MEANS.items()
    ]
    pooled = ("seeds", "perplexity_low", "perplexity_high", "facts_low", "facts_high")
    arms = [
        {**{key: value for key, value in row.items() if key not in pooled}, "n": 72, "seed": seed}
        for row in summary
        for seed in row["seeds"]
    ]
    comparisons = [
        {
            "direction": direction,
            "a": "rep_tuned",
            "b": b,
            "n": 216,
            "difference": sign * size,
            "p": p,
            "low": sign * size - 0.05,
            "high": sign * size + 0.05,
            "test": "paired permutation",
            "seeds": [0, 1, 2],
        }
        for direction, sign in (("toward", 1), ("away", -1))
        for b, size, p in (("steered", 0.09, 0.012), ("token_tuned", 0.23, 0.0002))
    ]
    dose = [
        {
            "layer": layer,
            "multiplier": multiplier,
            "n": 72,
            "mean": 0.31 + 0.005 * layer * multiplier,
            "low": 0.22 + 0.005 * layer * multiplier,
            "high": 0.4 + 0.005 * layer * multiplier,
            "perplexity": 21.4 + 0.02 * layer * multiplier**2,
            "admissible": 0.02 * layer * multiplier**2 < 2.14,
        }
        for layer in (12, 18, 24)
        for multiplier in (-4.0, -2.0, 0.0, 2.0, 4.0)
    ]
    history = [
        {
            "arm": arm,
            "direction": direction,
            "seed": seed,
            "step": step,
            "split": split,
            "kl": 0.02 + step / 1e4,
            "total": 2.5 - step / 150,
            "token": 2.0 - step / 200,
            "cosine": 0.5 if arm == "rep_tuned" else None,
        }
        for arm in ("token_tuned", "rep_tuned")
        for direction in ("toward", "away")
        for seed in (0, 1)
        for step in range(0, 200, 20)
        for split in ("train", "validation")
    ]
    return {
        "schema": 1,
        "behaviour": "mood",
        "description": "Does the answer sound cheerful or gloomy?",
        "model": "SmolLM2-135M-Instruct",
        "versions": {"torch": "2.13.0", "transformer_lens": "3.1.0", "rt_lens": "1.0.0"},
        "seed": 0,
        "choices": {
            "toward": {"layer": 18, "multiplier": 2.0, "why": "Largest score within the bound."},
            "away": {"layer": 18, "multiplier": -2.0, "why": "Smallest score within the bound."},
            "rule": "Among doses whose perplexity stays within 1.1 times the untuned, the largest shift of the score.",
        },
        "arms": arms,
        "summary": summary,
        "comparisons": comparisons,
        "separability": [
            {"layer": i, "accuracy": 0.55 + 0.014 * i, "low": 0.5 + 0.014 * i, "high": 0.59 + 0.014 * i, "n": 432}
            for i in range(30)
        ],
        "dose_response": dose,
        "bound": 1.1,
        "history": history,
        "logit_lens": [
            {"layer": layer, "sign": sign, "tokens": words}
            for layer in (12, 18, 24)
            for sign, words in (("+v", [" joy", " bright", *HOSTILE]), ("-v", [" grim", "\n", " sad"]))
        ],
        "seconds": {"extract": 31.2, "tune": 640.5, "evaluate": 202.0},
    }


SETS = ("same categories", "held-out categories", "misconceptions", "role-plays", "true or false", "situations")
SCORERS = ("likelihood_accuracy", "likelihood_share")


def make_honesty() -> dict[str, Any]:
    """The same as it is written now: six sets with two scorers each, side effects, a protocol, Holm's p."""
    old = make_results()
    calm = {"perplexity": None, "facts": None, "n_facts": None, "perplexity_low": None, "facts_low": None}
    summary, arms = (
        [
            {**row, **calm, "set": name, "scorer": scorer}
            | {key: round(row[key] + place / 100, 3) + 0.0 for key in ("mean", "low", "high")}
            for place, (name, scorer) in enumerate((name, scorer) for name in SETS for scorer in SCORERS)
            for row in old[key]
            if row["set"] == "test"
        ]
        for key in ("summary", "arms")
    )
    wanted = ("arm", "direction", "n", "mean", "low", "high", "seeds")
    side_effects = [
        {**{key: row[key] for key in wanted}, "set": name, "scorer": scorer, "mean": 0.9}
        for name, scorer in (
            ("talk", "repetition"),
            ("talk", "loop"),
            (f"instructions {HOSTILE[0]}", "follows_instruction"),
        )
        for row in old["summary"]
        if row["set"] == "test"
    ]
    comparisons = [
        {
            **{key: row[key] for key in ("a", "b", "n", "difference", "low", "high", "p", "test", "seeds")},
            **{"a_direction": row["direction"], "b_direction": row["direction"], "set": name, "scorer": scorer},
            "p_holm": min(1.0, 30 * row["p"]),
        }
        for name in SETS
        for scorer in SCORERS
        for row in old["comparisons"]
    ]
    why = "The model judges statements: 0.51 [0.38, 0.64], chance 0.50, n = 60: not shown (seed 0). So likelihood."
    told = {"task": "judges statements", "n": 60, "mean": 0.512, "low": 0.381, "high": 0.64, "chance": 0.5, "seed": 0}
    protocol = {"name": "likelihood", "why": why, "calibration": [told, {**told, "task": "prefers right answers"}]}
    protocol |= {"settings": {"held_out": ["animals", "<b>"]}, "chance": {"misconceptions": 0.5}}
    new = {"summary": summary, "arms": arms, "side_effects": side_effects, "comparisons": comparisons}
    return {**old, **new, "behaviour": "honesty", "protocol": protocol}


def make_responses() -> list[dict]:
    prompts = [*(f"Hostile prompt {text}" for text in HOSTILE), *(f"Tell me about day {day}." for day in range(12))]
    return [
        {
            "arm": arm,
            "direction": direction,
            "seed": seed,
            "prompt": prompt,
            "score": measures[0],
            "response": f"Seed {seed} of {arm} {direction} says: {prompt}\nIt was a long day with some rain & wind.",
        }
        for (arm, direction), measures in _MEANS.items()
        for seed in (0, 1)
        for prompt in prompts
    ]


def make_projections() -> dict:
    tokens = ["<|im_start|>", "user", "\n", "Tell", " me", *HOSTILE, " me", "."]
    base = np.linspace(0.1, 4.0, 30)[:, None] * np.linspace(-0.4, 1.0, len(tokens))
    arms = {"untuned": base, "rep_tuned away": base - 1.0, "rep_tuned toward": base + 1.0}
    rows = {name: values.tolist() for name, values in arms.items()}
    return {"prompt": f"Tell me {HOSTILE[0]}", "tokens": tokens, "layers": list(range(30)), "arms": rows}


def write_run(folder, results=None):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(make_results() if results is None else results))
    (folder / "responses.jsonl").write_text("\n".join(json.dumps(row) for row in make_responses()) + "\n")
    (folder / "projections.json").write_text(json.dumps(make_projections()))
    return folder


class Page(HTMLParser):
    """What a browser's parser would see: the elements with their attributes, and the text outside scripts."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.elements and self.elements[-1][0] == "script" and self.cdata_elem else self.texts).append(
            data
        )


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def honesty(tmp_path_factory) -> Page:
    run = write_run(tmp_path_factory.mktemp("honesty"), make_honesty())
    rows = [{"set": name, **row} for name in SETS for row in make_responses()]
    (run / "responses.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_stands_alone(page, html):
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html


def test_plotly_is_inlined_once(html):
    assert html.count("plotly.js v") == 1
    assert html.count("showSendToCloud: false") == 1
    assert len(charts_of(html)) == html.count('class="plotly-graph-div"') >= 11


def test_links_lead_to_sections_and_every_figure_has_its_own_place(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "a figure is drawn into the first element of its id"
    targets = [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"]
    assert targets and set(targets) <= set(ids)


def test_hostile_text_is_inert(page, html):
    drawn = [tag for tag, _ in page.elements]
    charts = html.count('class="plotly-graph-div"')
    assert drawn.count("script") == 2 + charts, "Plotly, the page's own, and a chart's content each"
    assert "img" not in drawn
    own = html.count("<p><b>") + html.count("; <b>") + html.count("arms: <b>") + html.count("<figcaption><b>")
    assert drawn.count("b") == own, "the page's own bold words only"
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    text = "".join(page.texts)
    for hostile in HOSTILE:
        assert f"Hostile prompt {hostile}" in text, "escaped, so that the reader sees it as it was"


def charts_of(html: str) -> dict[str, Any]:
    """Place of each chart -> what is drawn there, as the page's script reads it."""
    found = re.findall(
        r'<div id="figure-([^"]+)"[^>]*></div><script type="application/json">(.*?)</script>', html, re.DOTALL
    )
    return {name: json.loads(content) for name, content in found}


def test_no_label_can_close_a_script_or_be_markup_in_a_figure(html):
    scripts = re.findall(r'<script type="application/json">(.*?)</script></figure>', html, re.DOTALL)
    assert len(scripts) == html.count('class="plotly-graph-div"')
    for script in scripts:
        assert "alert(1)</" not in script and "<script" not in script and "<!--" not in script
    named = [script for script in scripts if "alert(1)" in script]
    assert len(named) == 4, "two heat maps, the coloured text, the logit lens"
    for script in named:
        # & of the escaped label is what Plotly turns back into a plain character.
        assert "&lt;script&gt;alert(1)&lt;\\u002fscript&gt;" in script
        assert "\\u003cscript" not in script


def test_the_contents_list_every_heading_nested_and_in_order(honesty):
    links = [attributes["href"][1:] for tag, attributes in honesty.elements if tag == "a"][1:]
    sections = [attributes["id"] for tag, attributes in honesty.elements if tag == "section"]
    assert links == sections and len(links) > 40
    levels = [int(tag[1]) for tag, _ in honesty.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), "no level is skipped"


def test_the_page_can_be_used_without_mouse_or_eyes(page):
    tags = [tag for tag, _ in page.elements]
    assert {"main", "nav", "header", "h1"} <= set(tags)
    assert dict(page.elements)["html"]["lang"] == "en"
    first = next(attributes for tag, attributes in page.elements if tag == "a")
    assert first["class"] == "skip" and first["href"] == "#results"
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.elements if tag == "th")
    boxes = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert len(boxes) == tags.count("table")
    assert all(box["tabindex"] == "0" and box["role"] == "region" for box in boxes)
    names = [box["aria-label"] for box in boxes]
    assert len(names) == len(set(names))
    assert tags.count("figcaption") == tags.count("figure") >= 11


def test_the_coloured_text_holds_the_projections_of_the_chosen_layer(html):
    *drawn, _ = charts_of(html)["projection-tokens"]["data"]  # the last is the key of the colours
    arms = make_projections()["arms"]
    assert len(drawn) == len(arms)
    for trace, values in zip(drawn, arms.values(), strict=True):
        wanted = np.frombuffer(base64.b64decode(trace["customdata"]["bdata"]))
        assert wanted == pytest.approx(values[18]), "the layer that steers away"


def test_the_arms_are_joined_by_the_p_values_of_their_set(html):
    notes = [note["text"] for note in charts_of(html)["arms-0"]["layout"]["annotations"] if note.get("name") == "p"]
    assert sorted(notes) == ["p &lt; 0.001"] * 2 + ["p = 0.012"] * 2
    assert not [note for note in charts_of(html)["arms-1"]["layout"]["annotations"] if note.get("name") == "p"]


def on_page(numbers: str) -> str:
    """The numbers with a minus sign, as the page has them."""
    return numbers.replace("-", "−")


def test_the_numbers_are_those_of_the_files(page):
    text = "".join(page.texts)
    for row in make_results()["summary"]:
        assert on_page(f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]") in text
    for row in make_results()["comparisons"]:
        assert on_page(f"{row['difference']:.3f} [{row['low']:.3f}, {row['high']:.3f}]") in text
    assert "Largest score within the bound." in text and "640.5" in text


def test_responses_show_twelve_prompts_of_the_first_seed(page):
    text = "".join(page.texts)
    assert "Tell me about day 6." in text and "Tell me about day 7." not in text
    assert "Seed 0 of rep_tuned away says" in text and "Seed 1 of" not in text


def test_summary_sentences_carry_numbers_n_interval_and_seeds():
    *sentences, brackets = summary_sentences(make_results())
    assert sentences[0] == (
        "The untuned SmolLM2-135M-Instruct scores 0.31 [0.25, 0.37] "
        "(mood, test, scored by vader; n = 216, seeds 0, 1, 2)."
    )
    assert sentences[1].startswith("Scores (test, toward): steered 0.62 [0.56, 0.68]; token_tuned")
    assert sentences[1].endswith("(each n = 216, seeds 0, 1, 2).")
    assert any(
        "rep_tuned scores 0.230 [0.180, 0.280] lower than token_tuned, p < 0.001" in sentence for sentence in sentences
    )
    (priced,) = [sentence for sentence in sentences if sentence.startswith("The highest perplexity")]
    assert priced == (
        "The highest perplexity is 23.10 [22.70, 23.50] (steered, away), and 21.40 [21.00, 21.80] untuned "
        "(n = 18 texts, seeds 0, 1, 2). Multipliers were restricted to those that keep perplexity within 1.1 times "
        "the untuned model's."
    ), "a ratio would need an interval, and a verdict a test"
    assert all(re.search(r"seeds? \d", sentence) for sentence in sentences)
    assert brackets == "Brackets are 95 % confidence intervals."


def test_summary_sentences_do_without_what_was_not_measured():
    results = make_results()
    results["summary"] = [{**row, "perplexity": None, "facts": None, "kl": None} for row in results["summary"]]
    assert not any("perplexity" in sentence or "facts" in sentence for sentence in summary_sentences(results))


@pytest.mark.parametrize("key", sorted(make_results()))
def test_a_missing_key_is_named_and_nothing_is_written(key, tmp_path):
    results = make_results()
    del results[key]
    with pytest.raises(ValueError, match=rf"results\.json must have the key {key}, got"):
        write_report(write_run(tmp_path / "run", results))
    assert not list((tmp_path / "run").glob("*report*"))


@pytest.mark.parametrize(("key", "column"), [("summary", "facts"), ("arms", "seed"), ("comparisons", "p")])
def test_a_missing_column_is_named(key, column):
    results = make_results()
    del results[key][1][column]
    with pytest.raises(ValueError, match=rf"results\.json: {key} must have the key {column}, got"):
        summary_sentences(results)


def test_a_choice_without_its_reason_is_named():
    results = make_results()
    del results["choices"]["away"]["why"]
    with pytest.raises(ValueError, match="choices: away must have the key why"):
        summary_sentences(results)


def test_another_schema_and_broken_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="schema must be at most 2, got 3"):
        summary_sentences({**make_results(), "schema": 3})
    run = write_run(tmp_path / "run")
    (run / "responses.jsonl").write_text('{"arm": ')
    with pytest.raises(ValueError, match=r"responses\.jsonl must be valid JSON"):
        write_report(run)
    (run / "responses.jsonl").write_text('{"arm": "untuned"}')
    with pytest.raises(ValueError, match=r"responses\.jsonl must have the key direction, seed"):
        write_report(run)
    (run / "responses.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="run: there is no file .*responses.jsonl"):
        write_report(run)


def test_a_failure_keeps_the_old_report(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    with full_disk(100_000), pytest.raises(OSError, match=r"."):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".report*"))


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_run_without_tuning_still_has_a_page(tmp_path):
    results = {**make_results(), "history": [], "comparisons": [], "logit_lens": []}
    results["summary"] = [row for row in results["summary"] if "tuned" not in row["arm"] or row["arm"] == "untuned"]
    page = write_report(write_run(tmp_path / "run", results)).read_text(encoding="utf-8")
    assert page.count("None in this run.") == 3  # comparisons, losses, logit lens


def test_a_page_of_six_sets_has_a_heading_for_each_and_one_figure(honesty):
    text = "".join(honesty.texts)
    sections = [attributes["id"] for tag, attributes in honesty.elements if tag == "section"]
    assert sum(re.fullmatch(r"scores-by-arm-\d+", name) is not None for name in sections) == len(SETS)
    figures = [attributes.get("id", "") for _, attributes in honesty.elements]
    for kind in ("arms", "pareto"):
        assert sum(name.startswith(f"figure-{kind}-") for name in figures) == len(SETS)
    for name in SETS:
        assert f"{name} (n = 216)" in text


def test_a_page_of_six_sets_holds_every_number(honesty):
    text = "".join(honesty.texts)
    for row in make_honesty()["summary"]:
        assert on_page(f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]") in text
    for row in make_honesty()["side_effects"]:
        assert on_page(f"0.900 [{row['low']:.3f}, {row['high']:.3f}]") in text
    assert f"instructions {HOSTILE[0]}" in text
    assert text.count("0.512 [0.381, 0.640]") == 2, "the calibration"
    assert "0.360" in text and "0.012" in text, "Holm's p beside p"
    assert f"about 1 in 20 of {len(make_honesty()['comparisons'])} comparisons" in text


def test_hostile_names_of_a_new_run_are_inert(honesty):
    drawn = [tag for tag, _ in honesty.elements]
    assert drawn.count("script") == 2 + drawn.count("figure") and "img" not in drawn
    assert not [attributes for _, attributes in honesty.elements if any(name.startswith("on") for name in attributes)]


def test_the_sentences_of_a_new_run_tell_the_protocol_and_p_before_and_after_the_correction():
    results = make_honesty()
    for row in results["comparisons"]:
        if row["b"] == "steered":
            row["p"], row["p_holm"] = 0.2, 1.0
    protocol, *sentences = summary_sentences(results)
    assert protocol == results["protocol"]["why"]
    sampled = "(n = 216, seeds 0, 1, 2)."
    found = (
        "Paired differences (role-plays, toward): rep_tuned scores 0.230 [0.180, 0.280] higher than token_tuned, "
        "p < 0.001, Holm-adjusted p = 0.006"
    )
    assert f"{found} {sampled}" in sentences
    quiet = "rep_tuned minus steered 0.090 [0.040, 0.140], p = 0.200, Holm-adjusted p = 1.000"
    assert f"Paired differences (role-plays, toward), no significant difference: {quiet} {sampled}" in sentences
    assert "p-values are Holm-adjusted for all 48 comparisons of this run." in sentences
    assert not any(SCORERS[1] in line for line in sentences), "the first scorer speaks for a set"


def test_the_protocol_and_side_effects_are_told_only_where_there_are_any(html, honesty):
    told = [attributes.get("id") for _, attributes in honesty.elements]
    words = "".join(honesty.texts)
    assert "held_out = ['animals', '<b>']" in words
    assert words.count("A random choice among the options scores 0.500") == 1
    assert "protocol" in told and "side-effects" in told
    assert 'id="protocol"' not in html and 'id="side-effects"' in html
    assert "–" in "".join(honesty.texts), "perplexity was not measured"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side_effects": [{"arm": "untuned"}]}, "side_effects must have the key direction"),
        ({"protocol": {"name": "likelihood"}}, "protocol must have the key why, calibration"),
        ({"summary": "damaged"}, "summary must be a list of rows, got a str"),
        ({"arms": ["damaged"]}, "arms must be an object, got a str"),
    ],
)
def test_a_damaged_key_of_a_new_run_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        summary_sentences({**make_honesty(), **change})


AGAIN = {
    "command": "rt-lens run 'my mood.toml' --model tiny",
    "call": "run_experiment(load_experiment('my mood.toml', model='tiny'), Path('runs/again'))",
    "file": "my mood.toml",
    "toml": 'name = "mood" # <script>alert(3)</script>',
    "sha256": "ab" * 32,
    "settings": {"model": "tiny"},
}


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize(
    ("made", "told", "not_told"),
    [
        (AGAIN, [*(AGAIN[key] for key in ("command", "call", "toml", "sha256")), "Save the settings below as"], []),
        ({**AGAIN, "command": "rt-lens run mood", "file": "mood.toml"}, ["rt-lens run mood"], ["Save the settings"]),
        ({**dict.fromkeys(AGAIN), "settings": {"model": "x"}}, ["No command reproduces this run", '"model": "x"'], []),
        (None, ["The command is not recorded"], ["rt-lens run"]),
    ],
)
def test_the_page_says_how_to_repeat_the_run_as_far_as_is_known(made, told, not_told, schema):
    results = (
        make_results()
        if made is None
        else {**make_results(), "schema": schema, {1: "again", 2: "reproducibility"}[schema]: made}
    )
    text = "".join(Page(repeat(checked(results)).html).texts)
    assert all(words in text for words in told)
    assert not any(words in text for words in not_told)


def test_the_page_itself_says_how_to_repeat_the_run(page):
    assert "The command is not recorded" in "".join(page.texts)


def test_a_damaged_record_of_the_command_is_named():
    with pytest.raises(ValueError, match="reproducibility must have the key call"):
        summary_sentences({**make_results(), "again": {"command": "rt-lens run mood"}})


def test_how_sure_the_findings_are_counts_seeds_comparisons_and_prompts():
    results = make_honesty()
    for row in results["summary"]:
        if row["arm"] == "rep_tuned" and row["direction"] == "away":
            row["seeds"] = [4]
    for place, row in enumerate(results["comparisons"]):
        row["p"], row["p_holm"] = ((0.001, 0.04), (0.01, 0.4), (0.3, 1.0))[place % 3]
    sentences = uncertainty_sentences(results)
    text = "\n".join(sentences)
    assert "Tuned once, with seed 4: rep_tuned, away." in text
    assert "Tuned with seeds 0, 1 and 2: token_tuned, toward; token_tuned, away; rep_tuned, toward." in text
    assert "In this run the seed controls only the order of the batches" in text
    drawn = ["the targets", "the order of the batches"]
    told = "\n".join(uncertainty_sentences({**results, "seed_draws": drawn}))
    assert "The seed controls the targets and the order of the batches. All arms with the same seed share" in told
    assert "The run makes 48 comparisons. If no arms truly differed, about 1 in 20 p-values would fall below" in text
    assert "16 are significant; 16 more are significant only before the correction" in text
    assert "72 validation prompts" in text and "mean over 216 prompts" in text
    assert "three or more seeds for every tuned arm" in sentences[-1]


@pytest.mark.parametrize(
    ("kept", "halved", "seeded"), [([0], True, False), ([0, 1, 2], False, True), (None, True, True)]
)
def test_more_prompts_halve_the_interval_of_one_seed_only(kept, halved, seeded):
    results = make_results()
    for row in results["summary"]:
        row["seeds"] = kept or ([0] if row["arm"] == "untuned" else [0, 1, 2])
    first, *_, last = uncertainty_sentences(results)
    assert ("four times as many halve the interval of an arm with one seed" in last) == halved
    assert ("for an arm with several seeds, with other seeds" in first) == seeded


def test_a_score_without_an_interval_gets_its_reason():
    results = make_results()
    assert "no interval" not in uncertainty_sentences(results)[0]
    for row in results["summary"]:
        row["low"] = row["high"] = None
    told = uncertainty_sentences(results)[0]
    assert "has no interval, since all responses have the same score (each arm)" in told
    results["summary"][0] |= {"low": 0.1, "high": 0.2}
    assert "(each arm)" not in uncertainty_sentences(results)[0]


def test_weights_are_not_said_to_have_seen_training_topics_only():
    tuned = "\n".join(uncertainty_sentences(make_results()))
    assert "weights used" not in tuned, "the validation loss picks those that are kept"
    assert "Vectors and gradients used training topics only. Early stopping used validation topics; layer" in tuned
    steered = "\n".join(uncertainty_sentences({**make_results(), "history": []}))
    assert "Vectors used training topics only. Layer and multiplier were selected on" in steered
    assert "stopping" not in steered


def test_how_sure_the_findings_are_without_comparisons_or_corrections():
    results = make_results()
    assert any("4 of 4 comparisons have p below 0.05" in told for told in uncertainty_sentences(results))
    alone = uncertainty_sentences({**results, "comparisons": []})
    assert any("The run has no paired comparisons" in told for told in alone)


def test_why_holm_adjusted_p_can_look_too_large_is_said_once_where_there_are_several_seeds():
    results, note = make_honesty(), "degrees of freedom are limited by the number of seeds"
    for sentences in (summary_sentences, uncertainty_sentences):
        assert sum(note in sentence for sentence in sentences(results)) == 1
        assert not any(note in sentence for sentence in sentences(make_results())), "it has no Holm-adjusted p"
        one = {**results, "comparisons": [{**row, "seeds": [0]} for row in results["comparisons"]]}
        assert not any(note in sentence for sentence in sentences(one))


def test_plain_sentences_have_no_sign_that_a_terminal_cannot_print():
    told = "\n".join(summary_sentences(make_results()))
    assert "-0.27 [-0.33, -0.21]" in told and told.isascii()


def test_a_difference_that_does_not_survive_holm_is_told_apart():
    results = make_honesty()
    for row in results["comparisons"]:
        row["p"], row["p_holm"] = 0.01, 0.4
    told = [line for line in summary_sentences(results) if ", not significant after Holm correction: " in line]
    assert len(told) == 2 * len(SETS)
    assert all("Holm-adjusted p = 0.400" in line and "[" in line and "seeds 0, 1, 2" in line for line in told)


def run_of(means: dict[str, float], p: float | None = None, p_holm: float | None = None) -> dict[str, Any]:
    """A run whose arms toward score so; with p, each arm was compared with the untuned model."""
    calm = dict.fromkeys(("perplexity", "kl", "facts", "repetition", "n_texts", "n_facts"))
    about = {"set": "test", "scorer": "vader", "n": 20, "seeds": [7]}
    arms = {arm: "none" if arm == "untuned" else "toward" for arm in means}
    summary = [
        {"arm": arm, "direction": arms[arm], **about, **calm, "mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        for arm, mean in means.items()
    ]
    comparisons = [
        {**about, "a": arm, "a_direction": "toward", "b": "untuned", "b_direction": "none", "test": "paired", "p": p,
         "p_holm": p_holm, "difference": mean - means["untuned"], "low": mean - 1.0, "high": mean + 1.0}
        for arm, mean in means.items()
        if arm != "untuned" and p is not None
    ]  # fmt: skip
    return checked({**make_results(), "summary": summary, "comparisons": comparisons})


def test_the_headline_names_the_arm_with_the_largest_effect_and_what_was_tested(page):
    text = "".join(page.texts)
    claim = "Representation tuning raised the mood score most, from 0.31 [0.25, 0.37] (untuned) to 0.71 [0.65, 0.77]"
    assert f"{claim} (test; n = 216, seeds 0, 1, 2). No paired test against the untuned model was run." in text
    support = (
        "Paired differences: rep_tuned scores 0.090 [0.040, 0.140] higher than steered, p = 0.012; rep_tuned scores"
    )
    assert f"{support} 0.23" in text
    lowered = (
        "Representation tuning lowered the mood score most, from 0.31 [0.25, 0.37] (untuned) to −0.27 [−0.33, −0.21]"
    )
    assert lowered in text
    assert text.count("This is the best of 3 arms, so its effect is likely overestimated (selection bias).") == 2


def test_no_arm_is_said_to_have_an_effect_where_none_has():
    ((claim, ground),) = headline(run_of({"untuned": 0.5, "steered": 0.4, "rep_tuned": 0.45}, p=0.6, p_holm=1.0))
    nearest = "untuned 0.50 [0.40, 0.60], rep_tuned, the closest of 2, 0.45 [0.35, 0.55] (test; n = 20, seed 7)"
    assert claim == f"No arm raised the mood score: {nearest}."
    assert ground.startswith("Paired differences, no significant difference: rep_tuned minus untuned −0.050 [")
    assert "Holm-adjusted p = 1.000" in ground and "overestimated" not in ground
    ((claim, _),) = headline(run_of({"untuned": 0.5, "rep_tuned": 0.5}))
    assert claim.startswith("No arm raised the mood score: untuned 0.50 [0.40, 0.60], rep_tuned 0.50 ["), (
        "an equal score is no rise"
    )


@pytest.mark.parametrize(
    ("p", "p_holm", "verdict", "ground"),
    [
        (0.001, 0.002, "", "Paired differences: rep_tuned scores 0.300 ["),
        (0.001, None, "", "Paired differences: rep_tuned scores 0.300 ["),
        (
            0.01,
            0.2,
            " The difference is not significant after Holm correction.",
            "Paired differences, not significant after Holm correction: rep_tuned scores 0.300 [",
        ),
        (
            0.3,
            0.6,
            " The paired test shows no significant difference.",
            "Paired differences, no significant difference: rep_tuned minus untuned 0.300 [",
        ),
        (None, None, " No paired test against the untuned model was run.", "This is the best of 2 arms"),
    ],
)
def test_the_headline_claims_no_more_than_the_paired_difference_bears(p, p_holm, verdict, ground):
    ((claim, told),) = headline(run_of({"untuned": 0.2, "steered": 0.4, "rep_tuned": 0.5}, p, p_holm))
    raised = "Representation tuning raised the mood score most, from 0.20 [0.10, 0.30] (untuned) to 0.50 [0.40, 0.60]"
    assert claim == f"{raised} (test; n = 20, seed 7).{verdict}"
    assert told.startswith(ground) and told.endswith(
        "best of 2 arms, so its effect is likely overestimated (selection bias)."
    )
    assert p is None or "(n = 20, seed 7)" in told
    assert "steered" not in told, "the arm's own comparison with the untuned model"


def test_only_the_headlines_own_set_and_scorer_are_compared():
    results = run_of({"untuned": 0.2, "rep_tuned": 0.5}, 0.001, 0.002)
    for row, other in zip(results["comparisons"], ({"scorer": "another"},), strict=True):
        row.update(other)
    ((claim, ground),) = headline(results)
    assert claim.endswith("No paired test against the untuned model was run.") and ground == "", (
        "one arm is no choice of the best"
    )


@pytest.mark.parametrize("n_second", [20, 40])
def test_each_score_has_its_own_n_where_scorers_differ(n_second):
    results = run_of({"untuned": 0.2, "rep_tuned": 0.5})
    results["summary"] += [{**row, "scorer": "judge", "n": n_second, "mean": 0.3} for row in results["summary"]]
    results |= {"history": [], "logit_lens": [], "separability": [], "dose_response": []}
    text = {"prompt": "", "tokens": ["a"], "layers": [18], "arms": {"untuned": [[0.5]]}}
    part = next(part for part in sections(results, [], text) if part.name == "Scores by arm")
    table = Page(part.parts[0].html.partition("</figure>")[2])
    heads = [attributes["scope"] for tag, attributes in table.elements if tag == "th"].count("col")
    told = "|".join(table.texts)
    if n_second == 20:
        assert heads == 5 and "|0.200 [0.100, 0.300]|0.300 [0.100, 0.300]|20|7" in told, "a column for all"
    else:
        assert heads == 4 and "|0.200 [0.100, 0.300], n = 20|0.300 [0.100, 0.300], n = 40|7" in told


def test_scores_are_set_against_kl_or_else_perplexity_or_nothing():
    rows = [{"kl": None, "perplexity": 20.0}, {"kl": None, "perplexity": None}]
    assert side_effect_of([*rows, {"kl": 0.0, "perplexity": None}]) == "kl"
    assert side_effect_of(iter(rows)) == "perplexity"
    assert side_effect_of(rows[1:]) is None
