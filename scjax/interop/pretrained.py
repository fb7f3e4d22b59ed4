"""From a published checkpoint to a run directory, and from a model to files that other tools read."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from scjax.config import from_config, nearest
from scjax.genes import Vocabulary
from scjax.interop.files import existing, read_json, read_tensors, recorded, sha256
from scjax.interop.mapping import Account, import_tensors
from scjax.interop.source import Source
from scjax.models import SYSTEMS, build, resolve
from scjax.nn import Abstract, flatten, initialise, nest, shapes_of
from scjax.train.checkpoint import Checkpoints
from scjax.train.run import describe, identity, read_model

PLAIN = "scjax-export"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model out of a published checkpoint.

    Attributes:
      model: what a trained model is made of, as :func:`scjax.train.read_model` gives it.
      account: what became of every tensor.
      notes: what to know about how the checkpoint was read.
    """

    model: dict[str, Any]
    account: Account
    notes: list[str]


# --------------------------------------------------------------------------- in
def import_pretrained(
    system: str, path: str | pathlib.Path, out: str | pathlib.Path | None = None, **dictionaries: Any
) -> Imported:
    """Reads a published checkpoint.

    Args:
      system: "scgpt", ...
      path: the file or directory as it is published.
      out: run directory to write, new or empty; None for a model in memory alone.
      **dictionaries: what the system needs beside the weights, see ``read`` in its module of
        ``scjax.interop``.

    Raises:
      ValueError: no such system or argument (says which there are), a file that cannot be read, or a tensor
        or vocabulary that does not fit (names it). Nothing is then written.
      FileExistsError: ``out`` holds something.
      ImportError: a package to read the file is missing; names it.
    """
    module = module_of(system)
    takes = [p.name for p in list(inspect.signature(module.read).parameters.values())[1:]]
    for name in dictionaries:
        if name not in takes:
            has = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise ValueError(f"{system} takes no {name} with a checkpoint;{nearest(name, takes)} {has}")
    if out is not None:
        refuse_existing(out)
    with recorded() as opened:
        source: Source = module.read(pathlib.Path(path), **dictionaries)
    resolved: Any = from_config(resolve(system)[1], source.config, where=f"the config of {path}")
    model = build(system, source.config, len(source.vocabulary))
    rules = module.rules(dataclasses.asdict(resolved), len(source.vocabulary))
    variables, account = import_tensors(
        rules,
        source.tensors,
        shapes_of(model),
        module.IGNORED,
        fill=_buffers(model, {rule.ours for rule in rules}, source.buffers or {}),
    )
    about = describe(system, source.config, source.vocabulary, corpus=None, seed=0)
    about["imported"] = {
        "source": str(pathlib.Path(path).absolute()),
        "files": {str(file): sha256(file) for file in opened},
        "notes": source.notes,
        "tensors": {"used": len(account.used), "ignored": account.ignored},
    }
    if out is None:
        parts = {
            "system": system,
            "config": about["model"],
            "vocabulary": source.vocabulary,
            **jax.device_put(variables, jax.local_devices()[0]),
            "step": 0,
            "path": pathlib.Path(path),
        }
    else:
        with whole_directory(out) as partial:
            write_run(partial, about, source.vocabulary, variables)
        parts = read_model(out)
    return Imported(parts, account, source.notes)


def module_of(system: str) -> Any:
    """``scjax.interop.<system>``; ValueError names the systems that have one."""
    known = [name for name in SYSTEMS if importlib.util.find_spec(f"scjax.interop.{name}")]
    if system not in known:
        raise ValueError(
            f"no published checkpoints of {system!r} are known;{nearest(system, known)} "
            f"there are {', '.join(known)}"
        )
    return importlib.import_module(f"scjax.interop.{system}")


def _buffers(model: Abstract, ruled: set[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> value of the buffers that no tensor holds: as given, else as in a new model."""
    fresh = jax.jit(lambda: initialise(model)["buffers"])()
    left = {f"buffers/{path}": value for path, value in flatten(fresh).items()}
    for path, value in given.items():
        if f"buffers/{path}" not in left:
            raise ValueError(f"the checkpoint brings a value for the buffer {path}, which the model lacks")
        left[f"buffers/{path}"] = value
    return {path: value for path, value in left.items() if path not in ruled}


def write_run(
    directory: pathlib.Path, about: Mapping[str, Any], vocabulary: Vocabulary, variables: Mapping[str, Any]
) -> None:
    """A run directory whose only checkpoint is step 0, without optimiser and data cursor."""
    (directory / "model.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    vocabulary.to_tsv(directory / "vocabulary.tsv")
    checkpoints = Checkpoints(directory / "checkpoints", identity(about))
    checkpoints.save(0, jax.device_put(dict(variables), jax.local_devices()[0]), {})
    checkpoints.close()


# -------------------------------------------------------------------------- out
def export_pretrained(model: Any, out: str | pathlib.Path, format: str = "plain") -> None:
    """Writes a model for other tools.

    Args:
      model: a ``scjax.api.Model``.
      out: directory to write, new or empty.
      format: "plain": ``model.safetensors`` whose names are the paths of parameters and buffers,
        ``model.json`` (system and hyper-parameters) and ``vocabulary.tsv``; :func:`scjax.load` reads it too.
        "scgpt" or "geneformer": the layout in which the original tools read a model of that system.

    Raises:
      ValueError: no such format, or not one of this model's system.
      FileExistsError: ``out`` holds something.
      ImportError: safetensors is missing.
    """
    save_file = _save_file()
    writers = [name for name in SYSTEMS if _has_writer(name)]
    if format not in ("plain", *writers):
        raise ValueError(
            f"no format {format!r};{nearest(format, ['plain', *writers])} there are plain, "
            f"{', '.join(writers)}"
        )
    if format not in ("plain", model.system):
        raise ValueError(
            f"a model of {model.system} cannot be written as one of {format}; there is plain"
            + (f" and {model.system}" if model.system in writers else "")
        )
    with whole_directory(out) as partial:
        if format != "plain":
            module_of(format).write(partial, model)
            return
        variables = {"params": model.params, "buffers": model.buffers}
        tensors = {path: np.asarray(value, order="C") for path, value in flatten(variables).items()}
        save_file(tensors, partial / "model.safetensors")
        told = {"categories": model.categories}
        about = describe(model.system, model.config, model.vocabulary, corpus=None, seed=0, **told)
        about |= {"format": PLAIN, "version": VERSION, "step": model.step}
        (partial / "model.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        model.vocabulary.to_tsv(partial / "vocabulary.tsv")


def _has_writer(system: str) -> bool:
    return bool(importlib.util.find_spec(f"scjax.interop.{system}")) and hasattr(module_of(system), "write")


def _save_file() -> Any:
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(f"export needs safetensors: pip install 'scjax[interop]' ({error})") from error
    return save_file


def is_plain(path: str | pathlib.Path) -> bool:
    """Whether a directory is what :func:`export_pretrained` writes in the plain format."""
    file = pathlib.Path(path) / "model.json"
    if not file.is_file():
        return False
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("format") == PLAIN
    except (ValueError, AttributeError):
        return False


def read_plain(path: str | pathlib.Path) -> dict[str, Any]:
    """What a trained model is made of, from a plain export; as :func:`scjax.train.read_model`.

    Raises:
      ValueError: another version, a changed vocabulary, or tensors that are not those of the model.
    """
    path = pathlib.Path(path)
    about = read_json(path / "model.json")
    if about.get("version") != VERSION:
        raise ValueError(f"{path} has version {about.get('version')}; this scjax reads version {VERSION}")
    vocabulary = Vocabulary.from_tsv(existing(path / "vocabulary.tsv"))
    if vocabulary.hash != about["vocabulary"]["hash"]:
        raise ValueError(f"{path / 'vocabulary.tsv'} has been changed since the export was made")
    shapes = shapes_of(build(about["system"], about["model"], len(vocabulary)))
    tensors = read_tensors(path / "model.safetensors")
    wanted = flatten(shapes)
    for name in sorted({*wanted, *tensors}):
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "absent"
        there = f"{tensors[name].dtype}{list(tensors[name].shape)}" if name in tensors else "absent"
        if here != there:
            raise ValueError(f"{path / 'model.safetensors'}: {name} is {there}, the model has {here}")
    variables: dict[str, Any] = {"params": {}, "buffers": {}} | nest(tensors)
    return {
        "system": about["system"],
        "config": about["model"],
        "vocabulary": vocabulary,
        **jax.device_put(variables, jax.local_devices()[0]),
        "step": about["step"],
        "path": path,
        "categories": about.get("categories", {}),
    }


# ------------------------------------------------------------------------- both
def refuse_existing(out: str | pathlib.Path) -> None:
    """FileExistsError if ``out`` is there and is not an empty directory."""
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there and not empty; choose another directory")


@contextlib.contextmanager
def whole_directory(out: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside ``out`` to write into, which becomes ``out`` if all goes well and is gone if not."""
    refuse_existing(out)
    out = pathlib.Path(out).absolute()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
