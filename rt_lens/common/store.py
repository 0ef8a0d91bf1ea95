"""Finished parts of a long computation in a JSON file, so that an interrupted one resumes where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rt_lens.common.files import lock_of, write_atomically

_SCHEMA = 3


class Store:
    """Parts by key, in memory and, given a path, on disk after each.

    Two processes may share a file: each takes the file's lock and the other's parts before it writes.

    Args:
        path: JSON file; None keeps the parts in memory only.
        settings: JSON values that say what is computed; a file with other settings is refused.
        kind: what is computed (`sweep`), for messages.

    Raises:
        ValueError: if the file holds something else, or the same with other settings.

    Example:
        >>> store = Store(Path("sweep.json"), {"model": "tiny", "seed": 0}, kind="sweep")
        >>> store.keep("layer 3", [0.1, 0.2])
        >>> Store(Path("sweep.json"), {"model": "tiny", "seed": 0}, kind="sweep").get("layer 3")
        [0.1, 0.2]
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, kind: str) -> None:
        self.path, self.kind = path, kind
        self.settings = json.loads(json.dumps(settings))
        self.parts: dict[str, Any] = {}
        if path is not None:
            with lock_of(path):
                self._read()

    def __contains__(self, key: str) -> bool:
        return key in self.parts

    def get(self, key: str) -> Any:
        """The part of this key; None if it is not there."""
        return self.parts.get(key)

    def keep(self, key: str, part: Any) -> None:
        """Adds a finished part, and writes the file."""
        self.parts[key] = part
        if self.path is None:
            return
        with lock_of(self.path):
            self._read()
            self._write()

    def remove(self) -> None:
        """Deletes the file, when the whole is finished and stands elsewhere."""
        if self.path is not None:
            with lock_of(self.path):
                self.path.unlink(missing_ok=True)

    @classmethod
    def of_older(cls, path: Path, settings: Mapping[str, Any], parts: Mapping[str, Any], *, kind: str) -> Store:
        """A store with the parts of a file of another format, which the caller has read and checked; overwrites it."""
        store = cls(None, settings, kind=kind)
        store.path, store.parts = path, dict(parts)
        store._write()
        return store

    def _write(self) -> None:
        assert self.path is not None
        content = {"schema": _SCHEMA, "kind": self.kind, "settings": self.settings, "parts": self.parts}
        write_atomically(self.path, json.dumps(content).encode())

    def _read(self) -> None:
        assert self.path is not None
        if not self.path.exists():
            return
        stored = read_parts(self.path, self.kind)
        differing = sorted(
            name for name in self.settings | stored["settings"]
            if self.settings.get(name) != stored["settings"].get(name)
        )  # fmt: skip
        if differing:
            raise ValueError(
                f"path must be the file of a {self.kind} with the same settings, got {self.path} with other "
                f"{', '.join(differing)}. Choose a different name, or remove the file."
            )
        self.parts = {**stored["parts"], **self.parts}


def read_parts(path: Path, kind: str) -> dict[str, Any]:
    """What a store wrote: its `settings` and `parts`.

    Raises:
        ValueError: if the file is not a store of this kind.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["schema"] == _SCHEMA and stored["kind"] == kind:
            return {"settings": dict(stored["settings"]), "parts": dict(stored["parts"])}
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(
        f"path must be the file of a {kind}, got {path}, which is none. Choose a different name, or remove it."
    )
