"""What watches the cluster: whether its metrics leave it, and who reads them.

Owns the questions to Prometheus and Grafana, as Ray's own dashboard asks them: where the environment of the head says that
they are. Judges nothing. It runs on the nodes.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rollout_ft.types import JSON

TIMEOUT_S = 3.0
BOARD, GROUP = "rollout-ft", "rollout_ft"
"""The board's uid in Grafana, and the name of the rules' group in Prometheus."""
PROMETHEUS, GRAFANA = ("RAY_PROMETHEUS_HOST", "http://localhost:9090"), ("RAY_GRAFANA_HOST", "http://localhost:3000")
BOARDS_DIR, DISCOVERY = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", "prom_metrics_service_discovery.json"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Nodes are reached as they are: a proxy of the environment does not know them."""


@dataclass(frozen=True, slots=True)
class Monitoring:
    """As the head sees it. None: it could not be asked."""

    discovery: bool = True
    """Whether Ray keeps the file from which Prometheus learns of the nodes."""
    prometheus: str = ""
    prometheus_answers: bool = True
    scraped: bool | None = True
    """Whether Prometheus has metrics of this cluster."""
    rules: bool | None = True
    grafana: str = ""
    grafana_answers: bool = True
    board: bool | None = True
    """Whether Grafana, or the directory that Ray's Grafana reads its boards from, has ours."""


def exports(address: str, port: int) -> bool:
    """Whether the agent of this node shows its metrics."""
    return port > 0 and _get(f"http://{address}:{port}/metrics")[0] == 200


def look(environment: dict[str, str], session_dir: str) -> Monitoring:
    """From the head; `environment` is what its processes were started with."""
    prometheus, grafana = (environment.get(*where).rstrip("/") for where in (PROMETHEUS, GRAFANA))
    session = Path(session_dir)
    answers = _data(f"{prometheus}/api/v1/query?query=vector(1)") is not None
    health, _ = _get(f"{grafana}/api/health")
    status, _ = _get(f"{grafana}/api/dashboards/uid/{BOARD}") if health == 200 else (0, None)
    boards = environment.get(BOARDS_DIR) or str(session / "metrics" / "grafana" / "dashboards")
    there = any(f'"{BOARD}"' in _text(path) for path in Path(boards).glob("*.json")) or status == 200
    hidden = status in (401, 403)
    return Monitoring(
        (session / DISCOVERY).exists(), prometheus, answers, _scraped(prometheus, session.name) if answers else None,
        _rules(prometheus) if answers else None, grafana, health == 200, there or (None if hidden else False),
    )  # fmt: skip


def _scraped(prometheus: str, session: str) -> bool | None:
    query = urllib.parse.quote(f'count({{__name__=~"ray_node_.+", SessionName="{session}"}})')
    data = _data(f"{prometheus}/api/v1/query?query={query}")
    return bool(data.get("result")) if data is not None else None


def _rules(prometheus: str) -> bool | None:
    data = _data(f"{prometheus}/api/v1/rules")
    return any(group["name"] == GROUP for group in data["groups"]) if data is not None else None


def _data(url: str) -> JSON | None:
    """What Prometheus says; None from whatever else listens there."""
    _, answer = _get(url)
    if not isinstance(answer, dict) or answer.get("status") != "success":  # pyright: ignore[reportUnknownMemberType]
        return None
    return answer["data"]  # pyright: ignore[reportUnknownVariableType]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _get(url: str) -> tuple[int, Any]:
    """The status, 0 when nobody answers, and what JSON there is."""
    try:
        with _DIRECT.open(url, timeout=TIMEOUT_S) as answer:
            body = answer.read()
            return answer.status, orjson.loads(body) if "json" in answer.headers.get("content-type", "") else None
    except urllib.error.HTTPError as e:
        return e.code, None
    except (OSError, ValueError, http.client.HTTPException):
        return 0, None
