"""What is wrong gets one clear error with a stable number, and never a crash."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arkinfer.artifact import Artifact
from arkinfer.artifact.manifest import FileEntry, Manifest
from arkinfer.exporters import linker, native, platforms
from tests.native import capi

Change = Callable[[Path], None]
LEVEL_FILES = "payload/x86-64-*.so"


@pytest.fixture
def copy(tiny: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "copy.ark"))


def refusal(library: capi.Library, path: Path, **options: Any) -> tuple[int, str]:
    with pytest.raises(capi.Failure) as caught:
        library.open(path, **options)
    return caught.value.status, caught.value.text


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change payload/native.json and seal the manifest again, so that only the change itself is wrong."""
    file = folder / "payload/native.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    fields = json.loads((folder / "manifest.json").read_text())
    files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
    files["payload/native.json"] = FileEntry(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    values = {key: value for key, value in fields.items() if key not in ("schema", "digest")}
    (folder / "manifest.json").write_bytes(Manifest.create(values, files).canonical())


@pytest.mark.parametrize("name", ["payload/native.json", "weights-cpu.safetensors", "generation.json", LEVEL_FILES])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_file(name: str, damage: str, copy: Path, library: capi.Library) -> None:
    for file in copy.glob(name):
        data = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    status, text = refusal(library, copy)
    assert status == capi.DAMAGED
    assert Path(name).suffix in text


def test_what_is_no_plain_file(copy: Path, library: capi.Library) -> None:
    """A pipe is not waited for, and no name leads out of the folder."""
    weights = copy / "weights-cpu.safetensors"
    weights.rename(copy.parent / "elsewhere")
    os.mkfifo(weights)
    status, text = refusal(library, copy)
    assert status == capi.DAMAGED and "not a file" in text
    rewrite(copy, lambda value: value.update(weights="../elsewhere"))
    status, text = refusal(library, copy)
    assert status == capi.DAMAGED and "outside the artifact" in text


def test_changed_bytes(copy: Path, library: capi.Library) -> None:
    """Weights are read for it only when asked, since that reads all of them; everything else always is."""

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    weights = copy / "weights-cpu.safetensors"
    flip(weights)
    library.open(copy).close()
    assert refusal(library, copy, check=True)[0] == capi.DAMAGED
    flip(weights)
    library.open(copy, check=True).close()
    for name in ("manifest.json", "payload/native.json", "generation.json", *map(str, copy.glob(LEVEL_FILES))):
        flip(copy / name)
        assert refusal(library, copy)[0] == capi.DAMAGED, name
        flip(copy / name)
    library.open(copy).close()


def test_other_artifacts(copy: Path, library: capi.Library, tmp_path: Path) -> None:
    status, text = refusal(library, tmp_path / "nothing.ark")
    assert status == capi.ABSENT and "nothing.ark" in text
    rewrite(copy, lambda value: [level.update(name="aarch64-i8mm") for level in value["levels"]])
    status, text = refusal(library, copy)
    assert status == capi.UNSUPPORTED and "aarch64-i8mm" in text and "x86-64" in text
    rewrite(copy, lambda value: value.update(format=2))
    assert refusal(library, copy)[0] == capi.NEWER
    rewrite(copy, lambda value: value.update(format=native.FORMAT, levels=[]))
    status, text = refusal(library, copy)
    assert status == capi.DAMAGED and "levels" in text
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 7'))
    status, text = refusal(library, copy)
    assert status == capi.NEWER and "schema 7" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["calls"][0].append("v99999"),
        lambda value: value["calls"][0].append("c99999999999999999999"),
        lambda value: value["calls"][0].__setitem__(0, 400),
        lambda value: value["values"][0].__setitem__(1, ["n", 3]),
        lambda value: value["values"][-1].__setitem__(1, ["r", 2**40]),
        lambda value: value["values"][5].__setitem__(3, 1 << 40),
        lambda value: value["values"][5].__setitem__(3, 65),
        lambda value: value["values"].append(["int32", ["n", "r"], 0, -1]),  # a view that grows with the rows
        lambda value: value["caches"][0].__setitem__(0, 1 << 40),
        lambda value: value.update(context=0),
        lambda value: value.update(result=7),
        lambda value: value["caches"].pop(),
        lambda value: value["levels"][0]["many"].__setitem__(0, "absent"),
        lambda value: value["levels"][0]["one"].__setitem__(0, None),
    ],
)
def test_unsound_program(change: Callable[[dict[str, Any]], None], copy: Path, library: capi.Library) -> None:
    rewrite(copy, change)
    assert refusal(library, copy)[0] == capi.DAMAGED


def test_kernels_check_their_arguments(copy: Path, library: capi.Library) -> None:
    """A program that is sound in itself but not what was compiled: the kernel's own words are the error."""
    rewrite(copy, lambda value: value["calls"][1].__setitem__(1, value["calls"][1][2]))
    engine = library.open(copy)
    session = engine.session()
    with pytest.raises(capi.Failure, match="refused its arguments") as caught:
        session.step([1, 2, 3])
    assert caught.value.status == capi.INTERNAL and session.length == 0
    session.close()
    engine.close()
    # Here the runtime of TVM may be loaded, which takes the words; in a process without it they are the error.
    command = [copy / "payload/native/arkrun", copy, "--tokens", "1,2,3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "refused its arguments: " in done.stderr and "expect" in done.stderr


def test_bad_arguments(tiny: Artifact, library: capi.Library) -> None:
    assert refusal(library, tiny.path, threads=65)[0] == capi.ARGUMENT
    assert refusal(library, tiny.path, chunk=5000)[0] == capi.ARGUMENT
    assert refusal(library, tiny.path, attention="sparse")[0] == capi.UNSUPPORTED
    engine = library.open(tiny.path)
    session = engine.session(100)
    assert session.capacity == 128
    session.step([1] * 100, capi.NONE)
    for status, call in (
        (capi.TOKEN, lambda: session.step([])),
        (capi.TOKEN, lambda: session.step([5, 2048])),
        (capi.TOKEN, lambda: session.step([-1])),
        (capi.FULL, lambda: session.step([1] * 29)),
        (capi.ARGUMENT, lambda: session.truncate(101)),
        (capi.ARGUMENT, lambda: session.truncate(-1)),
        (capi.ARGUMENT, lambda: session.generate([1], 5, temperature=-1.0)),
        (capi.ARGUMENT, lambda: session.generate([1], 5, top_p=1.5, temperature=1.0)),
        (capi.ARGUMENT, lambda: engine.session(-5)),
    ):
        before = session.length
        with pytest.raises(capi.Failure) as caught:
            call()
        assert caught.value.status == status, caught.value
        session.truncate(before)
    assert len(session.generate([1] * 20, 500, stops=[])) == 128 - 120 + 1  # until the session is full
    session.close()
    engine.close()


def test_stops_sinks_and_cancels(tiny: Artifact, library: capi.Library) -> None:
    engine = library.open(tiny.path)
    session = engine.session()
    answer = session.generate([5, 9, 300], 30, temperature=4.0, seed=4, stops=[])
    stop = next(token for place, token in enumerate(answer) if place > 3 and token not in answer[:place])
    session.truncate(0)
    assert session.generate([5, 9, 300], 30, temperature=4.0, seed=4, stops=[stop]) == answer[: answer.index(stop)]
    session.truncate(0)
    assert session.generate([5, 9, 300], 30, lambda token: True, temperature=4.0, seed=4) == answer[:1]
    assert session.length == 3
    seen: list[int] = []

    def cancel(token: int) -> bool:
        seen.append(token)
        with pytest.raises(capi.Failure, match="9: "):
            session.step([1])
        if len(seen) == 4:
            other = threading.Thread(target=session.cancel)
            other.start()
            other.join()
        return False

    session.truncate(0)
    with pytest.raises(capi.Failure) as caught:
        session.generate([5, 9, 300], 30, cancel, temperature=4.0, seed=4, stops=[])
    assert caught.value.status == capi.CANCELLED
    assert seen == answer[:4] and session.length == 6
    session.cancel()  # nothing runs: nothing happens
    session.step([1])
    session.close()
    engine.close()


def test_engine_outlives_its_handle_and_serves_threads(tiny: Artifact, library: capi.Library) -> None:
    engine = library.open(tiny.path, threads=2)
    sessions = [engine.session(256) for _ in range(3)]
    engine.close()
    answers: dict[int, list[int]] = {}

    def work(index: int) -> None:
        answers[index] = sessions[index].generate([5, 9, 300], 40, temperature=1.0, seed=index % 2, stops=[])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers[0] == answers[2] != answers[1]
    for session in sessions:
        session.close()


def test_too_little_memory(tiny: Artifact) -> None:
    """Under every limit of address space the command ends with an error of its own or works."""
    command = [tiny.file("payload/native/arkrun"), tiny.path, "--tokens", "5,9,300", "--max-tokens", "2"]
    command += ["--threads", "3"]
    outcomes = set()
    for megabytes in [*range(4, 24, 2), *range(24, 80, 8)]:
        size = megabytes << 20

        def limit(size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (size, size))

        done = subprocess.run(
            [*command, "--threads", "3"], preexec_fn=limit, capture_output=True, text=True, check=False
        )
        if done.returncode == 127 or "error while loading shared libraries" in done.stderr:
            continue  # not even the C library fits
        assert done.returncode in (0, 1), (megabytes, done)
        assert done.returncode == 0 or "error 6" in done.stderr or "does not load" in done.stderr, done.stderr
        outcomes.add(done.returncode)
    assert outcomes == {0, 1}


def test_mutated_texts(tiny: Artifact, tmp_path: Path) -> None:
    """Thousands of damaged manifests and programs, with undefined behaviour trapped: see fuzz.c."""
    platform = platforms.find("linux-x86_64")
    sources = [native.SOURCES / name for name in ("arena.c", "error.c", "json.c", "sha256.c")]
    item, program = tmp_path / "fuzz.o", tmp_path / "fuzz"
    checked = ["-fsanitize=undefined", "-fsanitize-trap=undefined", f"-I{native.SOURCES}"]
    linker.compile_c(platform, [Path(__file__).parent / "fuzz.c", *sources], item, *checked)
    linker.link_c(platform, item, program, program=True)
    done = subprocess.run([program, tiny.path, "1", "6000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    counts = [int(word) for word in done.stdout.split() if word.isdigit()]
    assert all(0 < count < 1900 for count in counts), done.stdout
