"""One damaged byte, anywhere: data come out as they were, or an error names the object. Never other data."""

import contextlib
import os
import pathlib
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from synthetic import synthetic_adata

from scjax.corpus import Corpus, build_corpus
from scjax.corpus.reader import CorruptDataError, PartReader
from scjax.loader import Loader
from scjax.types import FIELDS

TINY = {"part_cells": 200, "inner": 512, "shard": 2048, "progress": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """A corpus of one part with every kind of object: labels, numbers, genes that a study did not measure."""
    root = tmp_path_factory.mktemp("flips") / "c"
    first, second = synthetic_adata(100, 40, seed=1), synthetic_adata(60, 50, seed=2)
    first.obs = first.obs[["cell_type"]]
    second.obs = second.obs[["cell_type"]].assign(age=np.arange(60))
    build_corpus([first, second], root, drop_duplicates=True, **TINY)
    return root


@pytest.fixture(scope="module")
def truth(whole) -> dict[str, object]:
    return everything(whole)


def objects(root: pathlib.Path) -> list[str]:
    """Every file that the corpus is made of."""
    manifest_id, manifest = Corpus.open(root).manifest_id, Corpus.open(root).manifest
    stored = [*manifest["objects"], *(name for part in manifest["parts"] for name in part["objects"])]
    assert {"HEAD", f"manifests/{manifest_id}.json", *stored} == {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and "sources" not in path.parts
    }
    return ["HEAD", f"manifests/{manifest_id}.json", *stored]


def everything(root: pathlib.Path) -> dict[str, object]:
    """All that opening, reading and a loader give."""
    corpus = Corpus.open(root)
    cells = corpus.read(slice(None))
    found: dict[str, object] = {
        "X": [array.tobytes() for array in (cells.X.indptr, cells.X.indices, cells.X.data)],
        "var": cells.var.reset_index().to_dict("list"),
        "obs": {name: cells.obs[name].astype(str).tolist() for name in cells.obs},
        "names": cells.obs_names.tolist(),
        "labels": corpus.obs.astype(str).to_dict("list"),
        "measured": corpus.measured_table().tobytes(),
        "total": corpus.parts[0].total.tobytes(),
    }
    for step, batch in enumerate(Loader(corpus, 32, epochs=1, prefetch=0, seed=1)):
        for name in FIELDS:
            values = getattr(batch, name)
            values = values if isinstance(values, dict) else {"": values}
            found |= {f"{step} {name} {key}": array.tobytes() for key, array in values.items()}
    return found


@contextlib.contextmanager
def flipped(path: pathlib.Path, position: int, bits: int):
    """The file with the bits of one byte flipped, for the length of the block."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[position] ^= bits
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(content)


def check(root: pathlib.Path, truth: dict[str, object], name: str, position: int, bits: int) -> None:
    """The flip is without effect, or an error names the object; and ``verify`` finds it."""
    with flipped(root / name, position, bits):
        try:
            found = everything(root)
        except (CorruptDataError, ValueError, FileNotFoundError) as error:
            assert name in str(error), f"byte {position} of {name}: {error}"
        else:
            changed = [key for key in truth if found.get(key) != truth[key]]
            assert not changed and found.keys() == truth.keys(), f"byte {position} of {name}: {changed}"


def found_by_verify(root: pathlib.Path, name: str) -> None:
    try:
        problems = Corpus.open(root).verify(progress=False)
    except (ValueError, FileNotFoundError) as error:
        problems = [str(error)]
    assert any(name in line for line in problems), (name, problems)


def test_a_flip_at_either_end_and_in_the_middle_of_every_object(whole, truth):
    rng = np.random.default_rng(0)
    for name in objects(whole):
        size = (whole / name).stat().st_size
        for position in sorted({0, size // 2, size - 1, *rng.integers(0, size, 4).tolist()}):
            check(whole, truth, name, position, 1 << int(rng.integers(8)))
    assert everything(whole) == truth


@hypothesis.settings(max_examples=150, deadline=None, phases=[hypothesis.Phase.generate])
@hypothesis.given(st.data())
def test_a_flip_anywhere(whole, truth, data):
    name = data.draw(st.sampled_from(objects(whole)))
    position = data.draw(st.integers(0, (whole / name).stat().st_size - 1))
    check(whole, truth, name, position, data.draw(st.integers(1, 255)))


def test_every_flip_is_found_by_verify(whole):
    rng = np.random.default_rng(1)
    for name in objects(whole):
        size = (whole / name).stat().st_size
        for position in {0, size - 1, int(rng.integers(size))}:
            bits = 1 << int(rng.integers(8))
            if name == "HEAD" and position == size - 1:
                bits = 64  # not another white space, which would end the line as well
            with flipped(whole / name, position, bits):
                found_by_verify(whole, name)
    assert Corpus.open(whole).verify(progress=False) == []


def test_bytes_all_over_the_index(whole):
    """All of the headers and some of the values: what is read of a column is as it was, or it is an error."""
    part = Corpus.open(whole).parts[0]
    names = part.arrays.names
    assert {"nnz", "total", "content", "codes/dataset", "codes/cell_type"} == set(names)
    expected = {name: part.column(name).tobytes() for name in names}
    starts = part.blocks.tobytes()
    for path in sorted(part.index.rglob("*.*")):
        name = path.relative_to(whole).as_posix()
        column = path.relative_to(part.index).with_suffix("").as_posix()
        some = [column] if column in names else names  # the files that describe the others matter to all
        size = path.stat().st_size
        for position in [*range(min(size, 128)), *range(128, size, 5), size - 1]:
            with flipped(path, position, 1 << position % 8):
                part = Corpus.open(whole).parts[0]
                try:
                    found = {each: part.column(each).tobytes() for each in some}
                    assert part.blocks.tobytes() == starts
                except CorruptDataError as error:
                    assert name in str(error), f"byte {position} of {name}: {error}"
                else:
                    assert found.items() <= expected.items(), f"byte {position} of {name}"


@pytest.mark.parametrize("array", ["indices", "data"])
def test_bytes_all_over_the_counts(whole, array):
    """Every third of the chunks, all of the shard's index and of the array's own description."""
    part = Corpus.open(whole).parts[0]

    def read() -> tuple[bytes, bytes]:
        indices, data = np.empty(part.nnz, part.index_dtype), np.empty(part.nnz, part.x_dtype)
        PartReader(Corpus.open(whole).parts[0]).read_spans([(0, part.nnz)], indices, data)
        return indices.tobytes(), data.tobytes()

    expected = read()
    for path in sorted((part.path / "X" / array).rglob("*")):
        if path.is_dir():
            continue
        name, size = path.relative_to(whole).as_posix(), path.stat().st_size
        chunks = range(0, size - 100, 3) if path.name != "zarr.json" else range(0)
        for position in [*chunks, *range(max(0, size - 100) if chunks else 0, size)]:
            with flipped(path, position, 1 << position % 8):
                try:
                    found = read()
                except (CorruptDataError, ValueError) as error:
                    assert name in str(error), f"byte {position} of {name}: {error}"
                else:
                    assert found == expected, f"byte {position} of {name}"


def test_every_bit_of_head_and_bytes_all_over_the_manifest(whole):
    present = Corpus.open(whole).manifest_id
    for bits in (1, 2, 4, 8, 16, 32, 64, 128, 255):
        for position in range((whole / "HEAD").stat().st_size):
            with flipped(whole / "HEAD", position, bits):
                try:
                    assert Corpus.open(whole).manifest_id == present
                except (ValueError, FileNotFoundError) as error:
                    assert str(whole / "HEAD") in str(error)
    manifest = whole / "manifests" / f"{present}.json"
    for position in range(0, manifest.stat().st_size, 7):
        with (
            flipped(manifest, position, 1 << position % 8),
            pytest.raises(ValueError, match=f"{present}.json: damaged"),
        ):
            Corpus.open(whole)


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "missing", "other"])
def test_objects_cut_short_emptied_gone_or_exchanged(whole, truth, damage):
    names = objects(whole)
    for name in names:
        path = whole / name
        content = path.read_bytes()
        try:
            if damage == "cut":
                os.truncate(path, len(content) - 1)
            elif damage == "empty":
                os.truncate(path, 0)
            elif damage == "longer":
                path.write_bytes(content + b"\0")
            elif damage == "missing":
                path.unlink()
            else:  # one file in the place of another of its kind: right checksums within, wrong object
                twin = next(
                    (n for n in names if n != name and n.rpartition("/")[0] == name.rpartition("/")[0]), None
                )
                if twin is None:
                    continue
                shutil.copy(whole / twin, path)
            try:
                found = everything(whole)
            except (CorruptDataError, ValueError, FileNotFoundError) as error:
                assert name in str(error), f"{name}: {error}"
            else:
                assert found == truth, name
            if not (name == "HEAD" and damage in ("cut", "longer")):
                found_by_verify(whole, name)
        finally:
            path.write_bytes(content)


def test_statistics_that_were_damaged_are_counted_anew(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    expected = corpus.statistics(progress=False)
    (kept,) = (corpus.path / "statistics").iterdir()
    size = kept.stat().st_size
    for position in [*range(0, 60, 2), *range(60, size, 40), *range(size - 300, size, 5)]:
        with flipped(kept, position, 1 << position % 8):
            found = Corpus.open(tmp_path / "c").statistics(progress=False)
        for name in ("n_cells", "n_detected", "mean", "median"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_missing_part(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    (part,) = Corpus.open(tmp_path / "c").parts
    for folder in (part.index, part.path):
        shutil.rmtree(folder)
        corpus = Corpus.open(tmp_path / "c")
        for use in (lambda c: c.read([0]), lambda c: next(iter(Loader(c, 32, prefetch=0)))):
            with pytest.raises(CorruptDataError, match=f"part {part.id}.*missing"):
                use(corpus)
        found_by_verify(tmp_path / "c", part.id)
