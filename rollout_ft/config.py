"""Every setting, with its unit in its name and its meaning under it.

Owns loading, overriding and refusing. Knows nothing of what the settings do. A config that loads can run: unknown keys
and combinations that cannot work are refused here, with the key to change, before anything is started.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import orjson
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from rollout_ft.engine import arguments
from rollout_ft.errors import ConfigError
from rollout_ft.fleet.spread import Placement
from rollout_ft.types import Recovery

VISIBLE = "CUDA_VISIBLE_DEVICES"
Seconds = Annotated[float, Field(gt=0)]
MIN_GROUP_SIZE = 2
"""A trial alone has no baseline."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _empty(cls, value: object, info: ValidationInfo) -> object:
        """What a shell leaves of `key=''` is nothing: of a text, the empty one."""
        text = value is None and cls.model_fields[str(info.field_name)].annotation is str
        return "" if text else value


class RayConfig(Settings):
    address: str = "auto"
    """`auto`: join the cluster that RAY_ADDRESS or this machine's running Ray names, else start one; `local`: always
    start one; anything else: the address to join."""
    namespace: str = "rollout_ft"
    auth_mode: Literal["token", "disabled"] = "token"
    """Used for a cluster that we start, unless RAY_AUTH_MODE says otherwise."""
    num_cpus: int | None = None
    object_store_bytes: int = Field(default=256 * 2**20, ge=80 * 2**20)
    dashboard: bool = False


class ExpertsConfig(Settings):
    """What routes a token: in each of `layers` layers `topk` of `count` experts."""

    layers: int = Field(ge=1)
    topk: int = Field(ge=1)
    count: int = Field(ge=1, le=2**16)


class ModelConfig(Settings):
    path: str = "small"
    """Directory with tokenizer, chat template and weights; `small` is the shipped small model."""
    weight_version: str = ""
    """What the version of these weights is called; empty: as the engine calls it."""
    name: str = Field(default="default", min_length=1)
    """What `GET …/v1/models` calls it, and replies to requests that name no model."""
    context_tokens: int = Field(default=32768, ge=16)
    tool_parser: str = "hermes"
    """`none`, or the name of one of SGLang's tool call parsers."""
    reasoning_parser: str = "none"
    """`none`, or the name of one of SGLang's reasoning parsers; reasoning becomes `reasoning_content`."""
    chat_template: str = ""
    """File with a chat template that stands in for the model's own."""
    chat_template_kwargs: dict[str, Any] = {}
    """Given to the chat template with every request; a request's own win."""
    experts: ExpertsConfig | None = None
    """For `samples.routed_experts`, where the model's config.json does not tell."""
    on_template_drift: Literal["refuse", "splice", "rerender"] = "refuse"
    """What to do at start about a template that changes what it wrote before when messages are appended: `splice` keeps
    the tokens as they were, `rerender` renders the whole conversation for every turn and trains on what stayed."""

    @property
    def usable_tokens(self) -> int:
        """What a prompt and its output may have together: SGLang takes no prompt that comes within six tokens of the end of
        the context, and that of a continued generation has the output so far in it."""
        return self.context_tokens - 6


class AttachConfig(Settings):
    """Engines that somebody else owns: `urls`, or the workers of the router at `router_url`. They are watched and used, and
    never killed, paused, updated or probed with generations."""

    urls: list[str] = []
    """One `http://host:port` for each engine."""
    router_url: str = ""
    """Of an sglang-router (`GET /workers`) or an older one (`GET /list_workers`): its workers are read again each `poll_s`."""
    replace_url: str = ""
    """POST `{url, reason, incarnation}` goes there when an engine is lost. Empty: that the owner replaces it is awaited."""
    poll_s: Seconds = 1
    """Each engine is asked so often whether it is ready, for its weight version and its load."""
    spread_s: Seconds = 3
    """Owners abort all their engines within so long: an abort that was not ours closes all of them, and one whose turns run
    on for longer was spared."""
    others_s: Seconds = 5
    """An aborted engine is open again when it has requests that are not ours for so long. Longer than its owner waits
    between two aborts (slime: 3 s)."""
    reopen_idle_s: Seconds | None = None
    """An aborted engine counts as open when it was idle for so long: for an owner that aborts, and then neither pauses it nor
    gives it another weight version, nor says `POST /fleet/resume`. None: never, since what it waits for may take hours."""
    memory_settle_s: Seconds | None = None
    """An engine started with --enable-memory-saver does not tell whether its owner has its memory, and dies of a request
    then. Once it is ready with new weights the rest of the memory is there after so long. None: it opens when somebody says
    so (`POST /fleet/resume`), or when others send requests."""
    move_parked_s: Seconds = 10
    """What waits at a closed engine goes to others when one has been open for so long meanwhile: owners open all of them at
    about the same time, and where a session was its prefix is cached."""
    version_grace_s: Seconds = 30
    """The newest weight version that was seen to arrive is the fleet's, and engines with another serve nothing. Where no
    engine that is ready has it for so long, it is the one that most of them have."""

    @property
    def active(self) -> bool:
        return bool(self.urls or self.router_url)

    @model_validator(mode="after")
    def _one_source(self) -> AttachConfig:
        if self.urls and self.router_url:
            raise ValueError("engine.attach.urls and engine.attach.router_url: set one of them")
        for key in ("router_url", "replace_url"):
            if (url := getattr(self, key)) and not _is_url(url):
                raise ValueError(f"engine.attach.{key}: {url!r} is no http:// or https:// URL")
        for url in self.urls:
            if not _is_url(url):
                raise ValueError(f"engine.attach.urls: {url!r} is no http:// or https:// URL")
        if len({url.rstrip("/") for url in self.urls}) != len(self.urls):
            raise ValueError("engine.attach.urls names an engine twice")
        return self


class AdmissionConfig(Settings):
    """How many calls an engine is given at once: what it can bear, found out by how soon it gives first tokens."""

    min_calls: int = Field(default=4, ge=1)
    max_calls: int = Field(default=1024, ge=1)
    start_calls: int = Field(default=64, ge=1)
    """To begin with, where the engine does not say how many it can run."""
    first_token_target_s: Seconds = 2
    """No first token that comes sooner is late."""
    first_token_tolerance: float = Field(default=3, gt=1)
    """Beyond that one is late that takes so many times what the engine takes when it is not busy."""
    window_s: Seconds = 1
    """The limit rises once in so long at most."""
    max_waiting: int = Field(default=4096, ge=1)
    """Turns that wait for the engine; one more is answered 429."""
    max_head_start_s: Seconds = 600
    """Of those that wait the trial that began first is served first; none overtakes another that came so long before it."""

    @model_validator(mode="after")
    def _calls_fit(self) -> AdmissionConfig:
        if not self.min_calls <= self.start_calls <= self.max_calls:
            raise ValueError("engine.admission: min_calls <= start_calls <= max_calls must hold")
        return self


class RetryConfig(Settings):
    """Engine calls that are made again."""

    share: float = Field(default=0.2, ge=0, le=1)
    """Of an engine's calls that may be retries; one beyond that waits."""
    floor_per_s: float = Field(default=1, gt=0)
    """Retries of an engine that are always allowed."""
    burst: float = Field(default=32, ge=1)
    """Retries that may be made at once, after a quiet time: the sessions of an engine that was lost come together."""
    backoff_s: Seconds = 0.2
    """The first retry of a turn waits up to so long, each after it up to twice as long as the one before."""
    max_backoff_s: Seconds = 5
    max_retry_after_s: Seconds = 60
    """An engine that asks for more with Retry-After is asked again after this."""
    max_refusals_per_turn: int = Field(default=64, ge=1)
    """How often in a row an engine may have no room for a turn before the turn fails. It costs none of its generations."""
    max_retries_per_trial: int = Field(default=256, ge=1)
    """Generations beyond the first of each turn, all turns of a trial together."""


class EngineConfig(Settings):
    kind: Literal["small", "sglang"] = "small"
    count: int = Field(default=3, ge=1)
    command: list[str] = []
    """What is run in place of `python -m sglang.launch_server` (or of the small engine): a program of another environment,
    or a wrapper around it. It is given the same arguments."""
    args: list[str] = []
    """More arguments for the engine's command line, as they stand; `{engine}` is the engine's id. SGLang's are checked against
    the installed version, and those that another key says are refused."""
    env: dict[str, str] = {}
    num_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray assigns to one engine, on each of its nodes: as many as its parallel sizes take; a fraction shares one."""
    nodes: int = Field(default=1, ge=1)
    """Nodes that one engine stretches over, each with `num_gpus`: the loss of any of them is the loss of the engine."""
    log_bytes: int = Field(default=256 * 2**20, ge=2**16)
    """What the logs of one engine may take on its node, those of its earlier starts included; the oldest lines go first."""
    start_timeout_s: Seconds = 120
    first_token_timeout_s: Seconds = 30
    """A floor: no first token for so long, and none of any other call, and the engine hangs. Longer prompts are given longer,
    by the speed of prefill that was measured here."""
    token_timeout_s: Seconds = 10
    """A floor: no token of any call for so long while one is due, and the engine hangs, whatever its /health says. It is
    longer while chunks are seen to come further apart, and while somebody's long prompt is computed."""
    timeout_factor: float = Field(default=3, ge=1)
    """How many times of what this engine was seen to need it may take, where that is more than the floors."""
    compile_timeout_s: Seconds = 180
    """What a new engine does for the first time may take so long: kernels are compiled."""
    max_timeout_s: Seconds = 600
    """The ceiling: no call waits longer for a token, nor for its turn in the engine's queue."""
    canary_idle_s: Seconds = 10
    """An engine that nobody used for so long is asked to compute one token's prompt, and while paused for its /server_info."""
    dead_after: int = Field(default=3, ge=1)
    """Failures in a row, of requests (broken connections, 5xx) or of probes, after which it is replaced."""
    stream_interval_tokens: int = Field(default=16, ge=1)
    partial_flush_s: Seconds = 1
    admission: AdmissionConfig = AdmissionConfig()
    retry: RetryConfig = RetryConfig()
    max_generations_per_turn: int = Field(default=6, ge=1)
    """Of one turn, whoever asks for it again and whichever engines it moves to; an attempt of a trial begins anew."""
    max_restarts: int = Field(default=100, ge=0)
    """Replacements of one engine within `restart_window_s` before it is retired. One that is attached is awaited for as long as
    it is listed."""
    restart_window_s: Seconds = 3600
    attach: AttachConfig = AttachConfig()

    @model_validator(mode="after")
    def _deadlines_fit(self) -> EngineConfig:
        for name in ("first_token_timeout_s", "token_timeout_s", "compile_timeout_s"):
            if getattr(self, name) > self.max_timeout_s:
                raise ValueError(f"engine.{name} is longer than engine.max_timeout_s, its ceiling: raise that, or lower this")
        return self

    @model_validator(mode="after")
    def _attached_is_not_launched(self) -> EngineConfig:
        if not self.attach.active:
            return self
        if self.kind == "small":
            raise ValueError("engine.attach needs engine.kind sglang: the small engine is started by us")
        for key in ("command", "args", "env", "num_gpus", "count"):
            if getattr(self, key) if key != "count" else "count" in self.model_fields_set:
                raise ValueError(f"engine.{key} is for engines that we start; remove it, or engine.attach")
        if self.token_timeout_s <= 2 * self.attach.poll_s:
            raise ValueError("engine.token_timeout_s must be more than twice engine.attach.poll_s: a pause would look like a hang")
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> EngineConfig:
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"engine.num_gpus: {self.num_gpus:g}: Ray assigns whole GPUs, or a part of one")
        if self.nodes > 1 and 0 < self.num_gpus < 1:
            raise ValueError("engine.nodes: an engine that shares a GPU has one node; set engine.num_gpus to 1 or more")
        if self.num_gpus and VISIBLE in self.env:
            raise ValueError(f"engine.env: {VISIBLE} is Ray's to set with engine.num_gpus; leave one of them out")
        return self


EVERYWHERE = ("0.0.0.0", "::")
"""Hosts that are every address of a machine, so that nobody can be sent there."""


class GatewayConfig(Settings):
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one."""
    count: int = Field(default=2, ge=1)
    advertise_url: str = ""
    """What agents are told (`base_url`), when it is not http(s)://host:port; for a host that is every address, a gateway's node."""
    tls_cert: str = ""
    tls_key: str = ""
    open_sessions: Literal["none", "v1", "v2"] = "none"
    """Whether anybody on this machine may open a session without a key, as miles' driver does, and use what it opened: miles'
    session server stands at this port then. `v1` gives its driver one sample a session, `v2` one for each path."""
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    kept_body_bytes: int = Field(default=256 * 2**20, ge=0)
    """Of large bodies that owners have read: of the next one of that session only what is new is sent on. 0 keeps none."""
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    max_headers: int = Field(default=100, ge=10)
    max_id_chars: int = Field(default=256, ge=64)
    """Of an Idempotency-Key."""
    max_json_depth: int = Field(default=64, ge=8, le=200)
    """Of a body; deeper than 254 nothing can be written again."""
    max_connections: int = Field(default=8192, ge=1)
    """Of one gateway; one more is answered 503 and closed."""
    header_timeout_s: Seconds = 20
    """How long the head of a request may take, from the connection or its first byte on."""
    body_timeout_s: Seconds = 60
    """How long the body may take after that."""
    send_timeout_s: Seconds = 60
    """A client that reads nothing of its reply for so long is cut off."""
    max_hold_s: Seconds = 570
    """A plain request is answered 503 after this, and its retry attaches."""
    deadline_margin_s: Seconds = 0.4
    """How long before the client's own read timeout that 503 leaves."""
    keepalive_s: Seconds = 10
    max_in_flight: int = Field(default=4096, ge=1)
    max_in_flight_per_session: int = Field(default=64, ge=1)
    """So that no session takes all of them."""
    ping_s: Seconds = 1
    """Owners with calls in flight are pinged so often; two misses and the supervisor is asked."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> GatewayConfig:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("gateway.tls_cert and gateway.tls_key go together: set both or none")
        return self

    @model_validator(mode="after")
    def _open_to_this_machine_only(self) -> GatewayConfig:
        if self.open_sessions == "none":
            return self
        advertised = urlsplit(self.advertise_url).hostname if self.advertise_url else self.host
        for key, host in (("host", self.host), ("advertise_url", advertised)):
            if not _is_loopback(host or ""):
                message = "gateway.open_sessions asks for no key and is for this machine alone"
                raise ValueError(f"{message}: gateway.{key} must be a loopback address")
        return self


class StoreConfig(Settings):
    replicas: int = Field(default=2, ge=1)
    min_replicas: int = Field(default=1, ge=1)
    commit_timeout_s: Seconds = 10
    call_timeout_s: Seconds = 2
    placement: Placement = Placement.SPREAD
    """`spread`: replicas stand on distinct nodes where there are several, and on the head last; `distinct`: never two on
    one node, however few replicas that leaves; `any`: where Ray puts them."""
    journal_dir: str = ""
    """Where commits are journalled on disk, a directory that every node with a replica sees; `none`: only in the memory of
    the replicas. Empty: `journal` in the directory that `run` writes to, elsewhere none."""
    memory_bytes: int = Field(default=4 * 2**30, ge=2**20)
    """What one replica keeps of its trials in memory and in Ray's object store. Past it the oldest sealed segments are
    in the journal alone, and are read back from there; without a journal the object store spills them to Ray's disk.
    Trials that were collected and released take nothing."""

    payload_copies: int = Field(default=1, ge=1)
    """On how many replicas the routed experts of a turn are kept; with the last of them they are lost, and no turn is."""
    payload_bytes: int = Field(default=4 * 2**30, ge=0)
    """Of routed experts on one replica, all trials together; what comes beyond is not kept. Ray may spill it to disk."""

    @model_validator(mode="after")
    def _min_fits(self) -> StoreConfig:
        if self.min_replicas > self.replicas:
            raise ValueError("store.min_replicas is larger than store.replicas: no commit could ever succeed")
        if self.payload_copies > self.replicas:
            raise ValueError("store.payload_copies is larger than store.replicas")
        return self


class FleetConfig(Settings):
    drain_timeout_s: Seconds = 600
    """How long the turns of an engine that is drained have to end; after that they go on at another."""
    ping_s: Seconds = 1
    """The supervisor pings every actor so often and waits so long for the answer; two misses and it is replaced."""
    order_timeout_s: Seconds = 60
    """How long an engine may take to pause, to go on, to give its memory up or to get it back."""
    update_timeout_s: Seconds = 600
    """How long an engine may take to load weights. One of ours that does not answer by then is replaced."""
    max_pause_s: Seconds = 3600
    """A pause, an update or an offload that takes longer is called out, in an event and by `GET /fleet`. It is not ended, for
    the trainer may rely on it: nothing is lost by waiting."""
    max_kills_share: float = Field(default=0.25, gt=0, le=1)
    """Of the engines, at least one, this share at most is replaced within `kill_window_s` on suspicion: because it stands
    still, fails or does not answer. That many at once have a cause in common, which no replacement cures. An engine whose
    process ended is replaced whenever that happens."""
    kill_window_s: Seconds = 60
    warmup_s: Seconds = 30
    """A new engine's share of new sessions grows to that of the others over this time."""


class SessionConfig(Settings):
    grace_s: Seconds = 60
    """How long a generation without a caller goes on, its retry being expected."""
    on_concurrent: Literal["sample", "attach"] = "sample"
    on_repeat: Literal["sibling", "replay_once"] = "sibling"
    max_replays: int = Field(default=2, ge=0)
    """How often a retry gets a reply that its client has in all likelihood; then it gets another sample."""
    max_vain_replays: int = Field(default=32, ge=1)
    """How often a reply that was never delivered whole is sent again; then a repeat gets another sample. Harnesses repeat
    up to 30 times when a network loses replies."""
    matcher: str = "canonical"
    """When two messages are the same: `canonical`, `strict`, or `module:function` from a message to bytes."""
    normalizers: list[str] = []
    """What may differ in the texts of tools and users when a trial is replayed: `timestamps`, `durations`, `uuids`, `temp_paths`,
    `hex_ids`, or `module:function` from a text to a text. Both texts are compared with what these find made equal; the recorded
    one is what stays. Only where a replay would leave its record otherwise, and only of requests that add 64 Ki characters
    at most."""
    max_turns: int = Field(default=10_000, ge=1)
    max_messages: int = Field(default=20_000, ge=1)
    max_tools: int = Field(default=512, ge=1)
    max_tokens: int = Field(default=2**26, ge=1)
    """Of all turns of a session together, each counted with what it adds to its path."""
    max_in_flight: int = Field(default=32, ge=1)
    max_steps: int = Field(default=20_000, ge=1)
    """Recorded steps of a trial's environment."""
    max_output_tokens: int = Field(default=8192, ge=1)
    """Used when neither the agent nor the session names a limit."""
    version_policy: Literal["mixed", "turn", "trial"] = "mixed"
    """What an update of the weights means to what was sampled before it. `mixed`: it stays, and spans tell which token is of
    which version; `turn`: all tokens of a turn are of one version, and one that is being generated begins anew; `trial`: all
    tokens of a trial are, and one that has any of another version starts from scratch."""
    max_staleness: int | None = Field(default=None, ge=0)
    """How many updates the oldest token of a trial may be behind the trainer; none: any number."""
    on_stale: Literal["refuse", "restart"] = "refuse"
    """What becomes of a trial that is older: its next request gets a final error, or it starts from scratch."""
    special_tokens_in_text: Literal["keep", "refuse"] = "keep"
    """A message that contains the text of a special token (`<|im_end|>`): `keep` encodes it as that token, as serving
    stacks do, so that an agent can write turns that nobody took; `refuse` is a 400."""


class SamplingConfig(Settings):
    parameters: dict[str, Any] = {}
    """Sampling parameters of every session, under what a session itself is opened with."""
    policy: Literal["force", "default"] = "force"
    """Whether they win over the agent's, or hold only for what the agent does not say."""


class SamplesConfig(Settings):
    resampled: Literal["drop", "export"] = "drop"
    """Samples that a harness received, threw away and asked for again; exported paths say `"resampled": true`."""
    routed_experts: bool = False
    """Engines are asked which experts routed each token (SGLang: it is started with --enable-return-routed-experts), and
    paths say it. In memory and on the wire it is the largest part of a turn: layers times topk bytes a token."""


class TrialConfig(Settings):
    recovery: Recovery = Recovery.RESUME
    max_restarts: int = Field(default=8, ge=0)
    """Attempts after the first that infrastructure faults may cost; then the outcome is `infra_exhausted`."""
    max_env_restarts: int = Field(default=3, ge=0)
    """How often a trial's environment may be lost and replaced, with its agent or under it; then the outcome is `env_failed`."""
    max_agent_restarts: int = Field(default=1, ge=0)
    """Attempts after the first that an agent gets that raised or was stuck, and nobody knows why; then it is `agent_failed`."""
    attempt_timeout_s: Seconds = 3600
    """How long an attempt may take, the time left out in which the trainer kept the engines still; then it is `truncated`."""
    turn_timeout_s: Seconds | None = None
    """How long a turn may be generated for; then the trial is `truncated`. Engines that stand still are found without it."""
    agent_idle_s: Seconds = 1800
    """An agent that waits for neither a turn nor a tool of its environment for so long is stuck."""
    environment: str = ""
    """`module:function`, from (task, trial_id, directory) to the environment that the agent's tools act on;
    `rollout_ft.trial.sandbox:local` is the one that comes with this."""
    sandbox_dir: str = ""
    """Where environments keep what outlives processes, in a directory of the run's name; else in `DIR/sandboxes`, or without a
    DIR in a temporary one."""
    record_tools: bool = True
    """Results of an environment's steps are committed, and an agent that replays gets them from there."""
    snapshot_every_steps: int = Field(default=1, ge=1)
    """Of environments that can be saved: steps behind the last snapshot are taken again."""
    tool_timeout_s: Seconds = 600
    """How long an environment may take for a step; then it is lost."""
    concurrency: int = Field(default=16, ge=1)
    agent: str = ""
    """`module:function`, called with (task, base_url, api_key) in a process of its own."""
    command: list[str] = []
    """Or a program with its arguments, each attempt in a process group of its own: see `rollout_ft.trial.commands`."""
    tasks: str = ""
    """A JSON-lines file: one task a line, each with a `task_id`."""
    max_version_restarts: int = Field(default=100, ge=0)
    """How often a trial starts from scratch for `session.version_policy` or `session.max_staleness`; more, and trials take
    longer than the trainer's updates leave them."""
    max_lost: int = Field(default=0, ge=0)
    """How many lost trials `run` tolerates before it exits with 1. One that was replaced is not counted."""
    on_divergence: Literal["branch", "fail", "serve"] = "branch"
    """What a request of a replay gets that is not the recorded one: `branch` goes on live behind the last turn in common;
    `fail` ends the trial, and its cause says what differs first; `serve` gives the recorded reply where only texts of tools or
    users differ, and the trajectory stays the record's, else it branches. `session.normalizers` come before."""
    group_size: int = Field(default=1, ge=1)
    """How often each task is played; more than 1, and its trials `{task_id}.0`, `{task_id}.1`, … are a group. A task that names its
    own `group_id` is a member of that group, and is played once."""
    on_lost_member: Literal["complete", "shrink", "drop"] = "shrink"
    """What becomes of a group of which a trial is lost to infrastructure or environment, or cancelled: another is played in its
    place; the others are the group; none of it counts, and those of it that wait are not begun."""
    max_replacements: int = Field(default=0, ge=0)
    """For `complete`, in a group: one lost trial more, and it is dropped."""
    min_group_size: int = Field(default=MIN_GROUP_SIZE, ge=1)
    """For `shrink`: with fewer trials left a group is dropped."""

    @model_validator(mode="after")
    def _groups_can_be_decided(self) -> TrialConfig:
        if self.on_lost_member == "complete" and not self.max_replacements:
            raise ValueError("trial.on_lost_member complete needs trial.max_replacements: how many trials of a group may be replaced")
        if self.on_lost_member != "complete" and self.max_replacements:
            raise ValueError(f"trial.max_replacements is for trial.on_lost_member complete, not {self.on_lost_member}")
        if self.on_lost_member != "shrink" and self.min_group_size != MIN_GROUP_SIZE:
            raise ValueError(f"trial.min_group_size is for trial.on_lost_member shrink, not {self.on_lost_member}")
        if self.min_group_size > self.group_size > 1:
            raise ValueError(f"trial.min_group_size {self.min_group_size} is more than trial.group_size {self.group_size}")
        return self

    @model_validator(mode="after")
    def _replays(self) -> TrialConfig:
        if self.on_divergence != "branch" and self.recovery is not Recovery.RESUME:
            raise ValueError(f"trial.on_divergence: with trial.recovery {self.recovery.value} nothing is replayed; leave one of them out")
        return self

    @model_validator(mode="after")
    def _one_agent(self) -> TrialConfig:
        if self.agent and self.command:
            raise ValueError("trial.agent and trial.command are both set, and an attempt is one of them; clear the other: trial.agent=")
        return self


class TelemetryConfig(Settings):
    metrics: bool = True
    """Turns are counted and timed, for Ray's Prometheus endpoint and `run.metrics()`; without, both are empty."""
    tracing: Literal["auto", "on", "off"] = "auto"
    """OpenTelemetry spans of trials, attempts, turns and engine calls, which `rollout-ft[tracing]` sends where the standard
    environment variables say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_BSP_MAX_QUEUE_SIZE, …), those of the process
    that starts the run: `auto` where they name an endpoint; `on` without one sends to this machine."""
    max_events_bytes: int = Field(default=256 * 2**20, ge=2**16)
    """How much of a disk the events of a run may take; of older ones the account is kept."""


class Config(Settings):
    run: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Name of the run: the first part of every actor's name."""
    seed: int = 0
    orphan_s: Seconds = 60
    """Without a sign of life from who started the run for so long, its actors end themselves."""
    ray: RayConfig = RayConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()
    store: StoreConfig = StoreConfig()
    fleet: FleetConfig = FleetConfig()
    session: SessionConfig = SessionConfig()
    sampling: SamplingConfig = SamplingConfig()
    samples: SamplesConfig = SamplesConfig()
    trial: TrialConfig = TrialConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.engine.kind == "sglang" and self.model.path == "small":
            raise ValueError("engine.kind sglang needs model.path: the directory of a real model")
        if self.engine.kind == "sglang":
            arguments.check(self.engine.args, num_gpus=self.engine.num_gpus, nodes=self.engine.nodes)
        if self.session.max_output_tokens >= self.model.context_tokens:
            raise ValueError("session.max_output_tokens leaves no room for a prompt in model.context_tokens")
        if self.model.tool_parser == "gpt-oss" != self.model.reasoning_parser:
            raise ValueError("model.tool_parser gpt-oss needs model.reasoning_parser gpt-oss: it drops the reasoning otherwise")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_url(text: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def load(path: str | Path | None = None, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides, and refuses what cannot work.

    Raises ConfigError naming the file, the key and the nearest known key.
    """
    data: dict[str, Any] = _read_yaml(Path(path)) if path else {}
    if isinstance(overrides, dict):
        for key, value in overrides.items():
            _set(data, key, value)
    for item in overrides if isinstance(overrides, list) else []:
        _apply(data, item)
    try:
        return Config.model_validate(data)
    except ValidationError as e:
        raise ConfigError("; ".join(_explain(err) for err in e.errors())) from None


def journalled(config: Config) -> bool:
    """Whether commits are on disk before they are acknowledged."""
    return config.store.journal_dir not in ("", "none")


def model_dir(config: Config) -> str:
    """The directory of the model, checked to be there."""
    path = Path(config.model.path)
    if config.model.path == "small":
        path = Path(__file__).parent / "testing" / "small_engine" / "model"
    if not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
        raise ConfigError(f"model.path: no tokenizer in {path}; set it to a model's directory, or to `small`")
    return str(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        data: Any = orjson.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as e:
        raise ConfigError(f"config file {path}: {os.strerror(e.errno or 0)}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(e).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path}: the top level must be keys and values")
    return cast(dict[str, Any], data)


def _apply(data: dict[str, Any], item: str) -> None:
    key, eq, text = item.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {item!r}: write it as key.path=value")
    try:
        _set(data, key.strip(), yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {item!r}: {text!r} is not a YAML value") from None


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        inner: Any = data.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override of {key}: {name} is a value, not a section")
        data = cast(dict[str, Any], inner)
    data[last] = value


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']}" if key else str(error["msg"])
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
    return f"{key}: no such key; did you mean {near[0]}?" if near else f"{key}: no such key"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All keys, dotted: what an unknown one is compared with."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
    return keys
