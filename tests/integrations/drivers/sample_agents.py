"""The agents that the drivers of slime and miles play, and what scores a sample that nobody has scored.

Owns nothing of rollout_ft. A plain loop over HTTP with the retries of an SDK; each reply and its observation are a function of
what came before. `metadata["fail"]`: `[turn, times]`, at that turn it raises what a client raises that gave up, that many times.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from typing import Any

import httpx

_failed: Counter[str] = Counter()


class APIConnectionError(Exception):
    """What clients call it when the infrastructure fails them."""


async def run(task: dict[str, Any], session: Any) -> float | None:
    """An agent of ours: its reward is a function of all replies, or left to the trainer."""
    limits = {"max_tokens": task["sampling"].get("max_new_tokens", 32)}
    said = await converse(session.base_url, session.api_key, task["prompt"], task["metadata"], limits, task["task_id"])
    return None if task["metadata"].get("unscored") else worth(said)


async def theirs(base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """An agent function of miles. It has a key where it is given one, and sends a word in its place where it is not."""
    said = await converse(f"{base_url}/v1", kwargs.get("api_key", "EMPTY"), prompt, metadata, request_kwargs, base_url)
    return {"said": said, "worth": worth(said)}


async def score(args: Any, sample: Any, **_: Any) -> float:
    """A reward function of the trainer's."""
    return float(sample.response_length)


def worth(said: list[str]) -> float:
    return int(hashlib.sha256("".join(said).encode()).hexdigest()[:4], 16) / 0xFFFF


async def converse(base_url: str, key: str, prompt: str, metadata: dict[str, Any], asked: dict[str, Any], who: str) -> list[str]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    said: list[str] = []
    async with httpx.AsyncClient(timeout=60, headers={"authorization": f"Bearer {key}"}) as http:
        for turn in range(metadata.get("turns", 3)):
            failing, times = metadata.get("fail") or (-1, 0)
            if turn == failing and _failed[who] < times:
                _failed[who] += 1
                raise APIConnectionError("the network is gone")
            reply = await _ask(http, f"{base_url}/chat/completions", {"messages": messages, **asked})
            said.append(reply["content"])
            messages += [reply, {"role": "user", "content": "observed " + hashlib.sha256(reply["content"].encode()).hexdigest()[:8]}]
            print(json.dumps({"turn": turn + 1, "who": who}), flush=True)
    return said


async def _ask(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    for again in range(100):
        try:
            answer = await http.post(url, json=body, headers={"x-stainless-retry-count": str(again)})
        except httpx.TransportError:
            await asyncio.sleep(0.1)
            continue
        if answer.status_code == 200:
            return answer.json()["choices"][0]["message"]
        if answer.status_code != 503:
            raise RuntimeError(answer.text)
        await asyncio.sleep(0.1)
    raise APIConnectionError("nobody answers")
