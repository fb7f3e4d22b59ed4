"""Published checkpoints in and out: other people's formats, read without running anything in them."""

from scjax.interop.files import read_dictionary, read_tensors
from scjax.interop.pretrained import Imported, export_pretrained, import_pretrained, is_plain, read_plain
from scjax.interop.source import Source

__all__ = [
    "Imported",
    "Source",
    "export_pretrained",
    "import_pretrained",
    "is_plain",
    "read_dictionary",
    "read_plain",
    "read_tensors",
]
