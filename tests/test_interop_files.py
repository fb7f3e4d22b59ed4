"""Files of other people: what is in them is read, what they ask to be done is not."""

import collections
import json
import pickle
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from scjax.interop import files

POINTER = b"version git-lfs/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 788424\n"


class Bomb:
    """Unpickled by the standard library, it makes the file of which it holds the name."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def fuse(tmp_path):
    return tmp_path / "exploded"


class TestDictionary:
    CONTENT = {  # noqa: RUF012
        "<pad>": 0,
        "ENSG00000000003": np.int16(2),
        "median": np.float64(2.0012),
        "flag": np.bool_(True),
        "table": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.array([1.5, 2.5], ">f8"),
        "names": np.array(["A1BG", "TP53"]),
        "nested": [1, ("a", {"b"}), None, b"bytes", 2.5, collections.OrderedDict(z=1)],
    }

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_plain_pickles(self, tmp_path, protocol):
        file = tmp_path / "dictionary.pkl"
        file.write_bytes(pickle.dumps(self.CONTENT, protocol))
        found = files.read_dictionary(file)
        assert list(found) == list(self.CONTENT)
        for name, expected in self.CONTENT.items():
            if isinstance(expected, np.ndarray):
                assert found[name].dtype == expected.dtype
                np.testing.assert_array_equal(found[name], expected)
            else:
                assert found[name] == expected
        assert type(found["median"]) is float and type(found["ENSG00000000003"]) is int

    def test_both_homes_of_numpy(self, tmp_path):
        """numpy 2 moved its core; pickles of either name are read by either."""
        content = pickle.dumps({"a": np.float64(0.5), "b": np.arange(3)}, 2)
        assert b"numpy._core.multiarray" in content
        (tmp_path / "new.pkl").write_bytes(content)
        (tmp_path / "old.pkl").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
        new, old = (files.read_dictionary(tmp_path / f"{name}.pkl") for name in ("new", "old"))
        assert new["a"] == old["a"] == 0.5 and new["b"].tolist() == old["b"].tolist() == [0, 1, 2]

    def test_json(self, tmp_path):
        for name in ("a.json", "b.txt"):
            (tmp_path / name).write_text(json.dumps({"A1BG": 0, "TP53": 1}))
            assert files.read_dictionary(tmp_path / name) == {"A1BG": 0, "TP53": 1}

    @pytest.mark.parametrize("protocol", [0, 2, 5])
    def test_a_malicious_pickle_is_refused_and_not_run(self, tmp_path, fuse, protocol):
        file = tmp_path / "bomb.pkl"
        file.write_bytes(pickle.dumps({"A1BG": Bomb(fuse)}, protocol))
        with pytest.raises(ValueError, match=r"bomb.pkl is refused.*(io|builtin__|builtins)\.open"):
            files.read_dictionary(file)
        assert not fuse.exists()
        pickle.loads(file.read_bytes())["A1BG"].close()
        assert fuse.exists()  # it was one

    @pytest.mark.parametrize(
        "opcodes, told",
        [
            # attributes of a function that is allowed; a slot of a class that is allowed
            (b"c_codecs\nencode\n}(X\x01\x00\x00\x00aX\x01\x00\x00\x00xub.", "attributes of a function"),
            (b"cnumpy\ndtype\n(N}(X\x08\x00\x00\x00__init__K\x01utb.", "attributes of a type"),
            (b"cnumpy\nndarray\n(K\x01tR.", "a call of numpy.ndarray"),
            (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tR.", "the numpy type 'O8'"),
            (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00bz2tR.", "the encoding 'bz2'"),
            (b"cnumpy.core.multiarray\n_reconstruct\n(tR.", "an array without content"),
            (b"cnumpy.core.multiarray\nscalar\n(K\x01C\x01atR.", "an array of Python objects"),
            (b"\x80\x02cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.", "builtins.eval"),
            (b"cos\nsystem\n(X\x04\x00\x00\x00truetR.", "os.system"),
            (b"Pelsewhere\n.", "outside of the file"),
        ],
    )
    def test_crooked_instructions(self, tmp_path, opcodes, told):
        (tmp_path / "crooked.pkl").write_bytes(opcodes)
        with pytest.raises(ValueError, match="is refused") as error:
            files.read_dictionary(tmp_path / "crooked.pkl")
        assert told in str(error.value)

    def test_python_objects_in_an_array(self, tmp_path):
        (tmp_path / "objects.pkl").write_bytes(pickle.dumps({"a": np.array([{}, 1], object)}))
        with pytest.raises(ValueError, match="the numpy type 'O8'"):
            files.read_dictionary(tmp_path / "objects.pkl")

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "neither JSON nor a pickle"),
            (b"gene\tmedian\n", "neither JSON nor a pickle"),
            (b"{'a': 1}", "neither JSON nor a pickle"),
            (pickle.dumps({"a": list(range(100))})[:-20], "neither JSON nor a pickle"),
            (pickle.dumps([1, 2]), "holds a list; a dictionary is needed"),
            (b"[1, 2]", "holds a list; a dictionary is needed"),
            (POINTER, "pointer of git-lfs"),
        ],
    )
    def test_other_files(self, tmp_path, content, message):
        (tmp_path / "file.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            files.read_dictionary(tmp_path / "file.pkl")
        with pytest.raises(FileNotFoundError, match=r"nowhere.pkl: no such file; there are file.pkl"):
            files.read_dictionary(tmp_path / "nowhere.pkl")


class TestSafetensors:
    def test_types(self, tmp_path):
        import ml_dtypes

        given = {
            "half": np.array([1.5, -2], np.float16),
            "brain": np.array([1.5, -2], ml_dtypes.bfloat16),
            "single": np.array([[1.5]], np.float32),
            "double": np.array([0.1]),
            "whole": np.array([2**40]),
        }
        save_file(given, tmp_path / "model.safetensors")
        found = files.read_tensors(tmp_path / "model.safetensors")
        assert {k: v.dtype.name for k, v in found.items()} == {
            "half": "float32",
            "brain": "float32",
            "single": "float32",
            "double": "float64",
            "whole": "int64",
        }
        for name, value in given.items():
            np.testing.assert_array_equal(found[name], value)

    def test_other_files(self, tmp_path):
        for content, message in ((b"abc", "damaged, truncated or not"), (POINTER, "pointer of git-lfs")):
            (tmp_path / "model.safetensors").write_bytes(content)
            with pytest.raises(ValueError, match=message):
                files.read_tensors(tmp_path / "model.safetensors")
        (tmp_path / "model.h5").write_bytes(b"abc")
        with pytest.raises(ValueError, match=r"model.h5: tensors are read from .safetensors, .pt"):
            files.read_tensors(tmp_path / "model.h5")

    @pytest.mark.parametrize(
        "name, package, told",
        [("m.safetensors", "safetensors", r"scjax\[interop\]"), ("m.pt", "torch", "pip install torch")],
    )
    def test_a_missing_package_is_named(self, tmp_path, monkeypatch, name, package, told):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        (tmp_path / name).write_bytes(b"abc")
        with pytest.raises(ImportError, match=f"reading {name} needs .*{told}"):
            files.read_tensors(tmp_path / name)


@pytest.mark.parity
class TestTorch:
    def test_nested_and_types(self, tmp_path):
        import torch

        content = {
            "state": {"a.weight": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2).bfloat16()},
            "pos": torch.tensor([0.1], dtype=torch.float64),
            "half": torch.ones(2).half(),
            "calls": torch.tensor(3),
            "config": {"d_model": 16, "names": ("a", "b"), "rate": 0.1},
            "epoch": 7,
        }
        for suffix in files.TORCH:
            torch.save(content, tmp_path / f"model{suffix}")
            found = files.read_tensors(tmp_path / f"model{suffix}")
            assert found["epoch"] == 7
            assert found["config"] == {"d_model": 16, "names": ["a", "b"], "rate": 0.1}
            state = found["state"]
            np.testing.assert_array_equal(state["a.weight"], np.arange(6).reshape(2, 3).T)
            assert state["b"].dtype == found["half"].dtype == np.float32
            assert found["pos"].dtype == np.float64 and found["pos"][0] == 0.1
            assert found["calls"] == 3

    def test_a_malicious_checkpoint_is_refused_and_not_run(self, tmp_path, fuse):
        import torch

        for name, legacy in (("zip.pt", False), ("legacy.ckpt", True)):
            torch.save(
                {"w": torch.ones(2), "x": Bomb(fuse)},
                tmp_path / name,
                _use_new_zipfile_serialization=not legacy,
            )
            with pytest.raises(ValueError, match=f"{name} is refused") as error:
                files.read_tensors(tmp_path / name)
            assert "weights_only" not in str(error.value)  # no advice to run it all the same
            assert not fuse.exists()
            torch.load(tmp_path / name, weights_only=False)["x"].close()
            assert fuse.exists()
            fuse.unlink()

    def test_other_files(self, tmp_path):
        import torch

        torch.save([torch.ones(2)], tmp_path / "list.pt")
        with pytest.raises(ValueError, match="list.pt holds a list"):
            files.read_tensors(tmp_path / "list.pt")
        whole = (tmp_path / "list.pt").read_bytes()
        for content in (b"", b"abc", whole[: len(whole) // 2], POINTER):
            (tmp_path / "bad.pt").write_bytes(content)
            with pytest.raises(ValueError, match=r"bad.pt"):
                files.read_tensors(tmp_path / "bad.pt")
