"""How to reproduce a run: the command, the settings file, the machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from rt_lens.apps.report.markup import Part, folded, table

_IMPORTS = "from pathlib import Path\nfrom rt_lens.experiment import load_experiment, run_experiment\n\n"


def repeat(results: Mapping[str, Any]) -> Part:
    """The part of the page that says how to reproduce this run, as far as the run recorded it."""
    return Part("Reproducing this run", _command(results.get("reproducibility")) + _machine(results))


def _command(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "<p>The command is not recorded: this run was made by an older version of rt_lens.</p>"
    settings = folded("All settings of the run", _code("Settings", json.dumps(record["settings"], indent=1)))
    if record["command"] is None:
        return (
            "<p>No command reproduces this run: its settings come from Python, and no file has them. They are listed "
            f"below, and under <code>reproducibility</code> in results.json.</p>{settings}"
        )
    own_file = record["file"] if shlex.split(record["command"])[2].endswith(".toml") else None
    first = f"<p>Save the settings below as <code>{escape(own_file)}</code>, then run:</p>" if own_file else ""
    heading = f"The file {record['file']} (SHA-256 {record['sha256']})"
    return (
        f"{first}{_code('Command', record['command'])}"
        f"<p>The same in Python:</p>{_code('Python', _IMPORTS + record['call'])}"
        f"{folded(heading, _code('Settings file', record['toml']))}{settings}"
    )


def _machine(results: Mapping[str, Any]) -> str:
    seeds = sorted({seed for row in results["summary"] for seed in row["seeds"]})
    rows = [
        ["model", results["model"]],
        ["protocol", results["protocol"]["name"]],
        ["seed", str(results["seed"])],
        ["seeds of the arms", ", ".join(map(str, seeds))],
    ]
    rows += [[_version_label(name), str(version)] for name, version in results["versions"].items()]
    rows += [[f"seconds for {stage}", f"{seconds:.1f}"] for stage, seconds in results["seconds"].items()]
    note = (
        "<p>The same seeds, versions and threads on the same machine give the same numbers. On another machine the "
        "last digits can differ, and a response that depends on them can be a different one.</p>"
    )
    return note + table("settings and versions of the run", ("setting", "value"), rows)


def _version_label(name: str) -> str:
    return name if name == "threads" else f"version of {name}"


def _code(label: str, text: str) -> str:
    return f'<pre tabindex="0" role="region" aria-label="{label}"><code>{escape(text)}</code></pre>'
