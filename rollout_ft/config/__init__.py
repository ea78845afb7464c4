"""Every setting, with its unit in its name and its meaning under it.

Owns the whole, loading and overriding it, and refusing. Each section is a file of its own. Knows nothing of what the
settings do. A config that loads can run: unknown keys and combinations that cannot work are refused here, with the key to
change, before anything is started.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from rollout_ft.config import combinations, sources
from rollout_ft.config.attach import AttachConfig
from rollout_ft.config.base import Seconds, Settings
from rollout_ft.config.calls import AdmissionConfig, RetryConfig
from rollout_ft.config.engine import VISIBLE, EngineConfig
from rollout_ft.config.fleet import FleetConfig
from rollout_ft.config.gateway import EVERYWHERE, GatewayConfig
from rollout_ft.config.model import ExpertsConfig, ModelConfig
from rollout_ft.config.ray import RayConfig
from rollout_ft.config.samples import SamplesConfig, SamplingConfig
from rollout_ft.config.session import SessionConfig
from rollout_ft.config.store import StoreConfig
from rollout_ft.config.telemetry import TelemetryConfig
from rollout_ft.config.trial import TrialConfig
from rollout_ft.errors import ConfigError

__all__ = [
    "EVERYWHERE", "VISIBLE", "AdmissionConfig", "AttachConfig", "Config", "EngineConfig", "ExpertsConfig", "FleetConfig",
    "GatewayConfig", "ModelConfig", "RayConfig", "RetryConfig", "SamplesConfig", "SamplingConfig", "SessionConfig", "StoreConfig",
    "TelemetryConfig", "TrialConfig", "journalled", "known_keys", "load", "model_dir",
]  # fmt: skip


class Config(Settings):
    run: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Name of the run: the first part of every actor's name."""
    seed: int = 0
    orphan_s: Seconds = 60
    """Without a sign of life from who started the run for so long, its actors end themselves."""
    ray: RayConfig = RayConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()
    store: StoreConfig = StoreConfig()
    fleet: FleetConfig = FleetConfig()
    session: SessionConfig = SessionConfig()
    sampling: SamplingConfig = SamplingConfig()
    samples: SamplesConfig = SamplesConfig()
    trial: TrialConfig = TrialConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        combinations.check(self.engine, self.model, self.session)
        return self


def load(path: str | Path | None = None, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides, and refuses what cannot work.

    Raises ConfigError naming the file, the key and the nearest known key.
    """
    data: dict[str, Any] = sources.read_file(Path(path)) if path else {}
    if isinstance(overrides, dict):
        for key, value in overrides.items():
            sources.put(data, key, value)
    for item in overrides if isinstance(overrides, list) else []:
        sources.apply(data, item)
    try:
        return Config.model_validate(data)
    except ValidationError as e:
        raise ConfigError("; ".join(_explain(err) for err in e.errors())) from None


def journalled(config: Config) -> bool:
    """Whether commits are on disk before they are acknowledged."""
    return config.store.journal_dir not in ("", "none")


def model_dir(config: Config) -> str:
    """The directory of the model, checked to be there."""
    path = Path(config.model.path)
    if config.model.path == "small":
        path = Path(__file__).parent.parent / "testing" / "small_engine" / "model"
    if not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
        raise ConfigError(f"model.path: no tokenizer in {path}; set it to a model's directory, or to `small`")
    return str(path)


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']}" if key else str(error["msg"])
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
    return f"{key}: no such key; did you mean {near[0]}?" if near else f"{key}: no such key"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All keys, dotted: what an unknown one is compared with."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
    return keys
