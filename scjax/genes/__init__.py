"""Genes: one vocabulary of stable ids for a corpus and every model trained on it; values from files."""

from scjax.genes.orthologs import (
    Orthologs,
    assign_orthologs,
    match_with_orthologs,
    union_with_orthologs,
)
from scjax.genes.tables import GeneValues, MatchedValues, match_values, read_medians, read_vectors
from scjax.genes.vocabulary import GeneMatch, Vocabulary, strip_version

__all__ = [
    "GeneMatch",
    "GeneValues",
    "MatchedValues",
    "Orthologs",
    "Vocabulary",
    "assign_orthologs",
    "match_values",
    "match_with_orthologs",
    "read_medians",
    "read_vectors",
    "strip_version",
    "union_with_orthologs",
]
