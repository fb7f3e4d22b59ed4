"""The cells of a run: its corpus, and the loaders of its training and validation batches."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from scjax.config import ConfigError, from_config
from scjax.corpus import Corpus, Mixture, open_corpus
from scjax.genes import Vocabulary
from scjax.loader import Loader
from scjax.models import resolve
from scjax.nn.context import check_context
from scjax.nn.module import Abstract
from scjax.nn.work import late_work
from scjax.parallel import Layout, accumulate_for, process_shard
from scjax.train.config import DataConfig, RunConfig
from scjax.train.run import read_run


def open_data(config: DataConfig, workdir: str | pathlib.Path) -> Corpus | Mixture:
    """The corpus of a run in the state in which the run began, whatever was appended to it since.

    A run that is new takes the present state. ``PATH@MANIFEST`` in the config is taken as it says.

    Raises:
      ConfigError: shares for a single corpus, or other corpora than the run began with.
      FileNotFoundError, ValueError, OSError: see :func:`scjax.corpus.open_corpus`.
    """
    single = isinstance(config.corpus, str)
    if single and config.shares is not None:
        raise ConfigError("data.shares is for several corpora, and data.corpus names one")
    paths = [config.corpus] if isinstance(config.corpus, str) else list(config.corpus)
    began: list[str] = []
    if (pathlib.Path(workdir) / "model.json").exists():
        began = read_run(workdir).model.get("manifests", [])
        if began and len(began) != len(paths):
            raise ConfigError(f"the run in {workdir} began with {len(began)} corpora, not {len(paths)}")
    for i, manifest in enumerate(began):
        if "@" not in paths[i].rpartition("/")[2] or pathlib.Path(paths[i]).exists():
            paths[i] = f"{paths[i]}@{manifest}"
    try:
        return open_corpus(paths[0] if single else paths, config.shares, cache=config.cache)
    except FileNotFoundError as error:
        if not began:
            raise
        raise ConfigError(f"the run in {workdir} began with corpus {', '.join(began)}: {error}") from error


def manifests_of(corpus: Corpus | Mixture) -> list[str]:
    """The manifest of a corpus, or those of the members of a mixture, in order."""
    members = corpus.members.values() if isinstance(corpus, Mixture) else [corpus]
    return [member.manifest_id for member in members]


def make_loaders(
    config: RunConfig, corpus: Corpus | Mixture, vocabulary: Vocabulary, mesh: Mesh
) -> tuple[Loader, Loader | None]:
    """Loaders of this process's rows of each batch: of training; and of validation, in order, where the
    corpus has such cells."""
    index, count = process_shard(mesh)
    data = config.data
    processes: dict[str, Any] = {"process_index": index, "process_count": count}
    loader = Loader(corpus, vocabulary=vocabulary, seed=config.seed, **data.loader(), **processes)
    widths = {name: len(panel.features) for name, panel in loader.panels.items()}
    check_context(config.model, {name: corpus.columns[name] for name in loader.labels}, widths)
    if not any(part.n_cells for part in corpus.split("validation")):
        return loader, None
    validation = Loader(
        corpus,
        config.validation.batch_size or data.batch_size,
        vocabulary=vocabulary,
        seed=config.seed,
        split="validation",
        max_genes=data.max_genes,
        labels=data.labels,
        values=data.values,
        shuffle=False,
        epochs=1,
        **processes,
    )
    return loader, validation


def micro_batches(config: RunConfig, model: Abstract, length: int, layout: Layout) -> int:
    """``train.accumulate``; where that is 0, as many as leave a device no more than it can hold, or 1 for a
    model whose objective compares the cells of a micro-batch with one another.

    ``length`` is that of the longest batches, in genes; a model may make more tokens of them.
    """
    if config.train.accumulate:
        return config.train.accumulate
    system, config_class = resolve(config.system)
    compares = getattr(system, "compares_cells", None)
    if compares is not None and compares(from_config(config_class, config.model, where="config.model")):
        return 1
    tokens, _ = late_work(model, np.array([length]))
    return accumulate_for(config.data.batch_size, max(length, int(tokens)), layout.mesh, layout.tokens)
