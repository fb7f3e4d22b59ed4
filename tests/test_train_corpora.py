"""Training on corpora that are elsewhere, that grow, and that are several."""

from __future__ import annotations

import json
import types

import pytest
import runs
from synthetic import synthetic_adata

import scjax
from scjax.config import ConfigError, from_config
from scjax.corpus import append_corpus, build_corpus, open_corpus
from scjax.train import DataConfig, open_data

TINY = "tests/tiny_config.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus and a cache of compiled functions."""
    directory = tmp_path_factory.mktemp("corpora")
    runs.build_corpus(directory / "corpus")
    return directory


def train(place, name, *, corpus, config=TINY, **overrides):
    output = runs.pretrain(config, place / name, cache=place / "cache", data__corpus=corpus, **overrides)
    return output, losses(place / name)


def losses(workdir):
    """(step, split) -> loss. A run that was told to end early has validated once more."""
    lines = runs.metrics(workdir)
    return {
        (line["step"], split): line[f"{split}/loss"]
        for line in lines
        for split in ("train", "validation")
        if f"{split}/loss" in line and (split == "train" or line["step"] % 8 == 0)
    }


def test_a_corpus_in_an_object_store_trains_a_model(place, s3_corpus):
    _, local = train(place, "local", corpus=place / "corpus")
    url = s3_corpus(place / "corpus")
    s3_corpus.proxy.spoil("503", "X/indices", times=2)  # a store that is busy, hangs up, or cuts short
    s3_corpus.proxy.spoil("close", "X/data", times=1)
    s3_corpus.proxy.spoil("short", "index/", times=1)
    _, first = train(place, "remote", corpus=url, train__steps=9)
    assert s3_corpus.proxy.gets("X/data") and not s3_corpus.proxy.faults[0].times
    _, remote = train(place, "remote", corpus=url)  # resumes; what was read is in the cache
    assert max(first)[0] == 9 and remote == local and max(local)[0] == 16


def test_a_run_goes_on_with_the_state_it_began_with(place):
    grown = place / "grown"
    runs.build_corpus(grown, seed=1)
    _, whole = train(place, "undisturbed", corpus=grown)
    _, part = train(place, "appended", corpus=grown, train__steps=8)
    before = scjax.Corpus.open(grown).manifest_id
    after = append_corpus(grown, [synthetic_adata(80, 48, seed=2)], names=["more"], progress=False)
    assert after.manifest_id != before and len(after) > 300

    output, resumed = train(place, "appended", corpus=grown)
    assert resumed == whole and f"corpus {before}" in output and max(part)[0] == 8
    output, _ = train(place, "fresh", corpus=grown)
    assert f"corpus {after.manifest_id}" in output

    # to change to the new state in the middle is another run
    refused = runs.pretrain(
        TINY,
        place / "appended",
        succeed=False,
        cache=place / "cache",
        data__corpus=f"{grown}@{after.manifest_id}",
        train__steps=20,
    )
    assert before in refused.splitlines()[-1] and after.manifest_id in refused.splitlines()[-1]


def test_a_weighted_mixture_trains_and_resumes(place):
    other = place / "other"
    runs.build_corpus(other, seed=3)
    config = place / "mixed_config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "from tiny_config import get_config as tiny\n"
        "def get_config():\n"
        "    config = tiny()\n"
        "    config.data = ConfigDict(config.data.to_dict() | dict(\n"
        f"        corpus=({str(place / 'corpus')!r}, {str(other)!r}),\n"
        "        shares={'corpus': 3.0, 'other': 1.0},\n"
        "        weights={'cell_type': 0.0},\n"
        "        epoch_cells=128,\n"
        "        labels=('corpus', 'cell_type'),\n"
        "    ))\n"
        "    return config\n"
    )

    def mixed(name, **overrides):
        runs.pretrain(str(config), place / name, cache=place / "cache", **overrides)
        return losses(place / name)

    whole = mixed("mixed")
    mixed("mixed-twice", train__steps=7)
    assert mixed("mixed-twice") == whole
    model = json.loads((place / "mixed" / "model.json").read_text())
    members = open_corpus([place / "corpus", other]).members
    assert model["manifests"] == [corpus.manifest_id for corpus in members.values()]
    cursor = json.loads((place / "mixed" / "checkpoints" / "16" / "data" / "metadata").read_text())
    assert cursor["epoch"] == 2 and cursor["step"] == 0  # of 128 draws, eight batches


def test_bad_corpora_are_told(place):
    output = runs.pretrain(TINY, place / "bad", succeed=False, cache=place / "cache", data__corpus="nowhere")
    assert "no such folder" in output.splitlines()[-1]
    assert not (place / "bad").exists()
    with pytest.raises(ConfigError, match="config.data.weight_level is 'cells'; It must be one of 'auto'"):
        from_config(DataConfig, {"corpus": "a", "batch_size": 4, "weight_level": "cells"}, "config.data")
    with pytest.raises(ConfigError, match="data.shares is for several corpora"):
        open_data(DataConfig("a", 4, shares={"a": 1.0}), place / "bad")


def test_a_folder_with_an_at_sign_is_opened_as_it_was_when_the_run_began(tmp_path, monkeypatch):
    folder = tmp_path / "atlas@2024"
    began = build_corpus(synthetic_adata(n_cells=50, seed=1), folder, names=["one"], progress=False)
    append_corpus(folder, synthetic_adata(n_cells=50, seed=2), names=["two"], progress=False)
    (tmp_path / "model.json").touch()
    run = types.SimpleNamespace(model={"manifests": [began.manifest_id]})
    monkeypatch.setattr("scjax.train.data.read_run", lambda workdir: run)
    assert open_data(DataConfig(str(folder), 4), tmp_path).manifest_id == began.manifest_id
