"""The API in OpenAPI's words: what `GET /openapi.json` answers.

Owns the document and nothing that it says: bodies of operators come from the models that check them, sampling
parameters from the list that checks them. Pure. Statuses that every route may give are listed once.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from rollout_ft.fleet.listing import STATES, Rank
from rollout_ft.gateway.control import DrainBody, EnginesBody, OpenBody, OutcomeBody, RestartBody, StepBody
from rollout_ft.gateway.dialects.sampling import CHAT, MESSAGES, TOKENS, parameter_schemas
from rollout_ft.gateway.session_server import SamplesBody
from rollout_ft.gateway.trainer import BODIES
from rollout_ft.gateway.watching import EventsQuery, OverviewQuery, TrialsQuery, parameters
from rollout_ft.types import JSON, TRIAL_ID, Outcome

_STATUSES = {
    "400": "The request itself is wrong, or too long for the model; repeating it cannot help.",
    "401": "The key is not the one for this route, whether what it names exists or not.",
    "404": "No such route or trial; or the session is closed or fenced, and the store says so.",
    "408": "The request did not arrive in time.",
    "409": "A race, or a state that does not allow this.",
    "413": "The body is larger than gateway.max_body_bytes.",
    "415": "The body is compressed.",
    "422": "The Idempotency-Key was used with another body.",
    "429": "Too much at once; come again after Retry-After.",
    "431": "The headers are larger than allowed.",
    "500": "The budget of the turn is spent, or a bug; x-should-retry says which.",
    "503": "Nothing can serve just now; the same request again is answered.",
}
_TRAINER = ("SGLang's route of this name, for every engine.", "What a trainer asks of every engine.")
_OPTIONAL = {
    m.__name__ for m in (OpenBody, SamplesBody, *BODIES.values()) if not any(field.is_required() for field in m.model_fields.values())
}
"""Bodies that need not be sent: nothing in them is required."""
_TEXT: JSON = {"type": "string"}
_FLAG: JSON = {"type": ["boolean", "null"]}
_OBJECT: JSON = {"type": "object"}
_SESSION: JSON = {"name": "session_id", "in": "path", "required": True, "schema": _TEXT, "description": "`{trial_id}~{attempt}`"}
_TRIAL: JSON = {"name": "trial_id", "in": "path", "required": True, "schema": {"type": "string", "pattern": f"^{TRIAL_ID.pattern}$"}}
_IDEMPOTENCY: JSON = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "pattern": "^[ -~]{0,256}$"}}
_NAMED: JSON = {"name": "X-Session-ID", "in": "header", "schema": _TEXT, "description": "The session, where the key is not to name it."}


def document(url: str) -> JSON:
    """The whole document; `url` is what agents are told."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "rollout_ft", "version": "1", "summary": "Agentic RL rollouts that survive their faults."},
        "servers": [{"url": url}],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "responses": {status: _error(text) for status, text in _STATUSES.items()},
            "securitySchemes": {
                "session": {"type": "http", "scheme": "bearer", "description": "The `api_key` that came with the session."},
                "session_header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
                "operator": {"type": "http", "scheme": "bearer", "description": "The operator's key."},
            },
        },
    }


def _paths() -> JSON:
    paths: JSON = {
        "/health": {"get": _operation("The process is up.", _OBJECT, security=[])},
        "/ready": {"get": _operation("It can serve.", _OBJECT, security=[], own={"503": _json("Nothing can serve.", _OBJECT)})},
        "/openapi.json": {"get": _operation("This document.", _OBJECT, security=[])},
        "/sessions": {"post": _control("Opens a session.", "Opened", "OpenBody", parameters=[_IDEMPOTENCY])},
        "/trials": {"get": _listed()},
        "/trials/{trial_id}/timeline": {"get": _control("A trial's moments, in order.", "Timeline", parameters=[_TRIAL])},
        "/overview": {"get": _control("All that a person wants to see at once.", "Overview", parameters=parameters(OverviewQuery))},
        "/events": {"get": _control("The newest transitions.", "Events", parameters=parameters(EventsQuery))},
        "/status": {"get": _page("The status page; it asks for the operator's key.")},
        "/trials/{trial_id}": {"get": _control("One trial.", "Trial", parameters=[_TRIAL])},
        "/trials/{trial_id}/restart": {"post": _control("The next attempt.", "Opened", "RestartBody", parameters=[_TRIAL])},
        "/trials/{trial_id}/outcome": {"post": _control("How the trial ended.", "Trial", "OutcomeBody", parameters=[_TRIAL])},
        "/trials/{trial_id}/release": {"post": _control("It was collected: forget all but this.", "Trial", parameters=[_TRIAL])},
        "/fleet": {"get": _control("The engines.", _OBJECT)},
        "/fleet/engines": {"post": _control("How many engines there are to be, or which of somebody else.", _OBJECT, "EnginesBody")},
        "/fleet/drain": {"post": _control("An engine that ends when its turns have.", _OBJECT, "DrainBody")},
        "/sessions/{session_id}": {
            "get": _agents("Every turn on the active path.", "Records", parameters=[_SESSION]),
            "delete": _agents("Closes the session.", None, parameters=[_SESSION]),
        },
        "/sessions/{session_id}/trajectory": {"get": _agents("Token-exact paths.", "Trajectory", parameters=[_SESSION])},
        "/sessions/{session_id}/checkpoint": {
            "get": _agents("What the attempt goes on from.", "Checkpoint", parameters=[_SESSION]),
            "post": _agents("The agent goes on from it, and will not replay it.", "Checkpoint", parameters=[_SESSION]),
        },
        "/sessions/{session_id}/steps": {"post": _control("A step of the environment, recorded.", "Stepped", "StepBody", [_SESSION])},
        "/sessions/{session_id}/samples": {"post": _collected()},
        "/sessions/{session_id}/generate": {"post": _agents("A turn in tokens.", "Generated", "GenerateBody", [_SESSION, _IDEMPOTENCY])},
    }
    for route, model in BODIES.items():
        paths[f"/{route}"] = {"post": _control(_TRAINER[route.startswith("fleet/")], "Ordered", model.__name__)}
    for base, named in (("/sessions/{session_id}/v1", _SESSION), ("/v1", _NAMED)):
        turn = [named, _IDEMPOTENCY]
        paths[f"{base}/chat/completions"] = {"post": _agents("A turn, as OpenAI has it.", "ChatCompletion", "ChatBody", turn)}
        paths[f"{base}/messages"] = {"post": _agents("A turn, as Anthropic has it.", "Message", "MessagesBody", turn, "AnthropicError")}
        paths[f"{base}/messages/count_tokens"] = {
            "post": _agents("How long the prompt would be.", "Counted", "CountBody", [named], "AnthropicError")
        }
        paths[f"{base}/models"] = {"get": _agents("The one model that there is.", "Models", parameters=[named])}
    return paths


def _listed() -> JSON:
    """A page's place among all that match is in its headers."""
    made = _control(
        "Trials, all unless parameters say which.", {"type": "array", "items": _ref("Listed")}, parameters=parameters(TrialsQuery)
    )
    made["responses"]["200"]["headers"] = {
        "x-rollout-ft-total": {"description": "How many match, on all pages.", "schema": {"type": "integer"}},
        "x-rollout-ft-next": {"description": "`after` of the next page, where there is one.", "schema": _TEXT},
    }
    return made


def _page(what: str) -> JSON:
    page: JSON = {"description": what, "content": {"text/html": {"schema": _TEXT}}}
    return _operation(what, _OBJECT, security=[], own={"200": page})


def _collected() -> JSON:
    """A file, not JSON; what cannot be assembled is told as text."""
    what = "The session as training samples, as miles' driver collects them."
    file: JSON = {"description": what, "content": {"application/octet-stream": {}}}
    told: JSON = {"description": "What was recorded makes no sample.", "content": {"text/plain": {"schema": _TEXT}}}
    keys: list[JSON] = [{"session": []}, {"session_header": []}]
    return _operation(what, _OBJECT, "SamplesBody", [_SESSION], keys, own={"200": file, "422": told})


def _control(summary: str, reply: str | JSON, body: str = "", parameters: list[JSON] | None = None) -> JSON:
    return _operation(summary, reply, body, parameters, [{"operator": []}])


def _agents(summary: str, reply: str | JSON | None, body: str = "", parameters: list[JSON] | None = None, error: str = "Error") -> JSON:
    return _operation(summary, reply, body, parameters, [{"session": []}, {"session_header": []}], error)


def _operation(
    summary: str, reply: str | JSON | None, body: str = "", parameters: list[JSON] | None = None,
    security: list[JSON] | None = None, error: str = "Error", own: JSON | None = None,
) -> JSON:  # fmt: skip
    replies: JSON = {"204": {"description": summary}} if reply is None else {"200": _json(summary, _ref(reply))}
    if body in ("ChatBody", "MessagesBody", "GenerateBody"):
        replies["200"]["content"]["text/event-stream"] = {}  # each event is an object of its dialect
    shared = {s: {"$ref": f"#/components/responses/{s}"} if error == "Error" else _error(t, error) for s, t in _STATUSES.items()}
    made: JSON = {"summary": summary, "responses": {**replies, **shared, **(own or {})}, "security": security or []}
    if parameters:
        made["parameters"] = parameters
    if body:
        made["requestBody"] = {"required": body not in _OPTIONAL, "content": {"application/json": {"schema": _ref(body)}}}
    return made


def _ref(schema: str | JSON) -> JSON:
    return {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema


def _json(text: str, schema: JSON) -> JSON:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _error(text: str, schema: str = "Error") -> JSON:
    return _json(text, _ref(schema))


def _model(model: type[BaseModel]) -> JSON:
    """A model's schema. What it does not require may also be said to be nothing, as far as its own schema says so."""
    return model.model_json_schema(ref_template="#/components/schemas/{model}")


def _has(**properties: Any) -> JSON:
    """An object with at least these."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _only(required: list[str], **properties: Any) -> JSON:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _schemas() -> JSON:
    integer, number = {"type": "integer"}, {"type": "number"}
    return {
        "OpenBody": _model(OpenBody), "RestartBody": _model(RestartBody), "OutcomeBody": _model(OutcomeBody),
        "EnginesBody": _model(EnginesBody), "DrainBody": _model(DrainBody), "StepBody": _model(StepBody),
        "SamplesBody": _model(SamplesBody),
        "Opened": _has(session_id=_TEXT, trial_id=_TEXT, attempt=integer, base_url=_TEXT, api_key=_TEXT, turns=integer),
        **{model.__name__: _model(model) for model in BODIES.values()},
        "Ordered": _has(ok={"const": True}, engines=_OBJECT, weights=_OBJECT),
        "Trial": _has(trial_id=_TEXT, session_id=_TEXT, attempt=integer, state={"enum": ["running", "ended", "released"]}, turns=integer),
        "Listed": _has(
            trial_id=_TEXT, attempt=integer, entries=integer, state={"enum": list(STATES)}, task_id=_TEXT, group_id=_TEXT, mode=_TEXT,
            outcome={"enum": [*(each.value for each in Outcome), None]}, reward={"type": ["number", "null"]}, cause=_TEXT,
            engine_id=_TEXT, attention={"enum": [each.name.lower() for each in Rank]}, why=_TEXT, remedy=_TEXT,
        ),
        "Timeline": _has(
            trial=_ref("Trial"), moments={"type": "array", "items": _has(time=number, kind=_TEXT, text=_TEXT)}, left_out=integer
        ),
        "Events": _has(
            events={"type": "array", "items": _has(time=number, event=_TEXT, source=_TEXT)}, next=_TEXT, missed={"type": "boolean"}
        ),
        "Overview": _has(
            now=number, fleet=_OBJECT, problems={"type": "array", "items": _has(level=_TEXT, what=_TEXT, why=_TEXT, remedy=_TEXT)},
            recoveries={"type": "array"}, turns=_has(count=integer, waits=_OBJECT, turns={"type": "array"}, silent={"type": "array"}),
            trials=_has(known=integer, states=_OBJECT, outcomes=_OBJECT, total=integer, next=_TEXT), events=_ref("Events"),
        ),
        "Records": _has(session_id=_TEXT, records={"type": "array", "items": _OBJECT}, metadata=_OBJECT),
        "Checkpoint": _has(
            messages={"type": "array", "items": _OBJECT}, steps={"type": "array", "items": _ref("Stepped")}, steps_before=integer
        ),
        "Stepped": _has(attempt=integer, number=integer, action=_OBJECT, result=_OBJECT, snapshot=_TEXT),
        "Trajectory": _has(session_id=_TEXT, paths={"type": "array", "items": _path()}, metadata=_OBJECT),
        "Error": _has(error=_has(message=_TEXT, type=_TEXT, code=_TEXT, param={"type": ["string", "null"]})),
        "AnthropicError": _has(type={"const": "error"}, error=_has(type=_TEXT, message=_TEXT)),
        "ChatBody": _chat_body(), "MessagesBody": _messages_body(["messages", "max_tokens"]), "CountBody": _messages_body(["messages"]),
        "GenerateBody": _generate_body(),
        "ChatCompletion": _has(
            id=_TEXT, object={"const": "chat.completion"}, created=integer, model=_TEXT,
            choices={"type": "array", "minItems": 1, "items": _has(index=integer, message=_OBJECT, finish_reason=_TEXT)},
            usage=_has(prompt_tokens=integer, completion_tokens=integer, total_tokens=integer),
        ),
        "Message": _has(
            id=_TEXT, type={"const": "message"}, role={"const": "assistant"}, model=_TEXT,
            content={"type": "array", "minItems": 1, "items": _has(type=_TEXT)}, stop_reason=_TEXT,
            usage=_has(input_tokens=integer, output_tokens=integer),
        ),
        "Generated": _has(text=_TEXT, output_ids={"type": "array", "items": integer}, meta_info=_OBJECT),
        "Counted": _has(input_tokens=integer),
        "Models": _has(object={"const": "list"}, data={"type": "array", "items": _has(id=_TEXT, max_model_len=number)}),
    }  # fmt: skip


def _path() -> JSON:
    """With `samples.routed_experts` a path says them too: as an array in base64, row i what routed token i."""
    integers: JSON = {"type": "array", "items": {"type": "integer"}}
    ranges: JSON = {"type": "array", "items": {**integers, "minItems": 2, "maxItems": 2}}
    path = _has(token_ids=integers, loss_mask=integers, logprobs={"type": "array", "items": {"type": "number"}}, turns={"type": "array"})
    array = _has(data={"type": "string", "contentEncoding": "base64"}, dtype={"enum": ["uint8", "uint16"]}, shape=integers)
    path["properties"] |= {
        "routed_experts": {"anyOf": [array, {"type": "null"}]}, "routed_experts_partial": {"type": "boolean"},
        "routed_experts_missing": ranges, "routed_experts_substituted": ranges,
    }  # fmt: skip
    return path


def _text_parts() -> JSON:
    part = _has(type={"const": "text"}, text=_TEXT)
    return {"anyOf": [_TEXT, {"type": "array", "items": part}, {"type": "null"}]}


def _chat_body() -> JSON:
    message = _has(role={"enum": ["system", "developer", "user", "assistant", "tool"]})
    message["properties"] |= {"content": _text_parts(), "name": {"type": ["string", "null"]}, "tool_calls": {"type": ["array", "null"]}}
    tool = _has(type={"const": "function"}, function=_has(name={"type": "string", "minLength": 1}))
    return _only(
        ["messages"], **parameter_schemas(CHAT),
        messages={"type": "array", "minItems": 1, "items": message}, tools={"type": ["array", "null"], "items": tool},
        tool_choice={}, parallel_tool_calls=_FLAG, stream=_FLAG, stream_options={"type": ["object", "null"]}, logprobs=_FLAG,
        response_format={"type": ["object", "null"]}, chat_template_kwargs={"type": ["object", "null"]}, reasoning_effort={},
        session_id={}, return_token_ids=_FLAG, return_meta_info=_FLAG,
        model={}, user={}, metadata={}, store={}, service_tier={}, safety_identifier={},
        prompt_cache_key={}, prompt_cache_retention={}, n={"enum": [1, None]}, top_logprobs={"enum": [0, None]}, logit_bias={},
        modalities={}, separate_reasoning=_FLAG, stream_reasoning=_FLAG, skip_special_tokens=_FLAG, no_stop_trim=_FLAG,
        continue_final_message=_FLAG,
    )  # fmt: skip


def _messages_body(required: list[str]) -> JSON:
    message = _has(role={"enum": ["user", "assistant"]}, content=_text_parts())
    tool = _has(name={"type": "string", "minLength": 1})
    return _only(
        required, **parameter_schemas(MESSAGES), messages={"type": "array", "minItems": 1, "items": message}, system=_text_parts(),
        tools={"type": ["array", "null"], "items": tool}, tool_choice={"type": ["object", "null"]}, stream=_FLAG,
        thinking={"type": ["object", "null"]}, model={"type": ["string", "null"]}, session_id={}, metadata={}, service_tier={},
    )  # fmt: skip


def _generate_body() -> JSON:
    ids: JSON = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    parameters: JSON = {"type": ["object", "null"], "properties": parameter_schemas(TOKENS)}
    word = {"type": ["string", "null"]}
    properties = {"input_ids": ids, "sampling_params": parameters, "stream": _FLAG, "return_logprob": _FLAG, "rid": word}
    return {"type": "object", "required": ["input_ids"], "properties": properties}
