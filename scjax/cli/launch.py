"""``scjax launch local | slurm | k8s | tpu``: the same experiment, started where it shall run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from scjax.cli.shared import err, out
from scjax.config import ConfigError


def local(args: argparse.Namespace) -> int:
    from scjax.launch.experiment import environment_of, shown
    from scjax.launch.local import LocalRun

    experiment, points = _experiment(args)
    environment = environment_of(args.env)
    failed = 0
    for point in points:
        job = LocalRun(
            command=[*experiment.command(args.python or sys.executable), *point.flags],
            directory=experiment.launch / point.name,
            processes=args.processes,
            gpus=args.gpus,
            environment=environment,
            restarts=args.restarts,
            say=lambda line: err.print(line, highlight=False, markup=False, soft_wrap=True),
        )
        if args.dry_run:
            for index in range(job.processes):
                given = [f"{k}={shlex.quote(v)}" for k, v in job.environment_of(index, 0).items()]
                words = " ".join([*given, shown(job.command)])
                target = job.output_of(index)
                _print(f"{words} >>{shlex.quote(str(target))} 2>&1" if target else words)
            continue
        if job.processes > 1:
            job.directory.mkdir(parents=True, exist_ok=True)
        if point.name:
            job.say(f"launch: {point.name}")
        code = job.run()
        failed = failed or code
        if code and job.stopped:
            break
    return failed


def slurm(args: argparse.Namespace) -> int:
    from scjax.launch import slurm as room
    from scjax.launch.experiment import environment_of

    experiment, points = _experiment(args)
    names = "nodes gpus tasks cpus time notice restarts at_once setup"
    more = [text.lstrip("-") for text in args.sbatch]
    options = room.SlurmOptions(**_given(args, names), more=more)
    python, environment = args.python or sys.executable, environment_of(args.env)
    script = room.batch_script(experiment, points, options, python=python, environment=environment)
    if args.dry_run:
        _print(script.rstrip())
        return 0
    job = room.submit(experiment, script)
    runs = f", {len(points)} runs" if len(points) > 1 else ""
    out.print(
        f"job {job}{runs}: script and output are in {experiment.launch}; see squeue -j {job}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def k8s(args: argparse.Namespace) -> int:
    from scjax.launch import k8s as room
    from scjax.launch.experiment import environment_of

    experiment, points = _experiment(args)
    options = room.K8sOptions(
        **_given(args, "image nodes gpus directory namespace restarts notice"),
        resources=_pairs(args.resource, "--resource"),
        selector=_pairs(args.selector, "--selector"),
        claims=_pairs(args.claim, "--claim"),
    )
    python, environment = args.python or "python", environment_of(args.env)
    documents = room.manifests(experiment, points, options, python=python, environment=environment)
    _print(room.dump(documents).rstrip() if args.dry_run else room.submit(documents))
    return 0


def tpu(args: argparse.Namespace) -> int:
    from scjax.launch import tpu as room
    from scjax.launch.experiment import environment_of

    experiment, points = _experiment(args)
    names = "accelerator runtime zone project spot reserved setup directory restarts"
    options = room.TpuOptions(**_given(args, names))
    python, environment = args.python or "python3", environment_of(args.env)
    script = room.pod_script(experiment, points, options, python=python, environment=environment)
    if args.dry_run:
        _print(script.rstrip())
        return 0
    return room.run(script)


def _experiment(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from scjax.launch.experiment import read_experiment, sweep

    experiment = read_experiment(args.experiment)
    return experiment, sweep(experiment, args.sweep)


def _given(args: argparse.Namespace, names: str) -> dict[str, Any]:
    return {name: value for name in names.split() if (value := getattr(args, name)) is not None}


def _pairs(given: Sequence[str], flag: str) -> dict[str, str]:
    for text in given:
        if not all(text.partition("=")):
            raise ConfigError(f"{flag} {text}: NAME=VALUE is needed")
    return dict(text.split("=", 1) for text in given)


def _print(text: str) -> None:
    """As it is, for a pipe or a file."""
    sys.stdout.write(text + "\n")


# ------------------------------------------------------------------------ parser
def add_commands(commands: Any) -> None:
    room = commands.add_parser("launch", help="run an experiment: here, on Slurm, Kubernetes or TPU pods")
    kinds = room.add_subparsers(metavar="WHERE", required=True)

    command = _add(kinds, "local", local, "on this machine, in one process or several")
    command.add_argument(
        "--processes", type=int, default=1, metavar="N", help="that are one run (default: 1)"
    )
    command.add_argument("--gpus", type=int, metavar="N", help="of each process (default: all see all)")

    command = _add(kinds, "slurm", slurm, "a batch job; a job array for a sweep")
    command.add_argument("--nodes", type=int, metavar="N", help="machines (default: 1)")
    command.add_argument("--gpus", type=int, metavar="N", help="of each node")
    command.add_argument("--tasks", type=int, metavar="N", help="processes a node: 1 (default), or one a GPU")
    command.add_argument("--cpus", type=int, metavar="N", help="of each process")
    command.add_argument(
        "--time",
        metavar="LIMIT",
        help="as in 1-00:00:00; the run then saves itself and goes back to the queue",
    )
    command.add_argument(
        "--notice", type=int, metavar="S", help="seconds before the limit to do so (default: 120)"
    )
    command.add_argument("--at-once", type=int, metavar="N", help="runs of a sweep at the same time")
    command.add_argument(
        "--setup", action="append", metavar="LINE", help="shell line before the run; repeatable"
    )
    command.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="such as partition=gpu; repeatable"
    )

    command = _add(kinds, "k8s", k8s, "a JobSet; one for each run of a sweep")
    command.add_argument("--image", required=True, help="container with scjax and the experiment")
    command.add_argument("--nodes", type=int, metavar="N", help="pods (default: 1)")
    command.add_argument("--gpus", type=int, metavar="N", help="of each pod")
    for name, example in (
        ("resource", "google.com/tpu=4, memory=120Gi"),
        ("selector", "cloud.google.com/gke-tpu-topology=4x4"),
        ("claim", "runs=/mnt/runs"),
    ):
        command.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"such as {example}; repeatable",
        )
    command.add_argument("--directory", metavar="DIR", help="of the experiment in the container")
    command.add_argument("--namespace", metavar="NAME")
    command.add_argument(
        "--notice", type=int, metavar="S", help="seconds for a pod to save itself (default: 120)"
    )

    command = _add(kinds, "tpu", tpu, "a pod of Google Cloud, asked for again when it is taken")
    command.epilog = "--workdir must be a path that all machines of the pod share: a mounted disk or bucket"
    command.add_argument("--accelerator", required=True, metavar="TYPE", help="such as v5litepod-64")
    command.add_argument("--runtime", required=True, metavar="VERSION", help="such as v2-alpha-tpuv5-lite")
    command.add_argument("--zone", required=True)
    command.add_argument("--project")
    command.add_argument("--spot", action="store_true", help="cheaper, and may be taken at any time")
    command.add_argument("--reserved", action="store_true", help="from a reservation")
    command.add_argument(
        "--setup",
        action="append",
        metavar="LINE",
        help="makes a new machine ready: installs scjax, mounts what holds --workdir; repeatable",
    )
    command.add_argument(
        "--directory", metavar="DIR", help="of the experiment on the machines (default: scjax)"
    )


def _add(kinds: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = kinds.add_parser(
        name, help=text, usage=f"scjax launch {name} [options] -- SCRIPT.py --config=... --workdir=..."
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="config.FIELD=A,B",
        help="a run for each value, in WORKDIR/FIELD=VALUE; several make a grid",
    )
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for the run; repeatable"
    )
    command.add_argument("--python", metavar="PATH", help="interpreter, as it is called where the run runs")
    command.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="of a run that crashed (default: 3)"
    )
    command.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    command.add_argument(
        "experiment", nargs="+", metavar="-- SCRIPT.py ...", help="as it is started by hand, after --"
    )
    return command
