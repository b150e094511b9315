"""The store where ranks meet, without the traces of an earlier start."""

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

POLL_SECONDS = 0.02


def fresh_store(store: Store, rank: int, ranks: int, timeout: timedelta) -> Store:
    """`store` under a new prefix that all ranks of this start share.

    torchrun keeps one store while it restarts its processes, which would connect to addresses that
    dead processes have left there (pytorch/pytorch issue 135712). Its agents may have restarted a
    different number of times on each machine, so the ranks agree on a name: rank 0 invents one and
    lists under it the ranks that have answered to it; a rank that the list lacks has read an
    earlier start's name, and reads again. Raises TimeoutError, on ranks above 0, when there is no
    rank 0.
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
