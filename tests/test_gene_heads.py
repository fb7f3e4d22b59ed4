"""Heads of genes: targets from tables, families held out, what counts in training and what in judging."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny_model

from scjax.config import ConfigError
from scjax.finetune import Finetuned, Task, gene_targets, read_targets
from scjax.genes import Vocabulary
from scjax.models import build
from scjax.nn import bind, initialise
from scjax.nn.module import flatten, nest

N = tiny_model.N_GENES
GENES = Vocabulary([f"ENSG{i:03d}" for i in range(N)], [f"G{i}" for i in range(N)])
TASK = Task(kind="multilabel", level="gene", size=1)


def write(path, rows, head="gene\tlabel"):
    path.write_text("\n".join([head, *rows]) + "\n")
    return str(path)


@pytest.fixture
def labels(tmp_path):
    """Even genes are 1; four genes a family; two are not labelled; one is not the model's."""
    rows = [f"G{i}\t{1 - i % 2}\tfamily{i // 4}" for i in range(N - 2)]
    return write(
        tmp_path / "labels.tsv", [*rows, f"G{N - 1}\t\tfamily", "OTHER\t1\tfamily0"], "gene\tlabel\tfamily"
    )


class TestTargets:
    def test_by_name_and_whole_families_are_held_out(self, labels):
        target, held_out = read_targets(labels, TASK, GENES)
        assert target.shape == (N, 1) and np.isnan(target[-2:]).all()
        np.testing.assert_array_equal(target[:-2, 0], 1 - np.arange(N - 2) % 2)
        families = held_out[: N - 4].reshape(-1, 4)
        assert (families == families[:, :1]).all() and 0 < families.mean() < 0.5
        assert not held_out[-2:].any()
        np.testing.assert_array_equal(read_targets(labels, TASK, GENES)[1], held_out)

    def test_several_columns_and_classes(self, tmp_path):
        rows = [f"ENSG{i:03d},{i % 3},{i}" for i in range(N)]
        path = write(tmp_path / "v.csv", rows, "id,a,b")
        target, _ = read_targets(path, Task(kind="regression", level="gene", size=2), GENES)
        np.testing.assert_array_equal(target, np.stack([np.arange(N) % 3, np.arange(N)], 1))
        path = write(tmp_path / "c.csv", [row.rsplit(",", 1)[0] for row in rows], "id,a")
        target, _ = read_targets(path, Task(kind="classes", level="gene", size=3), GENES)
        np.testing.assert_array_equal(target, np.arange(N) % 3)

    @pytest.mark.parametrize(
        ("rows", "head", "message"),
        [
            (["G1\t1\t1"], "gene\ta\tb", r"\['a', 'b'\] beside 'gene' and family; the task takes 1 columns"),
            (["G1\t1", "G2\tx"], "gene\ta", "line 3: a is 'x'; a class, 0 to 1 is needed"),
            (["G1\t2"], "gene\ta", "line 2: a is '2'"),
            (["G1\t1", "G1\t0"], "gene\ta", "line 3: G1 stands there twice with other values"),
            (["X\t1"], "gene\ta", "0 of its 1 genes, 0 of them held out, are in the vocabulary"),
        ],
    )
    def test_errors(self, rows, head, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            read_targets(write(tmp_path / "t.tsv", rows, head), TASK, GENES)

    def test_tasks_and_tables_belong_together(self, labels):
        tasks = {"dosage": TASK, "cell_type": Task(size=3)}
        found = gene_targets(tasks, {"dosage": labels, "unused": None}, GENES)
        assert set(found) == {"heads/dosage/target", "heads/dosage/held_out"}
        with pytest.raises(ConfigError, match="--config.tables.dosage=FILE"):
            gene_targets(tasks, {}, GENES)
        with pytest.raises(
            ConfigError, match="config.tables.dosag is not a task of genes; did you mean 'dosage'"
        ):
            gene_targets(tasks, {"dosag": labels}, GENES)
        with pytest.raises(FileNotFoundError, match="nowhere.tsv: no such file"):
            gene_targets(tasks, {"dosage": "nowhere.tsv"}, GENES)


def test_held_out_genes_count_only_in_judging(labels):
    """Over the same cells the two losses see disjoint genes, which together are all that have a label."""
    base = {"d_model": 8, "n_heads": 2, "n_layers": 1, "d_ff": 8, "max_length": 25, "dropout": 0.0}
    base |= {"dtype": "float32"}
    config = {"base": {"system": "scgpt", "model": base}, "tasks": {"dosage": TASK}, "train": "head"}
    model = build(f"{Finetuned.__module__}:Finetuned", config, N)
    variables, values = initialise(model), gene_targets({"dosage": TASK}, {"dosage": labels}, GENES)
    buffers = jax.tree.map(jax.numpy.asarray, nest(flatten(variables["buffers"]) | values))
    cells = tiny_model.cells(0)

    @jax.jit
    def weights(params, cells):
        out = []
        for train in (True, False):
            module = bind(model, params, buffers)
            module.train() if train else module.eval()
            out.append(module.loss(cells, jax.random.key(0))[1]["dosage"])
        return out

    learned, judged = (float(w) for w in weights(variables["params"], cells))
    target, held_out = (values[f"heads/dosage/{name}"] for name in ("target", "held_out"))
    there = cells.gene_id[cells.weight > 0]
    known = (there >= 0) & np.isfinite(target[there, 0])
    assert learned == (known & (held_out[there] == 0)).sum() > 0
    assert judged == (known & (held_out[there] == 1)).sum() > 0
