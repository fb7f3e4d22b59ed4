"""Checkpoints of scBERT and CellLM: there and back, gene lists, and what is refused."""

import dataclasses
import pathlib

import numpy as np
import pytest

from scjax.genes import Vocabulary
from scjax.interop import celllm, import_pretrained, performers, scbert
from scjax.interop.mapping import export_tensors, import_tensors
from scjax.models import build, resolve
from scjax.nn import shapes_of

GOLDEN = pathlib.Path(__file__).parent / "golden"
MODULES = {"scbert": (scbert, 1), "celllm": (celllm, 2)}
GENES = Vocabulary([f"GENE{i}" for i in range(50)])


def weights(system, case):
    with np.load(GOLDEN / f"{system}.npz") as file:
        prefix = f"{case}/weights/"
        return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}


def checkpoint(monkeypatch, content):
    """A ``.pth`` file of that content, without PyTorch: what reading one gives is put in its place."""
    monkeypatch.setattr(performers, "read_tensors", lambda path: content)
    return "checkpoint.pth"


@pytest.mark.parametrize("system", sorted(MODULES))
class TestBoth:
    @pytest.mark.parametrize("case", ["bins", "cell"])
    def test_there_and_back(self, system, case, monkeypatch):
        """Every tensor of the file comes back as it was, float64 table included, in float32."""
        module, n_special = MODULES[system]
        tensors = weights(system, case)
        file = checkpoint(monkeypatch, {"epoch": 3, "losses": 0.1, "model_state_dict": tensors})
        source = module.read(file, genes=GENES)
        assert ("n_outputs" in source.config) == (case == "cell")
        assert any("epoch, losses" in note for note in source.notes)
        model = build(system, source.config, 50)
        config = dataclasses.asdict(resolve(system)[1](**{**source.config, "gene_table": model_table(model)}))
        fill = {"buffers/gene/known": 1.0, "buffers/bin_count": 0.0}
        rules = module.rules(config, 50)
        variables, account = import_tensors(rules, source.tensors, shapes_of(model), module.IGNORED, fill)
        assert not account.missing and set(account.used) | set(account.ignored) == set(source.tensors)
        back = export_tensors(rules, variables)
        expected = performers.split_table(tensors, n_special)
        assert set(back) == set(expected) - set(account.ignored)
        for name, tensor in back.items():
            np.testing.assert_array_equal(tensor, expected[name].astype(tensor.dtype), err_msg=name)

    def test_import(self, system, monkeypatch, tmp_path):
        """The way of users: gene list from a text file, "module." before the names, a model that embeds."""
        module, _ = MODULES[system]
        content = {f"module.{k}": v for k, v in weights(system, "bins").items()}
        (tmp_path / "genes.txt").write_text("\n".join(GENES.ids) + "\n")
        file = checkpoint(monkeypatch, {"model_state_dict": content})
        (tmp_path / file).touch()
        imported = import_pretrained(system, tmp_path / file, genes=tmp_path / "genes.txt")
        assert imported.model["vocabulary"].ids == GENES.ids
        assert imported.model["config"]["gene_table"]["kind"] == "frozen"
        np.testing.assert_array_equal(imported.model["buffers"]["gene"]["known"], 1)
        GENES.to_tsv(tmp_path / "genes.tsv")
        source = module.read(tmp_path / file, genes=tmp_path / "genes.tsv")
        assert source.vocabulary == GENES

    def test_gene_lists_that_do_not_fit(self, system, monkeypatch, tmp_path):
        module, _ = MODULES[system]
        file = checkpoint(monkeypatch, weights(system, "bins"))
        with pytest.raises(ValueError, match=r"does not say which gene each of its 50 rows is: .*genes=FILE"):
            module.read(file)
        with pytest.raises(ValueError, match=r"2 genes; checkpoint.pth has a table of 50"):
            module.read(file, genes=Vocabulary(["A", "B"]))
        (tmp_path / "twice.txt").write_text("A\nA\n" * 25)
        with pytest.raises(ValueError, match="occur more than once: A"):
            module.read(file, genes=tmp_path / "twice.txt")
        with pytest.raises(FileNotFoundError, match=r"none\.txt"):
            module.read(file, genes=tmp_path / "none.txt")

    def test_other_files(self, system, monkeypatch):
        module, _ = MODULES[system]
        with pytest.raises(ValueError, match=r"holds no tensor pos_emb\.emb\.weight.* there is a, b"):
            module.read(checkpoint(monkeypatch, {"b": np.ones(1), "a": np.ones(1)}), genes=GENES)
        tensors = weights(system, "bins")
        missing = {k: v for k, v in tensors.items() if "w1" not in k}
        with pytest.raises(ValueError, match=r"no tensor performer\.net\.layers\.0\.1\.fn\.fn\.w1\.weight"):
            module.read(checkpoint(monkeypatch, missing), genes=GENES)
        tokens = tensors | {"token_emb.weight": np.ones((9, 16))}
        with pytest.raises(ValueError, match="has 9 tokens"):
            module.read(checkpoint(monkeypatch, tokens), genes=GENES)
        name = "performer.net.layers.0.0.fn.fast_attention.projection_matrix"
        features = tensors | {name: np.ones((12, 8))}
        with pytest.raises(ValueError, match="12 random features for heads of width 8; published are 16"):
            module.read(checkpoint(monkeypatch, features), genes=GENES)

    def test_a_tensor_too_many_or_of_another_shape(self, system, monkeypatch, tmp_path):
        tensors = weights(system, "bins")
        file = checkpoint(monkeypatch, tensors | {"extra.weight": np.ones(3)})
        with pytest.raises(ValueError, match=r"extra\.weight \[3\]"):
            import_pretrained(system, file, genes=GENES)
        file = checkpoint(monkeypatch, tensors | {"norm.weight": np.ones(3)})
        with pytest.raises(ValueError, match=r"norm\.weight \[3\] does not fit params/norm/scale \[16\]"):
            import_pretrained(system, file, genes=GENES)


def model_table(model):
    return model.make().config.gene_table


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("system", sorted(MODULES))
def test_a_file_of_pytorch(system, tmp_path):
    import torch

    tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in weights(system, "bins").items()}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    torch.save(
        {"epoch": 1, "model_state_dict": tensors, "optimizer_state_dict": optimizer.state_dict()},
        tmp_path / "model.pth",
    )
    imported = import_pretrained(system, tmp_path / "model.pth", genes=GENES)
    assert any("optimizer_state_dict" in note for note in imported.notes)
