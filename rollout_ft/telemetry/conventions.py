"""The names that spans carry.

Owns every name of a span, an attribute and a span's event, and nothing else. Those of OpenTelemetry's conventions for GenAI are
still changing, and are written here once; ours begin with `rollout_ft.`. The events are called what they are in `events.jsonl`.
"""

from __future__ import annotations

SCOPE = "rollout_ft"

OPERATION, PROVIDER, CONVERSATION = "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.conversation.id"
REQUEST_MODEL, REQUEST_MAX_TOKENS = "gen_ai.request.model", "gen_ai.request.max_tokens"
FINISH_REASONS, FIRST_CHUNK_S = "gen_ai.response.finish_reasons", "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
ERROR_TYPE, STATUS_CODE = "error.type", "http.response.status_code"
SERVICE, INSTANCE = "service.name", "service.instance.id"

WORKFLOW, AGENT, CHAT, COMPLETION = "invoke_workflow", "invoke_agent", "chat", "text_completion"
TRIAL_SPAN, ATTEMPT_SPAN = f"{WORKFLOW} trial", f"{AGENT} attempt"

RUN, TRIAL, TASK, GROUP, MODE = "rollout_ft.run", "rollout_ft.trial", "rollout_ft.task", "rollout_ft.group", "rollout_ft.mode"
ATTEMPT, ATTEMPTS, TURNS = "rollout_ft.attempt", "rollout_ft.attempts", "rollout_ft.turns"
OUTCOME, REWARD, REASON, CAUSE = "rollout_ft.outcome", "rollout_ft.reward", "rollout_ft.reason", "rollout_ft.cause"
TURN, DEPTH, GENERATIONS = "rollout_ft.turn", "rollout_ft.depth", "rollout_ft.generations"
ENGINE, INCARNATION, WEIGHT_VERSION = "rollout_ft.engine", "rollout_ft.incarnation", "rollout_ft.weight_version"
GENERATION, RID, SAMPLED, REUSED = "rollout_ft.generation", "rollout_ft.rid", "rollout_ft.tokens_sampled", "rollout_ft.tokens_reused"
GENERATED, WASTED = "rollout_ft.tokens_generated", "rollout_ft.tokens_wasted"
IN_FLIGHT, CLIENT_LEFT = "rollout_ft.in_flight", "rollout_ft.client_left"

ENGINE_LOST, SESSION_MOVED, SESSION_RESUMED = "engine.lost", "session.moved", "session.resumed"
