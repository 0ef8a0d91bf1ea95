"""The dashboard in a real browser, on the real model: what it shows is what the API gives, and nothing leaves."""

from __future__ import annotations

import http.server
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Watch, anew, answers, done, look, part, slide, started, traces
from playwright.sync_api import Browser, BrowserContext, Page, expect
from small_runs import make_at_kl, make_board, write_run

import rt_lens as rtl
from rt_lens.apps.dashboard.serving import Dashboard
from rt_lens.apps.report.page import write_report
from rt_lens.models.generation import NewToken, as_chat
from rt_lens.vectors.steering_vectors import SteeringVectors

PAGES = ("explore", "vectors", "steering", "tuning", "compare")
LAYER, MULTIPLIER, LENGTH = 21, 2.0, 10  # the run's choice of a layer, the page's multiplier, the fewest new tokens
PROMPT = "Tell me about your weekend. Did anything nice happen, or was it all work again? My own was long, and rainy."
HOSTILE = "<script>alert(1)</script><b>x</b>"
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.opened() as found:
        yield found


@pytest.fixture(scope="module")
def vectors(model: Any, pairs: rtl.ContrastPairs) -> SteeringVectors:
    return rtl.extract_vectors(model, pairs.sample(16, seed=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vectors: SteeringVectors) -> Path:
    """A small finished run of the model."""
    choices = {"away": {"layer": LAYER, "multiplier": -2.0, "why": "Furthest."}, "rule": "The furthest."}
    name = vectors.provenance.model
    folder = write_run(tmp_path_factory.mktemp("runs") / "small", make_board(0), model=name, choices=choices)
    vectors.save(folder / "vectors.safetensors")
    return folder


@pytest.fixture(scope="module")
def board(model: Any, vectors: SteeringVectors, run: Path) -> Iterator[Dashboard]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    served = rtl.dashboard(model, {"mood": vectors, HOSTILE: vectors}, run=run, port=port)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def window(chromium: Browser) -> Iterator[tuple[BrowserContext, Watch]]:
    """One window for all tests, since each new one would load and parse everything anew."""
    context, watch = chromium.new_context(viewport={"width": 1400, "height": 1000}), Watch()
    yield watch.over(context), watch
    context.close()


@pytest.fixture
def context(window: tuple[BrowserContext, Watch]) -> Iterator[BrowserContext]:
    """The window; what its tabs do that they should not fails the test."""
    made, watch = window
    yield made
    for tab in made.pages:
        tab.close()
    watch.clean()


@pytest.fixture
def page(context: BrowserContext, board: Dashboard) -> Page:
    return explore(context, board)


def explore(context: BrowserContext, board: Dashboard) -> Page:
    """A tab at Explore, set to short answers."""
    made = context.new_page()
    made.goto(board.url)
    part(made, "start").wait_for()
    slide(made, "length", "Home")
    return made


@dataclass(frozen=True)
class Seen:
    """What Explore shows of PROMPT."""

    heat: list[dict[str, Any]]
    words: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    answers: dict[str, str]


@pytest.fixture(scope="module")
def seen(window: tuple[BrowserContext, Watch], board: Dashboard) -> Seen:
    page = explore(window[0], board)
    part(page, "prompt").fill("")
    part(page, "prompt").press_sequentially(PROMPT)
    part(page, "start").click()
    done(page)
    return Seen(*[traces(page, f"explore-{name}-graph") for name in ("map", "words", "trace")], answers(page))


@pytest.fixture(scope="module")
def projected(model: Any, vectors: SteeringVectors) -> dict[str, np.ndarray]:
    """The same by the API: arm -> "layer pos"."""
    (text,) = as_chat(model, [PROMPT])
    _, untuned = rtl.token_projections(model, vectors, text)
    with model.hooks(fwd_hooks=rtl.add(vectors, [LAYER], MULTIPLIER)):
        _, steered = rtl.token_projections(model, vectors, text)
    return {"untuned": untuned.numpy(), "steered": steered.numpy()}


def replies(model: Any, vectors: SteeringVectors, prompt: str, multiplier: float = MULTIPLIER) -> dict[str, str]:
    """The answers by the API."""
    (untuned,) = rtl.generate(model, [prompt], max_new_tokens=LENGTH)
    with model.hooks(fwd_hooks=rtl.add(vectors, [LAYER], multiplier)):
        (steered,) = rtl.generate(model, [prompt], max_new_tokens=LENGTH)
    return {"untuned": untuned, "steered": steered}


def test_the_heat_map_has_a_cell_for_each_layer_and_token_with_the_right_number(seen, projected):
    untuned, steered = projected["untuned"], projected["steered"]
    assert untuned.shape[0] == 30 and 50 < untuned.shape[1] < 70
    assert np.abs(steered - untuned).max() > 1  # there is something to see
    for trace, wanted in zip(seen.heat, (untuned, steered, steered - untuned), strict=True):
        drawn = np.array(trace["z"])
        assert drawn.shape == wanted.shape
        np.testing.assert_allclose(drawn, wanted, atol=1e-3)


def test_the_coloured_words_have_the_projections_of_the_layer(seen, projected):
    for trace, wanted in zip(seen.words[:-1], projected.values(), strict=True):  # the last is the key of the colours
        np.testing.assert_allclose(trace["data"], wanted[LAYER], atol=1e-3)


def test_the_answers_are_those_of_the_api(seen, model, vectors):
    wanted = replies(model, vectors, PROMPT)
    assert seen.answers == wanted
    assert wanted["untuned"] != wanted["steered"]


def test_the_trace_has_the_projections_of_the_new_tokens(seen, model, vectors):
    told: list[NewToken] = []
    with model.hooks(fwd_hooks=rtl.add(vectors, [LAYER], MULTIPLIER)):
        rtl.generate(model, [PROMPT], max_new_tokens=LENGTH, trace=vectors.select([LAYER]), on_token=told.append)
    (line,) = [trace for trace in seen.lines if trace["name"] == "steered"]
    np.testing.assert_allclose(line["y"], [next(iter(new.projections.values())) for new in told], atol=1e-3)


def test_a_slider_moved_by_the_keyboard_changes_the_steered_answer_alone(page, model, vectors):
    before = look(page, "How was your day?")
    mark = started(page)
    slide(page, "multiplier", "Home")
    anew(page, mark)
    after = answers(page)
    assert after == replies(model, vectors, "How was your day?", -4.0)
    assert after["untuned"] == before["untuned"] and after["steered"] != before["steered"]


def test_a_slider_s_number_is_typed_and_an_empty_one_is_refused(page, model, vectors):
    look(page, "How was your day?")
    number = part(page, "multiplier").get_by_role("spinbutton")
    number.fill("")
    number.blur()
    expect(part(page, "error")).to_contain_text("multiplier must be a number, got nothing")
    mark = started(page)
    number.fill("-40")  # below the slider's end
    number.blur()
    anew(page, mark)
    expect(part(page, "error")).to_be_empty()
    assert answers(page) == replies(model, vectors, "How was your day?", -4.0)


def test_stop_ends_a_long_answer_and_the_hooks_are_gone(page, model, hooks_on):
    before = hooks_on(model)
    slide(page, "length", "End")
    part(page, "prompt").fill("Count from one to one hundred, in words.")
    part(page, "start").click()
    part(page, "trace-graph").wait_for()
    assert hooks_on(model) != before  # it is being steered
    part(page, "stop").click()
    expect(part(page, "status")).to_have_text("Stopped.")
    expect(part(page, "stop")).to_be_disabled()
    assert hooks_on(model) == before
    assert all(0 < len(trace["y"]) < 120 for trace in traces(page, "explore-trace-graph") if trace["name"])


def test_two_tabs_at_once_get_each_their_own(context, board, model, vectors):
    prompts = ("How was your day?", "What do you think of the rain?")
    tabs = [explore(context, board) for _ in prompts]
    for tab, prompt in zip(tabs, prompts, strict=True):
        part(tab, "prompt").fill(prompt)
        part(tab, "start").click()
    for tab in tabs:  # all of them first: the model is the dashboard's as long as one is at work
        done(tab)
    for tab, prompt in zip(tabs, prompts, strict=True):
        assert answers(tab) == replies(model, vectors, prompt)


def test_hostile_texts_are_shown_as_texts(page):
    part(page, "behaviour").focus()
    part(page, "behaviour").press("Enter")
    page.get_by_role("option", name=HOSTILE).click()
    look(page, HOSTILE)
    graph = part(page, "map-graph")
    expect(graph.locator(".gtitle")).to_contain_text(HOSTILE)
    assert {"<", "script"} <= set(graph.locator("[class*=tick] text").all_text_contents())
    assert page.locator("#explore-map b, #explore-words b, script:has-text('alert(1)')").count() == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt must not be empty. Type what the user says"),
        (" \n\t", "prompt must not be empty. Type what the user says"),
        ("rain and sun " * 770, "prompt must have at most 400 tokens with the chat template, got"),
    ],
    ids=["empty", "blank", "10,000 characters"],
)
def test_a_prompt_that_will_not_do_is_refused_in_a_sentence(page, prompt, message):
    part(page, "prompt").fill(prompt)
    part(page, "start").click()
    expect(part(page, "error")).to_contain_text(message)
    expect(part(page, "answers")).to_be_empty()


def test_an_emoji_is_read_and_half_of_one_is_refused(page, model, vectors):
    prompt = "My cat is 🐈‍⬛ and 😀!"
    assert look(page, prompt) == replies(model, vectors, prompt)
    page.evaluate(
        """() => {
          const box = document.querySelector("#explore-prompt");
          Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(box, "cut \\ud83d off");
          box.dispatchEvent(new Event("input", {bubbles: true}));
        }"""
    )
    part(page, "start").click()
    expect(part(page, "error")).to_contain_text("prompt must hold whole characters")


def test_a_tab_outlives_a_restart_and_says_what_was_lost(chromium, model, vectors):
    tolerant = Watch()  # a server that is away is an error of the console
    page_context = tolerant.over(chromium.new_context())
    first = rtl.dashboard(model, vectors)
    page = explore(page_context, first)
    slide(page, "length", "End")
    part(page, "start").click()
    part(page, "trace-graph").wait_for()
    port = int(first.url.rsplit(":", 1)[1].strip("/"))
    first.stop()
    second = rtl.dashboard(model, vectors, port=port)
    expect(part(page, "error")).to_contain_text("which ended this job")
    slide(page, "length", "Home")
    assert look(page, "How was your day?") == replies(model, vectors, "How was your day?")
    expect(part(page, "error")).to_be_empty()
    page_context.close()
    second.stop()
    assert (tolerant.outside, tolerant.dialogs) == ([], [])


@pytest.fixture
def notebook(board) -> Iterator[int]:
    """The port of a server whose one page frames the dashboard, as Jupyter's does."""
    page = f"<!doctype html><title>notebook</title>{board._repr_html_()}".encode()

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_in_a_notebook_s_frame_it_works(chromium, notebook, model, vectors):
    page = chromium.new_page()
    page.goto(f"http://localhost:{notebook}/")
    frame = page.frame_locator("iframe")
    frame.locator("#explore-prompt").fill("How was your day?")
    frame.locator("#explore-length").get_by_role("slider").press("Home")
    frame.locator("#explore-start").click()
    expect(frame.locator("#explore-status")).to_have_text("Done.")
    untuned = frame.locator("#explore-answers article p").first.text_content()
    assert untuned == replies(model, vectors, "How was your day?")["untuned"]
    page.close()


def test_a_page_from_elsewhere_cannot_frame_it(chromium, notebook):
    page = chromium.new_page()
    page.goto(f"http://127.0.0.2:{notebook}/")  # of this machine, but a stranger's name to the dashboard
    page.wait_for_timeout(1500)
    assert [frame.url for frame in page.frames[1:]] == ["chrome-error://chromewebdata/"]
    page.close()


def violations(page: Page) -> list[str]:
    """What axe-core finds that keeps people out."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['target']}" for each in found if each["impact"] in SERIOUS for node in each["nodes"]]


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_and_keeps_nobody_out(context, board, name):
    page = context.new_page()
    page.goto(board.url)
    page.get_by_role("link", name=name.capitalize()).click()
    expect(page.locator(f"#page-{name} h2")).to_be_visible()
    expect(page.locator("main > section:visible")).to_have_count(1)
    page.wait_for_load_state("networkidle")
    assert page.url == f"{board.url}{name}"
    assert violations(page) == []


def test_explore_with_all_its_figures_keeps_nobody_out(page):
    look(page, "How was your day?")
    assert violations(page) == []


def test_a_run_without_its_model_opens_on_every_page(context, tmp_path):
    served = rtl.dashboard(run=write_run(tmp_path / "run", make_board(1)))
    page = context.new_page()
    for name in PAGES:
        page.goto(f"{served.url}{name}")
        expect(page.locator(f"#page-{name} h2")).to_be_visible()
        page.wait_for_load_state("networkidle")
        assert page.locator(f"#{name}-start").count() == 0
    served.stop()


@pytest.mark.parametrize("width", [1280, 420])
def test_the_budget_of_all_arms_is_moved_by_the_keyboard(context, tmp_path, width):
    board = make_board(1)
    served = rtl.dashboard(run=write_run(tmp_path / "run", board, at_kl=make_at_kl(board)))
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{served.url}compare")
    slider, answered = page.get_by_role("slider", name="Budget"), page.locator("#compare-answered")
    expect(slider).to_have_attribute("aria-valuetext", "0.01 (stated)")
    expect(answered).to_contain_text("rep_tuned, toward")
    page.get_by_role("link", name="Compare").focus()
    page.keyboard.press("Tab")
    expect(slider).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "0.03")
    expect(page.get_by_role("region", name="Every arm at KL 0.03")).to_contain_text("not reached: KL is at most 0.02.")
    expect(answered).to_contain_text("The run kept no responses at 0.03.")
    lines = "() => document.querySelector('#compare-at-kl .js-plotly-plot').layout.shapes.map(shape => shape.x0)"
    assert page.evaluate(lines) == [0.03, 0.03]
    assert violations(page) == []
    assert page.evaluate("() => document.documentElement.scrollWidth") == width  # nothing sticks out
    served.stop()


def test_the_report_keeps_nobody_out(context, run):
    page = context.new_page()
    page.goto(write_report(run).as_uri())
    for place in page.locator(".plotly-graph-div:visible").all():  # drawn once they are looked at
        place.scroll_into_view_if_needed()
        expect(place).to_have_class(re.compile("js-plotly-plot"))
    assert violations(page) == []


CONTROLS = (
    "prompt",
    "behaviour",
    "operator",
    "layer",
    "layer",
    "multiplier",
    "multiplier",
    "arm",
    "length",
    "length",
    "start",
)


def test_tab_reaches_every_control_in_order_and_shows_where_it_is(page):
    page.locator("a.skip").focus()
    reached, rings = [], []
    for _ in range(len(PAGES) + len(CONTROLS)):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => {
              const at = document.activeElement, style = getComputedStyle(at);
              return [at.closest(".field [id^=explore-]:not(label), button")?.id ?? at.textContent.toLowerCase(),
                      style.outlineStyle, parseFloat(style.outlineWidth)];
            }"""
        )
        reached.append(here[0].removeprefix("explore-"))
        rings.append(here[1:])
    assert tuple(reached) == (*PAGES, *CONTROLS)
    assert all(style == "solid" and width >= 2 for style, width in rings)


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_button_is_pressed_by_the_keyboard(page, key):
    part(page, "start").press(key)
    done(page)
    assert all(answers(page).values())
