"""Apple's Mach-O libraries: what tells macOS and iOS apart in one. Formats: loader.h, cs_blobs.h of Apple's XNU.

zig links for macOS alone. The code is the same on both systems; a library names the one that it is for, and the oldest
version of it, in one load command, as `vtool -set-build-version` writes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

IOS = 2  # PLATFORM_IOS
_HEADER = 32  # bytes of a mach_header_64; the number of load commands is at 16
_BUILD_VERSION, _CODE_SIGNATURE = 0x32, 0x1D
_DIRECTORY = 0xFADE0C02  # CSMAGIC_CODEDIRECTORY


def commands(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (kind, offset) of each load command."""
    offset = _HEADER
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        kind, size = struct.unpack_from("<II", data, offset)
        yield kind, offset
        offset += size


def retarget(library: Path, platform: int, oldest: tuple[int, int]) -> None:
    """Make ``library`` one for ``platform`` from the version ``oldest`` (major, minor) on, and sign it anew."""
    data = bytearray(library.read_bytes())
    place = next(offset for kind, offset in commands(bytes(data)) if kind == _BUILD_VERSION)
    version = oldest[0] << 16 | oldest[1] << 8
    struct.pack_into("<III", data, place + 8, platform, version, version)  # the system, its oldest version, the SDK's
    for slot, digest in page_digests(bytes(data)):
        data[slot : slot + len(digest)] = digest
    library.write_bytes(data)


def page_digests(data: bytes) -> list[tuple[int, bytes]]:
    """Return, for each page, where its SHA-256 lies in the signature and what it must be."""
    command = next(offset for kind, offset in commands(data) if kind == _CODE_SIGNATURE)
    (blob,) = struct.unpack_from("<I", data, command + 8)
    (count,) = struct.unpack_from(">I", data, blob + 8)
    places = [blob + struct.unpack_from(">I", data, blob + 16 + 8 * index)[0] for index in range(count)]
    start = next(place for place in places if struct.unpack_from(">I", data, place)[0] == _DIRECTORY)
    hashes, _, _, pages, limit = struct.unpack_from(">5I", data, start + 16)
    size, kind, _, exponent = struct.unpack_from(">4B", data, start + 36)
    assert (size, kind) == (32, 2)  # CS_HASHTYPE_SHA256: what zig signs with
    page = 1 << exponent
    return [
        (start + hashes + size * index, hashlib.sha256(data[index * page : min((index + 1) * page, limit)]).digest())
        for index in range(pages)
    ]
