"""Numbers beside the counts, in a corpus: those of the sources, exactly, however they are built and read."""

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from layouts import write_zarr
from loading import assert_same, build, study, take
from scipy import sparse
from test_corpus import same_bytes
from test_values import valued

from scjax.cli.main import main
from scjax.corpus import Corpus, CorruptDataError, Mixture, append_corpus, build_corpus, join_modalities, plan
from scjax.corpus.gc import gc_corpus
from scjax.corpus.repair import repair_corpus
from scjax.loader import Loader
from scjax.parallel import make_mesh
from scjax.train import DataConfig
from scjax.train.ahead import abstract_batch

NAMES = ("dose", "spatial", "protein", "peaks")
PROTEINS = [f"CD{i}" for i in range(9)]


def random_study(n_cells: int, seed: int) -> ad.AnnData:
    """Cells with some of the values, under one of the names that studies have for them."""
    rng = np.random.default_rng([seed, 11])
    adata = valued(n_cells, seed, tuple(rng.choice(PROTEINS, rng.integers(1, 9), replace=False)))
    adata.obsm["spatial"][rng.random(n_cells) < 0.1] = np.nan
    for name in NAMES[seed : seed + 2]:  # each may be missing in two studies, and is in two
        if rng.random() < 0.5:
            (adata.obs.pop if name == "dose" else adata.obsm.pop)(name)
    if "dose" in adata.obs and rng.random() < 0.5:
        adata.obs["Dosage"] = adata.obs.pop("dose")
    if "protein" in adata.obsm and rng.random() < 0.5:
        adata.obsm["antibodies"] = adata.obsm.pop("protein")
    return adata


def expected(source: ad.AnnData, name: str, features: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """What a corpus should hold of a value of a source: float32 [n] or [n, features]."""
    if name == "dose":
        column = next((source.obs[key] for key in ("dose", "Dosage") if key in source.obs), None)
        values = np.full(source.n_obs, np.nan) if column is None else column.to_numpy()
    else:
        key = "antibodies" if name == "protein" and "antibodies" in source.obsm else name
        values = np.full((source.n_obs, *shape), np.nan)
        if key in source.obsm:
            table = source.obsm[key]
            table = table.toarray() if sparse.issparse(table) else table
            table = pd.DataFrame(table).set_axis([str(c) for c in pd.DataFrame(table).columns], axis=1)
            values = table.reindex(columns=features).to_numpy()
    return values.astype(np.float32)


def check(corpus, studies: dict[str, ad.AnnData], loaders=()) -> None:
    """Every cell of the corpus, and of batches of one epoch, has the values of its source."""
    obs = corpus.read(slice(None)).obs
    dataset, row = obs["scjax_dataset"].astype(str).to_numpy(), obs["scjax_source_row"].to_numpy()
    read = corpus.read(slice(None))
    for name, panel in corpus.panels.items():
        tables = {
            key: expected(adata, name, list(panel.features), panel.shape) for key, adata in studies.items()
        }
        wanted = np.stack([tables[key][at] for key, at in zip(dataset, row, strict=True)])
        found = read.obs[name] if panel.column else read.obsm[name]
        np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)
        if panel.named:
            assert list(found.columns) == list(panel.features)
        for batches in loaders:
            for batch in batches:
                real = batch.weight > 0
                np.testing.assert_array_equal(batch.value[name][real], wanted[batch.row[real]])
                assert np.isnan(batch.value[name][~real]).all() and batch.value[name].dtype == np.float32


@pytest.fixture(scope="module")
def studies() -> dict[str, ad.AnnData]:
    return {f"study{seed}": random_study(150 + 40 * seed, seed) for seed in range(4)}


OPTIONS = {"validation": 0.2, "columns": {"dose": ["Dosage"], "protein": ["antibodies"]}, "values": NAMES}
TINY = {"part_cells": 150, "inner": 2**8, "shard": 2**10, "progress": False}


@pytest.fixture(scope="module")
def files(studies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for number, (name, adata) in enumerate(studies.items()):
        if number % 2:
            adata.write_h5ad(folder / f"{name}.h5ad")
        else:
            write_zarr(adata, folder / f"{name}.zarr", 3)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def corpus(files, tmp_path_factory) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "RUN_ELEMENTS", 4000)
        return build_corpus(files, tmp_path_factory.mktemp("corpus") / "c", **OPTIONS, **TINY, workers=1)


def test_every_cell_has_the_values_of_its_source(corpus, studies):
    assert list(corpus.values) == list(NAMES) and corpus.values["dose"] == ["dose"]
    assert set(corpus.values["protein"]) == {
        f
        for adata in studies.values()
        for key in ("protein", "antibodies")
        if key in adata.obsm
        for f in adata.obsm[key]
    }
    assert corpus.verify(progress=False) == []
    loader = Loader(corpus, 64, values=None)
    sparse_loader = Loader(corpus, 64, values=NAMES, sparse=True)
    steps = loader.steps_per_epoch
    check(corpus, studies, [take(loader, steps), take(sparse_loader, steps)])
    part = corpus.parts[0]
    plain = ad.read_zarr(part.path)  # anndata alone, without scjax
    here = corpus.read(slice(0, part.n_cells))
    np.testing.assert_array_equal(plain.obsm["protein"], here.obsm["protein"].to_numpy())
    assert list(plain.uns["scjax"]["features"]["protein"]) == corpus.values["protein"]


def test_the_same_bytes_whoever_builds(corpus, files, studies, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RUN_ELEMENTS", 4000)
    made, share = None, itertools.cycle([1, 0, 2])
    while made is None:  # shares of an array, in some order
        made = build_corpus(files, tmp_path / "shares", **OPTIONS, **TINY, task=(next(share), 3))
    same_bytes(corpus.path, tmp_path / "shares")
    memory = build_corpus(list(studies.values()), tmp_path / "memory", names=list(studies), **OPTIONS, **TINY)
    assert [part.id for part in memory.parts] == [part.id for part in corpus.parts]


def test_a_cursor_hosts_weights_and_the_loader_without(corpus):
    options = {"batch_size": 32, "seed": 3, "values": ["protein", "dose"]}
    weights = {"weights": {"dataset": 0.5}, "epoch_cells": 200}
    for more in ({}, weights):
        loader = Loader(corpus, **options, **more)
        batches = take(loader, 9)
        iterator = iter(loader)
        for _ in range(4):
            next(iterator)
        state = iterator.get_state()
        iterator.close()
        for first, again in zip(batches[4:], take(Loader(corpus, **options, **more), 5, state), strict=True):
            assert_same(first, again)
        hosts = [
            take(Loader(corpus, **options, **more, process_index=i, process_count=2), 5, state)
            for i in (0, 1)
        ]
        for whole, *shares in zip(batches[4:], *hosts, strict=True):
            for name in options["values"]:
                joined = np.concatenate([share.value[name] for share in shares])
                np.testing.assert_array_equal(whole.value[name], joined)
    plain = take(Loader(corpus, 32, seed=3), 9)
    for with_, without in zip(take(Loader(corpus, **options), 9), plain, strict=True):
        assert without.value == {}
        assert_same(with_.replace(value={}), without)


def test_damage_is_told_repaired_and_nothing_left(corpus, tmp_path):
    import shutil

    shutil.copytree(corpus.path, tmp_path / "c")
    part = corpus.parts[0]
    shard = tmp_path / "c" / f"parts/{part.id}.zarr/obsm/protein/c/0/0"
    column = tmp_path / "c" / f"index/{part.id}/values/dose.npy"
    before = {path: path.read_bytes() for path in (shard, column)}
    for path, content in before.items():
        spoiled = bytearray(content)
        spoiled[len(content) // 3 if path == column else 20] ^= 1
        path.write_bytes(spoiled)
    damaged = Corpus.open(tmp_path / "c")
    with pytest.raises(CorruptDataError, match=r"array obsm/protein, shard 0.*checksum"):
        damaged.read([part.first_row])
    with pytest.raises(CorruptDataError, match="column values/dose: rows 0"):
        damaged.parts[0].column("values/dose")
    assert len(damaged.verify(progress=False)) == 2
    column.unlink()
    assert len(repair_corpus(tmp_path / "c", progress=False)) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert gc_corpus(tmp_path / "c").removed == []


def test_an_append_keeps_the_features(tmp_path):
    first, more = valued(120, 0, ("CD3", "CD4")), valued(90, 1, ("CD19", "CD4", "CD8"))
    del more.obs["dose"], more.obsm["peaks"]
    old = build({"a": first}, tmp_path / "c", values=["dose", "protein", "peaks"])
    new = append_corpus(tmp_path / "c", more, names=["b"], progress=False)
    assert new.values == old.values and new.values["protein"] == ["CD3", "CD4"]
    entry = new.manifest["datasets"][1]
    assert entry["left_out"] == {"features of protein": 2} and entry["values"] == {"protein": 3}
    check(new, {"a": first, "b": more}, [take(Loader(new, 30, values=None), 7)])
    assert new.verify(progress=False) == []
    bare = study(40, 2)  # without any
    newer = append_corpus(tmp_path / "c", bare, names=["c"], progress=False)
    check(newer, {"a": first, "b": more, "c": bare})
    more.obsm["protein"] = more.obsm["protein"].to_numpy()
    with pytest.raises(
        ValueError, match=r"'protein' has 2 named features \(CD3, CD4, ...\) in the corpus and 3"
    ):
        append_corpus(tmp_path / "c", more, names=["d"], progress=False)
    assert Corpus.open(tmp_path / "c", old.manifest_id).values == old.values


def test_mixtures_unite_values_or_say_why_not(tmp_path):
    a, b, c = valued(100, 0, ("CD3", "CD4")), valued(80, 1, ("CD4", "CD8")), study(60, 2)
    b.obsm["spatial"] = np.zeros((80, 3))
    del b.obs["dose"]
    corpora = {
        "x": build({"a": a}, tmp_path / "x", values=["protein", "spatial", "dose"]),
        "y": build({"b": b}, tmp_path / "y", values=["protein", "spatial"]),
        "z": build({"c": c}, tmp_path / "z"),
    }
    assert corpora["z"].values == {} and "values" not in corpora["z"].manifest
    mixture = Mixture(corpora)
    assert mixture.values == {"protein": ["CD3", "CD4", "CD8"], "dose": ["dose"]}
    loader = Loader(mixture, 30, values=["protein", "dose"])
    check(mixture, {"a": a, "b": b, "c": c}, [take(loader, loader.steps_per_epoch)])
    with pytest.raises(ValueError, match=r"'spatial' has 2 features without names in .*x and 3 features"):
        Loader(mixture, 30, values=["spatial"])
    with pytest.raises(KeyError, match=r"has no value 'doze'; it has \['protein', 'spatial', 'dose'\]"):
        Loader(corpora["x"], 30, values=["doze"])


def test_a_corpus_far_away(corpus, studies, file_server):
    far = Corpus.open(file_server(corpus.path).url)
    check(far, studies)
    here = take(Loader(corpus, 64, values=NAMES), 3)
    for near, there in zip(here, take(Loader(far, 64, values=NAMES), 3), strict=True):
        assert_same(near, there)


def test_steps_are_compiled_for_the_shapes(corpus):
    config = DataConfig(corpus=str(corpus.path), batch_size=32, values=NAMES, prefetch=0)
    loader = Loader(corpus, **config.loader())
    (batch,) = take(loader, 1)
    shapes = {name: panel.shape for name, panel in loader.panels.items()}
    ahead = abstract_batch(make_mesh(), 32, batch.shape[1], loader.labels, shapes)
    for name in NAMES:
        assert ahead.value[name].shape == batch.value[name].shape and ahead.value[name].dtype == np.float32
    assert sorted(ahead.value) == sorted(batch.value) and sorted(ahead.label) == sorted(batch.label)


def test_errors_of_a_build(tmp_path):
    a, b = valued(60, 0), valued(50, 1)
    both = [a, b]
    with pytest.raises(
        KeyError, match="no source has an obs column or obsm 'doze'; with numbers there are: dose, age"
    ):
        build_corpus(both, tmp_path / "c", values=["doze"], progress=False)
    b.obsm["spatial"] = np.zeros((50, 3))
    with pytest.raises(
        ValueError, match="2 features without names in adata0 and 3 features without names in adata1"
    ):
        build_corpus(both, tmp_path / "c", values=["spatial"], progress=False)
    b.obs["spatial"] = 1.0
    del b.obsm["spatial"]
    with pytest.raises(ValueError, match="is a matrix of obsm in adata0 and a column of obs in adata1"):
        build_corpus(both, tmp_path / "c", values=["spatial"], progress=False)
    with pytest.raises(ValueError, match="must be a name, once, and without '/'"):
        build_corpus(both, tmp_path / "c", values=["dose", "dose"], progress=False)
    a.obsm["spatial"][7, 1] = np.inf
    with pytest.raises(ValueError, match=r"adata', X: spatial: cell cell7 \(row 7\) has inf for 1"):
        build_corpus(a, tmp_path / "c", values=["spatial"], progress=False)
    assert not (tmp_path / "c").exists()


def test_the_command(tmp_path, capsys):
    valued(60, 0).write_h5ad(tmp_path / "a.h5ad")
    command = ["corpus", "build", str(tmp_path / "a.h5ad"), "--out", str(tmp_path / "c"), "--workers", "1"]
    assert main([*command, "--values", "spatial,protein", "dose"]) in (0, None)
    assert Corpus.open(tmp_path / "c").values["protein"] == ["CD3", "CD4", "CD8"]
    capsys.readouterr()
    assert main(["corpus", "info", str(tmp_path / "c")]) in (0, None)
    assert "CD3, CD4, CD8" in capsys.readouterr().out


def test_modalities_are_joined_by_the_names_of_cells(tmp_path):
    rna = study(80, 0)
    counts = np.random.default_rng(0).poisson(4.0, (80, 3)).astype(np.float32)
    order = np.random.default_rng(1).permutation(80)
    names = pd.DataFrame(index=["CD3", "CD4", "CD8"])
    protein = ad.AnnData(sparse.csr_matrix(counts[order]), obs=rna.obs[[]].iloc[order], var=names)
    joined = join_modalities(rna, {"protein": protein})
    np.testing.assert_array_equal(joined.obsm["protein"].to_numpy(), counts)
    assert list(joined.obsm["protein"].columns) == ["CD3", "CD4", "CD8"] and "protein" not in rna.obsm
    build({"a": joined}, tmp_path / "c", values=["protein"])

    fewer = protein[10:].copy()
    gone = set(rna.obs_names) - set(fewer.obs_names)
    with pytest.raises(
        ValueError,
        match=r"'rna' and 'protein' do not share all cells: 70 have both, 10 cells are in 'rna' alone \(cell",
    ):
        join_modalities(rna, {"protein": fewer})
    kept = join_modalities(rna, {"protein": fewer}, missing="nan")
    absent = kept.obsm["protein"].isna().all(axis=1)
    assert set(kept.obs_names[absent]) == gone
    assert set(join_modalities(rna, {"protein": fewer}, missing="drop").obs_names) == set(fewer.obs_names)

    class MuData:  # what a MuData has of it
        mod = {"rna": rna, "adt": protein}

    np.testing.assert_array_equal(join_modalities(MuData()).obsm["adt"].to_numpy(), counts)
    suffixed = protein.copy()
    suffixed.obs_names = [f"{name}-1" for name in suffixed.obs_names]
    with pytest.raises(ValueError, match="the names differ in their endings"):
        join_modalities(rna, {"protein": suffixed}, missing="nan")
    with pytest.raises(KeyError, match=r"no modality 'gex' to be the counts; there are \['rna', 'adt'\]"):
        join_modalities(MuData(), key="gex")
