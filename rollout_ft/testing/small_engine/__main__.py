"""Start small engines: one model, one or more ports.

Owns the command line and the life of the process. Must not know what the options mean to others. The subtle
invariant: the sockets are opened when everything else is there, so that a port that accepts belongs to an engine that
can serve; and a run loop that fails takes the process along, since an engine that answers `/health` and computes
nothing would be the worst of both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import uvicorn
import uvloop

from rollout_ft.clock import monotonic
from rollout_ft.testing.small_engine import MODEL_DIR, ranks
from rollout_ft.testing.small_engine.counter import Counter
from rollout_ft.testing.small_engine.hash_model import HashModel
from rollout_ft.testing.small_engine.model import Model
from rollout_ft.testing.small_engine.routed import Experts
from rollout_ft.testing.small_engine.scheduler import Limits, Scheduler
from rollout_ft.testing.small_engine.server import Application, Settings
from rollout_ft.testing.small_engine.vocabulary import Vocabulary, load_vocabulary
from rollout_ft.testing.small_engine.weights import Weights

_BACKLOG = 2048


def _ports(value: str) -> list[int]:
    ports = [int(port) for port in value.split(",")]
    if len(set(ports)) != len(ports) or not all(0 < port < 65536 for port in ports):
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of different ports")
    return ports


def _experts(value: str) -> Experts:
    try:
        layers, topk, count = map(int, value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not LAYERS,TOPK,EXPERTS") from None
    return Experts(layers, topk, count)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m rollout_ft.testing.small_engine", description=__doc__)
    add = parser.add_argument
    add("--model-path", type=Path, default=MODEL_DIR, help="directory with the tokenizer (default: the one shipped)")
    add("--host", default="127.0.0.1")
    add("--port", type=_ports, default=[30000], help="P, or P1,P2,… for as many independent engines")
    add("--model", choices=("transformer", "hash"), default="transformer")
    add("--tokens-per-s", type=float, default=80.0, help="pace of each request; 0: as fast as it goes")
    add("--stream-interval", type=int, default=4, help="tokens per chunk")
    add("--incremental-streaming-output", action="store_true", help="chunks hold what is new, not everything so far")
    add("--weight-version", default="v0", help="names the weights: equal names are equal weights")
    add("--count-file", type=Path, help="file to count sampled tokens in, a little-endian uint64")
    add("--context-length", type=int, help="tokens of prompt and output (default: as the model's config says)")
    add("--enable-memory-saver", action="store_true", help="memory that is released is gone, and weights with it")
    add("--max-running-requests", type=int, default=1024)
    add("--max-queued-requests", type=int, help="how many may wait beyond those that run (default: no limit)")
    add("--routed-experts", type=_experts, metavar="LAYERS,TOPK,EXPERTS", help="return routed experts of this shape when asked")
    ranks.add_arguments(parser)
    return parser.parse_args(argv)


def _model(name: str, vocabulary: Vocabulary) -> Model:
    if name == "hash":
        return HashModel(vocabulary)
    # Half of the time to start is importing torch; the hash model does without.
    from rollout_ft.testing.small_engine.transformer import Transformer

    return Transformer(vocabulary)


def _listen(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(_BACKLOG)
    return sock


async def _compute(engine: Scheduler) -> None:
    try:
        await engine.run()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


async def _serve(options: argparse.Namespace, began: float) -> None:
    place = ranks.place_of(options)
    if not place.first:
        return await ranks.follow(place, _listen(options.host, options.port[0]))
    vocabulary = load_vocabulary(options.model_path)
    limits = Limits(
        tokens_per_s=options.tokens_per_s,
        stream_interval=options.stream_interval,
        context_length=options.context_length or vocabulary.context_length,
        max_running=options.max_running_requests,
        max_queued=options.max_queued_requests,
        experts=options.routed_experts,
        waiting_s=float(os.environ.get("SGLANG_REQ_WAITING_TIMEOUT") or -1),
        running_s=float(os.environ.get("SGLANG_REQ_RUNNING_TIMEOUT") or -1),
    )
    counter = Counter(options.count_file)
    engines: dict[int, Scheduler] = {}
    for port in options.port:
        weights = Weights(_model(options.model, vocabulary), options.weight_version, options.enable_memory_saver)
        engines[port] = Scheduler(vocabulary, limits, weights, counter, monotonic)
    start_s = time.perf_counter() - began
    settings = Settings(options.model_path, options.incremental_streaming_output, options.weight_version, start_s)
    config = uvicorn.Config(
        Application(engines, settings),
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        timeout_keep_alive=int(os.environ.get("SGLANG_TIMEOUT_KEEP_ALIVE") or 5),
        backlog=_BACKLOG,
    )
    await ranks.meet(place)
    sockets = [_listen(options.host, port) for port in options.port]
    # Kept in a variable: the loop itself holds tasks by weak references only.
    runs = [asyncio.create_task(_compute(engine)) for engine in engines.values()]
    ports = ",".join(map(str, options.port))
    print(f"small engine ready on {options.host}:{ports} in {time.perf_counter() - began:.2f} s", flush=True)
    try:
        await uvicorn.Server(config).serve(sockets)
    finally:
        for run in runs:
            run.cancel()


if __name__ == "__main__":
    uvloop.run(_serve(_arguments(sys.argv[1:]), time.perf_counter()))
