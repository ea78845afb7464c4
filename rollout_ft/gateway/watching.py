"""The routes by which a run is looked at: lists, filters and pages of trials, what happened, and the status page itself.

Owns the parameters of these requests and the page's files. Knows nothing of where the answers come from. The page holds no data and
asks for no key: what it shows it fetches with the operator's key, which its reader has. Whatever it is sent is text to it.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollout_ft.errors import BadRequest
from rollout_ft.fleet.listing import STATES, Query
from rollout_ft.gateway.asgi import Exchange
from rollout_ft.telemetry.recent import CURSOR
from rollout_ft.types import JSON, TRIAL_ID, Outcome

MAX_QUERY_CHARACTERS = 4096
MAX_TRIALS = 10_000
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"), (b"cross-origin-resource-policy", b"same-origin"), (b"cache-control", b"no-cache"),
]  # fmt: skip
_TYPES = {"html": b"text/html; charset=utf-8", "js": b"text/javascript; charset=utf-8", "css": b"text/css; charset=utf-8",
          "svg": b"image/svg+xml"}  # fmt: skip
Q = TypeVar("Q", bound=BaseModel)
PAGE = "status"


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class TrialsQuery(_Parameters):
    state: Literal["held", "idle", "ended", "released", "damaged"] | None = None
    outcome: Outcome | None = None
    group_id: str | None = Field(default=None, max_length=256)
    task_id: str | None = Field(default=None, max_length=256)
    search: str | None = Field(default=None, max_length=256)
    """In the ids of trial, task and group, whatever their case."""
    order: Literal["trial_id", "attention"] = "trial_id"
    """`attention`: what needs it most comes first."""
    after: str | None = Field(default=None, pattern=rf"^[0-9]~{TRIAL_ID.pattern}$")
    """What `x-rollout-ft-next` said with the page before."""
    limit: int | None = Field(default=None, ge=1, le=MAX_TRIALS)

    def query(self) -> Query:
        return Query(
            self.state or "", self.outcome.value if self.outcome else "", self.group_id or "", self.task_id or "", self.search or "",
            self.order == "attention", self.after or "", self.limit,
        )  # fmt: skip


class EventsQuery(_Parameters):
    since: str | None = Field(default=None, pattern=rf"^{CURSOR.pattern}$")
    """`next` of the answer before; without it the newest are told."""
    limit: int = Field(default=200, ge=1, le=2000)


class OverviewQuery(TrialsQuery):
    order: Literal["trial_id", "attention"] = "attention"
    limit: int | None = Field(default=50, ge=1, le=500)
    since: str | None = Field(default=None, pattern=rf"^{CURSOR.pattern}$")
    """`events.next` of the answer before; where there are more than `events` since then, the newest are told."""
    events: int = Field(default=100, ge=1, le=500)
    turns: int = Field(default=50, ge=0, le=200)


assert set(STATES) == {"held", "idle", "ended", "released", "damaged"}


def asked(x: Exchange, model: type[Q]) -> Q:
    """The query of a request. Raises BadRequest naming the parameter."""
    given = x.scope.get("query_string", b"").decode("latin-1")
    if len(given) > MAX_QUERY_CHARACTERS:
        raise BadRequest(f"the query is longer than {MAX_QUERY_CHARACTERS} characters")
    pairs = parse_qsl(given, keep_blank_values=True)
    named = dict(pairs)
    if len(named) != len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise BadRequest(f"{twice[:64]}: is there twice", param=twice[:64])
    try:
        return model.model_validate(named)
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(str(part) for part in first["loc"])[:64]
        if first["type"] == "extra_forbidden":
            raise BadRequest(f"{name}: there is no such parameter; there are {', '.join(model.model_fields)}", param=name) from None
        raise BadRequest(f"{name}: {first['msg']}", param=name) from None


def parameters(model: type[BaseModel]) -> list[JSON]:
    """A query's parameters in OpenAPI's words."""
    made: list[JSON] = []
    for name, schema in model.model_json_schema(ref_template="#/components/schemas/{model}")["properties"].items():
        text: Any = model.model_fields[name].description
        made.append({"name": name, "in": "query", "required": False, "schema": _plain(schema), **({"description": text} if text else {})})
    return made


def _plain(schema: JSON) -> JSON:
    """A parameter is there or not: it is never null."""
    kept = {key: value for key, value in schema.items() if key not in ("title", "default")}
    if "anyOf" in kept:
        (one,) = [each for each in kept.pop("anyOf") if each.get("type") != "null"]
        kept |= one
    return {"type": "string", "enum": [each.value for each in Outcome]} if "$ref" in kept else kept


class Files:
    """The page, read once."""

    def __init__(self) -> None:
        there = resources.files("rollout_ft.gateway") / "page"
        self._files = {each.name: each.read_bytes() for each in there.iterdir() if each.name.rpartition(".")[2] in _TYPES}

    async def reply(self, x: Exchange, name: str) -> None:
        """Raises BadRequest (404)."""
        body = self._files.get(name)
        if body is None:
            raise BadRequest(f"no such file: {name[:64]}; GET /{PAGE} is the status page", 404, "unknown_route")
        await x.reply(200, body, _HEADERS, _TYPES[name.rpartition(".")[2]])


def at_page(x: Exchange) -> bool:
    """Where the page's own links, which are relative, lead to its files."""
    return x.path.lstrip("/") == PAGE


async def redirect(x: Exchange) -> None:
    """To the page, from above or below it, whatever prefix a proxy took away; a fragment comes along."""
    up = "../" * x.path.lstrip("/").count("/")
    await x.reply(303, b"", [(b"location", f"{up}{PAGE}".encode()), *_HEADERS])
