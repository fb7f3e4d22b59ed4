"""Genes: one vocabulary of stable ids for a corpus and every model trained on it."""

from scjax.genes.vocabulary import GeneMatch, Vocabulary, strip_version

__all__ = ["GeneMatch", "Vocabulary", "strip_version"]
