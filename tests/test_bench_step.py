"""The tool that races training steps: its scjax side, at the smallest size."""

import json

import bench_step
import numpy as np
import pytest


def test_a_row_of_the_table(capsys, tmp_path):
    options = "--contestants scjax --systems geneformer --size smoke --cells 2 --rounds 1 --warm-up 1".split()
    (line,) = bench_step.main([*options, "--markdown", str(tmp_path / "page.md")])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[0]) == line
    assert line["system"] in printed.splitlines()[-2]
    assert line["cells_per_s"]["scjax"] > 0 and line["ratio"] == {}
    assert 0 < line["padding"] < 0.2  # cells of about one length
    assert np.isfinite(line["loss"]["scjax"])
    page = (tmp_path / "page.md").read_text()
    assert f"| geneformer | 2 | 2 x {line['tokens']} |" in page and "jax " in page


def test_ratios_are_taken_round_by_round():
    seconds = {"scjax": [1.0, 10.0, 2.0], "tuned": [2.0, 20.0, 6.0]}
    assert bench_step.ratios(seconds) == {"tuned": 2.0}


def test_what_it_does_not_know_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_step.main(["--systems", "scgtp"])
    assert "scgtp" in capsys.readouterr().err
