"""Config files from the shell: ``FILE.py[:ARG]`` and what follows from it without data or devices."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table


def load_config(name: str) -> ConfigDict:
    """``get_config(ARG)`` of a config file named ``FILE.py`` or ``FILE.py:ARG``.

    Raises:
      FileNotFoundError: no such file; lists the config files beside it.
      ValueError: the file has no ``get_config``.
    """
    file, _, arg = name.partition(":")
    path = Path(file)
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no config file {file}" + (f"; there are {', '.join(there)}" if there else "")
        )
    spec = importlib.util.spec_from_file_location(f"scjax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{file} defines no get_config(arg)")
    return module.get_config(arg) if arg else module.get_config()


def resolve(config: ConfigDict) -> dict[str, Any]:
    """The config with every default filled in.

    Raises:
      ConfigError: an unknown or missing key (names the nearest valid one), or a value of a wrong type.
    """
    from scjax import models
    from scjax.config import from_config
    from scjax.train import RunConfig

    run: Any = from_config(RunConfig, config)
    model: Any = from_config(models.resolve(run.system)[1], run.model, where="config.model")
    return dataclasses.asdict(run) | {"model": dataclasses.asdict(model)}


def parameter_table(config: ConfigDict, n_genes: int | None = None) -> Table:
    """A line a parameter: path, shape, logical axes, count and bytes.

    Args:
      config: with ``system`` and ``model``.
      n_genes: size of the vocabulary; by default that of the corpus ``config.data.corpus``.
    """
    from scjax import models
    from scjax.corpus import Corpus
    from scjax.nn.table import parameter_table as table

    if n_genes is None:
        try:
            n_genes = len(Corpus.open(config.data.corpus).vocabulary)
        except FileNotFoundError as error:
            raise ValueError(f"{error}; give the size of the vocabulary with --genes N") from None
    model = models.build(config.system, config.model, n_genes, config.seed)
    return table(model, title=f"{config.system}, {n_genes:,} genes")
