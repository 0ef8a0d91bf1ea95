"""Vectors and deltas on a hub: a stub of its API on loopback, to which huggingface_hub itself speaks."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch

from rt_lens.tuning import from_hub, push_to_hub
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.export.hub import hub_card
from rt_lens.vectors.steering_vectors import SteeringVectors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(refuses: int | None = None):
    """Address of a hub, and what it holds: repository -> file -> bytes."""
    repositories: dict[str, dict[str, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def _send(self, content=b"", status=200, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"content-length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self):
            raw, path = self.rfile.read(int(self.headers.get("content-length", 0))), urlsplit(self.path).path
            if refuses is not None:
                return self._send({"error": "not yours"}, refuses)
            if path == "/api/validate-yaml":
                return self._send({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                asked = json.loads(raw)
                name = "/".join(part for part in (asked.get("organization") or "me", asked["name"]) if part)
                repositories.setdefault(name, {})
                return self._send({"url": f"{url}/{name}", "name": name, "id": name})
            name = "/".join(path.split("/")[3:5])
            if "/preupload/" in path:
                files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for each in json.loads(raw)["files"]]  # fmt: skip
                return self._send({"files": files})
            for line in raw.splitlines():
                entry = json.loads(line)
                if entry["key"] == "deletedFile":
                    repositories[name].pop(entry["value"]["path"], None)
                if entry["key"] == "file":
                    repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._send(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{url}/{name}/commit/{COMMIT}",
                    "pullRequestUrl": None,
                }
            )

        def do_GET(self):
            if refuses is not None:
                return self._send({"error": "not yours"}, refuses)
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[0] == "api" and "tree" in parts:
                held = repositories.get("/".join(parts[2:4]), {})
                return self._send([{"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                                   for path, data in held.items()])  # fmt: skip
            if parts[0] == "api":
                return self._send({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []})
            name, file = "/".join(parts[:2]), parts[-1]
            held = repositories.get(name, {})
            if file not in held:
                missing = "RepoNotFound" if name not in repositories else "EntryNotFound"
                return self._send(b"", 404, x_error_code=missing)
            return self._send(held[file], etag=f'"{COMMIT}"', x_repo_commit=COMMIT, accept_ranges="bytes")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield url, repositories
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")


def test_vectors_come_back_as_they_were_with_a_card_that_says_what_they_are(tiny_vectors):
    with hub() as (url, repositories):
        assert push_to_hub(tiny_vectors, "me/mood", endpoint=url).endswith(COMMIT)
        assert set(repositories["me/mood"]) == {"README.md", "steering_vectors.safetensors"}
        back = from_hub("me/mood", endpoint=url)
    assert isinstance(back, SteeringVectors)
    assert back.provenance == tiny_vectors.provenance
    for name, vector in tiny_vectors.vectors.items():
        assert torch.equal(back[name], vector)
    card = repositories["me/mood"]["README.md"].decode()
    assert "library_name: rt_lens" in card
    assert "| behaviour | mood |" in card
    assert 'rtl.tuning.from_hub("me/mood")' in card


def test_a_delta_comes_back_as_it_was():
    delta = WeightDelta({"blocks.1.mlp.W_in": torch.randn(4, 8)}, "tiny", {"direction": "away"},
                        [{"step": 7, "split": "train", "total": 1.0}], "float32")  # fmt: skip
    with hub() as (url, repositories):
        push_to_hub(delta, "me/sad", endpoint=url)
        back = from_hub("me/sad", endpoint=url)
    assert isinstance(back, WeightDelta)
    assert torch.equal(back.changes["blocks.1.mlp.W_in"], delta.changes["blocks.1.mlp.W_in"])
    assert (back.model, back.config, back.history) == (delta.model, delta.config, delta.history)
    assert "| steps | 7 |" in repositories["me/sad"]["README.md"].decode()


def test_a_repository_holds_what_was_pushed_last(tiny_vectors):
    delta = WeightDelta({"blocks.1.mlp.W_in": torch.randn(4, 8)}, "tiny", {}, [], "float32")
    with hub() as (url, repositories):
        push_to_hub(tiny_vectors, "me/both", endpoint=url)
        push_to_hub(delta, "me/both", endpoint=url)
        assert set(repositories["me/both"]) == {"README.md", "weight_delta.safetensors"}
        assert isinstance(from_hub("me/both", endpoint=url), WeightDelta)


def test_a_hub_that_does_not_answer_is_said_to(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="repo_id must be a repository that can be reached, got me/mood"):
        from_hub("me/mood")


def test_what_is_not_there_or_not_allowed_is_said(tiny_vectors):
    with hub() as (url, repositories):
        repositories["me/empty"] = {}
        with pytest.raises(
            ValueError, match=r"with steering_vectors.safetensors or weight_delta.safetensors, got me/empty"
        ):
            from_hub("me/empty", endpoint=url)
        with pytest.raises(ValueError, match="repo_id must be a repository that the hub gives you, got 'me/nowhere'"):
            from_hub("me/nowhere", endpoint=url)
        repositories["me/bad"] = {"steering_vectors.safetensors": b"no tensors"}
        with pytest.raises(ValueError, match="must be"):
            from_hub("me/bad", endpoint=url)
    with (
        hub(refuses=401) as (url, _),
        pytest.raises(ValueError, match="repository that the hub gives you, got 'me/mood'"),
    ):
        push_to_hub(tiny_vectors, "me/mood", endpoint=url)


@pytest.mark.usefixtures("as_a_user")
def test_other_things_are_refused_before_any_request():
    with pytest.raises(ValueError, match="item must be SteeringVectors or a WeightDelta, got a str"):
        push_to_hub("vectors.safetensors", "me/mood")


def test_a_card_shows_names_from_elsewhere_as_text(provenance):
    from dataclasses import replace

    hostile = replace(provenance, behaviour="a | b\n<script>")
    card = hub_card(SteeringVectors({"blocks.0.hook_resid_post": torch.ones(4)}, hostile), "me/x")
    assert "| behaviour | a \\| b &lt;script> |" in card
