"""Cubins by job: compiled in processes of their own, and kept between builds."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import arkinfer
from arkinfer.errors import InternalError
from arkinfer.exporters import compiled
from arkinfer.exporters.kernels.triton import kernel as find
from arkinfer.exporters.kernels.triton.kernel import Options

LARGEST = 2000  # cubins kept; the oldest go first
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes in the .nv.info section of a cubin


@dataclass(frozen=True)
class Job:
    """One kernel with its options, for one arch ("sm_89")."""

    name: str
    options: Options
    arch: str

    def describe(self) -> dict[str, Any]:
        """Return all that the compiler reads, as JSON."""
        kernel = find(self.name)
        options = kernel.parse(self.options)
        variant = kernel.variant(options, self.arch)
        return {
            "code": kernel.code,
            "arch": self.arch,
            "arguments": [[argument.name, argument.dtype, argument.role] for argument in kernel.arguments(options)],
            "constants": dict(variant.constants),
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
        }


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: ``entry`` is its function, ``shared`` the dynamic shared memory of a launch in bytes.

    ``registers`` a thread; ``stack`` bytes of local memory a thread, 0 where nothing was spilled. A launch passes the
    arguments in order and then two zero words of 64 bits, in blocks of 32 * ``num_warps`` threads.
    """

    code: bytes
    ptx: str
    entry: str
    shared: int
    registers: int
    stack: int
    num_warps: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.code).hexdigest()


@cache
def _sources() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([here / "compiler.py", *(here / "device").glob("*.py")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _key(text: str) -> str:
    return hashlib.sha256("\0".join([text, _sources(), metadata.version("triton")]).encode()).hexdigest()


def compile_all(
    jobs: Sequence[Job], progress: Callable[[int, int], None] = lambda done, total: None, keep: bool = True
) -> list[Cubin]:
    """Return the cubins of ``jobs`` in their order, from the user's cache where it has them (unless not ``keep``).

    Raises InternalError if the compiler fails.
    """
    return compile_described([json.dumps(job.describe(), sort_keys=True) for job in jobs], progress, keep)


def compile_described(
    texts: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None, keep: bool = True
) -> list[Cubin]:
    """Return the cubins of jobs that are given as JSON: what Job.describe returns."""
    found: dict[str, Cubin] = {}
    with tempfile.TemporaryDirectory(prefix="arkinfer-") as folder:
        place = Path(folder)
        for text in dict.fromkeys(texts):
            if keep and compiled.fetch(_key(text), place / "kept", ".cubin"):
                found[text] = _read(place / "kept")
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for done, (text, file) in enumerate(_compile(missing, place)):
            progress(len(found), len(found) + len(missing) - done)
            found[text] = _read(file)
            if keep:
                compiled.keep(_key(text), file, ".cubin", LARGEST)
    return [found[text] for text in texts]


def _compile(texts: Sequence[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """Compile the jobs ``texts`` in as many processes as there are processors; yield each with its file."""
    workers = [texts[index :: os.cpu_count() or 1] for index in range(os.cpu_count() or 1)]
    running = [(share, _Process(share, folder / str(index))) for index, share in enumerate(workers) if share]
    try:
        for share, process in running:
            process.finish()
            for index, text in enumerate(share):
                yield text, _write(json.loads(text), process.out, index)
    finally:
        for _, process in running:
            process.close()


class _Process:
    """One run of compiler.py."""

    def __init__(self, texts: Sequence[str], out: Path) -> None:
        root = str(Path(arkinfer.__file__).resolve().parent.parent)
        out.mkdir()
        self.out = out
        self._log = out.joinpath("log").open("w+", encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "TRITON_CACHE_DIR": str(out / "cache"),  # ours is keyed by what matters, and checked
        }
        environment.pop("TRITON_INTERPRET", None)
        jobs = out / "jobs"
        jobs.write_text(f"[{','.join(texts)}]", encoding="utf-8")
        with jobs.open(encoding="utf-8") as stdin:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "arkinfer.exporters.kernels.triton.compiler", str(out)],
                env=environment,
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
            )

    def finish(self) -> None:
        """Wait. Raises InternalError if the compiler failed or crashed."""
        if status := self._process.wait():
            self._log.seek(0)
            lines = [line.strip() for line in self._log if line.strip()]
            raise InternalError(
                "the CUDA kernel compiler failed",
                facts={"exit status": status, "last words": lines[-1] if lines else "none"},
                hint="report this with the model's config.json",
                code="ARK-E711",
            )

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()


def _write(job: Mapping[str, Any], out: Path, index: int) -> Path:
    """Put what the compiler wrote for one job into one file: a line of JSON, the PTX, the code."""
    code = out.joinpath(f"{index}.cubin").read_bytes()
    ptx = out.joinpath(f"{index}.ptx").read_bytes()
    facts = json.loads(out.joinpath(f"{index}.json").read_text(encoding="utf-8"))
    header = {**facts, "num_warps": job["num_warps"], "ptx": len(ptx), **_usage(code)}
    file = out / f"{index}.kept"
    file.write_bytes(json.dumps(header, sort_keys=True).encode() + b"\n" + ptx + code)
    return file


def _read(file: Path) -> Cubin:
    line, _, rest = file.read_bytes().partition(b"\n")
    facts = json.loads(line)
    length = facts.pop("ptx")
    return Cubin(code=rest[length:], ptx=rest[:length].decode(), **facts)


def _usage(code: bytes) -> dict[str, int]:
    """Return ``registers`` and ``stack`` of a cubin, from the .nv.info section of its ELF file."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", code, 0x28)
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, table + index * size) for index in range(count)]
    strings = headers[names][4]
    values = {}
    for header in headers:
        name = code[strings + header[0] : code.index(b"\0", strings + header[0])]
        if name != b".nv.info":
            continue
        place, end = header[4], header[4] + header[5]
        while place < end:
            form, attribute, length = struct.unpack_from("<BBH", code, place)
            if form == 4 and attribute in (_REGISTERS, _FRAME):  # payload: symbol, value
                values[attribute] = struct.unpack_from("<I", code, place + 8)[0]
            place += 4 + (length if form == 4 else 0)
    return {"registers": values[_REGISTERS], "stack": values[_FRAME]}
