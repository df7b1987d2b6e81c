"""What is left to do on the device: build TensorRT's engine from the artifact's files, once, and keep it.

The artifact is not touched, so that it stays what its manifest says and may be read-only. The engine is code that will
run in this process: it lies in this user's private cache folder, under the SHA-256 of what it was made from and by,
beside a record of its own digest. Another TensorRT, driver, GPU or artifact has another name, and builds anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkinfer.artifact import Artifact, tensorrt, verified
from arkinfer.artifact.engine_recipe import FILE, EngineRecipe
from arkinfer.artifact.lock import FolderLock
from arkinfer.artifact.manifest import canonical
from arkinfer.backends import onnx_file
from arkinfer.backends.cuda_driver import present_gpu
from arkinfer.backends.payload import read
from arkinfer.errors import UnsupportedError, UserError
from arkinfer.targets import probe
from arkinfer.targets.probe import Gpu
from arkinfer.targets.versions import within

FORMAT = 1  # of record.json
ENGINE, RECORD = "engine.plan", "record.json"
GROWTH = 1.6  # an engine's bytes over those of the weights it was made from: 1.58 with fp16, 0.9 with int4
WAIT = 0.2  # seconds between two looks at a lock that another process holds
_READ = 1 << 20  # bytes hashed at a time
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # stage, units done, units in all


@dataclass(frozen=True)
class Finished:
    """An engine that is ready: its file, what is recorded of it, and whether this call built it."""

    engine: Path
    record: Mapping[str, Any]
    built: bool


@dataclass(frozen=True)
class Device:
    """What an engine is bound to, and the module that builds and runs it."""

    module: Any
    library: str
    version: str
    gpu: Gpu
    system: str  # the release of a Jetson's system, "" elsewhere

    def facts(self) -> dict[str, str]:
        return {
            "library": self.library,
            "version": self.version,
            "gpu": self.gpu.name,
            "level": self.gpu.level,
            "cuda": self.gpu.cuda,
            "system": self.system,
        }


def read_recipe(artifact: Artifact) -> EngineRecipe:
    """Return the recipe in ``artifact``. Raises ArtifactError for anything but a sound one."""
    return read(artifact, FILE, EngineRecipe.from_json)


def require(recipe: EngineRecipe, target: str) -> Device:
    """Return this machine as ``recipe`` needs it. Raises UnsupportedError, which says what is missing or too old."""
    gpu = present_gpu(recipe.levels, target)
    if gpu.level not in recipe.levels:
        raise UnsupportedError(
            "this artifact is made for another GPU",
            facts={"artifact": ", ".join(recipe.levels), "this machine": f"{gpu.name} ({gpu.level})"},
            hint="build again for a target whose arch lists this GPU's level: arkinfer targets",
            code="ARK-E311",
        )
    system = probe.jetson() or ""
    name = tensorrt.NAMES[recipe.library]
    facts = {"made for": target, **({"system": system} if system else {})}
    try:
        module = tensorrt.library(recipe.library)
    except (ImportError, OSError) as error:
        raise UnsupportedError(
            f"this artifact needs {name}, and Python cannot load it here",
            facts={**facts, "reason": error},
            hint=_MISSING[recipe.library],
            code="ARK-E344",
        ) from error
    version = str(getattr(module, "__version__", "0"))
    if not within(version, recipe.versions):
        raise UnsupportedError(
            f"this artifact needs {name} {recipe.versions}, and this machine has {version}",
            facts={**facts, "reason": _REASON[recipe.library]},
            hint=_OTHER[recipe.library],
            code="ARK-E345",
        )
    return Device(module, recipe.library, version, gpu, system)


_MISSING = {
    "tensorrt": "sudo apt install python3-libnvinfer\n"
    "then use a Python that sees it: python3 -m venv --system-site-packages my-venv\n"
    "arkinfer build MODEL --target jetson-orin-cuda needs no TensorRT",
    "tensorrt_rtx": "pip install 'arkinfer[runtime,tensorrt-rtx]'",
}
_REASON = {
    "tensorrt": "before 10.15 it has no layer that updates a KV cache in place; JetPack 6.2 brings 10.3, 7.2 10.16",
    "tensorrt_rtx": "an engine runs on the release that built it",
}
_OTHER = {
    "tensorrt": "install JetPack 7.2\narkinfer build MODEL --target jetson-orin-cuda needs no TensorRT",
    "tensorrt_rtx": "pip install 'arkinfer[runtime,tensorrt-rtx]'",
}


def finish(
    artifact: Artifact, say: Say | None = None, progress: Progress | None = None, force: bool = False
) -> Finished | None:
    """Return the engine of ``artifact`` for this machine, built now if it is not there or with ``force``.

    None where the artifact holds its engine already. ``say`` is told in a sentence that work begins, or that another
    process is at it, which is waited for. Raises UnsupportedError where this machine cannot, UserError where the engine
    cannot be written. However a build ends, the next call finds a whole engine or none.
    """
    recipe = read_recipe(artifact)
    device = require(recipe, str(artifact.manifest.target.get("name")))
    if recipe.engine is not None:
        return None
    tell = say or _unheard
    source = _source(artifact)
    identity = canonical({"source": source, **device.facts()})
    folder = _folder() / hashlib.sha256(identity).hexdigest()
    if not force and (found := _sealed(folder, source)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # of parents the mode would be the umask's
        folder.mkdir(exist_ok=True, mode=0o700)
        with _locked(folder, tell):
            if not force and (found := _sealed(folder, source)) is not None:  # whoever held the lock built it
                return found
            built = _build(artifact, recipe, device, source, folder, tell, progress or _unseen)
            _drop_others(folder, source)
            return built
    except OSError as error:
        raise UserError(
            "the engine could not be written",
            facts={"reason": error.strerror or error, "folder": folder},
            hint="name a folder of your own: ARKINFER_CACHE=/path/to/folder",
            code="ARK-E155",
        ) from error


def _build(
    artifact: Artifact,
    recipe: EngineRecipe,
    device: Device,
    source: str,
    folder: Path,
    say: Say,
    progress: Progress,
) -> Finished:
    """Build into ``folder``, which is locked: the engine under a name of its own, then in place, the record last."""
    onnx_file.check(artifact.file(recipe.model), artifact.manifest.files)  # before TensorRT reads what it names
    for left in folder.glob("*.part"):
        left.unlink(missing_ok=True)
    _require_private(folder)
    weights = sum(entry.size for name, entry in artifact.manifest.files.items() if name.startswith("weights-"))
    free = shutil.disk_usage(folder).free
    if GROWTH * weights > free:
        raise UserError(
            "the disk has no room for the engine",
            facts={"needed": f"about {int(GROWTH * weights):,} bytes", "free": f"{free:,} bytes in {folder}"},
            hint="free some space, or name another folder: ARKINFER_CACHE=/path/to/folder",
            code="ARK-E155",
        )
    say(
        f"building the engine of {artifact.path.name} for {device.gpu.name} with {tensorrt.NAMES[device.library]} "
        f"{device.version}; this takes minutes, once, and is kept in {folder}"
    )
    part = folder / f"engine.{secrets.token_hex(8)}.part"
    began = time.monotonic()
    timing = folder.parent / f"timing-{device.library}-{device.version}-{device.gpu.level}.cache"
    request = tensorrt.Request(
        device.library, recipe.to_json(), str(artifact.file(recipe.model)), "", str(part), str(timing)
    )
    try:
        outcome = tensorrt.build(request, lambda done, total: progress("engine", done, total))
        digest = _hash(part)
        record = {
            "format": FORMAT,
            "source": source,
            **device.facts(),
            "arkinfer": artifact.manifest.arkinfer,
            "engine": {"size": part.stat().st_size, "sha256": digest},
            "layers": dict(outcome.layers),
            "seconds": round(time.monotonic() - began, 1),
        }
        (folder / RECORD).unlink(missing_ok=True)  # a record never stands beside another engine
        os.replace(part, folder / ENGINE)
        note = folder / f"record.{secrets.token_hex(8)}.part"
        with open(note, "xb") as stream:
            stream.write(canonical(record))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(note, folder / RECORD)
        _sync(folder)
    finally:
        part.unlink(missing_ok=True)
    verified.remember(verified.key(digest, {ENGINE: (folder / ENGINE).lstat()}))
    return Finished(folder / ENGINE, record, True)


def _sealed(folder: Path, source: str) -> Finished | None:
    """Return the engine in ``folder`` if it is whole and nobody else could have put it there."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        engine, status = folder / ENGINE, (folder / ENGINE).lstat()
        stated = record["engine"]
        if record["format"] != FORMAT or record["source"] != source or status.st_size != stated["size"]:
            return None
        known = verified.key(stated["sha256"], {ENGINE: status})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _require_private(folder)
    if not verified.known(known):
        if _hash(engine) != stated["sha256"]:
            return None
        verified.remember(known)
    return Finished(engine, record, False)


def _source(artifact: Artifact) -> str:
    """Return the digest of the files that an engine is made from. A staged artifact's are hashed here."""
    digest = hashlib.sha256()
    for name, entry in sorted(artifact.manifest.files.items()):
        if name.startswith(("payload/", "weights-")) and not name.endswith(".txt"):
            known = entry.sha256 if entry.sha256.strip("0") else _hash(artifact.file(name))
            digest.update(f"{name}\0{known}\0".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    """Hold ``folder``; wait while another process does, and drop it however the block ends."""
    told = False
    while (lock := FolderLock.take(folder)) is None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            continue
        if not told:
            say("another process is building this engine; waiting for it")
            told = True
        time.sleep(WAIT)
    try:
        yield
    finally:
        lock.release()


def _drop_others(folder: Path, source: str) -> None:
    """Remove engines of the same files that another TensorRT, driver or GPU made, unless they are in the making."""
    for other in folder.parent.iterdir():
        if other == folder or not (other / RECORD).is_file():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads((other / RECORD).read_bytes())["source"] != source:
                continue
            lock = FolderLock.take(other)
            if lock is not None:
                shutil.rmtree(other, ignore_errors=True)
                lock.release()


def _folder() -> Path:
    return verified.folder().parent / "engines"


def _require_private(folder: Path) -> None:
    for place in (folder.parent, folder):
        status = place.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise UserError(
                "others could write to the folder of the engines, and an engine is code",
                facts={"folder": place},
                hint=f"chmod 700 {place}\nor name a folder of your own: ARKINFER_CACHE=/path/to/folder",
                code="ARK-E156",
            )


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while data := stream.read(_READ):
            digest.update(data)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unheard(text: str) -> None:
    pass


def _unseen(stage: str, done: int, total: int) -> None:
    pass
