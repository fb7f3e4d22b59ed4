"""Low-rank adapters: nothing changes at step 0, nothing frozen moves, and a merged model is the model."""

import jax
import numpy as np
import pytest
from finetuning import BASE, N_GENES, base_handle, batches_of, planted, wrapped
from jax.sharding import Mesh

import scjax
from scjax import models
from scjax.api import Model
from scjax.config import ConfigError
from scjax.finetune import SYSTEM, LoRA, base_of, make_finetune_optimizer, optimizer_bytes
from scjax.nn import bind, flatten, initialise, params_of
from scjax.parallel import AXES
from scjax.train import OptimizerConfig, abstract_state, init_state, make_train_step, start_from

TASKS = {"cell_type": {"size": 4}}
TINY = {
    "scgpt": BASE["model"],
    "geneformer": {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "max_length": 32},
    "scbert": {"d_model": 16, "n_heads": 2, "d_head": 8, "n_layers": 2, "d_ff": 32,
               "gene_table": {"kind": "random"}},
    "celllm": {"d_model": 16, "n_heads": 2, "d_head": 8, "n_layers": 2, "d_ff": 32,
               "max_length": 64, "parts": 1, "gene_table": {"kind": "random"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def handle(tmp_path_factory):
    return base_handle(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(handle):
    """(model, state at the start, state after five steps, batches)."""
    model = wrapped(TASKS, train="lora", lora={"rank": 4})
    tx, _ = make_finetune_optimizer(OptimizerConfig(1e-2, weight_decay=0.1), 5, model)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    abstract = abstract_state(model, tx, mesh)
    values = start_from(model, handle.params, handle.buffers, prefix="base/").values
    first = jax.tree.map(np.asarray, init_state(model, tx, abstract, values))
    state = init_state(model, tx, abstract, values)
    step = make_train_step(model, tx, abstract, seed=0)
    batches = batches_of(planted(160), handle, labels=["cell_type"])
    for batch in batches:
        state, _ = step(state, batch)
    return model, first, jax.tree.map(np.asarray, state), batches


def embedding(model, variables, batch):
    def run(params, buffers, batch):
        module = bind(model, params, buffers)
        module.eval()
        return module.embed(batch)

    return np.asarray(jax.jit(run)(variables["params"], variables["buffers"], batch))


def test_at_the_start_it_is_the_base_to_the_bit(handle, trained):
    model, first, _, batches = trained
    own = embedding(handle.abstract, {"params": handle.params, "buffers": handle.buffers}, batches[0])
    np.testing.assert_array_equal(embedding(model, first, batches[0]), own)


def test_only_adapters_and_heads_are_trained(trained):
    model, first, last, _ = trained
    trains = flatten(first["params"])
    assert all(path.startswith("heads/") or path.rsplit("/", 1)[1] in ("lora_a", "lora_b") for path in trains)
    assert {path.rsplit("/", 1)[1] for path in trains} >= {"lora_a", "lora_b"}
    moments = {path.split("/mu/")[1] for path in flatten(first["opt"]) if "/mu/" in path}
    assert moments == set(trains)
    for path, value in flatten(first["buffers"]).items():
        np.testing.assert_array_equal(flatten(last["buffers"])[path], value, err_msg=path)
    after = flatten(last["params"])
    moved = [path for path, value in trains.items() if (after[path] != value).any()]
    assert set(moved) == set(trains)


def test_merged_it_is_a_plain_base(handle, trained, tmp_path):
    model, _, last, batches = trained
    config = {"base": BASE, "tasks": TASKS, "train": "lora", "lora": {"rank": 4}}
    tuned = Model(SYSTEM, config, handle.vocabulary, last["params"], last["buffers"], 5, handle.path)
    merged = Model(**base_of(tuned))
    assert merged.system == "scgpt"
    scjax.export_pretrained(merged, tmp_path / "plain")
    loaded = scjax.load(tmp_path / "plain")
    adapted = embedding(model, last, batches[0])
    plain = embedding(loaded.abstract, {"params": loaded.params, "buffers": loaded.buffers}, batches[0])
    np.testing.assert_allclose(plain, adapted, atol=1e-6)
    before = embedding(handle.abstract, {"params": handle.params, "buffers": handle.buffers}, batches[0])
    assert np.abs(before - adapted).max() > 1e-3  # training did something to merge


def test_memory_of_the_optimiser_at_51_million_parameters():
    optimizer, sizes = OptimizerConfig(1e-4), {}
    for train in ("lora", "all"):
        config = {
            "base": {"system": "scgpt", "model": {}},
            "tasks": {"cell_type": {"size": 100}},
            "train": train,
        }
        model = models.build(SYSTEM, config, 60_694)
        sizes[train] = optimizer_bytes(make_finetune_optimizer(optimizer, 10, model)[0], model)
    print(f"optimiser: LoRA {sizes['lora'] / 2**20:.1f} MiB, full {sizes['all'] / 2**20:.1f} MiB")
    assert sizes["all"] > 2 * 4 * 51e6
    assert sizes["lora"] <= 0.05 * sizes["all"]


def test_any_kernels_by_path():
    model = wrapped(TASKS, train="lora", lora={"rank": 2, "kernels": ("*attention/qkv/*", "value/*")})
    paths = [p for p in flatten(params_of(model.make())) if p.endswith("lora_a")]
    assert sorted(paths) == [
        "base/transformer/blocks/attention/qkv/lora_a",
        "base/value/layers/0/lora_a",
        "base/value/layers/1/lora_a",
    ]
    with pytest.raises(ConfigError, match=r"'\*attn/\*' matches no path.*transformer/blocks/attention/out"):
        wrapped(TASKS, train="lora", lora={"kernels": ("*attn/*",)})
    with pytest.raises(ConfigError, match="at least 1"):
        LoRA(rank=0)


@pytest.mark.full
@pytest.mark.parametrize("system", sorted(TINY))
def test_every_system_begins_as_its_base(system, handle):
    base = models.build(system, TINY[system], N_GENES)
    own = jax.jit(lambda: initialise(base))()
    config = {"base": {"system": system, "model": TINY[system]}, "tasks": TASKS, "train": "lora"}
    model = models.build(SYSTEM, config, N_GENES)
    fresh = jax.jit(lambda: initialise(model))()
    start = start_from(model, own["params"], own["buffers"], prefix="base/").values
    for kind in ("params", "buffers"):
        flat = flatten(fresh[kind])
        fresh[kind] = scjax.nn.nest({path: start.get(path, x) for path, x in flat.items()})
    batch = batches_of(planted(32), handle, labels=["cell_type"])[0]
    np.testing.assert_array_equal(embedding(model, fresh, batch), embedding(base, own, batch))
