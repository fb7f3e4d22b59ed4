"""Writes constraints.txt from ``pip freeze`` of Python 3.11 and 3.12, each with the extras dev and parity.

python3.11 -m pip freeze --exclude-editable > a.txt
python3.12 -m pip freeze --exclude-editable > b.txt
python tools/pin.py a.txt b.txt > constraints.txt
"""

import re
import sys
from pathlib import Path

HEADER = """\
# A set of versions that passes the tests: pip install -c constraints.txt .
# Made by tools/pin.py; the older column is for Python 3.11, which JAX 0.11 and AnnData 0.13 left."""


# what PyTorch brings for a GPU depends on the machine, and it asks for exact versions itself
OF_A_GPU = ("nvidia-", "cuda-", "triton")


def read(path: str) -> dict[str, str]:
    """Name -> version, without the build that a version may name (2.13.0+cpu)."""
    pins = (
        re.match(r"([A-Za-z0-9._-]+)==([^\s;+]+)(\+\S+)?$", line)
        for line in Path(path).read_text().splitlines()
    )
    names = {m[1].lower().replace("_", "-"): m[2] for m in pins if m}
    return {name: version for name, version in names.items() if not name.startswith(OF_A_GPU)}


def main(old: str, new: str) -> None:
    a, b = read(old), read(new)
    print(HEADER)
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) == b.get(name):
            print(f"{name}=={a[name]}")
            continue
        if name in a:
            print(f'{name}=={a[name]}; python_version < "3.12"')
        if name in b:
            print(f'{name}=={b[name]}; python_version >= "3.12"')


if __name__ == "__main__":
    main(*sys.argv[1:])
