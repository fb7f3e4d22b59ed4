"""What a run tells of itself: means, pace, goodput, progress, status."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest
import runs
from rich.console import Console

from scjax.cli.runs import read_state
from scjax.config import ConfigError
from scjax.parallel import MeshConfig, make_mesh
from scjax.parallel.hardware import device_of
from scjax.train import (
    Meter,
    MetricsLog,
    NonFiniteLoss,
    Profile,
    RunProgress,
    Status,
    TooManySkipped,
    checkpoint_steps,
    read_metrics,
)
from scjax.train import metrics as metrics_module
from scjax.train import status as status_module


def metrics(loss: float, weight: float = 2.0, norm: float = 1.0, cells: float = 4.0, **others: float):
    pairs = {"loss": (loss, weight), "grad_norm": (norm, 1.0), "cells": (cells, 1.0), "extra": (0.0, 0.0)}
    return jax.tree.map(jnp.float32, pairs | {name: (value, 1.0) for name, value in others.items()})


def skipped(total: int, loss: float, full: bool = False):
    """What a step tells that the guard did not let through: its own metrics have no weight."""
    return metrics(
        0.0, 0.0, 0.0, skipped=1.0, skipped_total=total, guard_full=full, skipped_loss=loss,
        skipped_grad_norm=7.0, tokens=40.0,
    ) | {"grad_norm": (jnp.zeros(()), jnp.zeros(()))}  # fmt: skip


class Clock:
    """Stands still until it is moved on."""

    def __init__(self, monkeypatch, *modules):
        self.now = 1_000_000.0
        for module in modules:
            clock = types.SimpleNamespace(**dict.fromkeys(("time", "perf_counter", "monotonic"), self.read))
            monkeypatch.setattr(module, "time", clock)

    def read(self) -> float:
        return self.now


# ----------------------------------------------------------------------------------------- means


def test_meter_weights_its_mean_and_reads_late():
    meter = Meter()
    meter.add(1, metrics(2.0, 2.0))
    meter.add(2, metrics(10.0, 8.0, norm=3.0))
    assert meter.mean("train") == {"train/loss": 1.2, "train/grad_norm": 2.0}
    meter.add(3, metrics(8.0, 2.0, tokens=10.0, operations=99.0))
    assert meter.mean("validation") == {"validation/loss": 4.0, "validation/grad_norm": 1.0}

    meter.add(4, metrics(float("nan")))  # not read yet
    with pytest.raises(NonFiniteLoss, match="step 4: loss nan. Nothing from this step on is saved"):
        meter.add(5, metrics(1.0))
    meter = Meter()
    meter.add(4, metrics(1.0, norm=float("inf")))
    with pytest.raises(NonFiniteLoss, match="step 4: grad norm inf"):
        meter.mean("train")


def test_skipped_steps_are_counted_and_spoil_no_mean():
    meter = Meter()
    good = {"skipped": 0.0, "guard_full": 0.0, "skipped_loss": 0.0, "skipped_grad_norm": 0.0}
    meter.add(1, metrics(2.0, 2.0, **good, skipped_total=0))
    meter.add(2, skipped(1, float("nan")))
    meter.add(3, skipped(2, 1e9))
    meter.add(4, metrics(6.0, 2.0, **good, skipped_total=2))
    assert meter.mean("train") == {
        "train/loss": 2.0, "train/grad_norm": 1.0, "train/skipped": 2.0, "train/skipped_total": 2.0,
    }  # fmt: skip
    meter.add(5, skipped(3, float("inf")))  # an interval of nothing else
    assert meter.mean("train") == {"train/skipped": 1.0, "train/skipped_total": 3.0}
    meter.add(6, skipped(4, 5.25, full=True))
    with pytest.raises(TooManySkipped) as told:
        meter.mean("train")
    assert str(told.value).startswith(
        "4 bad steps have been skipped, the last of them: step 2 (loss nan, grad norm 7), "
        "3 (loss 1e+09, grad norm 7), 5 (loss inf, grad norm 7), "
        "6 (loss 5.25, grad norm 7). None of them changed anything"
    )


# ------------------------------------------------------------------------------------------ pace


def test_the_seconds_of_an_interval_add_up(monkeypatch):
    clock = Clock(monkeypatch, metrics_module)
    meter = Meter(make_mesh(MeshConfig()), began=clock.now - 60, productive=20.0)
    with meter.time("input_wait"):
        clock.now += 5
    clock.now += 30  # compiles
    meter.add(1, metrics(1.0, tokens=100.0, operations=1e9))
    for step in (2, 3, 4):
        with meter.time("input_wait"):
            clock.now += 0.5
        clock.now += 2
        meter.add(step, metrics(1.0, cells=8.0, tokens=120.0, operations=2e9))
    pace = meter.mean("train")
    assert pace.pop("train/loss") == 0.5 and pace.pop("train/grad_norm") == 1.0
    assert pace == {
        "time/input_wait": 1.5,
        "time/step": 6.0,
        "throughput/cells_per_second": 24 / 7.5,
        "throughput/tokens_per_second": 360 / 7.5,
        "throughput/flops_per_second": 6e9 / 7.5,
        "throughput/goodput": 26 / (60 + 35 + 7.5),  # with what was done before this start
    }  # and no MFU: the peak of a CPU is not known

    with meter.time("evaluate"):
        clock.now += 7
    with pytest.raises(RuntimeError), meter.time("checkpoint"):
        clock.now += 1
        raise RuntimeError("counts as well")
    with meter.time("evaluate"):
        clock.now += 2
    clock.now += 4
    meter.add(5, metrics(1.0))
    pace = meter.mean("train")
    assert {name: value for name, value in pace.items() if name.startswith("time/")} == {
        "time/evaluate": 9.0, "time/checkpoint": 1.0, "time/step": 4.0,
    }  # fmt: skip
    assert pace["throughput/cells_per_second"] == 1.0
    assert "throughput/tokens_per_second" not in pace  # a step that does not tell
    assert pace["throughput/goodput"] == 30 / (102.5 + 14)


def test_mfu_is_of_the_peak_of_all_devices(monkeypatch):
    clock = Clock(monkeypatch, metrics_module)
    monkeypatch.setattr(metrics_module, "device_of", lambda kind: device_of("H100"))
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 8
    meter = Meter(mesh, began=clock.now - 1)
    meter.add(1, metrics(1.0))
    assert set(meter.mean("train")) == {"train/loss", "train/grad_norm", "time/step", "throughput/goodput"}
    clock.now += 2
    meter.add(2, metrics(1.0, operations=8 * 989.5e12))  # what they could do in one second
    assert meter.mean("train")["throughput/mfu"] == pytest.approx(0.5)


def test_skipped_steps_are_work_all_the_same(monkeypatch):
    clock = Clock(monkeypatch, metrics_module)
    meter = Meter(make_mesh(MeshConfig()))
    meter.add(1, metrics(1.0))
    clock.now += 4
    meter.add(2, skipped(1, float("nan")))
    assert meter.mean("train")["throughput/tokens_per_second"] == 10.0


# ------------------------------------------------------------------------------------------- log


def test_metrics_continue_where_the_run_does(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, {"train/loss": 1 / step, "train/odd": float("nan"), "time/step": step / 4})
    log.write(30, {"validation/loss": 1.0})
    log.close()
    assert log.productive == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed while writing
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30, 30]
    log = MetricsLog(tmp_path, step=20)
    assert log.productive == 7.5  # not what was lost
    log.write(30, {"train/loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "train/loss": 0.1, "train/odd": None, "time/step": 2.5},
        {"step": 20, "train/loss": 0.05, "train/odd": None, "time/step": 5.0},
        {"step": 30, "train/loss": 0.5},
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_metrics_of_a_run_that_left_no_checkpoint_are_dropped(tmp_path):
    for life in range(2):
        log = MetricsLog(tmp_path)
        log.write(0, {"probe/effective_rank": float(life)})
        log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "probe/effective_rank": 1.0}]


def test_metrics_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = MetricsLog(tmp_path)
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert capsys.readouterr().out.count("\n") == 1
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]
    assert not (tmp_path / "tensorboard").exists()


def test_weights_and_biases_is_asked_for_in_vain(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"train.wandb is 'cells', but wandb cannot be imported .*scjax\[wandb\]"
    ):
        MetricsLog(tmp_path, wandb="cells")


def test_weights_and_biases_offline(tmp_path):
    """In a process of its own, since it starts others and changes what this one does at its end."""
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    (tmp_path / "config.json").write_text('{"optimizer": {"learning_rate": 0.125}}')
    code = (
        "import sys; from scjax.train import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], int(sys.argv[2]), wandb='cells')\n"
        "log.write(int(sys.argv[2]) + 10, {'train/loss': 0.625, 'train/odd': float('nan')}); log.close()"
    )
    for step in ("0", "10"):  # and resumed
        environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": "elsewhere"}
        command = [sys.executable, "-W", "error", "-c", code, str(tmp_path), step]
        subprocess.run(command, check=True, timeout=300, env=environment, cwd=tmp_path)
    name = (tmp_path / "wandb" / "id").read_text()
    kept = sorted(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(kept) == 2  # one run, twice
    for file in kept:
        content = file.read_bytes()
        for text in (b"cells", b"learning_rate", b"0.125", b"train/loss", b"0.625"):
            assert text in content
        assert b"train/odd" not in content
    assert not (tmp_path / "elsewhere").exists()


# --------------------------------------------------------------------------------------- profile


@jax.jit
def profiled_step(x):
    return {"loss": (x.sum(), jnp.ones(()))}


def calls(directory, steps, step=0):
    """How often the profiler saw the step, in a run of six steps."""
    with closing(Profile(directory, steps, step)) as profile:
        while step < 6:
            step += 1
            profile.after(step, profiled_step(jnp.full(4, step)))
    traces = list(directory.rglob("profile/**/*.trace.json.gz"))
    events = [json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] for trace in traces]
    return sum("(profiled_step)" in event.get("name", "") for of in events for event in of)


def test_profile_of_some_steps(tmp_path):
    one = calls(tmp_path / "one", (1, 1))
    assert one > 0
    assert calls(tmp_path / "three", (2, 3)) == 3 * one
    assert calls(tmp_path / "cut", (5, 100)) == 2 * one  # the run ends before the profile
    assert calls(tmp_path / "resumed", (5, 1), step=4) == one
    for name, steps, step in (("none", None, 0), ("beyond", (2, 3), 3)):
        assert calls(tmp_path / name, steps, step) == 0
        assert not (tmp_path / name).exists()


# -------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_step_loss_pace_and_time_left(terminal, tmp_path):
    pace = {"cells_per_second": 1234.5, "tokens_per_second": 2_345_678.0, "flops_per_second": 56e9}
    means = {"train/loss": 0.25} | {f"throughput/{name}": value for name, value in pace.items()}
    with (tmp_path / "out").open("w") as file:
        with RunProgress(20, 5, Console(file=file, force_terminal=terminal, width=120)) as progress:
            progress.advance(9)
            progress.show(10, means)
            progress.say("saved [10]")
            if not terminal:
                progress.show(11, {"train/skipped_total": 3.0})  # nothing but skipped steps
            progress.show(12, means | {"throughput/mfu": 0.4567, "train/skipped_total": 4.0})
    shown = (tmp_path / "out").read_text()
    expected = [
        "step 12/20",
        "loss 0.2500",
        "1,234 cells/s  2,345,678 tokens/s  MFU 45.7%  4 skipped",
        "saved [10]",
    ]
    if not terminal:
        expected += ["tokens/s  56.0 GFLOP/s  ", " left", "loss nan  3 skipped"]
    for text in expected:
        assert text in shown


# ---------------------------------------------------------------------------------------- status


def read_status(directory):
    return json.loads((directory / "status.json").read_text())


def test_status_of_a_run_that_is_stopped_fails_and_is_continued(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, status_module)
    began = clock.now
    status = Status(tmp_path, 0, 100)
    assert not (tmp_path / "status.json").exists() and status.began == began
    with status:
        told = read_status(tmp_path)
        assert told["state"] == "running" and (told["step"], told["steps"], told["starts"]) == (0, 100, 1)
        assert (told["host"], told["pid"]) == (socket.gethostname(), os.getpid())
        assert told["processes"] == 1 and told["devices"] == f"8 {jax.devices()[0].device_kind}"
        clock.now += 5
        status.at(10)
        assert read_status(tmp_path)["step"] == 0  # seldom
        clock.now += 6
        status.at(20)
        assert read_status(tmp_path)["step"] == 20
        assert datetime.datetime.fromisoformat(told["began"]).timestamp() == began
        status.at(21)
    told = read_status(tmp_path)
    assert (told["state"], told["step"], told["error"]) == ("preempted", 21, None)

    clock.now += 100  # waits in a queue
    with pytest.raises(OSError), Status(tmp_path, 21, 100) as status:
        status.at(30)
        raise OSError("no space left\non the device")
    told = read_status(tmp_path)
    assert told["state"] == "failed" and told["error"] == "OSError: no space left"
    assert (told["step"], told["starts"], status.began) == (30, 2, began)
    with pytest.raises(SystemExit), Status(tmp_path, 30, 100):
        raise SystemExit(75)
    assert read_status(tmp_path)["state"] == "preempted"

    with Status(tmp_path, 30, 100) as status:
        assert read_status(tmp_path)["error"] is None
        status.at(100)
    assert read_status(tmp_path)["state"] == "finished"
    clock.now += 1000  # nothing to do, until it is to take more steps
    status = Status(tmp_path, 100, 200)
    assert status.began == began + 1000
    with status:
        told = read_status(tmp_path)
        assert told["idle"] == 1000 and datetime.datetime.fromisoformat(told["began"]).timestamp() == began
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", ["{", "[]", '{"began": "yesterday"}'])
def test_a_damaged_status_does_not_stop_a_run(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    with Status(tmp_path, 3, 10):
        assert read_status(tmp_path)["starts"] == 1


def test_a_full_disk_is_for_others_to_tell(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status_module, "write_text", full)
    with Status(tmp_path, 3, 10) as status:
        status.at(10)
    assert not (tmp_path / "status.json").exists()


# ----------------------------------------------------------------------------------------- a run


def test_a_run_that_is_killed_and_resumed(tmp_path):
    """What pretraining tells of itself, from processes of its own."""
    runs.build_corpus(tmp_path / "corpus")
    workdir = tmp_path / "run"
    options = {"cache": tmp_path / "cache", "data__corpus": tmp_path / "corpus", "train__checkpoint_every": 5}
    process = runs.start("tests/tiny_config.py", workdir, **options, train__steps=100_000, train__log_every=5)
    while process.poll() is None and len(checkpoint_steps(workdir / "checkpoints")) < 2:
        time.sleep(0.01)
    assert process.poll() is None, runs.output_of(workdir).read_text()
    assert read_state(workdir).state == "running"
    began = read_state(workdir).status["began"]
    process.kill()
    process.wait()
    assert read_state(workdir).state == "killed"

    done = checkpoint_steps(workdir / "checkpoints")[-1]
    more = options | {"train__steps": done + 20, "train__log_every": 5}
    output = runs.pretrain("tests/tiny_config.py", workdir, **more)
    state = read_state(workdir)
    assert state.state == "finished" and state.step == state.status["steps"] == done + 20
    assert state.status["starts"] == 2 and state.status["began"] == began
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]
    for line in lines:
        assert line["time/step"] > 0 and 0 < line["throughput/goodput"] < 1
        assert "throughput/mfu" not in line  # of a CPU no peak is known
    seconds = datetime.datetime.fromisoformat(state.status["updated"]) - datetime.datetime.fromisoformat(
        began
    )
    # productive are the steps of both processes that are left, of all the time since the first began
    productive = lines[-1]["throughput/goodput"] * (seconds.total_seconds() + 1)
    assert productive >= sum(line["time/step"] for line in lines)
    assert {"time/input_wait", "time/checkpoint", "time/evaluate"} <= set().union(*lines)
    assert lines[-1]["throughput/tokens_per_second"] > lines[-1]["throughput/cells_per_second"] > 0
    assert re.search(r"cells/s  [\d,]+ tokens/s  [\d,.]+ GFLOP/s", output)
