"""Replies over the wire and on disk: servers that fail in every way, the cache, the count, the key."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from typing import Any

import pytest
from chat_server import HAPPY, SAD, Requests, against, alone, by_sense

KEY = "sk-secret-0123456789"


def test_failing_twice_is_no_failure(serve, judge):
    came = serve(lambda came: (500, {"error": {"message": "tired"}}) if len(came) <= 2 else "4")
    asked = judge(came.url, pairs=False, retries=2)
    assert asked(alone(HAPPY[:1])) == [0.75]
    assert len(came) == 3 and asked.usage.requests == 1


def test_failing_for_good_names_the_url_and_what_was_said(serve, judge):
    came = serve(lambda _: (404, {"error": {"message": "no model someone"}}))
    with pytest.raises(ConnectionError, match=rf"url {came.url} refuses 'someone' with 404: .*no model someone"):
        judge(came.url)(against(HAPPY, SAD))
    page = serve(lambda _: (200, "<html>welcome</html>"))
    with pytest.raises(ConnectionError, match=rf"url {page.url} sends something other than a chat completion"):
        judge(page.url)(against(HAPPY, SAD))


def test_a_server_that_is_not_there_is_named(judge):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match=rf"url {url} cannot be reached \(.*\). Start the server"):
            judge(url)(against(HAPPY, SAD))


def test_a_server_that_does_not_reply_is_named(serve, judge):
    over = threading.Event()
    came = serve(lambda _: str(over.wait(20)))
    with pytest.raises(ConnectionError, match=rf"url {came.url} gives no reply within 0.2 s after 1 attempts"):
        judge(came.url, timeout=0.2, workers=1)(against(HAPPY[:1], SAD[:1]))
    over.set()


def test_what_was_replied_is_not_asked_again_by_another_judge(serve, judge):
    came = serve(by_sense)
    first = judge(came.url)(against(HAPPY, SAD))
    again = judge(came.url)
    assert again(against(HAPPY, SAD)) == first
    assert len(came) == 6 and again.usage.cached == 6 and again.usage.requests == 0 and again.cost == 0
    judge(came.url, seed=1)(against(HAPPY[:1], SAD[:1]))  # other settings are another question
    assert len(came) == 8


def test_without_a_place_of_its_own_the_cache_is_in_the_cache_folder(serve, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path / "home"))
    judge(serve(by_sense).url, cache=None)(against(HAPPY, SAD))
    assert (tmp_path / "home" / "judge.jsonl").read_text().count('"reply"') == 6


def test_an_interrupted_run_goes_on_where_it_was(serve, judge, tmp_path):
    repaired = threading.Event()

    def fails_after_three(came: Requests) -> Any:
        return by_sense(came) if repaired.is_set() or len(came) <= 3 else (400, {"error": {"message": "enough"}})

    came = serve(fails_after_three)
    with pytest.raises(ConnectionError, match="enough"):
        judge(came.url, workers=1)(against(HAPPY, SAD))
    cache = tmp_path / "judge.jsonl"
    cache.write_bytes(cache.read_bytes()[:-40])  # and the last line was cut
    repaired.set()
    goes_on = judge(came.url)
    assert goes_on(against(HAPPY, SAD)) == [1.0, 1.0, 1.0]
    assert goes_on.usage.cached == 2 and goes_on.usage.requests == 4
    assert judge(came.url)(against(HAPPY, SAD)) == [1.0, 1.0, 1.0]
    assert len(came) == 8  # nothing more was asked: the cut line spoilt none that came after it


def test_tokens_and_cost_are_told(serve, judge, capsys):
    asked = judge(serve(by_sense).url, price_in=10.0, price_out=100.0, progress=True)
    asked(against(HAPPY, SAD))
    assert (asked.usage.tokens_in, asked.usage.tokens_out, asked.usage.uncounted) == (600, 12, 0)
    assert asked.cost == pytest.approx(600 * 10e-6 + 12 * 100e-6)
    assert "cost=0.0072" in capsys.readouterr().err
    silent = judge(serve(by_sense, usage=False).url)
    silent(against(HAPPY, SAD))
    assert silent.usage.uncounted == 6 and silent.usage.tokens_in == 0


def test_the_key_is_sent_and_written_nowhere(serve, judge, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    came = serve(lambda came: "A" if len(came) == 1 else (500 if len(came) == 2 else 401, {"error": {"message": KEY}}))
    asked = judge(came.url, api_key_env="JUDGE_KEY", workers=1)
    with caplog.at_level(logging.DEBUG):
        messages = []
        for _ in range(2):
            with pytest.raises(ConnectionError, match="refuses") as refusal:
                asked(against(HAPPY, SAD))
            messages.append(str(refusal.value))
    assert [body["key"] for body in came] == [f"Bearer {KEY}"] * 3
    assert "with 500" in messages[0] and "the server refuses the key" in messages[1]
    written = (tmp_path / "judge.jsonl").read_text()
    assert "HAPPY" not in written and HAPPY[0] in written  # there was something written
    assert not [text for text in [*messages, written, caplog.text, repr(asked)] if KEY in text]


def test_only_a_local_server_does_without_a_key(judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge("http://localhost:1/v1")
    with pytest.raises(ValueError, match="api_key_env must name .* that is set, got OPENAI_API_KEY"):
        judge("https://judge.invalid/v1")


def test_a_redirect_is_not_followed_with_prompts_or_key(serve, judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    other = serve(by_sense)
    for code in (301, 302, 307, 308):
        first = serve(lambda _, code=code: (code, {}), headers={"location": f"{other.url}/chat/completions?key=x"})
        says = rf"url {first.url} redirects to {other.url}/chat/completions; neither responses nor key are sent there"
        with pytest.raises(ConnectionError, match=says):
            judge(first.url, api_key_env="JUDGE_KEY")(against(HAPPY[:1], SAD[:1]))
        assert first
    assert not other


def test_openais_other_variables_go_to_no_other_server(serve, judge, monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"x-key: {KEY}")
    came = serve(by_sense)
    judge(came.url, api_key_env="")(against(HAPPY[:1], SAD[:1]))
    assert came and KEY not in str(came)
    assert {body["key"] for body in came} == {"Bearer none"}


def test_a_local_server_is_not_sought_through_a_proxy(serve, judge, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert judge(serve(by_sense).url)(against(HAPPY[:1], SAD[:1])) == [1.0]


def test_without_the_client_the_extra_is_named(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'rt_lens\[judge\]'"):
        judge("http://localhost:1/v1")


@pytest.mark.parametrize(
    ("url", "changes", "argument"),
    [
        ("localhost:8000", {}, "url"),
        (f"http://me:{KEY}@localhost/v1", {}, "url"),
        (f"http://localhost/v1?key={KEY}", {}, "url"),
        ("http://localhost/v1", {"max_tokens": 0}, "max_tokens"),
        ("http://localhost/v1", {"timeout": 0.0}, "timeout"),
        ("http://localhost/v1", {"retries": -1}, "retries"),
        ("http://localhost/v1", {"workers": 0}, "workers"),
        ("http://localhost/v1", {"price_in": -1.0}, "price_in"),
        ("http://localhost/v1", {"most_unread": 2.0}, "most_unread"),
        ("http://localhost/v1", {"cache": "/"}, "cache"),
    ],
)
def test_settings_out_of_range_are_named_at_once(judge, url, changes, argument):
    with pytest.raises(ValueError, match=f"^{argument}:? ") as refusal:
        judge(url, **changes)
    assert KEY not in str(refusal.value)
