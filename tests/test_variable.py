"""Which cells the variable genes of a corpus are found from."""

import numpy as np
import pytest
from loading import build, study

from scjax.corpus import Mixture, variable_genes
from scjax.corpus.variable import _sample


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Training cells lie before and after validation cells, as in a corpus that was appended to."""
    root = tmp_path_factory.mktemp("grown")
    return Mixture(
        {
            name: build({name: study(400, seed)}, root / name, labels=["cell_type"], validation=0.3)
            for seed, name in enumerate(("first", "later"))
        }
    )


@pytest.mark.parametrize("n", [10**6, 300, 100, 1])
def test_the_sample_is_of_training_cells_from_everywhere(grown, n):
    train = np.concatenate([np.arange(p.first_row, p.first_row + p.n_cells) for p in grown.split("train")])
    rows = _sample(grown, n)
    assert np.isin(rows, train).all() and len(np.unique(rows)) == len(rows)
    assert len(rows) == min(n, len(train))
    if len(rows) > 1:
        assert abs((rows < 400).mean() - 0.5) < 0.05


def test_genes_of_a_corpus_that_has_grown(grown):
    genes = variable_genes(grown, 50, max_cells=500)
    assert len(genes) == 50
    assert set(genes.ids) < set(grown.vocabulary.ids)
    first = grown.members["first"]
    assert len(set(variable_genes(first, 50).ids) & set(genes.ids)) > 25
