"""Sanity gates and comparisons: what must hold before a score is worth reading, and what it then says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import pandas as pd

from scjax.eval import tables
from scjax.eval.schema import MEAN, METRICS
from scjax.eval.tasks import TASKS, Leading


class Gate(NamedTuple):
    """One finding about an evaluation.

    ``fail``: the scores do not speak for the model or must not be believed; ``caution``: read with care;
    ``note``: for the record; ``pass``: checked and in order.
    """

    level: Literal["fail", "caution", "note", "pass"]
    message: str


class Score(NamedTuple):
    """A score by which models are judged: one metric of one table."""

    task: str
    track: str
    metric: str
    head: str
    setting: str

    @property
    def title(self) -> str:
        return tables.heading(self.task, self.track)

    def pick(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of this score and its differences."""
        chosen = frame["label"].eq("") & frame["status"].eq("ok")
        for name, value in self._asdict().items():
            chosen &= frame[name].eq(value)
        return frame[chosen]


TWIN, BEST = "random-initialised twin", "best simple baseline"  # what a model is compared with


def leading(frame: pd.DataFrame) -> list[Score]:
    """The leading score of every table; where it was skipped, what stands in for it."""
    found = []
    for task, track, rows in tables.sections(frame):
        scores = [_score(task, track, leading) for leading in TASKS[task].leading]
        found.append(next((s for s in scores if len(s.pick(rows))), scores[0]))
    return found


def _score(task: str, track: str, leading: Leading) -> Score:
    return Score(task, track, leading.metric, leading.head, leading.setting)


def state(difference: Mapping[str, Any]) -> Literal["ahead", "behind", "unclear"]:
    """Where a paired difference lies with 95 % confidence."""
    _, low, high = tables.advantage(difference)
    if low > 0:
        return "ahead"
    return "behind" if high < 0 else "unclear"


def summary(frame: pd.DataFrame, model: str) -> list[str]:
    """One sentence per task: where the model stands against its twin and the best simple baseline."""
    words = {"ahead": "ahead of", "behind": "behind", "unclear": "not clearly apart from"}
    sentences = []
    for score in leading(frame):
        rows = score.pick(frame[frame["model_id"].eq(model)])
        parts = []
        for role in (TWIN, BEST):
            found = _apart(rows[rows["versus_role"] == role]).to_dict("records")
            states = [state(r) for r in found]
            if not found:
                continue
            other = f"its {role}" if role == TWIN else f"{found[0]['versus']}, the {role},"
            if len(set(states)) == 1:
                parts.append(f"{words[states[0]]} {other}")
            elif "ahead" not in states:
                parts.append(f"not ahead of {other} in any of {len(states)} held-out groups")
            else:
                parts.append(f"ahead of {other} in {states.count('ahead')} of {len(states)} held-out groups")
        if parts:
            sentences.append(f"{score.title}: {model} is {' and '.join(parts).rstrip(',')}.")
    return sentences


def gates(frame: pd.DataFrame, facts: Mapping[str, Any]) -> list[Gate]:
    """All gates of an evaluation, the worst first."""
    found = list(_data(frame, facts))
    for model in dict.fromkeys(frame.loc[_models(frame), "model_id"]):
        for score in leading(frame):
            found += _controls(model, score, frame)
            found += _twin(model, score.pick(frame[frame["model_id"].eq(model)]))
        found += _batch_axis(model, frame)
        if model not in facts.get("twins", {}) and frame["task"].ne("invariance").any():
            how = "(controls= or twins=): what pretraining adds to its architecture is not known."
            found.append(Gate("caution", f"No random-initialised twin of {model} was given {how}"))
    order = ("fail", "caution", "note", "pass")
    return sorted(dict.fromkeys(found), key=lambda gate: order.index(gate.level))


def _apart(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of single held-out groups where these are few enough to be read one by one, else of their mean."""
    single = rows[rows["group"] != MEAN]
    return single if 0 < single["group"].nunique() <= 3 else rows[rows["group"] == MEAN]


def _controls(model: str, score: Score, frame: pd.DataFrame) -> Iterator[Gate]:
    """Controls that know nothing of what is asked must score below the model."""
    task = TASKS[score.task]
    rows = frame[frame["model_id"].isin(task.blind) & frame["metric"].eq(score.metric)]
    own_head = rows[rows["head"].ne(score.head) & ~rows["head"].isin(frame.loc[_models(frame), "head"])]
    rows = pd.concat(
        [score.pick(frame), *(score._replace(head=h).pick(own_head) for h in own_head["head"].unique())]
    )
    rows = _apart(rows[rows["versus"].eq("")])
    metric = METRICS[score.metric]
    sign = -1 if metric.direction == "min" else 1
    for group, of in rows.groupby("group", sort=False):
        value = dict(zip(of["model_id"], of["value"], strict=True))
        blind = [m for m in task.blind if m in value]
        if model not in value or not blind:
            continue
        where = f"{score.title}, {metric.title}{f', {group}' if group else ''}: "
        own = f"{model} {value[model]:.3f}"
        above = [f"{m} {value[m]:.3f}" for m in blind if sign * value[m] >= sign * value[model]]
        if above:
            text = f"{where}{own} is not better than {', '.join(above)}, which know nothing of what is asked."
            yield Gate("fail", text)
        else:
            yield Gate("pass", f"{where}{own} is better than {', '.join(blind)}.")


def _models(frame: pd.DataFrame) -> pd.Series:
    return frame["model_kind"].eq("model")


def _twin(model: str, rows: pd.DataFrame) -> Iterator[Gate]:
    """The same architecture before training must score below the model."""
    for r in _apart(rows[rows["versus_role"] == TWIN]).to_dict("records"):
        where = f"{tables.heading(r['task'], r['track'])}, {tables.describe(r)}: "
        by = tables.number(r, signed=True)
        value, low, _ = tables.advantage(r)
        if value <= 0:
            yield Gate("fail", f"{where}{model} is not ahead of its {TWIN} ({by}).")
        elif low <= 0:
            yield Gate(
                "caution", f"{where}{model} is ahead of its {TWIN} by {by}; the interval includes zero."
            )
        else:
            yield Gate("pass", f"{where}{model} is ahead of its {TWIN} by {by}.")


def _batch_axis(model: str, frame: pd.DataFrame) -> Iterator[Gate]:
    """Noise mixes batches; say so where it is beside the model's own score."""
    rows = Score("integration", "", "batch", "", "").pick(frame)
    rows = rows[rows["versus"].eq("")]
    value = dict(zip(rows["model_id"], rows["value"], strict=True))
    if "noise" in value and model in value and value["noise"] >= value[model]:
        than = f"({value['noise']:.3f}) than {model} ({value[model]:.3f})"
        yield Gate(
            "caution",
            f"Integration: pure noise mixes batches better {than}, as it nearly always does; batch mixing "
            "means nothing without bio conservation beside it.",
        )


def _data(frame: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[Gate]:
    """What the data, the splits and the machine did not allow."""
    for task in dict.fromkeys(frame.loc[frame["split_scheme"].str.contains("CELLS"), "task"]):
        yield Gate(
            "caution",
            f"{TASKS[task].title} was split over CELLS, not groups: cells of one donor or study are on both "
            "sides, so these scores do not speak for new donors or studies (give group_key).",
        )
    skipped = frame[frame["status"] == "skipped"].drop_duplicates(["model_id", "task", "note"])
    for task, note in skipped.groupby(["task", "note"], sort=False).groups:
        names = skipped.loc[skipped["task"].eq(task) & skipped["note"].eq(note), "model_id"]
        yield Gate("caution", f"{TASKS[task].title}: skipped for {', '.join(names)}: {note}.")
    for group, names in facts.get("unseen_labels", {}).items():
        yield Gate(
            "note",
            f"Annotation, {group}: no training cell had the label {', '.join(names)}; every method scores 0 "
            "on it (macro-F1 over the labels seen in training is given apart).",
        )
    n_groups = facts.get("n_groups", 0)
    if 0 < n_groups < 10:
        yield Gate(
            "note",
            f"Only {n_groups} groups: intervals are over cells of held-out groups and say nothing about the "
            "spread between groups; scores per group are shown.",
        )
    for level, message in facts.get("findings", []):  # what a task itself found wrong or right
        yield Gate(level, message)
    overlap = facts.get("pretrain_overlap", "unknown")
    if overlap != "none":
        yield Gate("note", f"Overlap of these cells with the pretraining data: {overlap}.")
