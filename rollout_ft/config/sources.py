"""Where a config comes from: a file, and overrides of its keys.

Owns reading both into one dictionary. Does not know which keys there are. An override is a YAML value, as it is in the file:
`key=` sets nothing, and `key=""` an empty text.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import orjson
import yaml

from rollout_ft.errors import ConfigError


def read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        data: Any = orjson.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as e:
        raise ConfigError(f"config file {path}: {os.strerror(e.errno or 0)}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(e).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path}: the top level must be keys and values")
    return cast(dict[str, Any], data)


def apply(data: dict[str, Any], item: str) -> None:
    key, eq, text = item.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {item!r}: write it as key.path=value")
    try:
        put(data, key.strip(), yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {item!r}: {text!r} is not a YAML value") from None


def put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        inner: Any = data.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override of {key}: {name} is a value, not a section")
        data = cast(dict[str, Any], inner)
    data[last] = value
