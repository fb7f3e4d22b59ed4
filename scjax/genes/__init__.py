"""Genes: one vocabulary of stable ids for a corpus and every model trained on it; values and vectors.

Vectors come from files, from graphs (``graph``; ``autoencoder``, which needs JAX) and from texts (``text``;
``sentences``, which needs JAX).
"""

from scjax.genes.graph import GeneGraph, coexpression, graph_of, read_graph, shuffled, spectral
from scjax.genes.orthologs import (
    Orthologs,
    assign_orthologs,
    match_with_orthologs,
    union_with_orthologs,
)
from scjax.genes.tables import (
    GeneValues,
    MatchedValues,
    match_values,
    read_medians,
    read_vectors,
    write_vectors,
)
from scjax.genes.text import lsa, read_descriptions
from scjax.genes.vocabulary import GeneMatch, Vocabulary, strip_version

__all__ = [
    "GeneGraph",
    "GeneMatch",
    "GeneValues",
    "MatchedValues",
    "Orthologs",
    "Vocabulary",
    "assign_orthologs",
    "coexpression",
    "graph_of",
    "lsa",
    "match_values",
    "match_with_orthologs",
    "read_descriptions",
    "read_graph",
    "read_medians",
    "read_vectors",
    "shuffled",
    "spectral",
    "strip_version",
    "union_with_orthologs",
    "write_vectors",
]
