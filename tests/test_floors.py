"""Which room may import which, read from the source: a room imports only from floors below its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rt_lens"

ORDER = [
    "common", "plots", "models", "data", "vectors", "steering", "tuning", "evaluation", "arms", "results", "experiment",
    "apps",
]  # fmt: skip
"""The rooms, from the ground up: a room imports only from rooms before it in this list."""

WALLS = {"evaluation": {"steering", "tuning"}, "plots": set(ORDER) - {"common"}}
"""Rooms that some rooms may not import although they come before."""

FLOOR_OF = {room: floor for floor, room in enumerate(ORDER)}
FRONT_DOOR = "__init__"


def room_of(file: Path) -> str:
    """A file's room: its own name, or the folder's for a room that has grown into one."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str, package: str) -> set[str]:
    """Rooms of rt_lens that a source imports, at its top or inside functions; `package` is where its dots start."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from rt_lens import plots` names a room; `from rt_lens import load_model` goes through the front door.
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "rt_lens" else [module]
        for name in modules:
            top, _, rest = name.partition(".")
            if top == "rt_lens":
                room = rest.partition(".")[0]
                rooms.add(room if room in FLOOR_OF else FRONT_DOOR)
    return rooms


def faults_of(room: str, imported: set[str]) -> list[str]:
    """Rules that a room's imports break; the front door may open on any room."""
    faults: list[str] = []
    if room == FRONT_DOOR:
        return faults
    for other in sorted(imported - {room}):
        if other == FRONT_DOOR:
            faults.append(f"{room} imports rt_lens itself; name the room")
        elif other in WALLS.get(room, ()):
            faults.append(f"{room} imports {other}, and there is a wall between them")
        elif FLOOR_OF[other] >= FLOOR_OF[room]:
            faults.append(f"{room} imports {other}, which stands above it")
    return faults


def built_models(source: str) -> list[str]:
    """Calls in a source that build a HookedTransformer or a TransformerBridge."""
    kinds = {"HookedTransformer", "TransformerBridge"}
    built = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            last, owner = call.split(".")[-1], call.split(".")[-2:-1]
            loads = last == "from_pretrained" and owner and owner[0] in kinds
            if last in kinds or last in {"from_pretrained_no_processing", "boot_transformers"} or loads:
                built.append(f"line {node.lineno}: {call}(...)")
    return built


FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_rooms_are_those_of_the_list():
    assert {*ORDER} == {room_of(file) for file in FILES} - {FRONT_DOOR}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_rooms_import_only_from_floors_below(file):
    room = room_of(file)
    assert room in FLOOR_OF or room == FRONT_DOOR, f"{room} is on no floor: add it to ORDER in {Path(__file__).name}"
    package = ".".join(["rt_lens", *file.relative_to(PACKAGE).parts[:-1]])
    assert not faults_of(room, imported_rooms(file.read_text(), package))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_room_models_builds_models(file):
    if room_of(file) == "models":
        return
    assert not built_models(file.read_text())


def test_the_room_models_does_build_them():
    calls = " ".join(call for file in FILES if room_of(file) == "models" for call in built_models(file.read_text()))
    assert "HookedTransformer(" in calls
    assert "boot_transformers(" in calls


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("data", "from rt_lens.vectors import SteeringVectors"),
        ("steering", "import rt_lens.tuning"),
        ("tuning", "def f():\n    from rt_lens import sweeping"),
        ("plots", "from rt_lens.tuning import cosine_loss"),
        ("evaluation", "from rt_lens.steering import add"),
        ("results", "from .apps import cli"),
        ("models", "from ..steering import add"),
        ("experiment", "from rt_lens import load_model"),
    ],
)
def test_the_check_finds_an_import_that_goes_up(room, source):
    package = "rt_lens.models" if room == "models" else "rt_lens"
    assert faults_of(room, imported_rooms(source, package))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("steering", "from rt_lens.vectors.steering_vectors import SteeringVectors\nimport torch"),
        ("models", "from .registry import BUNDLED_MODELS"),
        ("models", "from rt_lens.models.registry import BUNDLED_MODELS"),
        ("apps", "from rt_lens import plots"),
    ],
)
def test_the_check_lets_an_import_that_goes_down_pass(room, source):
    imported = imported_rooms(source, "rt_lens.models" if room == "models" else "rt_lens")
    assert imported
    assert not faults_of(room, imported)


@pytest.mark.parametrize(
    "source",
    [
        "HookedTransformer(cfg)",
        "transformer_lens.HookedTransformer.from_pretrained('gpt2')",
        "HookedTransformer.from_pretrained_no_processing('gpt2')",
        "TransformerBridge.boot_transformers('gpt2')",
    ],
)
def test_the_check_finds_a_model_being_built(source):
    assert built_models(source)
    assert not built_models("isinstance(model, HookedTransformer)\nAutoTokenizer.from_pretrained('gpt2')")
