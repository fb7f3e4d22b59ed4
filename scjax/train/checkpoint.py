"""Checkpoints: the state, the data cursor and what they belong to, in one Orbax step.

A step is complete or absent: Orbax writes it beside its place and renames it. What it holds is checked
when it is read, against a fingerprint taken on the device when it was saved, so that a damaged file is
never taken for parameters.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from scjax.parallel import barrier, from_all
from scjax.train.state import State

FAILURES = (ValueError, KeyError, TypeError, OSError, RuntimeError)  # what Orbax raises when it cannot write


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says why and what would be right."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state, the data cursor that goes with it, the number of steps done, and the sums of the metrics of
    steps that are in no line of metrics yet (``Meter.totals``)."""

    state: State
    cursor: dict[str, Any]
    step: int
    totals: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``["seed: 0 -> 1", ...]`` for every entry that differs between two nested mappings."""
    out = []
    for key in sorted({*old, *new}):
        was, now = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            out += changes(was, now, f"{prefix}{key}.")
        elif was != now:
            out.append(f"{prefix}{key}: {was} -> {now}")
    return out


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], where: pathlib.Path) -> None:
    """Raises CheckpointError naming each setting in which a run differs from the one in ``where``."""
    found = changes(json.loads(json.dumps(old)), json.loads(json.dumps(new)))
    if found:
        raise CheckpointError(
            f"{where} belongs to a run with other settings: {'; '.join(found)}. Resume with the old ones, or "
            "start a new run in another directory"
        )


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """uint32 per array: sum of its bit patterns, each times an odd number made from its position. Exact,
    hence the same on every mesh; any single changed element changes it."""

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}").astype(jnp.uint32)
        position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
        for axis in reversed(range(bits.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            position, stride = position + index * jnp.uint32(stride % 2**32), stride * bits.shape[axis]
        return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)

    return {name: one(x) for name, x in leaves.items()}


def _leaves(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _describe(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _leaves(tree).items()}


def _fingerprint(tree: Any) -> dict[str, int]:
    return {name: int(value) for name, value in _fingerprints(_leaves(tree)).items()}


class _WithoutOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in pathlib.PurePath(record.pathname).parts


@functools.cache
def _quiet_orbax() -> None:
    """Leaves a failure to whoever raises it. Of a write that fails Orbax also logs the traceback, from
    each of its threads. When one of many concurrent reads fails it closes its event loop under the
    others, each of which complains to the interpreter, at any time later."""
    logging.getLogger("absl").addFilter(_WithoutOrbax())
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        told = str(unraisable.exc_value)
        if "Event loop is closed" not in told and "error while reading array index" not in told:
            previous(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
      directory: absolute or relative path; made when the first checkpoint is saved.
      identity: what must not change between saving and resuming (seed, corpus, model ...); JSON-able.
      keep: how many of the newest are kept.
      keep_every: those of every so many steps are kept for good; None: none.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        identity: Mapping[str, Any],
        keep: int = 3,
        keep_every: int | None = None,
    ):
        self.directory = pathlib.Path(directory).absolute()
        self.identity = dict(identity)
        self._saving: int | None = None
        _quiet_orbax()
        kept: list[Any] = [LatestN(keep)]
        if keep_every is not None:
            kept.append(EveryNSteps(keep_every))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept), cleanup_tmp_directories=True
        )
        self._open()

    def _open(self) -> None:
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=self._options, item_handlers=handlers)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    # ------------------------------------------------------------------ save
    def save(
        self,
        step: int,
        state: State,
        cursor: Mapping[str, Any],
        totals: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Starts to save; returns once the state is copied from the devices. The state may be donated
        right after. A step that is already there is left as it is.

        Args:
          step: number of steps done.
          state: all of it.
          cursor: of the data, after the last batch that the state has seen.
          totals: ``Meter.totals``, where the step does not end a line of metrics.

        Raises:
          OSError: the disk is full, now or while the previous checkpoint was being written.
        """
        self.wait()
        if step in self.steps():
            return
        meta = {
            "identity": self.identity,
            "leaves": _describe(state),
            "fingerprint": _fingerprint(state),
            "totals": {name: list(sums) for name, sums in (totals or {}).items()},
        }
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(dict(cursor)),
            "meta": ocp.args.JsonSave(meta),
        }
        self._saving = step
        with self._disk_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raises if the checkpoint being written in the background has failed."""
        with self._disk_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete; raises OSError if that failed."""
        with self._disk_errors():
            self._manager.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        self.wait()
        self._manager.close()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            kept = max((s for s in self.steps() if s != self._saving), default=None)
            intact = "no earlier checkpoint exists" if kept is None else f"checkpoint {kept} is intact"
            what = f"cannot save checkpoint {self._saving} in {self.directory}"
            if getattr(error, "errno", None) in (
                errno.ENOSPC,
                errno.EDQUOT,
            ) or "No space left on device" in str(error):
                message = f"{what}: the disk is full; {intact}. Free some space and resume"
                raise OSError(errno.ENOSPC, message) from None
            raise OSError(errno.EIO, f"{what}: {_first_line(error)}; {intact}") from error

    # --------------------------------------------------------------- restore
    def restore(self, abstract: State) -> Restored | None:
        """The newest checkpoint that can be read, on the mesh of ``abstract``; None if there is none.

        A newer one that is incomplete or damaged is named on the screen, set aside as
        ``<step>.damaged`` and passed over.

        Raises:
          CheckpointError: the run has another identity or another shape of state, naming each
            difference, or none of the checkpoints can be read.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            with _noted(problems, step):  # each process by itself
                meta, restored = self._read(step, abstract)
            if self._agreed(problems, step):
                with _noted(problems, step):  # all of them together
                    _verify(restored.state, meta)
                if self._agreed(problems, step):
                    self._set_aside(problems, step)
                    return restored
        if problems:
            told = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(f"no checkpoint in {self.directory} can be read: {told}")
        return None

    def _read(self, step: int, abstract: State) -> tuple[dict[str, Any], Restored]:
        """What this process needs of a checkpoint. It waits for no other process, as Orbax's manager would:
        one that cannot read its part would leave the others there."""
        path = self.directory / str(step)
        meta = json.loads((path / "meta" / "metadata").read_text())
        refuse_changes(meta["identity"], self.identity, self.directory)
        different = changes(meta["leaves"], _describe(abstract))
        if different:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} has another shape of state: "
                + "; ".join(different[:5])
                + (f" and {len(different) - 5} more" if len(different) > 5 else "")
            )
        cursor = json.loads((path / "data" / "metadata").read_text())
        with closing(ocp.StandardCheckpointHandler()) as reader:
            state = reader.restore(path / "state", args=ocp.args.StandardRestore(abstract))
        return meta, Restored(state, cursor, step, meta.get("totals", {}))

    @staticmethod
    def _agreed(problems: dict[int, str], step: int) -> bool:
        """Whether no process has a problem with a checkpoint; otherwise all note the first one's."""
        told = from_all(problems.get(step, ""))
        first = next((i for i, problem in enumerate(told) if problem), None)
        if first is not None:
            problems[step] = told[first] if len(told) == 1 else f"process {first}: {told[first]}"
        return first is None

    def _set_aside(self, problems: Mapping[int, str], good: int) -> None:
        if not problems:
            return
        self._manager.close()
        if jax.process_index() == 0:
            for step, problem in problems.items():
                print(
                    f"checkpoint {step} cannot be read and is set aside; going on from {good}. ({problem})",
                    flush=True,
                )
                (self.directory / str(step)).rename(_unused(self.directory / f"{step}.damaged"))
        barrier("scjax:set_aside")
        self._open()


@contextmanager
def _noted(problems: dict[int, str], step: int) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - of an array that it cannot read Orbax raises just that
        problems[step] = _first_line(error)


def _first_line(error: BaseException) -> str:
    if type(error) is Exception and error.__cause__:  # Orbax says which part of an array, its cause says why
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _unused(path: pathlib.Path) -> pathlib.Path:
    number = 1
    while path.exists():
        number, path = number + 1, path.with_name(f"{path.name.split('.damaged')[0]}.damaged{number}")
    return path


def _verify(tree: Any, meta: Mapping[str, Any]) -> None:
    saved = meta["fingerprint"]
    wrong = [name for name, value in _fingerprint(tree).items() if saved.get(name) != value]
    if wrong:
        raise ValueError(f"the values read are not those saved, in {', '.join(wrong[:3])}")


def checkpoint_steps(directory: str | pathlib.Path) -> list[int]:
    """The complete checkpoints in a directory, oldest first."""
    found = pathlib.Path(directory).glob("[0-9]*")
    return sorted(int(p.name) for p in found if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists())


def restore_variables(
    directory: str | pathlib.Path, shapes: dict[str, Any], step: int | None = None, *, average: bool = True
) -> tuple[dict[str, Any], int]:
    """``({"params", "buffers"}, step)`` of one checkpoint, without optimiser or cursor.

    Args:
      directory: the ``checkpoints`` directory of a run.
      shapes: ``scjax.nn.shapes_of(model)``. Leaves may carry a sharding; those that do not go to the
        first local device.
      step: which checkpoint; the newest by default.
      average: take the moving average of the parameters for them, where the run keeps one.

    Raises:
      FileNotFoundError: no (such) checkpoint; names those there are.
      CheckpointError: it holds a model of another shape, or is damaged.
    """
    _quiet_orbax()
    directory = pathlib.Path(directory).absolute()
    steps = checkpoint_steps(directory)
    if not steps or (step is not None and step not in steps):
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        wanted = "no checkpoint" if step is None else f"no checkpoint {step}"
        raise FileNotFoundError(errno.ENOENT, f"{wanted} in {directory}; {there}")
    path = directory / str(steps[-1] if step is None else step)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=getattr(s, "sharding", None) or one_device),
        shapes,
    )
    try:
        meta = json.loads((path / "meta" / "metadata").read_text())
        averaged = average and any(name.startswith("ema/") for name in meta["leaves"])
        if averaged:
            target["ema"] = target.pop("params")
        saved = {name: leaf for name, leaf in meta["leaves"].items() if name.split("/")[0] in target}
        if different := changes(saved, _describe(target)):
            raise CheckpointError(f"checkpoint {path} holds another model: {'; '.join(different[:5])}")
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        restore = ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True)
        with closing(ocp.PyTreeCheckpointHandler()) as reader:  # waits for no other process
            variables = reader.restore(path / "state", args=restore)
        _verify(variables, meta)
        if averaged:
            variables["params"] = variables.pop("ema")
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - of an array that it cannot read Orbax raises just that
        raise CheckpointError(f"checkpoint {path} cannot be read: {_first_line(error)}") from error
    return variables, int(path.name)
