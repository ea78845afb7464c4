"""`rollout-ft config template`: what was learned about a model's chat template, for people and tools.

Owns the words of the report. Decides nothing: what is refused at start is refused by `load_renderer`.
"""

from __future__ import annotations

from dataclasses import asdict

import orjson

from rollout_ft.config import Config
from rollout_ft.session.drift import Drift, check, unchecked_renderer
from rollout_ft.session.render import ChatTemplate
from rollout_ft.types import JSON


def report(config: Config, as_json: bool) -> str:
    renderer = unchecked_renderer(config)
    drifts = check(renderer)
    return orjson.dumps(_data(renderer, drifts)).decode() if as_json else "\n".join(_lines(renderer, drifts))


def _data(renderer: ChatTemplate, drifts: tuple[Drift, ...]) -> JSON:
    traits = asdict(renderer.traits) | {name: sorted(getattr(renderer.traits, name)) for name in ("stop_ids", "opening", "appendable")}
    return {"splices": all(d.kind != "structure" for d in drifts), "traits": traits, "conversations": [asdict(d) for d in drifts]}


def _lines(renderer: ChatTemplate, drifts: tuple[Drift, ...]) -> list[str]:
    traits = renderer.traits
    stops = ", ".join(f"{renderer.text([i], keep_special=True)!r} ({i})" for i in sorted(traits.stop_ids))
    lines = [
        f"a turn ends with        {stops}",
        f"and is closed by        {traits.closing!r}, after calls by {traits.call_closing!r}",
        f"a conversation opens by {', '.join(sorted(traits.opening))}",
        f"and goes on with        {', '.join(sorted(traits.appendable))}",
        f"tool definitions        {'rendered' if traits.tools else 'not rendered'}; calls in a turn: {traits.calls}",
    ]
    lines += [f"generation prompt       {p.text!r} {p.kwargs or ''}".rstrip() for p in traits.prompts]
    for drift in drifts:
        lines.append(f"{drift.kind:<14} {drift.conversation}")
        if drift.kind == "not_rendered":
            lines.append(f"    {drift.expected}")
        elif drift.kind != "same":
            lines += [f"    at token {drift.position} the whole has {drift.expected!r}", f"    and the continued one {drift.actual!r}"]
    return lines
