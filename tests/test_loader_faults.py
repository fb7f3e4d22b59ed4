"""What may go wrong around a loader: threads left behind, processes that end, damaged files."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from loading import build, study, take

from scjax.corpus import Corpus
from scjax.corpus.reader import CorruptDataError
from scjax.loader import Loader


@pytest.fixture
def corpus(tmp_path):
    return build({"first": study(500, 0)}, tmp_path / "corpus", labels=[])


def background():
    return [t for t in threading.enumerate() if t.name.startswith(("scjax-read", "grain-thread-prefetch"))]


def test_closing_ends_the_threads(corpus):
    before = background()
    iterator = iter(Loader(corpus, 32, window=8))
    next(iterator)
    assert len(background()) > len(before)
    iterator.close()
    iterator.close()
    assert background() == before
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
    dropped = iter(Loader(corpus, 32, window=8))
    next(dropped)
    del dropped
    gc.collect()
    assert background() == before


def test_a_process_that_forgets_to_close_still_ends(corpus):
    code = f"""
import numpy as np
from scjax.corpus import Corpus
from scjax.loader import Loader
held = [iter(Loader(Corpus.open({str(corpus.path)!r}), 32, window=8, prefetch=p)) for p in (0, 2)]
for iterator in held:
    next(iterator)
print("done")
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_damaged_chunk_surfaces_in_next(corpus, prefetch):
    part = corpus.parts[1]
    shard = Path(part.path) / "X/data/c/0"
    blob = bytearray(shard.read_bytes())
    blob[30] ^= 1
    shard.write_bytes(bytes(blob))
    iterator = iter(Loader(corpus, 32, prefetch=prefetch, epochs=1))
    with pytest.raises(CorruptDataError, match=f"part {part.id}, array X/data, shard 0, chunk 0: its"):
        list(iterator)
    with pytest.raises(CorruptDataError):  # asked again, the same answer and not another batch
        next(iterator)
    iterator.close()


def test_a_damaged_index_is_named(corpus):
    index = corpus.parts[1].index / "nnz.npy"
    nnz = np.load(index)
    nnz[5] += 1
    np.save(index, nnz)
    with pytest.raises(CorruptDataError, match=f"part {corpus.parts[1].id}, column nnz: rows 0 to"):
        take(Loader(Corpus.open(corpus.path), 300, lanes=1, shuffle=False), 2)


def test_importing_the_loader_does_not_import_jax():
    code = "import sys, scjax.loader; print({'jax', 'flax', 'grain', 'numba'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
