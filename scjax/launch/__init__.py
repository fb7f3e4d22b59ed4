"""Starting runs: on this machine, under Slurm, on Kubernetes, on TPU pods. No JAX import."""
