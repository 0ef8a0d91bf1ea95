"""Replies of a chat endpoint: asked for with patience, counted, and kept on disk. It knows nothing of judging."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

Message = Mapping[str, str]
"""`role` and `content`, as a chat endpoint wants them."""


@dataclass
class Usage:
    """What judging took, summed over all calls of one judge.

    Attributes:
        requests: replies that came over the wire.
        cached: replies found on disk.
        tokens_in: of the requests' prompts, as the server counts them.
        tokens_out: of its replies.
        uncounted: requests whose tokens the server did not tell; the cost is then a lower bound.
        unread: prompts whose reply could not be read, twice.
        disagreed: pairs of which the two orders gave different verdicts.
    """

    requests: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    unread: int = 0
    disagreed: int = 0


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: base URL.
        model: its name there.
        api_key_env: environment variable with the key; a local server may do without. Empty: no key is sent anywhere.
        seed: passed on.
        max_tokens: of a reply.
        timeout: of one request, in seconds.
        retries: of one request, by the client, with growing pauses.

    Raises:
        ImportError: without the extra `judge`.
        ValueError: a setting out of range, a key in the URL, or no key for a server elsewhere.
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    seed: int = 0
    max_tokens: int = 8
    timeout: float = 60.0
    retries: int = 5

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError(
                "url: a plain address is wanted, as in 'http://localhost:8000/v1', with no key or password in it. "
                f"Keys belong in the environment variable {self.api_key_env}."
            )
        for setting, least in {"max_tokens": 1, "timeout": 0.001, "retries": 0}.items():
            if not getattr(self, setting) >= least:  # `not >=` catches NaN too
                raise ValueError(f"{setting}: {getattr(self, setting)} came; at least {least} is wanted.")
        _openai()
        self.key()

    @property
    def is_local(self) -> bool:
        return urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    def key(self) -> str:
        """The API key, read anew each time, so that nothing keeps it."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        if not key and self.api_key_env and not self.is_local:
            raise ValueError(f"api_key_env: {self.api_key_env} is not set. Put the key for {self.url} into it.")
        return key or "none"

    def settings(self, messages: Sequence[Message]) -> dict[str, Any]:
        """All that a reply depends on, as far as a client can say."""
        return {
            "model": self.model, "messages": [dict(message) for message in messages], "temperature": 0,
            "seed": self.seed, "max_tokens": self.max_tokens,
        }  # fmt: skip


class Replies:
    """An open line to an endpoint, with the replies on disk before it. Threads may share it.

    Args:
        endpoint: whom to ask.
        cache: JSON lines; a reply is added as soon as it is there, so that an interrupted run pays for nothing twice.
        usage: counts on.

    Example:
        >>> with Replies(endpoint, Path("judge.jsonl"), usage) as replies:
        ...     replies.reply([{"role": "user", "content": "Yes or no?"}])
    """

    def __init__(self, endpoint: Endpoint, cache: Path, usage: Usage) -> None:
        self.endpoint, self.cache, self.usage = endpoint, cache, usage
        self._lock = Lock()

    def __enter__(self) -> Replies:
        openai = _openai()
        self._known = _read(self.cache)
        self._client = openai.OpenAI(
            base_url=self.endpoint.url, api_key=self.endpoint.key(), timeout=self.endpoint.timeout,
            max_retries=self.endpoint.retries,
            # Prompts and key go where they were meant to go, wherever a server would send them on to. What is on this
            # machine is not to be sought through a proxy.
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not self.endpoint.is_local),
        )  # fmt: skip
        if urlsplit(self.endpoint.url).hostname != "api.openai.com":  # what the client adds from variables of OpenAI's
            self._client.organization = self._client.project = None
            self._client._custom_headers = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def reply(self, messages: Sequence[Message]) -> str:
        """The reply, from disk or over the wire.

        Raises:
            ConnectionError: if there is no answer, if the server refuses, or if what it says is no chat completion.
        """
        settings = self.endpoint.settings(messages)
        asked = json.dumps([self.endpoint.url.rstrip("/"), settings], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()
        with self._lock:
            if key in self._known:
                self.usage.cached += 1
                return self._known[key]
        completion = self._asked(settings)
        reply = completion.choices[0].message.content or ""
        told = completion.usage
        row = {
            "key": key, "model": self.endpoint.model, "messages": settings["messages"], "reply": reply,
            "tokens_in": told.prompt_tokens if told else None, "tokens_out": told.completion_tokens if told else None,
        }  # fmt: skip
        with self._lock:
            self._known[key] = reply
            _append(self.cache, row)
            self.usage.requests += 1
            self.usage.tokens_in += row["tokens_in"] or 0
            self.usage.tokens_out += row["tokens_out"] or 0
            self.usage.uncounted += told is None
        return reply

    def _asked(self, settings: Mapping[str, Any]) -> Any:
        openai, where = _openai(), self.endpoint.url
        try:
            completion = self._client.chat.completions.create(**settings)
        except openai.APITimeoutError:
            raise ConnectionError(
                f"url: {where} gave no reply within {self.endpoint.timeout:g} s, asked {self.endpoint.retries + 1} "
                "times. Give more timeout or fewer workers; what was replied so far is kept."
            ) from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise ConnectionError(
                f"url: {where} cannot be reached ({reason}). Start the server, or mend the address; what was replied "
                "so far is kept."
            ) from None
        except openai.APIStatusError as error:
            if 300 <= error.status_code < 400:
                raise ConnectionError(
                    f"url: {where} sends on to {_place_in(error.response)}, and neither answers nor key follow. Give "
                    "that address if you trust it."
                ) from None
            # Servers quote the key they refuse, or parts of it.
            quoted = "the key was refused" if error.status_code in (401, 403) else error.message[:300]
            told = quoted.replace(self.endpoint.key(), "...")
            raise ConnectionError(
                f"url: {where} refused {self.endpoint.model!r} with {error.status_code}: {told}."
            ) from None
        except openai.APIError:
            completion = None
        if not getattr(completion, "choices", None):
            raise ConnectionError(f"url: what {where} says is no chat completion. Does the address end in /v1?")
        return completion


def _place_in(response: Any) -> str:
    """Where a redirect points to, without what may be secret in an address."""
    target = urlsplit(response.headers.get("location", ""))
    place = f"{target.scheme}://{target.hostname}{f':{target.port}' if target.port else ''}" if target.hostname else ""
    shown = f"{place}{target.path}"[:200]
    return "".join(sign for sign in shown if sign.isprintable()) or "nowhere"


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ImportError("openai: a judge behind an endpoint needs it. pip install 'rt_lens[judge]'") from None
    return openai


def _read(cache: Path) -> dict[str, str]:
    """Key -> reply. What cannot be read (a line that an interruption cut) is passed over, and so asked again."""
    known = {}
    for line in _lines(cache):
        try:
            row = json.loads(line)
            known[row["key"]] = row["reply"]
        except (ValueError, KeyError, TypeError):
            continue
    return {key: reply for key, reply in known.items() if isinstance(reply, str)}


def _lines(cache: Path) -> Iterator[bytes]:
    if cache.is_file():
        yield from cache.read_bytes().split(b"\n")


def _append(cache: Path, row: Mapping[str, Any]) -> None:
    """Adds a line in one write. A line begins as well as ends with a break, so that one cut short spoils no other."""
    with cache.open("ab", buffering=0) as stream:
        stream.write(b"\n" + json.dumps(row, ensure_ascii=False).encode() + b"\n")
