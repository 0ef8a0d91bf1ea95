"""Replies of a chat endpoint: requested with retries, counted, and cached on disk. Nothing here knows of judging."""

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
"""`role` and `content`, as a chat endpoint takes them."""


@dataclass
class Usage:
    """Requests and tokens of one judge, summed over all its calls.

    Attributes:
        requests: replies from the server.
        cached: replies from the cache on disk.
        tokens_in: tokens of the prompts, as the server counts them.
        tokens_out: tokens of the replies.
        uncounted: requests for which the server gives no token count; the cost is then a lower bound.
        unread: prompts whose reply cannot be parsed, even after a reminder.
        disagreed: pairs whose two orders have different verdicts.

    Example:
        >>> usage = EndpointJudge("http://localhost:8000/v1", "qwen3-32b", "sounds happy").usage
        >>> usage.requests, usage.tokens_in
        (0, 0)
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
    """Address and settings of a chat endpoint.

    Attributes:
        url: base URL.
        model: the model's name on that server.
        api_key_env: environment variable with the key; a local server may do without. Empty: no key is sent.
        seed: seed, as sent to the server.
        max_tokens: maximum number of tokens of a reply.
        timeout: seconds to wait for one request.
        retries: retries of one request by the client, with growing pauses.

    Raises:
        ImportError: without the extra `judge`.
        ValueError: for a setting out of range, a key in the URL, or a missing key for a server on another machine.
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
                "url must be a plain address such as 'http://localhost:8000/v1', got one with another scheme, or with "
                f"a key or password in it. Put the key into the environment variable {self.api_key_env}."
            )
        for setting, least in {"max_tokens": 1, "timeout": 0.001, "retries": 0}.items():
            if not getattr(self, setting) >= least:  # `not >=` catches NaN too
                raise ValueError(f"{setting} must be at least {least}, got {getattr(self, setting)}.")
        _openai()
        self.key()

    @property
    def is_local(self) -> bool:
        return urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    def key(self) -> str:
        """The API key, read from the environment each time, so that no object holds it."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        if not key and self.api_key_env and not self.is_local:
            raise ValueError(
                f"api_key_env must name an environment variable that is set, got {self.api_key_env}. Put the key for "
                f"{self.url} into it."
            )
        return key or "none"

    def settings(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Everything a reply depends on, as far as a client can know."""
        return {
            "model": self.model, "messages": [dict(message) for message in messages], "temperature": 0,
            "seed": self.seed, "max_tokens": self.max_tokens,
        }  # fmt: skip


class Replies:
    """Context manager: an open connection to an endpoint, behind a cache on disk. Threads may share it.

    Args:
        endpoint: the endpoint.
        cache: file of JSON lines; each reply is appended at once, so that an interrupted run pays for nothing twice.
        usage: counts of requests and tokens, which go up in place.

    Example:
        >>> from pathlib import Path
        >>> endpoint = Endpoint("http://localhost:8000/v1", "qwen3-32b")
        >>> message = {"role": "user", "content": "Yes or no?"}
        >>> with Replies(endpoint, Path("judge.jsonl"), Usage()) as replies:
        ...     print(replies.endpoint.settings([message])["temperature"])  # replies.reply([message]) would ask
        0
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
            # Prompts and key go to this server only, wherever it may redirect them to. A server on this machine is
            # reached directly, not through a proxy.
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not self.endpoint.is_local),
        )  # fmt: skip
        if urlsplit(self.endpoint.url).hostname != "api.openai.com":  # the client would send OpenAI's own variables
            self._client.organization = self._client.project = None
            self._client._custom_headers = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def reply(self, messages: Sequence[Message]) -> str:
        """The reply, from the cache or from the server.

        Raises:
            ConnectionError: if the server gives no reply, refuses, or sends something other than a chat completion.
        """
        settings = self.endpoint.settings(messages)
        request = json.dumps([self.endpoint.url.rstrip("/"), settings], sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()
        with self._lock:
            if key in self._known:
                self.usage.cached += 1
                return self._known[key]
        completion = self._completion(settings)
        reply = completion.choices[0].message.content or ""
        count = completion.usage
        row = {
            "key": key, "model": self.endpoint.model, "messages": settings["messages"], "reply": reply,
            "tokens_in": count.prompt_tokens if count else None,
            "tokens_out": count.completion_tokens if count else None,
        }  # fmt: skip
        with self._lock:
            self._known[key] = reply
            _append(self.cache, row)
            self.usage.requests += 1
            self.usage.tokens_in += row["tokens_in"] or 0
            self.usage.tokens_out += row["tokens_out"] or 0
            self.usage.uncounted += count is None
        return reply

    def _completion(self, settings: Mapping[str, Any]) -> Any:
        openai, url = _openai(), self.endpoint.url
        try:
            completion = self._client.chat.completions.create(**settings)
        except openai.APITimeoutError:
            raise ConnectionError(
                f"url {url} gives no reply within {self.endpoint.timeout:g} s after {self.endpoint.retries + 1} "
                "attempts. Increase timeout or use fewer workers; the cache keeps all replies so far."
            ) from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise ConnectionError(
                f"url {url} cannot be reached ({reason}). Start the server, or correct the address; the cache keeps "
                "all replies so far."
            ) from None
        except openai.APIStatusError as error:
            if 300 <= error.status_code < 400:
                raise ConnectionError(
                    f"url {url} redirects to {_redirect_target(error.response)}; neither responses nor key are sent "
                    "there. Give that address if you trust it."
                ) from None
            # Servers quote the key they refuse, or parts of it.
            quoted = "the server refuses the key" if error.status_code in (401, 403) else error.message[:300]
            reason = quoted.replace(self.endpoint.key(), "...")
            raise ConnectionError(
                f"url {url} refuses {self.endpoint.model!r} with {error.status_code}: {reason}."
            ) from None
        except openai.APIError:
            completion = None
        if not getattr(completion, "choices", None):
            raise ConnectionError(f"url {url} sends something other than a chat completion. Does it end in /v1?")
        return completion


def _redirect_target(response: Any) -> str:
    """The address a redirect points to, without the parts of it that may be secret."""
    target = urlsplit(response.headers.get("location", ""))
    port = f":{target.port}" if target.port else ""
    origin = f"{target.scheme}://{target.hostname}{port}" if target.hostname else ""
    shown = f"{origin}{target.path}"[:200]
    return "".join(character for character in shown if character.isprintable()) or "nowhere"


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ImportError(
            "a judge behind an endpoint needs openai, which is not installed. Run: pip install 'rt_lens[judge]'"
        ) from None
    return openai


def _read(cache: Path) -> dict[str, str]:
    """Key -> reply. A line that cannot be parsed, since an interruption cut it, is skipped, and so requested again."""
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
    """Appends a line in one write. It starts and ends with a line break, so that a line cut short spoils no other."""
    with cache.open("ab", buffering=0) as stream:
        stream.write(b"\n" + json.dumps(row, ensure_ascii=False).encode() + b"\n")
