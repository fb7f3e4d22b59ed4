"""Vectors and medians of genes from the files that people have."""

import json

import numpy as np
import pytest

from scjax.genes import Vocabulary, match_values, read_medians, read_vectors

VOCABULARY = Vocabulary(
    ["ENSG00000000003", "ENSG00000000005", "ENSG00000000419", "ENSG00000000457"],
    symbol=["TSPAN6", "TNMD", "DPM1", "SCYL3"],
    aliases=[(), ("TEM", "CHM1L"), (), ()],
)
NAMES = ["SCYL3", "ENSG00000000003.15", "TEM", "ELSEWHERE"]
VECTORS = np.array([[1.0, 2], [3, 4.5], [-(2**-8), 6], [7, 8]], np.float32)


def lines(separator, head=""):
    rows = (separator.join([n, *map(repr, v.tolist())]) for n, v in zip(NAMES, VECTORS, strict=True))
    return "\n".join([*([head] if head else []), *rows, ""])


def write(folder, kind):
    """One of the files that hold VECTORS under NAMES."""
    if kind == "npz":
        np.savez(folder / "v.npz", names=np.array(NAMES), vectors=VECTORS)
        return folder / "v.npz"
    if kind == "npy":
        np.save(folder / "v.npy", VECTORS.astype(np.float64))
        (folder / "v.txt").write_text("\n".join(NAMES) + "\n")
        return folder / "v.npy"
    name, text = {
        "word2vec": ("v.txt", lines(" ", "4 2")),
        "gene2vec": ("v.vec", lines("\t").replace("\t", "\t", 1)),
        "blanks": (
            "v.txt",
            "".join(f"{n}\t{v[0]!r} {v[1]!r} \n" for n, v in zip(NAMES, VECTORS.tolist(), strict=True)),
        ),
        "tsv": ("v.tsv", lines("\t")),
        "tsv with a header": ("v.tsv", lines("\t", "gene\tfirst\tsecond")),
        "csv of pandas": ("v.csv", lines(",", ",0,1")),
        "csv of pandas, named": ("v.csv", lines(",", "gene,0,1")),
        "quoted csv": ("v.csv", lines(",").replace("SCYL3", '"SCYL3"')),
    }[kind]
    (folder / name).write_text(text)
    return folder / name


KINDS = ["npz", "npy", "word2vec", "gene2vec", "blanks", "tsv", "tsv with a header", "csv of pandas",
         "csv of pandas, named", "quoted csv"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_the_same_table(tmp_path, kind):
    given = read_vectors(write(tmp_path, kind))
    assert given.names == tuple(NAMES) and given.values.dtype == np.float32
    np.testing.assert_array_equal(given.values, VECTORS)
    matched = match_values(given, VOCABULARY)
    np.testing.assert_array_equal(matched.values, [[3, 4.5], [-(2**-8), 6], [0, 0], [1, 2]])
    assert matched.known.tolist() == [True, True, False, True]
    assert "3 of 4 genes (1 by id, 1 by symbol, 1 by alias); without: DPM1" in matched.summary


def test_rows_in_the_order_of_the_vocabulary(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS)
    matched = match_values(read_vectors(tmp_path / "v.npy"), VOCABULARY)
    assert matched.known.all()
    np.testing.assert_array_equal(matched.values, VECTORS)
    np.save(tmp_path / "v.npy", VECTORS[:3])
    with pytest.raises(ValueError, match=r"v.npy has 3 rows and no names.* 4 genes .*v.txt beside it"):
        match_values(read_vectors(tmp_path / "v.npy"), VOCABULARY)


def test_several_rows_of_a_gene(tmp_path):
    """Two old names of one gene: the first row is taken and it is said; a stronger name goes before both."""
    (tmp_path / "v.tsv").write_text("CHM1L\t1\nTEM\t2\nDPM1\t3\nDPM1\t3\n")
    matched = match_values(read_vectors(tmp_path / "v.tsv"), VOCABULARY)
    assert matched.values[:, 0].tolist() == [0, 1, 3, 0]
    assert "1 genes had several rows, the first is taken (ENSG00000000005: CHM1L, TEM)" in matched.summary
    (tmp_path / "v.tsv").write_text("CHM1L\t1\nTEM\t2\nTNMD\t3\n")
    assert match_values(read_vectors(tmp_path / "v.tsv"), VOCABULARY).values[1, 0] == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("v.tsv", "A\t1\t2\nB\t1\n", r"v.tsv, line 2 \(B\): 1 numbers, the lines before have 2"),
        ("v.txt", "2 2\nA 1 2\nB 1 2 3\n", r"v.txt, line 3 \(B\): 3 numbers"),
        ("v.csv", "gene,x\nA,1\nB,one\n", r"v.csv, line 3 \(B\): could not convert string to float: 'one'"),
        ("v.tsv", "A\t1\t2\nB\t1\tnan\n", r"the value of 'B' \(row 1\) in column 1 is NaN; 1 are not finite"),
        ("v.tsv", "A\t1\t-inf\nB\t1\t1\n", r"the value of 'A' \(row 0\) in column 1 is infinite"),
        ("v.tsv", "A\t1\nB\t2\nA\t3\n", r"'A' stands there twice with different values \(rows 0, 2\)"),
        ("v.tsv", "A\t1\n\t2\n", "row 1 has no name"),
        ("v.tsv", "", "holds no rows"),
        ("v.tsv", "A\nB\n", "holds no rows"),
        ("v.tsv", b"\xff\xfe\x00", "is not text"),
        ("v.npy", b"\x93NUMPY", "v.npy cannot be read"),
        ("v.npz", b"PK", "v.npz is no array of numpy"),
        ("v.xls", "A\t1\n", r"v.xls: vectors of genes are read from .npz \(arrays names and vectors\)"),
    ],
)
def test_bad_vectors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / name)


def test_bad_arrays(tmp_path):
    for arrays, message in (
        ({"vectors": VECTORS}, r"holds the arrays \['vectors'\]; names and vectors are needed"),
        ({"names": np.array(NAMES[:3]), "vectors": VECTORS}, "one text a row"),
        ({"names": np.arange(4), "vectors": VECTORS}, "one text a row"),
        ({"names": np.array(NAMES, object), "vectors": VECTORS}, "holds Python objects, which are not read"),
        ({"names": np.array(NAMES), "vectors": VECTORS[:, 0]}, "array of shape"),
        ({"names": np.array(NAMES), "vectors": np.array(NAMES)[:, None]}, "numbers are needed"),
    ):
        np.savez(tmp_path / "v.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_vectors(tmp_path / "v.npz")
    np.save(tmp_path / "v.npy", VECTORS)
    (tmp_path / "v.txt").write_text("A\nB\n")
    with pytest.raises(ValueError, match=r"v.txt has 2 names for the 4 rows of v.npy"):
        read_vectors(tmp_path / "v.npy")
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz: no such file"):
        read_vectors(tmp_path / "nowhere.npz")


def test_no_gene_in_common(tmp_path):
    (tmp_path / "v.tsv").write_text("Actb\t1\nGapdh\t2\n")
    with pytest.raises(ValueError, match=r"no gene in common.*it names Actb, Gapdh.*TSPAN6, TNMD"):
        match_values(read_vectors(tmp_path / "v.tsv"), VOCABULARY)


class TestMedians:
    @pytest.mark.parametrize("kind", ["json", "tsv", "csv"])
    def test_formats(self, tmp_path, kind):
        medians = {"ENSG00000000003": 2.0012, "SCYL3": 3.7923, "ELSEWHERE": 1}
        file = tmp_path / f"m.{kind}"
        separator = "\t" if kind == "tsv" else ","
        rows = "\n".join([f"gene{separator}median", *(f"{k}{separator}{v}" for k, v in medians.items())])
        file.write_text(json.dumps(medians) if kind == "json" else rows)
        given = read_medians(file)
        assert given.values.tolist() == list(medians.values())
        matched = match_values(given, VOCABULARY)
        assert matched.values.tolist() == [2.0012, 0, 0, 3.7923]
        assert matched.known.tolist() == [True, False, False, True]

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("m.json", "{", "is not JSON"),
            ("m.json", "[1]", "holds a list"),
            ("m.json", '{"A": "1"}', "the median of 'A' is '1', not a number"),
            ("m.json", '{"A": true}', "the median of 'A' is True, not a number"),
            ("m.json", '{"A": NaN}', r"the value of 'A' \(row 0\) in column 0 is NaN"),
            ("m.json", '{"A": 0}', "the median of 'A' is 0; a median of counts is positive"),
            ("m.json", "{}", "one median a gene"),
            ("m.tsv", "A\t1\t2\n", "one median a gene"),
            ("m.tsv", "A\t-1\n", "the median of 'A' is -1"),
            (
                "m.pkl",
                "",
                r"read from .json, .tsv or .csv; scjax.interop.read_dictionary reads a plain pickle",
            ),
        ],
    )
    def test_bad(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_medians(tmp_path / name)
