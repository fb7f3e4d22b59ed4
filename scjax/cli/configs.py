"""``scjax config``: what follows from a config file without data or devices."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from scjax.cli.shared import out
from scjax.config import nearest

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from scjax.train import RunConfig
    from scjax.train.cost import Job

METHOD = (
    "Memory: the state is exact; temporaries are those of the compiler for as many virtual CPU devices, "
    "which works bfloat16 out in float32, so that a GPU or TPU needs less. Operations and bytes: of the "
    "partitioned program, each as often as it runs; what is useful: scjax.nn.work. Time: none is faster."
)


def load_config(name: str, changes: Sequence[str] = ()) -> ConfigDict:
    """``get_config(ARG)`` of a config file named ``FILE.py`` or ``FILE.py:ARG``, with some fields changed.

    Args:
      name: of the file.
      changes: as ``model.d_model=128``.

    Raises:
      FileNotFoundError: no such file; lists the config files beside it.
      ValueError: the file has no ``get_config``, or a change is not of that form.
    """
    file, _, arg = name.partition(":")
    path = Path(file)
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no config file {file}" + (f"; there are {', '.join(there)}" if there else "")
        )
    spec = importlib.util.spec_from_file_location(f"scjax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{file} defines no get_config(arg)")
    config = module.get_config(arg) if arg else module.get_config()
    for change in changes:
        _change(config, change)
    return config


def _change(config: ConfigDict, change: str) -> None:
    names, equals, text = change.removeprefix("config.").partition("=")
    *path, last = names.split(".")
    if not equals or not last:
        raise ValueError(f"--set {change}: give a field and its value, as in model.d_model=128")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text, text)
    with config.unlocked():
        node = config
        for name in path:
            if name not in node:
                raise ValueError(
                    f"--set {change}: there is no {name};{nearest(name, node)} it has {list(node)}"
                )
            node = node[name]
        with node.ignore_type():
            node[last] = value


def run_of(config: Any) -> RunConfig:
    """The config as the experiment that it is for takes it: pretraining, fine-tuning, or perturbation.

    Raises:
      ConfigError: an unknown or missing key (names the nearest valid one), or a value of a wrong type.
    """
    from scjax import models
    from scjax.config import from_config
    from scjax.finetune import FinetuneConfig, Finetuned
    from scjax.finetune.perturb import PerturbConfig
    from scjax.models.perturbation import Perturbation
    from scjax.train import RunConfig

    model: Any = models.resolve(str(config.get("system")))[0]
    if issubclass(model, Perturbation):
        return from_config(PerturbConfig, config)
    if issubclass(model, Finetuned) and not config["model"].get("base"):  # experiments/finetune.py finds it
        return from_config(FinetuneConfig, config)
    return from_config(RunConfig, config)


def resolve(config: Any) -> dict[str, Any]:
    """The config with every default filled in.

    Raises:
      ConfigError: as :func:`run_of`.
    """
    from scjax import models
    from scjax.config import from_config

    run = run_of(config)
    model: Any = from_config(models.resolve(run.system)[1], run.model, where="config.model")
    return dataclasses.asdict(run) | {"model": dataclasses.asdict(model)}


def job_model(run: RunConfig, n_genes: int | None) -> tuple[RunConfig, int]:
    """``(run, size of the vocabulary)``: a run as pretraining would take it, whose model is complete.

    What an experiment takes from the base and the data is put in: sizes of tasks from the corpus where the
    config gives none. No cell is read: classes count as equally frequent.

    Raises:
      ConfigError: no base is named, or the model has a size that data alone tell.
      ValueError: the size of the vocabulary, or of a task, is not known.
    """
    import scjax
    from scjax import finetune, models
    from scjax.config import from_config
    from scjax.corpus import Corpus, Mixture, open_corpus
    from scjax.finetune.perturb import PerturbConfig, fields_of
    from scjax.train import RunConfig

    def corpus(hint: str) -> Corpus | Mixture:
        try:
            return open_corpus(run.data.corpus)
        except FileNotFoundError as error:
            raise ValueError(f"{error}; give {hint}") from None

    begin = None
    if isinstance(run, finetune.FinetuneConfig):
        begin = scjax.load(run.base_run)
    elif isinstance(run, PerturbConfig) and run.start:
        begin = scjax.load(run.start)
    if begin is not None:
        n_genes = len(begin.vocabulary)
    elif n_genes is None:
        n_genes = len(corpus("the size of the vocabulary with --genes N").vocabulary)
    base: Any = {"system": begin.system, "model": begin.config} if begin else run.model.get("base")
    model = run.model
    if isinstance(run, PerturbConfig):
        model = fields_of(run, base, n_genes, {})
    elif isinstance(run, finetune.FinetuneConfig):
        wanted: Any = from_config(models.resolve(run.system)[1], run.model, where="config.model")
        tasks = {
            name: dataclasses.replace(task, prior=(1 / task.size,) * task.size)
            if task.size and task.logit_adjustment and not task.prior
            else task
            for name, task in wanted.tasks.items()
        }
        if not all(task.size for task in tasks.values()):
            data = corpus("the sizes of the tasks with --set model.tasks.NAME.size=N")
            alike = {name: [1.0] * len(categories) for name, categories in data.columns.items()}
            tasks = finetune.complete(tasks, data.columns, data.values, alike)
        model = dataclasses.asdict(dataclasses.replace(wanted, base=base, tasks=tasks))
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(RunConfig)}
    return RunConfig(**{**fields, "model": model}), n_genes


def job_of(args: argparse.Namespace) -> Job:
    """What the options of ``params`` and ``cost`` ask for.

    Raises:
      ConfigError: as :func:`resolve`, or a device that is in no row of the table.
      ValueError: the size of the vocabulary is not known, or a mesh that is none.
    """
    from scjax.config import ConfigError
    from scjax.parallel import DEVICES, device_of
    from scjax.train.cost import Job

    config = load_config(args.config, args.set)
    given = resolve(config)
    if args.mesh is not None:
        given["mesh"] = _mesh(args.mesh)
    if getattr(args, "batch", None) is not None:
        given["data"]["batch_size"] = args.batch
    run, n_genes = job_model(run_of(given), args.genes)
    names = [device.name for device in DEVICES]
    if device_of(args.device) not in DEVICES:  # of one that is met at run time nothing need be known
        raise ConfigError(f"--device {args.device}:{nearest(args.device, names)} Known: {', '.join(names)}")
    return Job(run, n_genes, args.devices, args.device, getattr(args, "length", None) or 0)


def _mesh(text: str) -> dict[str, int]:
    """data=16,fsdp=64 -> {"data": 16, "fsdp": 64, "tensor": 1}; what is left out is 1."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in sizes or not size.lstrip("-").isdecimal():
            raise ValueError(f"--mesh {text}: give sizes of {', '.join(sizes)}, as in data=16,fsdp=64")
        sizes[name] = int(size)
    return sizes


# ------------------------------------------------------------------ commands
def show(args: argparse.Namespace) -> int:
    out.print_json(json.dumps(resolve(load_config(args.config, args.set))))
    return 0


def params(args: argparse.Namespace) -> int:
    from scjax.nn.table import parameter_table
    from scjax.train import abstract_state, make_optimizer, model_of
    from scjax.train.cost import abstract_mesh, state_bytes

    job = job_of(args)
    config, mesh = job.config, abstract_mesh(job)  # no device is needed
    model, base = model_of(config, job.n_genes)
    title = f"{config.system}, {job.n_genes:,} genes, {_on(job, dict(mesh.shape))}"
    out.print(parameter_table(model, title, mesh))
    tx, _ = make_optimizer(config.optimizer, config.train.steps, model, base)
    found = state_bytes(abstract_state(model, tx, mesh, ema=config.optimizer.ema is not None))
    parts = ", ".join(f"{name} {size / 2**20:,.2f}" for name, size in found.items())
    out.print(f"MiB of the state a device: {parts}; all {sum(found.values()) / 2**20:,.2f}", highlight=False)
    return 0


def cost(args: argparse.Namespace) -> int:
    from scjax.parallel import device_of
    from scjax.train.cost import cost_elsewhere, lower, roofline

    job = job_of(args)
    with out.status(f"compiling for {job.devices:,} virtual devices"):
        found = cost_elsewhere(job)
    link = None if args.link is None else args.link * 1e9
    found["roofline"] = roofline(found, job, link)
    if args.lower:
        found["lowered"] = {args.lower: lower(job, args.lower)}
    if args.json:
        print(json.dumps(found))
        return 0
    memory = device_of(job.device).memory
    out.print(_cost_table(found, job, memory))
    if args.lower:
        program = found["lowered"][args.lower]
        out.print(
            f"lowered for {job.devices:,} abstract {args.lower} devices: {program['bytes'] / 2**20:.1f} MiB "
            f"of program, attention {program['attention']}",
            highlight=False,
        )
    out.print(METHOD, highlight=False)
    return int(memory is not None and found["memory"]["all"] > memory)


def _on(job: Job, mesh: dict[str, int]) -> str:
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.items())
    return f"{job.devices:,} {job.device} ({sizes})"


def _cost_table(found: dict[str, Any], job: Job, memory: float | None) -> Table:
    """Memory, operations, bytes sent and seconds of a step, a line each."""
    how = f"{found['cells']:,} cells × {found['length']:,} genes in {found['accumulate']} micro-batch(es)"
    title = (
        f"{job.config.system}, {job.n_genes:,} genes, {found['parameters']:,} parameters on "
        f"{_on(job, found['mesh'])}\na step: {how}, attention {found['attention']}, remat {found['remat']}"
    )
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_column("unit")

    def section(head: str, rows: list[tuple[str, str, str]]) -> None:
        table.add_row(f"[bold]{head}[/]", "", "")
        for row in rows:
            table.add_row(*row)
        table.add_section()

    sizes, state = found["memory"], found["state"]
    rows = [(f"  state: {name}", f"{size / 1e9:,.3f}", "GB") for name, size in state.items() if size > 1e5]
    rows.append(("  state and batch", f"{sizes['arguments'] / 1e9:,.3f}", "GB"))
    rows.append(("  temporaries", f"{(sizes['temporaries'] + sizes['results']) / 1e9:,.3f}", "GB"))
    fits = ""
    if memory is not None:
        fits = f" of {memory / 1e9:,.0f}: " + ("it fits" if sizes["all"] <= memory else "it does NOT fit")
    rows.append(("  all", f"{sizes['all'] / 1e9:,.3f}", f"GB{fits}"))
    section("memory of a device", rows)
    again = found["computed"] * job.devices / found["operations"]
    section(
        "all devices together",
        [
            ("  tokens", f"{found['tokens']:,.0f}", ""),
            ("  useful operations", f"{found['operations'] / 1e12:,.2f}", "TFLOP"),
            ("  computed", f"{again:.2f}", "times the useful, by matrix products"),
        ],
    )
    if found["collectives"]:
        sent = [
            (f"  {kind}", f"{size / 1e9:,.3f}", f"GB in {count:,.0f} calls")
            for kind, (count, size) in found["collectives"].items()
        ]
        section("a device sends", sent)
    if times := found["roofline"]:
        names = {
            "products": "matrix products at the device's peak",
            "links": "sending at the links' peak",
            "update": "reading and writing parameters and optimiser",
            "step": "a step at least",
        }
        seconds = [(f"  {text}", f"{times[name]:.4f}", "s") for name, text in names.items()]
        section("time", [*seconds, ("  MFU at most", f"{times['mfu']:.0%}", "")])
    return table


# ------------------------------------------------------------------------ parser
def add_commands(commands: Any) -> None:
    """Adds the commands of this file to those of ``scjax``."""
    room = commands.add_parser("config", help="look at a config file without data or devices")
    config = room.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = config.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("config", metavar="FILE.py[:ARG]")
        command.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", help="as model.n_layers=6; repeat"
        )
        return command

    def add_hardware(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--genes", type=int, metavar="N", help="size of the vocabulary (default: the config's corpus)"
        )
        command.add_argument("--devices", type=int, default=1, metavar="N", help="how many (default: 1)")
        command.add_argument("--device", default="H100", metavar="KIND", help="H100, A100 40GB, TPU v5p, ...")
        command.add_argument(
            "--mesh", metavar="data=N,fsdp=N,tensor=N", help="-1: all that are left (default: the config's)"
        )

    add("show", show, "the config, checked, with all defaults filled in")
    add_hardware(add("params", params, "every parameter: shape, axes, how it is split, bytes a device"))
    command = add("cost", cost, "memory, operations, bytes sent and least time of a step")
    add_hardware(command)
    command.add_argument("--length", type=int, metavar="L", help="gene slots (default: the longest there is)")
    command.add_argument("--batch", type=int, metavar="B", help="cells of a batch (default: the config's)")
    command.add_argument(
        "--link", type=float, metavar="GB/S", help="that a device sends (default: its host's)"
    )
    command.add_argument("--lower", choices=("cuda", "tpu", "cpu"), help="also lower for abstract devices")
    command.add_argument("--json", action="store_true", help="numbers instead of a table")
