"""miles: a generate function whose trials survive their faults, miles' own one at our gateway, and the filter for both.

Owns nothing but the way between miles and `integrations.samples`. In miles' `args` (`--custom-config-path FILE`):
`rollout_ft_agent` (`module:function`, see `rollouts.agent_of`), or miles' `custom_agent_function_path`, whose function is given
the session's `api_key` beside what miles gives it; the other keys are those of `integrations.slime`.
"""

from __future__ import annotations

from typing import Any

import miles.rollout.base_types as _types  # pyright: ignore[reportMissingImports]
import miles.rollout.filter_hub.base_types as _filters  # pyright: ignore[reportMissingImports]
import miles.rollout.generate_hub.agentic_tool_call as _agentic  # pyright: ignore[reportMissingImports]
import miles.utils.misc as _misc  # pyright: ignore[reportMissingImports]

from rollout_ft.errors import ConfigError
from rollout_ft.integrations import samples
from rollout_ft.integrations.rollouts import agent_of
from rollout_ft.trial.agents import Agent, InlineAgent
from rollout_ft.trial.client import Session
from rollout_ft.types import JSON

types: Any = _types
filters: Any = _filters
agentic: Any = _agentic
misc: Any = _misc


async def generate(input: Any) -> Any:
    """`--custom-generate-function-path rollout_ft.integrations.miles.generate`: one trial."""
    args, notes = input.args, dict[str, Any]()
    trainer = samples.Trainer(args, "miles", f"{__name__}.keep_whole_groups", input.state.tokenizer.decode, lambda: input.state.aborted)
    made = await samples.generate(trainer, _agent(input, notes), input.sample, input.sampling_params, input.evaluation, notes)
    return types.GenerateFnOutput(samples=made)


async def session_server(input: Any) -> Any:
    """`--custom-generate-function-path rollout_ft.integrations.miles.session_server`: miles' own `agentic_tool_call`, at the
    gateway that --session-server-ip and --session-server-port name. A gateway with `gateway.open_sessions` is its server."""
    args = input.args
    if not getattr(args, "session_server_ports", None):  # where it is set, miles has started a server of its own
        port = args.session_server_port
        args.session_server_ports = port if isinstance(port, list) else [port]
    return await agentic.generate(input)


for each in (generate, session_server):
    setattr(each, "add_arguments", agentic.generate.add_arguments)  # noqa: B010 - miles looks for it there


def keep_whole_groups(args: Any, group: list[Any], **kwargs: Any) -> Any:
    """`--dynamic-sampling-filter-path rollout_ft.integrations.miles.keep_whole_groups`: miles draws another group for one that
    has lost a trial."""
    if not samples.whole(group):
        return filters.DynamicFilterOutput(keep=False, reason="lost_trial")
    own = getattr(args, "rollout_ft_dynamic_filter", None)
    return misc.load_function(own)(args, group, **kwargs) if own else filters.DynamicFilterOutput(keep=True)


def _agent(input: Any, notes: JSON) -> Agent:
    own, theirs = getattr(input.args, "rollout_ft_agent", None), getattr(input.args, "custom_agent_function_path", None)
    if own is not None:
        return agent_of(own)
    if theirs is None:
        raise ConfigError("rollout_ft_agent is missing in the file of --custom-config-path, and --custom-agent-function-path as well")
    function = misc.load_function(theirs)
    asked = {k: v for k, v in agentic.build_chat_request_kwargs(input.sampling_params).items() if k not in samples.FORM}

    async def run(task: JSON, session: Session) -> Any:
        notes.clear()
        found = await function(
            base_url=session.base_url.removesuffix("/v1"), prompt=task["prompt"], request_kwargs=asked, metadata=task["metadata"],
            api_key=session.api_key,
        )  # fmt: skip
        notes.update(found or {})
        return found

    return InlineAgent(run)
