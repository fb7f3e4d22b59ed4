"""A script for TPU pods on Google Cloud: asks for a pod, runs on all machines, asks again when it is taken.

The script runs wherever ``gcloud`` is signed in, for as long as the run takes. The machines of a pod, and
those of the next one, share nothing by themselves: ``--workdir`` must be a path that all of them have mounted
(Filestore, or a bucket by Cloud Storage FUSE), which the lines of ``setup`` can do.
https://cloud.google.com/tpu/docs/queued-resources
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from scjax.config import ConfigError
from scjax.launch.codes import REQUEUE
from scjax.launch.experiment import Experiment, Point, shown

TEMPLATE = r"""#!/bin/bash
# Written by `scjax launch tpu`.
set -u -o pipefail
name={name}
tpus() {{ gcloud compute tpus "$@" --zone={zone}{project}; }}
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
describe() {{ # says nothing where there is no pod; fails where gcloud does
    tpus queued-resources describe "$name" --format='value(state.state)' 2>"$errors" ||
        grep -q NOT_FOUND "$errors"
}}
state() {{ # a gcloud that fails tells nothing of the pod: it is asked again
    until describe; do
        echo "launch: gcloud does not tell how $name is, and is asked again: $(cat "$errors")" >&2
        sleep "${{SCJAX_POLL:-30}}"
    done
}}
release() {{ tpus queued-resources delete "$name" --force --quiet; }}
everywhere() {{ tpus tpu-vm ssh "$name" --worker=all --command="$1" 2>&1; }}

acquire() {{ # until the pod is ours
    while true; do
        case $(state) in
        ACTIVE) return ;;
        "")
            tpus queued-resources create "$name" --node-id="$name" --accelerator-type={accelerator} \
                --runtime-version={runtime} {create} || exit 1
            fresh=1
            ;;
        FAILED | SUSPENDING | SUSPENDED) release ;;
        *) sleep "${{SCJAX_POLL:-30}}" ;;
        esac
    done
}}

run() {{ # a command on all machines of the pod, as often as it takes
    local output crashes=0
    output=$(mktemp)
    while true; do
        acquire
        if [ "$fresh" = 1 ]; then
            everywhere {setup} || {{ release; continue; }}
            fresh=0
        fi
        # ssh to many does not tell how their commands ended, so they say it themselves
        everywhere "$1; echo scjax exit status \$?" | tee "$output"
        case $(grep -o 'scjax exit status [0-9]*' "$output" | sort -u | grep -o '[0-9]*$' | xargs) in
        0) rm -f "$output"; return 0 ;;
        {requeue}) echo "launch: the run saved itself; started again" ;;
        *)
            if [ "$(state)" != ACTIVE ]; then
                echo "launch: the pod was taken; asking for another"
            elif [ $((crashes += 1)) -le {restarts} ]; then
                echo "launch: the run failed; started again ($crashes of at most {restarts})"
            else
                echo "launch: the run failed; the pod $name is still ours" >&2
                rm -f "$output"
                return 1
            fi
            ;;
        esac
    done
}}

fresh=0
describe >/dev/null || {{ cat "$errors" >&2; exit 1; }} # while there is nothing to lose
{runs}
release
"""


@dataclasses.dataclass(frozen=True)
class TpuOptions:
    """What to ask of Google Cloud.

    Attributes:
      accelerator: such as ``v5litepod-64``.
      runtime: version of the machines' software, such as ``v2-alpha-tpuv5-lite``.
      zone: where.
      project: of the account; by default that of gcloud.
      spot: cheaper, and may be taken at any time.
      reserved: from a reservation.
      setup: shell lines that make a new machine ready: fetch the code, install scjax, mount what holds the
        run directory.
      directory: where on the machines the experiment lies.
      restarts: how often a run that failed is started again; one that saved itself or lost its pod always is.
    """

    accelerator: str
    runtime: str
    zone: str
    project: str | None = None
    spot: bool = False
    reserved: bool = False
    setup: Sequence[str] = ()
    directory: str = "scjax"
    restarts: int = 3


def pod_script(
    experiment: Experiment,
    points: Sequence[Point],
    options: TpuOptions,
    *,
    python: str = "python3",
    environment: Mapping[str, str] = {},  # noqa: B006 (never written to)
) -> str:
    """The text of the script; the runs of a sweep go one after another on the same pod."""
    name = re.sub(r"[^a-z0-9]+", "-", experiment.name.lower()).strip("-")
    if not name or not name[0].isalpha():
        raise ConfigError(f"a TPU is named after the run; {experiment.name!r} must begin with a letter")
    # JAX finds the processes of a pod by itself, once it is told to look for them
    given = {"SCJAX_CLUSTER": "1", **environment}
    variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in given.items())
    runs = []
    for point in points:
        command = shown([*experiment.command(python), *point.flags])
        line = f"cd {shlex.quote(options.directory)} && env {variables} {command}"
        runs.append(f"run {shlex.quote(line)} || exit 1")
    create = [
        *(["--spot"] if options.spot else []),
        *(["--reserved"] if options.reserved else []),
    ]
    return TEMPLATE.format(
        name=shlex.quote(name[:60]),
        zone=shlex.quote(options.zone),
        project=f" --project={shlex.quote(options.project)}" if options.project else "",
        accelerator=shlex.quote(options.accelerator),
        runtime=shlex.quote(options.runtime),
        create=shown(create),
        setup=shlex.quote(" && ".join(options.setup) or "true"),
        requeue=REQUEUE,
        restarts=options.restarts,
        runs="\n".join(runs),
    )


def run(script: str) -> int:
    """Runs the script here; its exit status.

    Raises:
      FileNotFoundError: there is no gcloud here.
    """
    if shutil.which("gcloud") is None:
        raise FileNotFoundError(
            "no gcloud on this machine: write the script with --dry-run and run it where there is one"
        )
    return subprocess.run(["bash", "-c", script]).returncode
