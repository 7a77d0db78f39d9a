"""Which devices there are, and which of them the farm may use."""

from __future__ import annotations

import os

import pytest

from launcher.config.sizes import GIB
from launcher.config.sources import ConfigError
from launcher.planning.devices import discover, hypothetical_devices
from launcher.planning.inventory import Host
from launcher.planning.nvml import Driver
from tests.launcher.planning.fake_nvml import FakeNvml, Gpu, Process

HOST = Host(cores=4, ram_total=32 * GIB, ram_free=20 * GIB)


def two() -> FakeNvml:
    return FakeNvml(
        Gpu("GPU-aaaa-1", 24 * GIB, 23 * GIB), Gpu("GPU-aabb-2", 24 * GIB, 10 * GIB, name="Other")
    )


def sliced() -> FakeNvml:
    slices = [Gpu("MIG-1111", 20 * GIB, 19 * GIB), None, Gpu("MIG-2222", 20 * GIB, 20 * GIB)]
    return FakeNvml(
        Gpu("GPU-aaaa-1", 40 * GIB, 39 * GIB, slices=slices), Gpu("GPU-bbbb-2", 24 * GIB, 24 * GIB)
    )


def ids(nvml: FakeNvml, mask: str | None = None, wanted: tuple[str, ...] = ()) -> list[str]:
    environ = {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    return [device.id for device in discover(HOST, wanted, environ, nvml).devices]


@pytest.mark.parametrize("old", [False, True])
def test_gpus_are_told_by_uuid_with_their_memory(old: bool) -> None:
    nvml = two()
    nvml.old = old
    found = discover(HOST, (), {}, nvml)
    assert found.notes == ()
    first = found.devices[0]
    assert (first.id, first.name, first.kind) == ("GPU-aaaa-1", "Card", "gpu")
    assert (first.total, first.free, first.driver) == (24 * GIB, 23 * GIB, "580.65")
    assert [device.index for device in found.devices] == [0, 1]
    assert nvml.opened == 0, "the driver is closed again"


@pytest.mark.parametrize("nvml", [FakeNvml(absent=True), FakeNvml()])
def test_without_gpus_the_device_is_the_cpu_in_one_line(nvml: FakeNvml) -> None:
    found = discover(HOST, (), {}, nvml)
    (cpu,) = found.devices
    assert (cpu.id, cpu.kind, cpu.total, cpu.free) == ("cpu", "cpu", 32 * GIB, 20 * GIB)
    assert len(found.notes) == 1
    assert "CPU" in found.notes[0]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("0", ["GPU-aaaa-1"]),
        ("1,0", ["GPU-aabb-2", "GPU-aaaa-1"]),
        (" 1 , 0 ", ["GPU-aabb-2", "GPU-aaaa-1"]),
        ("GPU-aabb-2", ["GPU-aabb-2"]),
        ("GPU-aaa", ["GPU-aaaa-1"]),
        ("GPU-aa", ["cpu"]),  # ambiguous: CUDA shows nothing
        ("0,0", ["GPU-aaaa-1"]),
        ("0,-1,1", ["GPU-aaaa-1"]),  # CUDA stops at the first that means nothing
        ("1,7,0", ["GPU-aabb-2"]),
        ("", ["cpu"]),
        ("-1", ["cpu"]),
        ("none", ["cpu"]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(mask: str, expected: list[str]) -> None:
    assert ids(two(), mask) == expected


def test_hidden_gpus_are_told() -> None:
    found = discover(HOST, (), {"CUDA_VISIBLE_DEVICES": ""}, two())
    assert "hides 2 GPUs" in found.notes[0]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, ["MIG-1111", "MIG-2222", "GPU-bbbb-2"]),
        ("MIG-2222", ["MIG-2222"]),
        ("0", ["MIG-1111", "MIG-2222"]),
        ("GPU-aaaa", ["MIG-1111", "MIG-2222"]),
        ("GPU-aaaa-1,1", ["MIG-1111", "MIG-2222", "GPU-bbbb-2"]),
        ("MIG-1111,0", ["MIG-1111", "MIG-2222"]),
    ],
)
def test_a_gpu_with_mig_on_stands_for_its_slices(mask: str | None, expected: list[str]) -> None:
    assert ids(sliced(), mask) == expected
    hidden = sliced()
    hidden.gpus[0].hidden = True
    assert ids(hidden, mask) == expected, "the GPU itself does not tell who may only use its slices"
    first = discover(HOST, (), {}, sliced()).devices[0]
    assert (first.kind, first.parent, first.total) == ("mig", "GPU-aaaa-1", 20 * GIB)


def test_the_budget_restricts_and_must_exist() -> None:
    assert ids(two(), None, ("1",)) == ["GPU-aabb-2"]
    assert ids(two(), None, ("cpu",)) == ["cpu"]
    assert ids(two(), "1", ("GPU-aabb",)) == ["GPU-aabb-2"]
    with pytest.raises(ConfigError, match=r"budget.devices: no device '7'.*0 \(GPU-aaaa-1\)"):
        ids(two(), None, ("7",))
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES hides it"):
        ids(two(), "1", ("0",))
    with pytest.raises(ConfigError, match="one or the other"):
        ids(two(), None, ("0", "cpu"))


def test_a_lost_gpu_is_told_not_fatal() -> None:
    nvml = two()
    nvml.gpus[0].error = "GPU is lost"
    lost, other = discover(HOST, (), {}, nvml).devices
    assert lost.problem == "GPU is lost"
    assert other.problem == ""


def test_compute_modes() -> None:
    nvml = two()
    nvml.gpus[0].mode, nvml.gpus[1].mode = 2, 3
    prohibited, exclusive = discover(HOST, (), {}, nvml).devices
    assert "PROHIBITED" in prohibited.problem
    assert exclusive.exclusive


def test_tenants_with_their_bytes_where_the_driver_tells_them() -> None:
    nvml = two()
    nvml.gpus[0].processes = [Process(os.getpid(), 3 * GIB), Process(2**22 + 7, None)]
    mine, unknown = discover(HOST, (), {}, nvml).devices[0].tenants
    assert (mine.pid, mine.bytes) == (os.getpid(), 3 * GIB)
    assert mine.name
    assert (unknown.name, unknown.bytes) == ("", None)


def test_free_memory_is_asked_again_each_time() -> None:
    nvml = sliced()
    driver = Driver.open(nvml)
    assert driver is not None
    with driver:
        assert driver.free("MIG-1111") == 19 * GIB
        slices = nvml.gpus[0].slices
        assert slices is not None
        assert slices[0] is not None
        slices[0].free = GIB
        assert driver.free("MIG-1111") == GIB
        with pytest.raises(LookupError):
            driver.free("GPU-none")
        assert driver.tenants("GPU-none") == ()


def test_hypothetical_devices() -> None:
    first, second = hypothetical_devices(["24GiB", "8G"])
    assert (first.id, first.total, second.free) == ("device0", 24 * GIB, 8 * GIB)
    for bad in ("huge", "0"):
        with pytest.raises(ConfigError, match=f"--device {bad}"):
            hypothetical_devices([bad])


def _has_gpu() -> bool:
    driver = Driver.open()
    if driver is None:
        return False
    with driver:
        return bool(driver.devices())


@pytest.mark.gpu
@pytest.mark.skipif(not _has_gpu(), reason="no GPU here")
def test_a_real_driver_answers() -> None:
    devices = discover(HOST, (), {}).devices
    assert devices
    assert all(device.is_gpu and 0 < device.free <= device.total for device in devices)
    driver = Driver.open()
    assert driver is not None
    with driver:
        assert all(driver.free(device.id) > 0 for device in devices)
