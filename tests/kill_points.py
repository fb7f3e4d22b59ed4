"""Kills a build or an append at every point where it changes something on disk; see test_build_killed.py.

    python kill_points.py build|append FOLDER EVERY

Each run is a fork of this process, which kills itself with SIGKILL at its n-th point; then another fork runs
the same call to its end. Prints one JSON line per point: where it was killed, what was visible then, and the
digest of all files after the second run. Ends with the first run that met fewer points than it was to reach.
"""

import builtins
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys

import numpy as np
import pandas as pd
from synthetic import synthetic_adata

from scjax.corpus import append_corpus, build_corpus, fragments, plan, shards, tasks

TINY = {"part_cells": 40, "inner": 64, "shard": 256, "progress": False}
VALUES = ["dose", "protein"]


def call(what: str, out: pathlib.Path, files: list[pathlib.Path]) -> None:
    if what == "build":
        build_corpus(files, out, validation=0.2, drop_duplicates=True, values=VALUES, **TINY)
    else:
        append_corpus(out, files[1:], progress=False)


def digest(root: pathlib.Path) -> str:
    """Of the names and contents of all files."""
    all_ = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        all_.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return all_.hexdigest()


def plant(kill_at: int, report: pathlib.Path) -> None:
    """From now on the ``kill_at``-th change on disk is this process's last."""
    met = 0

    def point(where: str) -> None:
        nonlocal met
        if met == kill_at:
            report.write_text(where)
            os.kill(os.getpid(), signal.SIGKILL)
        met += 1

    def around(module, name: str, after: bool = False) -> None:
        function = getattr(module, name)

        @functools.wraps(function)
        def planted(*args, **kwargs):
            # what zarr does within a folder that has no name yet is one stretch: it is killed in its writes
            inner = name == "replace" and "tmp-" in pathlib.Path(args[1]).parent.as_posix()
            if not inner:
                point(f"before {name}")
            result = function(*args, **kwargs)
            if after and not inner:
                point(f"after {name}")
            return result

        setattr(module, name, planted)

    for module, name, after in (
        (os, "rename", True),
        (os, "replace", True),
        (os, "fsync", False),
        (shutil, "rmtree", True),
        (np, "save", False),
        (tasks, "write_part", True),
        (tasks, "write_fragment", True),
        (shards.ShardWriter, "_read_back", False),
    ):
        around(module, name, after)

    class HalfWritten:
        """A file of which only a part reaches the disk when the process is killed."""

        def __init__(self, file):
            self.file = file

        def write(self, content):
            half = memoryview(content).cast("B")[: memoryview(content).nbytes // 2]
            self.file.write(half)
            self.file.flush()
            point("in a write")
            self.file.seek(-len(half), 1)
            return self.file.write(content)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opened(path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        return HalfWritten(file) if mode == "wb" else file

    shards.open = fragments.open = opened


def forked(function, *args) -> int:
    """The exit status of a function in a fork."""
    child = os.fork()
    if not child:
        try:
            function(*args)
        except BaseException as error:  # noqa: BLE001 - the parent sees a status only
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main() -> None:
    what, folder, every = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    plan.RUN_ELEMENTS = 800
    files = [folder / f"{name}.h5ad" for name in "ab"]
    for seed, file in enumerate(files):
        adata = synthetic_adata(50, 20, seed=seed)
        rows = np.arange(50)
        rows[7] = 3  # a duplicate
        adata = adata[rows].copy()
        adata.obs_names_make_unique()
        adata.obs["dose"] = np.arange(50) / 7
        panel = np.random.default_rng(seed).random((50, 3))
        adata.obsm["protein"] = pd.DataFrame(panel, adata.obs_names, ["CD3", "CD4", f"CD{seed + 19}"])
        adata.write_h5ad(file)
    start = folder / "start"
    if what == "append":
        status = forked(call, "build", start, files[:1])
        assert status == 0
    clean = folder / "clean"

    def fresh(out: pathlib.Path) -> None:
        if what == "append":
            shutil.copytree(start, out)

    fresh(clean)
    assert forked(call, what, clean, files) == 0
    expected = digest(clean)
    head = (start / "HEAD").read_text() if what == "append" else ""
    report = folder / "report"
    for number in range(0, 10**6, every):
        out = folder / f"c{number}"
        fresh(out)

        def killed(out: pathlib.Path = out, number: int = number) -> None:
            plant(number, report)
            call(what, out, files)

        status = forked(killed)
        if os.WIFEXITED(status):
            print(json.dumps({"points": number, "status": status, "same": digest(out) == expected}))
            return
        now = (out / "HEAD").read_text() if (out / "HEAD").exists() else ""
        again = forked(call, what, out, files)
        line = {
            "where": report.read_text(),
            "visible": now == (clean / "HEAD").read_text(),
            "old": now == head,
            "status": again,
            "same": digest(out) == expected,
        }
        print(json.dumps(line), flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
