"""What every code, outcome, state and reason means, what usually causes it, and what to do.

Owns the catalogue that `rollout-ft explain` reads. Pure; knows nothing of who meets them. A reason is free text that begins in a
fixed way: its code is that beginning. A test compares the catalogue with the source, so that it says all there is and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum

from rollout_ft.telemetry.shown import EVENT_ROWS, WAIT_ROWS


class Kind(StrEnum):
    ERROR = "error"
    OUTCOME = "outcome"
    STATE = "engine state"
    REASON = "why an engine is lost or doubted"
    WAIT = "what a turn waits for"
    EVENT = "event"


@dataclass(frozen=True, slots=True)
class Explanation:
    code: str
    kind: Kind
    meaning: str
    cause: str
    remedy: str


def explain(said: str) -> Explanation | None:
    """What a code means, or a reason as it was said: then the longest code that it begins with is its own."""
    said = _WHOSE.sub("", said.lower())
    return CATALOGUE.get(said) or next((CATALOGUE[code] for code in _LONGEST_FIRST if re.match(rf"{code}[ :]", said)), None)


def nearest(said: str) -> str:
    """The code that was probably meant; empty where none is near."""
    return next(iter(get_close_matches(said.lower(), CATALOGUE, n=1, cutoff=0.7)), "")


_WHOSE = re.compile(r"^engine \S+ lost: ")
_NOTHING = "Nothing: it is repeated by whoever asks, and answered when the run can."
_OWN_KEY = (
    "Give a session the `api_key` that came with it, and operators' routes the operator's key (`operator_key` of `rollout-ft serve`)."
)

_ERRORS = [
    # the request
    ("invalid_request", "A field of the request is missing, of the wrong type or out of range; the message names it.",
     "A harness that sends what the route does not take.", "Correct the field that `param` names. It is never worth repeating as it is."),
    ("unknown_field", "The request has a field that no dialect of this route knows.",
     "An SDK newer than the route, or a misspelt parameter.", "Leave the field out; GET /openapi.json lists those that are known."),
    ("unsupported", "The field is known, but this value of it cannot be honoured here.",
     "n > 1, top_logprobs, an image block, a tool that runs at the provider.", "Leave it out, or use what the message offers."),
    ("invalid_json", "The body is no JSON object.", "A body that was cut, is empty, or is encoded twice.", "Send one JSON object."),
    ("duplicate_key", "An object in the body has the same key twice, which readers understand in different ways.",
     "JSON that is put together by hand.", "Leave one of them out."),
    ("too_deep", "The body nests deeper than it may.", "Tool results that are wrapped again in each turn.",
     "Flatten it, or raise `gateway.max_json_depth`."),
    ("body_too_large", "The body has more bytes than it may.", "A conversation with pasted files or images in base64.",
     "Shorten it, or raise `gateway.max_body_bytes`."),
    ("unsupported_encoding", "The body is compressed.", "A proxy or a client that compresses what it sends.",
     "Send the body as it is, without Content-Encoding."),
    ("id_too_long", "An id or an Idempotency-Key is longer than it may be.", "A whole prompt that is used as a key.",
     "Use a hash of it, or raise `gateway.max_id_chars`."),
    ("invalid_id", "An id has characters other than ASCII that can be printed.", "A name typed by a person that is used as an id.",
     "Use letters, digits and punctuation of ASCII."),
    ("idempotency_key_reused", "This Idempotency-Key came before, with another request.", "A key that is kept for a whole loop.",
     "Make a new key for each new request, and keep it for its retries alone."),
    ("context_length_exceeded", "The conversation leaves no room for a single token of output.",
     "A trial that is longer than the model's context, or `model.context_tokens` below what the engines have.",
     "Let the agent compact its history; check `model.context_tokens` with GET /sessions/{id}/v1/models."),
    ("special_token", "A new message contains the text of a special token, which could end a turn in the model's eyes.",
     "A tool result or a web page that quotes a chat template.", "Escape it, or set `session.special_tokens_in_text: keep`."),
    ("foreign_tokens", "The checkpoint of this trial has token ids that the model does not have.",
     "The run was resumed with another model.",
     "Resume with the model that it began with, or start the trial anew with `checkpoint: false`."),
    ("refused_by_engine", "The engine refused the request as wrong (HTTP 400).", "A sampling parameter that this SGLang does not take.",
     "Read the engine's words in the message; correct `sampling.parameters` or the request."),
    # keys and routes
    ("invalid_api_key", "The key does not open this route or this session, which may or may not exist.",
     "A key of another session or another run, or the operator's key for a session's route.", _OWN_KEY),
    ("unknown_route", "There is no such route.", "A base URL with /v1 twice or missing.",
     "Use the `base_url` that came with the session as it is; GET /openapi.json lists the routes."),
    ("session_closed", "The session is over, or a newer attempt has taken its place, and the store says so: final.",
     "An agent of an earlier attempt that still runs, or a trial that has its outcome.",
     "Stop that agent. GET /trials/{id} says which attempt is the present one."),
    ("unknown_session", "No attempt of this name was ever opened, as far as the store knows.", "A session id of another run.",
     "Take the session id from POST /sessions; GET /trials lists what there is."),
    ("unknown_trial", "No trial of this name is in the store.", "A misspelt id, or a run without a journal that was started again.",
     "GET /trials lists what there is; set `store.journal_dir` so that trials survive the cluster."),
    ("unknown_engine", "No engine of this name is in the fleet.", "An engine that was retired, or an URL instead of an id.",
     "`rollout-ft status` or GET /fleet lists the engines."),
    # races about a trial
    ("trial_exists", "A trial of this name was opened before.", "A harness that was started again with the same names.",
     "Pass `resume: true` to go on from its checkpoint, or use another trial_id."),
    ("trial_ended", "The trial has its outcome already; an outcome is never changed.",
     "Two who judge the same trial, or a name used twice.",
     "Read what it is with GET /trials/{id}; use another trial_id for another trial."),
    ("trial_running", "Only a trial that has ended can be released.", "A trainer that collects before the outcome is given.",
     "Give it an outcome (POST /trials/{id}/outcome), or delete its session, first."),
    ("trial_damaged", "Entries of this trial are lost or unreadable, and the store refuses it rather than go on from a gap.",
     "A record in the middle of the journal that a disk or a person damaged.",
     "The message names file and record: restore that file, or play the task as another trial. `rollout-ft trial list DIR` shows which."),
    ("stale_attempt", "Somebody else restarted the trial: this is not its present attempt.", "Two restarts at once; one has won.",
     "Use the attempt that the message names, or leave the trial to who restarted it."),
    ("released", "The trial was collected: of its turns nothing is left in the run.", "A trajectory that is asked for twice.",
     "Read it where it was written (`DIR/trajectories`), or collect before `release`."),
    # limits and load
    ("overloaded", "As many requests wait as may: at the gateway, or for a place at an engine.",
     "More trials at once than the engines can serve.",
     "Nothing: clients come again. If it lasts, lower `trial.concurrency`, add engines, or raise `gateway.max_in_flight` "
     "and `engine.admission.max_waiting`."),
    ("too_many_in_flight", "This session has as many requests in flight as it may.", "An agent that samples in parallel, or never cancels.",
     "Ask for fewer at once, or raise `session.max_in_flight` and `gateway.max_in_flight_per_session`."),
    ("too_many_turns", "The session has as many turns as it may.", "An agent in a loop.",
     "End the trial, or raise `session.max_turns`."),
    ("too_many_tokens", "The session has as many tokens as it may.", "An agent in a loop, or very many branches.",
     "End the trial, or raise `session.max_tokens`."),
    ("too_many_steps", "The trial has as many recorded steps of its environment as it may.", "An agent in a loop.",
     "End the trial, or raise `session.max_steps`."),
    ("too_many_connections", "The gateway has as many connections as it may.", "Clients that make a connection for each request.",
     "Reuse connections, raise `gateway.max_connections`, or add gateways (`gateway.count`)."),
    # connections
    ("invalid_http", "This is no HTTP/1.1 request that can be read.", "HTTPS or HTTP/2 sent to a port that speaks plain HTTP/1.1.",
     "Use http:// unless `gateway.tls_cert` is set, and HTTP/1.1."),
    ("headers_too_large", "The headers are too many or too large.", "Cookies or tracing baggage that a proxy adds.",
     "Leave them out, or raise `gateway.max_header_bytes` and `gateway.max_headers`."),
    ("too_many_pipelined", "More requests were sent ahead on one connection than may be.", "A client that pipelines.",
     "Wait for a reply, or use more connections."),
    ("upgrade_not_supported", "WebSockets and other upgrades are not spoken here.", "A client or proxy set up for WebSockets.",
     "Use plain HTTP/1.1 requests; replies stream as SSE."),
    ("request_timeout", "The headers or the body did not arrive in time.", "A slow or broken network between client and gateway.",
     "Send it again; raise `gateway.header_timeout_s` or `gateway.body_timeout_s` where the network is known to be slow."),
    # come again
    ("still_generating", "The reply is not finished, and the client would have given up soon: its retry attaches to the same generation.",
     "Long outputs, a pause of the trainer, or recovery under way.",
     "Repeat the same request: SDKs do. If it uses up their tries, give clients a longer timeout, or stream; see `rollout-ft doctor`."),
    ("unavailable", "Nobody can serve this just now: it is recovering, paused or draining.",
     "Engines that start, a session that moves, an update of the weights.",
     f"{_NOTHING} If it lasts, `rollout-ft status` says what is waited for."),
    ("store_unavailable", "The replicas of the checkpoint store do not answer, so that nothing can be read or acknowledged.",
     "A node that was lost with its replicas, or fewer left than `store.min_replicas`.",
     "Wait: the supervisor opens the next view. If it lasts, look at `store.lost` and `store.join_failed` in the events, and add nodes."),
    ("no_supervisor", "The run's supervisor does not answer.", "The run has ended, or its node is lost and Ray starts it elsewhere.",
     "If the run is over, `rollout-ft resume DIR` goes on with it; else look at `ray status` for the node."),
    ("unreachable", "The gateway does not answer at its address.", "The run has ended, the URL is another run's, or a firewall is between.",
     "Of a run that has ended `rollout-ft trial list DIR` tells. Else check the URL that `rollout-ft serve` printed, "
     "and whether `gateway.advertise_url` can be reached from where you are."),
    ("unknown", "Something answered that is not a gateway, or a proxy answered in its place.", "A wrong URL or a proxy's error page.",
     "Compare the URL with what `rollout-ft serve` printed; go around the proxy."),
    # a turn that failed
    ("turn_budget_spent", "The turn was tried as often as it may be, on one engine after another; the attempt is tainted.",
     "Engines that die over and over, often of the request itself (memory, a length they cannot hold).",
     "Look for `engine.dead` and its reason in the events. `engine.max_generations_per_turn` is the budget; the trial is restarted "
     "by `trial.recovery`."),
    ("trial_fault", "A fault met a trial that may not survive it.",
     "`trial.recovery` is `restart` or `abandon` and its engine or a reply was lost.",
     "Set `trial.recovery: resume`, so that trials go on from their checkpoint."),
    ("restart_from_scratch", "The trial's tokens are of weights that the config does not let be mixed; it starts again from nothing.",
     "An update of the weights in the middle of a trial, with `session.version_policy: trial` or `session.on_stale: restart`.",
     "Nothing with our runner; others POST /trials/{id}/restart with `checkpoint: false`. `session.version_policy: mixed` allows it."),
    ("too_stale", "The trial's oldest tokens are further behind the trainer than they may be, and it is over.",
     "Trials that take longer than `session.max_staleness` updates.", "Raise `session.max_staleness`, or set `session.on_stale: restart`."),
    ("replay_diverged", "The replay of a restarted trial left its record, and the config calls that a failure.",
     "An agent that is not deterministic: times, random ids, an order of files in its messages.",
     "Make those equal with `session.normalizers`, or set `trial.on_divergence: branch`. `rollout-ft report DIR` shows where they differ."),
    ("matcher_failed", "The function that `session.matcher` or `session.normalizers` names raised, or gave what it must not.",
     "A mistake in that function; its message is in the error.", "Correct it, or leave the key at its default."),
    ("order_failed", "Every engine that was reached refused the trainer's order.",
     "A checkpoint path that the engines do not see, or an update out of order.",
     "Read each engine's words in the message; repeat the order."),
    ("internal_error", "Something failed that nobody expected: a mistake in rollout_ft.",
     "It is in the log of the gateway or the engine's actor.",
     "Clients come again. Look for the traceback (`ray logs`), and report it."),
]  # fmt: skip

_OUTCOMES = [
    ("completed", "The agent finished; the reward is its verifier's.", "The normal end.", "Nothing."),
    ("truncated", "A limit ended the trial: no reward.",
     "`trial.attempt_timeout_s`, the model's context, a limit of the session, or `session.max_staleness`; `cause` says which.",
     "Raise that limit if trials like this should count."),
    ("agent_failed", "The agent itself failed, more often than it may: no reward.", "An error in the harness or the task; `cause` has it.",
     "Correct it; `trial.max_agent_restarts` is how often it may. `rollout-ft trial show DIR TRIAL` shows the conversation."),
    ("env_failed", "Its environment was lost more often than it may be: no reward.", "Sandboxes that die or cannot be made.",
     "Look at `cause` and the sandbox's log; `trial.max_env_restarts` is how often it may."),
    ("infra_exhausted", "Faults of the infrastructure used the trial's budget up: the reward is None, never 0.",
     "Engines that die again and again, or `trial.recovery: abandon`.",
     "Look for `engine.dead` in the events; `trial.max_restarts` is the budget. Trainers must leave the trial out."),
    ("cancelled", "Somebody ended the trial: its session was deleted, or its group was decided without it.", "A harness or a trainer.",
     "Nothing, unless nobody meant to."),
]  # fmt: skip

_STATES = [
    ("healthy", "It serves, with the fleet's weights.", "The normal state.", "Nothing."),
    ("suspect", "It serves what it has, and something speaks against it.", "A call that stands still, a probe or ping that was missed.",
     "Wait: progress clears it, more of the same ends it. `reason` says what was seen."),
    ("dead", "It was given up; its sessions go on elsewhere when they are asked for, and it is started again.",
     "`reason` says how it was seen; `rollout-ft explain` knows that as well.", "Nothing, unless it recurs: then read the engine's log."),
    ("restarting", "It starts, and serves nothing yet.", "The run begins, or the engine was lost before.",
     "Wait as long as a model takes to load; `engine.start_timeout_s` limits it."),
    ("stale", "It is up with other weights than the fleet's, and serves nothing.", "It started, or missed an update.",
     "An update from disk is repeated by itself; for any other the trainer's next one brings it back (POST /fleet/weights)."),
    ("offloaded", "The trainer has its memory, and it serves nothing.", "An offload between two rollouts.",
     "Give the memory back (/resume_memory_occupation), then load weights. If the trainer is gone, nothing else ends it."),
    ("retired", "It ended for good.",
     "It was drained, the run ended, or it died more often than `engine.max_restarts` in `engine.restart_window_s`.",
     "If it should be there, POST /fleet/engines with a count or its URL."),
]  # fmt: skip

_LOOK = "Read the engine's log; if it recurs with certain requests, look at their length."
_REASONS = [
    ("exited", "The engine's process ended with this exit code.",
     "A bad argument, a port that is taken, an exception; the log's lines follow.",
     "Correct what the lines say: `engine.args`, `engine.env`, the model's path."),
    ("killed by", "A signal ended the engine's process.",
     "The kernel's out-of-memory killer, SGLang killing itself after a part of it failed, a person.",
     "Read the log that it names; out of memory: lower --mem-fraction-static in `engine.args`, or give the node more."),
    ("ended", "The engine's process ended with its guard, or because we ended it.", "The actor or its node was stopped.",
     "Nothing, unless nobody meant to."),
    ("actor died", "The Ray actor that holds the engine ended.", "Its node was lost, or Ray or the kernel killed it.",
     "See `ray list actors` and `ray list nodes` for the cause."),
    ("does not answer", "The engine's actor missed its pings.",
     "A node or a network that is gone, an actor that is stopped or starved of CPU.",
     "Nothing: it is fenced and replaced. If it recurs under load, give the node CPU, or raise `fleet.ping_s`."),
    ("missed pings", "A gateway had no answer from the engine's actor while requests were in flight.", "As for `does not answer`.",
     "Nothing: it is fenced and replaced. If it recurs under load, give the node CPU, or raise `gateway.ping_s`."),
    ("stalled", "No token came from any call for longer than this engine ever needs.",
     "A hung kernel or collective; /health often still answers.",
     "Read the engine's log for NCCL or CUDA. If it was only slow (compiling), raise `engine.first_token_timeout_s`, "
     "`engine.token_timeout_s` or `engine.timeout_factor`."),
    ("stalled alone", "One call stands still while others move: that call is begun again, and the engine is kept.",
     "A request that the scheduler lost, or starves.", "Nothing; if it recurs, look for retractions in the engine's log."),
    ("failed", "So many requests in a row failed at the engine (HTTP 5xx) that it is not trusted.", "An engine that is up and broken.",
     _LOOK),
    ("probes", "It was idle, and did not answer several probes in a row.", "A process that hangs between two rollouts.", _LOOK),
    ("connection", "The connection to the engine broke, or none could be made.", "Its process was about to end, or hangs.",
     "Look for the reason that follows."),
    ("http", "The engine of somebody else at this URL is not there, or cannot be used as it is.",
     "A wrong URL, an engine that loads, or arguments that this run cannot work with; what follows says which.",
     "Do what follows the URL; `engine.start_timeout_s` is how long it is waited for."),
    ("not ready within", "The engine did not come up in time.", "A large model, a slow disk, a download at the start.",
     "Raise `engine.start_timeout_s`; read the engine's log."),
    ("no answer within", "The engine did not answer an order of the trainer in time.",
     "An update that hangs: a group that is never complete, a dead rank.",
     "Read the engine's log; raise `fleet.update_timeout_s` if it was only slow."),
    ("it has no", "The engine does not know the parser that the config names.", "An SGLang older or newer than the config.",
     "Set `model.tool_parser` and `model.reasoning_parser` to one that this SGLang has, or to `none`."),
    ("a rank cannot be started", "A part of an engine on several nodes cannot be placed.", "A node that left, or too few free GPUs.",
     "See `ray status`; `engine.nodes` and `engine.num_gpus` say what is needed."),
    ("no", "There are too few nodes with enough free GPUs for an engine of several nodes.", "Nodes that are missing or used by others.",
     "See `ray status`; lower `engine.nodes` or `engine.num_gpus`, or add nodes."),
]  # fmt: skip

CATALOGUE = {
    code: Explanation(code, kind, *said)
    for kind, each in (
        (Kind.ERROR, _ERRORS), (Kind.OUTCOME, _OUTCOMES), (Kind.STATE, _STATES), (Kind.REASON, _REASONS), (Kind.WAIT, WAIT_ROWS),
        (Kind.EVENT, EVENT_ROWS),
    )
    for code, *said in each
}  # fmt: skip
_LONGEST_FIRST = sorted((code for code, each in CATALOGUE.items() if each.kind is Kind.REASON), key=len, reverse=True)
