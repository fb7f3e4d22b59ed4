"""Starting runs: on this machine, under Slurm, on Kubernetes and on TPU pods. No JAX import.

An experiment is a script with flags, as one would type it; what is made of it is a plain script or manifest
that can be read, kept and changed. A run that saved itself and left with :data:`scjax.launch.codes.REQUEUE`
is started again, and so is one whose machine was lost.
"""

from scjax.launch.capture import capture
from scjax.launch.codes import REQUEUE
from scjax.launch.experiment import Experiment, Point, read_experiment, sweep

__all__ = ["REQUEUE", "Experiment", "Point", "capture", "read_experiment", "sweep"]
