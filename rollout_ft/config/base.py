"""What every section of the config has in common.

Owns how an unknown key and an empty text are taken, and what an URL and an address of this machine are. Knows no section.
All of them are frozen: a config is told to processes, and nobody changes it for one of them.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _empty(cls, value: object, info: ValidationInfo) -> object:
        """What a shell leaves of `key=''` is nothing: of a text, the empty one."""
        text = value is None and cls.model_fields[str(info.field_name)].annotation is str
        return "" if text else value


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_url(text: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and bool(parts.hostname)
