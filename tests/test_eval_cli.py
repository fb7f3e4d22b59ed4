"""``scjax eval`` and what comes under it: from files to a report, no scjax model needed, bad input said."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_adata

from scjax.cli.evaluation import join, pairs
from scjax.cli.main import main
from scjax.eval import Results, progress

BOOT = ["--n-boot", "20"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A file with three embeddings of other tools: a good one, noise, and an untrained one."""
    adata = synthetic_adata(160)
    rng = np.random.default_rng(1)
    types = np.eye(4, 8)[adata.obs["cell_type"].cat.codes]
    adata.obsm["X_good"] = 9 * types + rng.normal(size=(160, 8))
    adata.obsm["X_noise"] = rng.normal(size=(160, 8))
    adata.obsm["X_before"] = rng.normal(size=(160, 8))
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def score(path, metric: str, **fields: str) -> float:
    wanted = {"metric": metric, "versus": "", "label": "", **fields}
    return next(r["value"] for r in Results.read(path).rows if wanted.items() <= r.items())


# ------------------------------------------------------------------------------------------- cells


def test_two_flags_give_the_full_report(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(cells), "--obsm", "X_good", "--label", "cell_type"]) == 0
    assert {p.name for p in (tmp_path / "cells_eval").iterdir()} == {"report.html", "results.jsonl"}
    page = (tmp_path / "cells_eval" / "report.html").read_text()
    for part in ("Annotation", "Clustering", "Confusion matrix of X_good", "UMAP of the", "Data card", "pca"):
        assert part in page
    assert "X_good" in capsys.readouterr().out
    assert main(["eval", str(cells), "--obsm", "X_good", "--label", "cell_type"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_status_one_where_noise_is_as_good_unless_allowed(cells, tmp_path, capsys):
    command = ["eval", str(cells), "--obsm", "X_noise", "--label", "cell_type", "--tasks", "annotation"]
    command += ["--group", "study", "--out", str(tmp_path / "out"), *BOOT]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "problem: Annotation, macro-F1" in told and "--allow" in told
    assert (tmp_path / "out" / "report.html").exists()
    assert main([*command, "--force", "--allow"]) == 0


def test_status_one_where_a_control_is_missing(tmp_path, cells, capsys):
    adata = ad.read_h5ad(cells)
    bare = ad.AnnData(np.log1p(adata.X.toarray()) / 3, obs=adata.obs, obsm={"X_good": adata.obsm["X_good"]})
    bare.write_h5ad(tmp_path / "bare.h5ad")
    command = ["eval", str(tmp_path / "bare.h5ad"), "--obsm", "X_good", "--label", "cell_type"]
    assert main([*command, "--tasks", "annotation", "--out", str(tmp_path / "out"), *BOOT]) == 1
    assert "the control depth_only is missing" in capsys.readouterr().err


def test_a_file_in_another_order_scores_as_the_obsm_key_does(cells, tmp_path, capsys):
    adata = ad.read_h5ad(cells)
    table = pd.DataFrame(adata.obsm["X_good"], index=adata.obs_names).iloc[::-1]
    table.to_csv(tmp_path / "theirs.csv")
    command = ["eval", str(cells), "--obsm", "X_good", "X_before", "--label", "cell_type"]
    command += ["--tasks", "annotation", "--group", "study", "--twin", "theirs=X_before", *BOOT]
    command += ["--dataset", "blood", "--pretrain-overlap", "none", "--format", "html", "md"]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, "--embedding", str(tmp_path / "theirs.csv")]) == 0
    found = tmp_path / "out" / "results.jsonl"
    place = {"head": "logistic", "group": "mean of groups"}
    a, b = (score(found, "macro_f1", model_id=m, **place) for m in ("X_good", "theirs"))
    assert a == pytest.approx(b, abs=1e-6)
    rows = Results.read(found).rows
    assert {r["model_kind"] for r in rows if r["model_id"] == "random_init"} == {"control"}
    assert {r["pretrain_overlap"] for r in rows} == {"none"} and {r["dataset"] for r in rows} == {"blood"}
    assert (tmp_path / "out" / "report.md").exists() and (tmp_path / "out" / "report_files").is_dir()
    table.iloc[1:].to_csv(tmp_path / "short.csv")
    short = ["--embedding", f"other={tmp_path / 'short.csv'}", "--force"]
    capsys.readouterr()
    assert main([*command, *short]) == 2
    assert "1 of 160 cells have no row" in capsys.readouterr().err


def test_an_embedder_brings_its_twin(cells, tmp_path, monkeypatch, capsys):
    class Theirs:
        def __init__(self, key: str):
            self.key = key

        def embed(self, adata):
            return np.asarray(adata.obsm[self.key])

        def random_twin(self):
            return Theirs("X_before")

    monkeypatch.setattr("scjax.eval.embedder", lambda name: Theirs("X_good"))
    command = ["eval", str(cells), "--embedder", "theirs:weights", "--label", "cell_type", "--group", "study"]
    assert main([*command, "--tasks", "annotation", "--out", str(tmp_path / "out"), *BOOT]) == 0
    roles = {(r["model_id"], r["versus_role"]) for r in Results.read(tmp_path / "out/results.jsonl").rows}
    assert ("theirs", "random-initialised twin") in roles


@pytest.mark.parametrize(
    "further, message",
    [
        (["--label", "cell_type"], "nothing to score"),
        (["--label", "celltype", "--obsm", "X_good"], "celltype.*cell_type"),
        (["--label", "cell_type", "--obsm", "X_no"], "X_no.*X_before"),
        (["--label", "cell_type", "--embedder", "nobody"], "no embedder 'nobody' is registered"),
        (["--label", "cell_type", "--embedding", "none.npz"], "none.npz: no such file"),
        (["--label", "cell_type", "--obsm", "X_good", "--twin", "X_good=X_no"], "X_no.*are needed"),
        (["--label", "cell_type", "--obsm", "X_good", "--twin", "X_good"], "MODEL=TWIN is needed"),
        (["--label", "cell_type", "--obsm", "X_good", "--tasks", "integration"], "needs batch_key"),
        (["--label", "cell_type", "--obsm", "X_good", "--pretrain-corpus", "no.npz"], "no.npz"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(cells, tmp_path, further, message, capsys):
    assert main(["eval", str(cells), *further, "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- the other suites


def run(command: list[object], tmp_path) -> Results:
    """Runs a command with few resamples; the results that it wrote."""
    assert main([*map(str, command), "--out", str(tmp_path / "out"), *BOOT, "--allow"]) == 0
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
    return Results.read(tmp_path / "out" / "results.jsonl")


def order(results: Results, metric: str, **fields: str) -> dict[str, float]:
    wanted = {"metric": metric, "versus": "", "label": "", **fields}
    return {r["model_id"]: r["value"] for r in results.rows if wanted.items() <= r.items()}


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Perturbed cells, the true mean profiles and those of a model that learnt nothing but the mean."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(60)]
    kinds = ["control", *genes[:8]]
    shift = {k: rng.normal(size=60) * (k != "control") for k in kinds}
    names = np.repeat(kinds, [60, *[25] * 8])
    rate = np.exp(2.5 + 0.3 * np.stack([shift[n] for n in names]))
    obs = pd.DataFrame({"perturbation": names}, index=[f"c{i}" for i in range(len(names))])
    real = ad.AnnData(rng.poisson(rate).astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))
    folder = tmp_path_factory.mktemp("screen")
    real.write_h5ad(folder / "real.h5ad")
    profile = {k: np.exp(2.5 + 0.3 * shift[k]) for k in kinds}
    logs = pd.DataFrame({k: np.log1p(1e4 * p / p.sum()) for k, p in profile.items()}, index=genes).T
    logs.index.name = "perturbation"
    logs.iloc[1:].to_csv(folder / "truth.csv")
    (folder / "train.txt").write_text("\n".join(genes[:5]) + "\n")
    return folder


def test_perturbation(screen, tmp_path, capsys):
    command = ["eval", "perturbation", screen / "real.h5ad", "--prediction", f"M={screen / 'truth.csv'}"]
    found = run([*command, "--train", screen / "train.txt"], tmp_path)
    value = order(found, "pearson_delta")
    assert value["M"] > value["train_mean"] + 0.2 and value["M"] > value["noise"]
    wrong = [*map(str, command), "--control", "ctrl", "--out", str(tmp_path / "other")]
    assert main(wrong) == 2 and "ctrl" in capsys.readouterr().err
    assert main([*map(str, command), "--train", "nowhere", "--out", str(tmp_path / "other")]) == 2
    assert "neither an obs column" in capsys.readouterr().err
    assert main(["eval", "perturbation", str(screen / "real.h5ad"), "--out", str(tmp_path / "other")]) == 2
    assert "--prediction or --gene-embedding" in capsys.readouterr().err


def test_genes_and_network(cells, tmp_path, capsys):
    rng = np.random.default_rng(0)
    genes = [f"{chr(65 + i % 26)}{chr(65 + i // 26)}X{i}" for i in range(120)]
    label = np.arange(120) % 2
    table = pd.DataFrame(rng.normal(size=(120, 6)), index=genes)
    table[0] += 3 * label
    table.to_csv(tmp_path / "table.csv")
    pd.DataFrame({"essential": label}, index=genes).to_csv(tmp_path / "labels.tsv", sep="\t")
    sets = "".join(f"set{s}\tna\t" + "\t".join(genes[s::3]) + "\n" for s in range(3))
    (tmp_path / "sets.gmt").write_text(sets)
    command = ["eval", "genes", "--table", f"M={tmp_path / 'table.csv'}", "--labels", tmp_path / "labels.tsv"]
    found = run([*command, "--sets", tmp_path / "sets.gmt"], tmp_path)
    assert order(found, "auroc", head="logistic")["M"] > 0.9
    assert {r["task"] for r in found.rows} == {"genes/property", "genes/sets"}
    assert {r["pretrain_overlap"] for r in found.rows} == {"unknown"}
    assert main([*map(str, command[:4]), "--out", str(tmp_path / "no")]) == 2
    assert "--labels FILE or --sets" in capsys.readouterr().err

    edges = [(genes[r], genes[t]) for r in range(12) for t in rng.choice(np.arange(12, 120), 8, False)]
    pd.DataFrame(edges, columns=["source", "target"]).to_csv(tmp_path / "truth.tsv", sep="\t", index=False)
    scores = pd.DataFrame(rng.uniform(size=(12, 120)), index=genes[:12], columns=genes)
    for source, target in edges:
        scores.loc[source, target] += 0.6
    scores.to_csv(tmp_path / "matrix.csv")
    long = scores.stack().rename_axis(["source", "target"]).rename("score").reset_index()
    long.to_csv(tmp_path / "long.tsv", sep="\t", index=False)
    given = [f"matrix={tmp_path / 'matrix.csv'}", f"long={tmp_path / 'long.tsv'}"]
    command = ["eval", "network", "--scores", *given, "--truth", tmp_path / "truth.tsv", "--force"]
    value = order(run(command, tmp_path), "auprc_ratio", setting="directed")
    assert value["matrix"] > 2 * value["random"] and value["matrix"] == pytest.approx(value["long"])


def test_modalities(cells, tmp_path, capsys):
    adata = ad.read_h5ad(cells)
    rng = np.random.default_rng(0)
    adata.obsm["X_half"] = adata.obsm["X_good"] + 0.1 * rng.normal(size=(160, 8))
    protein = np.exp(0.3 * adata.obsm["X_good"][:, :5])
    names = [f"P{i}" for i in range(5)]
    second = pd.DataFrame(rng.poisson(5 * protein), index=adata.obs_names, columns=names)
    second.to_csv(tmp_path / "protein.csv")
    adata.write_h5ad(tmp_path / "pair.h5ad")
    command = ["eval", "modalities", tmp_path / "pair.h5ad", "--second", tmp_path / "protein.csv"]
    command += ["--joint", "joint=X_good,X_half", "--obsm", "X_good", "X_noise", "--twin", "X_good=X_noise"]
    found = run([*command, "--group", "study", "--label", "cell_type"], tmp_path)
    assert order(found, "foscttm", group="mean of groups")["joint"] < 0.1
    value = order(found, "feature_pearson", group="mean of groups") or order(found, "feature_pearson")
    assert value["X_good"] > value["random_init"]
    assert set(found.facts["wall_s"]) == {"matching", "prediction"}
    assert main(["eval", "modalities", str(tmp_path / "pair.h5ad"), "--second", "nothing"]) == 2
    assert "neither an obsm key" in capsys.readouterr().err


def test_spatial_and_imputation(cells, tmp_path, capsys):
    adata = ad.read_h5ad(cells)
    rng = np.random.default_rng(0)
    adata.obsm["spatial"] = rng.uniform(0, 10, size=(160, 2))
    adata.obs["section"] = np.array(["s1", "s2", "s3"])[np.arange(160) % 3]
    adata.write_h5ad(tmp_path / "tissue.h5ad")
    command = ["eval", "spatial", tmp_path / "tissue.h5ad", "--section", "section"]
    found = run([*command, "--obsm", "X_good", "--region", "cell_type"], tmp_path)
    value = order(found, "macro_f1", task="spatial/niche", head="logistic", group="mean of groups")
    assert value["X_good"] > value["noise"] + 0.3
    genes = list(adata.var_names[:12])
    counts = adata.X.toarray()
    log = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    table = pd.DataFrame(log, index=adata.obs_names, columns=adata.var_names)[genes]
    (table + 0.1 * rng.normal(size=table.shape)).to_csv(tmp_path / "imputed.csv")
    (tmp_path / "genes.txt").write_text("\n".join(genes))
    more = ["--imputed", f"M={tmp_path / 'imputed.csv'}", "--force"]
    found = run([*command, *more, "--held-out", tmp_path / "genes.txt"], tmp_path)
    assert max(order(found, "feature_pearson", model_id="M").values()) > 0.8
    assert main([*map(str, command), *more, "--out", str(tmp_path / "no")]) == 2
    assert "--held-out FILE" in capsys.readouterr().err


# ------------------------------------------------------------------------- compare, leaderboard


def test_compare_and_leaderboard(cells, tmp_path, capsys):
    files = []
    for key in ("X_good", "X_noise"):
        out = tmp_path / key
        command = ["eval", str(cells), "--obsm", key, "--label", "cell_type", "--group", "study", *BOOT]
        command += ["--tasks", "annotation", "--pretrain-overlap", "none", "--allow", "--out", str(out)]
        assert main(command) == 0
        files.append(str(out / "results.jsonl"))
    capsys.readouterr()
    assert main(["eval", "compare", *files]) == 0
    assert "X_good" in (shown := capsys.readouterr().out) and "units" in shown
    assert main(["eval", "leaderboard", *files, "--out", str(tmp_path / "board.md")]) == 1  # noise fails
    told = capsys.readouterr()
    assert "X_noise" in told.out and "problem: Annotation" in told.err
    assert "**X" not in (text := (tmp_path / "board.md").read_text()) and "X\\_good" in text
    assert main(["eval", "leaderboard", *files, "--allow"]) == 0
    assert main(["eval", "leaderboard", files[0], files[0]]) == 2
    assert "both hold scores" in capsys.readouterr().err
    assert main(["eval", "compare", files[0], str(tmp_path / "none.jsonl")]) == 2


def test_words_of_the_command_line():
    assert join(["eval", "genes", "--table"]) == ["eval genes", "--table"]
    assert join(["--debug", "eval", "compare", "a"]) == ["--debug", "eval compare", "a"]
    assert join(["eval", "genes.h5ad"]) == ["eval", "genes.h5ad"]
    assert join(["embed", "genes"]) == ["embed", "genes"] and join(["eval"]) == ["eval"]
    assert pairs(["a=x.csv", "dir/b.tsv.gz"], "--x") == {"a": "x.csv", "b": "dir/b.tsv.gz"}
    with pytest.raises(ValueError, match="there twice"):
        pairs(["dir/a.csv", "other/a.csv"], "--x")
    with pytest.raises(ValueError, match="NAME=FILE is needed"):
        pairs(["=x"], "--x")


def test_progress_is_shown_only_where_asked(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert list(progress.each([1, 2], "work")) == [1, 2]
    assert not capfd.readouterr().err
    with progress.shown(False):
        assert list(progress.each([1, 2], "work")) == [1, 2]
    assert not capfd.readouterr().err
    with progress.shown(), progress.shown():
        assert list(progress.each([1, 2], "work", name=lambda i: f"part {i}")) == [1, 2]
    shown = capfd.readouterr().err
    assert "work: part 1" in shown and "1/2" in shown
