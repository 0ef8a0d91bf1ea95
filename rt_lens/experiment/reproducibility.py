"""What a run must remember so that it can be made again: the command, the file it read, every setting."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rt_lens.data.builtin import behaviour_file, behaviours, data_path
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.results.writing import plain


def recorded(experiment: Experiment, source: str | Path | None) -> dict[str, Any]:
    """The entry `again` of results.json (see `rt_lens.results.schema`).

    A file is recorded only if reading it gives this very experiment: one that was changed in Python, or whose file was
    edited since, has its settings alone. Of paths only the last part is kept.

    Args:
        experiment: as it runs.
        source: what `load_experiment` was given; None looks for a shipped behaviour that is the same.

    Raises:
        ValueError: if the source is neither a shipped behaviour nor a file.
    """
    found = {"command": None, "call": None, "file": None, "toml": None, "sha256": None, "settings": _told(experiment)}
    if source is None and experiment.name not in behaviours():
        return found
    file = behaviour_file(experiment.name if source is None else source)
    text = file.read_text(encoding="utf-8-sig")
    as_read = load_experiment(file, permissions=experiment.permissions)
    said = {name: getattr(experiment, name) for name in ("model", "dtype", "chat_template_kwargs")}
    if replace(as_read, **said) != experiment:
        return found
    shipped = file.stem in behaviours() and file == data_path(f"behaviours/{file.stem}.toml")
    name = file.stem if shipped else file.name
    changed = {name: value for name, value in said.items() if value != getattr(as_read, name)}
    if "model" in changed:
        changed["model"] = _last(experiment.model)
    options = [
        part
        for name, value in changed.items()
        for part in (f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value))
    ]
    arguments = "".join(f", {name}={value!r}" for name, value in changed.items())
    return found | {
        "command": shlex.join(["rt-lens", "run", name, *options]),
        "call": f"run_experiment(load_experiment({name!r}{arguments}), Path('runs/again'))",
        "file": file.name,
        "toml": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _told(experiment: Experiment) -> dict[str, Any]:
    """Every setting; of the pairs, which may be a hundred thousand, their number."""
    settings = {
        entry.name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for entry in fields(experiment)
        if (value := getattr(experiment, entry.name)) is not experiment.pairs and entry.name != "permissions"
    }
    pairs = {"n": len(experiment.pairs), "topics": len(experiment.pairs.topics)}
    return plain(settings | {"model": _last(experiment.model), "pairs": pairs})


def _last(model: str) -> str:
    """A hub's or embedded name as it is, of a folder or file its name."""
    return Path(model).name if Path(model).expanduser().exists() else model
