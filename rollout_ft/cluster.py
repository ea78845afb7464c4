"""Ray: joined or started, with everything set that Ray would otherwise guess.

Owns `ray.init` and what must be cleaned up after it. Names, namespace and auth mode are always ours. Joining another
version's cluster is refused before anything is changed in it.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

from rollout_ft.config import RayConfig
from rollout_ft.errors import ConfigError
from rollout_ft.rayapi import ray

CONNECT_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Cluster:
    """A cluster we are connected to. `temp_dir` and `environment` (what we set) belong to one that we started."""

    address: str
    temp_dir: str = ""
    environment: tuple[str, ...] = ()

    def leave(self) -> None:
        """Disconnects; a cluster that we started ends, and nothing of it is left."""
        ray.shutdown()
        for name in self.environment:
            os.environ.pop(name, None)
        if self.temp_dir:
            shutil.rmtree(self.temp_dir, ignore_errors=True)


def connect(config: RayConfig, **job: Any) -> Cluster:
    """Joins the cluster that the config or RAY_ADDRESS names, else starts one. `job`: for `ray.init`. Raises ConfigError."""
    if ray.is_initialized():
        raise ConfigError("this process is connected to Ray already; call ray.shutdown() first, or start in another process")
    address = _running() if config.address == "auto" else config.address
    if address in ("", "local"):
        return _start(config, job)
    common: dict[str, Any] = {"namespace": config.namespace, "log_to_driver": False, "logging_level": logging.ERROR, **job}
    _answers(address)
    try:
        context: Any = ray.init(address=address, **common)
    except RuntimeError as e:
        raise ConfigError(f"ray.address {address}: {_one_line(e)} (this is Ray {ray.__version__})") from None
    except ConnectionError as e:
        raise ConfigError(
            f"ray.address {address}: no cluster answers there ({_one_line(e)}); start one, or set ray.address=local"
        ) from None
    return Cluster(context.address_info["address"])


def _running() -> str:
    """The cluster that RAY_ADDRESS names, or that runs on this machine; empty when there is none."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named:
        return named
    found: str | None = ray._private.utils.read_ray_address()
    try:
        _answers(found or "")
    except ConfigError:
        return ""  # what a cluster that was killed left behind
    return found or ""


def _start(config: RayConfig, job: dict[str, Any]) -> Cluster:
    temp_dir = tempfile.mkdtemp(prefix="rft-")
    cluster = Cluster("", temp_dir, _set_environment(config, temp_dir))
    try:
        context: Any = ray.init(
            address="local",
            namespace=config.namespace,
            num_cpus=config.num_cpus,
            include_dashboard=config.dashboard,
            object_store_memory=config.object_store_bytes,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=temp_dir,
            _node_ip_address="127.0.0.1",
            **job,
        )
    except Exception:
        cluster.leave()
        raise
    cluster.address = context.address_info["address"]
    return cluster


def _set_environment(config: RayConfig, temp_dir: str) -> tuple[str, ...]:
    """What a cluster's processes read from the environment, where nobody set it; returns the names that we set."""
    ours = {"RAY_AUTH_MODE": config.auth_mode, "RAY_TMPDIR": temp_dir}
    # Ray's default niceness of 15 starves the engines' actors wherever anything else runs.
    ours["RAY_worker_niceness"] = "0"
    mode = os.environ.get("RAY_AUTH_MODE", config.auth_mode)
    if mode == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        ours["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    names = tuple(name for name in ours if name not in os.environ)
    os.environ.update({name: ours[name] for name in names})
    reread_environment()
    return names


def _answers(address: str) -> None:
    """Ray itself would wait for minutes for a cluster that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as e:
        raise ConfigError(f"ray.address {address}: nobody answers there ({e}); start a cluster, or set ray.address=local") from None


def restore_signals() -> None:
    """Puts this process's own handlers back: Ray installs one for SIGTERM that aborts. From the main thread only."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


def reread_environment() -> None:
    """Ray reads its auth mode when it is imported, which may be before anybody asked us for it."""
    raylet = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__
