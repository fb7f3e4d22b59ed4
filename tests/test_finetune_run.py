"""experiments/finetune.py: from a base to a report, and on exactly where a stopped run stood."""

import json
import shutil

import jax
import numpy as np
import pytest
import runs
from finetuning import base_handle
from synthetic import synthetic_adata

import scjax

SCRIPT = runs.ROOT / "experiments" / "finetune.py"
CONFIG = str(runs.ROOT / "configs" / "finetune.py")
FEW = {
    "train__steps": 12,
    "train__eval_every": 3,
    "train__checkpoint_every": 4,
    "train__log_every": 1,
    "train__keep": 9,
    "optimizer__warmup_steps": 2,
    "data__batch_size": 16,
    "train__accumulate": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    adata = synthetic_adata(240, 48)
    options = {"names": ["study"], "validation": 0.25, "split_by": "donor", "progress": False}
    scjax.build_corpus([adata], folder / "corpus", **options)
    scjax.export_pretrained(base_handle(folder), folder / "base")
    return folder


def finetune(place, name, **options):
    known = {"cache": place / "cache", "data__corpus": place / "corpus", "start": place / "base"}
    return runs.pretrain(CONFIG, place / name, script=SCRIPT, **known, **FEW, **options)


def test_a_run_hands_over_its_best_state_and_goes_on_exactly(place):
    output = finetune(place, "run")
    assert "% of that of full fine-tuning" in output and "on the validation cells" in output
    report = json.loads((place / "run" / "report.json").read_text())
    errors = {
        m["step"]: m["validation/error"] for m in runs.metrics(place / "run") if "validation/error" in m
    }
    assert sorted(errors) == [3, 6, 9, 12] and report["step"] == min(errors, key=errors.get)
    told = np.load(place / "run" / "predictions.npz")
    assert told["cell_type/output"].shape == (report["tasks"]["cell_type"]["cells"], 4)
    tuned = scjax.load(place / "run")
    assert tuned.step == 12 and tuned.categories["cell_type"] == [f"type{i}" for i in range(4)]
    temperature = float(tuned.buffers["heads"]["cell_type"]["temperature"])
    assert temperature == pytest.approx(report["tasks"]["cell_type"]["temperature"], rel=1e-6)

    # a life that was cut short after step 4 goes on to the same end
    cut = place / "cut"
    shutil.copytree(place / "run", cut)
    (cut / "report.json").unlink()
    for later in (8, 12):
        shutil.rmtree(cut / "checkpoints" / str(later))
    finetune(place, "cut")
    jax.tree.map(np.testing.assert_array_equal, scjax.load(cut).params, tuned.params)
    assert json.loads((cut / "report.json").read_text()) == report
    assert runs.metrics(cut) == runs.metrics(place / "run")


@pytest.mark.full
def test_what_does_not_fit_is_told(place):
    for options, told in (
        ({"model__tasks__cell_type__source": "celltype"}, "did you mean 'cell_type'"),
        ({"model__lora__kernels": "('*attn*',)"}, "matches no path of the base"),
        ({"start": place / "nowhere"}, "nowhere"),
    ):
        known = {"cache": place / "cache", "data__corpus": place / "corpus", "start": place / "base"}
        output = runs.pretrain(
            CONFIG, place / "wrong", script=SCRIPT, succeed=False, **(known | FEW | options)
        )
        assert told in output.splitlines()[-1]
