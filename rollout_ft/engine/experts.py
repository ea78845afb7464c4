"""What a row of a model's routed experts is.

Owns where that is read: SGLang's replies do not say it, but its rows are as many layers and experts as the model's
config.json has. Raises ConfigError before anything is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from rollout_ft.config import Config, model_dir
from rollout_ft.engine.capture import Shape
from rollout_ft.errors import ConfigError

_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def shape_of(config: Config) -> Shape | None:
    """None when routed experts are not wanted. Raises ConfigError with the key to set."""
    if not config.samples.routed_experts:
        return None
    told = config.model.experts
    if told is not None:
        return Shape(told.layers, told.topk, told.count)
    path = Path(model_dir(config)) / "config.json"
    try:
        data: Any = orjson.loads(path.read_bytes())
        text: Any = data.get("text_config") or data
        count = next(text[name] for name in _COUNTS if text.get(name))
        return Shape(int(text["num_hidden_layers"]), int(text["num_experts_per_tok"]), int(count))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StopIteration):
        raise ConfigError(
            f"samples.routed_experts: {path} does not say how many layers and experts route a token; "
            "set model.experts: {layers, topk, count}, or a model that has experts"
        ) from None
