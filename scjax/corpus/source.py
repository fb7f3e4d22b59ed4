"""Moved to ``scjax.corpus.sources``."""

from scjax.corpus.sources import Source, default_name, open_source

__all__ = ["Source", "default_name", "open_source"]
