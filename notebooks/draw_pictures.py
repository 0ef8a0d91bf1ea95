"""Draws the README's pictures: the page Explore, the top of a report, and each notebook's figure tagged `picture`.

    .venv/bin/python notebooks/draw_pictures.py runs/mood

It needs a finished run and Chromium. It executes the notebooks, which takes some minutes.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient
from playwright.sync_api import Page, expect, sync_playwright

import rt_lens as rtl

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
PROMPT = "Tell me about your weekend. Did anything nice happen, or was it all work again?"


def explore(page: Page, run: Path) -> None:
    dashboard = rtl.dashboard(rtl.load_model(), run=run)
    page.set_viewport_size({"width": 1360, "height": 1540})  # from the map down to the trace
    page.goto(dashboard.url)
    page.fill("#explore-prompt", PROMPT)
    page.click("#explore-start")
    expect(page.locator("#explore-status")).to_have_text("Done.", timeout=120_000)
    page.wait_for_timeout(1000)  # the page draws its last figures after the last token
    page.screenshot(path=PICTURES / "explore.png")
    dashboard.stop()


def report(page: Page, run: Path) -> None:
    page.set_viewport_size({"width": 1360, "height": 1010})
    page.goto((run / "report.html").resolve().as_uri())
    page.wait_for_timeout(2000)
    page.screenshot(path=PICTURES / "report.png")


def notebook(path: Path) -> None:
    document = nbformat.read(path, as_version=4)
    NotebookClient(document, timeout=900, kernel_name="python3").execute(cwd=str(path.parent))
    for cell in document.cells:
        if "picture" in cell.metadata.get("tags", []):
            figures = [
                output.data for output in cell.outputs if "application/vnd.plotly.v1+json" in output.get("data", {})
            ]
            figure = go.Figure(figures[0]["application/vnd.plotly.v1+json"], skip_invalid=True)
            rtl.save_figure(figure, PICTURES / f"{path.stem}.png", scale=1.5)


def main(run: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        explore(page, run)
        report(page, run)
        browser.close()
    for path in sorted(HERE.glob("*.ipynb")):
        start = time.monotonic()
        notebook(path)
        print(f"{path.stem}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
