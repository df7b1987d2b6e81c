"""The runner for aarch64: executed under qemu on a processor with just the level, linked for Android and macOS."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from arkinfer import backends, pipeline
from arkinfer.artifact import Artifact
from arkinfer.exporters import emulator, linker, platforms
from arkinfer.runner import RunnerExecutor
from arkinfer.runtime.engine import open_engine
from examples.needle import retrieve
from tests.native.test_equal import EXACT, GOLDEN
from tests.native.test_example import EXAMPLES

LEVEL = "aarch64-dotprod"
MODEL = "tiny-minicpm"
NEEDLE = 1024  # tokens: some 14 ms of processor time each under qemu
MEGABYTE = 1 << 20
# What the C library of Android has had since API level 21, of what the runner calls. bionic exports all of them.
BIONIC = """
__errno __stack_chk_fail calloc close cosf dlclose dlerror dlopen dlsym free fstat getauxval ldexpf malloc memchr memcmp
memcpy memmove memset mmap munmap open posix_memalign pthread_cond_broadcast pthread_cond_destroy pthread_cond_init
pthread_cond_signal pthread_cond_wait pthread_create pthread_getspecific pthread_join pthread_key_create
pthread_mutex_destroy pthread_mutex_init pthread_mutex_lock pthread_mutex_unlock pthread_once pthread_setspecific qsort
realloc sched_getaffinity sinf snprintf strchr strcmp strlen strstr vsnprintf
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("boards") / "board.yaml"
    file.write_text(f"extends: linux-aarch64\narch: [{LEVEL}]\n", encoding="utf-8")
    return str(file)


def emulated(artifact: Artifact, *words: str, processor: str = emulator.PROCESSORS[LEVEL]) -> tuple[int, str, str]:
    command = [*emulator.command(processor, emulator.root()), artifact.file("payload/native/arkrun"), artifact.path]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def executor_of(artifact: Artifact, attention: str | None = None) -> RunnerExecutor:
    return RunnerExecutor(artifact, emulator.command(emulator.PROCESSORS[LEVEL], emulator.root()), 1, attention)


@pytest.fixture(scope="module")
def exact(board: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("exact") / "m.ark"
    return pipeline.build(MODEL, board, out=out, weights=EXACT[MODEL], activations="float", kv="fp32", verify="none")


def test_golden_text(exact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ark_generate in the emulated command, for the prompt that the engine of an emulated executor makes."""
    monkeypatch.setattr(backends, "open", lambda artifact, threads, attention: executor_of(artifact))
    with open_engine(exact) as engine:
        assert engine.executor.isa == LEVEL
        prompt = engine.prepare(GOLDEN["messages"], {"thinking": False}).ids
        status, out, err = emulated(exact, "--tokens", ",".join(map(str, prompt)), "--max-tokens", "120")
        assert status == 0, err
        assert engine.tokenizer.decode([int(word) for word in out.split()]) == GOLDEN[MODEL]


def test_needle_with_sparse_attention(board: str, tmp_path: Path) -> None:
    artifact = pipeline.build("needle", board, out=tmp_path / "needle.ark", context=NEEDLE + 64, verify="none")
    tokens, answers = retrieve.haystack(NEEDLE)
    executor = executor_of(artifact, attention="sparse")
    state = executor.new_state()
    executor.step(tokens, state, "none")
    found = {}
    for key in answers:
        state.truncate(NEEDLE)
        value = int(executor.step([key], state)[-1].argmax())
        found[key] = value if int(executor.step([value], state)[-1].argmax()) == 2 else -1
    assert found == answers
    executor.close()


def test_c_example_and_refusals(tiny: Artifact, exact: Artifact, tmp_path: Path) -> None:
    folder = exact.path / "payload/native"
    program, platform = tmp_path / "generate", platforms.find("linux-aarch64")
    source = [str(EXAMPLES / "generate.c"), f"-I{folder}", f"-L{folder}", "-larkinfer"]
    linker.zig("cc", "-target", platform.zig, "-O2", "-rtlib=none", *source, "-o", str(program))
    command = [*emulator.command(emulator.PROCESSORS[LEVEL], emulator.root()), "-E", f"LD_LIBRARY_PATH={folder}"]
    done = subprocess.run([*command, program, exact.path, "5", "9", "300"], capture_output=True, text=True, check=True)
    sampling = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "1"]
    status, out, err = emulated(exact, "--tokens", "5,9,300", "--max-tokens", "64", *sampling)
    assert (status, done.stdout.split()) == (0, out.split()), err
    assert len(out.split()) > 3
    status, _, err = emulated(exact, "--tokens", "5", processor="cortex-a53")
    assert status == 1 and f"holds code for {LEVEL}" in err and "runs none" in err
    command = [*command, exact.file("payload/native/arkrun"), tiny.path, "--tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"this processor runs {LEVEL}" in done.stderr


def test_android_is_small_and_calls_what_phones_have(tmp_path: Path) -> None:
    """The artifact of the bundled model with all levels, under 15 MB; what runs it under 8 MB."""
    artifact = pipeline.build("tiny-minicpm", "android", out=tmp_path / "m.ark", verify="none", quality="off")
    sizes = {name: entry.size for name, entry in artifact.manifest.files.items()}
    runtime = [name for name in sizes if name.startswith("payload/") and name.endswith(".so")]
    assert runtime == ["payload/aarch64-dotprod.so", "payload/aarch64-i8mm.so", "payload/native/libarkinfer.so"]
    assert sum(sizes[name] for name in runtime) < 8 * MEGABYTE
    assert sum(sizes.values()) < 15 * MEGABYTE
    assert sizes["payload/native/libarkinfer.so"] < 100_000
    for name in runtime:
        undefined, needed = dynamic(artifact.file(name).read_bytes())
        assert needed == {"libc.so", "libm.so", *(["libdl.so"] if "native" in name else [])}
        assert undefined <= set(BIONIC.split()), name


def dynamic(data: bytes) -> tuple[set[str], set[str]]:
    """Return the undefined symbols of an ELF library of 64 bits, and the libraries that it needs."""
    start, size, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + index * size) for index in range(count)]

    def text(table: int, at: int) -> str:
        begin = sections[table][4] + at
        return data[begin : data.index(b"\0", begin)].decode()

    undefined, needed = set(), set()
    for section in sections:
        kind, offset, length, link = section[1], section[4], section[5], section[6]
        if kind == 11:  # SHT_DYNSYM
            symbols = (struct.unpack_from("<IBBHQQ", data, offset + at) for at in range(24, length, 24))
            undefined = {text(link, symbol[0]) for symbol in symbols if symbol[3] == 0}
        if kind == 6:  # SHT_DYNAMIC
            entries = (struct.unpack_from("<QQ", data, offset + at) for at in range(0, length, 16))
            needed = {text(link, value) for tag, value in entries if tag == 1}
    return undefined, needed
