"""Steps compiled before the first batch, one executable for each length that batches have.

Compiled when it is first met, a length would stop the run in its middle, on all devices; and a batch of a
shape that nobody meant would compile silently, again and again. Here it is an error.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from scjax.loader import Loader
from scjax.parallel import batch_sharding
from scjax.train.state import State
from scjax.types import CellBatch


def abstract_batch(
    mesh: Mesh,
    batch_size: int,
    length: int,
    labels: Iterable[str] = (),
    values: Mapping[str, Sequence[int]] | None = None,
) -> CellBatch:
    """A global batch as ``jax.ShapeDtypeStruct`` with shardings; nothing is allocated.

    Args:
      mesh: the device mesh, also an ``AbstractMesh``.
      batch_size: cells B of the whole batch.
      length: gene slots L.
      labels: names of those that the cells carry.
      values: name -> shape of that of one cell, () for a number.
    """
    sharding = batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    return CellBatch(
        gene_id=array(np.int32, length),
        count=array(np.float32, length),
        depth=array(np.float32),
        n_genes=array(np.int32),
        row=array(np.uint32),
        label={name: array(np.int32) for name in labels},
        value={name: array(np.float32, *shape) for name, shape in (values or {}).items()},
        weight=array(np.float32),
    )


def device_bytes(compiled: Any) -> dict[str, int]:
    """Bytes that each device needs for a compiled step: ``arguments`` (state and batch), ``results`` that do
    not take the place of arguments, ``temporaries`` at their peak, and their sum, ``all``.

    Args:
      compiled: a ``jax.stages.Compiled``.
    """
    found = compiled.memory_analysis()
    if isinstance(found, list):  # some versions have one for each program
        (found,) = found
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
    return sizes | {"all": sum(sizes.values())}


class AheadStep:
    """A step of which an executable exists for each shape of batch; called like the step.

    Attributes:
      compiled: (B, L) -> ``jax.stages.Compiled``.
      seconds: that compiling took, or reading from the persistent cache.
    """

    def __init__(self, step: Any, abstract: State, batches: Sequence[CellBatch]):
        began = time.perf_counter()
        self.compiled = {batch.shape: step.lower(abstract, batch).compile() for batch in batches}
        self.seconds = time.perf_counter() - began
        self._structure: Any = jax.tree.structure(batches[0])
        self._carried = _carried(batches[0])

    def __call__(self, state: State, batch: CellBatch) -> Any:
        """What the step returns.

        Raises:
          ValueError: no executable was made for a batch like this one; says which there are.
        """
        compiled = self.compiled.get(batch.shape)
        if compiled is None or jax.tree.structure(batch) != self._structure:
            known = ", ".join(f"{cells} x {length}" for cells, length in self.compiled)
            raise ValueError(
                f"a batch of {batch.shape[0]} x {batch.shape[1]} with the labels {_carried(batch)}: the "
                f"step was compiled ahead for {known} with {self._carried}"
            )
        return compiled(state, batch)

    def bytes(self) -> dict[int, dict[str, int]]:
        """Length -> what a device needs, see :func:`device_bytes`."""
        return {length: device_bytes(compiled) for (_, length), compiled in self.compiled.items()}

    def __str__(self) -> str:
        needs = ", ".join(f"{length}: {sizes['all'] / 2**30:.2f}" for length, sizes in self.bytes().items())
        return f"compiled in {self.seconds:.1f} s; GiB a device by length {needs}"


def _carried(batch: CellBatch) -> str:
    """What its cells carry, for messages."""
    values = f" and the values {sorted(batch.value)}" if batch.value else ""
    return f"{sorted(batch.label)}{values}"


def compile_ahead(step: Callable[..., Any], abstract: State, loader: Loader) -> AheadStep:
    """A jitted step compiled for every shape of batch that a loader gives.

    Args:
      step: from :func:`scjax.train.make_train_step` or :func:`scjax.train.make_eval_step`.
      abstract: the state, from :func:`scjax.train.abstract_state`.
      loader: its batch size, bucket lengths, labels and values are what is compiled for.
    """
    mesh = abstract["step"].sharding.mesh
    lengths, labels = loader.bucket_lengths, loader.labels
    values = {name: panel.shape for name, panel in loader.panels.items()}
    batches = [abstract_batch(mesh, loader.batch_size, length, labels, values) for length in lengths]
    return AheadStep(step, abstract, batches)


def keep_compiled(directory: str | pathlib.Path) -> None:
    """Keeps what is compiled from here on in a directory, so that a run that is started again does not wait.

    Without effect for "", and where JAX_COMPILATION_CACHE_DIR already says where.
    """
    if str(directory) and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        compilation_cache.reset_cache()  # it may have been looked for, in vain, by a barrier
