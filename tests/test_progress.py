"""Bars tell whoever watches, also when they are not shown, and work that is ended leaves nothing behind."""

from __future__ import annotations

import pytest

import rt_lens
from rt_lens.common.progress import Bar, Step, breathe, watched
from rt_lens.steering.binding import add


class Enough(Exception):
    """What the watchers here raise."""


@pytest.mark.parametrize("disable", [True, False])
def test_each_step_is_told_once_and_in_order(disable):
    steps: list[Step | None] = []
    with watched(steps.append):
        for _ in Bar(["a", "b", "c"], desc="letters", unit="letter", disable=disable):
            pass
    assert [(step.stage, step.done, step.total, step.unit) for step in steps] == [
        ("letters", done, 3, "letter") for done in range(4)
    ]


@pytest.mark.parametrize("disable", [True, False])
def test_updates_and_values_are_told(disable):
    steps: list[Step | None] = []
    with watched(steps.append), Bar(desc="steps", total=5, initial=1, disable=disable) as bar:
        bar.update(2)
        bar.set_postfix({"loss": "0.5"})
    assert [(step.done, step.total) for step in steps] == [(1, 5), (3, 5), (3, 5), (3, 3)]
    assert steps[-1].values == {"loss": "0.5"}


@pytest.mark.parametrize("disable", [True, False])
def test_a_bar_that_is_left_early_ends_there(disable):
    steps: list[Step | None] = []
    with watched(steps.append), Bar(desc="steps", total=5, disable=disable) as bar:
        bar.update(2)
    assert [(step.done, step.total) for step in steps] == [(0, 5), (2, 5), (2, 2)]


def test_nobody_is_told_outside_the_block():
    steps: list[Step | None] = []
    with watched(steps.append):
        pass
    breathe()
    list(Bar([1, 2], desc="quiet", disable=True))
    assert steps == []


def test_a_generation_can_be_ended_between_two_tokens_and_leaves_no_hook(tiny, tiny_vectors, hooks_on):
    before, tokens = hooks_on(tiny), []

    def watcher(step: Step | None) -> None:
        if len(tokens) == 3:
            raise Enough

    with pytest.raises(Enough), watched(watcher), tiny.hooks(fwd_hooks=add(tiny_vectors, [1], 2.0)):
        rt_lens.generate(tiny, ["One prompt."], chat=False, max_new_tokens=30, on_token=tokens.append)
    assert len(tokens) == 3
    assert hooks_on(tiny) == before
