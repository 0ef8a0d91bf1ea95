"""Writes the reference of a behaviour's file from the code's types: behaviour.md and behaviour.schema.json."""

from __future__ import annotations

import json
from pathlib import Path

from rt_lens.common.files import write_atomically
from rt_lens.experiment.config import behaviour_schema
from rt_lens.experiment.toml_types import reference

HERE = Path(__file__).parent


def pages() -> dict[Path, str]:
    """File -> text."""
    schema = behaviour_schema()
    return {
        HERE / "behaviour.schema.json": json.dumps(schema, indent=1, ensure_ascii=False) + "\n",
        HERE / "behaviour.md": reference(schema),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        write_atomically(path, text.encode())
