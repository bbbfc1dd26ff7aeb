"""Rendezvous of the ranks of one group, for collectives among themselves.

    rank 0   opens a store on a free port and *keeps* it     -> Rendezvous(host, port)
    rank i   joins it; then torch.distributed's default group is the worker group

No port is looked for, closed and opened again, so no other process can take it in between. The
store has no lock of its own: it listens on the loopback interface where all ranks are on one
machine, and otherwise on the one interface that Ray uses between the machines, never on all of
them.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_LOOPBACK = "127.0.0.1"
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Address at which the ranks of a group meet.

    Attributes:
        host: Address of rank 0's store.
        port: Its port.
        size: Ranks that are expected.
    """

    host: str
    port: int
    size: int

    @property
    def on_one_machine(self) -> bool:
        """True if all ranks share a machine."""
        return self.host == _LOOPBACK


def open_rendezvous(
    size: int, address: str, *, on_one_machine: bool, timeout_s: float
) -> tuple[dist.TCPStore, Rendezvous]:
    """Opens the store; rank 0 keeps it as long as the group lives.

    Args:
        size: Ranks that are expected.
        address: Of this machine, as the other machines of the cluster reach it.
        on_one_machine: Whether all ranks are here.
        timeout_s: How long a rank may take to come.
    """
    host = _LOOPBACK if on_one_machine else address
    listener = socket.create_server((host, 0), backlog=_BACKLOG)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        world_size=size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        # The store takes the open socket over.
        master_listen_fd=listener.detach(),
        use_libuv=True,
    )
    return store, Rendezvous(host, port, size)


def join_rendezvous(
    rendezvous: Rendezvous, rank: int, timeout_s: float, store: dist.TCPStore | None = None
) -> None:
    """Makes the group torch.distributed's default one in this process; waits for all ranks.

    Args:
        rendezvous: Where.
        rank: Of this process.
        timeout_s: How long a rank may take to come, and later a collective.
        store: Rank 0's own.
    """
    timeout = timedelta(seconds=timeout_s)
    if rendezvous.on_one_machine:
        # Gloo's own sockets, too, stay on the loopback interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if store is None:
        store = dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, timeout=timeout, use_libuv=True
        )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=rank,
        world_size=rendezvous.size,
        timeout=timeout,
    )
