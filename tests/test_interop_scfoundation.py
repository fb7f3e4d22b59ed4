"""scFoundation's file as it is read: three models, settings of its own, a gene list apart."""

import numpy as np
import pytest

from scjax import models
from scjax.genes import Vocabulary
from scjax.interop import scfoundation as interop
from scjax.interop.mapping import export_tensors, import_tensors
from scjax.nn import shapes_of

GENES = 20
SIZES = {
    "d_model": 12,
    "n_heads": 3,
    "n_layers": 3,
    "d_ff": 20,
    "decoder_d_model": 10,
    "decoder_n_heads": 2,
    "decoder_d_head": 8,
    "decoder_n_layers": 2,
    "decoder_d_ff": 14,
    "n_bins": 9,
    "bin_alpha": 0.5,
    "encoder_length": 7,
    "mask_fraction": 0.2,
    "zero_mask_fraction": 0.1,
    "replace_fraction": 0.7,
    "random_fraction": 0.2,
}


def settings():
    encoder = {"module_type": "transformer", "hidden_dim": 12, "heads": 3, "depth": 3, "norm_first": False}
    decoder = {"module_type": "performer", "hidden_dim": 10, "heads": 2, "depth": 2, "dim_head": 8}
    ours = {"seq_len": GENES + 2, "bin_num": 9, "bin_alpha": 0.5, "encoder": encoder, "decoder": decoder}
    data = {"value_mask_prob": 0.2, "zero_mask_prob": 0.1, "replace_prob": 0.7, "random_token_prob": 0.2}
    return {
        "model": "mae_autobin",
        "model_config": {"mae_autobin": {**ours, "bin_type": "auto_bin", "mae_encoder_max_seq_len": 7}},
        "dataset_config": {"rnaseq": data},
    }


def variables(seed):
    shapes = shapes_of(models.build("scfoundation", SIZES, GENES))
    rng = np.random.default_rng(seed)
    draw = lambda s: rng.integers(5, size=s.shape) if "int" in s.dtype.name else rng.normal(size=s.shape)  # noqa: E731
    out = {kind: _map(draw, tree) for kind, tree in shapes.items()}
    for name in ("total", "count"):
        out["buffers"]["gene_mean"][name] = np.zeros(GENES)
    return out


def _map(f, tree):
    return {k: _map(f, v) if isinstance(v, dict) else f(v) for k, v in tree.items()}


def content():
    """What ``torch.load`` gives of a file with the three models, and the variables that they are of."""
    rules, made = interop.rules(SIZES, GENES), {name: variables(i) for i, name in enumerate(interop.MODELS)}
    file = {
        name: {
            "config": settings(),
            "state_dict": {f"model.{k}": v for k, v in export_tensors(rules, state).items()},
        }
        for name, state in made.items()
    }
    return file, made


@pytest.fixture
def file(monkeypatch):
    found, made = content()
    monkeypatch.setattr(interop, "read_tensors", lambda path: found)
    return found, made


def gene_list(path, n=GENES, text=None):
    names = [f"GENE{i}" for i in range(n)]
    names[1] = "NA"  # a name, not a missing one
    lines = ["gene_name\tindex", *(f"{name}\t{i}" for i, name in enumerate(names))]
    path.write_text(text or "\n".join(lines) + "\n")
    return names


@pytest.mark.parametrize("which", interop.MODELS)
def test_each_model_comes_out(file, tmp_path, which):
    names = gene_list(tmp_path / interop.GENES)
    source = interop.read(tmp_path / "models.ckpt", which=which)
    assert source.vocabulary.symbols == names
    assert source.config == SIZES
    model = models.build(source.system, source.config, GENES)
    rules = interop.rules(source.config, GENES)
    fill = {f"buffers/{k}": v for k, v in source.buffers.items()}
    found, account = import_tensors(rules, source.tensors, shapes_of(model), interop.IGNORED, fill)
    assert not account.missing and not account.ignored
    expected = file[1][which]
    for kind in ("params", "buffers"):
        _map_two(
            lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, a.dtype)), found[kind], expected[kind]
        )
    back = export_tensors(rules, found)
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(back[name], np.asarray(tensor, back[name].dtype), err_msg=name)


def _map_two(f, a, b):
    assert sorted(a) == sorted(b)
    for key, value in a.items():
        (_map_two if isinstance(value, dict) else lambda g, x, y: g(x, y))(f, value, b[key])


def test_genes_as_a_vocabulary_or_a_file(file, tmp_path):
    gene_list(tmp_path / "mine.tsv")
    vocabulary = interop.read(tmp_path / "models.ckpt", genes=tmp_path / "mine.tsv").vocabulary
    assert interop.read(tmp_path / "models.ckpt", genes=vocabulary).vocabulary == vocabulary
    gene_list(tmp_path.parent / interop.GENES)  # as in the repository: the weights in a folder beside it
    try:
        assert interop.read(tmp_path / "models.ckpt").vocabulary == vocabulary
    finally:
        (tmp_path.parent / interop.GENES).unlink()


class TestErrors:
    def read(self, tmp_path, **more):
        return interop.read(tmp_path / "models.ckpt", **{"genes": Vocabulary(map(str, range(GENES)))} | more)

    def test_no_such_model(self, file, tmp_path):
        with pytest.raises(ValueError, match="no model 'ce'; which = 'cell' or 'rde' or 'gene'"):
            self.read(tmp_path, which="ce")

    def test_another_file(self, monkeypatch, tmp_path):
        monkeypatch.setattr(interop, "read_tensors", lambda path: {"conv.weight": np.zeros(2)})
        with pytest.raises(ValueError, match="holds cell, rde, gene, each with config.*conv.weight"):
            self.read(tmp_path)

    @pytest.mark.parametrize(
        "part, key, value, message",
        [
            ("encoder", "norm_first", True, "norm_first is True"),
            ("encoder", "module_type", "performer", "encoder.module_type is 'performer'"),
            ("decoder", "heads", None, "the config of the decoder has no heads"),
            (None, "bin_type", "round_bin", "bin_type is 'round_bin'"),
            (None, "seq_len", None, "has no seq_len"),
        ],
    )
    def test_another_architecture(self, file, tmp_path, part, key, value, message):
        theirs = file[0]["cell"]["config"]["model_config"]["mae_autobin"]
        theirs = theirs[part] if part else theirs
        theirs.pop(key, None) if value is None else theirs.update({key: value})
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path)

    def test_no_settings(self, file, tmp_path):
        del file[0]["cell"]["config"]["dataset_config"]
        with pytest.raises(ValueError, match="dataset_config"):
            self.read(tmp_path)

    def test_no_gene_list(self, file, tmp_path):
        with pytest.raises(FileNotFoundError, match="OS_scRNA_gene_index.19264.tsv"):
            self.read(tmp_path, genes=None)

    def test_gene_list_of_another_length(self, file, tmp_path):
        gene_list(tmp_path / "mine.tsv", n=GENES - 1)
        with pytest.raises(ValueError, match="has 19 genes, .* a table of 20"):
            self.read(tmp_path, genes=tmp_path / "mine.tsv")

    @pytest.mark.parametrize(
        "text, message",
        [
            ("gene_name\tindex\nA\t0\nB\t2\n", "does not count"),
            ("symbol\nA\nB\n", "not gene_name and index"),
        ],
    )
    def test_bad_gene_list(self, file, tmp_path, text, message):
        gene_list(tmp_path / "mine.tsv", text=text)
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path, genes=tmp_path / "mine.tsv")

    def test_incomplete_and_misshapen_tensors(self, file, tmp_path):
        state = file[0]["cell"]["state_dict"]
        kept = state.pop("model.encoder.transformer_encoder.0.linear1.weight")
        with pytest.raises(ValueError, match="no tensor encoder.transformer_encoder.0.linear1.weight"):
            self.read(tmp_path)
        state["model.encoder.transformer_encoder.0.linear1.weight"] = kept
        state["model.to_final.weight"] = np.zeros((1, 11))
        source = self.read(tmp_path)
        shapes = shapes_of(models.build("scfoundation", source.config, GENES))
        with pytest.raises(
            ValueError, match=r"to_final.weight \[1, 11\] does not fit params/to_value/kernel"
        ):
            import_tensors(interop.rules(source.config, GENES), source.tensors, shapes)
