"""Where ranks meet, swept clean of an earlier start's traces."""

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

POLL_SECONDS = 0.02


def fresh_store(store: Store, rank: int, ranks: int, timeout: timedelta) -> Store:
    """`store` under a prefix that is common to this start of all ranks, and new.

    torchrun keeps one store while it starts its processes anew, and they would connect to addresses
    that dead ones have left there (pytorch/pytorch issue 135712). How often each of its agents has
    restarted need not be the same on all machines, so the ranks agree on a name: rank 0 invents one
    and lists under it who has answered to it; a rank that finds itself in no list reads an earlier
    start's name, and looks again. Raises TimeoutError, on ranks above 0, when there is no rank 0.
    """
    answer = uuid.uuid4().hex
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("name", name)
        present = [store.get(f"{name}/{other}").decode() for other in range(1, ranks)]
        store.set(f"{name}/present", json.dumps(present))
        return PrefixStore(name, store)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        name = store.get("name").decode()
        store.set(f"{name}/{rank}", answer)
        listed = f"{name}/present"
        if store.check([listed]) and answer in json.loads(store.get(listed)):
            return PrefixStore(name, store)
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"rank {rank} waited {timeout} for rank 0")
