"""Checkpoints, run directories: what is saved comes back, and what must not be used is refused."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_model import tiny

from scjax.genes import Vocabulary
from scjax.nn.module import shapes_of
from scjax.parallel import MeshConfig, make_mesh
from scjax.train import (
    CheckpointError,
    Checkpoints,
    OptimizerConfig,
    TrainConfig,
    abstract_state,
    checkpoint_steps,
    describe,
    identity,
    make_optimizer,
    open_run,
    read_run,
    restore_variables,
    shardings_of,
)

IDENTITY = {"system": "tiny", "seed": 0, "corpus": "abc", "model": {"d_model": 16, "sizes": (1, 2)}}
CURSOR = {"epoch": 1, "step": 7}


def abstract_on(config: MeshConfig, devices: int, **model):
    mesh = make_mesh(config, jax.devices()[:devices])
    abstract = tiny(**model)
    tx, _ = make_optimizer(OptimizerConfig(1e-2), 10, abstract)
    return abstract_state(abstract, tx, mesh)


def filled(abstract, seed: int = 0):
    """A state of random numbers."""
    rng = np.random.default_rng(seed)
    draw = lambda a: (100 * rng.standard_normal(a.shape)).astype(a.dtype)  # noqa: E731
    return jax.device_put(jax.tree.map(draw, abstract), shardings_of(abstract))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def abstract():
    return abstract_on(MeshConfig(2, 2, 2), 8)


def save(directory, state, *steps, **options):
    checkpoints = Checkpoints(directory, IDENTITY, **options)
    for step in steps:
        checkpoints.save(step, state, {**CURSOR, "at": step})
    checkpoints.close()


# -------------------------------------------------------------------------------------- round trip


def test_round_trip_onto_another_mesh(tmp_path, abstract):
    state = filled(abstract)
    save(tmp_path, state, 3)
    for other in (abstract, abstract_on(MeshConfig(1, 4, 1), 4), abstract_on(MeshConfig(1, 1, 1), 1)):
        restored = Checkpoints(tmp_path, IDENTITY).restore(other)
        assert restored.step == 3 and restored.cursor == {**CURSOR, "at": 3}
        assert_equal(restored.state, state)
        jax.tree.map(
            lambda x, a: x.sharding == a.sharding or pytest.fail(str(x.sharding)), restored.state, other
        )


def test_nothing_to_restore(tmp_path, abstract):
    assert Checkpoints(tmp_path / "checkpoints", IDENTITY).restore(abstract) is None


def test_only_the_newest_are_kept(tmp_path, abstract):
    save(tmp_path, filled(abstract), 1, 2, 3, 4, keep=2)
    assert checkpoint_steps(tmp_path) == [3, 4]
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(4, filled(abstract, seed=1), CURSOR)  # already there: left as it is
    assert_equal(checkpoints.restore(abstract).state, filled(abstract))


def test_some_stay_for_good(tmp_path, abstract):
    save(tmp_path, filled(abstract), *range(1, 9), keep=2, keep_every=3)
    assert checkpoint_steps(tmp_path) == [3, 6, 7, 8]


def test_sums_of_metrics_ride_along(tmp_path, abstract):
    totals = {"loss": [0.1 + 0.2, 3.0]}
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(1, filled(abstract), CURSOR, totals)
    checkpoints.close()
    assert Checkpoints(tmp_path, IDENTITY).restore(abstract).totals == totals
    save(tmp_path, filled(abstract), 2)
    assert Checkpoints(tmp_path, IDENTITY).restore(abstract).totals == {}


def test_a_state_may_be_donated_while_it_is_written(tmp_path, abstract):
    state = filled(abstract)
    expected = jax.tree.map(np.array, jax.device_get(state))
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(1, state, CURSOR)
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    checkpoints.close()
    assert_equal(Checkpoints(tmp_path, IDENTITY).restore(abstract).state, expected)


def test_variables_alone(tmp_path, abstract):
    state = filled(abstract)
    save(tmp_path, state, 3, 5)
    shapes = shapes_of(tiny())
    variables, step = restore_variables(tmp_path, shapes)
    assert step == 5 and set(variables) == {"params", "buffers"}
    assert_equal(variables, {"params": state["params"], "buffers": state["buffers"]})
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(variables))
    assert restore_variables(tmp_path, shapes, 3)[1] == 3
    with pytest.raises(FileNotFoundError, match="no checkpoint 4 in .*; there are 3, 5"):
        restore_variables(tmp_path, shapes, 4)
    with pytest.raises(FileNotFoundError, match="there is none"):
        restore_variables(tmp_path / "nowhere", shapes)
    with pytest.raises(
        CheckpointError, match=r"another model: params/blocks/down/bias: float32\[2, 16\] -> "
    ):
        restore_variables(tmp_path, shapes_of(tiny(d_model=8)))


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, told",
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"corpus": "xyz"}, "corpus: abc -> xyz"),
        ({"model": {"d_model": 32, "sizes": (1, 2)}}, "model.d_model: 16 -> 32"),
        ({"model": {"d_model": 16}}, r"model.sizes: \[1, 2\] -> absent"),
    ],
)
def test_another_run_is_refused(tmp_path, abstract, change, told):
    save(tmp_path, filled(abstract), 1)
    with pytest.raises(CheckpointError, match=told):
        Checkpoints(tmp_path, IDENTITY | change).restore(abstract)


def test_another_shape_is_refused_not_taken_for_damage(tmp_path, abstract):
    save(tmp_path, filled(abstract), 1)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint 1 in .* has another shape of state: .*\[2, 16\] -> float32\[2, 8\].* more",
    ):
        Checkpoints(tmp_path, IDENTITY).restore(abstract_on(MeshConfig(1, 1, 1), 1, d_model=8))
    assert checkpoint_steps(tmp_path) == [1]


# ------------------------------------------------------------------------------------------ damage


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def arrays(step: pathlib.Path) -> list[pathlib.Path]:
    found = [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert found
    return found


@pytest.mark.parametrize("name", ["cut data", "flipped bit", "no state", "cut meta", "no cursor"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, abstract, capsys, name):
    states = [filled(abstract, seed) for seed in (0, 1)]
    for step, state in zip((4, 8), states, strict=True):
        save(tmp_path, state, step)
    newest = tmp_path / "8"
    {
        "cut data": lambda: [cut(path) for path in arrays(newest)],
        "flipped bit": lambda: [flip(path) for path in arrays(newest)],
        "no state": lambda: shutil.rmtree(newest / "state"),
        "cut meta": lambda: cut(newest / "meta" / "metadata"),
        "no cursor": lambda: (newest / "data" / "metadata").unlink(),
    }[name]()
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    restored = checkpoints.restore(abstract)
    assert restored.step == 4
    assert_equal(restored.state, states[0])
    assert "checkpoint 8 cannot be read and is set aside; going on from 4" in capsys.readouterr().out
    assert (tmp_path / "8.damaged").is_dir()
    # and the run can save that step again
    checkpoints.save(8, states[1], CURSOR)
    checkpoints.close()
    assert_equal(Checkpoints(tmp_path, IDENTITY).restore(abstract).state, states[1])


@pytest.mark.parametrize("name", ["cut", "gone", "zeroed"])
def test_one_damaged_file_of_a_large_array(tmp_path, capsys, name):
    """A small array lies within the index of its checkpoint; a large one has files of its own."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = {"params": {"w": (300_000,)}, "buffers": {"count": (3,)}}
    large = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P())),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    states = [filled(large, seed) for seed in (0, 1)]
    for step, state in zip((4, 8), states, strict=True):
        save(tmp_path, state, step)
    file = max(arrays(tmp_path / "8"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    assert size > 1_000_000
    {
        "cut": lambda: cut(file),
        "gone": file.unlink,
        "zeroed": lambda: file.write_bytes(bytes(size)),
    }[name]()
    with pytest.raises(CheckpointError, match="checkpoint .*8 cannot be read: "):
        restore_variables(tmp_path, large)
    restored = Checkpoints(tmp_path, IDENTITY).restore(large)
    assert restored.step == 4
    assert_equal(restored.state, states[0])
    told = capsys.readouterr().out
    assert "checkpoint 8 cannot be read and is set aside; going on from 4" in told
    assert "params.w" in told  # in the words of what read it, which say what is wrong
    assert (tmp_path / "8.damaged").is_dir()
    assert_equal(restore_variables(tmp_path, large)[0], states[0])


def test_no_checkpoint_can_be_read(tmp_path, abstract):
    save(tmp_path, filled(abstract), 4)
    for path in arrays(tmp_path / "4"):
        cut(path)
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read: 4: "):
        Checkpoints(tmp_path, IDENTITY).restore(abstract)
    with pytest.raises(CheckpointError, match="4 cannot be read"):
        restore_variables(tmp_path, shapes_of(tiny()))
    assert (tmp_path / "4").is_dir()


def test_an_unfinished_checkpoint_is_not_one(tmp_path, abstract):
    save(tmp_path, filled(abstract), 4)
    shutil.copytree(tmp_path / "4", tmp_path / "8.orbax-checkpoint-tmp")
    assert checkpoint_steps(tmp_path) == [4]
    assert Checkpoints(tmp_path, IDENTITY).restore(abstract).step == 4
    assert not (tmp_path / "8.orbax-checkpoint-tmp").exists()


def test_full_disk(tmp_path):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    big = jax.ShapeDtypeStruct((1_000_000,), jnp.float32, sharding=NamedSharding(mesh, P()))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("FULL DISK NOT TESTED: only root may mount the small file system that this test fills")
    try:
        state = filled({"w": big})
        checkpoints = Checkpoints(disk / "checkpoints", IDENTITY)
        checkpoints.save(1, state, CURSOR)
        checkpoints.wait()
        told = r"cannot save checkpoint [23] in .*: the disk is full; checkpoint [12] is intact"
        with pytest.raises(OSError, match=told) as error:
            for step in (2, 3, 4):
                checkpoints.save(step, state, CURSOR)
                checkpoints.wait()
        assert error.value.errno == 28
        assert not list((disk / "checkpoints").glob("*tmp*"))
        restored = Checkpoints(disk / "checkpoints", IDENTITY).restore({"w": big})
        assert_equal(restored.state, state)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_due():
    config = TrainConfig(steps=10, eval_every=4)
    assert [s for s in range(1, 11) if config.due(config.eval_every, s)] == [4, 8, 10]
    assert [s for s in range(1, 11) if config.due(config.checkpoint_every, s)] == [10]


# ----------------------------------------------------------------------------------- run directory


def about(**changes):
    vocabulary = Vocabulary([f"G{i}" for i in range(48)])
    fields = {"system": "tiny_model:Tiny", "config": {"d_model": 8}, "corpus": "abc", "seed": 0} | changes
    return describe(fields.pop("system"), fields.pop("config"), vocabulary, **fields), vocabulary


def test_a_run_describes_itself(tmp_path):
    model, vocabulary = about()
    run = open_run(tmp_path / "run", model, vocabulary)
    run.record({"train": {"steps": 3}})
    again = read_run(tmp_path / "run")
    assert again.model == run.model == model and again.config == {"train": {"steps": 3}}
    assert again.vocabulary.hash == vocabulary.hash
    assert model["model"]["d_model"] == 8 and model["model"]["n_layers"] == 2  # defaults are filled in
    # more steps are not another run
    open_run(tmp_path / "run", model, vocabulary).record({"train": {"steps": 5}})
    assert read_run(tmp_path / "run").config == {"train": {"steps": 5}}
    assert not list((tmp_path / "run").glob(".*"))

    Vocabulary(["X"]).to_tsv(tmp_path / "run" / "vocabulary.tsv")
    with pytest.raises(ValueError, match="vocabulary.tsv has been changed"):
        _ = read_run(tmp_path / "run").vocabulary


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"corpus": "xyz"}, "corpus: abc -> xyz"),
        ({"config": {"d_model": 12}}, "model.d_model: 8 -> 12"),
    ],
)
def test_a_changed_run_is_refused(tmp_path, changes, told):
    open_run(tmp_path / "run", *about())
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(CheckpointError, match=told):
        open_run(tmp_path / "run", *about(**changes))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_directory_with_something_else_is_refused(tmp_path):
    model, vocabulary = about()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="not a run directory but holds thesis.tex"):
        open_run(tmp_path, model, vocabulary)
    with pytest.raises(FileExistsError, match="is a file"):
        open_run(tmp_path / "thesis.tex", model, vocabulary)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not that of a scjax run"):
        open_run(tmp_path / "other", model, vocabulary)
    (tmp_path / "empty").mkdir()
    assert open_run(tmp_path / "empty", model, vocabulary).path.is_dir()
    with pytest.raises(FileNotFoundError, match="no model.json"):
        read_run(tmp_path)


def test_identity_leaves_the_version_out():
    assert set(identity(about()[0])) == {"system", "model", "seed", "corpus", "vocabulary"}
