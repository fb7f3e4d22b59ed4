"""Every test runs on the CPU with eight virtual devices unless told otherwise."""

import os

from s3 import file_server, s3_corpus, s3_port, s3_proxy  # noqa: F401  (fixtures)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the suite's time and its arrays are tiny: let LLVM optimise less.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)
