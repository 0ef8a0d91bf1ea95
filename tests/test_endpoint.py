"""A judge behind an endpoint: what it makes of replies, with the bundled model behind a real server for one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
from chat_server import HAPPY, SAD, Requests, against, alone, by_sense

import rt_lens as rtl
from rt_lens.evaluation.scorers import Scorer
from rt_lens.evaluation.tasks import evaluate
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text

# The bundled model behind a server


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, str]]:
    """URL and name of the bundled model behind `transformers serve`."""
    folder = bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1"]
    settings = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(
        command + settings, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            assert server.poll() is None, f"the server ended with {server.returncode}"
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.terminate()
        server.wait(20)


def test_the_bundled_model_judges_pairs_over_http(served, judge, model, tmp_path):
    url, name = served
    first = judge(url, model=name, max_tokens=1, price_in=1.0, price_out=2.0)  # it goes on talking after its letter
    there = first(against(HAPPY, SAD))
    assert set(there) <= {-1.0, 0.0, 1.0}
    assert first.usage.requests == 6 and first.usage.unread == 0
    back = first(against(SAD, HAPPY))
    assert back == [-score for score in there]
    assert first.usage.requests == 6 and first.usage.cached == 6  # the same two orders of each
    rows = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines() if line]
    prompts = [row["messages"][0]["content"] for row in rows]
    assert [row["reply"] for row in rows] == rtl.generate(model, prompts, max_new_tokens=1)
    read = sum(len(encode(model, chat_text(model, prompt))) for prompt in prompts)
    assert first.usage.tokens_in == read and first.usage.tokens_out == 6
    assert first.cost == pytest.approx((read + 12) / 1e6)


def test_the_bundled_model_abstains_from_grading_and_is_counted(served, judge, model):
    url, name = served
    patient = judge(url, model=name, pairs=False, most_unread=1.0)
    with pytest.warns(UserWarning, match="1 of 1 replies cannot be parsed"):
        found = evaluate(model, ["Tell me of the sea."], patient, max_new_tokens=4)
    assert found.scores == [0.5] and found.scorer == "endpoint_judge_sounds_happy"
    assert patient.usage.requests == 2 and patient.usage.unread == 1  # asked, and reminded
    with pytest.raises(ConnectionError, match="most_unread .*10%.*, got 1 of 1 replies of .* that cannot be parsed"):
        evaluate(model, ["Tell me of the sea."], judge(url, model=name, pairs=False), max_new_tokens=4)


# Servers that reply by a rule


def test_better_worse_and_tied(serve, judge):
    came = serve(by_sense)
    asked = judge(came.url, seed=7)
    assert isinstance(asked, Scorer) and asked.reads == "text"
    mine, theirs = [HAPPY[0], SAD[0], SAD[1], HAPPY[2], ""], [SAD[0], HAPPY[0], SAD[2], HAPPY[2], HAPPY[1]]
    assert asked(against(mine, theirs)) == [1.0, -1.0, 0.0, 0.0, -1.0]
    assert len(came) == 6  # the second is the first one turned round, and the fourth the same text twice
    assert asked.usage.disagreed == 0
    assert {(body["temperature"], body["seed"], body["max_tokens"]) for body in came} == {(0, 7, 8)}
    assert "sounds happy" in came[0]["messages"][0]["content"]


def test_a_liking_for_the_first_place_scores_nothing(serve, judge):
    asked = judge(serve(lambda came: "A").url)
    assert asked(against(HAPPY, SAD)) == [0.0, 0.0, 0.0]
    assert asked.usage.disagreed == 3


def test_grades_are_scaled_and_keep_their_order_under_many_workers(serve, judge):
    def grade(came: Requests) -> str:
        return re.search(r"worth (\d)", came[-1]["messages"][0]["content"])[1] + "/5"

    texts = [f"worth {1 + n % 5}, {n}" for n in range(20)]
    asked = judge(serve(grade).url, pairs=False, workers=8)
    assert asked(alone(texts)) == [(n % 5) / 4 for n in range(20)]


@pytest.mark.parametrize("reply", ["A is better", "", "4.5", "AB", "6", "-3", "I prefer A."])
@pytest.mark.parametrize("pairs", [True, False])
def test_a_reply_is_read_strictly_asked_for_once_more_and_then_an_error(serve, judge, reply, pairs):
    came = serve(lambda _: reply)
    says = f"most_unread .* got 1 of . replies of someone .*{re.escape(repr(reply))}"
    with pytest.raises(ConnectionError, match=says):
        judge(came.url, pairs=pairs, workers=1)(against(HAPPY[:1], SAD[:1]))
    assert [len(body["messages"]) for body in came[:2]] == [1, 3]
    assert (
        "one letter only" in came[1]["messages"][2]["content"] or "one digit only" in came[1]["messages"][2]["content"]
    )


def test_a_reminder_is_enough(serve, judge):
    asked = judge(serve(lambda came: "Well..." if len(came[-1]["messages"]) == 1 else "5").url, pairs=False)
    assert asked(alone(HAPPY)) == [1.0, 1.0, 1.0]
    assert asked.usage.requests == 6 and asked.usage.unread == 0


def test_abstentions_are_ties_that_are_counted_and_warned_of(serve, judge):
    asked = judge(serve(lambda came: "?" if "Nobody" in str(came[-1]) else by_sense(came)).url, most_unread=0.5)
    with pytest.warns(UserWarning, match=r"2 of 6 replies cannot be parsed and count as abstentions, such as '\?'"):
        assert asked(against(HAPPY, SAD)) == [1.0, 1.0, 0.0]
    assert asked.usage.unread == 2


def test_replies_that_cannot_be_read_stop_the_asking(serve, judge):
    came = serve(lambda _: "?")
    with pytest.raises(ConnectionError, match="most_unread .* got 1[01] of 100"):
        judge(came.url, pairs=False, workers=1)(alone([str(n) for n in range(100)]))
    before = len(came)
    assert before < 100  # of 200, had it gone on
    time.sleep(0.3)
    assert len(came) == before


def test_pairs_want_a_baseline(judge):
    with pytest.raises(ValueError, match="answers must each have a baseline .*, got none for 'How was it.'"):
        judge("http://localhost:1/v1")(alone(HAPPY))
