"""The Ray actor around one gateway: several share a port, so that one may die.

Owns the listening socket and the lease. Decides nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from rollout_ft.config import EVERYWHERE, GatewayConfig
from rollout_ft.fleet.crew import Setup, shown_as
from rollout_ft.fleet.lease import Lease, live
from rollout_ft.fleet.node import node_id, node_ip, settle
from rollout_ft.fleet.remote import RemoteSupervisor
from rollout_ft.gateway.asgi import Server
from rollout_ft.gateway.gateway import Gateway
from rollout_ft.gateway.keys import Keys
from rollout_ft.gateway.owners import Owners
from rollout_ft.line import token_of
from rollout_ft.rayapi import ray
from rollout_ft.telemetry.metrics import Readings, counting
from rollout_ft.telemetry.tracing import LAST_FLUSH_S, OFF, tracing_of
from rollout_ft.testing.faults import fault_points
from rollout_ft.types import JSON


def bind(host: str, port: int) -> socket.socket:
    """A socket that shares its port with the other gateways of the run."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    return sock


def base_url(config: GatewayConfig, port: int, node: str) -> str:
    """What agents and people are told. `node`: a gateway's, whose address is told where it listens on all."""
    scheme = "https" if config.tls_cert else "http"
    host = node if config.host in EVERYWHERE else config.host
    return (config.advertise_url or f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}").rstrip("/")


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"health": 4, "watch": 16})
class GatewayActor:
    def __init__(self, setup: Setup, name: str, port: int):
        self._setup, self._name, self._port = setup, name, port
        self._lease = Lease(setup.config.orphan_s)
        self._tracing = OFF
        self._started: asyncio.Task[JSON] | None = None
        self._readings: Callable[[], Readings] = Readings

    async def start(self) -> JSON:
        """Listens and serves. Idempotent: an answer that was lost on the way is asked for again."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        return await asyncio.shield(self._started)

    async def _start(self) -> JSON:
        asyncio.create_task(live(self._lease))  # noqa: RUF006 - lives as long as the process
        setup, config = self._setup, self._setup.config.gateway
        keys = Keys(setup.secret)
        supervisor = RemoteSupervisor(setup.config.run, setup.namespace)
        owners = self._owners = Owners(supervisor, token_of(keys.internal), config.ping_s)
        faults = fault_points(setup)
        tracing = self._tracing = tracing_of(setup, str(ray.get_runtime_context().get_actor_name()))
        counts = counting(setup.config.telemetry.metrics)
        url = base_url(config, self._port, node_ip(setup.loopback))
        gateway = Gateway(config, keys, supervisor, owners, url, faults, setup.config.model, counts, tracing)
        self._readings = gateway.readings
        server = Server(gateway.handle, bind(config.host, self._port), config)
        await server.ready()
        settle()
        return await self.describe()

    async def describe(self) -> JSON:
        return {
            "pid": os.getpid(), "port": self._port, "node": node_ip(self._setup.loopback), "node_id": node_id(),
            "incarnations": self._owners.incarnations(),
        }  # fmt: skip

    async def renew(self, heard: int) -> tuple[list[JSON], Readings]:
        """The run lives; hands over all that was counted."""
        self._lease.renew()
        return [], self._readings()

    async def stop(self) -> None:
        await self._tracing.flush(LAST_FLUSH_S)
        ray.actor.exit_actor()

    @ray.method(concurrency_group="health")
    async def ping(self) -> int:
        return self._port

    @ray.method(concurrency_group="watch")
    async def forever(self) -> None:
        """Never returns: its failure is the news of this actor's death."""
        await asyncio.Event().wait()

    def __repr__(self) -> str:
        return shown_as(self._name)
