"""The command: connect, collect, judge, say.

Owns the words around the findings. A cluster that it had to start itself is judged as `run` would start it.
"""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from rollout_ft.cli.doctor.collect import collect
from rollout_ft.cli.doctor.rules import Facts, Finding, judge
from rollout_ft.cluster import connect, restore_signals
from rollout_ft.config import Config
from rollout_ft.telemetry.words import counted
from rollout_ft.types import JSON


def examine(config: Config, tokens_per_s: float) -> JSON:
    """`{findings: [{level, what, why, do}], nodes, node_loss_s, auth_mode, gcs_storage, watched}`."""
    cluster = connect(config.ray)
    restore_signals()
    try:
        facts = collect(config, cluster, tokens_per_s)
    finally:
        cluster.leave()
    return report(facts, judge(facts))


def report(facts: Facts, findings: list[Finding]) -> JSON:
    return {
        "findings": [asdict(finding) for finding in findings], "nodes": [asdict(node) for node in facts.nodes],
        "node_loss_s": {"gone": facts.health.gone_s, "hung": facts.health.hung_s}, "auth_mode": facts.auth_mode,
        "gcs_storage": facts.gcs_storage, "watched": asdict(facts.watched),
    }  # fmt: skip


def show(found: JSON, console: Console) -> None:
    for finding in found["findings"]:
        console.print(f"{finding['level']}: {finding['what']}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"  why: {finding['why']}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"  do:  {finding['do']}", highlight=False, markup=False, soft_wrap=True)
    problems = sum(finding["level"] == "problem" for finding in found["findings"])
    console.print(f"{counted(len(found['nodes']), 'node')}, {counted(problems, 'problem')}", highlight=False)


def code(found: JSON) -> int:
    return int(any(finding["level"] == "problem" for finding in found["findings"]))
