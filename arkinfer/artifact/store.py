"""Artifacts on disk: sealed atomically, opened only after every byte is accounted for.

An artifact is written into a staging folder beside its destination and renamed into place when it is complete, so
that a reader sees nothing or a whole artifact: see arkinfer.artifact.staging.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from arkinfer.artifact import journal, staging, verified
from arkinfer.artifact import manifest as manifests
from arkinfer.artifact.journal import Journal
from arkinfer.artifact.lock import FolderLock
from arkinfer.artifact.manifest import FileEntry, Manifest
from arkinfer.errors import ArtifactError, InternalError, UserError, nearest

CHECKS = ("auto", "full")
Progress = Callable[[str, int, int], None]  # stage, units done, units in all
_READ = 1 << 20  # bytes hashed at a time
_SCRATCH = ".scratch"  # in the staging folder
_ASIDE = "ark-aside"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact: its folder, and its checked manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, check: str = "auto", progress: Progress | None = None) -> Artifact:
        """Open the artifact at ``path`` after comparing it with its manifest.

        Every file must be there with its size and digest, and nothing else may be; links and special files inside are
        refused. ``check="full"`` reads every byte; ``"auto"`` does so the first time and then trusts this user's
        record of the files' inode, size and times. ``progress("check", bytes read, bytes in all)`` is called meanwhile.

        Raises UserError if nothing is there, ArtifactError for anything but an intact artifact.
        """
        if check not in CHECKS:
            raise UserError(f"unknown check {check!r}", hint=nearest(check, CHECKS))
        folder = Path(path)
        if not folder.exists():
            _recover(folder)
        if not folder.exists():
            raise _absent(folder)
        folder = folder.resolve()
        manifest = Manifest.parse(_read_manifest(folder))
        found = _tree(folder, manifest)
        record = verified.key(manifest.digest, found)
        if check == "full" or not verified.known(record):
            _compare_digests(folder, manifest, progress)
            verified.remember(record)
        return cls(folder, manifest)

    def file(self, name: str) -> Path:
        """Return the path of one of the artifact's files. Raises ArtifactError if the manifest does not list it."""
        if name not in self.manifest.files:
            raise ArtifactError(
                f"the artifact has no file {name}",
                facts={"artifact": self.path},
                hint="build it again: arkinfer build MODEL -o NAME.ark --force",
                code="ARK-E507",
            )
        return self.path / name


class Writer:
    """Writes one artifact: files into a staging folder, then ``seal``. Leaving the block unsealed removes everything,
    except the finished parts of a weight file when the build was interrupted or the disk is full: see ``resume``.

    ``with Writer("name.ark") as writer: ...; artifact = writer.seal(fields)``. Raises UserError on entering if the
    destination exists and ``force`` is false, or is something else than an artifact. A full disk inside the block
    becomes a UserError that says so.
    """

    def __init__(self, destination: str | Path, force: bool = False) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.force = force
        self._staging: staging.Staging | None = None

    def __enter__(self) -> Writer:
        parent = self.destination.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _recover(self.destination)
            _check_destination(self.destination, self.force)
            staging.sweep(parent)
            self._staging = staging.make(self.destination)
        except OSError as error:
            raise _write_error(error, self.destination) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place, self._staging = self._staging, None
        if place is None:
            return
        full = _is_full_disk(error) or (error is not None and _is_full_disk(error.__cause__))
        kept = place.finished_bytes() if full or isinstance(error, KeyboardInterrupt) else 0
        if kept:
            place.leave()
            words = (
                f"{kept / 1e6:,.1f} MB of finished weights are kept in {place.path}; the same command goes on with them"
            )
            if isinstance(error, KeyboardInterrupt):
                error.add_note(words)
        else:
            place.remove()
        if full:
            raise _write_error(error, self.destination, words if kept else "") from error

    def resume(self, key: str) -> Journal:
        """Return the journal of this build's weight file, with what an interrupted build of ``key`` finished.

        ``key`` digests everything that determines the bytes. Call it before anything is written.
        """
        adopted = staging.adopt(self.destination, key)
        if adopted is not None:
            assert self._staging is not None
            self._staging.remove()
            self._staging = adopted
        return Journal(self._folder / journal.NAME, key)

    @property
    def _folder(self) -> Path:
        if self._staging is None:
            raise InternalError("the artifact writer is not open")
        return self._staging.path

    def path(self, name: str) -> Path:
        """Return where to write the artifact's file ``name`` ('/' separates folders); its folder exists afterwards."""
        place = self._folder / manifests.check_path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def scratch(self, name: str) -> Path:
        """Return where to write a file that the artifact will not hold; it is gone when the artifact is sealed."""
        place = self._folder / _SCRATCH / manifests.check_path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def preview(self, fields: Mapping[str, Any]) -> Artifact:
        """Return the unsealed artifact as it stands in staging, to be run and verified; its digests are blank."""
        files = {name: FileEntry(place.stat().st_size, "0" * 64) for name, place in self._files()}
        return Artifact(self._folder, Manifest.create(fields, files))

    def seal(self, fields: Mapping[str, Any]) -> Artifact:
        """Digest and sync every file, write manifest.json last, and rename the folder to its destination.

        ``fields`` are all fields of Manifest but schema, files and digest. An artifact with the same digest that
        appeared at the destination meanwhile is as good as this one and is kept. Raises UserError if another one did
        and ``force`` is false.
        """
        try:
            return self._seal(fields)
        except OSError as error:
            raise _write_error(error, self.destination) from error

    def _seal(self, fields: Mapping[str, Any]) -> Artifact:
        folder = self._folder
        shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
        places = dict(self._files())
        digests = _digests(places.values())
        files = {name: FileEntry(place.stat().st_size, digests[place]) for name, place in places.items()}
        sealed = Manifest.create(fields, files)
        allowed = folder.stat().st_mode  # the user's umask; files made through tempfile ignore it
        for place in places.values():
            place.chmod(allowed & (0o777 if place.stat().st_mode & 0o100 else 0o666))
            _sync(place)
        with open(folder / manifests.NAME, "xb") as stream:
            stream.write(sealed.canonical())
            stream.flush()
            os.fsync(stream.fileno())
        for inner in sorted({place.parent for place in places.values()} | {folder}, reverse=True):
            _sync(inner)
        (folder / journal.NAME).unlink(missing_ok=True)
        # Taken before the rename, which leaves the files as they are: afterwards a rival may replace the artifact.
        record = verified.key(sealed.digest, _tree(folder, sealed))
        if self._publish(folder, sealed):
            self._release()
            _sync(self.destination.parent)
            verified.remember(record)
        return Artifact(self.destination.resolve(), sealed)

    def _release(self) -> None:
        """Give up the staging folder, which is the artifact now."""
        if self._staging is not None:
            self._staging.lock.release()
            self._staging = None

    def _publish(self, folder: Path, sealed: Manifest) -> bool:
        """Put ``folder`` in place; return False if an equal artifact already stands there."""
        for _ in range(staging.ATTEMPTS):
            if _digest_at(self.destination) == sealed.digest and not self.force:
                return False
            _check_destination(self.destination, self.force)
            aside = _set_aside(self.destination) if self.force else None
            try:
                os.rename(folder, self.destination)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    if aside is not None:
                        _put_back(aside, self.destination)
                    raise
                continue  # another builder was faster: look again
            finally:
                if aside is not None:
                    shutil.rmtree(aside.path, ignore_errors=True)
                    aside.release()
            return True
        raise UserError(f"other builders keep replacing {self.destination}", hint="choose another -o", code="ARK-E152")

    def _files(self) -> Iterator[tuple[str, Path]]:
        for folder, folders, names in os.walk(self._folder):
            if _SCRATCH in folders:
                folders.remove(_SCRATCH)
            for name in folders + names:
                if (Path(folder) / name).is_symlink():
                    raise InternalError(f"the build put a link into the artifact: {name}")
            for name in sorted(names):
                place = Path(folder) / name
                if place == self._folder / journal.NAME:
                    continue
                yield manifests.check_path(place.relative_to(self._folder).as_posix()), place


def _set_aside(destination: Path) -> FolderLock | None:
    """Move the artifact at ``destination`` out of the way, locked so that nobody takes it for abandoned."""
    aside = staging.hidden(destination, _ASIDE)
    lock = FolderLock.take(destination)
    try:
        os.rename(destination, aside)
    except FileNotFoundError:
        if lock is not None:
            lock.release()
        return None
    return FolderLock(aside, lock.descriptor if lock is not None else None)


def _put_back(aside: FolderLock, destination: Path) -> None:
    if not destination.exists():
        os.rename(aside.path, destination)


def _recover(destination: Path) -> None:
    """Finish a replacement that died between its two renames: bring the old artifact back, or drop it."""
    try:
        entries = list(destination.parent.iterdir())
    except OSError:
        return
    for entry in entries:
        if not staging.is_hidden(entry.name, destination, _ASIDE):
            continue
        lock = None if entry.is_symlink() else FolderLock.take(entry)
        if lock is None:
            continue
        try:
            if not lock.held and not destination.exists():
                time.sleep(1)  # no locks here: a living builder is done with its second rename long before
            if not destination.exists():
                os.rename(entry, destination)
            elif lock.held:
                shutil.rmtree(entry, ignore_errors=True)
        except OSError:
            continue  # a reader without write permission; the next builder does it
        finally:
            lock.release()


def _check_destination(destination: Path, force: bool) -> None:
    for attempt in range(5):
        if not os.path.lexists(destination) or _is_empty(destination):
            return
        if _is_artifact(destination):
            break
        time.sleep(0.02 * attempt)  # a rival may have renamed it away between the two looks
    else:
        # --force deletes: never anything but what an earlier build made.
        raise UserError(
            f"{destination.name} exists and is not an artifact",
            facts={"path": destination},
            hint="remove it yourself, or choose another -o",
            code="ARK-E151",
        )
    if not force:
        raise UserError(
            f"{destination.name} exists", facts={"path": destination}, hint="--force replaces it", code="ARK-E150"
        )


def _is_empty(place: Path) -> bool:
    try:
        return not place.is_symlink() and not any(place.iterdir())
    except OSError:
        return False


def _is_artifact(place: Path) -> bool:
    """Tell whether an earlier build made what is at ``place``, be it damaged by now."""
    if place.is_symlink() or not place.is_dir():
        return False
    return (place.suffix == ".ark" and (place / manifests.NAME).is_file()) or _digest_at(place) is not None


def _digest_at(folder: Path) -> str | None:
    try:
        return Manifest.parse(_read_manifest(folder)).digest
    except (ArtifactError, OSError):
        return None


def _absent(folder: Path) -> UserError:
    try:
        near = sorted(entry.name for entry in folder.parent.iterdir() if (entry / manifests.NAME).is_file())
    except OSError:
        near = []
    hint = nearest(folder.name, near) if near else "arkinfer build MODEL -o " + folder.name
    return UserError(f"there is no artifact at {folder}", hint=hint, code="ARK-E153")


def _read_manifest(folder: Path) -> bytes:
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not an artifact",
            facts={"reason": "an artifact is a folder with a manifest.json"},
            code="ARK-E501",
        )
    try:
        descriptor = os.open(folder / manifests.NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} is not an artifact",
            facts={"reason": "it has no manifest.json: another folder, or a copy that was interrupted"},
            hint="copy it again, or: arkinfer build MODEL -o NAME.ark",
            code="ARK-E501",
        ) from error
    except OSError as error:
        raise _refused(folder, manifests.NAME, "it cannot be read, or is a link") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(folder, manifests.NAME, "it is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read(manifests.MAX_BYTES + 1)


def _tree(folder: Path, manifest: Manifest) -> dict[str, os.stat_result]:
    """Return the stat of each file below ``folder``; raise unless they are exactly those of the manifest."""
    folders = {"/".join(name.split("/")[:depth]) for name in manifest.files for depth in range(1, name.count("/") + 1)}
    found: dict[str, os.stat_result] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            entries = list(os.scandir(folder / prefix))
        except OSError as error:
            raise _refused(folder, prefix or ".", "the folder cannot be read") from error
        for entry in entries:
            name = prefix + entry.name
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as error:
                raise _refused(folder, name, "it cannot be read") from error
            # Hard links pass: image-based systems deploy every file as one, and the digest vouches for the content.
            if stat.S_ISLNK(status.st_mode):
                raise _refused(folder, name, "it is a link; an artifact holds none")
            if stat.S_ISDIR(status.st_mode) and name in folders:
                pending.append(name + "/")
            elif stat.S_ISREG(status.st_mode) and (name in manifest.files or name == manifests.NAME):
                found[name] = status
            else:
                raise _refused(folder, name, "it does not belong to the artifact", hint="remove it")
    for name, expected in manifest.files.items():
        if name not in found:
            raise _refused(folder, name, "it is missing")
        if found[name].st_size != expected.size:
            raise _refused(folder, name, f"it has {found[name].st_size} bytes, not {expected.size}")
    return found


def _compare_digests(folder: Path, manifest: Manifest, progress: Progress | None) -> None:
    places = {folder / name: name for name in manifest.files}
    try:
        digests = _digests(places, progress)
    except OSError as error:
        raise _refused(folder, Path(error.filename or folder).name, error.strerror or "it cannot be read") from error
    for place, digest in digests.items():
        if digest != manifest.files[places[place]].sha256:
            raise _refused(folder, places[place], "its SHA-256 is not the manifest's: it was changed or damaged")


def _digests(places: Iterable[Path], progress: Progress | None = None) -> dict[Path, str]:
    """Return the SHA-256 of each file, hashed on all cores, the largest first."""
    sizes = {place: place.stat().st_size for place in places}
    order = sorted(sizes, key=lambda place: -sizes[place])
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress("check", done, sum(sizes.values()))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(order, pool.map(lambda place: _hash(place, advance), order), strict=True))


def _hash(place: Path, advance: Callable[[int], None]) -> str:
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    digest, buffer = hashlib.sha256(), bytearray(_READ)
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(folder: Path, name: str, reason: str, hint: str = "") -> ArtifactError:
    return ArtifactError(
        f"{folder.name} is not intact",
        facts={"file": name, "reason": reason, "artifact": folder},
        hint=hint or "copy it again, or build it again: arkinfer build MODEL -o NAME.ark --force",
        code="ARK-E505",
    )


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL_DISK


def _write_error(error: BaseException | None, destination: Path, kept: str = "") -> UserError:
    """Return the error for a failed write; one that was turned into a UserError already is told again."""
    if isinstance(error, UserError):
        error = error.__cause__
    reason = error.strerror if isinstance(error, OSError) else str(error)
    facts: dict[str, object] = {"reason": reason, "destination": destination}
    try:
        facts["free"] = f"{shutil.disk_usage(destination.parent).free / 1e9:.2f} GB"
    except OSError:
        facts["free"] = "unknown"
    hint = "free some space, or choose another disk with -o" if _is_full_disk(error) else "choose another -o"
    if kept:
        facts["kept"] = kept
    return UserError("the artifact could not be written", facts=facts, hint=hint, code="ARK-E154")
