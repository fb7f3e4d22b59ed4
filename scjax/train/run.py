"""A run directory, which describes itself.

config.json       everything the run was made from
model.json        system, config, seed, vocabulary and corpus of the model, scjax version
vocabulary.tsv    its genes
metrics.jsonl     one line per interval
tensorboard/
checkpoints/      one directory per step kept
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import scjax
from scjax.config import from_config
from scjax.genes import Vocabulary
from scjax.models import build, resolve
from scjax.nn.module import shapes_of
from scjax.parallel import barrier
from scjax.train.checkpoint import changes, refuse_changes, restore_variables

FORMAT = "scjax-run"
VERSION = 1
COMPUTED = ("attention", "decoding", "remat")  # fields of a model that change its speed and not its results


def describe(
    system: str,
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    corpus: str | None,
    seed: int,
    manifests: Sequence[str] | None = None,
    tables: Mapping[str, Any] | None = None,
    categories: Mapping[str, Sequence[str]] | None = None,
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``model.json``.

    Args:
      system: name of the system, see :func:`scjax.models.resolve`.
      config: fields of its config class; written out with the defaults filled in.
      vocabulary: genes of the model.
      corpus: ``manifest_id`` of the corpus, or of the mixture, that it is trained on.
      seed: of the run.
      manifests: those of the corpora, one each (:func:`manifests_of`); resuming opens them again.
      tables: ``GeneTables.sources``, where the model takes values of genes from outside.
      categories: label column -> names of its codes, so that other data can be told in the same codes.
      start: ``{"source", "sha256"}`` of what the run begins with, where that is not random.
    """
    resolved: Any = from_config(resolve(system)[1], config, where="config.model")
    return {
        "format": FORMAT,
        "version": VERSION,
        "scjax": scjax.__version__,
        "system": system,
        "model": json.loads(json.dumps(dataclasses.asdict(resolved))),
        "seed": seed,
        "corpus": corpus,
        **({"manifests": list(manifests)} if manifests else {}),
        "vocabulary": {"hash": vocabulary.hash, "n_genes": len(vocabulary)},
        **({"tables": dict(tables)} if tables else {}),
        **({"categories": {k: list(v) for k, v in categories.items()}} if categories else {}),
        **({"start": dict(start)} if start else {}),
    }


def identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``model.json`` that must be the same for a run to be resumed. Of tables and start it is
    their content, wherever they lie; how a model is computed (:data:`COMPUTED`) may change with the hardware.
    """
    same = {name: model[name] for name in ("system", "model", "seed", "corpus", "vocabulary")}
    same["model"] = {name: value for name, value in same["model"].items() if name not in COMPUTED}
    tables = {name: f"sha256 {about['sha256'][:16]}" for name, about in model.get("tables", {}).items()}
    start = f"sha256 {model['start']['sha256'][:16]}" if "start" in model else ""
    return same | ({"tables": tables} if tables else {}) | ({"start": start} if start else {})


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
      path: where it is.
      model: content of ``model.json``.
    """

    path: pathlib.Path
    model: dict[str, Any]

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def vocabulary(self) -> Vocabulary:
        """The genes of the model; ValueError if the file is not the one the run was made with."""
        vocabulary = Vocabulary.from_tsv(self.path / "vocabulary.tsv")
        if vocabulary.hash != self.model["vocabulary"]["hash"]:
            raise ValueError(f"{self.path / 'vocabulary.tsv'} has been changed since the run was made")
        return vocabulary

    @property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``."""
        return json.loads((self.path / "config.json").read_text())

    def record(self, config: Mapping[str, Any]) -> None:
        """Writes ``config.json``, once nothing speaks against going on with it: it may differ from that of
        the run so far, for instance in its number of steps. Only process 0 writes."""
        if jax.process_index() == 0:
            file = self.path / "config.json"
            different = changes(self.config, json.loads(json.dumps(config))) if file.exists() else []
            if different:
                print(f"going on with another config than before: {'; '.join(different)}", flush=True)
            write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")


def read_run(path: str | pathlib.Path) -> Run:
    """An existing run directory.

    Raises:
      FileNotFoundError: there is no ``model.json``.
      ValueError: it is not that of a run, or of a version this scjax cannot read.
    """
    path = pathlib.Path(path)
    file = path / "model.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} is not a run directory: it has no model.json")
    try:
        model = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(model, dict) or model.get("format") != FORMAT:
        raise ValueError(f"{file} is not that of a scjax run: its format is not {FORMAT!r}")
    if model.get("version") != VERSION:
        raise ValueError(f"{file} has version {model.get('version')}; this scjax reads version {VERSION}")
    return Run(path, model)


def read_model(path: str | pathlib.Path, step: int | None = None, *, average: bool = True) -> dict[str, Any]:
    """What a trained model is made of: its system, config, vocabulary, params, buffers, step and path.

    Args:
      path: a run directory, or one checkpoint in it (``RUN/checkpoints/STEP``).
      step: which checkpoint; the newest by default.
      average: take the moving average of the parameters for them, where the run keeps one.

    Raises:
      FileNotFoundError: no run, or no such checkpoint; names those there are.
      CheckpointError: the checkpoint is damaged.
    """
    path = pathlib.Path(path)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    run = read_run(path)
    vocabulary = run.vocabulary
    shapes = shapes_of(build(run.model["system"], run.model["model"], len(vocabulary), run.model["seed"]))
    variables, step = restore_variables(run.checkpoints, shapes, step, average=average)
    return {
        "system": run.model["system"],
        "config": run.model["model"],
        "vocabulary": vocabulary,
        **variables,
        "step": step,
        "path": path,
        "categories": run.model.get("categories", {}),
    }


def open_run(path: str | pathlib.Path, model: Mapping[str, Any], vocabulary: Vocabulary) -> Run:
    """Makes a run directory, or opens the one that is there to go on with it.

    Every process of a run calls this; process 0 writes.

    Args:
      path: the directory.
      model: from :func:`describe`; its identity may not differ.
      vocabulary: genes of the model.

    Raises:
      ValueError: the path is a URL.
      FileExistsError: the directory holds something that is not a run, or is a file.
      CheckpointError: it holds a run of another seed, corpus, model or vocabulary; names what differs.
    """
    if "://" in str(path):
        raise ValueError(f"{path}: a run needs a directory that all its processes see, not a URL; mount it")
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; a run needs a directory")
    if (path / "model.json").exists():
        refuse_changes(identity(read_run(path).model), identity(model), path)
    elif path.exists():
        others = sorted(
            p.name for p in path.iterdir() if not p.name.endswith(".partial") and p.name != "launch"
        )
        if others:
            shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
            raise FileExistsError(
                f"{path} is not a run directory but holds {shown}; choose another directory"
            )
    barrier("scjax:open_run:checked")
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "model.json").exists():  # comes first: it marks the directory as a run from then on
            write_text(path / "model.json", json.dumps(model, indent=2) + "\n")
        if not (path / "vocabulary.tsv").exists():
            vocabulary.to_tsv(path / ".vocabulary.tsv.partial")
            os.replace(path / ".vocabulary.tsv.partial", path / "vocabulary.tsv")
    barrier("scjax:open_run:written")
    # others need not see the new file yet: NFS may remember for a while that there was none
    return read_run(path) if jax.process_index() == 0 else Run(path, dict(model))


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
