"""Ranks meet under a name that nothing in the store of an earlier attempt can be taken for."""

import threading

import pytest
import torch.distributed

from edm2kit.torch_utils import meeting


def met(store: object, size: int, ranks: range | None = None, limit_sec: float = 20) -> dict[int, str]:
    """The name that each of `ranks` gets, all at once."""
    found: dict[int, str] = {}

    def take_part(rank: int) -> None:
        try:
            found[rank] = meeting.meet(store, rank, size, limit_sec)
        except torch.distributed.DistStoreError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=take_part, args=[rank]) for rank in ranks or range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_ranks_get_one_name_and_the_next_attempt_another():
    store = torch.distributed.HashStore()
    first, second = met(store, 4), met(store, 4)
    assert len(first) == len(second) == 4
    assert len(set(first.values())) == len(set(second.values())) == 1
    assert first[0] != second[0]


def test_hellos_of_processes_that_have_ended_delay_nothing():
    store = torch.distributed.HashStore()
    for rank in (1, 2):
        store.set(f"edm2kit/hello/{rank}", "a process of the past")
    assert len(set(met(store, 3).values())) == 1


def test_a_rank_that_does_not_come_is_named():
    store = torch.distributed.HashStore()
    store.set("edm2kit/hello/2", "a process of the past")
    found = met(store, 3, range(2), limit_sec=0.2)
    assert found[0] == "timed out after 0 s: rank 2 has not come"
    (alone,) = met(torch.distributed.HashStore(), 2, range(1, 2), limit_sec=0.1).values()
    assert "rank 0 has not answered" in alone


@pytest.mark.parametrize("store", [None, "False"])
def test_where_the_store_is_new_with_each_attempt_there_is_no_meeting(monkeypatch, store):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if store:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", store)
    assert meeting.group_arguments(1.0).keys() == {"timeout"}
