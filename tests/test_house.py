"""The design's rule of rooms, read from the imports themselves."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scjax"
# A room imports only from rooms of an earlier line (or from itself).
ORDER = [
    {"types", "config"},
    {"launch"},
    {"genes"},
    {"corpus"},
    {"loader"},
    {"parallel"},
    {"encoding"},
    {"nn"},
    {"objectives"},
    {"models"},
    {"train"},
    {"finetune"},
    {"interop"},
    {"datasets"},
    {"api"},
    {"reference"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
WITHOUT_JAX = ["genes", "corpus", "loader", "datasets", "eval", "types", "config", "launch"]


def imports_of(file: Path):
    """(room, line) of every import of scjax in a file, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "scjax":
                names = [f"scjax.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{file}:{node.lineno} is a relative import")
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "scjax" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1], node.lineno


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_floor():
    rooms = {room_of(f) for f in PACKAGE.rglob("*.py")} - {"__init__", "eval"}
    assert rooms == set(FLOOR)


def test_rooms_import_only_from_rooms_above():
    wrong = [
        f"{file.relative_to(PACKAGE)}:{line} imports scjax.{room}"
        for file in PACKAGE.rglob("*.py")
        if (here := room_of(file)) not in ("__init__", "eval")
        for room, line in imports_of(file)
        if room != here and FLOOR.get(room, 99) >= FLOOR[here] and not (here == "cli" and room == "eval")
    ]
    assert not wrong, "\n".join(wrong)


def test_eval_stands_apart():
    wrong = [
        f"{file.relative_to(PACKAGE)}:{line} imports scjax.{room}"
        for file in (PACKAGE / "eval").rglob("*.py")
        for room, line in imports_of(file)
        if room != "eval"
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_the_host_import_no_jax():
    """In a fresh interpreter. Grain, which the loader stands on, is imported when a loader is iterated."""
    code = "import sys\n" + "\n".join(f"import scjax.{room}" for room in WITHOUT_JAX)
    code += "\nbad = {'jax', 'flax', 'optax', 'torch'} & set(sys.modules)\nassert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=300)


def test_files_are_short():
    long = {
        str(f.relative_to(PACKAGE)): n
        for f in PACKAGE.rglob("*.py")
        if (n := len(f.read_text().splitlines())) > 480
    }
    assert not long, f"the design asks for files of about 400 lines at most: {long}"
