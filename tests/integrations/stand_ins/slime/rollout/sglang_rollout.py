"""The state of slime's generation, one a process, and how a group is generated and then scored."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from transformers import AutoTokenizer

from slime.utils.misc import load_function
from slime.utils.types import Sample


class GenerateState:
    _one: GenerateState | None = None

    def __new__(cls, args: Any) -> GenerateState:
        if cls._one is None:
            cls._one = super().__new__(cls)
            cls._one.tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint)
            cls._one.sampling_params = {
                "temperature": args.rollout_temperature, "top_p": args.rollout_top_p, "top_k": args.rollout_top_k,
                "max_new_tokens": args.rollout_max_response_len, "stop": args.rollout_stop, "stop_token_ids": args.rollout_stop_token_ids,
                "skip_special_tokens": args.rollout_skip_special_tokens, "no_stop_trim": True, "spaces_between_special_tokens": False,
            }  # fmt: skip
            cls._one.aborted = False
        return cls._one

    def reset(self) -> None:
        self.aborted = False


async def generate_and_rm(args: Any, sample: Sample, params: dict[str, Any], evaluation: bool) -> Any:
    """A reward of None is computed, unless the sample is aborted."""
    function = load_function(args.custom_generate_function_path)
    more = {"evaluation": evaluation} if "evaluation" in inspect.signature(function).parameters else {}
    made = await function(args, sample, params, **more)
    several = made if isinstance(made, list) else [made]
    if any(s.status is Sample.Status.ABORTED for s in several):
        return made
    for each in several:
        if each.reward is None:
            each.reward = await load_function(args.custom_rm_path)(args, each)
    return made


async def generate_and_rm_group(args: Any, group: list[Sample], params: dict[str, Any], evaluation: bool = False) -> list[Any]:
    seeded = [{**params, "sampling_seed": args.rollout_seed + i} for i in range(len(group))]
    return list(await asyncio.gather(*(generate_and_rm(args, s, p, evaluation) for s, p in zip(group, seeded, strict=True))))
