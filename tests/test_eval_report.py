"""The report of an evaluation: complete, honest about what is missing, readable without a network."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic import synthetic_adata

import scjax.eval
from scjax.eval import figures
from scjax.eval.compare import conclude
from scjax.eval.tasks import TASKS


class Page(HTMLParser):
    """What a reader of the page would meet: text by element, addresses, rows of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.images: dict[str, str] = {}
        self.ids: set[str] = set()
        self.rows: list[tuple[str, list[str]]] = []  # class of the row, text of its cells
        self.shouts = ""
        self.inside_shout = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [given[k] for k in ("src", "href", "action", "data") if k in given]
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "img":
            self.images[given["alt"]] = given["src"]
        if tag == "tr":
            self.rows.append((given.get("class") or "", []))
        if tag in ("td", "th") and self.rows:
            self.rows[-1][1].append("")
        if tag == "div":
            self.inside_shout += bool(self.inside_shout) or given.get("class") == "shout"
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass
        if tag == "div" and self.inside_shout:
            self.inside_shout -= 1

    def handle_data(self, data):
        if {"style", "script"} & set(self.open):
            return
        self.text += data
        if self.inside_shout:
            self.shouts += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data


CURVES = [
    {"step": 10 * i, "train/masked_mse": 0.1 + 0.1 / i, "train/gene_mean_mse": 0.16, "train/none": None}
    for i in range(1, 41)
] + [{"step": 400, "validation/masked_mse": 0.12, "validation/gene_mean_mse": 0.16}]  # fmt: skip


@pytest.fixture(scope="module")
def results() -> scjax.eval.Results:
    adata = synthetic_adata(240)
    rng = np.random.default_rng(1)
    types = np.eye(4, 8)[adata.obs["cell_type"].cat.codes]
    adata.obsm["X_model"] = 3 * types + rng.normal(size=(240, 8))
    adata.obsm["X_before"] = rng.normal(size=(240, 8))
    controls = {"random_init": "X_before"}
    return scjax.eval.run(
        adata, ["X_model"], batch_key="batch", group_key="study", controls=controls, n_boot=50
    )


@pytest.fixture(scope="module")
def page(results, tmp_path_factory) -> Page:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    title, facts = (
        "Blood <script>alert(1)</script> & bone",
        {"parameters": 1234567, "model": "runs/quickstart"},
    )
    assert results.report(path, title=title, curves=CURVES, facts=facts) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_needs_no_network(page):
    assert page.addresses
    for address in page.addresses:
        assert address.startswith(("data:image/svg+xml;base64,", "#")), address[:80]
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= page.ids


def test_every_figure_is_a_picture(page):
    names = {
        *("Loss curves", "Confusion matrix of X_model", "F1 per label"),
        *("Bio conservation against batch mixing", "UMAP of the representations"),
        *(f"{t}: paired differences of X_model" for t in ("Annotation", "Clustering", "Integration")),
    }
    assert names <= set(page.images)
    for address in page.images.values():
        picture = ElementTree.fromstring(base64.b64decode(address.split(",", 1)[1]))
        assert picture.tag.endswith("svg") and len(list(picture.iter())) > 20


def test_the_title_is_text_not_markup(page):
    assert "<script>alert(1)</script> & bone" in page.text


def test_the_verdict_names_twin_and_baseline(page):
    assert "Annotation: X_model is ahead of its random-initialised twin and" in page.text
    assert "the best simple baseline" in page.text and not page.shouts
    assert "interval" in page.text and "say nothing about the spread between groups" in page.text


def test_tables_hold_values_intervals_and_greyed_controls(results, page):
    classes = {cells[0]: kind for kind, cells in page.rows if cells}
    assert classes["X_modelmodel"] == "model" and "twin" in classes["random_initcontrol"]
    for control in ("noisecontrol", "depth_onlycontrol", "majoritycontrol", "collapsedcontrol"):
        assert "control" in classes[control]
    assert "oracle" in classes["oracleoracle"] and "baseline" in classes["pcabaseline"]
    wanted = {"model_id": "X_model", "metric": "macro_f1", "group": "study0"}
    value = next(r for r in results.rows if wanted.items() <= r.items())
    shown = f"{value['value']:.3f}{value['ci_low']:.3f} to {value['ci_high']:.3f}"
    assert any(shown in cells for _, cells in page.rows)
    headings = " ".join(cell for _, cells in page.rows for cell in cells)
    for name in (
        "on study0",
        "Leiden, resolution 1.0",
        "BRAS",
        "CiLISI",
        "graph connectivity",
        "PCR comparison",
    ):
        assert name in headings


def test_training_is_set_beside_the_gene_means(page):
    assert "Validation error on masked values at the end: 0.1200" in page.text
    assert "25 % below" in page.text and "gap 0.0400" in page.text


def test_the_data_card_says_what_was_scored(page):
    data = ("240 scored of 240", "study0 (", "each group held out in turn", "overlap with pretraining data")
    for part in (*data, "1,234,567", "runs/quickstart", "numpy " + np.__version__):
        assert part in page.text, part


def test_systems_that_classify_are_set_beside_the_frequencies(results, tmp_path):
    curves = [{"step": s, "train/masked_ce": 2.0 + 1 / s, "train/frequency_ce": 4.0} for s in range(1, 41)]
    page = Page(results.report(tmp_path / "r.html", curves=curves).read_text())
    assert "Predicting from frequencies alone: 4.0000. The model is 49 % below" in page.text
    assert "Loss curves" in page.images


def test_curves_come_from_a_file_too_and_bad_news_is_told(results, tmp_path):
    log = tmp_path / "metrics.jsonl"
    worse = [{"step": s, "masked_mse": 0.2, "gene_mean_mse": 0.16} for s in range(1, 9)]
    log.write_text("".join(json.dumps(r) + "\n" for r in worse) + '{"step": 9, "mask')
    page = Page(results.report(tmp_path / "r.html", curves=log).read_text())
    assert "The model does no better than gene means" in page.text and "Loss curves" in page.images
    bare = Page(
        results.report(
            tmp_path / "r.html", curves=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
        ).read_text()
    )
    assert "Train loss: 2.0000 at the start, 1.5000 at the end" in bare.text
    assert "Loss curves" not in Page(results.report(tmp_path / "r.html").read_text()).images


def test_a_model_that_noise_beats_is_shouted_about(tmp_path):
    rng = np.random.default_rng(5)
    adata = synthetic_adata(160)
    adata.obsm["X_model"] = rng.normal(size=(160, 6))
    found = scjax.eval.run(adata, ["X_model"], ["annotation"], group_key="study", n_boot=20, maps=False)
    page = Page(found.report(tmp_path / "r.html").read_text())
    assert "Do not rest a claim on these scores" in page.shouts and "X_model" in page.shouts
    assert "No random-initialised twin of X_model was given" in page.text
    assert not {"integration", "clustering", "maps"} & page.ids


def test_a_report_is_made_from_saved_results(results, tmp_path, page):
    results.to_jsonl(tmp_path / "r.jsonl")
    again = Page(scjax.eval.Results.read(tmp_path / "r.jsonl").report(tmp_path / "r.html").read_text())
    assert {k: v for k, v in page.images.items() if k != "Loss curves"} == again.images
    assert again.rows == page.rows


def test_without_matplotlib_the_page_says_so(results, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    page = Page(results.report(tmp_path / "r.html", curves=CURVES).read_text())
    assert not page.images and "Figures are left out: not installed: matplotlib" in page.text
    assert "25 % below" in page.text and len(page.rows) > 20


# ------------------------------------------------------------------ every task, from its entry in the schema

KINDS = {"M": "model", "random_init": "control", "simple": "baseline", "other": "baseline", "top": "oracle"}


def made_up(task: str, tracks: tuple[str, ...] = ("",)) -> scjax.eval.Results:
    """Rows as the task's module would add them: every metric of its table, for models and rivals."""
    rng = np.random.default_rng(0)
    out = scjax.eval.Results(facts={"dataset": "made up", "twins": {"M": "random_init"}})
    kinds = KINDS | dict.fromkeys(TASKS[task].blind, "control")
    for track in tracks:
        for model, kind in kinds.items():
            level = {"model": 0.6, "baseline": 0.5, "oracle": 0.9}.get(kind, 0.2)
            seen = set()
            for block in TASKS[task].columns:
                for metric in block.metrics:
                    place = (metric, *sorted(block.fields.items()))
                    if place in seen:
                        continue
                    seen.add(place)
                    score = level + 0.01 * rng.normal(size=31)
                    about = {"task": task, "track": track, "model_id": model, "model_kind": kind}
                    about |= {"head": TASKS[task].leading[0].head} | dict(block.fields)
                    out.add(score, **about, metric=metric)
    return conclude(out, {"M": "random_init"})


@pytest.mark.parametrize("task", TASKS)
def test_a_task_needs_no_more_than_its_entry_in_the_schema(task, tmp_path):
    found = made_up(task, ("one", "two"))
    page = Page(found.report(tmp_path / "r.html").read_text())
    assert TASKS[task].title in page.text and TASKS[task].intro in page.text
    assert re.sub(r"\W+", "-", task) in page.ids
    headings = [cell for _, cells in page.rows for cell in cells]
    for block in TASKS[task].columns:
        assert block.over in headings
    shown = {r["model_id"] + r["model_kind"] for r in found.rows}
    assert shown <= {cells[0] for _, cells in page.rows}
    own = [r for r in found.rows if r["model_id"] == "M" and not r["versus"]]
    for r in own[:3] + own[-3:]:
        wanted = f"{r['value']:.3f}{r['ci_low']:.3f} to {r['ci_high']:.3f}"
        assert any(wanted in cells for _, cells in page.rows), r
    text = found.report(tmp_path / "r.md").read_text()
    assert f"## {TASKS[task].title}" in text and f"{own[0]['value']:.3f}" in text


def test_many_parts_are_shown_in_one_picture_and_folded(tmp_path):
    found = made_up("genes/property", tuple(f"part{i}" for i in range(5)))
    page = Page(found.report(tmp_path / "r.html").read_text())
    assert "Gene properties: AUROC in every part" in page.images and "Tables of all 5 parts" in page.text


def test_lower_is_better_where_the_metric_says_so(tmp_path):
    found = made_up("modalities/matching")  # FOSCTTM: M 0.6 is worse than the baselines, 0.5
    html = found.report(tmp_path / "r.html").read_text()
    assert "Lower is better: FOSCTTM" in html
    value = next(r["value"] for r in found.rows if r["model_id"] == "M" and r["metric"] == "foscttm")
    assert not re.search(rf'<td class="best[^>]*>{value:.3f}', html)
    assert "M is behind" in html and 'class=" behind"' in html


# ----------------------------------------------------------------------------------- pictures from panels


@pytest.fixture
def readable(monkeypatch):
    """Text of figures as text, so that a test can read it."""
    monkeypatch.setitem(figures.STYLE, "svg.fonttype", "none")


def with_panels(task: str, *panels: dict) -> scjax.eval.Results:
    found = made_up(task)
    found.panels += panels
    return found


def texts(page: Page, name: str) -> list[str]:
    svg = ElementTree.fromstring(base64.b64decode(page.images[name].split(",", 1)[1]))
    return ["".join(e.itertext()) for e in svg.iter() if e.tag.endswith("}text")]


def test_perturbations_one_by_one_beside_the_training_mean(readable, tmp_path):
    panel = {"panel": "effects", "track": "", "baseline_id": "other"}
    panel |= {"names": ["a", "b", "c", "d"], "effect": [1, 2, 3, 4], "baseline": [0.1, 0.5, 0.2, None]}
    found = with_panels("perturbation", panel)
    for name, value in zip("abcd", (0.3, 0.4, 0.6, 0.9), strict=True):
        about = {"task": "perturbation", "model_id": "M", "model_kind": "model"}
        found.add([value], **about, metric="pearson_delta", label=name)
    page = Page(found.report(tmp_path / "r.html").read_text())
    assert "M: ahead in 2 of 3" in texts(page, "Model against training mean")
    assert "Score by size of the effect" in page.images
    heat = texts(page, "Calibrated scores")
    assert "M" in heat and "0.60" in heat and "RMSE" in heat


def test_precision_recall_with_the_line_of_chance(readable, tmp_path):
    panels = [
        {"panel": "pr_curve", "task": "network", "track": t, "model_id": m, "model_kind": KINDS[m]}
        | {"recall": [0.1, 0.5, 1.0], "precision": [0.9, 0.4, 0.02], "prevalence": 0.02}
        for t in ("TRRUST", "other truth")
        for m in ("M", "simple", "top")
    ]
    page = Page(with_panels("network", *panels).report(tmp_path / "r.html").read_text())
    shown = texts(page, "Precision and recall")
    assert {"TRRUST", "other truth", "M", "simple", "recall (prevalence 0.02)"} <= set(shown)
    assert "top" not in shown  # an oracle would only set the scale


def test_calibration_pools_many_groups(readable, tmp_path):
    panels = [
        {"panel": "calibration", "model_id": "M", "model_kind": "model", "head": "logistic"}
        | {"group": f"g{i}", "confidence": [0.2, 0.8], "accuracy": [0.1, 0.9], "n": [5, i]}
        for i in range(5)
    ]
    page = Page(with_panels("annotation", *panels).report(tmp_path / "r.html").read_text())
    assert "held out: each of 5 groups" in texts(page, "Calibration")
    page = Page(with_panels("annotation", *panels[:2]).report(tmp_path / "r.html").read_text())
    assert {"held out: g0", "held out: g1"} <= set(texts(page, "Calibration"))


def test_sections_features_and_few_labels(readable, tmp_path):
    xy = np.random.default_rng(0).normal(size=(20, 2)).round(2).tolist()
    panel = {"panel": "sections", "section": "s1", "xy": xy, "names": ["cortex", "white matter"]}
    panel |= {"truth": [0, 1] * 10, "predicted": {"M": [0] * 20, "simple": [0, 1] * 10, "other": [1] * 20}}
    page = Page(with_panels("spatial/niche", panel).report(tmp_path / "r.html").read_text())
    shown = texts(page, "Regions of the sections")
    assert {"truth", "M: 50 % right", "s1", "cortex"} <= set(shown)
    assert len({"simple: 100 % right", "other: 50 % right"} & set(shown)) == 1  # the best baseline alone
    names = ["CD3", "CD4", "CD8"]
    panel = {"panel": "features", "names": names, "value": {"M": [0.5, None, 0.1], "simple": [0.2, 0.3, 0.4]}}
    page = Page(with_panels("modalities/prediction", panel).report(tmp_path / "r.html").read_text())
    assert set(names) <= set(texts(page, "Feature by feature"))
    wide = panel | {"names": [f"f{i}" for i in range(90)], "value": {"M": list(np.linspace(0, 1, 90))}}
    page = Page(with_panels("modalities/prediction", wide).report(tmp_path / "r.html").read_text())
    assert "features in order of their own score, % of 90" in texts(page, "Feature by feature")
    page = Page(made_up("annotation/few-shot").report(tmp_path / "r.html").read_text())
    assert {"1", "5", "10", "50", "M"} <= set(texts(page, "Scores with few labels"))


# --------------------------------------------------------------------------------------------- Markdown


def test_markdown_says_the_same_and_its_pictures_are_beside_it(results, page, tmp_path):
    path = tmp_path / "out" / "report.md"
    folder = path.parent / "report_files"
    folder.mkdir(parents=True)
    (folder / "stale.svg").write_text("from an earlier report")
    assert results.report(path, title="Blood | *bone*", curves=CURVES) == path
    text = path.read_text()
    assert text.startswith("# Blood \\| \\*bone\\*\n")
    found = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text)
    assert {name.replace("\\", "") for name, _ in found} == set(page.images)
    assert {address for _, address in found} == {f"report_files/{f.name}" for f in folder.iterdir()}
    assert sorted(f.name for f in path.parent.iterdir()) == ["report.md", "report_files"]
    for r in results.rows:  # every score of the page's tables, and no table torn by a bar
        if r["metric"] == "bio" and not r["versus"]:
            assert f"{r['value']:.3f} \\[{r['ci_low']:.3f}, {r['ci_high']:.3f}\\]" in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    lines = text.splitlines()
    noise = next(line for line in lines if line.startswith("| *noise* (control) |"))
    assert all(cell.strip() == "" or cell.strip().startswith("*") for cell in noise.split("|")[2:-1])
    assert any(line.startswith("| **X\\_model** (model) |") for line in lines)
    assert "25 % below" in text and "numpy " + np.__version__ in text


def test_markdown_needs_neither_jinja_nor_matplotlib(results, tmp_path, monkeypatch):
    for name in ("jinja2", "matplotlib"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    text = results.report(tmp_path / "r.md").read_text()
    assert "Figures are left out: not installed: matplotlib" in text and "![" not in text
    assert not (tmp_path / "r_files").exists()
    with pytest.raises(ImportError, match="jinja2.*ending in .md"):
        results.report(tmp_path / "r.html")
