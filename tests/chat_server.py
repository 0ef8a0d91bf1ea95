"""Chat servers on loopback that reply by a rule, and what the tests of judges ask of them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.endpoint import EndpointJudge

HAPPY = ["I am happy, what a day!", "So happy today.", "We were happy there."]
SAD = ["I cried all day.", "It was grey and cold.", "Nobody came."]


def against(mine: list[str], theirs: list[str]) -> list[Answer]:
    return [Answer(Question("How was it?"), text, {}, other) for text, other in zip(mine, theirs, strict=True)]


def alone(texts: list[str]) -> list[Answer]:
    return [Answer(Question("How was it?"), text) for text in texts]


def make_judge(folder: Path, url: str, **changes: Any) -> EndpointJudge:
    """A judge of pairs without patience and without a bar; keywords change the settings."""
    settings = {"cache": folder / "judge.jsonl", "retries": 0, "progress": False, "pairs": True, **changes}
    return EndpointJudge(url, settings.pop("model", "someone"), "sounds happy", **settings)


class Requests(list[dict[str, Any]]):
    """Bodies of the requests that came, with their headers."""

    url = ""


@contextmanager
def serving(
    rule: Callable[[Requests], Any], usage: bool = True, headers: Mapping[str, str] | None = None
) -> Iterator[Requests]:
    """A server whose replies follow a rule: from the requests so far to a text, or to (status, body)."""
    came, lock = Requests(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                came.append({**body, "key": self.headers["authorization"], "headers": dict(self.headers)})
                said = rule(came)
            status, content = said if isinstance(said, tuple) else (200, completion(said, usage))
            self.send_response(status)
            self.send_header("content-type", "application/json" if isinstance(content, dict) else "text/html")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that lost patience
                self.wfile.write(json.dumps(content).encode() if isinstance(content, dict) else content.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    came.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield came
    finally:
        server.shutdown()
        server.server_close()


def completion(reply: str, usage: bool) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
    told = {"usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}} if usage else {}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "someone", "choices": [choice], **told}


def by_sense(came: Requests) -> str:
    """The answer that has "happy" in it, else a tie."""
    a, b = re.findall(r"<answer_.>\n(.*)\n</answer_.>", came[-1]["messages"][0]["content"])
    return "T" if ("happy" in a) == ("happy" in b) else "**A**" if "happy" in a else "Answer: B."
