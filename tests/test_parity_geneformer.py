"""Geneformer against the BERT of transformers: the same weights and cells give the same numbers.

Without PyTorch from a golden file that ``tools/reference/geneformer.py`` wrote; with it (marked "parity")
from networks built on the spot, and the way out: what scjax exports, transformers reads.
"""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scjax import models
from scjax.genes import Vocabulary
from scjax.interop import geneformer as interop
from scjax.interop.mapping import export_tensors, import_tensors
from scjax.models.geneformer import Tokens
from scjax.nn import bind, flatten, initialise, shapes_of
from scjax.types import CellBatch

GOLDEN = pathlib.Path(__file__).parent / "golden" / "geneformer.npz"
SMALL = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "max_length": 32}
CASES = {
    "v2": {**SMALL, "specials": True},
    "cell": {**SMALL, "n_outputs": 3, "head": "cell"},
    "gene": {**SMALL, "n_outputs": 3, "head": "gene"},
}


def part(found, prefix):
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


class Case:
    """A network of ours with their weights, and what theirs made of some cells."""

    def __init__(self, name, found):
        self.config, self.found = CASES[name], part(found, f"{name}/")
        self.n_special = 4 if self.config.get("specials") else 2
        self.n_genes = len(self.found["median"])
        self.model = models.build("geneformer", self.config, self.n_genes)
        self.rules = interop.rules(self.config, self.n_genes)
        self.fill = {"buffers/median": self.found["median"], "buffers/token_count": 0.0}
        self.variables = self.imported("weights/")
        self.batch = CellBatch(
            self.found["gene_id"],
            self.found["count"],
            self.found["depth"],
            (self.found["gene_id"] >= 0).sum(1).astype(np.int32),
            np.arange(4, dtype=np.uint32),
            {},
            {},
            np.ones(4, np.float32),
        )

    def imported(self, prefix):
        tensors, shapes = part(self.found, prefix), shapes_of(self.model)
        variables, _ = import_tensors(self.rules, tensors, shapes, interop.IGNORED, self.fill)
        return jax.tree.map(jnp.asarray, variables)

    def module(self, params=None):
        return bind(self.model, params or self.variables["params"], self.variables["buffers"])

    def ours(self, tokens):
        """Our ids of their tokens: genes first."""
        return np.where(tokens < self.n_special, tokens + self.n_genes, tokens - self.n_special).astype(
            np.int32
        )

    def theirs(self, logits):
        """Scores of tokens in their order."""
        return np.concatenate([logits[..., self.n_genes :], logits[..., : self.n_genes]], -1)

    def hidden_tokens(self):
        """The hidden tokens of their objective as our Tokens, with their weights."""
        shown, labels = self.found["shown"], self.found["labels"]
        position = np.argsort(labels == -100, axis=1, kind="stable")[:, : (labels != -100).sum(1).max()]
        target = np.take_along_axis(labels, position, 1)
        on = target != -100
        target = self.ours(np.where(on, target, 0))
        return Tokens(self.ours(shown), shown != 0, position, target, on), on.astype(np.float32)


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@functools.cache
def fresh():
    from reference import geneformer

    return geneformer.golden(seed=11)


SOURCES = [golden, pytest.param(fresh, marks=pytest.mark.parity)]
names = lambda x: getattr(x, "__name__", None)  # noqa: E731


@pytest.mark.parametrize("source", SOURCES, ids=names)
@pytest.mark.parametrize("name", CASES)
class TestForward:
    def test_tokens(self, name, source):
        case = Case(name, source())
        tokens = jax.jit(case.module().sequence)(case.batch)
        expected = case.ours(case.found["tokens"])
        assert (expected == case.n_genes).any()  # padding
        np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
        assert (np.asarray(tokens)[:, expected.shape[1] :] == case.n_genes).all()

    def test_hidden_states_and_heads(self, name, source):
        case = Case(name, source())
        module, tokens, on = case.module(), case.ours(case.found["tokens"]), case.found["tokens"] != 0
        for layers, expected in enumerate(case.found["hidden"]):
            found = jax.jit(lambda t, n=layers: module.run(t, layers=n))(tokens)
            np.testing.assert_allclose(np.asarray(found)[on], expected[on], atol=2e-5)
        logits = case.found["logits"]
        if name == "cell":
            np.testing.assert_allclose(jax.jit(module.predict_cell)(case.batch), logits, atol=2e-5)
        elif name == "gene":
            gene_id, scores = jax.jit(module.predict_genes)(case.batch)
            seen = np.asarray(gene_id)[:, : on.shape[1]] >= 0
            np.testing.assert_array_equal(seen, on)
            np.testing.assert_allclose(np.asarray(scores)[:, : on.shape[1]][on], logits[on], atol=2e-5)
        else:
            scores = case.theirs(np.asarray(jax.jit(module.predict)(module.run(tokens))))
            np.testing.assert_allclose(scores[on], logits[on], atol=2e-5)

    def test_every_tensor_comes_back(self, name, source):
        case = Case(name, source())
        back, there = export_tensors(case.rules, case.variables), part(case.found, "weights/")
        assert sorted(back) == sorted(there)
        for key, tensor in there.items():
            np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.parametrize("source", SOURCES, ids=names)
class TestTraining:
    def loss(self, case, params):
        tokens, mask = case.hidden_tokens()
        return case.module(params).cross_entropy(tokens, mask)[0] / mask.sum()

    def test_loss_and_gradients(self, source):
        case = Case("v2", source())
        loss, gradient = jax.jit(jax.value_and_grad(lambda p: self.loss(case, p)))(case.variables["params"])
        np.testing.assert_allclose(loss, case.found["loss"], rtol=1e-5)
        expected = flatten(case.imported("gradients/")["params"])
        for path, found in flatten(gradient).items():
            error = np.linalg.norm(found - expected[path]) / np.linalg.norm(expected[path])
            assert error < 1e-4, (path, error)

    def test_one_step_of_adamw(self, source):
        case = Case("v2", source())
        tx = optax.adamw(1e-3, 0.9, 0.999, 1e-6, weight_decay=0.01)

        @jax.jit
        def step(params):
            gradient = jax.grad(lambda p: self.loss(case, p))(params)
            updates, _ = tx.update(gradient, tx.init(params), params)
            return optax.apply_updates(params, updates)

        before, after = flatten(case.variables["params"]), flatten(step(case.variables["params"]))
        for path, expected in flatten(case.imported("after/")["params"]).items():
            assert np.linalg.norm(after[path] - expected) < 3e-6 * np.linalg.norm(expected), path
            moved, due = after[path] - before[path], expected - before[path]
            if path.endswith(
                "qkv/bias"
            ):  # a key's bias shifts all scores of a query alike: its gradient is 0,
                moved, due = moved[:, [0, 2]], due[:, [0, 2]]  # and Adam's step is made of its rounding
            error = np.linalg.norm(moved - due) / np.linalg.norm(due)
            assert error < 1e-4, (path, error)  # of the step itself, a thousandth of the parameters

    def test_metrics(self, source):
        """The objective's own masks, its loss by the plain formula."""
        case = Case("v2", source())
        module = case.module()
        tokens = module.encode(case.batch, jax.random.split(jax.random.key(0))[0])
        module.eval()
        total, weight, metrics = module.loss(case.batch, jax.random.key(0))
        scores = jax.nn.log_softmax(module.predict(module(tokens)))
        at = np.take_along_axis(np.asarray(scores), np.asarray(tokens.position)[..., None], 1)
        own = np.take_along_axis(at, np.asarray(tokens.target)[..., None], 2)[..., 0]
        hidden = np.asarray(tokens.hidden)
        np.testing.assert_allclose(total, -own[hidden].sum(), rtol=1e-5)
        assert weight == hidden.sum() > 0
        best = (at.argmax(-1) == np.asarray(tokens.target))[hidden].sum()
        assert float(metrics["accuracy"][0]) == best


# --------------------------------------------------------------------------- sizes
PUBLISHED = {
    "v1-10m": ({}, 25_426, 10_288_722),
    "12l-40m": ({"d_model": 512, "n_heads": 8, "n_layers": 12, "d_ff": 1024}, 25_426, 39_591_250),
    "v2-104m": (
        {"d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff": 3072, "max_length": 4096, "specials": True},
        20_275,
        104_386_867,
    ),
    "v2-316m": (
        {"d_model": 1152, "n_heads": 18, "n_layers": 18, "d_ff": 4608, "max_length": 4096, "specials": True},
        20_275,
        316_354_867,
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published(size):
    config, tokens, count = PUBLISHED[size]
    model = models.build("geneformer", config, tokens - (4 if config.get("specials") else 2))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)["params"])) == count


# -------------------------------------------------------------------- with PyTorch
@pytest.mark.parity
def test_the_golden_file_is_what_the_reference_writes():
    from reference import geneformer

    made, kept = geneformer.golden(), golden()
    assert sorted(made) == sorted(kept)
    for name, value in made.items():
        np.testing.assert_allclose(kept[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_transformers_reads(name, tmp_path):
    import transformers
    from reference import geneformer

    case = Case(name, golden())
    state = jax.jit(lambda: initialise(case.model))()
    rng = np.random.default_rng(5)
    noise = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(noise, state["params"])
    vocabulary = Vocabulary([f"ENSG{i:011d}" for i in range(case.n_genes)])
    buffers = {**state["buffers"], "median": case.found["median"]}
    handle = types.SimpleNamespace(config=case.config, vocabulary=vocabulary, params=params, buffers=buffers)
    interop.write(tmp_path, handle)
    head = {"v2": "MaskedLM", "cell": "SequenceClassification", "gene": "TokenClassification"}[name]
    theirs, report = getattr(transformers, f"BertFor{head}").from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert theirs.config.vocab_size == case.n_genes + case.n_special
    expected = geneformer.run(theirs.eval(), case.found["tokens"])

    on = case.found["tokens"] != 0
    module = bind(case.model, params, buffers)
    x = module.run(case.ours(case.found["tokens"]))
    np.testing.assert_allclose(np.asarray(x)[on], expected["hidden"][-1][on], atol=2e-5)
    if name == "cell":
        np.testing.assert_allclose(module.predict_cell(case.batch), expected["logits"], atol=2e-5)
        return
    logits = module.head(x) if name == "gene" else case.theirs(np.asarray(module.predict(x)))
    np.testing.assert_allclose(np.asarray(logits)[on], expected["logits"][on], atol=2e-5)


@pytest.mark.parity
@pytest.mark.full
@pytest.mark.parametrize("size", ["v1-10m", "v2-104m", "v2-316m"])
def test_full_size(size):
    from reference import geneformer

    report = geneformer.full(size)
    print(report)
    assert max(report["max_abs"].values()) < report["tolerance"]
