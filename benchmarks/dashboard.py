"""Seconds in a real browser: the first heat map after the button, each page's opening, and a report's.

    python benchmarks/dashboard.py runs/mood    # the folder of a finished run; without one, no report

A machine drifts, so compare only figures of one call. Needs Chromium, as the tests do.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

import rt_lens as rtl
from rt_lens.models.generation import as_chat
from rt_lens.models.tokens.batches import encode

PAGES = ("explore", "vectors", "steering", "tuning", "compare")
PROMPT = "Tell me about your weekend. Did anything nice happen, or was it all work again? My own was long, and rainy."
# The page itself takes both times, up to the frame after the drawing: asking from outside would add its own time.
PRESSED = """() => new Promise(resolve => {
  const start = performance.now();
  const drawn = () => document.querySelector("#explore-map .heatmaplayer image");
  new MutationObserver((_, watching) => {
    if (!drawn()) return;
    watching.disconnect();
    requestAnimationFrame(() => setTimeout(() => resolve((performance.now() - start) / 1000)));
  }).observe(document.body, {childList: true, subtree: true, attributes: true});
  document.querySelector("#explore-start").click();
})"""


def heat_map(page: Page, url: str) -> float:
    """Seconds from the press to the drawn map, on a page that is open and idle."""
    page.goto(url)
    page.locator("#explore-prompt").fill(PROMPT)
    page.wait_for_load_state("networkidle")
    seconds = float(page.evaluate(PRESSED))
    page.locator("#explore-stop").click()
    page.get_by_text("Stopped.").wait_for()
    return seconds


def opening(page: Page, url: str, landmark: str) -> float:
    """Seconds from the request for the page until its landmark (a selector) is there."""
    page.goto("about:blank")
    start = time.perf_counter()
    page.goto(url)
    page.locator(landmark).first.wait_for()
    return time.perf_counter() - start


def row(name: str, measure: Callable[[], float], rounds: int) -> None:
    seconds = [measure() for _ in range(rounds)]
    print(
        f"{name:<28} {statistics.median(seconds):6.2f} {min(seconds):6.2f} {max(seconds):6.2f} {rounds:4}", flush=True
    )


def measure(browser: Browser, url: str, run: Path | None, n_tokens: int, rounds: int) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    heat_map(page, url)  # warm
    print(f"{'seconds':<28} {'median':>6} {'min':>6} {'max':>6} {'n':>4}")
    row(f"heat map, {n_tokens} tokens", lambda: heat_map(page, url), rounds)
    for name in PAGES:
        row(f"opening {name}", lambda name=name: opening(page, f"{url}{name}", f"#page-{name} h2"), rounds)  # type: ignore[misc]
    if run is not None:
        report = run / "report.html"
        size = report.stat().st_size / 2**20
        row(
            f"opening report ({size:.1f} MiB)",
            lambda: opening(page, report.resolve().as_uri(), "nav a"),
            rounds,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("This benchmark needs Chromium, and none is installed. Try apt-get install chromium.")
    model = rtl.load_model()
    train, _, _ = rtl.load_pairs("mood").split(0.4, 0.2, seed=0)
    vectors = rtl.extract_vectors(model, train.sample(16), seed=0)
    dashboard = rtl.dashboard(model, vectors, run=arguments.run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        n_tokens = len(encode(model, as_chat(model, [PROMPT])[0]))
        measure(browser, dashboard.url, arguments.run, n_tokens, arguments.rounds)
        browser.close()
    dashboard.stop()


if __name__ == "__main__":
    main()
