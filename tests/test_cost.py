"""What a step is said to take, against what it takes: on eight devices, compiled and allocated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scjax.cli.main import main
from scjax.config import from_config
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import RunConfig, init_state, make_optimizer
from scjax.train.cost import Job, _step, cost, lower, roofline
from scjax.train.hlo import partitioned, work
from scjax.types import CellBatch

SMALL = {"d_model": 64, "n_heads": 4, "n_layers": 3, "d_ff": 128, "dtype": "float32", "remat": "none"}
FOUR_BILLION = {"d_model": 3072, "n_heads": 24, "n_layers": 36, "d_ff": 12288, "max_length": 4096}


def job(mesh, system="geneformer", n_genes=256, devices=8, batch=16, length=64, model=SMALL, **train):
    config = {
        "system": system,
        "model": dict(model),
        "data": {"corpus": "none", "batch_size": batch},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 10, **train},
        "mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)),
    }
    return Job(from_config(RunConfig, config), n_genes, devices, "H100", length)


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), axis_type=AxisType.Auto)


# ------------------------------------------------------------------ the partitioned program, counted
def test_a_loop_of_products_with_gathered_weights():
    """Five layers: each weight is gathered and used once, and its gradient reduced to where it is kept."""
    mesh, layers, b, d = mesh_of((1, 8, 1)), 5, 16, 64
    rows, split = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(None, "fsdp"))

    def loss(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jax.lax.scan(layer, x, w)[0].sum()

    w = jax.ShapeDtypeStruct((layers, d, d), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=rows)
    forward = work(partitioned(jax.jit(loss).lower(w, x))[1], 8)
    assert forward.operations == layers * 2 * (b / 8) * d * d
    gathered = layers * d * d * 4 * 7 / 8
    assert forward.collectives["all-gather"] == (layers, gathered)
    both = work(partitioned(jax.jit(jax.grad(loss), out_shardings=split).lower(w, x))[1], 8)
    assert both.operations == 3 * forward.operations
    assert both.collectives["all-gather"][1] in (gathered, 2 * gathered)
    reduced = (
        both.collectives.get("reduce-scatter", (0, 0))[1] + both.collectives.get("all-reduce", (0, 0))[1]
    )
    assert gathered <= reduced <= 2 * gathered + 1e3  # cut after it was reduced, or not


PROGRAM = """
HloModule jit_f

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %g = bf16[4,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={1}
  %w = f32[8,8]{1,0} constant({...})
  %dead = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %y = f32[4,8] dot(%p#1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op="a(b) {"}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%next, %y, %g)
}

%condition (q: (s32[], f32[4,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[1,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], /*index=1*/f32[4,8]{1,0}) while(%start), condition=%condition, body=%body
  %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %sum = f32[4,8]{1,0} all-reduce(%out), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %same = f32[4,8]{1,0} copy(%sum)
  %moved = f32[4,8]{1,0} collective-permute(%a), channel_id=3, source_target_pairs={{0,1}}
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%same, %zero, %zero, %moved), dynamic_slice_sizes={1,8}
}
"""


def test_reading_a_program():
    """Loops as often as they run, what nothing uses not at all, a sum that is then cut as one operation."""
    found = work(PROGRAM, 8)
    assert found.operations == 7 * 2 * 4 * 8 * 8
    assert found.collectives == {
        "all-gather": (7, 7 * 4 * 16 * 2 / 2),
        "reduce-scatter": (1, 4 * 8 * 4 * 3 / 4),
        "collective-permute": (1, 4 * 8 * 4),
    }
    assert work(
        PROGRAM.replace("%copy(%sum)", "").replace("%same, %zero", "%a, %zero"), 8
    ).collectives.keys() == {"collective-permute"}


# ------------------------------------------------------------------ a job, against the real thing
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
def test_a_step_takes_what_was_said(sizes):
    """State and arguments to the byte; the rest is the compiler's own."""
    this = job(sizes)
    found, mesh = cost(this), mesh_of(sizes)
    model, step, abstract, batch, _ = _step(this, mesh, kernels=False)
    tx, _ = make_optimizer(this.config.optimizer, this.config.train.steps, model)
    state = init_state(model, tx, abstract)
    held = {
        name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(part))
        for name, part in state.items()
    }
    assert found["state"] == held
    rng = np.random.default_rng(0)
    filled = jax.tree.map(lambda leaf: rng.integers(1, 200, leaf.shape).astype(leaf.dtype), batch)
    assert isinstance(filled, CellBatch)
    state, metrics = step(state, place(filled, mesh))
    assert np.isfinite(metrics["loss"][0])
    # of a batch, only what is read is handed to the device: not n_genes, not depth
    rows = sum(x.dtype.itemsize * x.size for x in (batch.gene_id, batch.count, batch.row, batch.weight))
    assert found["memory"]["arguments"] == sum(held.values()) + rows // (sizes[0] * sizes[1])
    assert found["memory"]["temporaries"] > 0
    assert found["tokens"] == float(metrics["tokens"][0]) == 16 * 64
    assert found["operations"] == pytest.approx(float(metrics["operations"][0]), rel=1e-6)
    again = found["computed"] * 8 / found["operations"]
    assert 1 <= again < 1.5 * sizes[2]  # what is not split over "tensor" is computed on each


def test_splitting_and_recomputing():
    whole, split = cost(job((8, 1, 1))), cost(job((1, 8, 1)))
    assert whole["state"]["params"] / split["state"]["params"] > 4
    assert whole["state"]["opt"] == pytest.approx(2 * whole["state"]["params"], rel=1e-3)
    assert whole["computed"] == split["computed"]
    assert "all-gather" not in whole["collectives"] and split["collectives"]["all-gather"][0] > 3
    again = cost(job((8, 1, 1), model=SMALL | {"remat": "full"}))
    assert again["computed"] > 1.1 * whole["computed"] and again["operations"] == whole["operations"]


def test_the_least_time():
    found = {
        "computed": 989.5e12,
        "operations": 8 * 600e12,
        "collectives": {"all-gather": [3, 450e9], "all-reduce": [1, 450e9]},
        "state": {"params": 335e9, "opt": 670e9, "guard": 8},
    }
    this = job((8, 1, 1), model=SMALL | {"dtype": "bfloat16"})
    times = roofline(found, this)
    assert times["products"] == 1 and times["links"] == 2 and times["update"] == pytest.approx(0.6)
    assert times["step"] == 2 and times["mfu"] == pytest.approx(600 / 989.5 / 2)
    assert roofline(found, this, link=9e12)["step"] == pytest.approx(1.6)
    unknown = Job(this.config, this.n_genes, 8, "some new device")
    assert roofline(found, unknown) == {}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_four_billion_parameters_for_1024_devices_are_lowered(platform):
    device = "H100" if platform == "cuda" else "TPU v5p"
    this = job((16, 64, 1), n_genes=25_424, devices=1024, batch=1024, length=4096, model=FOUR_BILLION)
    this = Job(this.config, this.n_genes, 1024, device, 4096)
    assert this.n_parameters > 4e9
    assert lower(this, platform)["bytes"] > 1e5


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    command = (
        "configs/geneformer.py:smoke --genes 256 --devices 4 --batch 8 --length 64 --mesh fsdp=4".split()
    )
    assert main(["config", "cost", *command, "--lower", "cuda"]) == 0
    page = capsys.readouterr().out
    assert "4 H100 (data 1 × fsdp 4 × tensor 1)" in page and "GB of 80: it fits" in page
    assert "all-gather" in page and "lowered for 4 abstract cuda devices" in page and "MFU at most" in page
    assert main(["config", "cost", *command, "--set", "model.n_layers=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert main(["config", "params", *command[:3], *command[3:5], "--mesh", "fsdp=4"]) == 0
    page = capsys.readouterr().out
    assert "split" in page and "fsdp" in page and "MiB of the state a device" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "data=3"], "3 devices; there are 8"),
        (["--mesh", "dta=8"], "--mesh dta=8"),
        (["--set", "model.n_layer=3"], "n_layers"),
        (["--set", "model.d_model"], "model.d_model=128"),
        (["--set", "train.accumulate=5"], "train.accumulate = 5 does not divide"),
    ],
)
def test_what_cannot_be_costed_is_said(options, message, capsys):
    assert (
        main(["config", "cost", "configs/geneformer.py:smoke", "--genes", "256", "--devices", "8", *options])
        == 2
    )
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.pods
@pytest.mark.parametrize(
    "options",
    [
        "configs/geneformer.py:v2-316m --genes 25424 --devices 1024 --mesh data=16,fsdp=64 --batch 1024 "
        "--set model.remat=full --set model.d_model=3072 --set model.n_heads=24 --set model.n_layers=36 "
        "--set model.d_ff=12288",
        "configs/scfoundation.py --genes 19264 --devices 256 --mesh data=256 --batch 1024 "
        "--set train.accumulate=4",
    ],
    ids=["geneformer-4b", "scfoundation-19264"],
)
def test_large_shapes_fit_an_h100(options, capsys):
    assert main(["config", "cost", *options.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["all"] < 80e9


def test_a_device_that_no_row_knows_is_refused(capsys):
    assert main(["config", "params", "configs/geneformer.py", "--genes", "100", "--device", "H10"]) == 2
    assert "did you mean 'H100'?" in capsys.readouterr().err
