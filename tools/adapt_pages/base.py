"""The small scGPT that the pages of benchmarks/adapt begin with: one corpus, one vocabulary, one run.

    python tools/adapt_pages/base.py

Human whole-transcriptome cells of eight studies, no label used. Left out, so that pages can hold them out:
all Kang, CITE-seq, perturbation and spatial sets. The vocabulary is the variable genes of these cells and
those of the two perturbation panels, which pages fine-tune on, with the genes that are perturbed there.
"""

from __future__ import annotations

import subprocess
import sys

from common import BASE, ROOT, arguments, read

STUDIES = (
    "pbmc3k_10xv1",
    "pbmc4k_10xv2",
    "pbmc_facs_10xv1",
    "pbmc_frozen_donorA_10xv1",
    "breast_cancer_31lines_dropseq",
    "lung_tumour_dc_913",
    "lymph_node_ref_330",
    "tumour_copykat_302",
)
PANELS = ("perturb_norman_mcfaline_500g", "gbm_panobinostat_300g")
N_VARIABLE = 2000


def main() -> None:
    args = arguments(__doc__, steps=800)
    from scjax import Corpus, build_corpus
    from scjax.corpus import variable_genes
    from scjax.genes import Vocabulary

    where = BASE.parent / "corpus"
    if not (where / "HEAD").exists():
        sources = [args.data / f"{name}.h5ad" for name in STUDIES]
        build_corpus(sources, where, labels=["tissue", "technology", "cell_type"], validation=0.05)
    corpus = Corpus.open(where)
    chosen = variable_genes(corpus, N_VARIABLE)
    wanted = set(chosen.ids)
    for panel in PANELS:
        cells = read(args.data, panel)
        targets = {gene for name in cells.obs["perturbation"].unique() for gene in name.split("+")}
        ids = [*corpus.vocabulary.match(cells.var).ids, *corpus.vocabulary.match(sorted(targets)).ids]
        wanted |= {corpus.vocabulary.ids[i] for i in ids if i >= 0}
    whole = corpus.vocabulary.to_dict()
    keep = [i for i, name in enumerate(corpus.vocabulary.ids) if name in wanted]
    genes = BASE.parent / "genes.tsv"
    Vocabulary.from_dict({field: [values[i] for i in keep] for field, values in whole.items()}).to_tsv(genes)
    overrides = {
        "data.corpus": where,
        "data.genes": genes,
        "model.max_length": 193,
        "train.steps": args.steps,
        "validation.probe_label": "tissue",
    }
    command = [
        sys.executable,
        "experiments/pretrain.py",
        "--config=configs/quickstart.py",
        f"--workdir={BASE}",
    ]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    subprocess.run(command, check=True, cwd=ROOT)
    (BASE / "done").touch()


if __name__ == "__main__":
    main()
