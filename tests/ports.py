"""Ports for servers that a test starts itself."""

from __future__ import annotations

import socket


def free_port() -> int:
    """One that was free a moment ago, on 127.0.0.1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
