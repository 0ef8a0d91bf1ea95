"""A real browser for the tests, and an eye on all that its pages do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds: two cores may be shared with other tests
HERE = re.compile(r"(http://127\.0\.0\.1:\d+/|file://|data:|blob:|about:)")


@contextmanager
def opened() -> Iterator[Browser]:
    """A headless browser of the system."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise RuntimeError(f"These tests need one of {', '.join(BROWSERS)}. Run apt-get install chromium.")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        # Under root, as in containers, Chromium starts without its sandbox only.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Watch:
    """What the pages of one context did that they should not."""

    outside: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> BrowserContext:
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda request: None if HERE.match(request.url) else self.outside.append(request.url))
        # A breach of the content security policy is an error of the console as well.
        context.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        context.on("weberror", lambda fault: self.faults.append(str(fault.error)))
        context.on("dialog", self._dialog)
        return context

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def clean(self) -> None:
        assert (self.outside, self.faults, self.dialogs) == ([], [], [])


def part(page: Page, name: str) -> Locator:
    """Some part of the page Explore."""
    return page.locator(f"#explore-{name}")


def slide(page: Page, name: str, *keys: str) -> None:
    """Moves a slider of Explore by the keyboard."""
    thumb = part(page, name).get_by_role("slider")
    thumb.focus()
    for key in keys:
        thumb.press(key)


def done(page: Page) -> None:
    """Waits until the page says that its work is done."""
    expect(part(page, "status")).to_have_text("Done.")


def answers(page: Page) -> dict[str, str]:
    """Arm -> its answer, as the page shows it."""
    articles = part(page, "answers").locator("article").all()
    return {article.locator("h3").inner_text(): article.locator("p").text_content() or "" for article in articles}


def look(page: Page, prompt: str) -> dict[str, str]:
    """Types a prompt over the one that is there, presses the button, and gives the answers in the end."""
    part(page, "prompt").fill(prompt)
    before = started(page)
    part(page, "start").click()
    expect(page.locator("#explore-answers article").first).to_be_visible(timeout=PATIENCE)
    anew(page, before)
    return answers(page)


def started(page: Page) -> str:
    """A mark on the answers that goes with the first change."""
    page.evaluate("() => document.querySelector('#explore-answers > div')?.setAttribute('data-old', '')")
    return "#explore-answers [data-old]"


def anew(page: Page, mark: str) -> None:
    """Waits until the answers are those of new work, and that is done."""
    expect(page.locator(mark)).to_have_count(0)
    done(page)


def traces(page: Page, graph: str) -> list[dict[str, Any]]:
    """A figure's traces with the numbers that Plotly draws, decoded."""
    return page.evaluate(
        """graph => {
          const many = held => Array.isArray(held) || ArrayBuffer.isView(held);
          const plain = held => many(held) ? Array.from(held, plain) : held;
          return document.querySelector(`#${graph} .js-plotly-plot`)._fullData.map(trace => ({
            type: trace.type, name: trace.name, x: plain(trace.x), y: plain(trace.y), z: plain(trace.z),
            text: plain(trace.text), hover: plain(trace.hovertext), data: plain(trace.customdata),
          }));
        }""",
        graph,
    )
