"""The report as Markdown, for a repository or a wiki: tables as text, pictures as SVG files beside it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scjax.eval import tables
from scjax.eval.pictures import Picture

if TYPE_CHECKING:
    from scjax.eval.report import Section, Table

LEVELS = {
    "fail": "Do not rest a claim on these scores",
    "caution": "Read with care",
    "note": "Further notes",
    "pass": "Checks that passed",
}


def write(content: Mapping[str, Any], path: Path) -> Path:
    """Write ``path`` and, where there are pictures, the folder ``<its stem>_files`` beside it.

    Controls are in italics; the best of models and baselines is bold. Both are replaced whole.
    """
    from scjax.eval.report import write_whole

    folder = path.with_name(f"{path.stem}_files")
    drawn = [*content["maps"], *(p for s in content["sections"] for p in s.pictures)]
    drawn += content["training"]["pictures"] if content["training"] else []
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        names: dict[int, str] = {}
        for picture in drawn:
            name = _slug(picture.name, names.values())
            partial.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(picture.svg)
            names[id(picture)] = name
        text = _text(content, {i: f"{folder.name}/{name}" for i, name in names.items()})
        if folder.exists():
            shutil.rmtree(folder)
        if partial.exists():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return write_whole(path, text)


def _slug(name: str, taken: Iterable[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    taken, number = set(taken), 1
    while (file := f"{stem}{'' if number == 1 else f'-{number}'}.svg") in taken:
        number += 1
    return file


def escape(text: str) -> str:
    """Text that stays text in Markdown, table cells included."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _text(content: Mapping[str, Any], address: Mapping[int, str]) -> str:
    out = [f"# {escape(content['title'])}", ""]
    if content["scored"]:
        out += [f"{escape(content['scored'])}. Everything stands beside the controls that it must beat.", ""]
    out += _gates(content, "fail")
    for verdict in content["verdicts"]:
        out += _verdict(verdict, content["few_groups"])
    for level in ("caution", "note", "pass"):
        out += _gates(content, level)
    if content["no_pictures"]:
        out += [f"Figures are left out: {escape(content['no_pictures'])}", ""]
    if training := content["training"]:
        out += ["## Training", "", _training(training), ""]
        out += _pictures(training["pictures"], address)
    for section in content["sections"]:
        out += _section(section, address)
    if content["maps"]:
        out += ["## Maps", ""]
        for key, entries in content["legend"]:
            out += [
                f"{escape(key)}: " + ", ".join(f"{escape(name)} {colour}" for name, colour in entries),
                "",
            ]
        out += _pictures(content["maps"], address)
    elif content["no_maps"]:
        out += ["## Maps", "", f"UMAP was skipped: {escape(content['no_maps'])}.", ""]
    out += ["## Data card", ""]
    out += grid(["", ""], [[escape(name), escape(text)] for name, text in content["card"]])
    if content["rows"]:
        out += ["What the rows are:", ""]
        out += [f"- {escape(name)}: {escape(text)}" for name, text in content["rows"].items()] + [""]
    out += [f"scjax {content['scjax']}. Every number is a row of the results table (`Results.to_jsonl`).", ""]
    return "\n".join(out)


def _gates(content: Mapping[str, Any], level: str) -> list[str]:
    found = [g.message for g in content["gates"] if g.level == level]
    if not found:
        return []
    items = [f"- {escape(m)}" for m in found]
    if level in ("fail", "caution"):
        return [f"> **{LEVELS[level]}**", ">", *(f"> {i}" for i in items), ""]
    return [f"<details><summary>{LEVELS[level]}</summary>", "", *items, "", "</details>", ""]


def _verdict(verdict: Mapping[str, Any], few_groups: int) -> list[str]:
    from scjax.eval.report import p_value

    def difference(cell: Mapping[str, Any] | None) -> str:
        if cell is None:
            return ""
        p = p_value(cell)
        return escape(tables.number(cell, signed=True)) + ("" if p is None else f", p {p:.2g}")

    out = [f"## {escape(verdict['model'])}", ""]
    out += [f"- {escape(s)}" for s in verdict["summary"]] or ["Nothing to compare with was scored."]
    head = [
        "score",
        verdict["model"],
        "minus its random-initialised twin",
        "minus the best simple baseline",
        "",
    ]
    body = [
        [
            escape(line["what"]),
            escape(tables.number(line["own"])),
            difference(line["twin"]),
            difference(line["best"]),
            escape(line["best"]["versus"]) if line["best"] else "",
        ]
        for line in verdict["lines"]
    ]
    out += ["", *grid([escape(h) for h in head], body)]
    note = (
        "95 % percentile intervals, paired on the same units; p corrected after Holm where several are asked."
    )
    if few_groups:
        note += (
            f" With {few_groups} groups the intervals resample cells of the held-out group and say nothing "
            "about the spread between groups."
        )
    return [*out, note, ""]


def _training(training: Mapping[str, Any]) -> str:
    t = training
    if "baseline" not in t:
        ends = f"{t['first']:.4f} at the start, {t['last']:.4f} at the end."
        return f"{t['split'].capitalize()} {t['error']}: {ends}"
    gap = t["baseline"] - t["last"]
    text = (
        f"{t['split'].capitalize()} error on masked values at the end: {t['last']:.4f}. Predicting from "
        f"{t['nothing']} alone: {t['baseline']:.4f}. "
    )
    if gap > 0:
        return text + f"The model is {100 * gap / t['baseline']:.0f} % below it (gap {gap:.4f})."
    return text + f"**The model does no better than {t['nothing']}** (gap {gap:+.4f})."


def _pictures(drawn: Iterable[Picture], address: Mapping[int, str]) -> list[str]:
    out = []
    for picture in drawn:
        out += [f"![{escape(picture.name)}]({address[id(picture)]})", ""]
        out += [escape(picture.caption), ""] if picture.caption else []
    return out


def _section(section: Section, address: Mapping[int, str]) -> list[str]:
    out = [f"## {escape(section.title)}", "", escape(section.intro), ""]
    if section.splits:
        out += [f"Split: {escape('; '.join(section.splits))}.", ""]
    overall = [p for p in section.pictures if "every part" in p.name] if section.folded else []
    out += _pictures(overall, address)
    if section.folded:
        out += [f"<details><summary>Tables of all {len(section.tracks)} parts</summary>", ""]
    for track, pieces in section.tracks.items():
        if track:
            out += [f"### {escape(track)}", ""]
        for piece in pieces:
            out += _table(piece)
    if section.folded:
        out += ["</details>", ""]
    out += [escape(section.note), ""]
    return out + _pictures([p for p in section.pictures if p not in overall], address)


def _table(table: Table) -> list[str]:
    head = [
        "representation",
        *(escape(f"{c.over}: {c.title}" if c.over else c.title) for c in table.columns),
    ]
    body = []
    for line in table.lines:
        style = "*" if line.kind in ("control", "oracle") else ""
        name = (
            f"**{escape(line.model_id)}**"
            if line.kind == "model"
            else f"{style}{escape(line.model_id)}{style}"
        )
        cells = []
        for best, cell in zip(table.best, line.cells, strict=True):
            text = escape(tables.number(cell))
            mark = "**" if text and best == line.model_id else style if text else ""
            cells.append(f"{mark}{text}{mark}")
        body.append([f"{name} ({line.kind})", *cells])
    return grid(head, body)


def grid(head: list[str], body: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)] if any(head) else ["---"] * len(head)
    return [f"| {' | '.join(r)} |".replace("\n", " ") for r in (head, rule, *body)] + [""]
