"""``scjax launch local``: several processes live and die together, and are started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

from scjax.launch import REQUEUE
from scjax.launch.local import LocalRun

# What a process of a run does is told by --do: an exit status, a signal, or "wait" for one process, by
# the number of the start. It writes down what it was given.
SCRIPT = """
import json, os, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
here = pathlib.Path(flags["workdir"])
here.mkdir(parents=True, exist_ok=True)
index = int(os.environ.get("JAX_PROCESS_ID", 0))
start = len(list(here.glob(f"{index}.*")))
given = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "CUDA", "A_"))}
(here / f"{index}.{start}").write_text(json.dumps(given))
print("process", index, "start", start, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
starts = json.loads(flags["do"])
do = starts[min(start, len(starts) - 1)]
do = do[min(index, len(do) - 1)]
time.sleep(600) if do == "wait" else os.kill(os.getpid(), -do) if do < 0 else sys.exit(do)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def command_of(script, workdir, do, *options):
    return [
        *[sys.executable, "-m", "scjax.cli.main", "launch", "local", *options, "--"],
        *[str(script), f"--do={json.dumps(do)}", f"--workdir={workdir}"],
    ]


def launch(script, workdir, do, *options):
    """Exit status and what it said."""
    command = command_of(script, workdir, do, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def starts(workdir):
    return sorted(p.name for p in workdir.iterdir() if p.is_file())


def about(pid, what):
    """A file of /proc; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def processes_of(word):
    """The processes that have a word on their command lines."""
    pids = map(int, filter(str.isdigit, os.listdir("/proc")))
    return [pid for pid in pids if os.fsencode(word) in about(pid, "cmdline")]


def until(happened):
    end = time.monotonic() + 240
    while True:
        with contextlib.suppress(OSError, ValueError, IndexError):  # not yet, or half written
            if happened():
                return
        assert time.monotonic() < end
        time.sleep(0.1)


# ------------------------------------------------------------------- real runs of two processes
def real(corpus, cache, workdir):
    variables = {
        "PYTHONPATH": str(runs.ROOT / "tests"),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    return [
        *[sys.executable, "-m", "scjax.cli.main", "launch", "local", "--processes=2"],
        *[f"--env={name}={value}" for name, value in variables.items()],
        *["--", "experiments/pretrain.py", "--config=tests/tiny_config.py", f"--workdir={workdir}"],
        *[f"--config.data.corpus={corpus}", "--config.train.steps=80", "--config.train.checkpoint_every=25"],
    ]


def stripped(workdir):
    """The metrics without what depends on the clock."""
    lines = runs.metrics(workdir)
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    corpus = runs.build_corpus(place / "corpus")
    command = real(corpus, place / "cache", place / "run")
    subprocess.run(command, cwd=runs.ROOT, check=True, timeout=300)
    return corpus, place / "cache", stripped(place / "run")


def test_processes_of_one_run_know_each_other(script, tmp_path):
    code, said = launch(script, tmp_path / "run", [[0]], "--processes=3", "--gpus=2", "--env=A_B=c d")
    assert code == 0 and "process 0 start 0" in said and "process 1" not in said
    given = [json.loads((tmp_path / "run" / f"{i}.0").read_text()) for i in range(3)]
    assert [g["JAX_PROCESS_ID"] for g in given] == ["0", "1", "2"]
    assert [g["CUDA_VISIBLE_DEVICES"] for g in given] == ["0,1", "2,3", "4,5"]
    assert len({g["JAX_COORDINATOR_ADDRESS"] for g in given}) == 1
    assert all(g["JAX_NUM_PROCESSES"] == "3" and g["A_B"] == "c d" for g in given)
    assert "process 2 start 0" in (tmp_path / "run" / "launch" / "process-2.log").read_text()


def test_one_process_is_started_as_by_hand(script, tmp_path):
    assert launch(script, tmp_path / "run", [[0]])[0] == 0
    given = json.loads((tmp_path / "run" / "0.0").read_text())
    assert not any(name.startswith("JAX_COORD") or name == "JAX_PROCESS_ID" for name in given)
    assert not (tmp_path / "run" / "launch").exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_killed_takes_the_others_down_and_is_named(script, tmp_path, lost):
    do = ["wait", "wait", "wait"]
    do[lost] = -signal.SIGKILL
    code, said = launch(script, tmp_path / "run", [do], "--processes=3", "--restarts=0")
    assert code == 128 + signal.SIGKILL
    assert (
        f"process {lost} of 3" in said and "was killed by SIGKILL; the other 2 processes were stopped" in said
    )
    assert (f"process {lost} start 0" in said) and not processes_of(script)


def test_an_error_is_not_started_again_and_shows_its_output(script, tmp_path):
    code, said = launch(script, tmp_path / "run", [["wait", 3]], "--processes=2")
    assert code == 3 and "process 1 of 2" in said and "failed with exit status 3" in said
    assert "  process 1 start 0" in said and starts(tmp_path / "run") == ["0.0", "1.0"]


def test_a_run_that_saved_itself_or_was_killed_is_started_again(script, tmp_path):
    do = [[REQUEUE, REQUEUE], ["wait", -signal.SIGSEGV], [0, 0]]
    code, said = launch(script, tmp_path / "run", do, "--processes=2", "--restarts=2")
    assert code == 0 and starts(tmp_path / "run") == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert "saved itself" in said and "started again (1 of at most 2)" in said and "SIGSEGV" in said


def test_restarts_have_a_limit(script, tmp_path):
    code, _ = launch(script, tmp_path / "run", [[REQUEUE]], "--restarts=1")
    assert code == REQUEUE and starts(tmp_path / "run") == ["0.0", "0.1"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_launcher_that_is_told_to_stop_lets_the_run_save_itself(script, tmp_path, name):
    command = command_of(script, tmp_path / "run", [["wait"]], "--processes=2")
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        log = tmp_path / "run" / "launch" / "process-1.log"
        while not (log.exists() and log.read_text()) or not (tmp_path / "run" / "0.0").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)  # both have their handlers
        launcher.send_signal(signal.Signals[name])
        said = launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == REQUEUE and "saved itself" in said
    assert starts(tmp_path / "run") == ["0.0", "1.0"] and not processes_of(script)


def test_runs_of_a_sweep_go_one_after_another(tmp_path, script):
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 0})\n"
    )
    script.write_text(
        "import sys, pathlib\nhere = pathlib.Path(sys.argv[-1].split('=', 1)[1])\nhere.mkdir(parents=True)\n"
        "(here / 'argv').write_text(' '.join(sys.argv[2:]))\nsys.exit('seed=1' in sys.argv[-1])\n"
    )
    command = [sys.executable, "-m", "scjax.cli.main", "launch", "local", "--sweep=config.seed=0,1,2", "--"]
    command += [str(script), f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'runs'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # one of them failed; the others ran
    for seed in range(3):
        workdir = tmp_path / "runs" / f"seed={seed}"
        assert (workdir / "argv").read_text() == f"--config.seed={seed} --workdir={workdir}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_real_run_is_started_again_and_ends_as_if_nothing_had_happened(tmp_path, name, undisturbed):
    """One of its two processes is told to leave, or killed, in the middle."""
    corpus, cache, metrics = undisturbed
    workdir = tmp_path / "run"
    launcher = subprocess.Popen(
        real(corpus, cache, workdir), cwd=runs.ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: runs.metrics(workdir)[-1]["step"] > 40)
        [worker] = [
            pid for pid in processes_of(str(workdir)) if b"JAX_PROCESS_ID=1\0" in about(pid, "environ")
        ]
        os.kill(worker, signal.Signals[name])
        said = launcher.communicate(timeout=300)[1]
    finally:
        launcher.terminate()
        launcher.wait(timeout=60)
    assert launcher.returncode == 0, said
    assert "started again (1 of at most 3)" in said
    assert "process 1 of 2" in said if name == "SIGKILL" else "saved itself" in said
    assert stripped(workdir) == metrics


def test_gpus_that_are_not_there_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    run = LocalRun(["true"], tmp_path, processes=2, gpus=1)
    assert run.environment_of(1, 0)["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(ValueError, match="2 processes of 2 GPUs each; CUDA_VISIBLE_DEVICES=4,5,6"):
        LocalRun(["true"], tmp_path, processes=2, gpus=2).environment_of(0, 0)
