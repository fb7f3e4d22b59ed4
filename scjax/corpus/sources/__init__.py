"""Where counts come from: every layout that people keep single-cell counts in, read alike in runs of rows."""

from scjax.corpus.sources.base import Source
from scjax.corpus.sources.listing import default_name, list_sources, open_source

__all__ = ["Source", "default_name", "list_sources", "open_source"]
