"""What Ray's own dashboard shows of the job that a run belongs to: the run's name, and where its status page is.

Owns the job's metadata. Ray takes a driver's only when it connects, before the gateway has a port; that of a submitted job is an
entry of its key-value store, which may be added to. It is for people: a run does not fail for it, and no key is ever in it.
"""

from __future__ import annotations

import json
import logging
import os

from rollout_ft.config import EVERYWHERE, Config
from rollout_ft.rayapi import ray
from rollout_ft.types import JSON

RUN, STATUS = "rollout_ft.run", "rollout_ft.status"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of a submitted job's entry point."""
_NAMESPACE, _KEY = "job", "_ray_internal_job_info_{}"
_log = logging.getLogger("rollout_ft")


def metadata(config: Config) -> dict[str, str]:
    """What is known before anything is started: the page's address where the config fixes it."""
    gateway = config.gateway
    scheme = "https" if gateway.tls_cert else "http"
    fixed = gateway.port and gateway.host not in EVERYWHERE
    url = gateway.advertise_url or (f"{scheme}://{gateway.host}:{gateway.port}" if fixed else "")
    return {RUN: config.run} | ({STATUS: page(url)} if url else {})


def page(gateway_url: str) -> str:
    return f"{gateway_url.rstrip('/')}/status"


def submission_id() -> str:
    """Of the submitted job that this process is the entry point of; empty for any other."""
    try:
        said: JSON = json.loads(os.environ.get(JOB_CONFIG, "{}"))
        return said.get("metadata", {}).get("job_submission_id", "")
    except (ValueError, AttributeError):
        return ""


def announce(config: Config, gateway_url: str) -> None:
    """Adds to the submitted job's metadata, if this is one. Blocks."""
    if not (job := submission_id()):
        return
    try:
        from ray.experimental import internal_kv

        key = _KEY.format(job).encode()
        told: JSON = json.loads(internal_kv._internal_kv_get(key, namespace=_NAMESPACE))  # pyright: ignore
        told["metadata"] = {**(told.get("metadata") or {}), **metadata(config), STATUS: page(gateway_url)}
        internal_kv._internal_kv_put(key, json.dumps(told).encode(), overwrite=True, namespace=_NAMESPACE)  # pyright: ignore
    except Exception:
        _log.warning("job %s does not say where the status page is", job, exc_info=True)


def job_config(config: Config) -> object:
    """For `ray.init`."""
    return ray.job_config.JobConfig(metadata=metadata(config))
