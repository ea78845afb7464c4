"""The dialects in which a turn can be asked for, by the name that the routes and the owners' wire give them.

Owns which path speaks which dialect, errors included.
"""

from __future__ import annotations

from functools import partial

from rollout_ft.gateway.dialects import anthropic_reply, openai_reply
from rollout_ft.gateway.dialects.anthropic_request import parse_messages
from rollout_ft.gateway.dialects.base import Asked, Dialect, Evidence, Rules
from rollout_ft.gateway.dialects.openai_request import parse_chat
from rollout_ft.gateway.dialects.tokens import parse_generate

__all__ = ["COUNT", "DIALECTS", "Asked", "Dialect", "Evidence", "Rules", "dialect_of"]


class Chat:
    """OpenAI's chat completions."""

    keep_alive = b": keep-alive\n\n"
    parse = staticmethod(parse_chat)
    error = staticmethod(openai_reply.error_body)

    def error_event(self, error: bytes) -> bytes:
        return b"data: " + error + b"\n\n"


class Messages:
    """Anthropic's messages."""

    keep_alive = b'event: ping\ndata: {"type":"ping"}\n\n'
    parse = staticmethod(parse_messages)
    error = staticmethod(anthropic_reply.error_body)

    def error_event(self, error: bytes) -> bytes:
        return b"event: error\ndata: " + error + b"\n\n"


class Generate(Chat):
    """SGLang's generate, in tokens; its errors have OpenAI's shape there too."""

    parse = staticmethod(parse_generate)


class Count(Messages):
    """A body of Anthropic's messages that is only counted."""

    parse = staticmethod(partial(parse_messages, counting=True))


DIALECTS: dict[str, Dialect] = {"chat": Chat(), "messages": Messages(), "generate": Generate()}
COUNT: Dialect = Count()


def dialect_of(path: str) -> str:
    """The name of the dialect in which a path is answered, whether there is such a route or not."""
    if path.rstrip("/").endswith(("/v1/messages", "/v1/messages/count_tokens")):
        return "messages"
    return "generate" if path.rstrip("/").endswith("/generate") else "chat"
