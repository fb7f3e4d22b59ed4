"""Heads, tasks and calibration: planted targets are learned, and what is promised holds."""

import jax
import numpy as np
import pytest
from finetuning import base_handle, batches_of, planted, wrapped
from jax.sharding import Mesh

from scjax import models
from scjax.config import ConfigError
from scjax.corpus import build_corpus, open_corpus
from scjax.finetune import (
    HANDED_OVER,
    SYSTEM,
    FinetuneConfig,
    Reader,
    Stopping,
    Task,
    calibrate,
    check_end,
    complete,
    fit_temperature,
    frequencies,
    judge,
    layer_rates,
    make_finetune_optimizer,
    put,
    reliability,
    unassigned_rule,
)
from scjax.finetune.calibration import log_loss
from scjax.finetune.run import halves
from scjax.finetune.tasks import Head
from scjax.loader import Loader
from scjax.nn import flatten
from scjax.parallel import AXES
from scjax.train import (
    CheckpointError,
    OptimizerConfig,
    Restored,
    abstract_state,
    init_state,
    make_train_step,
    start_from,
)

TASKS = {
    "cell_type": {"size": 4},
    "stage": {"kind": "ordinal", "size": 4, "order": ("c", "a", "d", "b"), "rank": (1, 3, 0, 2)},
    "dose": {"kind": "regression", "size": 1, "hidden": (8,)},
    "marks": {"kind": "multilabel", "size": 2},
    "donor": {"size": 4, "reverse": 0.5, "weight": 0.1},
    "length": {"kind": "regression", "size": 1, "level": "gene"},
}
CARRIED = {"labels": ["cell_type", "stage", "donor"], "values": ["dose", "marks"]}


class Batches(list):
    """Has what :class:`Reader` asks of a loader."""

    batch_size = 32

    def __iter__(self):
        yield from super().__iter__()


def mesh_of(n):
    return Mesh(np.array(jax.devices()[:n]).reshape(n, 1, 1), AXES)


@pytest.fixture(scope="module")
def handle(tmp_path_factory):
    return base_handle(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(handle):
    """All kinds of tasks at once, with all of the base: (reader, first metrics, state)."""
    batches = Batches(batches_of(planted(256), handle, **CARRIED))
    model = wrapped(TASKS, train="all")
    tx, _ = make_finetune_optimizer(OptimizerConfig(1e-2, warmup_steps=5), 80, model)
    found = []
    for n in (1, 4):
        abstract = abstract_state(model, tx, mesh_of(n))
        state = init_state(
            model, tx, abstract, start_from(model, handle.params, handle.buffers, prefix="base/").values
        )
        target = np.random.default_rng(0).normal(3, 2, (48, 1)).astype(np.float32)
        held_out = np.arange(48) % 4 == 0
        state = put(state, {"heads/length/target": target, "heads/length/held_out": held_out})
        reader = Reader(model, abstract)
        state = put(state, reader.scales(state, batches))
        step = make_train_step(model, tx, abstract, seed=0)
        for i in range(80 if n == 1 else 3):
            state, metrics = step(state, batches[i % len(batches)])
            if i == 2:
                found.append({name: float(s) / max(float(w), 1e-9) for name, (s, w) in metrics.items()})
        if n == 1:
            first = (reader, state)
    return *first, found


def test_all_kinds_of_tasks_are_learned_together(trained, handle):
    reader, state, _ = trained
    held_out = Batches(batches_of(planted(160, seed=1), handle, **CARRIED))
    tasks = {name: Task(**task) for name, task in TASKS.items()}
    found = reader.outputs(state, held_out)
    temperatures, report = calibrate(tasks, found, 0.2)
    assert report["cell_type"]["accuracy"] > 0.7 and report["cell_type"]["cells"] == 160
    # a guess at random is right in 1 of 4 and 1.25 ranks off
    assert report["stage"]["accuracy"] > 0.4 and report["stage"]["mean_rank_error"] < 0.85
    assert report["dose"]["r2"] > 0.4 and report["dose"]["rmse"] < 1.8  # of values from 0 to 6
    assert report["marks"]["average_precision"] > 0.8
    assert 0 < report["cell_type"]["judged"] < 160  # the others set the temperature
    assert report["cell_type"]["rule"]["cells"] == report["cell_type"]["judged"]
    assert set(temperatures) == {f"heads/{n}/temperature" for n in ("cell_type", "stage", "marks", "donor")}
    # genes that are held out are what is judged, of each of which the target is the same in all cells
    genes = found["length"]
    assert len(np.unique(genes["target"])) <= 12 and genes["output"].shape == genes["target"].shape


def test_a_step_is_the_same_on_four_devices(trained):
    *_, (one, four) = trained
    assert one.keys() == four.keys() and "length_mse" in one
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


def test_a_cell_is_predicted_by_itself(trained, handle):
    reader, state, _ = trained
    batch = batches_of(planted(32, seed=2), handle, **CARRIED)[0]
    order = np.random.default_rng(0).permutation(32)
    slots = np.random.default_rng(1).permutation(batch.gene_id.shape[1])
    mixed = jax.tree.map(lambda x: x[order], batch)
    mixed = mixed.replace(gene_id=mixed.gene_id[:, slots], count=mixed.count[:, slots])
    plain, other = (reader.outputs(state, Batches([b]))["cell_type"]["output"] for b in (batch, mixed))
    np.testing.assert_allclose(other, plain[order], atol=2e-5)


def test_a_reversed_task_is_trained_against_by_the_base_alone(handle):
    batch = batches_of(planted(32), handle, **CARRIED)[0]

    def gradients(reverse):
        model = wrapped({"donor": {"size": 4, "reverse": reverse}}, train="all")
        tx, _ = make_finetune_optimizer(OptimizerConfig(1e-3), 2, model)
        state = init_state(model, tx, abstract_state(model, tx, mesh_of(1)))

        def loss(params):
            module = scjax_bind(model, params, state["buffers"])
            module.eval()
            sums, *_ = module.loss(batch, jax.random.key(0))
            return sum(sums.values())

        return flatten(jax.jit(jax.grad(loss))(state["params"]))

    along, against = gradients(0.0), gradients(0.5)
    kernel, head = "base/transformer/blocks/up/kernel", "heads/donor/layers/layers/0/kernel"
    np.testing.assert_allclose(against[kernel], -0.5 * along[kernel], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(against[head], along[head], rtol=1e-4, atol=1e-6)


def scjax_bind(*args):
    from scjax.nn import bind

    return bind(*args)


def test_layers_below_learn_slower_or_not_at_all(handle):
    model = wrapped({"cell_type": {"size": 4}}, train="all")
    rates = flatten(layer_rates(model, 0.5))
    assert rates["heads/cell_type/layers/layers/0/kernel"] == 1
    np.testing.assert_allclose(rates["base/transformer/blocks/up/kernel"].ravel(), [0.25, 0.5])
    assert rates["base/gene/embedding"] == 0.125
    with pytest.raises(ConfigError, match="2 trained layers"):
        layer_rates(model, freeze_layers=3)

    tx, _ = make_finetune_optimizer(OptimizerConfig(1e-2, weight_decay=0.1), 9, model, freeze_layers=1)
    state = init_state(model, tx, abstract_state(model, tx, mesh_of(1)))
    params = state["params"]
    updates, _ = jax.jit(tx.update)(jax.tree.map(jax.numpy.ones_like, params), tx.init(params), params)
    moved = flatten(jax.tree.map(lambda p, u: np.asarray(p + u) != np.asarray(p), params, updates))
    assert not moved["base/gene/embedding"].any()
    kernel = moved["base/transformer/blocks/up/kernel"]
    assert not kernel[0].any() and kernel[1].all()


def test_parts_of_the_base_can_be_frozen():
    model = wrapped({"cell_type": {"size": 4}}, train="all", freeze=("gene/*", "value*"))
    from scjax.nn import shapes_of

    shapes = {kind: flatten(of) for kind, of in shapes_of(model).items()}
    assert "base/gene/embedding" in shapes["buffers"] and "base/gene/embedding" not in shapes["params"]
    assert "base/transformer/blocks/up/kernel" in shapes["params"]
    with pytest.raises(ConfigError, match="'genes/.' matches no path of the base"):
        wrapped({"cell_type": {"size": 4}}, train="all", freeze=("genes/*",))


class TestHeads:
    def outputs(self, task, x, seed=0):
        from flax import nnx

        head = Head(task, x.shape[-1], 5, rngs=nnx.Rngs(seed))
        return head, head(x)

    def test_an_order_is_the_proportional_odds_model(self):
        x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        head, log_p = self.outputs(Task("ordinal", size=4), x)
        score = np.asarray(head.layers(x))[:, 0]
        cuts = np.cumsum([0.0, np.log(2), np.log(2)])  # softplus(0)
        above = 1 / (1 + np.exp(-(score[:, None] - cuts)))
        expected = np.diff(np.hstack([np.ones((6, 1)), above, np.zeros((6, 1))]), axis=1) * -1
        np.testing.assert_allclose(np.exp(log_p), expected, atol=1e-6)
        far = head(1e4 * x)
        assert np.isfinite(np.asarray(far)).all()

    def test_adjusted_logits_make_up_for_frequencies(self):
        task = Task(size=3, prior=(0.8, 0.15, 0.05), logit_adjustment=1.0)
        x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
        head, y = self.outputs(task, x)
        target, weight = np.arange(8) % 3, np.ones(8, np.float32)
        total, of, _ = head.loss(y, target, weight)
        shifted = np.asarray(y, np.float64) + np.log([0.8, 0.15, 0.05])
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        np.testing.assert_allclose(total / of, -log_p[np.arange(8), target].mean(), rtol=1e-5)

    def test_a_class_that_is_never_drawn_is_rare(self):
        task = Task(size=3, prior=(0.8, 0.2, 0.0), logit_adjustment=1.0)
        x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
        head, y = self.outputs(task, x)
        for target in (np.arange(6) % 2, np.arange(6) % 3):  # of validation cells, too
            loss = lambda y, target=target: head.loss(y, target, np.ones(6, np.float32))[0]  # noqa: E731
            value, gradient = jax.value_and_grad(loss)(y)
            assert np.isfinite(value) and np.isfinite(gradient).all()

    def test_unknown_targets_and_padding_do_not_count(self):
        x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        head, y = self.outputs(Task(size=2, class_weight=(1.0, 3.0)), x)
        weight = np.array([1, 1, 1, 0], np.float32)
        total, of, told = head.loss(y, np.array([0, 1, -1, 1]), weight)
        log_p = np.asarray(jax.nn.log_softmax(y))
        np.testing.assert_allclose(total, -log_p[0, 0] - 3 * log_p[1, 1], rtol=1e-6)
        assert of == 4 and told["accuracy"][1] == 2
        head, y = self.outputs(Task("multilabel", size=2), x)
        total, of, _ = head.loss(y, np.array([[1, np.nan], [0, 1], [np.nan] * 2, [1, 1]]), weight)
        assert of == 3 and np.isfinite(total)
        assert np.isnan(Head(Task(size=2), 3, 5, rngs=jax_rngs()).loss(y, np.array([0, 1, 2, 0]), weight)[0])


def jax_rngs():
    from flax import nnx

    return nnx.Rngs(0)


class TestCalibration:
    def logits(self, n, temperature, seed, spread=1.5):
        """Logits that are too sure by a known factor."""
        rng = np.random.default_rng(seed)
        true = rng.normal(0, spread, (n, 4))
        p = np.exp(true) / np.exp(true).sum(1, keepdims=True)
        target = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
        return temperature * true, target

    def test_the_temperature_is_found(self):
        logits, target = self.logits(20_000, 2.5, 0)
        assert fit_temperature(logits, target) == pytest.approx(2.5, rel=0.05)
        temperature, report = judge("classes", logits, target)
        assert report["ece_after"] < 0.02 < report["ece_before"]

    def test_temperature_and_rule_are_judged_by_cells_that_set_neither(self):
        logits, target = self.logits(400, 2.5, 0)
        tunes = np.arange(400) % 2 == 0
        temperature, report = judge("classes", logits, target, 0.4, tunes)
        assert temperature == fit_temperature(logits[tunes], target[tunes])
        assert report["judged"] == report["rule"]["cells"] == 200
        assert report["log_loss_after"] == log_loss(logits[~tunes], target[~tunes], temperature)
        again, worse = judge("classes", logits, np.where(tunes, target, 0), 0.4, tunes)
        assert again == temperature and worse["log_loss_after"] > report["log_loss_after"]
        marks = (np.arange(4) == target[:, None]).astype(float)
        temperature, report = judge("multilabel", logits, marks, None, tunes)
        assert temperature == fit_temperature(logits[tunes], marks[tunes]) and report["judged"] == 200

    def test_a_few_that_are_all_right_do_not_make_it_sure(self):
        """Six genes in 200 cells each are six genes."""
        target = np.repeat([0, 1, 0, 1, 0, 1], 200)
        logits = np.where(target[:, None] == np.arange(2), 1.0, -1.0)
        several = (target == 1).astype(float)[:, None]
        for outputs, true in ((logits, target), (np.where(several, 2.0, -2.0), several)):
            assert 0.6 < fit_temperature(outputs, true, 6) < 1.2  # at most 6.5 of 7 are right
            assert fit_temperature(outputs, true) < fit_temperature(outputs, true, 6) / 2

    def test_a_group_is_in_one_half(self):
        groups = np.repeat(np.arange(7), 30)
        half = halves(groups)
        assert all(len(np.unique(half[groups == g])) == 1 for g in range(7)) and 0 < half.sum() < 210
        logits, target = self.logits(210, 1.0, 0)
        found = {"x": {"output": logits, "target": target, "row": np.arange(210)}}
        _, report = calibrate({"x": Task(size=4)}, found, None, groups)
        assert report["x"]["judged"] == (~half).sum()
        # one group is cut through
        _, report = calibrate({"x": Task(size=4)}, found, None, np.zeros(210, int))
        assert report["x"]["judged"] == 105

    def test_reliability(self):
        told = reliability(np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 1, 0]), n_bins=2)
        assert told["ece"] == pytest.approx(0.1)
        assert [b["accuracy"] for b in told["bins"]] == [0.5, 1.0]

    def test_the_rule_keeps_its_promise(self):
        """Over many draws of the cells that set it, the error among assigned cells is above the limit in no
        more than 1 - certainty of the draws; and it does assign."""
        broken, assigned = 0, []
        for seed in range(200):
            logits, target = self.logits(400, 1.0, seed, 3.0)
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            rule = unassigned_rule(p.max(1), p.argmax(1) == target, 0.15, 0.9)
            # of a very large query: right with probability p
            logits, _ = self.logits(4000, 1.0, 10_000 + seed, 3.0)
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            taken = p.max(1) >= rule.threshold
            assigned.append(taken.mean())
            broken += taken.any() and (1 - p.max(1)[taken]).mean() > 0.15
        assert broken <= 0.1 * 200 + 2 * np.sqrt(200 * 0.1 * 0.9)
        assert np.mean(assigned) > 0.2

    def test_where_nothing_can_be_promised_nothing_is_assigned(self):
        rule = unassigned_rule(np.linspace(0, 1, 10), np.ones(10, bool), 0.05)
        assert rule.threshold == np.inf and "all cells are unassigned" in str(rule)
        wrong = unassigned_rule(np.linspace(0, 1, 300), np.zeros(300, bool), 0.05)
        assert wrong.threshold == np.inf
        with pytest.raises(ValueError, match="max_error is 2"):
            unassigned_rule(np.ones(3), np.ones(3, bool), 2)


class TestWhatTheDataSay:
    COLUMNS = {"cell_type": ["T", "B", "NK"], "stage": ["E12", "E10", "P0"]}

    def test_sizes_and_orders(self):
        tasks = {"cell_type": Task(), "age": Task("ordinal", "stage", order=("E10", "E12"))}
        done = complete(tasks, self.COLUMNS, {})
        assert done["cell_type"].size == 3
        assert done["age"].size == 2 and done["age"].rank == (1, 0, -1)
        found = complete({"adt": Task("multilabel")}, {}, {"adt": ["CD3", "CD4"]})
        assert found["adt"].size == 2
        drawn = {"cell_type": [6, 3, 1]}
        adjusted = complete({"cell_type": Task(logit_adjustment=1.0)}, self.COLUMNS, {}, drawn)
        assert adjusted["cell_type"].prior == (0.6, 0.3, 0.1)

    @pytest.mark.parametrize(
        ("task", "told"),
        [
            (Task(source="celltype"), "'celltype', which the data have not; did you mean 'cell_type'"),
            (Task("regression", "dose"), "reads the value 'dose'"),
            (Task("ordinal", "stage", order=("E10", "E11")), "order has 'E11'.*E12"),
            (Task(source="cell_type", size=7), "size is 7, and 'cell_type' of the data has 3"),
            (Task(source="cell_type", logit_adjustment=1.0), "has not been counted"),
            (Task(source="cell_type", class_weight=(1.0,)), "class_weight has 1 numbers for 3"),
            (Task(source="stage", order=("E10", "E12", "P0")), 'order and rank are for kind "ordinal"'),
        ],
    )
    def test_what_does_not_fit_is_told(self, task, told):
        with pytest.raises(ConfigError, match=told):
            complete({"x": task}, self.COLUMNS, {})

    def test_a_batch_without_the_target_is_told(self, handle):
        model = wrapped({"cell_type": {"size": 4}})
        batch = batches_of(planted(8), handle, 8, labels=["donor"])[0]
        with pytest.raises(ConfigError, match=r"reads the label 'cell_type'; batches have \['donor'\]"):
            jax.eval_shape(lambda: model.make().loss(batch, jax.random.key(0)))

    def test_what_does_not_go_together_is_told(self):
        with pytest.raises(ConfigError, match="tasks is empty"):
            wrapped({})
        with pytest.raises(ConfigError, match="the reversed task 'donor'"):
            wrapped({"donor": {"size": 4, "reverse": 1.0}}, train="head")
        with pytest.raises(ConfigError, match='holds "system" and "model"'):
            models.build(SYSTEM, {"tasks": {"x": {"size": 2}}}, 5)
        given = {"system": SYSTEM, "model": {"tasks": {"x": {}}}, "optimizer": OptimizerConfig(1e-3)}
        data, train = {"corpus": "c", "batch_size": 2}, {"steps": 3}
        from scjax.config import from_config

        with pytest.raises(ConfigError, match="config.start is missing"):
            _ = from_config(FinetuneConfig, given | {"data": data, "train": train}).base_run
        with pytest.raises(ConfigError, match='go with model.train = "all"'):
            from_config(
                FinetuneConfig, given | {"data": data, "train": train, "start": "r", "layer_decay": 0.5}
            )

    def test_frequencies_of_what_is_drawn(self):
        class Part:
            n_cells = 7

            def codes(self, name):
                return np.array({"cell_type": [0, 0, 0, 0, 1, -1, 2], "stage": [0, 0, 0, 1, 1, 1, 2]}[name])

        class Corpus:
            columns, path = self.COLUMNS, "c"

            def split(self, _):
                return [Part()]

        of = lambda weights: frequencies(Corpus(), ["cell_type"], weights)  # noqa: E731
        assert of(None) == {"cell_type": [4, 1, 1]}
        assert of({"cell_type": 0.5}) == {"cell_type": [2, 1, 1]}
        assert of({"cell_type": {"B": 3.0}}) == {"cell_type": [0, 3, 0]}
        # three stages alike: a cell of the third weighs as much as all of another
        np.testing.assert_allclose(of({"stage": 0.0})["cell_type"], [1 + 1 / 3, 1 / 3, 1])
        both = of({"stage": {"P0": 1.0, "E10": 1.0}, "cell_type": {"NK": 2.0, "B": 1.0}})
        np.testing.assert_allclose(both["cell_type"], [0, 1 / 3, 2])
        with pytest.raises(KeyError, match="no label column 'study'"):
            of({"study": 0.0})

    def test_frequencies_are_those_that_a_mixture_draws(self, tmp_path):
        """The shares of a mixture, with and without weights, against what its loader draws."""
        corpora = []
        for seed, n in ((0, 300), (1, 60)):
            cells = planted(n, seed)
            cells = cells[cells.obs["cell_type"] != f"type{seed}"].copy()
            corpora.append(tmp_path / f"c{seed}")
            build_corpus([cells], corpora[-1], names=["s"], labels=["cell_type"], progress=False, workers=1)
        mixture = open_corpus(corpora, {"c0": 1.0, "c1": 3.0})
        for weights in (None, {"cell_type": 0.0}):
            told = frequencies(mixture, ["cell_type"], weights)["cell_type"]
            loader = Loader(mixture, 50, labels=["cell_type"], weights=weights, epochs=1, epoch_cells=5000)
            codes = np.concatenate([b.label["cell_type"][b.weight > 0].copy() for b in loader])
            drawn = np.bincount(codes, minlength=len(told)) / len(codes)
            np.testing.assert_allclose(np.array(told) / sum(told), drawn, atol=0.01)


def test_a_gene_with_one_blank_value_keeps_the_others(handle):
    batch = batches_of(planted(8), handle, 8)[0]
    module = wrapped({"sets": {"kind": "multilabel", "size": 2, "level": "gene"}}).make()
    known = np.full((48, 2), np.nan, np.float32)
    known[0], known[1] = (1, np.nan), (0, 1)
    module.heads["sets"].target[...] = jax.numpy.asarray(known)
    target, weight = module.target("sets", batch, np.array([[0, 1, 2, -1]] * 8))
    np.testing.assert_array_equal(weight, [[1, 1, 0, 0]] * 8)
    y = np.ones((8, 4, 2), np.float32)
    total, of, _ = module.heads["sets"].loss(y, target, weight)
    assert of == 24 and np.isfinite(total)  # three values in each of eight cells


def test_a_run_that_has_ended_does_not_go_on(tmp_path):
    last, handed = (Restored({}, cursor, 6) for cursor in ({"step": 6}, {"step": 6} | HANDED_OVER))
    assert not check_end(tmp_path, None, False) and not check_end(tmp_path, last, False)
    assert check_end(tmp_path, handed, True)
    with pytest.raises(CheckpointError, match="checkpoint 6 is the best state, not the last"):
        check_end(tmp_path, handed, False)
    with pytest.raises(CheckpointError, match="already stands at step 6 of a longer run"):
        check_end(tmp_path, last, True)
    # the report of a checkpoint that was damaged and set aside says nothing of an earlier one
    (tmp_path / "report.json").write_text('{"steps": 6}')
    assert check_end(tmp_path, last, True) and not check_end(tmp_path, Restored({}, {}, 4), False)


def test_stopping_knows_what_it_knew():
    errors = [(1, 3.0), (2, 2.0), (3, 2.5), (4, 2.1)]
    stopping = Stopping(2, errors)
    assert (stopping.best, stopping.step, stopping.ended) == (2.0, 2, True)
    assert not Stopping(3, errors).ended and not Stopping(None, errors).ended
    assert Stopping(2, errors[:3])(4, 1.0)
