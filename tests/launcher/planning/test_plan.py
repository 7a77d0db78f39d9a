"""The plan's arithmetic: what fits, how it spreads, and which cap is named."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from launcher.config.sizes import GIB, MIB
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.plan import (
    DoesNotFit,
    Limits,
    Plan,
    default_headroom,
    devices_to_measure,
    fitting,
    plan,
)

NO_HOST = Host()


def gpus(*free: float, total: float | None = None) -> list[Device]:
    return [
        Device(f"GPU-{i}", f"card {i}", "gpu", int((total or size) * GIB), int(size * GIB), i)
        for i, size in enumerate(free)
    ]


def footprint(steady: float, peak: float | None = None, host_ram: int | None = None) -> Footprint:
    return Footprint(peak=int((peak or steady) * GIB), steady=int(steady * GIB), host_ram=host_ram)


def workers(result: Plan) -> list[int]:
    return [row.workers for row in result.devices]


def test_two_cards_of_24_with_7_each_take_three_and_three() -> None:
    result = plan(gpus(24, 24), footprint(7), NO_HOST, Limits())
    assert workers(result) == [3, 3]
    assert result.count == result.capacity == 6
    assert result.binding == "memory"
    assert [slot.device_id for slot in result.slots] == ["GPU-0", "GPU-1"] * 3
    assert [slot.id for slot in result.slots] == ["w1", "w2", "w3", "w4", "w5", "w6"]
    row = result.devices[0]
    assert row.headroom == default_headroom(24 * GIB) == 24 * GIB // 20
    assert row.left == 24 * GIB - row.headroom - 21 * GIB
    assert row.next_worker_needs == 7 * GIB - row.left


@pytest.mark.parametrize(
    ("budget", "steady", "peak", "expected"),
    [
        (10, 5, 5, 2),
        (10, 5, 6, 1),  # the second could not start: 5 in use, 6 needed
        (11, 5, 6, 2),
        (4, 5, 5, 0),
        (5, 3, 6, 0),  # the first does not fit with its peak
        (6, 3, 6, 1),
        (9, 3, 6, 2),
        (100, 0, 0, 0),  # nonsense is no division by zero
    ],
)
def test_one_start_at_a_time_is_kept_free(
    budget: int, steady: int, peak: int, expected: int
) -> None:
    assert fitting(budget, Footprint(peak=peak, steady=steady)) == expected


CASES = [
    (free, steady, extra)
    for free, steady, extra in itertools.product((0.5, 3, 8, 23.3), (0.3, 1, 7), (0, 0.2, 5))
]


@pytest.mark.parametrize(("free", "steady", "extra"), CASES)
def test_never_exceeds_memory_and_never_wastes_a_place(
    free: float, steady: float, extra: float
) -> None:
    needs = footprint(steady, steady + extra)
    row = plan(gpus(free, total=24), needs, NO_HOST, Limits(max=256)).devices[0]
    if row.workers:  # the last one starts while the others serve
        during_last_start = (row.workers - 1) * needs.steady + needs.peak
        assert during_last_start <= row.device.free - row.headroom
    assert row.workers * needs.steady + needs.peak > row.budget
    assert row.next_worker_needs == row.workers * needs.steady + needs.peak - row.budget


@pytest.mark.parametrize("seed", range(25))
def test_more_memory_never_means_fewer_workers(seed: int) -> None:
    chance = random.Random(seed)
    needs = footprint(chance.uniform(0.2, 8), None)
    needs = Footprint(peak=needs.steady + chance.randrange(4 * GIB), steady=needs.steady)
    before = 0
    for free in sorted(chance.uniform(0, 80) for _ in range(20)):
        now = plan(gpus(free, total=80), needs, NO_HOST, Limits(max=256)).count
        assert now >= before
        before = now


def _even(order: Sequence[str], fits: dict[str, int]) -> bool:
    """After every prefix, a device has fewer workers than another only when it is full, or when
    the difference is one."""
    for end in range(1, len(order) + 1):
        taken = {name: order[:end].count(name) for name in fits}
        for a, b in itertools.permutations(fits, 2):
            if taken[a] + 1 < taken[b] and taken[a] < fits[a]:
                return False
    return True


@pytest.mark.parametrize("seed", range(25))
def test_every_prefix_of_the_slots_spreads_evenly(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.uniform(4, 48) for _ in range(chance.randint(1, 5))]
    result = plan(gpus(*sizes), footprint(chance.uniform(1, 6)), NO_HOST, Limits(max=64))
    fits = {row.id: row.fits for row in result.devices}
    assert _even([slot.device_id for slot in result.slots], fits)
    assert all(row.slots <= row.fits for row in result.devices)


def test_an_unequal_pair_starts_on_the_roomier_card() -> None:
    result = plan(gpus(8, 24), footprint(6), NO_HOST, Limits())
    assert [slot.device_id for slot in result.slots] == ["GPU-1", "GPU-0", "GPU-1", "GPU-1"]


@pytest.mark.parametrize(
    ("host", "limits", "binding", "count", "capacity"),
    [
        (Host(), Limits(), "memory", 6, 6),
        (Host(cores=4), Limits(), "cores", 4, 6),
        (Host(cores=9), Limits(threads=4), "cores", 2, 6),
        (Host(cores=1.5), Limits(threads=2), "cores", 1, 6),
        (Host(), Limits(max=5), "max", 5, 5),
        (Host(ram_total=16 * GIB, ram_free=9 * GIB), Limits(), "ram", 4, 4),
        (Host(cores=1, ram_total=16 * GIB, ram_free=9 * GIB), Limits(), "cores", 1, 4),
        (Host(cores=1), Limits(count=5), "count", 5, 6),
        (Host(cores=64), Limits(count=2), "count", 2, 6),
    ],
)
def test_the_binding_cap_is_named(
    host: Host, limits: Limits, binding: str, count: int, capacity: int
) -> None:
    result = plan(gpus(24, 24), footprint(7, host_ram=2 * GIB), host, limits)
    assert (result.binding, result.count, result.capacity) == (binding, count, capacity)
    assert not result.refusal
    assert sum(workers(result)) == count


def test_an_explicit_count_beyond_the_cores_is_allowed_with_one_warning() -> None:
    result = plan(gpus(24), footprint(7), Host(cores=2), Limits(count=3))
    assert result.count == 3
    assert len(result.warnings) == 1
    assert "2 cores" in result.warnings[0]
    assert plan(gpus(24), footprint(7), Host(cores=3), Limits(count=3)).warnings == ()


@pytest.mark.parametrize(
    ("limits", "host", "words"),
    [
        (Limits(count=4), NO_HOST, ["4 workers do not fit", "memory allows 3", "7 GiB"]),
        (Limits(count=3, max=2), NO_HOST, ["workers.max = 2"]),
        (
            Limits(count=3),
            Host(ram_total=8 * GIB, ram_free=4 * GIB),
            ["host RAM allows 1", "2 GiB each", "4 GiB free"],
        ),
        (Limits(memory=6 * GIB), NO_HOST, ["1 worker does not fit", "memory allows 0"]),
        (Limits(headroom=20 * GIB), NO_HOST, ["20 GiB headroom", "4 GiB usable"]),
    ],
)
def test_a_refusal_tells_the_numbers(limits: Limits, host: Host, words: list[str]) -> None:
    result = plan(gpus(24), footprint(7, host_ram=2 * GIB), host, limits)
    for word in words:
        assert word in result.refusal
    assert "\n" not in result.refusal
    with pytest.raises(DoesNotFit):
        result.checked()


def test_scaling_is_judged_by_the_same_plan() -> None:
    result = plan(gpus(24), footprint(7), Host(cores=2), Limits())
    assert result.count == 2
    assert result.refusal_for(3) == ""
    assert "memory allows 3" in result.refusal_for(4)
    assert result.warnings_for(2) == ()
    assert len(result.warnings_for(3)) == 1


def test_no_device_at_all_is_refused() -> None:
    assert "no device" in plan([], footprint(1), NO_HOST, Limits()).refusal


def test_measured_is_where_the_most_room_of_each_kind_is() -> None:
    broken = Device("GPU-9", "card 9", "gpu", 80 * GIB, 80 * GIB, problem="it is lost")
    alike = [replace(card, name="card") for card in gpus(5, 20, 9, total=24)]
    other = Device("GPU-8", "another", "gpu", 48 * GIB, 8 * GIB)
    full = Device("GPU-7", "a third", "gpu", 48 * GIB, 1 * GIB)
    places = devices_to_measure([broken, other, *alike, full], Limits())
    assert [place.id for place in places] == ["GPU-1", "GPU-8"], "the roomiest first"
    with pytest.raises(DoesNotFit, match=r"card 9: it is lost.*budget\.devices"):
        devices_to_measure([broken], Limits())


def test_without_room_nothing_is_measured() -> None:
    with pytest.raises(DoesNotFit, match=r"0 B usable of 1 GiB free, 1\.2 GiB headroom") as caught:
        devices_to_measure(gpus(1, 0.5, total=24), Limits())
    assert "card 1" in str(caught.value)
    assert "budget.headroom" in str(caught.value)
    assert len(devices_to_measure(gpus(1, 0.5, total=24), Limits(headroom=0))) == 2


def test_a_device_with_a_problem_is_left_out_aloud() -> None:
    broken = Device("GPU-9", "card 9", "gpu", 0, 0, problem="it is lost")
    result = plan([*gpus(24), broken], footprint(7), NO_HOST, Limits())
    assert workers(result) == [3]
    assert any("it is lost" in line for line in result.warnings)


def test_an_exclusive_device_takes_one_worker_and_says_why() -> None:
    card = Device("GPU-0", "card", "gpu", 24 * GIB, 24 * GIB, exclusive=True)
    result = plan([card], footprint(7), NO_HOST, Limits())
    assert result.capacity == 1
    assert "EXCLUSIVE_PROCESS" in result.warnings[0]


def test_unmeasured_host_ram_caps_nothing() -> None:
    host = Host(ram_total=2 * GIB, ram_free=1 * GIB)
    result = plan(gpus(24), footprint(7), host, Limits())
    assert result.caps.ram is None
    assert result.count == 3


def test_on_the_cpu_ram_is_counted_once() -> None:
    cpu = Device("cpu", "CPU", "cpu", 16 * GIB, 12 * GIB)
    host = Host(cores=8, ram_total=16 * GIB, ram_free=12 * GIB)
    result = plan([cpu], footprint(3, host_ram=3 * GIB), host, Limits())
    assert result.caps.ram is None
    assert result.count == 3


def test_it_survives_json() -> None:
    host = Host(cores=2.5, ram_total=GIB, ram_free=MIB)
    result = plan(gpus(24, 9), footprint(3, 4), host, Limits(count=2)).with_ports(range(9000, 9016))
    assert Plan.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert result.to_json()["total_workers"] == 2
    assert [row["workers"] for row in result.to_json()["devices"]] == [1, 1]
    assert result.slots[1].port == 9001
    assert result.device_of(result.slots[0]).name == "card 0"


def test_ports_must_reach_for_every_slot() -> None:
    with pytest.raises(ValueError, match="1 ports for 3 slots"):
        plan(gpus(24), footprint(7), NO_HOST, Limits()).with_ports([9000])
