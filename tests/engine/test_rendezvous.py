"""Ranks find each other, and nothing that ranks before them have left."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import Store, TCPStore

from notus.engine.rendezvous import fresh_store

WAIT = timedelta(seconds=20)


def meet(port: int, ranks: int) -> list[Store]:
    """All ranks at the same time, in the order in which they are slowest."""
    with ThreadPoolExecutor(ranks) as threads:
        stores = [TCPStore("localhost", port, is_master=False, timeout=WAIT) for _ in range(ranks)]
        return [
            future.result()
            for future in [
                threads.submit(fresh_store, stores[rank], rank, ranks, WAIT)
                for rank in reversed(range(ranks))
            ]
        ][::-1]


def test_a_second_start_shares_a_store_of_its_own():
    with_agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for count in (3, 3, 2):
        stores = meet(with_agent.port, count)
        assert not stores[-1].check(["address"])
        stores[0].set("address", f"of {count}")
        assert all(store.get("address") == f"of {count}".encode() for store in stores)


def test_a_rank_that_waits_in_vain_says_so():
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.set("name", "of an earlier start")
    with pytest.raises(TimeoutError, match="rank 1 waited 0:00:00.200000 for rank 0"):
        fresh_store(store, 1, 2, timedelta(seconds=0.2))
