"""A real Slurm of two nodes on this machine: runs outlive their nodes and what the scheduler does to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs

from scjax.cli.main import main
from scjax.launch.local import LocalRun
from scjax.train import checkpoint_steps

pytestmark = pytest.mark.slurm

SCRIPT = runs.ROOT / "tools" / "slurm_two_nodes.sh"
STEPS, EVERY = 160, 20
PATIENCE = 240  # seconds for anything that is waited for


@pytest.fixture(scope="module")
def slurm():
    """The two nodes run, and SLURM_CONF says where; a function that runs the script that keeps them."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SCJAX_SLURM", directory)
        patch.setenv("SLURM_CONF", f"{directory}/slurm.conf")

        def script(*words: str) -> str:
            done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            return done.stdout

        installed = subprocess.run([str(SCRIPT), "install"], capture_output=True, text=True, timeout=600)
        if installed.returncode:
            pytest.skip(f"SLURM NOT TESTED: {' '.join(installed.stderr.split()[-30:])}")
        try:
            script("start")
            yield script
        finally:
            script("stop")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("slurm")
    runs.build_corpus(directory / "corpus")
    return directory


@pytest.fixture(scope="module")
def variables(place):
    return {
        "PYTHONPATH": str(runs.ROOT / "tests"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def flags(place, workdir, *more: str) -> list[str]:
    return [
        str(runs.ROOT / "experiments" / "pretrain.py"),
        f"--config={runs.ROOT / 'tests' / 'tiny_config.py'}",
        f"--config.data.corpus={place / 'corpus'}",
        f"--config.train.steps={STEPS}",
        f"--config.train.checkpoint_every={EVERY}",
        "--config.train.eval_every=50",
        f"--workdir={workdir}",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(place, variables):
    """The metrics of the same run on two processes of this machine that nothing happens to."""
    command = [sys.executable, *flags(place, place / "undisturbed")]
    (place / "launch").mkdir()
    assert LocalRun(command, place / "launch", processes=2, environment=variables, restarts=0).run() == 0
    return metrics(place / "undisturbed")


@pytest.fixture
def submit(slurm, variables, monkeypatch, capsys):
    """``scjax launch slurm``; the id of the job, which is cancelled in the end."""
    monkeypatch.chdir(runs.ROOT)
    jobs = []

    def submit(*words: str, experiment: list[str]) -> str:
        given = [f"--env={name}={value}" for name, value in variables.items()]
        assert main(["launch", "slurm", *given, *words, "--", *experiment]) == 0
        jobs.append(capsys.readouterr().out.split()[1].rstrip(":,"))
        return jobs[-1]

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job], check=True)
        until(lambda: all(state(job, "JobState") not in ("RUNNING", "COMPLETING") for job in jobs))


def state(job: str, field: str) -> str:
    """JobState, Restarts or another field that scontrol tells."""
    told = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True
    ).stdout
    return dict(word.split("=", 1) for word in told.split() if "=" in word)[field]


def until(happened: Callable[[], Any], about: Callable[[], str] = lambda: "") -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := happened()):
        assert time.monotonic() < end, about()
        time.sleep(0.2)
    return found


def ended(job: str) -> str:
    """How a job ended."""
    until(lambda: state(job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"))
    return state(job, "JobState")


def metrics(workdir: Path) -> list[dict[str, float]]:
    """Without what depends on the clock."""
    lines = runs.metrics(workdir)
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]


def reached(workdir: Path) -> int:
    """The last step told of."""
    try:
        return int(metrics(workdir)[-1]["step"])
    except (FileNotFoundError, ValueError, IndexError):  # not yet, or a line half written
        return 0


def output(workdir: Path) -> str:
    return "\n".join(file.read_text() for file in (workdir / "launch").glob("*.out"))


def story(workdir: Path) -> str:
    """What the job and Slurm said, for a test that fails."""
    log = Path(os.environ["SLURM_CONF"]).with_name("slurmctld.log")
    return "\n".join([*output(workdir).splitlines()[-200:], *log.read_text().splitlines()[-50:]])


@pytest.mark.parametrize("node", ["scjax-node2", pytest.param("scjax-node1", marks=pytest.mark.full)])
def test_a_run_outlives_its_nodes(slurm, submit, place, undisturbed, node):
    """One of its two nodes dies, with the batch script or without: the job goes back to the queue, goes on
    from the last checkpoint once there are two nodes again, and ends as if nothing had happened."""
    workdir = place / f"without-{node}"
    job = submit("--nodes=2", experiment=flags(place, workdir))
    until(lambda: reached(workdir) > STEPS // 2, lambda: story(workdir))
    slurm("kill", node)
    until(
        lambda: state(job, "Restarts") == "1" and state(job, "JobState") == "PENDING", lambda: story(workdir)
    )
    at = reached(workdir)
    assert at < STEPS, "the run was over before its node died"
    saved = checkpoint_steps(workdir / "checkpoints")[-1]
    assert at - EVERY <= saved <= at
    slurm("start")
    assert ended(job) == "COMPLETED", story(workdir)
    assert state(job, "Restarts") == "1", story(workdir)
    assert f"steps {saved} to {STEPS}" in output(workdir)
    assert metrics(workdir) == undisturbed


def test_a_run_that_is_told_to_leave_loses_nothing(submit, place, undisturbed):
    """SIGTERM to its processes, which is what Slurm sends ahead of the time limit: it saves itself at that
    step, goes back to the queue, and goes on from there."""
    workdir = place / "told"
    job = submit("--nodes=2", experiment=flags(place, workdir))
    until(lambda: reached(workdir) > STEPS // 2, lambda: story(workdir))
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    until(lambda: state(job, "Restarts") == "1", lambda: story(workdir))
    at = reached(workdir)
    assert checkpoint_steps(workdir / "checkpoints")[-1] == at < STEPS
    assert ended(job) == "COMPLETED", story(workdir)
    assert "the run saved itself (exit status 75)" in output(workdir)
    assert f"steps {at} to {STEPS}" in output(workdir)
    assert metrics(workdir) == undisturbed


def test_a_sweep_is_a_job_array(submit, place):
    experiment = flags(place, place / "sweep", "--config.train.steps=5", "--config.mesh.data=1")
    job = submit("--sweep=config.seed=0,1", "--env=XLA_FLAGS=", experiment=experiment)
    assert [ended(f"{job}_{i}") for i in range(2)] == 2 * ["COMPLETED"], story(place / "sweep")
    first, second = (metrics(place / "sweep" / f"seed={seed}") for seed in range(2))
    assert len(first) == len(second) == 6 and first != second


def test_tasks_of_a_job_array_go_back_to_the_queue_one_by_one(submit, tmp_path):
    """Each once, though one of them has the id of the whole array, and all leave while the others run."""
    script, workdir = dummy(tmp_path, "time.sleep(5)\nsys.exit(75 if start == 0 else 0)")
    experiment = [script, f"--config={runs.ROOT / 'tests' / 'tiny_config.py'}", workdir]
    job = submit("--sweep=config.seed=0,1,2", experiment=experiment)
    tasks = [f"{job}_{i}" for i in range(3)]
    assert [ended(task) for task in tasks] == 3 * ["COMPLETED"], story(tmp_path / "a run")
    assert [state(task, "Restarts") for task in tasks] == 3 * ["1"], story(tmp_path / "a run")
    assert job in [state(task, "JobId") for task in tasks]


# ------------------------------------------------- what a run can do, by scripts that do it at once
def dummy(tmp_path: Path, body: str) -> list[str]:
    (tmp_path / "dummy.py").write_text(
        "import os, signal, sys, time\n"
        "start = int(os.environ.get('SLURM_RESTART_COUNT', 0))\n"
        f"print('start', start, 'of task', os.environ['SLURM_PROCID'], flush=True)\n{body}\n"
    )
    return [str(tmp_path / "dummy.py"), f"--workdir={tmp_path / 'a run'}"]


def test_a_job_that_is_cancelled_stays_cancelled(submit, tmp_path):
    """Though the run, told to leave, asks to be started again."""
    leaves = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(600)"
    )
    job = submit("--nodes=2", experiment=dummy(tmp_path, leaves))
    until(lambda: output(tmp_path / "a run").count("ready") == 2)
    subprocess.run(["scancel", job], check=True)
    until(lambda: state(job, "JobState") == "CANCELLED")
    time.sleep(10)  # longer than a requeued job would wait here
    assert state(job, "JobState") == "CANCELLED" and state(job, "Restarts") == "0"


@pytest.mark.full  # a minute of waiting
def test_a_run_is_told_ahead_of_its_time_limit(submit, tmp_path):
    """And goes back to the queue for as long again."""
    leaves = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nif start == 0: time.sleep(600)"
    job = submit("--time=1", "--notice=50", experiment=dummy(tmp_path, leaves))
    assert ended(job) == "COMPLETED", story(tmp_path / "a run")
    assert state(job, "Restarts") == "1"
    assert "the run saved itself (exit status 75)" in output(tmp_path / "a run")


@pytest.mark.full  # a minute of waiting
def test_a_run_that_crashes_is_started_again_so_many_times(submit, tmp_path):
    crashes = "if os.environ['SLURM_PROCID'] == '1': os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(1)"
    job = submit("--nodes=2", "--restarts=1", experiment=dummy(tmp_path, crashes))
    assert ended(job) == "FAILED", story(tmp_path / "a run")
    assert state(job, "Restarts") == "1" and state(job, "ExitCode") == f"{128 + signal.SIGKILL}:0"
    assert "start 1 of task 1" in output(tmp_path / "a run")


def test_an_error_ends_the_job(submit, tmp_path):
    job = submit("--nodes=2", experiment=dummy(tmp_path, "sys.exit(3)"))
    assert ended(job) == "FAILED", story(tmp_path / "a run")
    assert state(job, "Restarts") == "0" and state(job, "ExitCode") == "3:0"


def test_slurm_that_refuses_is_heard(slurm, tmp_path, monkeypatch, capsys):
    experiment = dummy(tmp_path, "")
    assert main(["launch", "slurm", "--sbatch=partition=none", "--", *experiment]) == 2
    assert "Slurm does not take" in capsys.readouterr().err and os.path.exists(tmp_path / "a run" / "launch")
