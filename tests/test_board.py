"""The board and the alert rules against the metrics that there are: names, labels, values, and that nothing is left out."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rollout_ft.cli.doctor.monitoring import BOARD as UID
from rollout_ft.cli.doctor.monitoring import GROUP
from rollout_ft.telemetry.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metric

BOARD = json.loads(Path("configs/grafana/rollout_ft.json").read_text())
RULES = yaml.safe_load(Path("configs/grafana/alerts.yaml").read_text())["groups"]
PANELS: list[Any] = [panel for panel in BOARD["panels"] if panel["type"] not in ("row", "text")]
ALERTS: list[Any] = [rule for group in RULES for rule in group["rules"]]
NAME = re.compile(r"\bray_rollout_ft_(\w+)(?:\{([^}]*)\})?")
MATCH = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
GROUPED = re.compile(r"\b(?:by|on) \(([^)]+)\)")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def series(of: str) -> tuple[Metric, set[str]]:
    """The metric that a series on Ray's endpoint is of, and its labels."""
    for metric in COUNTERS.values():
        if of == f"{metric.name}_total":
            return metric, {"run", *metric.labels}
    for metric in HISTOGRAMS.values():
        if of.removeprefix(metric.name) in ("_bucket", "_count", "_sum"):
            return metric, {"run", *metric.labels} - (set() if of.endswith("_bucket") else {"le"})
    return GAUGES[of], {"run", *GAUGES[of].labels}


def exprs() -> Iterator[Any]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for rule in ALERTS:
        yield pytest.param(rule["expr"], id=rule["alert"])
    for annotation in BOARD["annotations"]["list"]:
        yield pytest.param(annotation["expr"], id=annotation["name"])


@pytest.mark.parametrize("expr", exprs())
def test_a_query_asks_for_metrics_labels_and_values_that_there_are(expr: str):
    asked = NAME.findall(expr)
    assert asked or "ALERTS{" in expr
    known = {"alertname"} if "ALERTS{" in expr else set[str]()
    for name, selectors in asked:
        metric, labels = series(name)
        known |= labels
        for label, _, wanted in MATCH.findall(selectors):
            assert label in labels, (name, label)
            if label in metric.labels and not wanted.startswith("$"):
                assert set(wanted.split("|")) <= set(metric.labels[label]), (name, label, wanted)
    for grouped in GROUPED.findall(expr):
        assert {label.strip() for label in grouped.split(",")} <= known


def test_every_metric_is_on_the_board():
    shown = {series(name)[0].name for panel in PANELS for target in panel["targets"] for name, _ in NAME.findall(target["expr"])}
    assert shown == {metric.name for metric in (COUNTERS | GAUGES | HISTOGRAMS).values()}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_asks_the_chosen_prometheus_for_the_chosen_runs(panel: Any):
    assert len(panel["description"]) > 20
    assert panel["datasource"] == DATASOURCE
    assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "heatmap"
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        assert all('run=~"$run"' in selectors for _, selectors in NAME.findall(target["expr"]))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_gauge_that_two_supervisors_tell_for_a_while_is_shown_once(panel: Any):
    for target in panel["targets"]:
        for found in NAME.finditer(target["expr"]):
            if found[1] in GAUGES:
                assert re.search(r"max( by \(run(, \w+)?\) )?\($", target["expr"][: found.start()]), target["expr"]


def test_panels_do_not_overlap_and_their_ids_are_their_own():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for a, b in itertools.combinations([panel["gridPos"] for panel in BOARD["panels"]], 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= 24 for at in (panel["gridPos"] for panel in BOARD["panels"]))


def test_the_doctor_looks_for_this_board_and_these_rules():
    assert BOARD["uid"] == UID
    assert [group["name"] for group in RULES] == [GROUP]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_so_how_bad_it_is_and_where_it_is_said_what_to_do(rule: Any):
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    assert re.search(rf"^### {rule['alert']}\n\*\*Why\.\*\* .+?\n\*\*Do\.\*\* ", Path(page).read_text(), re.MULTILINE | re.DOTALL)
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert "{{ $labels.run }}" in rule["annotations"]["summary"]


def test_the_page_names_every_metric():
    page = Path("docs/dashboards.md").read_text()
    assert [metric.name for metric in (COUNTERS | GAUGES | HISTOGRAMS).values() if f"`{metric.name}`" not in page] == []
