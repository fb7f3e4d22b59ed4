"""The tool that measures training: its scjax side, at the smallest size."""

import json

import bench_train
import numpy as np
import pytest
import roofline


def test_a_row_of_the_table(capsys, tmp_path):
    options = (
        "--contestants scjax --shapes geneformer-10m-2048 --smoke --cells 2 --steps 2 --warm-up 1".split()
    )
    (line,) = bench_train.main([*options, "--markdown", str(tmp_path / "page.md")])
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == line
    assert 256 < line["slots"] <= 2048 and line["slots"] % 64 == 0
    assert 0 <= line["input_wait"] < 1 and line["mfu"] is None and line["ratio"] == {}
    # a cell's tokens are those that are not padding, and its operations those of its tokens
    used = line["slots"] * (1 - line["padding"])
    assert line["tokens_per_s"] / line["cells_per_s"] == pytest.approx(used, rel=0.3)
    assert line["tflop_per_s"] > 0 and line["memory_gb"] > 0
    page = (tmp_path / "page.md").read_text()
    assert "| geneformer-10m-2048 | 1 | 2 x" in page and "MFU = operations" in page


def test_pooled_cells_have_about_as_many_genes_as_asked_for():
    adata = bench_train.pooled(1500, 40, seed=0)
    n = adata.X.getnnz(1)
    assert 1200 < np.median(n) < 2200 and len(set(n)) > 20
    assert (adata.X.data == np.round(adata.X.data)).all()


def test_what_it_does_not_know_is_refused(capsys):
    for options, message in (
        (["--shapes", "scgtp"], "scgtp"),
        (["--contestants", "scjax,flash"], "--device gpu"),
    ):
        with pytest.raises(SystemExit):
            bench_train.main(options)
        assert message in capsys.readouterr().err


def test_a_prediction_is_below_the_peak_and_follows_the_hardware():
    h200, h100 = (roofline.predict("geneformer-104m-2048", kind) for kind in ("H200", "H100"))
    assert h200["products"] == pytest.approx(h100["products"], rel=1e-3)  # of one peak
    assert h100["memory"] == pytest.approx(h200["memory"] * 4.8 / 3.35)
    assert 0 < h100["mfu"] < h200["mfu"] < roofline.PRODUCTS
    for shape in bench_train.SHAPES:
        assert roofline.predict(shape, "H200")["mfu"] < 1
