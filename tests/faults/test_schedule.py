"""The schedule of faults can be repeated, and is hard enough."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.faults.schedule import Targets, schedule

TARGETS = Targets(
    relays=["relay-1", "relay-2"],
    writers=["writer-1", "writer-2"],
    consumers=["consumer-1", "consumer-2"],
    servers=["redis", "database"],
)
LEASE = 3.0


def test_the_same_seed_gives_the_same_faults_and_another_gives_others() -> None:
    faults = schedule(1, 600, TARGETS, LEASE)
    assert faults == schedule(1, 600, TARGETS, LEASE)
    assert faults != schedule(2, 600, TARGETS, LEASE)


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    faults = schedule(1, 600, TARGETS, LEASE)
    assert schedule(1, 60, TARGETS, LEASE) == [fault for fault in faults if fault.at < 60]


@pytest.mark.parametrize("seed", range(20))
def test_thirty_minutes_have_two_hundred_kills_and_stops_of_everything(seed: int) -> None:
    faults = schedule(seed, 1800, TARGETS, LEASE)
    assert sum(fault.is_death for fault in faults) >= 200
    processes = (*TARGETS.relays, *TARGETS.writers, *TARGETS.consumers)
    for kind, targets in {
        "kill": processes,
        "stop": processes,
        "restart": TARGETS.servers,
        "cut": TARGETS.servers,
        "cut reply": TARGETS.servers,
        "terminate": TARGETS.servers,
        "stall": TARGETS.servers,
    }.items():
        assert {fault.target for fault in faults if fault.kind == kind} == set(targets)


def test_what_holds_something_is_stopped_past_its_lease_and_never_twice_at_a_time() -> None:
    for holder in (*TARGETS.relays, *TARGETS.consumers):
        stops = [fault for fault in schedule(1, 3600, TARGETS, LEASE) if (fault.kind, fault.target) == ("stop", holder)]
        assert min(stop.seconds for stop in stops) > LEASE
        assert all(one.at + one.seconds < other.at for one, other in pairwise(stops))


def test_without_servers_only_processes_are_broken() -> None:
    targets = Targets(TARGETS.relays, TARGETS.writers, TARGETS.consumers, servers=[])
    assert {fault.kind for fault in schedule(1, 600, targets, LEASE)} == {"kill", "stop"}
