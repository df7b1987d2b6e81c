"""What a build would make, take and reach, from a checkpoint's config and headers alone."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from arkinfer import alternatives, estimate, exporters, structure, targets
from arkinfer.amounts import size
from arkinfer.artifact import staging
from arkinfer.artifact.tensors import ITEM_BYTES, TensorSpec
from arkinfer.backends.gears import NEVER, decode_bytes, threshold, visible
from arkinfer.backends.tvm import BLOCK
from arkinfer.checkpoint import Checkpoint, open_checkpoint
from arkinfer.config import ModelConfig
from arkinfer.effort import Effort, effort
from arkinfer.errors import UserError
from arkinfer.exporters import outline as cpu
from arkinfer.exporters.base import BuildOptions
from arkinfer.options import computed, fallback, resolve
from arkinfer.recipe import Recipe, Rounding, Rule, Storage, choose
from arkinfer.structure import Matrix, Structure
from arkinfer.targets import Target, probe

RUNTIME_BYTES = 150_000_000  # a rough allowance for Python, numpy, the tokenizer and the backend's library
PROMPT = 512  # tokens of the prompt whose speed is estimated, as `bench` measures it


@dataclass(frozen=True)
class _Stored:
    """A matrix as an outline sees it."""

    name: str
    format: str
    group: int
    shape: tuple[int, ...]
    wide: bool = False


@dataclass(frozen=True)
class Speed:
    """Estimated tokens/s at a context of ``depth`` tokens; None where a rate of the target is unknown."""

    depth: int
    prefill_tok_s: float | None
    decode_tok_s: float | None
    decode_bytes: int


@dataclass(frozen=True)
class Change:
    """One thing to change where the model does not fit: what it saves, and whether it fits then."""

    change: str
    command: str
    saves_bytes: int
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class Memory:
    """What the target must hold at the context, in bytes."""

    weights: int
    kv: int
    compressed: int
    workspace: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compressed + self.workspace + self.runtime


@dataclass(frozen=True)
class Plan:
    """The answer of `arkinfer plan`. Amounts are bytes, speeds tokens/s, times seconds.

    ``fits`` is None where the target states no memory and is no machine at hand. ``refused`` holds why the model cannot
    be built for the target, empty if it can. ``native`` counts operators with a kernel of their own, ``absorbed`` those
    that another's kernel computes; both are empty where this version has no exporter for the backend.
    """

    model: str
    family: str
    parameters: int
    target: str
    backend: str
    weights: str
    activations: str
    kv: str
    attention: str
    context: int
    max_context: int
    weight_bytes: Mapping[str, int]  # storage format -> bytes
    memory: Memory
    available: int | None
    available_source: str
    fits: bool | None
    largest_context: int | None
    refused: tuple[str, ...]
    operators: Mapping[str, int]
    native: Mapping[str, int]
    absorbed: Mapping[str, int]
    speeds: tuple[Speed, ...]
    rates: estimate.Rates
    factors: estimate.Factors
    build: Effort
    ladder: tuple[Change, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        values["build"]["seconds"] = self.build.total_seconds
        return values


def plan(
    model: str | Path,
    target: str | Path = "cpu",
    *,
    weights: str = "auto",
    activations: str = "auto",
    kv: str | None = None,
    attention: str = "auto",
    context: int | None = None,
    group: int | None = None,
    head: str | None = None,
    method: str | None = None,
    rules: Sequence[str | Rule] = (),
    revision: str | None = None,
    offline: bool = False,
    rates: estimate.Rates | None = None,
) -> Plan:
    """Say what ``build`` with the same arguments would make, without reading more than headers and a few probe rows.

    ``rates`` of the target are measured where its file leaves them open and this machine is such a device (within a
    second) unless they are given. Raises UserError for what ``build`` would refuse as bad input; what the target cannot
    run is no error here but listed in ``refused``.
    """
    description = targets.load(str(target))
    checkpoint = open_checkpoint(model, revision, offline, headers_only=True)
    options = resolve(checkpoint.config, description, kv, attention, context)
    structure.require(checkpoint.layouts(), structure.shapes(checkpoint.config))
    rounding = Rounding.of(description.defaults, group, head, method, rules)
    given = {
        "revision": revision,
        "target": None if str(target) == "cpu" else target,
        "weights": None if weights == "auto" else weights,
        "kv": kv,
        "attention": None if attention == "auto" else attention,
        "context": context,
        "group": group,
        "head": head,
        "method": method,
        "rule": [str(rule) for rule in rules],
    }
    fits = context is None and description.defaults.context == "fit"
    asked = _Asked(str(model), given, weights, activations, rounding, options, fits)
    draft = _Draft.make(checkpoint, description, asked)
    if rates is None:
        from arkinfer import rates as measuring

        rates = measuring.rates(description, draft.factors)
    return draft.plan(rates)


def fitted(options: BuildOptions, config: ModelConfig, recipe: Recipe, target: Target) -> BuildOptions:
    """Return ``options`` with the largest context that ``target`` has memory for; unchanged where none is."""
    if target.memory is None:
        return options
    largest = _Sizes(config, recipe, target).largest(options.kv, target.memory)
    return replace(options, context=largest or options.context)


def outlook(
    checkpoint: Checkpoint, recipe: Recipe, target: Target, options: BuildOptions, out: Path
) -> tuple[str, list[str]]:
    """Return what a build into ``out`` is going to take, in one line, and warnings where that is too much.

    Raises UserError if the disk has no room for the artifact.
    """
    sizes = _Sizes(checkpoint.config, recipe, target)
    memory = sizes.memory(options.kv, options.context)
    unmeasured = estimate.Rates(None, None, None, "not measured")
    work = effort(checkpoint, sizes.stored, memory.weights, sizes.work(), target, unmeasured, recipe.method)
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if place == out.absolute().parent:
        free += staging.reclaimable(out.absolute())
    if work.disk_bytes > free:
        raise UserError(
            "the disk has no room for the artifact",
            facts={"needed": f"{work.disk_bytes:,} bytes", "free": f"{free:,} bytes in {place}"},
            hint="-o names another place; arkinfer plan tells what other --weights would need",
            code="ARK-E146",
        )
    warnings = []
    available, source = _available(target)
    if available is not None and memory.total > available:
        warnings.append(
            f"the artifact will not fit the target: it needs {size(memory.total)} at {options.context:,} tokens, and "
            f"{size(available)} are there ({source}); arkinfer plan, with the same options, tells what helps"
        )
    here = probe.machine().available
    if work.host_bytes > here:
        warnings.append(f"the build needs about {size(work.host_bytes)} of memory, and {size(here)} are free here")
    line = (
        f"{checkpoint.name} as {recipe.weights}: writes {size(work.disk_bytes)}, takes about "
        f"{size(work.host_bytes)} of memory here; runs in {size(memory.total)} at {options.context:,} tokens"
    )
    return line, warnings


@dataclass(frozen=True)
class _Asked:
    """What the user asked for; ``given`` holds the words of it, to be repeated in commands."""

    model: str
    given: Mapping[str, Any]
    weights: str
    activations: str
    rounding: Rounding
    options: BuildOptions
    fits: bool  # whether the context is what the target has memory for

    def command(self, **changes: Any) -> str:
        words = ["arkinfer", "build", self.model]
        for name, value in {**self.given, **changes}.items():
            for item in value if isinstance(value, list) else [value] if value is not None else []:
                words += [f"--{name}", str(item)]
        return shlex.join(words)


class _Sizes:
    """The byte arithmetic of one recipe."""

    def __init__(self, config: ModelConfig, recipe: Recipe, target: Target) -> None:
        self.config, self.recipe = config, recipe
        self.structure = Structure(config, recipe)
        self.outline = exporters.outline_of(target.backend)
        self.stored = {matrix: self.structure.storage(matrix) for matrix in self.structure.matrices}
        self.sizes = {matrix: self._matrix(matrix, how) for matrix, how in self.stored.items()}
        self.vectors = 4 * sum(self.structure.vectors)
        self.orders = 4 * self.structure.orders()

    def _matrix(self, matrix: Matrix, how: Storage) -> int:
        weight = _Stored(matrix.name, how.format, how.group, matrix.shape)
        if self.outline is not None:
            return sum(
                spec.nbytes for spec in self.outline.parameters(weight, how.dtype, how.zeros, matrix.gated).values()
            )
        return canonical_bytes(how, matrix.shape)

    def matrices(self) -> list[_Stored]:
        """Return the linear weights as an exporter's refusals look at them."""
        return [
            _Stored(matrix.name, how.format, how.group, matrix.shape, how.format == "dense" and how.dtype == "F32")
            for matrix in self.structure.linears()
            for how in [self.stored[matrix]]
        ]

    def by_format(self) -> dict[str, int]:
        """Return the bytes of weights by storage format; norms and biases are float32."""
        found: dict[str, int] = {}
        for matrix, how in self.stored.items():
            name = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(how.dtype, how.dtype)
            name = name if how.format == "dense" else how.format
            found[name] = found.get(name, 0) + self.sizes[matrix]
        found["fp32"] = found.get("fp32", 0) + self.vectors
        return {**found, "order": self.orders} if self.orders else found

    def caches(self, kv: str, context: int) -> tuple[int, int]:
        """Return the bytes of keys and values, and those of compressed keys, at ``context`` tokens."""
        capacity = -(-context // BLOCK) * BLOCK
        sizes = (self.outline or cpu.CpuOutline()).caches(self.config, kv, capacity)
        compressed = sizes.get("fine", 0) + sizes.get("coarse", 0)
        return sum(sizes.values()) - compressed, compressed

    def memory(self, kv: str, context: int) -> Memory:
        keys, compressed = self.caches(kv, context)
        weights = sum(self.sizes.values()) + self.vectors + self.orders
        workspace = (self.outline or cpu.CpuOutline()).workspace(self.structure, context)
        return Memory(weights, keys, compressed, workspace, RUNTIME_BYTES)

    def largest(self, kv: str, available: int) -> int:
        """Return the largest context whose memory is ``available``; 0 if none is."""
        low, high = 0, self.config.max_context
        if self.memory(kv, high).total <= available:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(kv, middle).total <= available else (low, middle)
        return low // BLOCK * BLOCK

    def work(self) -> estimate.Work:
        """Return the operations of one token."""
        count = {matrix: 2 * matrix.shape[0] * matrix.shape[1] * matrix.reads for matrix in self.structure.matrices}
        head = sum(ops for matrix, ops in count.items() if matrix.table)
        whole = self.recipe.activations == "int8"
        return estimate.Work(sum(count.values()) - head, head, whole)

    def linear_bytes(self) -> int:
        """Return the bytes of the matrices and biases that a decode step reads."""
        matrices = sum(self.sizes[matrix] * matrix.reads for matrix in self.structure.matrices)
        return matrices + 4 * sum(self.structure.biases) + self.orders


def canonical_bytes(how: Storage, shape: Sequence[int]) -> int:
    """Return the bytes of a matrix in the canonical form of arkinfer.quant.packed, its order apart."""
    rows, width = shape
    if how.format == "dense":
        return TensorSpec(how.dtype, (rows, width)).nbytes
    per_byte = {"int8": 1, "int4": 2, "int2": 4, "ternary": 4}[how.format]
    groups = width // (how.group or width)
    return rows * (-(-width // per_byte) + groups * (ITEM_BYTES[how.dtype] + how.zeros)) + (
        4 * width if how.order else 0
    )


def _available(target: Target) -> tuple[int | None, str]:
    """Return the memory that the target offers, and where that is known from."""
    if target.memory is not None:
        return target.memory, "the target's file"
    if probe.level_for(target) is not None:
        return probe.machine().available, "free on this machine now"
    return None, "unknown: the target's file states no memory"


class _Draft:
    """One recipe worked out, before speeds are known."""

    def __init__(self, checkpoint: Checkpoint, target: Target, asked: _Asked, recipe: Recipe) -> None:
        self.checkpoint, self.target, self.asked, self.recipe = checkpoint, target, asked, recipe
        self.sizes = _Sizes(checkpoint.config, recipe, target)
        self.factors = estimate.factors(target.backend)

    @classmethod
    def make(cls, checkpoint: Checkpoint, target: Target, asked: _Asked) -> _Draft:
        config = checkpoint.config
        recipe = choose(
            asked.weights, fallback(target), structure.body(config), structure.shapes(config), checkpoint,
            computed(target, asked.activations), asked.rounding,
        )  # fmt: skip
        if asked.fits:
            asked = replace(asked, options=fitted(asked.options, config, recipe, target))
        return cls(checkpoint, target, asked, recipe)

    def refused(self) -> list[str]:
        """Return why a build would be refused."""
        if self.sizes.outline is None:
            return [f"this version of arkinfer has no exporter for the backend {self.target.backend!r}"]
        return self.sizes.outline.reasons(
            self.checkpoint.config, self.sizes.matrices(), self.target, self.asked.options
        )

    def plan(self, rates: estimate.Rates) -> Plan:
        checkpoint, config, options, sizes = self.checkpoint, self.checkpoint.config, self.asked.options, self.sizes
        memory = sizes.memory(options.kv, options.context)
        available, source = _available(self.target)
        fits = None if available is None else memory.total <= available
        operators = sizes.structure.operators()
        native = sizes.outline.native(operators) if sizes.outline is not None else {}
        absorbed = {name: count for name, count in operators.items() if name not in native} if native else {}
        return Plan(
            model=checkpoint.name,
            family=config.family,
            parameters=checkpoint.parameters,
            target=self.target.name,
            backend=self.target.backend,
            weights=self.recipe.weights,
            activations=self.recipe.activations,
            kv=options.kv,
            attention=options.attention,
            context=options.context,
            max_context=config.max_context,
            weight_bytes=sizes.by_format(),
            memory=memory,
            available=available,
            available_source=source,
            fits=fits,
            largest_context=None if available is None else sizes.largest(options.kv, available),
            refused=tuple(self.refused()),
            operators=operators,
            native=native,
            absorbed=absorbed,
            speeds=tuple(self._speed(depth, rates) for depth in self._depths()),
            rates=rates,
            factors=self.factors,
            build=effort(
                checkpoint, sizes.stored, memory.weights, sizes.work(), self.target, rates, self.sizes.recipe.method
            ),
            ladder=() if fits is not False or available is None else tuple(self._ladder(memory.total, available)),
            notes=(*config.notes, *self._notes(), *self._alternatives()),
        )

    def _whole(self) -> bool:
        """Tell whether every step reads the caches to their end, which choosing blocks is meant to spare."""
        chosen = self.checkpoint.config.sparse is not None and self.asked.options.attention != "dense"
        return chosen and self.target.backend in exporters.WHOLE_CONTEXT

    def _notes(self) -> list[str]:
        if self._whole():
            whole = [
                f"every token reads the caches of all {self.asked.options.context:,} tokens, whatever is in them or "
                "chosen: --context as small as will do"
            ]
        else:
            whole = []
        floats = any(how.format != "ternary" for how in self.sizes.stored.values())
        if (
            self.checkpoint.headers_only
            and floats
            and not any(layout.quantised for layout in self.checkpoint.layouts().values())
        ):
            unknown = "the weights were not fetched, so whether they are ternary is unknown"
            return [*whole, f"{unknown}: --weights ternary plans for that"]
        return whole

    def _alternatives(self) -> list[str]:
        def look(other: Target) -> tuple[int, Sequence[str]]:
            sizes = _Sizes(self.checkpoint.config, self.recipe, other)
            config, options = self.checkpoint.config, self.asked.options
            refused = sizes.outline.reasons(config, sizes.matrices(), other, options) if sizes.outline else ()
            return sizes.linear_bytes(), refused

        return alternatives.sentences(self.target, look, self.sizes.by_format())

    def _depths(self) -> list[int]:
        context = self.asked.options.context
        return sorted({depth for depth in (0, 8192, 32768, context - PROMPT) if 0 <= depth <= context - PROMPT} or {0})

    def _speed(self, depth: int, rates: estimate.Rates) -> Speed:
        config, options = self.checkpoint.config, self.asked.options
        sparse = cpu.gear(config.sparse)
        gear = threshold(sparse, options.attention)
        weights = self.sizes.linear_bytes()
        entry = cpu.traffic(config, options.kv, weights)
        nbytes = decode_bytes(entry, sparse, gear, depth)
        middle = depth + PROMPT // 2  # where the prompt's average token lies
        keys = visible(sparse, gear, middle)
        if self._whole():
            nbytes, keys = decode_bytes(entry, None, NEVER, options.context - 1), options.context
        compressed = 0.0
        if config.sparse is not None and middle + 1 >= gear:
            compressed = middle / config.sparse.kernel_stride
        attention = estimate.attention_ops(config, keys, compressed)
        work = self.sizes.work()
        return Speed(
            depth,
            estimate.prefill(work, min(PROMPT, options.context), attention, config, rates, self.factors),
            estimate.decode(work, weights, nbytes - weights, config, rates, self.factors),
            nbytes,
        )

    def _ladder(self, total: int, available: int) -> list[Change]:
        """Return changes, the least harmful first, each alone and then all of them together."""
        options, steps = self.asked.options, []
        drafts: list[tuple[str, dict[str, Any], _Draft]] = []
        if options.kv != "int8":
            drafts.append(
                ("int8 caches", {"kv": "int8"}, self._with(replace(self.asked, options=replace(options, kv="int8"))))
            )
        for weights in ("int8", "int4"):
            if self.recipe.weights in ("ternary", weights, "int4"):
                continue
            try:
                other = self._with(replace(self.asked, weights=weights))
            except UserError:  # the checkpoint is quantised already
                continue
            drafts.append((f"{weights} weights", {"weights": weights}, other))
        if len(drafts) > 1:
            changes = {**drafts[-1][1], **drafts[0][1]}
            both = replace(drafts[-1][2].asked, options=drafts[0][2].asked.options)
            drafts.append((f"{drafts[-1][0]} and {drafts[0][0]}", changes, self._with(both)))
        for name, changes, draft in drafts:
            memory = draft.sizes.memory(draft.asked.options.kv, options.context)
            if memory.total < total:
                command = self.asked.command(**changes)
                steps.append(Change(name, command, total - memory.total, memory.total, memory.total <= available))
        for name, changes, draft in [("", {}, self), *drafts]:
            kv = draft.asked.options.kv
            largest = draft.sizes.largest(kv, available)
            if 0 < largest < options.context:
                memory = draft.sizes.memory(kv, largest)
                what = f"a context of {largest:,} tokens" + (f" with {name}" if name else "")
                command = self.asked.command(**{**changes, "context": largest})
                steps.append(Change(what, command, total - memory.total, memory.total, memory.total <= available))
        return steps

    def _with(self, asked: _Asked) -> _Draft:
        return _Draft.make(self.checkpoint, self.target, asked)
