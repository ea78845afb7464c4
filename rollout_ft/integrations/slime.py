"""slime: a custom generate function whose trials survive their faults, and the filter that goes with it.

Owns nothing but the way between slime and `integrations.samples`. In slime's `args` (`--custom-config-path FILE`):
`rollout_ft_agent` (`module:function`, see `rollouts.agent_of`), and where the environment does not say them
`rollout_ft_gateway_url` and `rollout_ft_operator_key`; `rollout_ft_trial` has values of `config.TrialConfig`,
`rollout_ft_dynamic_filter` the path of a filter of your own behind ours.
"""

from __future__ import annotations

from typing import Any

import slime.rollout.filter_hub.base_types as _filters  # pyright: ignore[reportMissingImports]
import slime.rollout.sglang_rollout as _rollout  # pyright: ignore[reportMissingImports]
import slime.utils.misc as _misc  # pyright: ignore[reportMissingImports]

from rollout_ft.errors import ConfigError
from rollout_ft.integrations import samples
from rollout_ft.integrations.rollouts import agent_of

filters: Any = _filters
rollout: Any = _rollout
misc: Any = _misc


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False) -> Any:
    """`--custom-generate-function-path rollout_ft.integrations.slime.generate`: one trial."""
    if getattr(args, "rollout_top_p", 1.0) != 1.0:
        raise ConfigError("rollout_top_p: slime wants the tokens that each sample was drawn from, which nobody records here: set it to 1")
    agent = getattr(args, "rollout_ft_agent", None)
    if agent is None:
        raise ConfigError("rollout_ft_agent is missing in the file of --custom-config-path: write it as module:function")
    state = rollout.GenerateState(args)
    trainer = samples.Trainer(args, "slime", f"{__name__}.keep_whole_groups", state.tokenizer.decode, lambda: state.aborted)
    return await samples.generate(trainer, agent_of(agent), sample, sampling_params, evaluation)


def keep_whole_groups(args: Any, group: list[Any], **kwargs: Any) -> Any:
    """`--dynamic-sampling-filter-path rollout_ft.integrations.slime.keep_whole_groups`: slime draws another group for one that
    has lost a trial."""
    if not samples.whole(group):
        return filters.DynamicFilterOutput(keep=False, reason="lost_trial")
    own = getattr(args, "rollout_ft_dynamic_filter", None)
    return misc.load_function(own)(args, group, **kwargs) if own else filters.DynamicFilterOutput(keep=True)
