"""How to do it again: the command, the settings file, the machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from rt_lens.apps.report.markup import Part, folded, table

_IMPORTS = "from pathlib import Path\nfrom rt_lens.experiment import load_experiment, run_experiment\n\n"


def again(results: Mapping[str, Any]) -> Part:
    """What a reader types to make this run again, as far as the run has written it down."""
    return Part("How to do it again", _command(results.get("again")) + _machine(results))


def _command(made: Mapping[str, Any] | None) -> str:
    if made is None:
        return "<p>The command is not recorded: this run was made by an older version of rt_lens.</p>"
    settings = folded("All settings, as they ran", _code("Settings", json.dumps(made["settings"], indent=1)))
    if made["command"] is None:
        return (
            "<p>No command makes this run again: its settings came from Python and are those of no file. They stand "
            f"below, and under <code>again</code> in results.json.</p>{settings}"
        )
    own = made["file"] if shlex.split(made["command"])[2].endswith(".toml") else None
    first = f"<p>Save the settings below as <code>{escape(own)}</code>, then:</p>" if own else ""
    told = f"The file {made['file']} (SHA-256 {made['sha256']})"
    return (
        f"{first}{_code('Command', made['command'])}"
        f"<p>The same from Python:</p>{_code('Python', _IMPORTS + made['call'])}"
        f"{folded(told, _code('Settings file', made['toml']))}{settings}"
    )


def _machine(results: Mapping[str, Any]) -> str:
    seeds = sorted({seed for row in results["summary"] for seed in row["seeds"]})
    rows = [
        ["model", results["model"]],
        ["protocol", results["protocol"]["name"]],
        ["seed", str(results["seed"])],
        ["seeds of the arms", ", ".join(map(str, seeds))],
    ]
    rows += [[_named(name), str(version)] for name, version in results["versions"].items()]
    rows += [[f"seconds for {stage}", f"{seconds:.1f}"] for stage, seconds in results["seconds"].items()]
    note = (
        "<p>With the same seeds, versions and threads on the same machine the numbers come out the same; elsewhere "
        "they may differ in the last digits, and an answer that hangs on them may differ whole.</p>"
    )
    return note + table("what it was made with", ("what", "value"), rows)


def _named(name: str) -> str:
    return name if name == "threads" else f"version of {name}"


def _code(label: str, text: str) -> str:
    return f'<pre tabindex="0" role="region" aria-label="{label}"><code>{escape(text)}</code></pre>'
