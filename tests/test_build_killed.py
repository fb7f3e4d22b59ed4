"""A build or append that is killed anywhere is invisible, and the same call ends with the same bytes."""

import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def points(what: str, folder: pathlib.Path, every: int) -> list[dict]:
    run = subprocess.run(
        [sys.executable, HERE / "kill_points.py", what, folder, str(every)],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(lines: list[dict], at_least: int) -> None:
    *killed, whole = lines
    assert whole["same"] and whole["points"] > at_least
    for line in killed:
        assert line["status"] == 0 and line["same"], line
        assert line["old"] != line["visible"], line  # the old state or the new one, never anything else
    where = {line["where"] for line in killed}
    assert {"in a write"} < where and len(where) > 4, where


@pytest.mark.parametrize("what", ["build", "append"])
def test_killed_here_and_there(tmp_path, what):
    check(points(what, tmp_path, 23), 100)


@pytest.mark.full
@pytest.mark.parametrize("what", ["build", "append"])
def test_killed_at_every_point(tmp_path, what):
    lines = points(what, tmp_path, 1)
    check(lines, 100)
    assert any(line["visible"] for line in lines[:-1])  # also between the commit and the end
    where = {line["where"] for line in lines[:-1]}
    for task in ("write_part", "write_fragment", "rename", "replace", "rmtree"):
        assert {f"before {task}", f"after {task}"} <= where
