"""Geneformer's folders: what is read, what is written, what is said when a file is not there."""

import json
import pickle
import types

import jax
import numpy as np
import pytest

from scjax import models
from scjax.genes import Vocabulary
from scjax.interop import geneformer as interop
from scjax.interop import import_pretrained, read_dictionary
from scjax.nn import initialise

pytest.importorskip("safetensors")

GENES = 20
SMALL = {"d_model": 8, "n_heads": 2, "n_layers": 2, "d_ff": 12, "max_length": 16}


def handle(**changes):
    """A model as ``scjax.load`` gives it, with random weights and medians."""
    config = {**SMALL, **changes}
    state = jax.jit(lambda: initialise(models.build("geneformer", config, GENES, seed=1)))()
    rng = np.random.default_rng(0)
    jitter = lambda x: np.asarray(x) + rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    vocabulary = Vocabulary([f"ENSG{7 * i:011d}" for i in range(GENES)], [f"GENE{i}" for i in range(GENES)])
    median = rng.lognormal(size=GENES).astype(np.float32)
    return types.SimpleNamespace(
        config=config,
        vocabulary=vocabulary,
        params=jax.tree.map(jitter, state["params"]),
        buffers={**state["buffers"], "median": median},
    )


@pytest.fixture
def folder(tmp_path):
    interop.write(tmp_path / "theirs", handle(specials=True))
    return tmp_path / "theirs"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [{}, {"specials": True}, {"n_outputs": 3}, {"n_outputs": 3, "head": "gene", "specials": True}],
    ids=str,
)
def test_round_trip(changes, tmp_path):
    model = handle(**changes)
    interop.write(tmp_path, model)
    back = import_pretrained("geneformer", tmp_path)
    for field, value in model.config.items():
        assert back.model["config"][field] == value
    assert back.model["vocabulary"].ids == model.vocabulary.ids
    assert back.model["vocabulary"].symbols == model.vocabulary.symbols
    jax.tree.map(np.testing.assert_array_equal, back.model["params"], model.params)
    np.testing.assert_array_equal(back.model["buffers"]["median"], model.buffers["median"])
    assert not back.account.ignored and not back.account.missing


class TestFolderAsPublished:
    def test_layout_of_the_repository(self, folder, tmp_path):
        """Models beside a package that holds the dictionaries of both versions."""
        package = tmp_path / "geneformer" / "gene_dictionaries_30m"
        package.mkdir(parents=True)
        tokens = read_dictionary(folder / "token_dictionary.json")
        medians = read_dictionary(folder / "gene_median_dictionary.json")
        old = {name: i for i, name in enumerate(["<pad>", "<mask>", *list(tokens)[4:]])}
        for place, suffix, content, scale in (
            (package.parent, "gc104M", tokens, 1.0),
            (package, "gc30M", old, 3.0),
        ):
            numbers = {g: np.float64(scale * m) for g, m in medians.items()}  # as in the published pickles
            for stem, values in (("token_dictionary", content), ("gene_median_dictionary", numbers)):
                (place / f"{stem}_{suffix}.pkl").write_bytes(pickle.dumps(values))
        for file in folder.glob("*dict*"):
            file.unlink()
        read = interop.read(folder)
        assert read.config["specials"]
        np.testing.assert_allclose(read.buffers["median"], list(medians.values()), rtol=1e-6)
        interop.write(tmp_path / "v1", handle())
        for file in (tmp_path / "v1").glob("*dict*"):
            file.unlink()
        read = interop.read(tmp_path / "v1")
        assert not read.config["specials"] and "gc30M" in "".join(read.notes)
        np.testing.assert_allclose(read.buffers["median"], 3 * np.array(list(medians.values())), rtol=1e-6)

    def test_tokens_in_any_order(self, folder):
        """Ids are those of the dictionary, also where the special tokens stand among the genes."""
        expected = interop.read(folder)
        tokens, tensors = read_dictionary(folder / "token_dictionary.json"), tensors_of(folder)
        new = dict(zip(tokens, np.random.default_rng(2).permutation(len(tokens)).tolist(), strict=True))
        for name in (interop.WORDS, "cls.predictions.bias"):
            moved = np.empty_like(tensors[name])
            moved[list(new.values())] = tensors[name]
            tensors[name] = moved
        rewrite(folder, tensors)
        (folder / "token_dictionary.json").write_text(json.dumps(new))
        found = interop.read(folder)
        order = [found.vocabulary.ids.index(gene) for gene in expected.vocabulary.ids]
        n = len(interop.SPECIALS)
        words = [s.tensors[interop.WORDS] for s in (found, expected)]
        np.testing.assert_array_equal(words[0][:n], words[1][:n])
        np.testing.assert_array_equal(words[0][n:][order], words[1][n:])
        np.testing.assert_array_equal(found.buffers["median"][order], expected.buffers["median"])

    def test_what_is_not_a_parameter_is_accounted_for(self, folder):
        tensors = tensors_of(folder)
        tensors["bert.embeddings.position_ids"] = np.arange(16)[None]
        tensors["cls.predictions.decoder.weight"] = tensors[interop.WORDS]
        tensors["bert.pooler.dense.weight"] = np.zeros((8, 8), np.float32)
        rewrite(folder, tensors)
        account = import_pretrained("geneformer", folder).account
        assert set(account.ignored) == {
            "bert.embeddings.position_ids",
            "cls.predictions.decoder.weight",
            "bert.pooler.dense.weight",
        }
        assert "no parameters" in account.ignored["bert.embeddings.position_ids"]

    def test_a_gene_without_a_median_gets_no_rank(self, folder):
        medians = read_dictionary(folder / "gene_median_dictionary.json")
        del medians[list(medians)[3]]
        (folder / "gene_median_dictionary.json").write_text(json.dumps(medians))
        read = interop.read(folder)
        assert read.buffers["median"][3] == 0 and (read.buffers["median"] > 0).sum() == GENES - 1
        assert "1 genes have no median" in read.notes[-1]


class TestErrors:
    def fails(self, folder, error, message, **arguments):
        with pytest.raises(error, match=message):
            import_pretrained("geneformer", folder, **arguments)

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        self.fails(folder, FileNotFoundError, "no config.json")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        self.fails(folder, FileNotFoundError, "no weights, neither model.safetensors nor pytorch_model.bin")

    @pytest.mark.parametrize(
        "stem, argument",
        [("token_dictionary", "token_dictionary"), ("gene_median_dictionary", "gene_medians")],
    )
    def test_no_dictionary(self, folder, tmp_path, stem, argument):
        moved = tmp_path / "elsewhere" / "file.json"
        moved.parent.mkdir()
        (folder / f"{stem}.json").rename(moved)
        (folder / f"{stem}.pkl").unlink()
        self.fails(folder, FileNotFoundError, rf"{stem}_gc104M.pkl.*or give {argument}=FILE")
        import_pretrained("geneformer", folder, **{argument: moved})

    def test_dictionary_of_another_model(self, folder, tmp_path):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}))
        self.fails(
            folder, ValueError, "it has 3 tokens, config.json says vocab_size 24", token_dictionary=other
        )
        for kind in ("json", "pkl"):
            (folder / f"token_dictionary.{kind}").unlink()
        other.rename(folder / "token_dictionary_old.json")
        self.fails(folder, ValueError, "no token_dictionary here belongs to")

    def test_medians_of_other_genes(self, folder, tmp_path):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({"ENSMUSG00000000001": 2.0}))
        self.fails(folder, ValueError, "none of its genes is in the token dictionary", gene_medians=other)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; a Geneformer has 'relu'"),
            ({"model_type": "roberta"}, "model_type is 'roberta'"),
            ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
            ({"vocab_size": 25}, "it has 24 tokens, config.json says vocab_size 25"),
            ({"intermediate_size": 13}, r"bert\.encoder\.layer\.0\.intermediate.* does not fit"),
            ({"num_hidden_layers": 3}, r"bert\.encoder\.layer\.2"),
        ],
    )
    def test_another_network(self, folder, changes, message):
        edit(folder / "config.json", **changes)
        self.fails(folder, ValueError, message)

    def test_a_config_that_is_none(self, folder):
        (folder / "config.json").write_text("{}")
        self.fails(folder, ValueError, "no vocab_size, hidden_size")

    def test_an_output_layer_of_its_own(self, folder):
        tensors = tensors_of(folder)
        tensors["cls.predictions.decoder.weight"] = tensors[interop.WORDS] + 1
        rewrite(folder, tensors)
        self.fails(folder, ValueError, "in a Geneformer they are one tensor")

    def test_a_tensor_nobody_knows(self, folder):
        rewrite(folder, {**tensors_of(folder), "bert.extra.weight": np.zeros(2, np.float32)})
        self.fails(folder, ValueError, "bert.extra.weight")

    def test_a_projected_table_cannot_be_written(self, tmp_path):
        with pytest.raises(ValueError, match="one learned vector a gene"):
            interop.write(tmp_path / "x", handle(gene_table={"kind": "projected", "dim": 5}))
        assert not (tmp_path / "x").exists()
