"""Published checkpoints in and out: other people's formats, read without running anything in them."""

from scjax.interop.files import read_dictionary, read_tensors
from scjax.interop.source import Source

__all__ = ["Source", "read_dictionary", "read_tensors"]
