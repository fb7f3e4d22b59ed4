"""The config of a run, checked."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from scjax.config import ConfigError, from_config
from scjax.models import resolve
from scjax.parallel import MeshConfig
from scjax.train.guard import GuardConfig
from scjax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read: a corpus, and how :class:`scjax.loader.Loader` goes through it (see there).

    ``corpus`` is a folder or URL, ``PATH@MANIFEST`` for an earlier state of it, or several of these, which
    are then mixed: as they come, or in the proportions that ``shares`` gives to the names of their folders.
    ``genes`` is a vocabulary table (``scjax corpus genes`` writes one): the genes that the model knows;
    None or "" for all of the corpus. ``labels`` are the label columns that batches carry; None for all
    that the corpus has. ``values`` are the continuous ones (coordinates, dose, protein counts, ...); None for
    all. ``cache`` is where what is read from a URL is kept.
    """

    corpus: str | tuple[str, ...]
    batch_size: int
    shares: dict[str, float] | None = None
    genes: str | None = None
    cache: str | None = None
    window: int = 1024
    block: int | None = None
    lanes: int | None = None
    group_lengths: bool = False
    n_buckets: int = 3
    max_genes: int | None = None
    weights: dict[str, Any] | None = None
    weight_level: Literal["auto", "row", "block"] = "auto"
    epoch_cells: int | None = None
    labels: tuple[str, ...] | None = ("dataset",)
    values: tuple[str, ...] | None = ()
    prefetch: int = 2

    def loader(self) -> dict[str, Any]:
        """The arguments of the loader but for corpus, vocabulary, seed and process."""
        of_the_corpus = ("corpus", "shares", "genes", "cache")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in of_the_corpus}


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The validation split, where the corpus has one: in order, at most ``max_batches`` (None: all of
    it) of ``batch_size`` cells (None: as in training).

    ``probe_label`` and ``probe_group`` are label columns for ``train.probe_every``: what is read off the
    embedding, and what splits never cut through (donor, study)."""

    batch_size: int | None = None
    max_batches: int | None = None
    probe_label: str = "cell_type"
    probe_group: str = "dataset"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run, in steps.

    Attributes:
      steps: of the whole run.
      accumulate: micro-batches that a batch is cut into; 0 for as many as the hardware needs (see
        :func:`scjax.parallel.accumulate_for`).
      log_every: steps averaged into one line of metrics; the last step, a validation and a checkpoint end
        a line too.
      eval_every, checkpoint_every: None for only at the end.
      probe_every: None for never; else labels are also read off the frozen embedding of validation cells
        before the first step, every so many steps and at the end (see :class:`scjax.train.Probe`).
      guard: which steps are skipped, and when there are too many of them.
      keep: how many checkpoints stay, the newest.
      keep_every: checkpoints of every so many steps stay besides; None for none.
      profile: (first, number): steps whose profile is written to ``profile/`` of the run, for XProf,
        TensorBoard or Perfetto.
      wandb: project of Weights & Biases that the metrics go to as well.
      compile_cache: where compiled steps are kept for the next start; None for ``compiled/`` of the run,
        "" for nowhere. The environment's JAX_COMPILATION_CACHE_DIR comes first.
    """

    steps: int
    accumulate: int = 1
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    probe_every: int | None = None
    guard: GuardConfig = GuardConfig()
    keep: int = 3
    keep_every: int | None = None
    profile: tuple[int, int] | None = None
    wandb: str | None = None
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == "accumulate" else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"train.{name} is {value}; it must be at least {least}")
        if self.profile is not None and min(self.profile) < 1:
            raise ConfigError(f"train.profile is {self.profile}; give the first step, from 1, and how many")

    def due(self, every: int | None, step: int) -> bool:
        """Whether something done every so many steps, and at the end, is due after ``step`` steps."""
        return step == self.steps or (every is not None and step % every == 0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a pretraining run is made from.

    ``model`` holds the fields of the system's own config; ``tables`` says where the values of genes come
    from that the system wants from outside, a file or "corpus" (see :func:`scjax.train.gene_tables`).
    ``start`` is a run, or an imported model, that this one begins with: weights, tables and vocabulary are
    those of it, whatever ``tables`` and ``data.genes`` say.
    """

    system: str
    model: dict[str, Any]
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    validation: ValidationConfig = ValidationConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    tables: dict[str, str | None] = dataclasses.field(default_factory=dict)
    start: str | None = None

    def __post_init__(self) -> None:
        model, config_class = resolve(self.system)
        from_config(config_class, self.model, where="config.model")  # tells a misspelt field before any work
        if self.data.max_genes is not None and getattr(model, "WHOLE_CELLS", False):
            raise ConfigError(
                f"data.max_genes is {self.data.max_genes}, but {self.system} reads all genes of a cell: "
                "those left out would pass for not expressed. A model that needs a limit has its own"
            )
