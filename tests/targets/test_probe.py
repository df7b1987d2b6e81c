"""The probe of this machine."""

from __future__ import annotations

import platform
from typing import Any

import pytest

from arkinfer import targets
from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.targets import probe


def test_levels_are_those_that_kernels_are_generated_for() -> None:
    assert set(probe.LEVELS) == set(ISAS)


@pytest.mark.parametrize("name", targets.names())
def test_shipped_targets_name_known_levels(name: str) -> None:
    assert all(level in probe.LEVELS or level.startswith("sm_") for level in targets.load(name).arch)


def test_levels_by_features() -> None:
    v3, v4 = probe.LEVELS["x86-64-v3"], probe.LEVELS["x86-64-v4-vnni"]
    assert probe.levels_of(frozenset()) == ()
    assert probe.levels_of(frozenset(v3)) == ("x86-64-v3",)
    assert probe.levels_of(frozenset(v3 + v4)) == ("x86-64-v4-vnni", "x86-64-v3")
    assert probe.levels_of(frozenset(v3 + v4) - {"avx512_vnni"}) == ("x86-64-v3",)
    raspberry_pi_5 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp"
    assert probe.levels_of(frozenset(raspberry_pi_5.split())) == ("aarch64-dotprod",)
    assert probe.levels_of(frozenset(f"{raspberry_pi_5} i8mm".split())) == ("aarch64-i8mm", "aarch64-dotprod")
    raspberry_pi_4 = "fp asimd evtstrm crc32 cpuid"
    assert probe.levels_of(frozenset(raspberry_pi_4.split())) == ()


def test_macos_is_asked_for_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def sysctlbyname(name: bytes, value: Any, *rest: Any) -> int:
            if name == b"hw.optional.arm.FEAT_I8MM":  # an M1 has none, and an older macOS does not know the name
                return -1
            value._obj.value = 1
            return 0

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: Library())
    probe._apple_features.cache_clear()
    try:
        assert probe.levels_of(probe._apple_features()) == ("aarch64-dotprod",)
    finally:
        probe._apple_features.cache_clear()


def test_machine_is_plausible() -> None:
    machine = probe.machine()
    assert machine.cores >= 1
    assert machine.available >= 0
    assert machine.architecture == platform.machine()
    assert machine.to_dict()["levels"] == list(probe.isa_levels())


def test_level_for_takes_the_targets_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "isa_levels", lambda: ("x86-64-v3",))
    assert probe.level_for(targets.load("cpu")) == "x86-64-v3"
    monkeypatch.setattr(probe, "isa_levels", lambda: ("aarch64-dotprod",))
    assert probe.level_for(targets.load("cpu")) is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bandwidth_is_positive(threads: int) -> None:
    assert probe.measure_read_bandwidth(threads, seconds=0.0, size=8 << 20) > 1e8


class _Driver:
    """libcuda.so.1 of a machine with ``count`` GPUs, as ctypes would call it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getattr__(self, name: str) -> Any:
        values = {"cuDriverGetVersion": 12060, "cuDeviceTotalMem_v2": 24 << 30, "cuDeviceGetCount": self.count}

        def call(*arguments: Any) -> int:
            if name == "cuDeviceGet":
                return 0 if self.count else 101
            if name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA GeForce RTX 4090"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 9}[arguments[1]]
            elif name in values:
                arguments[0]._obj.value = values[name]
            return 0

        return call


def test_a_gpu_is_what_its_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cuda_driver", lambda: _Driver(1))
    assert probe.gpu() == probe.Gpu("NVIDIA GeForce RTX 4090", "sm_89", 24 << 30, "12.6")
    assert probe.usable(["sm_87", "sm_89"]) == "sm_89"
    assert probe.usable(["sm_90"]) is None
    monkeypatch.setattr(probe, "cuda_driver", lambda: _Driver(0))
    assert probe.gpu() is None
    monkeypatch.setattr(probe, "cuda_driver", lambda: None)
    assert probe.gpu() is None and probe.usable(["sm_89"]) is None
