"""An Executor that drives the runner of an artifact, in a process of its own: natively, or under an emulator.

The other end is backends/native/arkrun_serve.c, which says what goes over the pipes.
"""

from __future__ import annotations

import contextlib
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from arkinfer.artifact import Artifact
from arkinfer.backends.base import Executor, Rows, State, truncated
from arkinfer.errors import ArkError, ArtifactError, InternalError, UnsupportedError

INTERFACE = 1  # ARK_INTERFACE
COMMAND = "payload/native/arkrun"
_OPEN, _CLOSE, _STEP, _TRUNCATE, _FORK = range(1, 6)
_ROWS: Mapping[Rows, int] = {"none": 0, "last": 1, "all": 2}
_ABSENT, _DAMAGED, _NEWER, _UNSUPPORTED = 2, 3, 4, 5  # of enum ark_status


class RunnerState(State):
    """A session in the runner's process."""

    def __init__(self, executor: RunnerExecutor, facts: bytes) -> None:
        self.executor = executor
        self.session, self.capacity, self.length = struct.unpack("=3q", facts)

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""
        length = truncated(self, length)
        self.executor.request(_TRUNCATE, self.session, length)
        self.length = length

    def fork(self) -> RunnerState:
        """Return an independent copy."""
        return RunnerState(self.executor, self.executor.request(_FORK, self.session))

    def __del__(self) -> None:
        self.executor.dropped.append(self.session)


class RunnerExecutor(Executor):
    """Runs one artifact in ``arkrun --serve``. Not thread-safe.

    ``emulator`` is what goes before the command: ["qemu-aarch64", "-L", FOLDER]; ``runner`` is another file for the
    command than the artifact's own. Raises what the runner refuses as
    ArtifactError, UnsupportedError or InternalError with its words.
    """

    def __init__(
        self,
        artifact: Artifact,
        emulator: Sequence[str] = (),
        threads: int | None = None,
        attention: str | None = None,
        runner: Path | None = None,
    ) -> None:
        command = [*emulator, str(runner or artifact.file(COMMAND)), str(artifact.path), "--serve"]
        command += [] if threads is None else ["--threads", str(threads)]
        command += [] if attention is None else ["--attention", attention]
        self.dropped: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise UnsupportedError(
                "the artifact's runner does not start",
                facts={"command": command[0], "reason": error.strerror},
                hint="build for this machine's target, or install an emulator for the artifact's",
                code="ARK-E316",
            ) from error
        try:
            facts = self._reply()
            interface, self.vocab_size, self.max_context, self.threads = struct.unpack_from("=4q", facts)
            self.isa = facts[32:].decode("ascii")
            if interface != INTERFACE:
                raise ArtifactError(
                    "the artifact's runner speaks another version of the interface",
                    facts={"runner": interface, "this arkinfer": INTERFACE},
                    hint="build the artifact again",
                    code="ARK-E513",
                )
        except ArkError:
            self.close()
            raise

    def new_state(self, capacity: int | None = None) -> RunnerState:
        """Open a session for ``capacity`` tokens."""
        return RunnerState(self, self.request(_OPEN, 0, min(capacity or self.max_context, self.max_context)))

    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return float32 logits (rows, vocab): the last row's, all, or none."""
        assert isinstance(state, RunnerState)
        ids = self.check(tokens, state)
        data = self.request(_STEP, state.session, len(ids), _ROWS[logits], ids.tobytes())
        state.length += len(ids)
        return np.frombuffer(data, np.float32).reshape(-1, self.vocab_size)

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Refuse: the runner shows no inner values."""
        raise UnsupportedError("the runner shows no inner values", code="ARK-E320")

    def request(self, what: int, session: int, a: int = 0, b: int = 0, payload: bytes = b"") -> bytes:
        """Send one request and return the reply's bytes."""
        while what != _CLOSE and self.dropped:
            self.request(_CLOSE, self.dropped.pop())
        if self._process is None:
            raise InternalError("the runner is closed", code="ARK-E713")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(struct.pack("=4q", what, session, a, b) + payload)
            self._process.stdin.flush()
        except BrokenPipeError:  # the reply, or its absence, says why
            pass
        return self._reply()

    def _reply(self) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        head = self._process.stdout.read(16)
        status, size = struct.unpack("=2q", head) if len(head) == 16 else (0, -1)
        data = self._process.stdout.read(size) if size >= 0 else b""
        if len(data) != size:
            raise InternalError(
                "the runner ended without an answer",
                facts={"exit status": self._process.wait()},
                hint="run the command of payload/native in the artifact to see why",
                code="ARK-E713",
            )
        if status == 0:
            return data
        text = data.decode("utf-8", errors="replace")
        if status in (_ABSENT, _DAMAGED, _NEWER):
            raise ArtifactError(text, code="ARK-E513")
        if status == _UNSUPPORTED:
            raise UnsupportedError(text, code="ARK-E316")
        raise InternalError(text, facts={"status": status}, code="ARK-E713")

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()
