"""The code of the README and of the guide runs, block after block, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

import rt_lens as rtl

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("as_a_user")
def test_the_readme_and_the_guide_run_one_after_the_other(monkeypatch, tmp_path, capsys):
    """In one session: the guide goes on from the README's block, and leaves no hook and no changed weight behind."""
    opened: list[Any] = []
    dashboard = rtl.dashboard
    monkeypatch.setattr(
        rtl, "dashboard", lambda *given, **more: opened.append(dashboard(*given, **more)), raising=False
    )
    monkeypatch.setattr(go.Figure, "show", lambda figure, *_, **__: figure.to_json())
    monkeypatch.chdir(tmp_path)
    code = [*blocks("README.md"), *blocks("notebooks/README.md")]
    assert len(code) == 7
    session: dict[str, Any] = {}
    try:
        for number, block in enumerate(code):
            exec(compile(block, f"block {number}", "exec"), session)
    finally:
        for board in opened:
            board.stop()
    assert len(opened) == 1
    assert "Interval(" in capsys.readouterr().out
    model = session["model"]
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
