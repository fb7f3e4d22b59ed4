"""The scanpy-like face: load a run, embed and annotate AnnData in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scjax.genes import Vocabulary

if TYPE_CHECKING:
    import anndata
    from rich.table import Table

    from scjax.genes import GeneMatch
    from scjax.nn import Abstract
    from scjax.types import CellBatch

MIN_MATCHED = 0.05  # share of genes, of the data or the model, below which an embedding means little


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model in the hand: what :func:`load` returns.

    Attributes:
      system: "scgpt", ...
      config: the model's hyper-parameters.
      vocabulary: genes by id.
      params, buffers: nested dicts of arrays.
      step: training step of the parameters; 0 for an untrained twin.
      path: the run directory.
      categories: label column -> names of its codes, of the labels that the run was trained with.
    """

    system: str
    config: dict[str, Any]
    vocabulary: Vocabulary
    params: dict[str, Any]
    buffers: dict[str, Any]
    step: int
    path: Path
    categories: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def abstract(self) -> Abstract:
        from scjax import models

        return models.build(self.system, self.config, len(self.vocabulary))

    @functools.cached_property
    def module(self) -> Any:
        """The live ``nnx.Module``: ``model.module.gene.embedding[...]`` and so on."""
        from scjax.nn import bind

        module = bind(self.abstract, self.params, self.buffers)
        module.eval()
        return module

    def match(self, adata: anndata.AnnData, layer: str | None = None) -> GeneMatch:
        """Which columns of the counts of ``adata`` are which genes of the model."""
        return self.vocabulary.match(adata.raw.var if layer == "raw" and adata.raw is not None else adata.var)

    @property
    def n_parameters(self) -> int:
        import jax

        return sum(int(leaf.size) for leaf in jax.tree.leaves(self.params))

    @functools.cached_property
    def _embed(self) -> Any:
        import jax

        from scjax.nn import bind

        def run(params: dict[str, Any], buffers: dict[str, Any], batch: CellBatch) -> jax.Array:
            module = bind(self.abstract, params, buffers)
            module.eval()
            return module.embed(batch)

        return jax.jit(run)

    def embed(
        self,
        adata: anndata.AnnData,
        *,
        batch_size: int = 64,
        layer: str | None = None,
        duplicates: Literal["error", "sum"] = "sum",
        context: bool | Sequence[str] = True,
        progress: bool = False,
    ) -> np.ndarray:
        """Cell embedding, float32 [n_obs, D]; see :func:`embed`."""
        from scjax.corpus.progress import cell_progress
        from scjax.loader import cells

        match = self.match(adata, layer)
        if match.n_matched < MIN_MATCHED * min(len(self.vocabulary), len(match.names)):
            raise ValueError(
                f"{match.summary()}. The {len(self.vocabulary):,} genes {self.path} was trained on look like "
                f"{self.vocabulary.ids[:3]} ({self.vocabulary.symbols[:3]})"
            )
        out, given = None, self.context_in(adata, context)
        with cell_progress(progress) as bar:
            task = bar.add_task("embedding", total=adata.n_obs)
            start = 0
            for batch in cells(
                adata, self.vocabulary, batch_size, layer=layer, duplicates=duplicates, **given
            ):
                vectors = np.asarray(self._embed(self.params, self.buffers, batch))
                if out is None:
                    out = np.empty((adata.n_obs, vectors.shape[1]), np.float32)
                n = min(batch_size, adata.n_obs - start)
                out[start : start + n] = vectors[:n]
                start += n
                bar.update(task, advance=n)
        if out is None:
            raise ValueError("no cells to embed: the AnnData has no rows")
        return out

    def context_in(self, adata: anndata.AnnData, wanted: bool | Sequence[str] = True) -> dict[str, Any]:
        """What of the model's context tokens ``adata`` has, as arguments of :func:`scjax.loader.cells`.

        Args:
          adata: cells with columns of obs (labels) and obs or obsm (values) of the tokens' names.
          wanted: True for all that are there, False for none, or names, which must be there.

        Raises:
          KeyError: a name that the model has no token for, or that ``adata`` lacks; lists those there are.
          ValueError: a token of a label whose categories the run does not tell.
        """
        from scjax.nn.context import tokens_of

        tokens = tokens_of(self.config) if wanted else {}
        there = {*adata.obs.columns, *adata.obsm}
        names = [name for name in tokens if name in there] if isinstance(wanted, bool) else list(wanted)
        for name in names:
            if name not in tokens or name not in there:
                lacks = self.path if name not in tokens else "the AnnData"
                raise KeyError(
                    f"context {name!r}: {lacks} has none such; the model's tokens are {sorted(tokens)}, "
                    f"of which the AnnData has {sorted(there & tokens.keys())}"
                )
        labels = [name for name in names if tokens[name]["kind"] == "label"]
        for name in labels:
            if name not in self.categories:
                raise ValueError(
                    f"context {name!r}: {self.path} does not say which category is which; "
                    "context=False leaves context out"
                )
        values = {name: self.categories.get(name) for name in names if name not in labels}
        return {"labels": labels, "categories": self.categories, "values": values}

    def random_twin(self, seed: int = 1) -> Model:
        """The same network with fresh parameters: the control that shows what pretraining did.

        Tables, medians and running means stay: what was not learned is not what the control is about.
        """
        import jax

        from scjax import models
        from scjax.nn import initialise

        fresh = models.build(self.system, self.config, len(self.vocabulary), seed)
        where = jax.tree.map(lambda x: x.sharding, self.params)
        params = jax.jit(lambda: initialise(fresh)["params"], out_shardings=where)()
        twin = dataclasses.replace(self, params=params, step=0)
        # the same function of other arrays: nothing is compiled again
        vars(twin).update(abstract=self.abstract, _embed=self._embed)
        return twin

    def gene_embedding(self) -> np.ndarray:
        """The embedding of each gene, float32 [n_genes, E], in the order of the vocabulary.

        It is ``gene_vectors()`` of the model, else ``vectors()`` of its ``gene``, else the table
        ``gene.embedding``.

        Raises:
          ValueError: the system has none of these.
        """
        gene: Any = getattr(self.module, "gene", None)
        if hasattr(self.module, "gene_vectors"):
            table = self.module.gene_vectors()
        elif hasattr(gene, "vectors"):
            table = gene.vectors()
        elif hasattr(gene, "embedding"):
            table = gene.embedding[...]
        else:
            raise ValueError(f"{self.system} has no embedding of genes")
        return np.asarray(table)[: len(self.vocabulary)]

    def parameter_table(self) -> Table:
        """A printable table: path, shape, logical axes, count and bytes of each parameter."""
        from scjax.nn.table import parameter_table

        return parameter_table(self.abstract, title=f"{self.system} at step {self.step:,}")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's ``metrics.jsonl``, [] if it has none."""
        from scjax.train.metrics import read_metrics

        file = self.path / "metrics.jsonl"
        return read_metrics(file) if file.is_file() else []


def load(path: str | Path, step: int | None = None) -> Model:
    """A model from the directory of its run; needs nothing else.

    Args:
      path: run directory (holds ``model.json``), one checkpoint in it (``RUN/checkpoints/STEP``), or a plain
        export (see :func:`export_pretrained`).
      step: which checkpoint; by default the newest whole one.

    Raises:
      FileNotFoundError: no run there, or no such checkpoint; says which there are.
    """
    from scjax.interop import is_plain, read_plain
    from scjax.train.run import read_model

    return Model(**(read_plain(path) if is_plain(path) else read_model(Path(path), step)))


def import_pretrained(
    system: str,
    path: str | Path,
    out: str | Path | None = None,
    *,
    verbose: bool = False,
    **dictionaries: Any,
) -> Model:
    """A published checkpoint as a model of scjax. Nothing in the files is ever executed.

    Args:
      system: "scgpt", "geneformer", "scfoundation", "scbert" or "celllm".
      path: the file or directory as it is published: scGPT's folder (args.json, vocab.json, best_model.pt),
        Geneformer's (config.json, model.safetensors), scFoundation's models.ckpt, a .pth of scBERT or CellLM.
      out: run directory to write, new or empty, which :func:`load` then reads; None for none.
      verbose: print what became of every tensor.
      **dictionaries: files that the weights do not come with and that say which row is which gene:
        ``token_dictionary``, ``gene_medians`` and ``gene_names`` for Geneformer, ``genes`` for scFoundation,
        scBERT and CellLM; and ``which`` of the models in a file (scFoundation: "cell", "rde" or "gene").

    Raises:
      ValueError: a file that cannot be read or is refused, a tensor or a vocabulary that does not fit (names
        it). Nothing is then written.
      FileNotFoundError, FileExistsError, ImportError: no such file; ``out`` holds something; a package to
        read the file is missing.
    """
    from scjax import interop

    imported = interop.import_pretrained(system, path, out, **dictionaries)
    if verbose:
        from rich.console import Console

        Console().print(
            imported.account.table(f"{system} from {path}"), *imported.notes, sep="\n", markup=False
        )
    return Model(**imported.model)


def export_pretrained(model: Model | str | Path, out: str | Path, *, format: str = "plain") -> None:
    """Writes a model for other tools, as safetensors and JSON.

    Args:
      model: what :func:`load` returned, or a path for it.
      out: directory to write, new or empty.
      format: "plain" (any system; :func:`load` reads it too), or "scgpt" or "geneformer", the original layout
        that the tools of these read.

    Raises:
      ValueError: no such format, or not one of this model.
      FileExistsError, ImportError: ``out`` holds something; safetensors is missing.
    """
    from scjax import interop

    interop.export_pretrained(_model(model), out, format)


def _model(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else load(model)


def embed(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    key_added: str = "X_scjax",
    batch_size: int = 64,
    layer: str | None = None,
    duplicates: Literal["error", "sum"] = "sum",
    context: bool | Sequence[str] = True,
    progress: bool = False,
) -> None:
    """Embeds the cells of ``adata`` in place.

    A cell's embedding depends on that cell alone: not on the other cells, their number, or the order of
    genes.

    Args:
      adata: raw counts of n_obs cells.
      model: what :func:`load` returned, or a path for it.
      key_added: name in ``adata.obsm``; what was done is noted in ``adata.uns["scjax"][key_added]``.
      batch_size: cells at a time.
      layer: where the counts are: None for ``adata.X``, "raw", or the name of a layer.
      duplicates: several columns that are one gene: "sum" their counts, or "error".
      context: what the model's context tokens (``config["context"]``) are told: True for the columns of
        ``obs`` and the matrices of ``obsm`` of these names that are there, False for nothing, or names.
      progress: show a progress bar.

    Raises:
      ValueError: counts that are not raw, hardly any gene in common with the model, or a category of context
        that it was not trained with (names the nearest). ``adata`` is then as it was.
      KeyError: named context that the model or ``adata`` does not have.
    """
    model = _model(model)
    how: dict[str, Any] = {"batch_size": batch_size, "layer": layer, "duplicates": duplicates}
    vectors = model.embed(adata, context=context, progress=progress, **how)
    _note(adata, model, key_added, vectors, layer, context)


def _note(
    adata: anndata.AnnData,
    model: Model,
    key_added: str,
    vectors: np.ndarray,
    layer: str | None,
    context: bool | Sequence[str],
) -> None:
    """Puts an embedding, and what made it, into ``adata``."""
    told, match = model.context_in(adata, context), model.match(adata, layer)
    adata.obsm[key_added] = vectors
    adata.uns.setdefault("scjax", {})[key_added] = {
        "run": str(model.path),
        "system": model.system,
        "step": model.step,
        "vocabulary": model.vocabulary.hash,
        "genes": {"matched": match.n_matched, "in data": len(match.names), "in model": len(model.vocabulary)},
        "context": [*told["labels"], *told["values"]],
    }


def annotate(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    reference: anndata.AnnData | None = None,
    label_key: str = "cell_type",
    unlabelled: str = "unlabelled",
    key_added: str = "scjax",
    method: Literal["probe", "head", "lora", "all"] = "probe",
    group_key: str | None = None,
    max_error: float | None = None,
    certainty: float = 0.9,
    batch_size: int = 64,
    layer: str | None = None,
    context: bool | Sequence[str] = True,
    progress: bool = False,
) -> None:
    """Labels the cells of ``adata`` by those of a labelled reference, or by the head of a fine-tuned model.

    Cells may be left "unassigned", by a rule that a quarter of the reference sets, which is then not learned
    from: of the cells that get a label at most ``max_error`` get a wrong one, with the given certainty, if
    they are drawn like those cells (see :func:`scjax.finetune.unassigned_rule`). A query of other donors is
    drawn like them only where ``group_key`` holds out whole donors; types that the reference lacks are not
    covered by any such promise.

    Args:
      adata: query, raw counts. Gets ``obs["scjax_<label_key>"]`` and
        ``obs["scjax_<label_key>_confidence"]`` (the probability of the label, also of one not given), with
        ``max_error`` also ``uns["scjax"]["scjax_<label_key>"]``, the rule; the query, and with "probe" the
        reference, get ``obsm["X_scjax"]``.
      model: what :func:`load` returned, or a path for it.
      reference: raw counts with labels in ``obs[label_key]``; None where ``model`` is fine-tuned for it.
      label_key: column of labels.
      unlabelled: value of ``label_key`` that means none; such reference cells are left out.
      key_added: prefix of the new columns.
      method: "probe", a logistic regression on the standardised frozen embedding, its strength chosen by
        cross-validation: seconds. Or fine-tuning on the reference, minutes: "head" (frozen base), "lora"
        (adapters), "all"; a fifth of the reference then says when to stop, and how sure to be.
      group_key: column of the reference (donor, study) whose groups are held out as a whole: for the rule,
        and in fine-tuning for what says when to stop.
      max_error: largest share of wrong labels among those given; None leaves no cell unassigned.
      certainty: of that promise.
      context: what the model's context tokens are told, of query and reference alike: True for those that
        both have, False for nothing, or names. The label itself is never told.
      batch_size, layer, progress: as in :func:`embed`.

    Raises:
      ValueError: no such column (lists those there are), fewer than two labels with 2 cells, a label called
        "unassigned" beside ``max_error``, no such method; or as :func:`embed`. ``adata`` is then as it was.
      KeyError: named context that the model or the cells do not have.
    """
    import pandas as pd

    from scjax.finetune import annotate as ways
    from scjax.finetune import predict

    model = _model(model)
    if method not in ways.METHODS:
        raise ValueError(f"method={method!r}: there are {', '.join(ways.METHODS)}")
    if reference is None and max_error is not None:
        raise ValueError("max_error needs a reference: labelled cells set the rule")
    column, key, rule = f"{key_added}_{label_key}", f"X_{key_added}", None
    if reference is None:
        ways.head_of(model, label_key)  # before any work
    given = ways.context_of(model, adata, reference, label_key, context)
    how: dict[str, Any] = {"batch_size": batch_size, "layer": layer, "duplicates": "sum"}
    if reference is not None:
        names, known = ways.labelled(reference, label_key, unlabelled)
        ways.check(reference, label_key, group_key, set(names[known]), max_error, certainty)
        held = known & False
        if max_error is not None:
            held = ways.hold_out(reference, known, group_key, seed=0)
        learned = known & ~held
        if len(set(names[learned])) < 2:
            raise ValueError(f"obs[{label_key!r}]: fewer than two labels are left beside the held-out cells")

    vectors = model.embed(adata, context=given, progress=progress, **how)
    embedded = [(adata, vectors)]
    if reference is not None and method == "probe":
        own = model.embed(reference, context=given, progress=progress, **how)
        embedded.append((reference, own))
        probe = ways.probe(own[learned], names[learned])
        classes, probability = probe.classes_, probe.predict_proba(vectors)
        if max_error is not None:
            told = probe.predict_proba(own[held])
    else:
        if reference is not None:
            cells = reference[learned] if layer is None else _at_layer(reference[learned], layer)
            tuned = ways.tune(model, cells, label_key, names[learned], method, group_key, given)
        else:
            tuned = model
        task, classes = ways.head_of(tuned, label_key), np.array(tuned.categories[label_key])
        probability = predict(tuned, adata, **how, **tuned.context_in(adata, given))[task]
        if max_error is not None:
            cells = reference[held]  # type: ignore[index]
            told = predict(tuned, cells, **how, **tuned.context_in(cells, given))[task]

    best = probability.argmax(1)
    labels, confidence = np.asarray(classes, object)[best], probability[np.arange(len(best)), best]
    categories = list(classes)
    if max_error is not None:
        rule = ways.set_rule(told, np.asarray(classes, object), names[held], max_error, certainty)
        labels = np.where(confidence >= rule.threshold, labels, ways.UNASSIGNED)
        categories.append(ways.UNASSIGNED)
    for of, vectors in embedded:
        _note(of, model, key, vectors, layer, given)
    if rule is not None:
        adata.uns["scjax"][column] = dataclasses.asdict(rule) | {"promise": str(rule)}
    adata.obs[column] = pd.Categorical(labels, categories=categories)
    adata.obs[f"{column}_confidence"] = confidence.astype(np.float32)


def _at_layer(adata: anndata.AnnData, layer: str) -> anndata.AnnData:
    """The counts of a layer, or of raw, as X."""
    if layer == "raw":
        return adata.raw.to_adata()
    out = adata.copy()
    out.X = out.layers[layer]
    return out
