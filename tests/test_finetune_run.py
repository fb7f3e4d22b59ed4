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
from scjax.cli.configs import job_model, load_config, run_of
from scjax.finetune import check_end
from scjax.train import CheckpointError, Restored

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
    adata.obs["tissue"] = np.array(["bone", "lung"])[np.arange(240) % 2]
    options = {"names": ["study"], "validation": 0.25, "split_by": "donor", "progress": False}
    scjax.build_corpus([adata], folder / "corpus", **options)
    told = {"context": {"tissue": {"kind": "label", "size": 2}, "assay": {"kind": "label", "size": 2}}}
    known = {"tissue": ["lung", "bone"], "assay": ["10x", "smart-seq"]}
    scjax.export_pretrained(base_handle(folder, told, known), folder / "base")
    return folder


def finetune(place, name, **options):
    known = {"cache": place / "cache", "data__corpus": place / "corpus", "start": place / "base"}
    labels = {"data__labels": "('cell_type', 'tissue')"}
    return runs.pretrain(CONFIG, place / name, script=SCRIPT, **(known | FEW | labels | options))


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
    # the base's own numbers; of its tokens the head was told the one that batches carry
    assert tuned.categories["tissue"] == ["lung", "bone"] and tuned.categories["assay"] == [
        "10x",
        "smart-seq",
    ]
    assert tuned.config["context"] == ["tissue"]
    cells = synthetic_adata(4, 48)
    cells.obs["tissue"], cells.obs["assay"] = "lung", "10x"
    assert tuned.context_in(cells)["labels"] == ["tissue"]
    told_of = report["tasks"]["cell_type"]
    assert 0 < told_of["judged"] < told_of["cells"] and told_of["rule"]["cells"] == told_of["judged"]
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
    # so does one that was killed with its last checkpoint, and before its report
    (cut / "report.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint 12 is the best state, not the last"):
        check_end(cut, restored_of(cut, 12), False)
    # the best state is handed over, and the run does not go on from it
    output = finetune(place, "run", train__steps=20, succeed=False)
    assert "checkpoint 12 is the best state, not the last" in output.splitlines()[-1]
    assert json.loads((place / "run" / "config.json").read_text())["train"]["steps"] == 12


def restored_of(run, step):
    cursor = json.loads((run / "checkpoints" / str(step) / "data" / "metadata").read_text())
    return Restored({}, cursor, step)


def test_what_a_config_costs_is_known_without_counting_classes(place):
    """``scjax config params|cost`` of classes whose frequencies the loss makes up for."""
    start = [f"start={place / 'base'}", "model.tasks.cell_type.logit_adjustment=1.0"]
    for more in ([f"data.corpus={place / 'corpus'}"], ["model.tasks.cell_type.size=4", "data.corpus=none"]):
        job, n_genes = job_model(run_of(load_config(CONFIG, [*start, *more])), None)
        assert n_genes == 48 and job.model["tasks"]["cell_type"]["prior"] == (0.25,) * 4


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
