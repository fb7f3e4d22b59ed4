"""A run of the tiny model with probes; the tests give it a corpus."""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(str(pathlib.Path(__file__).parent / "tiny_config.py"))["get_config"]()
    config.train.probe_every = 8
    config.validation.probe_group = "donor"
    return config
