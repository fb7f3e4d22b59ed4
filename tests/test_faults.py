"""A run that is killed at any moment, told to leave, moved, or left without room on its disk is, in the end,
the run that was never disturbed. Minutes long: `make test-faults`."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from contextlib import closing

import pytest
import runs
from lives import Life, Lives, contents, last_step, newest, writing

from scjax.launch.codes import REQUEUE
from scjax.train import checkpoint_steps

pytestmark = pytest.mark.faults
KILLS, IN_WRITES = 100, 25  # at least so many, and so many of them while a checkpoint was being written
EVERY = 15  # steps between two checkpoints
LONG = {
    "train__steps": 1200,
    "train__checkpoint_every": EVERY,
    "train__eval_every": 40,
    "train__log_every": 1,
}
OFTEN = 10**6  # keep: all of them


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults")
    runs.build_corpus(directory / "corpus")
    return directory


@pytest.fixture(scope="module")
def lives(place):
    with closing(Lives(place / "corpus", place / "cache")) as lives:
        yield lives


@pytest.fixture
def chance(request):
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")  # shown where the test fails
    return random.Random(seed)


def assert_the_same(run, whole, step):
    """Metrics of every step, all arrays of the state and the place in the data."""
    assert runs.metrics(run) == runs.metrics(whole)
    assert contents(run, step) == contents(whole, step)


# ------------------------------------------------------------------------------------------- SIGKILL


def kill_somewhere(life: Life, how: str, startup: float, chance: random.Random) -> float:
    """SIGKILL at a random moment: of a life, of its steps, or of the writing of a checkpoint. Returns the
    seconds that it takes until the first step, as far as they are known."""
    run = life.workdir
    if how == "anywhere":
        end = life.began + chance.uniform(0, 1.5 * startup)
        life.until(lambda: time.monotonic() > end)
    else:
        before, beyond = newest(run), chance.randint(1, 2 * EVERY)
        life.until(lambda: "compiled in" in life.output)
        startup = time.monotonic() - life.began
        if how == "stepping":
            life.until(lambda: last_step(run) >= before + beyond)
        else:
            life.until(lambda: writing(run) is not None)
            time.sleep(chance.uniform(0, 0.03))
    life.send(signal.SIGKILL)
    return startup


def check_what_is_left(run, whole, before: int) -> int:
    """What a kill may leave, by the checkpoint that the killed life went on from at the earliest; the step of
    the newest complete checkpoint."""
    complete = newest(run)
    assert complete >= before  # what was saved stays saved
    if complete:
        assert contents(run, complete) == contents(whole, complete)
    # A checkpoint is written in the background, and is complete before the next one begins: what is lost is
    # at most an interval, and the steps taken while the next checkpoint was still being written.
    begun = writing(run)
    assert begun is None or begun <= complete + EVERY
    assert last_step(run) - complete <= 2 * EVERY
    return complete


def test_killed_a_hundred_times(place, lives, chance):
    whole = place / "whole"
    lives.whole(whole, **LONG, train__keep=10**6)
    kills = {"anywhere": 0, "stepping": 0, "writing": 0}
    in_writes, startup, number = 0, 3.0, 0
    while sum(kills.values()) < KILLS or in_writes < IN_WRITES:
        run, complete, code = place / f"killed{number}", 0, None
        while code != 0:
            life = lives.begin(run, **LONG)
            how = chance.choice(sorted(kills))
            if sum(kills.values()) < KILLS or in_writes < IN_WRITES:  # else let it come to its end
                startup = kill_somewhere(life, how, startup, chance)
            code = life.end()
            told = re.search(r"steps ([\d,]+) to", life.output)
            if told:  # it lived long enough to say what it goes on from
                assert int(told[1].replace(",", "")) == complete
            assert "set aside" not in life.output
            if code != 0:
                assert code == -signal.SIGKILL, life.output
                kills[how] += 1
                in_writes += writing(run) is not None
                complete = check_what_is_left(run, whole, complete)
        assert_the_same(run, whole, LONG["train__steps"])
        number += 1
    print(f"{kills}; {in_writes} while a checkpoint was being written; {number} runs")
    assert sum(kills.values()) >= KILLS and in_writes >= IN_WRITES


# ------------------------------------------------------------------------------------ told to leave


def test_nothing_is_lost_where_it_is_told_to_leave(place, lives, chance):
    """Notices at random moments, some before the first step; lines of metrics are of seven steps, so that a
    run leaves in the middle of one."""
    often = {
        "train__steps": 600,
        "train__log_every": 7,
        "train__eval_every": 50,
        "train__checkpoint_every": 120,
    }
    whole, run = place / "undisturbed", place / "told"
    lives.whole(whole, **often)
    at = notices = 0
    for notice in range(12):
        if at > 400:  # on a busy machine a notice comes late: the last must come before the run's own end
            break
        life, notices = lives.begin(run, **often), notices + 1
        if notice % 4:
            beyond = at + chance.randint(1, 30)
            life.until(lambda: last_step(run) >= beyond)  # noqa: B023  of this life
        else:
            end = life.began + chance.uniform(0.0, 2.0)
            life.until(lambda: time.monotonic() > end)  # noqa: B023
        life.send(chance.choice([signal.SIGTERM, signal.SIGUSR1]))
        assert life.end() == REQUEUE, life.output
        began = re.search(r"steps ([\d,]+) to", life.output)
        assert began is None or int(began[1]) == at
        left = re.search(r"told to leave: saving step ([\d,]+)", life.output)
        assert left or "before the first step" in life.output
        at = int(left[1]) if left else at
        assert newest(run) == at
    assert at > 9 and notices > 3
    assert f"steps {at} to 600" in lives.whole(run, **often)
    assert_the_same(run, whole, 600)


# ----------------------------------------------------------------------------------------- full disk


def test_a_full_disk(place, lives):
    few = {"train__steps": 60, "train__checkpoint_every": 10}
    whole, disk = place / "roomy", place / "disk"
    lives.whole(whole, **few)
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("FULL DISK NOT TESTED: only root may mount the small file system that this test fills")
    try:
        run = disk / "run"
        lives.whole(run, **few | {"train__steps": 25})
        assert checkpoint_steps(run / "checkpoints") == [10, 20, 25]
        room = os.statvfs(disk)  # what is left is enough for a few lines of metrics, not for a checkpoint
        (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - 48 * 1024))
        life = lives.begin(run, **few)
        assert life.end() == 1
        assert "the disk is full; checkpoint 25 is intact. Free some space and resume" in life.output
        assert newest(run) == 25 and writing(run) is None
        (disk / "ballast").unlink()
        assert "steps 25 to 60" in lives.whole(run, **few)
        # the shorter run was validated at its own end and saved there
        ended = [line for line in runs.metrics(run) if line["step"] != 25]
        assert ended == [line for line in runs.metrics(whole) if line["step"] != 25]
        assert contents(run, 60) == contents(whole, 60)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
