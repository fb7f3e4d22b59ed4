"""experiments/pretrain.py, which also writes down the rows and genes that land on each device.

Every process leaves ``<workdir>.rows.<process>.json``: per step, the number of the first row of a
device's share of the batch -> row numbers and sums of gene ids there.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib

import jax
import numpy as np
from absl import app, flags

file = pathlib.Path(__file__).parent.parent / "experiments" / "pretrain.py"
spec = importlib.util.spec_from_file_location("pretrain", file)
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)
steps = []


class RecordingPrefetch(pretrain.Prefetch):
    def __next__(self):
        batch, step = super().__next__(), {}
        for rows, genes in zip(batch.row.addressable_shards, batch.gene_id.addressable_shards, strict=True):
            start = rows.index[0].start or 0
            step[start] = [np.asarray(rows.data).tolist(), np.asarray(genes.data).sum(1).tolist()]
        steps.append(step)
        return batch


def main(argv):
    try:
        pretrain.main(argv)
    finally:
        out = f"{flags.FLAGS.workdir}.rows.{jax.process_index()}.json"
        pathlib.Path(out).write_text(json.dumps(steps))


pretrain.Prefetch = RecordingPrefetch
app.run(main)
