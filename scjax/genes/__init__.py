"""Genes: one vocabulary of stable ids for a corpus and every model trained on it; values from files."""

from scjax.genes.tables import GeneValues, MatchedValues, match_values, read_medians, read_vectors
from scjax.genes.vocabulary import GeneMatch, Vocabulary, strip_version

__all__ = [
    "GeneMatch",
    "GeneValues",
    "MatchedValues",
    "Vocabulary",
    "match_values",
    "read_medians",
    "read_vectors",
    "strip_version",
]
