"""Records what repeats a run: the command, the file that was read, every setting."""

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
    """The entry `reproducibility` of results.json (see `rt_lens.results.schema`).

    The file is recorded only if reading it gives exactly this experiment. If the experiment was changed in Python, or
    the file was edited since, only the settings are recorded. Only the last part of a path is kept.

    Args:
        experiment: the experiment that runs.
        source: the argument of `load_experiment`; None looks for an equal built-in behaviour.

    Raises:
        ValueError: if the source is neither a built-in behaviour nor a file.

    Example:
        >>> from rt_lens.experiment.reproducibility import recorded
        >>> recorded(load_experiment("mood", dtype="bfloat16"), "mood")["command"]
        'rt-lens run mood --dtype bfloat16'
    """
    settings_alone = {
        **dict.fromkeys(("command", "call", "file", "toml", "sha256")), "settings": settings_of(experiment)
    }  # fmt: skip
    if source is None and experiment.name not in behaviours():
        return settings_alone
    file = behaviour_file(experiment.name if source is None else source)
    text = file.read_text(encoding="utf-8-sig")
    as_read = load_experiment(file, permissions=experiment.permissions)
    overrides = {name: getattr(experiment, name) for name in ("model", "dtype", "chat_template_kwargs")}
    trials = experiment.search.trials
    if replace(as_read, **overrides, search=replace(as_read.search, trials=trials)) != experiment:
        return settings_alone
    builtin = file.stem in behaviours() and file == data_path(f"behaviours/{file.stem}.toml")
    name = file.stem if builtin else file.name
    overrides = {name: value for name, value in overrides.items() if value != getattr(as_read, name)}
    if "model" in overrides:
        overrides["model"] = _last(experiment.model)
    if trials != as_read.search.trials:
        overrides["search"] = trials
    options = [
        part
        for name, value in overrides.items()
        for part in (f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value))
    ]
    arguments = "".join(f", {name}={value!r}" for name, value in overrides.items())
    return settings_alone | {
        "command": shlex.join(["rt-lens", "run", name, *options]),
        "call": f"run_experiment(load_experiment({name!r}{arguments}), Path('runs/repeated'))",
        "file": file.name,
        "toml": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """Every setting that a number depends on; for the pairs, which can be a hundred thousand, only their number."""
    settings = {
        entry.name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for entry in fields(experiment)
        if (value := getattr(experiment, entry.name)) is not experiment.pairs
        and entry.name not in ("permissions", "report")
    }
    pairs = {"n": len(experiment.pairs), "topics": len(experiment.pairs.topics)}
    return plain(settings | {"model": _last(experiment.model), "pairs": pairs})


def _last(model: str) -> str:
    """The name of a hub or bundled model; for a folder or file only the last part of its path."""
    return Path(model).name if Path(model).expanduser().exists() else model
