"""A meeting of the processes of a job under a new name, where the store outlives them.

torchrun keeps one store for all restarts of its processes (seen in torch 2.13). In it, gloo finds the addresses of
processes that have ended, and waits for them. Under a name that only the present processes know, nothing old is found.
"""

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed

_POLL_SEC = 0.05


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
