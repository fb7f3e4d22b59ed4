"""Checkpoints of scGPT: every way in which they name things, what does not fit, and the way back."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models import batch_of

import scjax
from scjax import models
from scjax.api import Model
from scjax.interop import scgpt as interop
from scjax.nn import initialise

GENES = 60
TINY = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "max_length": 33}
EVERYTHING = {
    "objective": "masked",
    "zeros": True,
    "zero_probability": True,
    "n_batches": 3,
    "batch_decoder": True,
    "batch_norm": "domain",
    "dab_weight": 1.0,
    "n_outputs": 4,
    "cls_value": 0.0,
}


def model_of(**config):
    vocabulary = scjax.Vocabulary([f"GENE{i}" for i in range(GENES)])
    config = TINY | config
    state = jax.jit(lambda: initialise(models.build("scgpt", config, GENES)))()
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: x + rng.uniform(0.1, 0.2, x.shape).astype(x.dtype) if x.dtype == np.float32 else x, state
    )
    return Model("scgpt", config, vocabulary, **state, step=7, path=Path("somewhere"))


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """A folder as scGPT publishes them, with the weights as safetensors."""
    folder = tmp_path_factory.mktemp("published") / "scgpt"
    scjax.export_pretrained(model, folder, format="scgpt")
    (folder / "best_model.pt").unlink(missing_ok=True)
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(published, tmp_path / "published"))


def respell(folder, change):
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def assert_same(found, model):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found.params), jax.tree.leaves(model.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: name,
        lambda name: name.replace("Wqkv.", "in_proj_"),
        lambda name: name.replace("Wqkv", "_impl.Wqkv").replace("attn.out_proj", "attn._impl.out_proj"),
        lambda name: f"module.{name}",
    ],
    ids=["released", "torch", "wrapped", "parallel"],
)
def test_every_spelling(spelling, folder, model):
    respell(folder, spelling)
    found = scjax.import_pretrained("scgpt", folder)
    assert_same(found, model)
    assert found.config["objective"] == "generative" and found.config["max_length"] == 33
    assert found.vocabulary.symbols == model.vocabulary.symbols
    np.testing.assert_allclose(found.module.embed(batch_of()), model.module.embed(batch_of()), atol=1e-6)
    assert int(found.buffers["calls"]) == 1000  # it is past the first phase of pretraining


@pytest.mark.parametrize("changes", [EVERYTHING, {"objective": "masked", "batch_norm": "shared"}])
def test_every_head(changes, tmp_path):
    model = model_of(**changes)
    scjax.export_pretrained(model, tmp_path / "out", format="scgpt")
    (tmp_path / "out" / "best_model.pt").unlink(missing_ok=True)
    found = scjax.import_pretrained("scgpt", tmp_path / "out")
    assert_same(found, model)
    for name, value in changes.items():
        assert found.config[name] == value, name
    for name in ("mean", "var"):
        np.testing.assert_array_equal(found.buffers["domain_norm"][name], model.buffers["domain_norm"][name])


def test_genes_follow_their_ids_and_special_tokens_may_be_anywhere(folder, model):
    """A vocabulary in another order, with special tokens between the genes, is the same model."""
    names = list(json.loads((folder / "vocab.json").read_text()))
    order = np.random.default_rng(0).permutation(len(names))  # row i of the file is that of our row order[i]
    tensors = load_file(folder / "model.safetensors")
    tensors[interop.TABLE] = np.ascontiguousarray(tensors[interop.TABLE][order])
    save_file(tensors, folder / "model.safetensors")
    (folder / "vocab.json").write_text(json.dumps({names[o]: i for i, o in enumerate(order)}))
    found = scjax.import_pretrained("scgpt", folder)
    genes = [names[o] for o in order if names[o].startswith("GENE")]
    assert found.vocabulary.symbols == genes and genes != sorted(genes)
    ours = np.array([model.vocabulary.symbols.index(g) for g in genes])
    table = np.asarray(model.params["gene"]["embedding"])
    np.testing.assert_array_equal(found.params["gene"]["embedding"][:GENES], table[ours])
    np.testing.assert_array_equal(found.params["gene"]["embedding"][GENES:], table[GENES:])


def test_special_tokens_that_the_vocabulary_lacks_come_last(folder, model):
    edit(folder / "vocab.json", lambda v: [v.pop(name) for name in interop.SPECIALS])
    assert_same(scjax.import_pretrained("scgpt", folder), model)


@pytest.mark.parametrize("objective", ["generative", "masked"])
def test_values_at_another_scale_come_back_as_bins(objective, tmp_path):
    """The scale moves into the layers: the imported model reads bins and computes the same, for cells with
    hidden genes too."""
    model = model_of(value_scale=1 / 50, objective=objective)
    scjax.export_pretrained(model, tmp_path / "out", format="scgpt")
    (tmp_path / "out" / "best_model.pt").unlink(missing_ok=True)
    found = scjax.import_pretrained("scgpt", tmp_path / "out")
    assert found.config.get("value_scale", 1.0) == 1.0 and found.config["cls_value"] == -100
    assert found.config["mask_value"] == -50
    np.testing.assert_allclose(found.module.embed(batch_of()), model.module.embed(batch_of()), atol=2e-6)
    outputs = []
    for module, scale in ((model.module, 1.0), (found.module, 1 / 50)):
        tokens = module.encode(batch_of(), jax.random.key(0))
        cell, genes = module(tokens)
        value, _ = module.decoder(genes)
        prompted, _ = module.mvc(module.gene_embedding(tokens.gene_id), cell)
        used = tokens.gene_id >= 0  # what comes out at padding is read by nothing
        outputs.append((cell, genes[used], scale * value[used], scale * prompted[used]))
        assert tokens.hidden.any(1).all()
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("objective, cls_value", [("generative", -2.0), ("masked", 0.0)])
def test_files_that_do_not_tell_the_value_of_cls(objective, cls_value, tmp_path):
    """Those of scGPT itself: the value is that of padding in pretraining and 0 in fine-tuning."""
    scjax.export_pretrained(model_of(objective=objective), tmp_path / "out", format="scgpt")
    (tmp_path / "out" / "best_model.pt").unlink(missing_ok=True)
    edit(
        tmp_path / "out" / "args.json", lambda args: [args.pop(name) for name in ("cls_value", "mask_value")]
    )
    config = scjax.import_pretrained("scgpt", tmp_path / "out").config
    assert config["cls_value"] == cls_value and config["mask_value"] == -1


class TestErrors:
    def refused(self, folder, *told):
        with pytest.raises(ValueError) as error:
            scjax.import_pretrained("scgpt", folder)
        for text in told:
            assert text in str(error.value)

    def spoil(self, folder, change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    def test_a_missing_tensor(self, folder):
        self.spoil(folder, lambda t: t.pop("decoder.fc.2.bias"))
        self.refused(folder, "params/decoder/value/layers/1/bias", "decoder.fc.2.bias")

    def test_an_unknown_tensor(self, folder):
        self.spoil(folder, lambda t: t.update({"pert_encoder.weight": np.zeros((3, 16), np.float32)}))
        self.refused(folder, "pert_encoder.weight")

    def test_a_wrong_shape(self, folder):
        name = "transformer_encoder.layers.1.norm2.weight"
        self.spoil(folder, lambda t: t.update({name: np.ones(15, np.float32)}))
        self.refused(folder, name, "[15]", "[16]")

    def test_a_vocabulary_of_another_length(self, folder):
        edit(folder / "vocab.json", lambda v: v.update(ONE_MORE=len(v)))
        self.refused(folder, "vocab.json has 64 tokens", "63 rows")

    def test_an_id_twice(self, folder):
        edit(folder / "vocab.json", lambda v: v.update(GENE3=4))
        self.refused(folder, "GENE3 and GENE4 have the same id, 4")

    @pytest.mark.parametrize(
        "change, told",
        [
            ({"embsize": 512}, "embsize = 512; the tensors have 16"),
            ({"nlayers": 12}, "nlayers = 12; the tensors have 2"),
            ({"input_emb_style": "category"}, "only continuous"),
            ({"input_style": "normed_raw"}, "input_style = 'normed_raw'"),
        ],
    )
    def test_settings_that_do_not_fit(self, folder, change, told):
        edit(folder / "args.json", lambda args: args.update(change))
        self.refused(folder, "args.json", told)

    def test_no_number_of_heads(self, folder):
        edit(folder / "args.json", lambda args: args.pop("nheads"))
        self.refused(folder, "has no nheads")

    def test_not_a_checkpoint(self, folder):
        self.spoil(folder, lambda t: t.clear() or t.update(x=np.zeros(2, np.float32)))
        self.refused(folder, "not a checkpoint of scGPT? It holds x")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"best_model\.pt: no such file"):
            scjax.import_pretrained("scgpt", folder)

    @pytest.mark.parametrize("change", [{"norm": "pre"}, {"pool": "mean"}, {"project_unknown": True}])
    def test_what_scgpt_cannot_express_is_not_written(self, change, tmp_path):
        (name,) = change
        with pytest.raises(ValueError, match=f"scGPT's code has no {name}"):
            scjax.export_pretrained(model_of(**change), tmp_path / "out", format="scgpt")
        assert not list(tmp_path.iterdir())


@pytest.mark.parity
def test_weights_of_torch(folder, model):
    """best_model.pt, as the released checkpoints are."""
    import torch

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / "best_model.pt")
    assert_same(scjax.import_pretrained("scgpt", folder), model)
