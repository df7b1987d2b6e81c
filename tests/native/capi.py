"""The C API through ctypes, as an application calls it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np

OK, ARGUMENT, ABSENT, DAMAGED, NEWER, UNSUPPORTED, MEMORY, TOKEN, FULL, BUSY, CANCELLED, INTERNAL = range(12)
NONE, LAST, ALL = range(3)
GEARS = ("built", "auto", "dense", "sparse")


class Options(ctypes.Structure):
    _fields_ = (
        ("threads", c_int32),
        ("attention", c_int),
        ("chunk", c_int32),
        ("check", c_int32),
        ("libraries", c_char_p),
    )


class Sampling(ctypes.Structure):
    _fields_ = (
        ("temperature", c_double),
        ("top_k", c_int32),
        ("top_p", c_double),
        ("min_p", c_double),
        ("seed", c_uint64),
    )


class Random(ctypes.Structure):
    _fields_ = (("state", c_uint64 * 4), ("half", c_uint32), ("held", c_uint32))


SINK = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int32)


class Generation(ctypes.Structure):
    _fields_ = (
        ("limit", c_size_t),
        ("sampling", Sampling),
        ("stops", POINTER(c_int32)),
        ("stop_count", c_size_t),
        ("sink", SINK),
        ("context", c_void_p),
    )


class Failure(Exception):
    """A call that returned something other than ARK_OK."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


def _ids(tokens: Sequence[int]) -> Any:
    return (c_int32 * len(tokens))(*tokens)


class Library:
    """libarkinfer."""

    def __init__(self, file: Path) -> None:
        self.c = ctypes.CDLL(str(file))
        for name, kind in (
            ("ark_error", c_char_p),
            ("ark_level", c_char_p),
            ("ark_context", c_int64),
            ("ark_length", c_int64),
            ("ark_capacity", c_int64),
            ("ark_scratch", c_size_t),
            ("ark_session_bytes", c_size_t),
            ("ark_stops", POINTER(c_int32)),
            ("ark_random_next", c_float),
        ):
            getattr(self.c, name).restype = kind
        for name in ("ark_close", "ark_cancel", "ark_session_close"):
            getattr(self.c, name).restype = None

    def check(self, status: int) -> None:
        if status:
            raise Failure(status, self.c.ark_error().decode())

    def open(
        self, path: Path, threads: int = 0, attention: str = "built", chunk: int = 0, check: bool = False, **more: Any
    ) -> Engine:
        options = Options(threads, GEARS.index(attention), chunk, check, more.get("libraries"))
        handle = c_void_p()
        self.check(self.c.ark_open(str(path).encode(), byref(options), byref(handle)))
        return Engine(self, handle)

    def seed(self, random: Random, seed: int) -> None:
        self.c.ark_seed(byref(random), c_uint64(seed))

    def sample(self, logits: np.ndarray, sampling: Sampling, random: Random) -> int:
        token = c_int32()
        pointer = logits.ctypes.data_as(c_void_p)
        self.check(self.c.ark_sample(pointer, c_size_t(logits.size), byref(sampling), byref(random), byref(token)))
        return token.value


class Engine:
    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library, self.handle = library, handle
        self.vocabulary = library.c.ark_vocabulary(handle)
        self.context = library.c.ark_context(handle)
        self.level = library.c.ark_level(handle).decode()

    def session(self, capacity: int = 0) -> Session:
        handle = c_void_p()
        self.library.check(self.library.c.ark_session_open(self.handle, c_int64(capacity), byref(handle)))
        return Session(self, handle)

    def close(self) -> None:
        self.library.c.ark_close(self.handle)


class Session:
    def __init__(self, engine: Engine, handle: c_void_p) -> None:
        self.engine, self.handle, self.library = engine, handle, engine.library

    @property
    def length(self) -> int:
        return int(self.library.c.ark_length(self.handle))

    @property
    def capacity(self) -> int:
        return int(self.library.c.ark_capacity(self.handle))

    def step(self, tokens: Sequence[int], rows: int = ALL) -> np.ndarray:
        logits = np.empty((len(tokens) if rows == ALL else int(rows == LAST), self.engine.vocabulary), np.float32)
        pointer = logits.ctypes.data_as(c_void_p)
        self.library.check(self.library.c.ark_step(self.handle, _ids(tokens), c_size_t(len(tokens)), rows, pointer))
        return logits

    def truncate(self, length: int) -> None:
        self.library.check(self.library.c.ark_truncate(self.handle, c_int64(length)))

    def fork(self) -> Session:
        handle = c_void_p()
        self.library.check(self.library.c.ark_fork(self.handle, byref(handle)))
        return Session(self.engine, handle)

    def cancel(self) -> None:
        self.library.c.ark_cancel(self.handle)

    def generate(self, prompt: Sequence[int], limit: int, sink: Any = None, **sampling: Any) -> list[int]:
        stops = sampling.pop("stops", None)
        generation = Generation(limit=limit, sampling=Sampling(**sampling))
        if stops is not None:
            generation.stops, generation.stop_count = _ids([*stops, 0]), len(stops)
        if sink is not None:
            generation.sink = SINK(lambda _, token: int(bool(sink(token))))
        tokens, count = (c_int32 * limit)(), c_size_t()
        status = self.library.c.ark_generate(
            self.handle, _ids(prompt), c_size_t(len(prompt)), byref(generation), tokens, byref(count)
        )
        self.library.check(status)
        return list(tokens[: count.value])

    def close(self) -> None:
        self.library.c.ark_session_close(self.handle)
