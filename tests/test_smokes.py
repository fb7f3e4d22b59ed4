"""The ``:smoke`` of every config that is not a published system: from its command line to a run that loads.

Steps are cut to a few; what is learned in a whole one is tested where the model is.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from smoke import ROOT, smoke, write_cells

import scjax
from scjax.models import SYSTEMS

OTHERS = sorted({file.stem for file in (ROOT / "configs").glob("*.py")} - set(SYSTEMS) - {"quickstart"})
FEW = {"train.steps": 6, "train.log_every": 2, "train.eval_every": 3, "train.checkpoint_every": 3}
DATA = {"space": ["space_corpus.py"], "drugs": ["drug_corpus.py"]}  # what is made before
DATA |= {name: ["smoke_data.py", name] for name in ("citeseq", "genes", "priors")}
pytestmark = pytest.mark.smokes


def call(*command, cwd):
    flags = "--xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=dict(os.environ, XLA_FLAGS=flags),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with what ``make quickstart`` leaves, of fewer cells and steps."""
    directory = tmp_path_factory.mktemp("smokes")
    (directory / "runs" / "pbmc").mkdir(parents=True)
    write_cells(directory / "runs" / "pbmc")
    base = smoke("quickstart", directory / "runs" / "pbmc")
    base.rename(directory / "runs" / "quickstart")
    return directory


@pytest.mark.parametrize("config", OTHERS)
def test_smoke(config, place):
    workdir = place / "runs" / f"{config}-smoke"
    docstring = (ROOT / "configs" / f"{config}.py").read_text().split('"""')[1]
    if config in DATA:
        tool, *of = [*DATA[config], "--out", f"runs/{config}/planted"]
        assert f"python tools/{' '.join([tool, *of])}\n" in docstring
        call(ROOT / "tools" / tool, *of, cwd=place)
    command = docstring[: docstring.index(f"configs/{config}.py:smoke")].rpartition("python experiments/")[2]
    launcher = ROOT / "experiments" / command.split()[0]  # the docstring says which, and is right
    few = FEW | {"optimizer.warmup_steps": 2}
    flags = [f"--config.{name}={value}" for name, value in few.items()]
    call(launcher, f"--config={ROOT}/configs/{config}.py:smoke", f"--workdir={workdir}", *flags, cwd=place)
    model = scjax.load(workdir)
    lines = model.metrics()
    assert model.step == FEW["train.steps"]
    assert any("validation/loss" in line for line in lines)
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
