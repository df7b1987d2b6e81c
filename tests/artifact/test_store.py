"""Artifacts are written whole or not at all, with the same bytes each time, and opened only when intact."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import samples

from arkinfer.artifact import Artifact, Writer, lock, store, verified
from arkinfer.errors import ArtifactError, UserError


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


def test_round_trip(artifact: Artifact) -> None:
    again = Artifact.open(artifact.path, check="full")
    assert again == artifact
    assert {name: again.file(name).read_bytes() for name in again.manifest.files} == samples.FILES
    assert again.manifest.context == 4096
    assert leftovers(artifact.path.parent) == []


def test_same_contents_give_the_same_bytes(artifact: Artifact, tmp_path: Path) -> None:
    other = samples.write(tmp_path / "elsewhere" / "copy.ark")
    assert samples.contents(other.path) == samples.contents(artifact.path)
    assert other.manifest.digest == artifact.manifest.digest


def test_manifest_names_no_place(artifact: Artifact, tmp_path: Path) -> None:
    text = (artifact.path / "manifest.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert json.loads(text)["provenance"]["model"] == "小模型"


def test_the_folder_gets_ordinary_permissions(artifact: Artifact) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(artifact.path.stat().st_mode) == 0o777 & ~mask


def test_files_get_ordinary_permissions(tmp_path: Path) -> None:
    with Writer(tmp_path / "a.ark") as writer:
        place = writer.path("weights.safetensors")
        place.touch(mode=0o600)
        artifact = writer.seal(samples.fields())
    folder, file = artifact.path.stat().st_mode, artifact.file("weights.safetensors").stat().st_mode
    assert stat.S_IMODE(file) == stat.S_IMODE(folder) & 0o666


def test_opens_through_a_link_to_the_folder(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "link.ark").symlink_to(artifact.path)
    assert Artifact.open(tmp_path / "link.ark").path == artifact.path


def test_a_moved_or_copied_artifact_opens(artifact: Artifact, tmp_path: Path) -> None:
    Artifact.open(samples.copy(artifact, tmp_path / "copy.ark"))
    artifact.path.rename(tmp_path / "moved.ark")
    Artifact.open(tmp_path / "moved.ark")


def test_hard_links_open(artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.path, tmp_path / "linked.ark", copy_function=os.link)
    assert Artifact.open(tmp_path / "linked.ark").manifest == artifact.manifest


def test_preview_is_what_will_be_sealed(tmp_path: Path) -> None:
    with Writer(tmp_path / "a.ark") as writer:
        writer.path("payload/x").write_bytes(b"abc")
        staged = writer.preview(samples.fields(parity=None))
        assert staged.file("payload/x").read_bytes() == b"abc"
        assert staged.manifest.files["payload/x"].size == 3
        sealed = writer.seal(samples.fields())
    assert sealed.manifest.parity is not None


def test_unknown_file_is_refused_by_name(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"no file payload/sm_87\.cubin"):
        artifact.file("payload/sm_87.cubin")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/../b",
        "a//b",
        "./a",
        ".hidden",
        "a/.b",
        "",
        "a b",
        "a\\b",
        "a/b/c/d/e",
        "manifest.json",
        "a\n",
        "C:x",
        "x" * 101,
    ],
)
def test_writer_refuses_names(tmp_path: Path, name: str) -> None:
    with Writer(tmp_path / "a.ark") as writer, pytest.raises(ArtifactError):
        writer.path(name)


class TestDestination:
    def test_exists(self, artifact: Artifact) -> None:
        with pytest.raises(UserError, match="exists") as caught, Writer(artifact.path):
            pass
        assert "--force" in caught.value.hint

    def test_force_replaces(self, artifact: Artifact) -> None:
        samples.write(artifact.path, force=True, context=8192)
        assert Artifact.open(artifact.path, check="full").manifest.context == 8192
        assert leftovers(artifact.path.parent) == []

    def test_force_replaces_a_damaged_artifact(self, artifact: Artifact) -> None:
        (artifact.path / "manifest.json").write_bytes(b"{")
        samples.write(artifact.path, force=True)
        Artifact.open(artifact.path, check="full")

    def test_failed_replacement_keeps_the_old_one(self, artifact: Artifact) -> None:
        with pytest.raises(KeyboardInterrupt), Writer(artifact.path, force=True) as writer:
            writer.path("payload/x").write_bytes(b"half")
            raise KeyboardInterrupt
        assert Artifact.open(artifact.path, check="full") == artifact
        assert leftovers(artifact.path.parent) == []

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("kind", ["folder", "file", "link", "web"])
    def test_never_deletes_what_is_not_an_artifact(self, tmp_path: Path, kind: str, force: bool) -> None:
        place = tmp_path / "precious"
        if kind == "file":
            place.write_text("mine")
        elif kind == "link":
            place.symlink_to(samples.write(tmp_path / "real.ark").path)
        else:
            place.mkdir()
            (place / ("manifest.json" if kind == "web" else "thesis.txt")).write_text('{"name": "app"}')
        with pytest.raises(UserError, match="is not an artifact"), Writer(place, force):
            pass
        assert place.exists()

    def test_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        samples.write(tmp_path / "out")
        Artifact.open(tmp_path / "out")

    def test_unwritable_parent(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="could not be written"), Writer(tmp_path / "file" / "a.ark"):
            pass


class TestInterruption:
    def test_leaving_unsealed_removes_everything(self, tmp_path: Path) -> None:
        with Writer(tmp_path / "a.ark") as writer:
            writer.path("payload/x").write_bytes(b"abc")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_full_disk(self, tmp_path: Path, number: int) -> None:
        with pytest.raises(UserError, match="could not be written") as caught, Writer(tmp_path / "a.ark") as writer:
            writer.path("payload/x").write_bytes(b"abc")
            raise OSError(number, os.strerror(number))
        assert caught.value.facts["reason"] == os.strerror(number)
        assert "free" in caught.value.facts
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("call", ["fsync", "rename", "open"])
    def test_failing_system_calls_while_sealing(
        self, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fail the first, second, ... call of one kind: each time nothing is left, or the whole artifact is."""
        real = getattr(os, call)
        for point in range(40):
            count = 0

            def failing(*arguments: Any, point: int = point, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == point + 1:
                    raise OSError(errno.EIO, "Input/output error")
                return real(*arguments, **options)

            destination = tmp_path / f"{call}-{point}.ark"
            try:
                with Writer(destination) as writer:
                    for name, content in samples.FILES.items():
                        writer.path(name).write_bytes(content)
                    monkeypatch.setattr(os, call, failing)
                    writer.seal(samples.fields())
            except (UserError, ArtifactError):
                pass
            finally:
                monkeypatch.undo()
            if destination.exists():
                Artifact.open(destination, check="full")
            assert leftovers(tmp_path) == []
            if count <= point:
                return
        pytest.fail("more calls than expected")

    def test_kill_at_any_moment(self, tmp_path: Path) -> None:
        """kill -9 a builder that replaces the same artifact again and again: what stands there is always whole."""
        destination = tmp_path / "a.ark"
        code = (
            "import sys, itertools, pathlib, samples\n"
            "for n in itertools.count():\n"
            "    samples.write(pathlib.Path(sys.argv[1]), force=True, context=n + 1)\n"
            "    print(n, flush=True)\n"
        )
        for round_ in range(12):
            with _python(code, destination) as process:
                assert process.stdout is not None
                process.stdout.readline()  # at least one artifact is complete
                time.sleep(0.0007 * round_)
                process.kill()
            found = Artifact.open(destination, check="full")  # recovers a replacement that died half-way
            assert found.manifest.context >= 1
        samples.write(destination, force=True)  # sweeps what the dead left
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.ark"]

    def test_the_living_are_not_swept(self, tmp_path: Path) -> None:
        with Writer(tmp_path / "slow.ark") as slow:
            slow.path("payload/x").write_bytes(b"abc")
            samples.write(tmp_path / "quick.ark")
            slow.seal(samples.fields())
        Artifact.open(tmp_path / "slow.ark", check="full")

    def test_dead_replacement_is_undone(self, artifact: Artifact) -> None:
        aside = artifact.path.with_name(f".{artifact.path.name}.0123456789abcdef.ark-aside")
        artifact.path.rename(aside)
        assert Artifact.open(artifact.path) == artifact
        assert not aside.exists()

    def test_live_replacement_is_left_alone(self, artifact: Artifact) -> None:
        aside = artifact.path.with_name(f".{artifact.path.name}.0123456789abcdef.ark-aside")
        artifact.path.rename(aside)
        held = lock.FolderLock.take(aside)
        assert held is not None
        with pytest.raises(UserError, match="no artifact"):
            Artifact.open(artifact.path)
        held.release()


class TestConcurrentBuilders:
    @pytest.mark.parametrize("locks", [True, False])
    def test_all_end_and_one_stands(self, tmp_path: Path, locks: bool) -> None:
        """Four builders force four contents onto one name. ``locks`` false: a file system where flock fails."""
        code = (
            "import sys, pathlib, samples\n"
            f"from arkinfer.artifact import lock\n"
            f"if not {locks}: lock.fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError(95, 'not supported'))\n"
            "for n in range(15): samples.write(pathlib.Path(sys.argv[1]), force=True, context=int(sys.argv[2]))\n"
        )
        destination = tmp_path / "a.ark"
        processes = [_python(code, destination, number) for number in range(1, 5)]
        for process in processes:
            assert process.wait() == 0, process.stderr.read() if process.stderr else ""
            if process.stderr and process.stdout:
                process.stderr.close()
                process.stdout.close()
        assert Artifact.open(destination, check="full").manifest.context in range(1, 5)
        if locks:
            assert leftovers(tmp_path) == []

    def test_equal_artifacts_both_succeed(self, tmp_path: Path) -> None:
        with Writer(tmp_path / "a.ark") as first, Writer(tmp_path / "a.ark") as second:
            for writer in (first, second):
                for name, content in samples.FILES.items():
                    writer.path(name).write_bytes(content)
            assert first.seal(samples.fields()) == second.seal(samples.fields())
        assert leftovers(tmp_path) == []

    def test_different_artifacts_need_force(self, tmp_path: Path) -> None:
        with (
            Writer(tmp_path / "a.ark") as first,
            pytest.raises(UserError, match="exists"),
            Writer(tmp_path / "a.ark") as second,
        ):
            first.path("payload/x").write_bytes(b"1")
            second.path("payload/x").write_bytes(b"2")
            sealed = first.seal(samples.fields())
            second.seal(samples.fields())
        assert Artifact.open(tmp_path / "a.ark", check="full") == sealed


class TestRecord:
    """The record of checked digests saves reading, never safety."""

    def test_second_open_reads_nothing(
        self, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = samples.copy(artifact, tmp_path / "copy.ark")
        hashed: list[Path] = []
        real = store._hash
        monkeypatch.setattr(store, "_hash", lambda place, advance: hashed.append(place) or real(place, advance))  # type: ignore[func-returns-value]
        Artifact.open(copy)
        assert len(hashed) == len(samples.FILES)
        Artifact.open(copy)
        assert len(hashed) == len(samples.FILES)
        Artifact.open(copy, check="full")
        assert len(hashed) == 2 * len(samples.FILES)

    def test_a_built_artifact_is_known(self, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "_hash", lambda place, advance: pytest.fail(f"read {place}"))
        Artifact.open(artifact.path)

    def test_change_with_restored_times_is_seen(self, artifact: Artifact) -> None:
        place = artifact.file("weights-00001.safetensors")
        status = place.stat()
        data = bytearray(place.read_bytes())
        data[1000] ^= 1
        place.write_bytes(data)
        os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(ArtifactError, match="not intact"):
            Artifact.open(artifact.path)

    def test_records_that_others_can_write_do_not_count(
        self, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ARKINFER_CACHE", str(tmp_path / "cache"))
        Artifact.open(artifact.path)
        assert stat.S_IMODE(verified.folder().stat().st_mode) == 0o700
        verified.folder().chmod(0o777)
        read = []
        real = store._hash
        monkeypatch.setattr(store, "_hash", lambda place, advance: read.append(place) or real(place, advance))  # type: ignore[func-returns-value]
        Artifact.open(artifact.path)
        assert read

    def test_unusable_cache_is_no_obstacle(
        self, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("ARKINFER_CACHE", str(tmp_path / "file"))
        assert Artifact.open(artifact.path) == artifact

    def test_records_are_bounded(self, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ARKINFER_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(verified, "_LIMIT", 3)
        for number in range(6):
            verified.remember(f"{number:064x}")
        assert len(list(verified.folder().iterdir())) == 3


def _python(code: str, *arguments: object) -> subprocess.Popen[str]:
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parents[2])])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
