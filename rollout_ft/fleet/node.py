"""Where this process runs, as Ray sees it.

Owns two lookups that Ray has no public name for in a worker: the node's own address (not the one that a route to the
outside would have) and its log directory.
"""

from __future__ import annotations

from rollout_ft.rayapi import ray


def node_ip(loopback: bool) -> str:
    """The address under which the other actors of the run reach this node."""
    return "127.0.0.1" if loopback else str(ray._private.worker.global_worker.node_ip_address)


def logs_dir() -> str:
    """Where Ray's dashboard looks for logs."""
    return str(ray._private.worker._global_node.get_logs_dir_path())
