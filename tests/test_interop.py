"""Published checkpoints to run directories and back; what is particular to a system is tested apart."""

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from synthetic import synthetic_adata

import scjax
from scjax import interop, models
from scjax.api import Model
from scjax.cli.main import main
from scjax.genes import Vocabulary
from scjax.interop import mapping
from scjax.nn import initialise
from scjax.train import checkpoint_steps

GENES = 40
TINY = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "max_length": 24}


def model_of(system="geneformer", **config):
    """A model in memory with every parameter and buffer jittered."""
    vocabulary = Vocabulary(
        [f"ENSG{i:011d}" for i in range(GENES)], symbol=[f"GENE{i}" for i in range(GENES)]
    )
    config = TINY | config
    variables = jax.jit(lambda: initialise(models.build(system, config, GENES)))()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + rng.uniform(0.1, 0.2, x.shape).astype(x.dtype) if x.dtype == np.float32 else x,
        variables,
    )
    return Model(system, config, vocabulary, **variables, step=7, path=Path("somewhere"))


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """The folder in which the original's tools keep such a model."""
    folder = tmp_path_factory.mktemp("published") / "gf"
    scjax.export_pretrained(model, folder, format="geneformer")
    return folder


@pytest.fixture
def checkpoint(published, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(published, tmp_path / "checkpoint"))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class TestImport:
    def test_a_run_directory(self, model, published, tmp_path):
        out = tmp_path / "runs" / "gf"
        handle = scjax.import_pretrained("geneformer", published, out)
        assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "model.json", "vocabulary.tsv"]
        assert checkpoint_steps(out / "checkpoints") == [0]
        assert [p.name for p in out.parent.iterdir()] == ["gf"]  # nothing else is left
        moved = out.rename(tmp_path / "moved")
        loaded = scjax.load(moved)
        same(handle.params, model.params)
        same(loaded.params, model.params)
        np.testing.assert_array_equal(loaded.buffers["median"], model.buffers["median"])
        assert loaded.system == "geneformer" and loaded.step == 0
        assert loaded.vocabulary.ids == model.vocabulary.ids
        cells = synthetic_adata(5, GENES)
        np.testing.assert_array_equal(loaded.embed(cells), model.embed(cells))
        about = json.loads((moved / "model.json").read_text())["imported"]
        assert about["source"] == str(published)
        weights = str(published / "model.safetensors")
        assert re.fullmatch("[0-9a-f]{64}", about["files"][weights]) and about["notes"]
        assert {Path(f).name.split(".")[0] for f in about["files"]} >= {"model", "token_dictionary"}

    def test_in_memory(self, model, published):
        handle = scjax.import_pretrained("geneformer", published)
        same(handle.params, model.params)
        cells = synthetic_adata(5, GENES)
        np.testing.assert_array_equal(handle.embed(cells), model.embed(cells))
        assert np.abs(handle.random_twin().embed(cells) - model.embed(cells)).max() > 1e-3
        assert handle.metrics() == []

    def test_dictionaries(self, checkpoint, tmp_path):
        away = tmp_path / "away.pkl"
        for file in checkpoint.glob("token_dictionary*"):
            away.write_bytes(file.read_bytes()) if file.suffix == ".pkl" else None
            file.unlink()
        with pytest.raises(FileNotFoundError, match="token_dictionary"):
            scjax.import_pretrained("geneformer", checkpoint)
        handle = scjax.import_pretrained("geneformer", checkpoint, token_dictionary=away)
        assert len(handle.vocabulary) == GENES
        with pytest.raises(ValueError, match="takes no token_dictionery.*did you mean 'token_dictionary'"):
            scjax.import_pretrained("geneformer", checkpoint, token_dictionery=away)

    def test_nothing_half_written(self, checkpoint, tmp_path):
        out = tmp_path / "out"
        weights = checkpoint / "model.safetensors"
        tensors = load_file(weights)
        name = "bert.encoder.layer.1.output.dense.weight"
        save_file(tensors | {name: tensors[name][:, :-1].copy()}, weights)
        with pytest.raises(ValueError, match=re.escape(f"{name} [16, 31] does not fit params/transformer/")):
            scjax.import_pretrained("geneformer", checkpoint, out)
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
        with pytest.raises(ValueError, match=rf"not in the checkpoint: params/transformer.*\(from {name}\)"):
            scjax.import_pretrained("geneformer", checkpoint, out)
        save_file(tensors | {"bert.extra.weight": np.ones(3, np.float32)}, weights)
        with pytest.raises(ValueError, match=r"1 tensors .* have no place: bert.extra.weight \[3\]"):
            scjax.import_pretrained("geneformer", checkpoint, out)
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
            scjax.import_pretrained("geneformer", checkpoint, out)
        assert {p.name for p in tmp_path.iterdir()} == {"checkpoint"}

    def test_a_failing_write_leaves_nothing(self, published, tmp_path, monkeypatch):
        def full(*_):
            raise OSError("the disk is full")

        monkeypatch.setattr("scjax.interop.pretrained.Checkpoints.save", full)
        with pytest.raises(OSError, match="the disk is full"):
            scjax.import_pretrained("geneformer", published, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_refusals(self, published, tmp_path):
        for name, told in (("genformer", "did you mean 'geneformer'"), ("tiny_model:Tiny", "there are ")):
            with pytest.raises(ValueError, match=f"no published checkpoints of {name!r} are known;.*{told}"):
                scjax.import_pretrained(name, published)
        (tmp_path / "note.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="not empty"):
            scjax.import_pretrained("geneformer", published, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


class TestExport:
    @pytest.mark.parametrize(
        "system", ["geneformer", "scgpt", "tabled_model:Tabled", "test_models:MeanModel"]
    )
    def test_plain_is_read_back(self, system, tmp_path):
        """Also one with integer state, one of a third party, and one without any state."""
        config = {} if ":" in system else TINY
        vocabulary = Vocabulary([f"ENSG{i:011d}" for i in range(GENES)])
        variables = jax.jit(lambda: initialise(models.build(system, config, GENES)))()
        model = Model(system, config, vocabulary, **variables, step=7, path=Path("somewhere"))
        out = tmp_path / "out"
        scjax.export_pretrained(model, out)
        assert sorted(p.name for p in out.iterdir()) == ["model.json", "model.safetensors", "vocabulary.tsv"]
        loaded = scjax.load(out)
        same(loaded.params, model.params)
        same(loaded.buffers, model.buffers)
        assert loaded.step == 7 and loaded.system == system
        cells = synthetic_adata(4, GENES)
        np.testing.assert_array_equal(loaded.embed(cells), model.embed(cells))

    def test_names_are_paths(self, model, tmp_path):
        scjax.export_pretrained(model, tmp_path / "out")
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert "params/gene/embedding" in tensors and "buffers/median" in tensors
        about = json.loads((tmp_path / "out" / "model.json").read_text())
        assert about["system"] == "geneformer" and about["model"]["d_ff"] == 32

    def test_a_changed_export_is_refused(self, model, tmp_path):
        def out(name):
            return tmp_path / name

        for name in ("shape", "missing", "genes", "version"):
            scjax.export_pretrained(model, out(name))
        tensors = load_file(out("shape") / "model.safetensors")
        cut = {**tensors, "params/rank": tensors["params/rank"][1:].copy()}
        save_file(cut, out("shape") / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"params/rank is float32\[23, 16\], the model has float32\[24, 16\]"
        ):
            scjax.load(out("shape"))
        del tensors["params/rank"]
        save_file(tensors, out("missing") / "model.safetensors")
        with pytest.raises(ValueError, match=r"params/rank is absent"):
            scjax.load(out("missing"))
        table = out("genes") / "vocabulary.tsv"
        table.write_text(table.read_text().replace("GENE7", "GENE_7"))
        with pytest.raises(ValueError, match="vocabulary.tsv has been changed"):
            scjax.load(out("genes"))
        about = json.loads((out("version") / "model.json").read_text())
        (out("version") / "model.json").write_text(json.dumps(about | {"version": 9}))
        with pytest.raises(ValueError, match="has version 9; this scjax reads version 1"):
            scjax.load(out("version"))

    def test_refusals(self, model, tmp_path):
        with pytest.raises(ValueError, match="no format 'plian'; did you mean 'plain'"):
            scjax.export_pretrained(model, tmp_path / "out", format="plian")
        other = dataclasses.replace(model, system="test_models:MeanModel")
        with pytest.raises(ValueError, match="cannot be written as one of geneformer; there is plain$"):
            scjax.export_pretrained(other, tmp_path / "out", format="geneformer")
        (tmp_path / "note.txt").write_text("mine")
        with pytest.raises(FileExistsError):
            scjax.export_pretrained(model, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_on_the_command_line(published, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run = tmp_path / "run"
    tokens = checkpoint / "token_dictionary.pkl"
    elsewhere = tokens.rename(tmp_path / "elsewhere.pkl")
    (checkpoint / "token_dictionary.json").unlink()
    command = ["import", "geneformer", str(checkpoint), "--out", str(run)]
    assert main(command) == 2
    assert "token_dictionary" in capsys.readouterr().err and not run.exists()
    assert main([*command, "--token-dictionary", str(elsewhere)]) == 0
    shown = capsys.readouterr().out
    assert "bert.encoder.layer.{0..1}.output.dense.weight" in shown
    assert "params/transformer/blocks/down/kernel" in shown and " 0 missing" in shown and "40 genes" in shown
    assert main(command) == 2  # it is there
    assert "choose another directory" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "plain")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    same(scjax.load(tmp_path / "plain").params, scjax.load(run).params)
    assert main(["export", str(run), "--out", str(tmp_path / "gf"), "--format", "geneformer"]) == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "gf"))
    same(a, b)
    assert main(["export", str(run), "--out", str(tmp_path / "gpt"), "--format", "scgpt"]) == 2
    assert not (tmp_path / "gpt").exists()


@pytest.mark.parametrize("system", sorted(models.SYSTEMS))
def test_every_system_can_be_imported(system, capsys):
    """Each has a module that keeps to the contract, and what its ``read`` takes has a flag in the shell."""
    module = interop.pretrained.module_of(system)
    for pattern, why in module.IGNORED.items():
        assert re.compile(pattern) and why
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    flags = capsys.readouterr().out
    for name in list(inspect.signature(module.read).parameters)[1:]:
        assert f"--{name.replace('_', '-')} " in flags
    with pytest.raises(FileNotFoundError, match="nowhere"):
        scjax.import_pretrained(system, "nowhere")


# ------------------------------------------------------------------------ rules
RULES = [
    *mapping.dense("layers.{i}.up", "params/blocks/up"),
    *mapping.qkv(["layers.{i}.q", "layers.{i}.k", "layers.{i}.v"], "params/blocks/qkv", 2),
    *mapping.attention_out("layers.{i}.out", "params/blocks/out", 2),
    *mapping.norm("norm", "params/norm"),
    *mapping.rows("table", "params/table", np.array([2, 0, 1])),
    *mapping.one("scale", "params/scale"),
]


def theirs(layers=3, d=4):
    rng = np.random.default_rng(0)
    shapes = {"norm.weight": (d,), "norm.bias": (d,), "table": (3, d), "scale": ()}
    for i in range(layers):
        shapes |= {f"layers.{i}.up.weight": (6, d), f"layers.{i}.up.bias": (6,)}
        for name in ("q", "k", "v", "out"):
            shapes |= {f"layers.{i}.{name}.weight": (d, d), f"layers.{i}.{name}.bias": (d,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def ours(layers=3, d=4):
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    blocks = {
        "up": {"kernel": shape(layers, d, 6), "bias": shape(layers, 6)},
        "qkv": {"kernel": shape(layers, d, 3, 2, d // 2), "bias": shape(layers, 3, 2, d // 2)},
        "out": {"kernel": shape(layers, 2, d // 2, d), "bias": shape(layers, d)},
    }
    norm = {"scale": shape(d), "bias": shape(d)}
    return {
        "params": {"blocks": blocks, "norm": norm, "table": shape(3, d), "scale": shape()},
        "buffers": {"seen": shape(3)},
    }


FILL = {"buffers/seen": np.zeros(3)}


class TestRules:
    def test_both_ways(self):
        tensors = theirs()
        variables, account = mapping.import_tensors(RULES, tensors, ours(), fill=FILL)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
            lambda x: (x.shape, x.dtype), ours()
        )
        back = mapping.export_tensors(RULES, variables)
        assert set(back) == set(tensors) == set(account.used) and not account.ignored
        for name, tensor in tensors.items():
            assert back[name].shape == tensor.shape and back[name].flags.c_contiguous
            np.testing.assert_allclose(back[name], tensor, rtol=1e-6)

    def test_the_layers_mean_the_same(self):
        """x W^T + b of theirs is x K + b of ours, for each kind of layer."""
        tensors = theirs()
        params = mapping.import_tensors(RULES, tensors, ours(), fill=FILL)[0]["params"]
        x = np.random.default_rng(1).normal(size=(5, 4))
        up, qkv, out = (params["blocks"][name] for name in ("up", "qkv", "out"))
        for i in range(3):
            mine = lambda name, x=x, i=i: (  # noqa: E731
                x @ tensors[f"layers.{i}.{name}.weight"].T + tensors[f"layers.{i}.{name}.bias"]
            )
            np.testing.assert_allclose(x @ up["kernel"][i] + up["bias"][i], mine("up"), atol=1e-5)
            heads = np.einsum("bd,dthe->bthe", x, qkv["kernel"][i]) + qkv["bias"][i]
            for t, name in enumerate(("q", "k", "v")):
                np.testing.assert_allclose(heads[:, t].reshape(5, 4), mine(name), atol=1e-5)
            mixed = np.einsum("bhe,hed->bd", x.reshape(5, 2, 2), out["kernel"][i]) + out["bias"][i]
            np.testing.assert_allclose(mixed, mine("out"), atol=1e-5)
        np.testing.assert_allclose(params["table"], tensors["table"][[2, 0, 1]], rtol=1e-6)

    def test_what_does_not_fit(self):
        def read(changes, rules=RULES, remove=(), **options):
            tensors = {k: v for k, v in (theirs() | changes).items() if k not in remove}
            return mapping.import_tensors(rules, tensors, ours(), fill=FILL, **options)

        with pytest.raises(
            ValueError, match=r"layers.1.up.weight \[5, 4\] does not fit params/blocks/up/kernel"
        ):
            read({"layers.1.up.weight": np.ones((5, 4))})
        with pytest.raises(ValueError, match=r"layers.2.q.weight \[4, 4\], layers.2.k.weight \[3, 5\]"):
            read({"layers.2.k.weight": np.ones((3, 5))})
        with pytest.raises(ValueError, match=r"table \[2, 4\] does not fit params/table \[3, 4\]"):
            read({"table": np.ones((2, 4))})
        with pytest.raises(ValueError, match=r"^1 variables .*params/norm/bias \(from norm.bias\)$"):
            read({}, remove=("norm.bias",))
        with pytest.raises(ValueError, match=r"params/table \(from no rule\)") as error:
            read({}, rules=[rule for rule in RULES if rule.ours != "params/table"])
        assert str(error.value).startswith("1 tensors of the checkpoint have no place: table [3, 4]. 1 var")
        # a checkpoint of fewer layers lacks the others; those it has are not called superfluous
        gone = tuple(name for name in theirs() if name.startswith("layers.2."))
        with pytest.raises(ValueError, match=r"^6 variables .*from layers.2.up.weight"):
            read({}, remove=gone)
        deeper = {k.replace("layers.2", "layers.3"): v for k, v in theirs().items() if "layers.2" in k}
        with pytest.raises(
            ValueError, match=r"^10 tensors of .* have no place: layers.3.up.weight \[6, 4\]; "
        ):
            read(deeper)
        with pytest.raises(ValueError, match=r"the value of buffers/seen has the shape \[4\]"):
            mapping.import_tensors(RULES, theirs(), ours(), fill={"buffers/seen": np.ones(4)})
        with pytest.raises(ValueError, match=r"fills params/nothing, which the model does not have"):
            read({}, rules=[*RULES, *mapping.one("norm.bias", "params/nothing")])

    def test_account(self):
        extra = {f"layers.{i}.position_ids": np.arange(3) for i in (0, 1)} | {"epoch": np.array(3)}
        why = {r"layers\.\d+\.position_ids": "constants", "epoch": "[not] a tensor"}
        filled = FILL | {"params/norm/bias": 0.5}
        tensors = {k: v for k, v in theirs().items() if k != "norm.bias"} | extra
        variables, account = mapping.import_tensors(RULES, tensors, ours(), why, filled)
        assert account.ignored == {
            "layers.0.position_ids": "constants",
            "layers.1.position_ids": "constants",
            "epoch": "[not] a tensor",
        }
        assert account.missing == {"params/norm/bias": ("norm.bias",)}
        assert variables["params"]["norm"]["bias"].tolist() == [0.5] * 4
        console = Console(width=150)
        with console.capture() as shown:
            console.print(account.table("toy"))
        text = shown.get()
        assert "layers.{0..2}.up.weight" in text and "params/blocks/up/kernel" in text
        assert "layers.{0..1}.position_ids" in text and "not needed: constants" in text
        assert "not needed: [not] a tensor" in text and "params/norm/bias: MISSING" in text
        assert f"{len(tensors) - 3} used, 3 not needed, 1 missing" in text

    @pytest.mark.parametrize(
        "names, expected",
        [
            (["a.0.b", "a.1.b", "c"], ["a.{0..1}.b", "c"]),
            (["a.3.b"], ["a.3.b"]),
            (["a.0.b", "a.2.b"], ["a.{0,2}.b"]),
            (["fc.0.weight", "fc.2.weight.x"], ["fc.0.weight", "fc.2.weight.x"]),
            (["{odd}.b"], ["{odd}.b"]),
        ],
    )
    def test_names_of_layers_together(self, names, expected):
        assert mapping.together(names) == expected


def test_public_names():
    assert {"import_pretrained", "export_pretrained", "interop"} <= set(dir(scjax))
    assert (
        interop.import_pretrained is not scjax.import_pretrained
    )  # the one returns parts, the other a model
