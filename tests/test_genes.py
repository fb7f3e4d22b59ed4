"""The vocabulary: matching, identity, files, unions."""

import anndata as ad
import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from synthetic import synthetic_adata

from scjax.genes import Vocabulary, strip_version

TP53, MYC, GAPDH = "ENSG00000141510", "ENSG00000136997", "ENSG00000111640"
names = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-. "), min_size=1)


def small() -> Vocabulary:
    return Vocabulary(
        [TP53, MYC, GAPDH, "ERCC-00002"],
        symbol=["TP53", "MYC", "GAPDH", "ERCC-00002"],
        aliases=[["P53", "LFS1"], ["c-Myc"], [], []],
    )


def test_fields_default_to_what_the_id_tells():
    vocabulary = small()
    assert vocabulary.species == ("human", "human", "human", "")
    assert vocabulary.ids[0] == TP53 and vocabulary.symbols[1] == "MYC" and len(vocabulary) == 4
    assert Vocabulary([f"{TP53}.18"]).ids == [TP53]


def test_strip_version():
    assert strip_version("ENSMUSG00000059552.14") == "ENSMUSG00000059552"
    assert strip_version("ENSG00000182378.15_PAR_Y") == "ENSG00000182378_PAR_Y"
    assert strip_version("RP11-34P13.7") == "RP11-34P13.7"  # a clone name, not a version


def test_ids_by_any_name():
    vocabulary = small()
    assert [vocabulary.id_of(n) for n in (TP53, f"{TP53}.3", "TP53", "P53", "c-Myc")] == [0, 0, 0, 0, 1]
    assert "LFS1" in vocabulary and "Tp53" not in vocabulary
    with pytest.raises(KeyError, match=r"'Tp53' is not in the vocabulary of 4 genes; nearest: TP53"):
        vocabulary.id_of("Tp53")


def test_match_prefers_ids_then_symbols_then_aliases():
    var = pd.DataFrame({"gene_ids": [f"{MYC}.9", "", "", ""]}, index=["odd name", "TP53", "GAPD", "LFS1"])
    vocabulary = Vocabulary([TP53, MYC, GAPDH], symbol=["TP53", "MYC", "GAPDH"], aliases=[[], [], ["GAPD"]])
    match = vocabulary.match(var)
    assert match.ids.tolist() == [1, 0, 2, -1] and match.ids.dtype == np.int32
    assert match.matched_by == {"id": 1, "symbol": 1, "alias": 1}
    assert match.n_matched == 3 and match.unmatched == ["LFS1"] and not match.duplicates
    assert match.summary() == "3 of 4 genes matched (1 by id, 1 by symbol, 1 by alias); not matched: LFS1"


@pytest.mark.parametrize("column", ["ensembl_id", "gene_ids", "feature_id", "gene_id", "Ensembl_ID"])
def test_match_finds_the_id_column(column):
    var = pd.DataFrame({column: [GAPDH, TP53]}, index=["a", "b"])
    assert small().match(var).ids.tolist() == [2, 0]


def test_match_reads_names_and_plain_lists():
    assert small().match(pd.DataFrame(index=[MYC, "TP53"])).ids.tolist() == [1, 0]
    assert small().match([MYC, "nothing", "TP53"]).ids.tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="single string 'TP53'"):
        small().match("TP53")


def test_match_keeps_case_and_ignores_missing_names():
    var = pd.DataFrame({"ensembl_id": [np.nan, None, ""]}, index=["Trp53", "myc", "GAPDH"])
    assert small().match(var).ids.tolist() == [-1, -1, 2]


def test_an_ambiguous_symbol_or_alias_matches_nothing():
    vocabulary = Vocabulary(
        ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"],
        symbol=["TWIN", "TWIN", "SOLO"],
        aliases=[["A"], ["A", "SOLO"], ["B"]],
    )
    assert vocabulary.match(["TWIN", "A", "SOLO", "B"]).ids.tolist() == [-1, -1, 2, -1]  # B: 2 is taken
    assert vocabulary.match(["B"]).ids.tolist() == [2]


def test_the_stronger_claim_wins_and_equal_claims_are_reported():
    var = pd.DataFrame({"gene_symbol": ["TP53", "TP53"], "ensembl_id": ["", TP53]}, index=["x", "y"])
    match = small().match(var)
    assert match.ids.tolist() == [-1, 0] and not match.duplicates
    match = small().match(pd.DataFrame({"ensembl_id": [TP53, MYC, f"{TP53}.2"]}, index=["x", "y", "z"]))
    assert match.ids.tolist() == [0, 1, 0] and match.duplicates == {TP53: ["x", "z"]}
    assert "1 genes matched by several columns" in match.summary()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gene_id": [TP53, MYC, f"{TP53}.1"]}, f"1 gene ids occur more than once: {TP53}"),
        ({"gene_id": ["a", ""]}, "position 1 is empty"),
        ({"gene_id": ["a", "b"], "symbol": ["A"]}, "2 gene ids but 1 values of symbol"),
        ({"gene_id": ["a\tb"]}, "holds a tab"),
        ({"gene_id": ["a"], "symbol": ["x\ny"]}, "a line break"),
        ({"gene_id": ["a"], "aliases": [["x|y"]]}, "an alias with '|'"),
        ({"gene_id": ["a"], "aliases": ["xy"]}, "not one string"),
    ],
)
def test_bad_vocabularies_are_refused(fields, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Vocabulary(**fields)


def test_hash_tells_content_and_survives_files(tmp_path):
    vocabulary = small()
    vocabulary.to_tsv(tmp_path / "v.tsv")
    again = Vocabulary.from_tsv(tmp_path / "v.tsv")
    assert again == vocabulary and again.hash == vocabulary.hash and again.aliases == vocabulary.aliases
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    # stable across versions: corpora and checkpoints name vocabularies by it
    assert vocabulary.short_hash == "a7eed87dbd61"
    changed = Vocabulary(vocabulary.ids, symbol=["TP53", "MYC", "GAPDH", "spike"])
    assert changed.hash != vocabulary.hash and changed != vocabulary


@hypothesis.given(st.lists(names, min_size=1, unique=True), st.data())
@hypothesis.settings(deadline=None, max_examples=50)
def test_any_vocabulary_survives_files_and_finds_its_own_genes(tmp_path_factory, ids, data):
    aliases = data.draw(st.lists(st.lists(names, max_size=2), min_size=len(ids), max_size=len(ids)))
    vocabulary = Vocabulary(ids, aliases=aliases)
    path = tmp_path_factory.mktemp("genes") / "v.tsv"
    vocabulary.to_tsv(path)
    assert Vocabulary.from_tsv(path) == vocabulary == Vocabulary.from_dict(vocabulary.to_dict())
    stripped = [name for name in ids if name == name.strip()]
    assert vocabulary.match(stripped).ids.tolist() == [vocabulary.id_of(name) for name in stripped]


def test_bad_tables_name_the_line(tmp_path):
    path = tmp_path / "v.tsv"
    path.write_text("symbol\tspecies\nTP53\thuman\n")
    with pytest.raises(
        ValueError, match=r"v.tsv: no column gene_id in the header \(columns: symbol, species\)"
    ):
        Vocabulary.from_tsv(path)
    path.write_text("gene_id\tsymbol\na\tA\nb\n")
    with pytest.raises(ValueError, match="v.tsv, line 3: 1 fields, the header has 2"):
        Vocabulary.from_tsv(path)


def study(**symbol_to_id: str) -> pd.DataFrame:
    return pd.DataFrame({"ensembl_id": list(symbol_to_id.values())}, index=list(symbol_to_id))


def test_union_joins_a_bare_symbol_to_its_one_gene():
    first, second = study(TP53=TP53, OLD=""), study(TP53="", MYC=MYC)
    vocabulary = Vocabulary.from_anndata([first, second])
    assert vocabulary.ids == sorted([TP53, MYC, "OLD"])
    for var in (first, second):
        match = vocabulary.match(var)
        assert match.n_matched == 2 and not match.duplicates


def test_union_keeps_genes_apart_that_one_study_has_apart():
    both = pd.DataFrame({"ensembl_id": [TP53, ""], "gene_symbol": ["TP53", "TP53"]}, index=["TP53", "TP53-1"])
    vocabulary = Vocabulary.from_anndata([both])
    assert vocabulary.ids == [TP53, "TP53"]
    assert vocabulary.match(both).ids.tolist() == [0, 1]
    ambiguous = [study(DUP="ENSG00000000001"), study(DUP="ENSG00000000002"), study(DUP="")]
    assert len(Vocabulary.from_anndata(ambiguous)) == 3


def test_union_does_not_join_across_species():
    mouse = pd.DataFrame(
        {"ensembl_id": ["ENSMUSG00000059552", "ENSMUSG00000022346", ""]}, index=["Trp53", "Myc", "GAPDH"]
    )
    vocabulary = Vocabulary.from_anndata([study(GAPDH=GAPDH), mouse])
    assert vocabulary.ids == ["ENSG00000111640", "ENSMUSG00000022346", "ENSMUSG00000059552", "GAPDH"]
    assert vocabulary.species == ("human", "mouse", "mouse", "mouse")


def test_union_names_a_gene_as_most_studies_do():
    vocabulary = Vocabulary.from_anndata([study(KIAA1=TP53), study(TP53=TP53), study(TP53=f"{TP53}.4")])
    assert vocabulary.symbols == ["TP53"] and vocabulary.aliases == (("KIAA1",),)
    assert vocabulary.match(["KIAA1"]).ids.tolist() == [0]


@hypothesis.given(
    st.lists(st.lists(st.tuples(st.sampled_from("ABCDEF"), st.integers(0, 4)), min_size=1), min_size=1),
    st.randoms(),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_union_is_independent_of_order_and_every_study_matches_whole(studies, random):
    frames = [
        pd.DataFrame(
            {"ensembl_id": [f"ENSG0000000000{i}" if i else "" for _, i in genes]}, index=[s for s, _ in genes]
        )
        for genes in studies
    ]
    vocabulary = Vocabulary.from_anndata(frames)
    shuffled = random.sample(frames, len(frames))
    assert Vocabulary.from_anndata(shuffled) == vocabulary
    for frame in frames:
        match = vocabulary.match(frame)
        assert match.n_matched == len(frame)
        # columns that were one gene in the study itself, and only those, share a vocabulary gene
        keys = [row.ensembl_id or name for name, row in frame.iterrows()]
        assert len(set(match.ids.tolist())) == len(set(keys))


def test_union_takes_anndata_frames_and_lists():
    adata = synthetic_adata(20, n_genes=10)
    assert isinstance(adata, ad.AnnData)
    vocabulary = Vocabulary.from_anndata([adata, adata.var, ["EXTRA"]])
    assert len(vocabulary) == 11 and vocabulary.match(adata.var).n_matched == 10
