"""How the processes of a job meet: whether they can reach each other, and under a new name where a store outlives them.

torchrun keeps one store for all restarts of its processes (seen in torch 2.13). In it, gloo finds the addresses of
processes that have ended, and waits for them. Under a name that only the present processes know, nothing old is found.
"""

import ipaddress
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed

from edm2kit.torch_utils.dist import env_int

_POLL_SEC = 0.05


def check_variables() -> None:
    """Raise ValueError if the processes cannot meet with the environment variables that they have."""
    rank, size, port = env_int("RANK", 0), env_int("WORLD_SIZE", 1), env_int("MASTER_PORT", 1)
    if rank >= size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {size}, but ranks count from 0 up. Correct or unset both")
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT is {port}; expected a port from 1 to 65535. Correct or unset it")
    check_host_name()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start the processes with torchrun, or unset "
            "WORLD_SIZE"
        )


def check_host_name() -> None:
    """Raise ValueError if the job spans several machines and the others could not reach this one.

    Gloo, which also exchanges a flag per training step beside NCCL, listens at the address that the name of the machine
    resolves to, unless GLOO_SOCKET_IFNAME names a network interface. Many systems resolve the name to 127.0.1.1.
    """
    size = env_int("WORLD_SIZE", 1)
    if size <= env_int("LOCAL_WORLD_SIZE", size) or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        if not ipaddress.ip_address(address).is_loopback:
            return
        reason = f"resolves to {address}, where only processes on this machine reach it"
    except OSError:
        reason = "has no address"
    interfaces = ", ".join(interface for _, interface in socket.if_nameindex() if interface != "lo")
    raise ValueError(
        f"the job spans several machines, and the name of this one, {name}, {reason}. Set GLOO_SOCKET_IFNAME, and "
        f"NCCL_SOCKET_IFNAME, to the network interface that connects them (here: {interfaces or 'none found'})"
    )


def group_arguments(limit_sec: float) -> dict[str, Any]:
    """Arguments for `init_process_group`: the longest wait and, under torchrun, a store without anything old.

    Raises DistStoreError if not all processes have come in `limit_sec`.
    """
    limit = timedelta(seconds=limit_sec)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {"timeout": limit}
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=limit))
    name = meet(store, rank, size, limit_sec)
    fresh = torch.distributed.PrefixStore(name, store)
    return {"timeout": limit, "store": fresh, "rank": rank, "world_size": size}


def meet(
    store: Any, rank: int, size: int, limit_sec: float, pause: Callable[[], object] = lambda: time.sleep(_POLL_SEC)
) -> str:
    """A name that the `size` ranks of this meeting share, and no earlier one had, although the store may hold old keys.

    Each rank says hello under a number of its own; rank 0 answers each number with the name, and waits until all have
    used it. Processes of the past neither read an answer nor come to the new name. Raises DistStoreError.
    """
    end = time.monotonic() + limit_sec
    name, own = f"edm2kit/meeting/{uuid.uuid4().hex}", uuid.uuid4().hex
    if rank != 0:
        store.set(f"edm2kit/hello/{rank}", own)
        answer = f"edm2kit/answer/{own}"
        while not store.check([answer]):
            _give_up_after(end, limit_sec, "rank 0 has not answered")
            pause()
        name = store.get(answer).decode()
        store.set(f"{name}/{rank}", "here")
        return name
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            hello = f"edm2kit/hello/{other}"
            if store.check([hello]):
                store.set(f"edm2kit/answer/{store.get(hello).decode()}", name)
        missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        if missing:
            _give_up_after(end, limit_sec, f"rank {min(missing)} has not come")
            pause()
    return name


def _give_up_after(end: float, limit_sec: float, reason: str) -> None:
    if time.monotonic() > end:
        raise torch.distributed.DistStoreError(f"timed out after {limit_sec:.0f} s: {reason}")
