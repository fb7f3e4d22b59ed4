"""A JobSet for Kubernetes: all pods of a run start, and start again, together.

https://jobset.sigs.k8s.io; the cluster needs its controller.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from scjax.config import ConfigError
from scjax.launch.codes import REQUEUE
from scjax.launch.experiment import Experiment, Point

PORT = 8476  # of the coordinator


@dataclasses.dataclass(frozen=True)
class K8sOptions:
    """What to ask of Kubernetes.

    Attributes:
      image: of the container, with scjax and the experiment in it.
      nodes: pods, each with one process for all its devices.
      gpus: of each pod.
      resources: further ones of each pod: ``google.com/tpu=4``, ``cpu=16``, ``memory=120Gi``.
      selector: labels of the nodes to run on, such as ``cloud.google.com/gke-tpu-topology=4x4``.
      claims: persistent volume claims and where they appear: ``runs=/mnt/runs``.
      directory: where in the container the experiment lies; by default that of the image.
      namespace: of everything.
      restarts: how often a run that crashed is started again. One that saved itself always is, and one of
        whose pods Kubernetes itself has taken away before another of them failed. A node that is suddenly
        gone is no such case for several pods: they end within a minute, long before Kubernetes gives the
        node up, and that counts as a crash.
      notice: seconds that a pod has to save itself once it is asked to leave.
    """

    image: str
    nodes: int = 1
    gpus: int | None = None
    resources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    claims: Mapping[str, str] = dataclasses.field(default_factory=dict)
    directory: str | None = None
    namespace: str | None = None
    restarts: int = 3
    notice: int = 120

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be at least 1")


def manifests(
    experiment: Experiment,
    points: Sequence[Point],
    options: K8sOptions,
    *,
    python: str = "python",
    environment: Mapping[str, str] = {},  # noqa: B006 (never written to)
) -> list[dict[str, Any]]:
    """One JobSet for each run.

    The process that JAX calls the coordinator is pod 0, which the others know by the name that the headless
    service of the JobSet gives it; no pod needs rights in the cluster.
    """
    name = _name(experiment.name, options.nodes, len(points))
    names = [name] if len(points) == 1 else [f"{name}-{i}" for i in range(len(points))]
    return [
        _jobset(job, experiment, point, options, python, environment)
        for job, point in zip(names, points, strict=True)
    ]


def dump(documents: Sequence[Mapping[str, Any]]) -> str:
    """As YAML, which ``kubectl apply -f`` takes."""
    return yaml.safe_dump_all(documents, sort_keys=False, width=100)


def submit(documents: Sequence[Mapping[str, Any]]) -> str:
    """Hands the JobSets to kubectl; what it says.

    Raises:
      FileNotFoundError: there is no kubectl here.
      OSError: the cluster refuses them; says why.
    """
    if shutil.which("kubectl") is None:
        raise FileNotFoundError(
            "no kubectl on this machine: write the manifest with --dry-run and apply it where there is one"
        )
    command = ["kubectl", "create", "-f", "-"]
    done = subprocess.run(command, input=dump(documents), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"Kubernetes does not take the manifest: {done.stderr.strip()}")
    return done.stdout.strip()


def _jobset(
    name: str,
    experiment: Experiment,
    point: Point,
    options: K8sOptions,
    python: str,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    variables: list[dict[str, Any]] = [
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        # for one pod too: an indexed job looks like one of several, and JAX would ask the cluster
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-run-0-0.{name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(options.nodes)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        *({"name": key, "value": value} for key, value in environment.items()),
    ]
    limits = dict(options.resources)
    if options.gpus:
        limits["nvidia.com/gpu"] = str(options.gpus)
    mounts = [{"name": claim, "mountPath": path} for claim, path in options.claims.items()]
    container = {
        "name": "scjax",
        "image": options.image,
        "command": [*experiment.command(python), *point.flags],
        **({"workingDir": options.directory} if options.directory else {}),
        "env": variables,
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {"limits": limits, "requests": dict(limits)} if limits else {},
        # the collectives of GPUs want more shared memory than a container is given
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *mounts],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.notice,
        "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in options.claims),
        ],
        **({"nodeSelector": dict(options.selector)} if options.selector else {}),
    }
    job = {
        "completionMode": "Indexed",
        "completions": options.nodes,
        "parallelism": options.nodes,
        "backoffLimit": 0,  # one pod lost is all lost: the JobSet starts them together
        # what is no fault of the run fails the job for the reason PodFailurePolicy, which the JobSet knows
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "scjax", "operator": "In", "values": [REQUEUE]},
                },
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"spec": pod},
    }
    namespace = {"namespace": options.namespace} if options.namespace else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, **namespace, "annotations": {"scjax/workdir": point.workdir}},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "run", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _name(text: str, nodes: int, points: int) -> str:
    """A name that Kubernetes takes, short enough that the names of pods made of it are."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name or not name[0].isalpha():
        name = f"run-{name}".strip("-")
    longest = len(f"-{points - 1}" if points > 1 else "") + len(f"-run-0-{nodes - 1}-xxxxx")
    return name[: 63 - longest].strip("-")
