"""The report of an evaluation: complete, honest about what is missing, readable without a network."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic import synthetic_adata

import scjax.eval


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
