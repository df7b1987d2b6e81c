"""The backend itself, on a driver in memory: the same launches, pointers and copies as on a device."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import driver as real

import arkinfer
from arkinfer import backends, pipeline
from arkinfer.artifact import Artifact, tensors
from arkinfer.backends import cuda_driver, upload
from arkinfer.backends.base import Draw, Executor
from arkinfer.errors import ArtifactError, InternalError, UnsupportedError, UserError
from arkinfer.interpreter import PlanInterpreter
from arkinfer.targets import probe
from tests.cuda.fake_driver import GPU, FakeDriver, different_from_the_real_one

TOKENS = [(13 * index + index * index) % 400 for index in range(600)]
GOLDEN = json.loads((Path(__file__).parents[1] / "pipeline" / "golden.json").read_text(encoding="utf-8"))
Open = Callable[..., tuple[Executor, FakeDriver]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return a function that opens an artifact on a made-up GPU with so many bytes of memory."""

    def open(
        artifact: Artifact, memory: int = 1 << 32, gpu: probe.Gpu = GPU, integrated: bool = False
    ) -> tuple[Executor, FakeDriver]:
        fake = FakeDriver(artifact, memory, integrated)
        monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
        monkeypatch.setattr(probe, "gpu", lambda: gpu)
        return backends.open(artifact), fake

    return open


def test_the_driver_in_memory_has_the_real_functions() -> None:
    assert different_from_the_real_one() == {}


@pytest.mark.parametrize("sizes", [[600], [3, 1, 1, 9, 1, 100]])
def test_it_computes_what_the_interpreter_computes(llama: Artifact, opened: Open, sizes: list[int]) -> None:
    executor, fake = opened(llama)
    reference = PlanInterpreter(llama)
    state, other = executor.new_state(), reference.new_state()
    start, turn = 0, 0
    while start < 230 or (len(sizes) == 1 and start < 600):
        tokens = TOKENS[start : start + sizes[turn % len(sizes)]]
        logits = ("all", "last", "none")[turn % 3]
        expected = reference.step(tokens, other, logits)
        assert np.array_equal(executor.step(tokens, state, logits), expected)
        start, turn = start + len(tokens), turn + 1
    assert (fake.replays > 0) == (len(sizes) > 1)
    executor.close()
    assert fake.used() == 0


def test_one_graph_decodes_every_token(llama: Artifact, opened: Open) -> None:
    executor, fake = opened(llama)
    state = executor.new_state()
    executor.step(TOKENS[:5], state)
    captures = fake.captures
    for token in TOKENS[5:15]:
        executor.step([token], state)
    assert (fake.captures - captures, fake.replays) == (1, 10)


def test_a_launch_that_fails_while_it_is_recorded_does_no_harm(
    llama: Artifact, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, fake = opened(llama)
    state = executor.new_state()
    executor.step(TOKENS[:5], state)
    with monkeypatch.context() as patch, pytest.raises(InternalError, match="refused a call"):
        patch.setattr(fake, "cuLaunchKernel", lambda *_: (real.CUresult.CUDA_ERROR_INVALID_VALUE,))
        executor.step(TOKENS[5:6], state)
    reference = PlanInterpreter(llama)
    other = reference.new_state()
    reference.step(TOKENS[:5], other)
    assert state.length == 5
    assert np.array_equal(executor.step(TOKENS[5:6], state), reference.step(TOKENS[5:6], other))


def test_fork_truncate_and_several_states(llama: Artifact, opened: Open) -> None:
    executor, fake = opened(llama)
    state = executor.new_state()
    executor.step(TOKENS[:30], state, "none")
    twin = state.fork()
    first = executor.step(TOKENS[30:31], state)
    executor.step(TOKENS[:20], state)
    state.truncate(30)
    assert np.array_equal(executor.step(TOKENS[30:31], state), first)
    assert np.array_equal(executor.step(TOKENS[30:31], twin), first)
    used = fake.used()
    del state, twin
    executor.new_state().fork()
    assert fake.used() == used  # the caches of states that are gone serve the next ones


def test_a_further_state_takes_memory_for_what_it_asks(llama: Artifact, opened: Open) -> None:
    executor, fake = opened(llama)
    per_token = llama.manifest.limits["cache_bytes"] // 1024
    whole = executor.new_state()
    at_open = fake.used()
    small = executor.new_state(100)
    assert (fake.used() - at_open, small.capacity) == (128 * per_token, 100)
    reference = PlanInterpreter(llama)
    expected = reference.new_state(100)
    for tokens in (TOKENS[:60], TOKENS[60:61], TOKENS[61:65]):
        assert np.array_equal(executor.step(tokens, small), reference.step(tokens, expected))
    twin = small.fork()
    assert fake.used() - at_open == 2 * 128 * per_token
    left = TOKENS[65:100]
    assert np.array_equal(executor.step(left, twin), reference.step(left, expected.fork()))
    assert np.array_equal(executor.step(left, small), reference.step(left, expected))
    with pytest.raises(UserError, match="context is full"):
        executor.step([1], small)
    executor.sample([1], whole, Draw())
    del small
    executor.new_state(120)  # takes what `small` left
    assert fake.used() - at_open == 2 * 128 * per_token
    captured = len(fake.graphs)
    middle = executor.new_state(300)  # what is idle is too small, and goes
    assert fake.used() - at_open == (128 + 320) * per_token and len(fake.graphs) < captured
    assert np.isfinite(executor.step(TOKENS[:300], middle)).all()
    executor.close()


def test_a_token_outside_of_the_vocabulary_is_refused(llama: Artifact, opened: Open) -> None:
    executor, _ = opened(llama)
    with pytest.raises(UserError, match="vocabulary"):
        executor.step([400], executor.new_state())


def test_the_residual_stream_can_be_looked_at(llama: Artifact, opened: Open) -> None:
    executor, _ = opened(llama)
    reference = PlanInterpreter(llama)
    ours = executor.trace(TOKENS[:20], executor.new_state())
    theirs = reference.trace(TOKENS[:20], reference.new_state())
    assert list(ours) == ["layer.0"] and ours["layer.0"].shape == (20, 128)
    assert np.array_equal(ours["layer.0"], theirs["layer.0"])
    assert np.array_equal(executor.tap(["layer.0"])["layer.0"], ours["layer.0"])


def test_it_is_measured_like_the_others(llama: Artifact, opened: Open) -> None:
    executor, fake = opened(llama, 1 << 25)
    state = executor.new_state()
    executor.fill(state, 900)
    assert state.length == 900 and np.isfinite(executor.step([5], state)).all()
    assert executor.decode_bytes(100) - executor.decode_bytes(0) == 100 * 2 * 2 * 2 * 32 * 2
    assert executor.prefill_ops(2, 0) == 2 * executor.prefill_ops(1, 0) > 0
    used = fake.used()
    assert executor.bandwidth(0.0) > 0
    assert fake.used() == used


def test_too_little_memory_names_the_context_that_fits(llama: Artifact, opened: Open) -> None:
    limits = llama.manifest.limits
    fixed = limits["weights_bytes"] + limits["workspace_bytes"]
    with pytest.raises(UnsupportedError) as caught:
        opened(llama, fixed + limits["cache_bytes"] // 2 + (64 << 10))
    assert caught.value.code == "ARK-E343"
    largest = int(str(caught.value.facts["context that would fit"]).split()[0])
    assert 0 < largest < 1024 and f"--context {largest}" in caught.value.hint
    with pytest.raises(UnsupportedError) as caught:
        opened(llama, fixed // 2)
    assert "none" in str(caught.value.facts["context that would fit"])


def test_a_sequence_that_has_no_room_names_one_that_would(llama: Artifact, opened: Open) -> None:
    limits = llama.manifest.limits
    executor, fake = opened(
        llama, sum(limits[f"{name}_bytes"] for name in ("weights", "workspace", "cache")) + (1 << 16)
    )
    first = executor.new_state(1000)
    with pytest.raises(UnsupportedError, match="no room for this sequence") as caught:
        executor.new_state(1000)
    assert caught.value.code == "ARK-E343"
    fake.memory += limits["cache_bytes"] // 2
    with pytest.raises(UnsupportedError) as caught:
        executor.new_state(1000)
    largest = int(str(caught.value.facts["context that would fit"]).split()[0])
    assert 512 <= largest < 1000 and f"at most {largest} tokens" in caught.value.hint
    executor.new_state(largest)
    assert first.capacity == 1000
    executor.close()
    assert fake.graphs == {} and fake.used() == 0


def test_an_integrated_gpu_holds_the_weights_once(
    llama: Artifact, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come in small pieces from the file, whose cached pages go; what the system calls available is free."""
    limits, weights = llama.manifest.limits, llama.file("weights-cuda.safetensors")
    total = sum(limits[f"{name}_bytes"] for name in ("weights", "workspace", "cache"))
    dropped: list[tuple[int, int, int]] = []
    monkeypatch.setattr(upload, "PIECE", 4096)
    monkeypatch.setattr(upload.os, "posix_fadvise", lambda file, *what: dropped.append(what))
    machine = replace(probe.machine(), available=total + (1 << 16))
    monkeypatch.setattr(probe, "machine", lambda: machine)
    executor, fake = opened(llama, integrated=True)
    assert total <= fake.used() <= total + (1 << 16)
    tables = 4 * 1024 * 16  # of rotation, which are made here
    assert fake.largest == tables and fake.uploads > limits["weights_bytes"] // 4096
    assert dropped[-1] == (0, 0, os.POSIX_FADV_DONTNEED) and len(dropped) > weights.stat().st_size // 4096
    reference = PlanInterpreter(llama)
    expected = reference.step(TOKENS[:9], reference.new_state())
    assert np.array_equal(executor.step(TOKENS[:9], executor.new_state()), expected)
    machine = replace(machine, available=total - limits["cache_bytes"] // 2)
    with pytest.raises(UnsupportedError) as caught:
        opened(llama, integrated=True)
    assert "shared with the system" in str(caught.value.facts["memory"]) and "--context" in caught.value.hint


def test_weights_of_another_plan_are_refused(llama: Artifact, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = tensors.read_header(llama.file("weights-cuda.safetensors"))
    name, entry = next(iter(entries.items()))
    monkeypatch.setattr(tensors, "read_header", lambda *_: {**entries, name: replace(entry, stop=entry.stop - 64)})
    with pytest.raises(ArtifactError, match="not those of its plan") as caught:
        opened(llama)
    assert caught.value.facts["tensor"] == name


def test_a_gpu_of_another_kind_is_refused(llama: Artifact, opened: Open) -> None:
    with pytest.raises(UnsupportedError, match="no code for this GPU") as caught:
        opened(llama, gpu=replace(GPU, level="sm_86"))
    assert caught.value.code == "ARK-E311" and "sm_86" in str(caught.value.facts["this machine"])


@pytest.mark.parametrize(("level", "driver", "needed"), [("sm_89", "11.8", "12.0"), ("sm_120", "12.4", "12.5")])
def test_a_driver_that_is_too_old_is_refused(
    llama: Artifact, opened: Open, level: str, driver: str, needed: str
) -> None:
    with pytest.raises(UnsupportedError, match="driver is too old") as caught:
        opened(llama, gpu=replace(GPU, level=level, cuda=driver))
    assert caught.value.code == "ARK-E342" and caught.value.facts["needed"] == f"CUDA {needed}"


def test_a_later_gpu_translates_the_ptx(llama: Artifact, opened: Open) -> None:
    executor, fake = opened(llama, gpu=replace(GPU, level="sm_120"))
    assert executor.isa == "sm_120, translated from sm_89"
    assert fake.translated == len(fake.plan.kernels)
    assert np.isfinite(executor.step(TOKENS[:5], executor.new_state())).all()


@pytest.mark.parametrize(("model", "weights"), [("tiny-minicpm", "fp32"), ("tiny-bitcpm", "ternary")])
def test_golden_text(model: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled models through the Engine, as recorded on the CPU target: the first sentences, word for word."""
    artifact = pipeline.build(model, target="rtx-4090", out=tmp_path / "m.ark", weights=weights, verify="none")
    monkeypatch.setattr(cuda_driver, "bindings", lambda: FakeDriver(artifact))
    monkeypatch.setattr(probe, "gpu", lambda: GPU)
    with arkinfer.load(artifact.path) as engine:
        result = engine.generate(GOLDEN["messages"], max_tokens=60, temperature=0, thinking=False)
    assert len(result.tokens) == 60
    assert GOLDEN[model].startswith(result.text)
