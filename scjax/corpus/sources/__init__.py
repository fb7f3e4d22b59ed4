"""Where counts come from: every layout that people keep single-cell counts in, read alike in runs of rows."""

from scjax.corpus.sources.base import Source, look_at
from scjax.corpus.sources.listing import default_name, files_of, list_sources, open_source

__all__ = ["Source", "default_name", "files_of", "list_sources", "look_at", "open_source"]
