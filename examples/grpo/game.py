"""The word game: what a trainer's author brings himself, an agent with its environment and its verifier.

Owns the rules and knows nothing of rollout_ft: it is an `openai` client in a loop. In each turn the environment names a
letter, and counts how many words of the reply begin with it. The same replies give the same answers and the same reward.
"""

from __future__ import annotations

import random
from typing import Any

import openai

LETTERS = "ct"


def letters(seed: str, turns: int) -> str:
    """Which letter the environment names in each turn."""
    return "".join(random.Random(seed).choices(LETTERS, k=turns))


def play(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """One trial; the reward is the share of words that begin with the letter that was named, over all turns."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = []
    said, shares = "", list[float]()
    for letter in task["letters"]:
        messages.append({"role": "user", "content": f"{said}Now only words that begin with {letter}"})
        reply = client.chat.completions.create(model="default", messages=messages, max_tokens=task["max_tokens"], temperature=1.0)
        text = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        words = text.split()
        right = sum(word.startswith(letter) for word in words)
        said = f"{right} of {len(words)}. "
        shares.append(right / max(1, len(words)))
    client.close()
    return sum(shares) / len(shares)
