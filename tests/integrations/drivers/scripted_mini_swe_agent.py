"""mini-swe-agent's `LitellmModel` behind a model that writes nonsense: each reply becomes a command that depends on it.

Owns that rule, and the points at which the attempt may be killed. Queries, retries, messages, the agent and its environment
are mini-swe-agent's. The last of TURNS commands submits; each of the others writes to the sandbox and prints what is there,
so that a sandbox which is not new gives itself away.
"""

from __future__ import annotations

import hashlib
from typing import Any

import kill_points
from minisweagent.models.litellm_model import LitellmModel

TURNS = 4


class Model(LitellmModel):
    _turn = 0

    def _query(self, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
        self._turn = sum(message["role"] == "assistant" for message in messages) + 1
        kill_points.reach("before", self._turn)
        response = super()._query(messages, **kwargs)
        kill_points.reach("reply", self._turn)
        return response

    def _parse_actions(self, response: Any) -> list[dict[str, Any]]:
        message = response.choices[0].message
        calls = message.tool_calls or []
        said = (message.content or "") + "".join(call.function.arguments for call in calls)
        command = command_of(hashlib.sha256(said.encode()).hexdigest()[:12], self._turn)
        return [{"command": command, "tool_call_id": call.id} for call in calls[:1]] or [{"command": command}]

    def format_observation_messages(self, message: dict[str, Any], *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        kill_points.reach("after", self._turn)
        unanswered = (message.get("tool_calls") or [])[1:]
        others = [{"role": "tool", "tool_call_id": call["id"], "content": "one command at a time"} for call in unanswered]
        return super().format_observation_messages(message, *args, **kwargs) + others


def command_of(digest: str, turn: int) -> str:
    """`$PPID` is the agent: where this point is armed, the tool kills whoever runs it when half of its work is done."""
    armed = kill_points.armed("tool", turn)
    first = f"echo $ROLLOUT_FT_ATTEMPT {turn} >> {kill_points.LEDGER}; echo {digest} >> notes"
    kill = f"if rm {armed} 2>/dev/null; then kill -9 $PPID; sleep 60; fi"
    rest = (
        "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat notes"
        if turn == TURNS
        else "pwd | sed s/$ROLLOUT_FT_TRIAL_ID/trial/; ls; sha256sum < notes; wc -l < notes"
    )
    return f"{first}; {kill}; {rest}"
