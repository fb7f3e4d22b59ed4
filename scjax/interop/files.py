"""Reading the files that published checkpoints come in. Nothing in a file is ever executed.

Tensors come through safetensors, or through PyTorch's own loader restricted to tensors and plain
containers. Dictionaries that were pickled are read by an unpickler for which every name a pickle may call
stands for a small function of this file; the classes and functions that a pickle names are never looked up.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import io
import json
import pathlib
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".ckpt", ".bin")


_opened: contextvars.ContextVar[list[pathlib.Path] | None] = contextvars.ContextVar("opened", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[pathlib.Path]]:
    """The files that are opened through this module in the meantime, in order."""
    opened: list[pathlib.Path] = []
    token = _opened.set(opened)
    try:
        yield opened
    finally:
        _opened.reset(token)


def sha256(path: str | pathlib.Path) -> str:
    """Of the content of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing(path: str | pathlib.Path) -> pathlib.Path:
    """The path of a file that is there and holds what its name says.

    Raises:
      FileNotFoundError: it is not there; names the files beside it.
      ValueError: it is the pointer that git leaves where a large file was not fetched.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        beside = sorted(p.name for p in path.parent.iterdir())[:12] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: {what}" + (f"; there are {', '.join(beside)}" if beside else ""))
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(b"version ") and b"git-lfs" in head:
        raise ValueError(
            f"{path} is a pointer of git-lfs, not the file itself ({path.stat().st_size} bytes): fetch the "
            "content with `git lfs pull` where the repository was cloned, or download the file by itself"
        )
    opened = _opened.get()
    if opened is not None and path not in opened:
        opened.append(path)
    return path


def read_json(path: str | pathlib.Path) -> Any:
    """Content of a JSON file; ValueError if it is not one."""
    path = existing(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


# ---------------------------------------------------------------------- tensors
def read_tensors(path: str | pathlib.Path) -> dict[str, Any]:
    """The tensors of a checkpoint file.

    Args:
      path: .safetensors, or a .pt, .pth, .ckpt or .bin of PyTorch.

    Returns:
      Name to numpy array, nested as the file is; numbers, strings and lists that stand between the
      tensors are kept. bfloat16 and float16 become float32; all else keeps its type.

    Raises:
      FileNotFoundError, ImportError: no such file, no package to read it (names the one to install).
      ValueError: another kind of file, a damaged one, or one that holds more than tensors and plain
        containers, which is refused and not run.
    """
    path = existing(path)
    if path.suffix in SAFETENSORS:
        return _read_safetensors(path)
    if path.suffix in TORCH:
        return _read_torch(path)
    raise ValueError(f"{path}: tensors are read from {', '.join((*SAFETENSORS, *TORCH))}")


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
    try:
        import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs safetensors: pip install 'scjax[interop]' ({error})"
        ) from error
    try:
        with safe_open(path, framework="np") as file:
            return {name: _widened(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, truncated or not a safetensors file ({error})") from error


def _read_torch(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs PyTorch: pip install torch. It is not an extra of scjax, whose "
            f"[interop] reads .safetensors alone ({error})"
        ) from error
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # of PyTorch's advice, which ends in how to run the file all the same, the part that names the culprit
        culprit = re.search(r"(Unsupported|WeightsUnpickler error)[^\n]*", str(error))
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain containers, and what "
            f"else a checkpoint holds would be run by loading it ({culprit[0] if culprit else 'unpickling'})"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, truncated or not a file of PyTorch ({error})") from error

    def plain(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            x = x.detach().cpu()
            if x.layout is not torch.strided or x.is_quantized:
                raise ValueError(f"{path} holds a sparse or quantised tensor; only dense ones are read")
            return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return [plain(value) for value in x] if isinstance(x, (list, tuple)) else x

    content = plain(content)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a dictionary of tensors is needed")
    return content


def _widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype.name in ("bfloat16", "float16") else x


# ----------------------------------------------------------------- dictionaries
def read_dictionary(path: str | pathlib.Path) -> dict[Any, Any]:
    """A dictionary that somebody saved as JSON or as a pickle: gene to token, gene to median, ...

    Args:
      path: a JSON file (``.json``, or anything that begins like one), else a pickle.

    Returns:
      The dictionary; numpy scalars are Python numbers.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a pointer of git-lfs, something else than a dictionary, or a pickle that asks for more
        than plain containers and numpy's scalars and arrays; it is refused and nothing of it is run.
    """
    path = existing(path)
    content = path.read_bytes()
    try:
        if path.suffix == ".json" or content.lstrip()[:1] in (b"{", b"["):
            value = json.loads(content)
        else:
            value = _finished(_Unpickler(content).load())
    except Refused as error:
        raise ValueError(
            f"{path} is refused: the pickle asks for {error}, and only plain containers, numbers, text and "
            "numpy's scalars and arrays are read; nothing of it was run. Save the dictionary as JSON"
        ) from None
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: neither JSON nor a pickle of plain containers ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; a dictionary is needed")
    return value


class Refused(Exception):
    """What a pickle asked for and does not get."""


# what the standard library's unpickler raises on bytes that are no pickle
UNREADABLE = (
    pickle.UnpicklingError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,
    OverflowError,
    RecursionError,
    ImportError,
)


class _DType:
    """Stands for ``numpy.dtype`` in a pickle: numbers, truth values and text, never objects."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        if not isinstance(code, str) or not re.fullmatch(r"[biufSU]\d{1,4}", code):
            raise Refused(f"the numpy type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "=")):
            raise Refused("a numpy type of an unknown make")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for an array that numpy would rebuild and then give its content."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
        raise Refused("an array of Python objects")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return _from_bytes(data, dtype, (), "C").item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as pickles of before protocol 3 hold them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"the encoding {encoding!r}")
    return text.encode("latin1")


class _NDArray:
    """Stands for the class ``numpy.ndarray``, which a pickle names but does not call."""

    def __init__(self, *_: Any):
        raise Refused("a call of numpy.ndarray")


ALLOWED: dict[str, Callable[..., Any]] = {
    "builtins.set": set,
    "__builtin__.set": set,  # of Python 2, and of protocols before 3
    "builtins.frozenset": frozenset,
    "__builtin__.frozenset": frozenset,
    "collections.OrderedDict": dict,
    "_codecs.encode": _encode,
    "numpy.dtype": _DType,
    "numpy.ndarray": _NDArray,
}
for _core in ("numpy.core", "numpy._core"):  # the second since numpy 2
    ALLOWED[f"{_core}.multiarray.scalar"] = _scalar
    ALLOWED[f"{_core}.multiarray._reconstruct"] = lambda *_: _Array()
    ALLOWED[f"{_core}.numeric._frombuffer"] = lambda data, dtype, shape, order, *_: _from_bytes(
        data, dtype, shape, order
    )


_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    """The unpickler that is written in Python, whose every instruction can be replaced: BUILD, which sets
    attributes of any object, is left to the two classes above."""

    dispatch = dict(_Python.dispatch)

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) not in (_DType, _Array):
            raise Refused(f"attributes of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("an object kept outside of the file")


def _finished(value: Any) -> Any:
    """With the arrays in place of what stands for them."""
    if isinstance(value, _Array):
        if value.array is None:
            raise Refused("an array without content")
        return value.array
    if isinstance(value, dict):
        return {key: _finished(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_finished(item) for item in value)
    if isinstance(value, (str, bytes, int, float, complex, bool, type(None), np.ndarray)):
        return value
    raise Refused(f"a {type(value).__name__}")
