"""Drug response: a planted interaction is found, pairs and splits are what they say, bad tables are named."""

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from fitting import batches, fit
from scipy import sparse

from scjax import models
from scjax.config import ConfigError
from scjax.finetune.drugs import (
    baselines,
    log_profiles,
    pair_cells,
    planted_pairs,
    scores,
    split_pairs,
)
from scjax.genes import Vocabulary
from scjax.nn import bind
from scjax.nn.module import initialise
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step

LINES, GENES, DRUGS, BITS = 60, 40, 24, 8
BASE = {"system": "tiny_model:Tiny", "model": {"d_model": 16, "n_layers": 1, "dropout": 0.0}}
SYSTEM = "scjax.finetune.drugs:DrugResponse"


@pytest.fixture(scope="module")
def lines():
    """Profiles of lines that differ in four programmes."""
    rng = np.random.default_rng(0)
    rate = np.exp(2.5 + 0.5 * rng.normal(size=(LINES, 4)) @ rng.normal(size=(4, GENES)))
    names = [f"line{i}" for i in range(LINES)]
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame({"line": names}, index=names),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(GENES)]),
    )


@pytest.fixture(scope="module")
def planted(lines):
    """(pairs, fingerprints, log profiles, cells of the pairs)."""
    log = log_profiles(lines, "line")
    pairs, fingerprints = planted_pairs(log, DRUGS, BITS)
    return pairs, fingerprints, log, pair_cells(lines, pairs, fingerprints)


def response(drug, kind="regression", size=1, **config):
    task = {"kind": kind, "size": size, "hidden": (32,)}
    config = {"base": BASE, "tasks": {"response": task}, "drug": drug} | config
    return models.build(SYSTEM, config, GENES)


def scaled(model, data):
    """The heads' scaling, from data, as fine-tuning sets it."""

    def prepare(state):
        module = bind(model, state["params"], state["buffers"])
        x = np.concatenate([module.features(batch)[batch.weight > 0] for batch in data])
        head = state["buffers"]["heads"]["response"]
        head["centre"], head["spread"] = jnp.asarray(x.mean(0)), jnp.asarray(x.std(0) + 1e-6)
        return state

    return prepare


def predicted(module, data):
    return np.concatenate([np.asarray(module.predict(b)["response"])[b.weight > 0] for b in data])


FINGERPRINT = {"fingerprint": {"kind": "value", "size": BITS}}


@pytest.fixture(scope="module")
def trained(planted):
    """Trained on the pairs of four fifths of the lines, the base frozen; and the fold."""
    pairs, _, _, cells = planted
    train, test = split_pairs(pairs, "sample", seed=1)[0]
    vocabulary = Vocabulary(list(cells.var_names))
    read = lambda rows: batches(cells[rows].copy(), vocabulary, 128, values=("response", "fingerprint"))  # noqa: E731
    model, data = response(FINGERPRINT), read(train)
    start = initialise(model)
    return start, fit(model, data, 200, 1e-2, prepare=scaled(model, data)), train, test, read(test)


def test_a_planted_interaction_is_recovered_above_the_additive_predictor(planted, trained):
    pairs, fingerprints, log, _ = planted
    _, module, train, test, data = trained
    of = {"model": predicted(module, data)[:, 0]}
    of |= baselines(pairs, train, test, log, fingerprints)
    found = {name: scores(pairs.iloc[test], y) for name, y in of.items()}
    assert found["model"]["r_within_drug"] > 0.75
    assert found["model"]["rmse"] < 0.7 * found["additive"]["rmse"]
    # nothing but an interaction tells apart lines that were never seen, beyond what adds up
    assert abs(found["additive"]["r_within_drug"]) < 0.1
    assert found["ridge"]["r_within_drug"] < 0.8 * found["model"]["r_within_drug"]
    assert found["ridge with products"]["r_within_drug"] > 0.75


def test_the_base_is_frozen_and_the_drug_is_trained(trained):
    start, module, *_ = trained
    frozen = start["buffers"]["base"]["gene"]["embedding"]
    np.testing.assert_array_equal(module.base.gene.embedding[...], frozen)
    kernel = start["params"]["drug"]["token"]["fingerprint"]["network"]["layers"]["0"]["kernel"]
    now = module.drug.token["fingerprint"].network.layers[0].kernel[...]
    assert np.abs(np.asarray(now) - kernel).max() > 1e-3


def test_a_pair_does_not_depend_on_its_batch(trained):
    _, module, _, _, data = trained
    whole = data[0]
    some = np.array([40, 3, 77])
    few = jax.tree.map(lambda x: x[some], whole)
    a, b = module.predict(few)["response"], module.predict(whole)["response"][some]
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_step_is_the_same_on_one_device_and_two(planted):
    *_, cells = planted
    cells = cells[:64].copy()
    cells.obs["drug_code"] = pd.Categorical(cells.obs["drug"])
    data = batches(
        cells,
        Vocabulary(list(cells.var_names)),
        64,
        values=("response", "fingerprint"),
        labels=("drug_code",),
    )[0]
    drug = FINGERPRINT | {"drug_code": {"kind": "label", "size": DRUGS}}
    model, losses = response(drug, train="all"), []
    for n in (1, 2):
        mesh = make_mesh(MeshConfig(n, 1, 1), jax.devices()[:n])
        tx, _ = make_optimizer(OptimizerConfig(1e-2, warmup_steps=1), 3, model)
        abstract = abstract_state(model, tx, mesh)
        step, state = make_train_step(model, tx, abstract, seed=0), init_state(model, tx, abstract)
        for _ in range(2):
            state, metrics = step(state, place(data, mesh))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
    assert losses[1] < losses[0]


def test_classes_and_learned_drugs(planted):
    """Sensitive or resistant, drugs by name: which lines each acts on is learned, not only how often."""
    pairs, _, _, cells = planted
    cells = cells.copy()
    cells.obs["response"] = np.where(cells.obs["response"] > 0, "resistant", "sensitive")
    train, test = split_pairs(pairs, "sample", seed=1)[0]
    vocabulary = Vocabulary(list(cells.var_names))
    names = {"response": ["resistant", "sensitive"], "drug": sorted(pairs["drug"].unique())}
    read = lambda rows: batches(  # noqa: E731
        cells[rows].copy(), vocabulary, 128, labels=("response", "drug"), categories=names
    )
    model, data = response({"drug": {"kind": "label", "size": DRUGS}}, "classes", 2), read(train)
    module = fit(model, data, 150, 1e-2, prepare=scaled(model, data))
    right = predicted(module, read(test)).argmax(1) == (cells.obs["response"].to_numpy() == "sensitive")[test]
    of_drug = pd.Series((pairs["response"] > 0).to_numpy()[train]).groupby(pairs["drug"].to_numpy()[train])
    majority = (pairs["response"] > 0)[test] == pairs["drug"][test].map(of_drug.mean() > 0.5)
    assert right.mean() > majority.mean() + 0.08


def test_pairs_become_cells(lines, planted):
    pairs, fingerprints, _, cells = planted
    assert cells.n_obs == len(pairs) == LINES * DRUGS
    row = 7 * DRUGS + 3
    sample = pairs["sample"][row]
    assert list(cells.obs.iloc[row]) == list(pairs.iloc[row]) and cells.obs_names[row] == f"{sample}|drug3"
    np.testing.assert_array_equal(cells.X[row].toarray(), lines[sample].X.toarray())
    np.testing.assert_array_equal(cells.obsm["fingerprint"][row], fingerprints.loc["drug3"])
    several = ad.concat([lines, lines], index_unique="-")
    few = pairs.iloc[[5, 700]]
    both = pair_cells(several, few, sample_key="line")
    assert list(both.obs["drug"]) == [few["drug"].iloc[0]] * 2 + [few["drug"].iloc[1]] * 2
    assert "fingerprint" not in both.obsm


def test_splits_hold_out_what_they_say(planted):
    pairs = planted[0]
    for unseen, columns in {"sample": ["sample"], "drug": ["drug"], "both": ["sample", "drug"]}.items():
        tested = []
        for train, test in split_pairs(pairs, unseen, 4, seed=2):
            for column in columns:
                assert not set(pairs[column].iloc[train]) & set(pairs[column].iloc[test])
            assert len(test) and len(train)
            tested += list(test)
        assert len(set(tested)) == len(tested) == len(pairs) // (4 if unseen == "both" else 1)
    with pytest.raises(ValueError, match="24 drugs cannot be held out in 25 folds"):
        split_pairs(pairs, "both", 25)


def test_baselines_find_what_they_can(planted):
    _, _, log, _ = planted
    pairs, fingerprints = planted_pairs(log, DRUGS, BITS, interaction=0.0, noise=0.1)
    train, test = split_pairs(pairs, "sample")[0]
    found = baselines(pairs, train, test, log, fingerprints)
    score = {name: scores(pairs.iloc[test], y) for name, y in found.items()}
    assert score["mean"]["r"] == 0 and score["sample mean"]["r_within_drug"] == 0
    np.testing.assert_allclose(found["additive"], found["drug mean"], atol=0.02)
    assert score["ridge"]["r_within_drug"] > 0.9 > score["drug mean"]["r"] > 0.5
    train, test = split_pairs(pairs, "drug")[0]
    named = baselines(pairs, train, test, log, unseen="drug")
    assert scores(pairs.iloc[test], named["additive"])["r_within_drug"] > 0.9
    # of a drug without fingerprint that was never seen, nothing is known but how samples differ
    by_drug = pd.Series(named["additive"]).groupby(pairs["drug"].to_numpy()[test]).mean()
    assert by_drug.std() < 1e-6


def test_bad_tables_are_named(lines, planted):
    pairs, fingerprints, _, _ = planted

    def told(words, pairs=pairs, fingerprints=fingerprints, **options):
        with pytest.raises(ValueError) as error:
            pair_cells(lines, pairs, fingerprints, **options)
        for word in words:
            assert word in str(error.value)

    told(["['response']", "ic50"], pairs.rename(columns={"response": "ic50"}))
    told(["'cell_line'", "line"], sample_key="cell_line")
    told(["'line0', 'drug0'", "again", "average"], pd.concat([pairs, pairs.iloc[:2]]))
    told(["row 4", "nan", "1 are missing"], pairs.assign(response=pairs["response"].where(pairs.index != 4)))
    told(["row 2", "names no sample", "1 such"], pairs.assign(drug=pairs["drug"].where(pairs.index != 2)))
    told(["1 samples", "'linne3'", "'line3'"], pairs.replace({"sample": {"line3": "linne3"}}))
    told(["2 drugs", "'drug1'", "a fingerprint"], fingerprints=fingerprints.drop(index=["drug1", "drug7"]))
    told(["not finite"], fingerprints=fingerprints.replace(1.0, np.inf))
    told(["'drug0'", "twice"], fingerprints=pd.concat([fingerprints, fingerprints.iloc[:1]]))


def test_bad_configs_are_named(trained):
    with pytest.raises(ConfigError, match="model.drug is empty"):
        response({})
    with pytest.raises(ConfigError, match="model.drug.place.kind is 'coordinates'"):
        response({"place": {"kind": "coordinates", "size": 2}})
    with pytest.raises(ConfigError, match="knd is unknown; did you mean 'kind'"):
        response({"drug": {"knd": "label", "size": 2}})
    _, module, _, _, data = trained
    with pytest.raises(ValueError, match="'fingerprint'.*batches carry the values \\['response'\\]"):
        module.predict(data[0].replace(value={"response": data[0].value["response"]}))
