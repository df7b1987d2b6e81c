"""The mlc backend: drives a package's model library for this machine with the calls that MLC's engine makes.

The engine itself is MLC's and runs in an app; here TVM's runtime, which it is built on, is called directly. The library
for this machine is compiled from the same program as the app's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arkinfer.artifact import Artifact
from arkinfer.backends.base import Executor, Rows, State, truncated
from arkinfer.backends.payload import read_plan
from arkinfer.backends.tvm import aligned, load_ffi, thread_count
from arkinfer.errors import ArtifactError, UnsupportedError
from arkinfer.targets import probe

PLAN_FORMAT = 1  # of payload/plan.json
PAGE = 16  # positions of a page: the engine's default, and the only size that the kernels know
_CPU = 1  # DLPack's kDLCPU
_POOLED = 2  # the VM's pooled allocator
_COPIES = 4  # forks of a sequence that find room beside it


class MlcState(State):
    """A sequence in a paged cache, which its forks share."""

    def __init__(self, executor: MlcExecutor, cache: Any, numbers: itertools.count[int], capacity: int) -> None:
        self._executor, self.cache, self._numbers = executor, cache, numbers
        self.sequence = next(numbers)
        self.capacity, self.length = capacity, 0

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        length = truncated(self, length)
        if length < self.length:
            self._executor.call("vm.builtin.kv_state_popn", self.cache, self.sequence, self.length - length)
        self.length = length

    def fork(self) -> MlcState:
        """Return an independent copy, whose pages are the same until one of the two writes."""
        child = MlcState(self._executor, self.cache, self._numbers, self.capacity)
        call = self._executor.call
        if self.length:
            call("vm.builtin.kv_state_fork_sequence", self.cache, self.sequence, child.sequence, -1)
        else:
            call("vm.builtin.kv_state_add_sequence", self.cache, child.sequence)
        child.length = self.length
        return child

    def __del__(self) -> None:
        self._executor.forget(self.cache, self.sequence)


class MlcExecutor(Executor):
    """Runs one package. Not thread-safe: the Engine serialises its steps."""

    def __init__(self, artifact: Artifact, threads: int | None, attention: str | None) -> None:
        self.threads = thread_count(threads)
        plan = read_plan(artifact, PLAN_FORMAT)
        if probe.usable([plan["isa"]]) is None:
            raise UnsupportedError(
                "an MLC package runs in an app on a phone; its form for PCs does not run here either",
                facts={
                    "needs": plan["isa"],
                    "this machine": ", ".join(probe.isa_levels()) or "none that arkinfer knows",
                },
                code="ARK-E311",
            )
        if attention not in (None, "auto", "dense"):
            raise UnsupportedError(
                "MLC packages have dense attention alone",
                hint="build for android or iphone, whose artifacts have both gears",
                code="ARK-E213",
            )
        self.ffi = load_ffi(self.threads)
        self.plan, self.isa = plan, plan["isa"]
        self.vocab_size, self.max_context = int(plan["vocab_size"]), int(plan["max_context"])
        library = artifact.file(f"payload/check/{self.isa}.so")
        try:
            machine = self.ffi.load_module(str(library.resolve()))["vm_load_executable"]()
            machine["vm_initialization"](_CPU, 0, _POOLED)
            folder = artifact.file(f"payload/{plan['folder']}/tensor-cache.json").parent
            names = [item["name"] for item in json.loads(machine["_metadata"]())["params"]]
            self.call("vm.builtin.tensor_cache.load", str(folder.resolve()), _CPU, 0)
            self._parameters = self.call("vm.builtin.param_array_from_cache_by_name", names)
            self.call("vm.builtin.tensor_cache.clear")
        except Exception as error:  # tvm_ffi raises types of its own for any load failure
            raise ArtifactError(
                "the MLC package does not load",
                facts={"file": library.name, "reason": str(error).splitlines()[-1]},
                hint="build the artifact again with this version of apache-tvm",
                code="ARK-E510",
            ) from error
        self.machine = machine
        self._traced: dict[str, np.ndarray] = {}

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of TVM's runtime by its global name."""
        return self.ffi.get_global_func(name)(*arguments)

    def forget(self, cache: Any, sequence: int) -> None:
        """Give the pages of a sequence back."""
        if self.machine is not None:
            self.call("vm.builtin.kv_state_remove_sequence", cache, sequence)

    def new_cache(self, capacity: int, sequences: int) -> Any:
        """Return a paged cache for ``capacity`` tokens of all its ``sequences`` together."""
        chunk = self.plan["prefill_chunk_size"]
        numbers = [self.ffi.Shape([number]) for number in (sequences, capacity, chunk, PAGE, 0)]
        return self.machine["create_tir_paged_kv_cache"](*numbers)

    def new_state(self, capacity: int | None = None) -> MlcState:
        """Reserve a cache for ``capacity`` tokens (default: the artifact's context); forks have room beside it."""
        capacity = min(capacity or self.max_context, self.max_context)
        pages = -(-capacity // PAGE) + 1
        cache = self.new_cache((1 + _COPIES) * pages * PAGE, 1 + _COPIES)
        state = MlcState(self, cache, itertools.count(), capacity)
        self.call("vm.builtin.kv_state_add_sequence", cache, state.sequence)
        return state

    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return float32 logits (rows, vocab): the last row's, all, or none.

        As the engine does it: prompts by `prefill`, a token by `decode`. Where all rows are wanted, `batch_verify` has
        those of all tokens but the last.
        """
        assert isinstance(state, MlcState)
        ids, chunk = self.check(tokens, state), self.plan["prefill_chunk_size"]
        found = []
        pieces = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
        if logits == "all" and len(pieces[-1]) > 1:
            pieces[-1:] = [pieces[-1][:-1], pieces[-1][-1:]]
        for piece in pieces:
            name = "decode" if len(piece) == 1 else "batch_verify" if logits == "all" else "prefill"
            found.append(self.forward(name, piece, state.cache, [state.sequence], [len(piece)])[0])
            state.length += len(piece)
        if logits == "none":
            return np.empty((0, self.vocab_size), np.float32)
        rows = [np.from_dlpack(part).reshape(-1, self.vocab_size) for part in found]
        return np.concatenate(rows) if logits == "all" else rows[-1]

    def forward(
        self, name: str, ids: np.ndarray, cache: Any, sequences: Sequence[int], lengths: Sequence[int], *tree: Any
    ) -> Any:
        """Call one of the library's functions as MLC's engine does, and return its results, logits first.

        ids (n,) int32: the new tokens of all ``sequences``, ``lengths`` of each; ``tree``: the parents of drafted ones.
        """
        hidden, count = self.plan["hidden_size"], len(ids)
        tokens = aligned((count,), np.int32)
        tokens[:] = ids
        embeddings = self.machine["embed"](self.ffi.from_dlpack(tokens), self._parameters)
        shape = [count, 1, hidden] if name.endswith("decode") else [1, count, hidden]
        embeddings = self.call("vm.builtin.reshape", embeddings, self.ffi.Shape(shape))
        positions = aligned((len(lengths),), np.int32)
        positions[:] = np.cumsum(lengths) - 1
        given = [self.ffi.from_dlpack(positions)] if name == "batch_prefill" else []
        parents = [self.ffi.Shape(nodes) for nodes in tree]
        shapes = [self.ffi.Shape(list(sequences)), self.ffi.Shape(list(lengths)), *parents]
        self.call("vm.builtin.kv_state_begin_forward", cache, *shapes)
        result = self.machine[name](embeddings, *given, cache, self._parameters)
        self.call("vm.builtin.kv_state_end_forward", cache)
        return result

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return inner values of the last ``trace``: ``layer.N`` is (tokens, hidden) after layer N."""
        return {name: self._traced[name] for name in names}

    def trace(self, tokens: Sequence[int], state: State) -> Mapping[str, np.ndarray]:
        """Run ``tokens`` like ``step`` and keep the residual stream after every layer for ``tap``."""
        assert isinstance(state, MlcState)
        ids = self.check(tokens, state)
        result = self.forward("trace", ids, state.cache, [state.sequence], [len(ids)])
        state.length += len(ids)
        values = [np.from_dlpack(result[index]) for index in range(2, 2 + len(self.plan["taps"]))]
        self._traced = dict(zip(self.plan["taps"], values, strict=True))
        return self._traced

    def prefill_ops(self, tokens: int, depth: int) -> int:
        """Return the operations of the linear layers for ``tokens`` prompt tokens (attention excluded)."""
        return int(self.plan["ops_per_token"]) * tokens

    def close(self) -> None:
        """Drop the library and the parameters."""
        self.machine = None
        self._parameters = None


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> MlcExecutor:
    """Open the form of ``artifact``'s library for this machine.

    Raises UnsupportedError where that does not run or the runtime library is absent, and ArtifactError when the payload
    does not load.
    """
    return MlcExecutor(artifact, threads, attention)
