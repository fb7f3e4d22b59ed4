"""The corpus: raw counts of many studies on disk, once, for every model. No JAX here."""

from scjax.corpus.append import append_corpus
from scjax.corpus.build import build_corpus
from scjax.corpus.corpus import Corpus, Part
from scjax.corpus.counts import CountsError, validate_counts
from scjax.corpus.hashes import write_hashes
from scjax.corpus.joining import join_modalities
from scjax.corpus.mixture import Mixture, open_corpus
from scjax.corpus.remote import Patience
from scjax.corpus.sources import Source, list_sources, open_source
from scjax.corpus.store import CorruptDataError, StoreError
from scjax.corpus.variable import variable_genes

__all__ = [
    "Corpus",
    "CorruptDataError",
    "CountsError",
    "Mixture",
    "Part",
    "Patience",
    "Source",
    "StoreError",
    "append_corpus",
    "build_corpus",
    "join_modalities",
    "list_sources",
    "open_corpus",
    "open_source",
    "validate_counts",
    "variable_genes",
    "write_hashes",
]
