"""`scjax runs`: what is said of runs that go on, ended, died or never were; the page of their curves."""

from __future__ import annotations

import base64
import datetime
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scjax.cli import run_page
from scjax.cli.main import main
from scjax.cli.runs import find_runs, read_state
from scjax.launch.capture import capture


def at(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(time.time() + seconds, datetime.UTC).isoformat()


def make_run(path: Path, lines=(), config=None, **status) -> Path:
    """A run directory as training leaves it."""
    path.mkdir(parents=True)
    (path / "model.json").write_text(json.dumps({"system": "scgpt", "scjax": "0.1.0", "corpus": "abc"}))
    (path / "config.json").write_text(json.dumps(config or {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status:
        about = {"state": "running", "step": 3, "steps": 10, "updated": at(0), "host": socket.gethostname()}
        (path / "status.json").write_text(json.dumps(about | {"pid": os.getpid()} | status))
    return path


def intervals(n: int, scale: float = 1.0):
    """Lines of a log: training every 10 steps, a validation every 50."""
    for step in range(10, 10 * n + 1, 10):
        loss = scale / np.sqrt(step)
        yield {
            "step": step, "train/loss": loss, "train/masked_mse": loss, "train/gene_mean_mse": scale / 2,
            "train/grad_norm": 10 * loss, "train/learning_rate": 1e-3,
            "time/step": 2.0, "time/input_wait": 0.1,
            "throughput/cells_per_second": 1e3, "throughput/mfu": 0.4, "throughput/goodput": 0.9,
        }  # fmt: skip
        if step % 50 == 0:
            yield {"step": step, "validation/loss": 1.1 * loss, "validation/masked_mse": 1.1 * loss}
            yield {"step": step, "probe/knn_macro_f1": 0.5, "probe/effective_rank": None}


# ----------------------------------------------------------------------------------------- state


def test_states(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    elsewhere = {"host": "another", "pid": 1}
    cases = {
        "running": {},
        "killed": {"pid": gone.pid},
        "reused": {"updated": at(-30 * 86400), "pid": os.getpid()},  # the number of a process started since
        "far": elsewhere,
        "lost": elsewhere | {"updated": at(-2 * 3600)},
        "finished": {"state": "finished", "pid": gone.pid},
        "preempted": {"state": "preempted", "pid": gone.pid},
        "failed": {"state": "failed", "error": "OSError: no space"},
    }
    states = {
        name: read_state(make_run(tmp_path / name, **{"step": 3} | of)).state for name, of in cases.items()
    }
    same = {name: name for name in ("running", "killed", "finished", "preempted", "failed")}
    assert states == same | {"reused": "killed", "far": "running", "lost": "silent"}
    assert read_state(make_run(tmp_path / "old", [{"step": 7}])).state == ""


def test_the_last_metrics_are_read_from_the_end(tmp_path):
    path = make_run(tmp_path / "run", [{"step": 0, "probe/knn_macro_f1": 0.1}, *intervals(5000)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50010, "train/loss": 9')  # being written
    assert (path / "metrics.jsonl").stat().st_size > 2**20
    state = read_state(path)
    assert state.step == 50_000 and state.last["train/loss"] == 1 / np.sqrt(50_000)
    assert state.last["probe/knn_macro_f1"] == 0.5 and "probe/effective_rank" not in state.last
    for content in ("", "{", "[3]"):
        (path / "status.json").write_text(content)
        assert read_state(path).state == ""


def test_runs_are_found_and_corpora_are_not_searched(tmp_path):
    runs = ["a", "b", "sweep/lr=1e-3", "sweep/lr=1e-4"]
    for name in (*reversed(runs), "a/checkpoints/inside", "corpus/parts/x", ".hidden/x"):
        make_run(tmp_path / name, step=1)
    (tmp_path / "corpus" / "manifests").mkdir()
    imported = make_run(tmp_path / "imported")
    (imported / "metrics.jsonl").unlink()  # a model, not a run
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == runs
    assert list(find_runs(tmp_path / "a")) == [tmp_path / "a"]
    with pytest.raises(FileNotFoundError, match="imported is not the directory of a run that has begun"):
        read_state(imported)


# ---------------------------------------------------------------------------------- list and page


def test_the_list(tmp_path, capsys):
    make_run(tmp_path / "good", intervals(5), state="finished", steps=1500, updated=at(-2.2 * 3600))
    make_run(tmp_path / "bad[1]", state="failed", error="NonFiniteLoss: step 3: loss nan [bad]")
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    good = next(line for line in shown.splitlines() if " good " in line)
    numbers = ["50/1,500", "0.1414", "0.1556", "1,000", "40.0%", "90.0%"]
    assert good.split() == ["good", "finished", *numbers, "2", "h", "ago"]
    assert re.search(r"bad\[1\] +failed +3/10", shown)
    assert "bad[1]: NonFiniteLoss: step 3: loss nan [bad]" in shown

    good, bad = str(tmp_path / "good"), str(tmp_path / "bad[1]")
    for arguments, told in (
        ([str(tmp_path / "none")], "not a directory"),
        ([good + "/checkpoints"], "not a directory"),
        (["report", str(tmp_path)], "not the directory of a run"),
        (["report", good, bad], "--out FILE.html"),
        (["report", good, good, "--out", "x.html"], "named twice"),
    ):
        assert main(["runs", *arguments]) == 2
        assert told in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 2
    assert "no runs in" in capsys.readouterr().err


def test_no_jax_for_runs(tmp_path):
    make_run(tmp_path / "run", intervals(20), step=200)
    code = (
        "import sys; from scjax.cli.main import main\n"
        "assert main(['runs', sys.argv[1]]) == 0 and not {'numpy', 'anndata'} & set(sys.modules)\n"
        "assert main(['runs', 'report', sys.argv[1] + '/run']) == 0\n"
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    assert (tmp_path / "run" / "run.html").exists()


def pictures(page: Path) -> dict[str, str]:
    """Heading -> the SVG below it."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"', page.read_text())
    return {heading: base64.b64decode(data).decode() for heading, data in found}


def test_the_page_of_a_run(tmp_path):
    lines = [
        *intervals(30),
        {"step": 300, "time/checkpoint": 3.0, "time/step": 1.0, "train/skipped_total": 2},
    ]
    run = make_run(
        tmp_path / "run", lines, {"train": {"steps": 300, "guard": {}}, "a<b": "<script>"}, step=300
    )
    assert main(["runs", "report", str(run)]) == 0
    text = (run / "run.html").read_text()
    shown = pictures(run / "run.html")
    assert list(shown) == ["Losses", "Probes", "Optimisation", "Pace", "Where the time went"]
    assert all(svg.rstrip().endswith("</svg>") for svg in shown.values())
    assert "<script>" not in text and "&lt;script&gt;" in text and "<h1>Run run</h1>" in text
    assert "<dt>train.steps</dt><dd>300</dd>" in text and "What is different" not in text
    assert "<dt>command</dt>" not in text  # nobody wrote it down
    waited, saved = 30 * 0.1, 3.0
    for what in (waited, saved):
        assert f"<td>{what / (30 * 2 + 1 + waited + saved):.1%}</td>" in text
    assert not list(run.glob(".*"))

    bare = make_run(tmp_path / "bare", state="failed", error="ValueError: <no>", step=0)
    assert main(["runs", "report", str(bare)]) == 0
    text = (bare / "run.html").read_text()
    assert "ValueError: &lt;no&gt;" in text and not pictures(bare / "run.html")


def test_the_page_tells_how_a_run_was_started(tmp_path):
    run = make_run(tmp_path / "run", intervals(3), step=30)
    capture(run)
    (run / "metrics.jsonl").unlink()  # has only begun
    assert main(["runs", "report", str(run)]) == 0
    text = (run / "run.html").read_text()
    assert f"<dt>versions</dt><dd>Python {platform.python_version()}, scjax" in text
    assert re.search("<dt>command</dt><dd>.*python", text)
    for content in ("[]", "{}", "[{}]"):
        (run / "environment.json").write_text(content)
        assert main(["runs", "report", str(run)]) == 0


def test_the_page_of_several_runs(tmp_path):
    runs = [
        make_run(tmp_path / "sweep" / str(i), intervals(8, i), {"optimizer": {"lr": i, "b1": 0.9}}, step=80)
        for i in (1, 2, 3)
    ]
    page = tmp_path / "pages" / "sweep.html"
    assert main(["runs", "report", *map(str, runs), "--out", str(page)]) == 0
    text = page.read_text()
    assert "<h1>3 runs</h1>" in text and "Where the time went" not in text
    assert "<tr><td>optimizer.lr</td><td>1</td><td>2</td><td>3</td></tr>" in text and "b1" not in text
    colours = re.findall(r'class="dot" style="background: (#\w+)"', text)
    assert len(set(colours)) == 3
    assert all(colour in pictures(page)["Losses"] for colour in colours)


def test_long_curves_are_thinned_to_means(monkeypatch):
    monkeypatch.setattr(run_page, "POINTS", 4)
    steps, values = run_page._thin((np.arange(10), np.arange(10) ** 2.0))
    np.testing.assert_allclose(steps, [1, 4, 7, 9])
    np.testing.assert_allclose(values, [5 / 3, 50 / 3, 149 / 3, 81])
    lines = [{"step": 1, "a": 2, "b": None}, {"a": 3}, {"step": 2, "a": 4.5, "note": "text"}]
    found = run_page.curves(lines)
    assert list(found) == ["a"] and found["a"][1].tolist() == [2, 4.5]
