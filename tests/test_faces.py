"""What a user touches: command line, load/embed/annotate, configs, the notebook; on the cells that ship."""

import json
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
from smoke import ROOT, run_experiment, smoke, write_cells

import scjax
from scjax.cli.main import main
from scjax.models import resolve


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    write_cells(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(files):
    return files / "corpus"


@pytest.fixture(scope="module")
def run(files):
    """The run directory of the quickstart's smoke config."""
    return smoke("quickstart", files)


@pytest.fixture(scope="module")
def model(run):
    return scjax.load(run)


def test_the_quickstart_learns(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert any("validation/masked_mse" in line for line in lines)


class TestCorpus:
    def test_info_and_verify(self, corpus, capsys):
        assert main(["corpus", "info", str(corpus)]) == 0
        shown = capsys.readouterr().out
        assert "pbmc3k" in shown and "pbmc_facs" in shown
        assert main(["corpus", "verify", str(corpus)]) == 0
        assert "whole and consistent" in capsys.readouterr().out

    def test_verify_fails_on_a_flipped_byte(self, corpus, tmp_path, capsys):
        import shutil

        copy = tmp_path / "corpus"
        shutil.copytree(corpus, copy)
        victim = next(copy.glob("parts/*.zarr/X/data/c/0"))
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        assert main(["corpus", "verify", str(copy)]) == 1
        assert "data" in capsys.readouterr().err

    def test_genes_are_a_vocabulary(self, corpus, files):
        genes = scjax.Vocabulary.from_tsv(files / "genes.tsv")
        assert len(genes) == 300
        assert set(genes.ids) < set(scjax.Corpus.open(corpus).vocabulary.ids)
        assert {"LYZ", "NKG7", "S100A8"} <= set(genes.symbols)


class TestEmbed:
    def test_in_place(self, model, files):
        cells = ad.read_h5ad(files / "both.h5ad")
        assert scjax.embed(cells, model, key_added="X_here", batch_size=50) is None
        assert cells.obsm["X_here"].shape == (cells.n_obs, 16) and cells.obsm["X_here"].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(cells.obsm["X_here"], axis=1), 1, rtol=1e-5)
        assert cells.uns["scjax"]["X_here"]["step"] == 30

    def test_depends_on_the_cell_alone(self, model, files):
        """Through the whole path from AnnData: other cells, batch size, gene order, genes by symbol only."""
        cells = ad.read_h5ad(files / "both.h5ad")
        whole = model.embed(cells, batch_size=64)
        few = np.array([700, 3, 41])
        np.testing.assert_allclose(model.embed(cells[few], batch_size=2), whole[few], atol=2e-6)
        order = np.random.default_rng(0).permutation(cells.n_vars)
        np.testing.assert_allclose(model.embed(cells[few, order].copy()), whole[few], atol=2e-6)
        by_symbol = ad.AnnData(cells.X[few], obs=cells.obs.iloc[few])
        by_symbol.var_names = list(cells.var_names)
        np.testing.assert_allclose(model.embed(by_symbol), whole[few], atol=2e-6)

    def test_training_changed_it(self, model, files):
        cells = ad.read_h5ad(files / "both.h5ad")[:40].copy()
        twin = model.random_twin()
        assert twin.step == 0 and twin.n_parameters == model.n_parameters
        assert np.abs(twin.embed(cells) - model.embed(cells)).max() > 0.1

    def test_on_the_command_line(self, run, files, tmp_path, model):
        out = tmp_path / "out.h5ad"
        command = ["embed", str(files / "both.h5ad"), "--model", str(run), "--out", str(out)]
        assert main(command) == 0
        result = ad.read_h5ad(out)
        np.testing.assert_array_equal(result.obsm["X_scjax"], model.embed(ad.read_h5ad(files / "both.h5ad")))
        assert main(command) == 2  # would overwrite
        assert main([*command, "--force"]) == 0

    def test_a_layer(self, model, files):
        cells = ad.read_h5ad(files / "both.h5ad")[:20].copy()
        expected = model.embed(cells)
        cells.layers["counts"] = cells.X.copy()
        cells.X = np.log1p(cells.X.toarray())
        with pytest.raises(ValueError, match="(?i)integer|log"):
            scjax.embed(cells, model)
        assert "X_scjax" not in cells.obsm
        np.testing.assert_array_equal(model.embed(cells, layer="counts"), expected)

    def test_genes_of_raw_and_of_a_small_panel(self, model, files):
        """The counts of raw have raw's genes; few genes are fine if they are the model's."""
        cells = ad.read_h5ad(files / "both.h5ad")[:30].copy()
        expected = model.embed(cells)
        cells.raw = cells
        panel = cells[:, cells.var_names.isin(model.vocabulary.symbols[:14])].copy()
        np.testing.assert_array_equal(model.embed(panel, layer="raw"), expected)
        assert panel.n_vars < 0.05 * len(model.vocabulary) and model.embed(panel).shape == expected.shape
        cells.var_names = [f"unknown{i}" for i in range(cells.n_vars)]
        del cells.var["ensembl_id"]
        with pytest.raises(ValueError, match="0 of 12,881 genes matched"):
            scjax.embed(cells, model)

    def test_repeated_genes(self, model, files):
        cells = ad.read_h5ad(files / "both.h5ad")[:30].copy()
        other = cells.copy()
        other.var_names = [f"{name}-2" for name in cells.var_names]  # the same Ensembl ids
        halves = ad.concat([cells, other], axis=1, merge="same")
        with pytest.raises(ValueError, match="several columns"):
            scjax.embed(halves, model, duplicates="error")
        assert "X_scjax" not in halves.obsm
        scjax.embed(halves, model)
        cells.X = 2 * cells.X
        np.testing.assert_allclose(halves.obsm["X_scjax"], model.embed(cells), atol=2e-6)


def test_annotate(model, files):
    cells = ad.read_h5ad(files / "both.h5ad")
    reference = cells[cells.obs["study"] == "pbmc3k"].copy()
    query = cells[cells.obs["study"] == "pbmc_facs"].copy()
    scjax.annotate(query, model, reference=reference, label_key="cell_type")
    labels, confidence = query.obs["scjax_cell_type"], query.obs["scjax_cell_type_confidence"]
    assert set(labels) <= set(reference.obs["cell_type"].astype(str)) - {"unlabelled"}
    assert confidence.between(1 / 12, 1).all()
    majority = query.obs["cell_type"].value_counts(normalize=True).iloc[0]
    assert (labels.astype(str) == query.obs["cell_type"].astype(str)).mean() > majority
    with pytest.raises(ValueError, match="no obs column 'celltype'.*cell_type"):
        scjax.annotate(query, model, reference=reference, label_key="celltype")


class TestEval:
    def test_a_model(self, run, files, tmp_path, capsys):
        out = tmp_path / "eval"
        command = [
            "eval",
            str(files / "both.h5ad"),
            "--model",
            str(run),
            "--tasks",
            "annotation",
            "--label",
            "cell_type",
            "--group",
            "study",
            "--out",
            str(out),
            "--allow",  # a model of a few steps need not be above every control
        ]
        assert main(command) == 0
        shown = capsys.readouterr().out
        for row in ("X_scjax", "random_init", "pca", "hvg", "noise", "depth_only", "majority"):
            assert row in shown
        assert "</html>" in (out / "report.html").read_text()
        assert main(command) == 2  # the directory holds something

    def test_anybodys_embedding_without_jax(self, files, tmp_path):
        """An obsm key that no scjax model made, in a process that must not import JAX."""
        cells = ad.read_h5ad(files / "both.h5ad")
        rng = np.random.default_rng(0)
        cells.obsm["X_theirs"] = np.asarray(cells.X @ rng.standard_normal((cells.n_vars, 20)), np.float32)
        cells.write_h5ad(tmp_path / "theirs.h5ad")
        code = (
            "import sys; from scjax.cli.main import main; status = main(sys.argv[1:]); "
            "assert 'jax' not in sys.modules and 'flax' not in sys.modules; sys.exit(status)"
        )
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                "eval",
                str(tmp_path / "theirs.h5ad"),
                "--obsm",
                "X_theirs",
                "--tasks",
                "annotation",
                "--label",
                "cell_type",
                "--group",
                "study",
                "--out",
                str(tmp_path / "out"),
                "--allow",
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "X_theirs" in done.stdout


class TestConfigs:
    @pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
    def test_show_and_params(self, config, run, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for arg in (":smoke", ""):
            assert main(["config", "show", f"{config}{arg}"]) == 0
            shown = json.loads(capsys.readouterr().out)
            assert resolve(shown["system"])
        assert not list(tmp_path.iterdir())  # a config says what is done, and does nothing
        params = ["config", "params", str(config), "--genes", "500"]
        if "random_start" in shown and "told" not in shown:  # heads on a model of another run
            assert main(params) == 2
            assert "config.start is missing" in capsys.readouterr().err
            (task,) = shown["model"]["tasks"]
            params += ["--set", f"start={run}", "--set", f"model.tasks.{task}.size=5"]
        assert main(params) == 0
        assert "kernel" in capsys.readouterr().out

    def test_cost_of_a_head_and_of_populations(self, run, capsys):
        """Of a frozen base there are no gradients and moments; what reads more than cells is refused."""
        base = ["config", "cost", f"{ROOT}/configs/finetune.py:head", "--set", f"start={run}", "--json"]
        assert main([*base, "--set", "model.tasks.cell_type.size=5", "--length", "16"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["parameters"] < 1000 and found["operations"] > 0
        assert main(["config", "cost", f"{ROOT}/configs/perturb.py:smoke", "--genes", "500"]) == 2
        assert "label 'set'" in capsys.readouterr().err

    def test_published_scgpt_has_the_published_size(self, capsys):
        assert main(["config", "params", str(ROOT / "configs/scgpt.py"), "--genes", "60694"]) == 0
        assert f"{51_330_049:,}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")  # what AnnData says of other HDF5 files
@pytest.mark.parametrize(
    "command, message",
    [
        (["corpus", "info", "nowhere"], "nowhere"),
        (["corpus", "build", "nowhere.h5ad", "--out", "{tmp}/c"], "nowhere.h5ad"),
        (["embed", "nowhere.h5ad", "--model", "nowhere", "--out", "{tmp}/o.h5ad"], "nowhere"),
        (["eval", "{files}/both.h5ad", "--label", "cell_type", "--out", "{tmp}/e"], "--model"),
        (["eval", "{files}/both.h5ad", "--obsm", "X_no", "--label", "cell_type", "--out", "{tmp}/e"], "X_no"),
        (
            ["embed", "{files}/text.h5ad", "--model", "nowhere", "--out", "{tmp}/o.h5ad"],
            "text.h5ad: not an HDF5",
        ),
        (["embed", "{files}/torn.h5ad", "--model", "nowhere", "--out", "{tmp}/o.h5ad"], "torn.h5ad: damaged"),
        (
            ["eval", "{files}/other.h5ad", "--obsm", "X", "--label", "l", "--out", "{tmp}/e"],
            "other.h5ad: damaged",
        ),
        (
            ["eval", "{files}/both.h5ad", "--model", "no", "--label", "celltype", "--out", "{tmp}/e"],
            "cell_type",
        ),
        (["config", "show", "configs/none.py"], "configs/none.py"),
        (["config", "show", "configs/scgpt.py:smok"], "smok"),
        (["config", "show", "configs/scgpt.py", "--set", "modle.d_model=4"], "did you mean 'model'"),
    ],
)
def test_bad_input_is_one_clear_line(command, message, files, tmp_path, capsys, monkeypatch):
    import h5py

    (files / "text.h5ad").write_text("cells")
    (files / "torn.h5ad").write_bytes((files / "both.h5ad").read_bytes()[:100_000])
    with h5py.File(files / "other.h5ad", "w") as file:
        file["numbers"] = np.arange(3)
    monkeypatch.chdir(ROOT)
    assert main([part.format(tmp=tmp_path, files=files) for part in command]) == 2
    assert message in capsys.readouterr().err.replace("\n", "")
    assert not list(tmp_path.iterdir())


def test_an_unknown_config_key_names_the_nearest(files, corpus):
    done = run_experiment(
        f"--config={ROOT}/configs/scgpt.py:smoke",
        f"--workdir={files}/never",
        f"--config.data.corpus={corpus}",
        "--config.model.d_modell=3",
    )
    assert done.returncode != 0
    assert "d_modell" in done.stderr
    assert not (files / "never").exists()


def test_the_notebook_runs(run, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SCJAX_RUN", str(run))
    notebook = nbformat.read(ROOT / "notebooks" / "probe_a_checkpoint.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(ROOT))
    shown = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    assert "gene/embedding" in shown and "image/png" in shown and "random_init" in shown
