"""Many evaluations in one ranking: what may stand side by side, and what has no rank."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import planted

import scjax.eval
from scjax.eval import Results
from scjax.eval.compare import conclude
from scjax.eval.leaderboard import COLUMNS, problems, save, summary

CONTROLS = {"noise": 0.1, "majority": 0.15, "depth_only": 0.2}


def evaluation(model: str = "A", level: float = 0.8, **about: object) -> Results:
    """An annotation of three groups: one model at this level, two baselines, the controls."""
    about = {
        "dataset": "blood",
        "pretrain_overlap": "none",
        "n_cells": 100,
        "split_scheme": "by donor",
    } | about
    without = about.pop("without", ())
    baseline = about.pop("baseline", 0.6)
    levels = {model: level, "pca": baseline, "hvg": 0.5, **CONTROLS}
    out = Results(facts={"dataset": about["dataset"], "n_groups": 12, "pretrain_overlap": "none"})
    for i, (name, value) in enumerate(levels.items()):
        kind = "model" if name == model else "baseline" if name in ("pca", "hvg") else "control"
        if name in without:
            continue
        for group in ("mean of groups", *(f"g{j}" for j in range(12))):
            noise = np.random.default_rng([i, len(group)]).normal(size=41)
            score = np.append(value, value + 0.01 * noise)
            place = {"task": "annotation", "head": "majority" if name == "majority" else "logistic"}
            out.add(score, **place, model_id=name, model_kind=kind, metric="macro_f1", group=group, **about)
    return conclude(out)


def test_models_and_baselines_are_ranked_by_the_leading_score():
    board = scjax.eval.leaderboard([evaluation("A", 0.7), evaluation("B", 0.9), evaluation("C", 0.55)])
    assert tuple(board.columns) == COLUMNS
    assert list(board["model"]) == ["B", "A", "pca", "C", "hvg"]
    assert list(board["rank"]) == [1, 2, 3, 4, 5]
    first = board.iloc[0]
    assert first["versus"] == "pca" and first["difference"] == pytest.approx(0.3)
    assert first["ahead_of_baseline"] == "ahead" and board.iloc[3]["ahead_of_baseline"] == "behind"
    short = summary(board)
    assert list(short.index) == ["B", "A", "C"] and short.loc["B", "rivals_behind"] == 1
    assert list(short["ahead_of_best_baseline"]) == [1, 1, 0]


def test_lower_is_first_where_lower_is_better():
    found = []
    for model, value in (("A", 0.3), ("B", 0.1)):
        out = Results(facts={"n_groups": 0})
        rows = {model: ("model", value), "cca": ("baseline", 0.2), "noise": ("control", 0.5)}
        for name, (kind, x) in (rows | {"depth_only": ("control", 0.45)}).items():
            about = {"task": "modalities/matching", "metric": "foscttm", "pretrain_overlap": "none"}
            out.add([x, x - 0.01, x + 0.01], **about, model_id=name, model_kind=kind)
        found.append(conclude(out))
    board = scjax.eval.leaderboard(found)
    assert list(board["model"]) == ["B", "cca", "A"]
    assert board.iloc[0]["difference"] == pytest.approx(0.1)  # turned: above zero is ahead


def test_unknown_overlap_is_refused_or_labelled():
    unknown = evaluation("A", pretrain_overlap="unknown")
    with pytest.raises(ValueError, match="not known whether the pretraining of A saw these cells"):
        scjax.eval.leaderboard([unknown, evaluation("B")])
    board = scjax.eval.leaderboard([unknown, evaluation("B", 0.7)], allow_unknown=True)
    assert dict(zip(board["model"], board["pretrain_overlap"], strict=True))["A"] == "unknown"


@pytest.mark.parametrize(
    "other, message",
    [
        ({"n_cells": 90}, "n_cells 100 there and 90 here"),
        ({"split_scheme": "over CELLS"}, "split_scheme"),
        ({"baseline": 0.65}, "pca scores 0.600 and 0.650.*not the same data"),
        ({"model": "A"}, "both hold scores of A"),
    ],
)
def test_what_was_scored_otherwise_is_not_ranked_beside(other, message):
    with pytest.raises(ValueError, match=message):
        scjax.eval.leaderboard([evaluation("A"), evaluation(**({"model": "B"} | other))])


def test_other_data_sets_are_other_tables():
    board = scjax.eval.leaderboard(
        [evaluation("A"), evaluation("B", dataset="skin", n_cells=7, baseline=0.3)]
    )
    assert list(board["dataset"].unique()) == ["blood", "skin"] and set(board["rank"]) == {1, 2, 3}


def test_a_missing_control_is_a_problem_and_costs_the_rank():
    bare = evaluation("A", 0.99, without=("noise",))
    assert problems(bare) == ["Annotation: the control noise is missing."]
    assert problems(evaluation()) == []
    skipped = evaluation("A", without=("pca", "hvg"))
    skipped.skip("no counts", task="annotation", model_id="pca", model_kind="baseline", metric="macro_f1")
    assert problems(skipped) == ["Annotation: the control every simple baseline is missing."]
    board = scjax.eval.leaderboard([bare, evaluation("B", 0.7)])
    last = board.iloc[-1]
    assert last["model"] == "A" and pd.isna(last["rank"]) and "noise is missing" in last["problems"]
    assert board.iloc[0]["model"] == "B" and board.iloc[0]["rank"] == 1


def test_a_failed_gate_costs_the_rank():
    worse = evaluation("A", 0.05)
    assert any("not better than" in p for p in problems(worse))
    board = scjax.eval.leaderboard([worse, evaluation("B", 0.7)])
    assert pd.isna(board.set_index("model").loc["A", "rank"])
    assert board.set_index("model").loc["B", "problems"] == ""


def test_boards_are_written_from_files(tmp_path):
    files = []
    for name, level in (("A", 0.7), ("B|b", 0.9)):
        files.append(tmp_path / f"{name[0]}.jsonl")
        evaluation(name, level).to_jsonl(files[-1])
    board = scjax.eval.leaderboard(files)
    assert board.iloc[0]["source"] == str(files[1])
    text = save(board, tmp_path / "out" / "board.md").read_text()
    assert "| 1 | B\\|b | 0.900" in text and "## Annotation, blood" in text
    again = pd.read_csv(save(board, tmp_path / "board.csv"))
    assert list(again["model"]) == list(board["model"]) and list(again.columns) == list(COLUMNS)
    with pytest.raises(ValueError, match="as .md, .csv or .tsv"):
        save(board, tmp_path / "board.xlsx")
    with pytest.raises(ValueError, match="no scores of models"):
        scjax.eval.leaderboard([Results(facts={"a": 1})])


def test_compare_pairs_by_what_was_held_out():
    better, worse = evaluation("A", 0.8), evaluation("B", 0.7)
    found = scjax.eval.compare(better, worse)
    line = found.iloc[0]
    assert (line["first"], line["second"], line["n_units"]) == ("A", "B", 12)
    assert line["difference"] == pytest.approx(0.1) and line["wins"] == 1
    assert line["p_value"] < 0.001 and line["ci_low"] > 0
    back = scjax.eval.compare(worse, better).iloc[0]
    assert back["difference"] == pytest.approx(-0.1) and back["ci_high"] < 0
    same = scjax.eval.compare(better, evaluation("C", 0.8)).iloc[0]
    assert same["difference"] == 0 and same["p_value"] == 1
    with pytest.raises(ValueError, match="no table that has values of single units"):
        scjax.eval.compare(better, evaluation("B", dataset="skin"))
    with pytest.raises(ValueError, match="not the same data"):
        scjax.eval.compare(better, evaluation("B", baseline=0.9))


def test_few_units_have_no_interval():
    few = [evaluation(name, level) for name, level in (("A", 0.8), ("B", 0.7))]
    for r in few:
        r.rows = [row for row in r.rows if row["group"] in ("mean of groups", "g0", "g1", "g2")]
    line = scjax.eval.compare(*few).iloc[0]
    assert line["n_units"] == 3 and line["ci_low"] is None and line["p_value"] > 0.05


def test_real_evaluations_order_embeddings_by_their_quality():
    X, label, group, _ = planted(n=240)
    found = []
    for name in ("good", "weak"):
        out = Results(facts={"n_groups": 3})
        for which, kind in ((name, "model"), ("oracle", "baseline"), ("noise", "control")):
            about = {"name": which, "kind": kind, "n_boot": 20, "heads": ("logistic",)}
            one = scjax.eval.annotation(X[which], label, group, **about)
            out.extend(one)
        for r in out.rows:
            r["pretrain_overlap"] = "none"
        found.append(conclude(out))
    board = scjax.eval.leaderboard(found)
    assert list(board["model"]) == ["oracle", "good", "weak"]
    assert board["problems"].str.contains("majority is missing").sum() == 2
