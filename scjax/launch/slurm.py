"""A batch script for Slurm, which starts the run again when it was preempted or a node was lost."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from scjax.config import ConfigError
from scjax.launch.codes import REQUEUE
from scjax.launch.experiment import Experiment, Point, shown

TEMPLATE = r"""#!/bin/bash
{options}
# Written by `scjax launch slurm`.

trap : TERM  # this shell outlives the signals that ask a job to leave, to say what follows
{setup}
{point}
code=0
# Processes that lose one of theirs end by themselves, which says most; after a minute srun ends them.
srun --kill-on-bad-exit=0 --wait=60 \
    {command} {of_point} || code=$?

# of a job array this task alone: one of them has the id of the array as its own, which stands for all of them
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
requeue() {{ # unless Slurm says that the job is being cancelled or started again already
    local state tries=0
    # Slurm does not answer, or squeue was told to leave with its job, which is gone before it is asked again
    until state=$(squeue -h -j "$job" -o %T); do
        state=RUNNING
        [ $((tries += 1)) -lt 6 ] || break
        sleep "${{SCJAX_POLL:-10}}"
    done
    [ "$state" = RUNNING ] || exit "$code"
    echo "launch: $1 (exit status $code); back to the queue"
    scontrol requeue "$job"
    exit "$code"
}}
case $code in
0) exit 0 ;;
{requeue}) requeue "the run saved itself" ;;
esac
n=$SLURM_JOB_NUM_NODES
timeout 60 srun --overlap --nodes="$n" --ntasks="$n" --ntasks-per-node=1 true ||
    requeue "a node does not answer"
if [ "$code" -gt 128 ]; then # killed, or lost to the others: no memory, a fault of the machine
    crashes={directory}/crashes.$job
    echo "$(date) exit status $code" >>"$crashes"
    [ "$(wc -l <"$crashes")" -gt {restarts} ] || requeue "a process was lost"
fi
exit "$code"
"""


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What to ask of Slurm.

    Attributes:
      nodes: machines.
      gpus: of each node; None for none.
      tasks: processes on each node: 1, with all GPUs of the node, or as many as GPUs.
      cpus: of each process.
      time: limit, as Slurm writes it (``1-00:00:00``); the run is told ``notice`` seconds ahead, saves itself
        and goes back to the queue.
      restarts: how often a run that crashed is started again; one that saved itself always is.
      at_once: runs of a sweep at the same time.
      setup: shell lines before the run, such as ``module load cuda``.
      more: further options of sbatch, without the dashes: ``partition=gpu``, ``exclusive``.
    """

    nodes: int = 1
    gpus: int | None = None
    tasks: int = 1
    cpus: int | None = None
    time: str | None = None
    notice: int = 120
    restarts: int = 3
    at_once: int | None = None
    setup: Sequence[str] = ()
    more: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "tasks", "cpus", "at_once"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.gpus and self.tasks not in (1, self.gpus):
            raise ConfigError(
                f"--tasks {self.tasks} with --gpus {self.gpus}: one process for all of them, or one each"
            )
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ConfigError(f"--time {self.time}: Slurm takes MINUTES, H:M:S or DAYS-H:M:S")


def batch_script(
    experiment: Experiment,
    points: Sequence[Point],
    options: SlurmOptions,
    *,
    python: str,
    environment: Mapping[str, str] = {},  # noqa: B006 (never written to)
    directory: str | None = None,
) -> str:
    """The text of the batch script; a job array where there are several points.

    Args:
      experiment: what is run.
      points: of a sweep, or one.
      options: see there.
      python: the interpreter, as the nodes see it.
      environment: variables for the run, beside those that sbatch passes on.
      directory: where it runs; by default the current one.
    """
    log = "%A_%a.out" if len(points) > 1 else "%j.out"
    wanted = [
        f"job-name={experiment.name}",
        f"nodes={options.nodes}",
        f"ntasks-per-node={options.tasks}",
        *([f"gpus-per-node={options.gpus}"] if options.gpus else []),
        *([f"cpus-per-task={options.cpus}"] if options.cpus else []),
        *([f"time={options.time}", f"signal=TERM@{options.notice}"] if options.time else []),
        f"chdir={directory or os.getcwd()}",
        f"output={experiment.launch.absolute()}/{log}",
        "open-mode=append",
        "requeue",
        *([_array(len(points), options.at_once)] if len(points) > 1 else []),
        *options.more,
    ]
    given = dict(environment)
    if (
        options.gpus and options.tasks == 1
    ):  # or JAX would use the first GPU only: it takes a Slurm task for one
        given.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, range(options.gpus))))
    if options.cpus:
        given.setdefault("SRUN_CPUS_PER_TASK", str(options.cpus))  # srun does not take it from sbatch
    if len(points) > 1:
        cases = [f"{i}) point=({shown(p.flags)}) ;;" for i, p in enumerate(points)]
        point = "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"])
    else:
        point = f"point=({shown(points[0].flags)})"
    return TEMPLATE.format(
        options="\n".join(f"#SBATCH --{_quoted(option)}" for option in wanted),
        setup="\n".join([*(f"export {k}={shlex.quote(v)}" for k, v in given.items()), *options.setup]),
        point=point,
        command=shown(experiment.command(python)),
        of_point='"${point[@]}"',
        requeue=REQUEUE,
        directory=shlex.quote(str(experiment.launch.absolute())),
        restarts=options.restarts,
    )


def submit(experiment: Experiment, script: str) -> str:
    """Keeps the script as ``launch/job.sh`` of the run and submits it; the id of the job.

    Raises:
      FileNotFoundError: there is no sbatch here.
      OSError: Slurm refuses the job; says why.
    """
    if shutil.which("sbatch") is None:
        raise FileNotFoundError(
            "no sbatch on this machine: run this where jobs are submitted, or write the script with --dry-run"
        )
    experiment.launch.mkdir(parents=True, exist_ok=True)
    file = experiment.launch / "job.sh"
    file.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"Slurm does not take {file}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _array(points: int, at_once: int | None) -> str:
    return f"array=0-{points - 1}" + (f"%{at_once}" if at_once else "")


def _quoted(option: str) -> str:
    """An option for a line of #SBATCH, which knows double quotes."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if re.search(r"[\s#']", value) else option
