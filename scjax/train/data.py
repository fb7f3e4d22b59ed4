"""The cells of a run: its corpus, and the loaders of its training and validation batches."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from scjax.config import ConfigError, from_config, nearest
from scjax.corpus import Corpus, Mixture, Part, open_corpus
from scjax.corpus.build import UNKNOWN
from scjax.corpus.mixture import MemberPart
from scjax.corpus.panels import Panel
from scjax.genes import Vocabulary
from scjax.loader import Loader
from scjax.models import resolve
from scjax.nn.context import check_context, told_to
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


def as_begun(
    corpus: Corpus | Mixture,
    config: Mapping[str, Any],
    begun: Mapping[str, Any],
    categories: Mapping[str, Sequence[str]],
    grows: Callable[[str], bool] = lambda field: True,
) -> Corpus | Mixture:
    """The corpus in the numbers of the model that a run begins with: a code is then the category, and a place
    in a panel the feature, that it was in the training of that model.

    Args:
      corpus: of the run.
      config: of the run's model, complete; what it is told decides.
      begun: config of the model that it begins with.
      categories: of that model: label -> names of its codes, panel -> names of its features.
      grows: whether what a field ("context.tissue", "n_batches") learns of categories is trained; new ones
        then follow the others as far as there is room.

    Returns:
      The same corpus, but for the numbers. A label that it lacks is unknown of all cells.

    Raises:
      ConfigError: a category that the model was not trained with and has no room for, a panel of which it
        knows no feature, or a model that does not say which of its categories is which.
    """
    known = {name for _, name, _ in told_to(begun, loss=True)}
    columns: dict[str, list[str]] = {}
    panels: dict[str, Panel] = {}
    for field, name, entry in told_to(config, loss=True):
        if name not in known:
            continue
        own = corpus.panels.get(name)
        if entry["kind"] != "label":
            if own is not None and own.named and name in categories:
                panels[name] = Panel(False, tuple(categories[name]))
                if not set(own.features) & set(categories[name]):
                    raise ConfigError(
                        f"none of the {len(own.features)} features of {name!r} in the corpus, such as "
                        f"{own.features[0]!r}, is known to the model to begin with; it knows "
                        f"{', '.join(list(categories[name])[:5])}, ..."
                    )
            continue
        if name not in categories:
            raise ConfigError(
                f"the model to begin with does not say which category of {name!r} is which: leave {name!r} "
                "out of data.labels"
            )
        there = list(categories[name])
        new = [c for c in corpus.columns.get(name, ()) if c not in there and c not in UNKNOWN]
        room = entry["size"] - len(there) if grows(field) else 0
        if len(new) > room:
            raise ConfigError(
                f"{name!r} of the corpus has {new[0]!r}, which the model to begin with was not trained with, "
                f"nor is there room to learn it (config.model.{field});{nearest(new[0], there)} it has "
                f"{', '.join(map(repr, there[:5]))}{', ...' if len(there) > 5 else ''}. Rename it in the "
                "corpus; fine-tuning can also do without it, where data.labels or model.context leave it out"
            )
        columns[name] = [*there, *new]
    return _renumbered(corpus, columns, panels) if columns or panels else corpus


def _renumbered(
    corpus: Corpus | Mixture, columns: Mapping[str, list[str]], panels: Mapping[str, Panel]
) -> Corpus | Mixture:
    """A view of the corpus whose codes are by other categories, and whose panels have other features."""
    maps = {}
    for name, categories in (corpus.columns | dict(columns)).items():
        code = {category: i for i, category in enumerate(categories)}
        maps[name] = np.array([*(code.get(c, -1) for c in corpus.columns.get(name, ())), -1], np.int32)
    view: Any = copy.copy(corpus)
    view.manifest = {**corpus.manifest, "columns": {**corpus.columns, **columns}}
    if isinstance(corpus, Mixture):
        view.columns = view.manifest["columns"]
    view.panels = {**corpus.panels, **panels}
    parts = []
    for part in corpus.parts:
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(Part)}
        first = getattr(part, "code_maps", {})  # of a mixture: from what is stored to its own codes
        fields["panels"] = view.panels
        fields["code_maps"] = {k: to[first[k]] if k in first else to for k, to in maps.items()}
        fields["vocabulary"] = getattr(part, "vocabulary", corpus.vocabulary)
        parts.append(MemberPart(**fields, origin=str(getattr(part, "origin", corpus.path))))
    view.parts = tuple(parts)
    return view


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
    model: Any = from_config(resolve(config.system)[1], config.model, where="config.model")
    labels = {name: corpus.columns[name] for name in loader.labels}
    check_context(dataclasses.asdict(model), labels, widths)
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
