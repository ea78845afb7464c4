"""An engine over several nodes, played: the ranks meet before rank 0 serves, and the others answer health checks only.

Owns the meeting. As with the real one, a rank above 0 calls itself healthy whatever becomes of the engine, and none ends
because another does: who ends them is whoever started them.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from dataclasses import dataclass

JOIN_PAUSE_S = 0.05
_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many ranks this is, and where they meet."""

    nodes: int
    number: int
    host: str
    port: int

    @property
    def first(self) -> bool:
        return self.number == 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nnodes", type=int, default=1, help="ranks of this engine, each a process")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is; 0 is the one that serves")
    parser.add_argument("--dist-init-addr", default="127.0.0.1:0", help="HOST:PORT of rank 0, where they meet")


def place_of(options: argparse.Namespace) -> Place:
    host, _, port = options.dist_init_addr.rpartition(":")
    return Place(options.nnodes, options.node_rank, host, int(port))


async def meet(place: Place) -> None:
    """Returns for rank 0 when all others have come."""
    if place.nodes == 1:
        return
    here: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    server = await asyncio.start_server(lambda _, writer: here.put_nowait(writer), place.host, place.port)
    writers = [await here.get() for _ in range(place.nodes - 1)]
    server.close()
    for writer in writers:
        writer.close()


async def follow(place: Place, sock: socket.socket) -> None:
    """The whole life of another rank: it joins, and says that it is well."""
    while True:
        try:
            _, writer = await asyncio.open_connection(place.host, place.port)
            break
        except OSError:
            await asyncio.sleep(JOIN_PAUSE_S)
    writer.close()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(_HEALTHY)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, sock=sock)
    await server.serve_forever()
