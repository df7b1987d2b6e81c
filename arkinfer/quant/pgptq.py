"""P-GPTQ: round a weight column by column, and let the columns that are still floats make up for each error.

GPTQ (Frantar et al. 2023, algorithm 1) minimises the error of a matrix's output on calibration text, whose inputs X
enter through H = 2 X X^T. In the variant of the MiniCPM4 report (arXiv 2506.07900, on CPM.cu) the first positions of
each text are left out of H: they hold a few huge activations that would outweigh all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import torch
from torch import nn

from arkinfer.artifact import tensors
from arkinfer.checkpoint import Checkpoint
from arkinfer.checkpoint.stored import Layout, Parts, StoredWeight, read_rows
from arkinfer.effort import BATCH, TOKENS, rounding_memory
from arkinfer.errors import UnsupportedError, UserError
from arkinfer.graph import Weight
from arkinfer.layerwise import Layerwise, workers
from arkinfer.models.decoder import Layer, Linear
from arkinfer.parity import whole_texts
from arkinfer.quant import integer
from arkinfer.quant.packed import DTYPES, Packed, dequantise, group_extent, pack_nibbles, read
from arkinfer.recipe import HEADS, Recipe, Storage
from arkinfer.targets import probe
from arkinfer.weights import CheckpointWeights

CALIBRATION = Path(__file__).resolve().parent.parent / "calibration"
SKIPPED = 4  # positions at the start of each window that do not enter the Hessian
DAMPING = (0.01, 0.1, 1.0)  # parts of the mean diagonal added to the Hessian; the others where the first is too little
COLUMNS = 128  # rounded before the columns behind them are corrected, all at once
ROWS = 256  # of a weight rounded together in one thread
SLICE = 512  # columns of a Hessian computed together in one thread

Progress = Callable[[str, int, int], None]


class RoundedCheckpoint(Checkpoint):
    """A checkpoint some of whose weights are replaced by rounded ones, which lie in a scratch folder."""

    def __init__(self, original: Checkpoint, rounded: Mapping[str, StoredWeight]) -> None:
        self.path, self.raw_config, self.config = original.path, original.raw_config, original.config
        self.weights = {**original.weights, **rounded}
        self._original = original

    def asset(self, name: str) -> bytes | None:
        return self._original.asset(name)


class _Rounded(StoredWeight):
    """A rounded weight in a scratch file."""

    def __init__(self, file: Path, layout: Layout) -> None:
        self.layout = layout
        entries = tensors.read_header(file)
        self._weight, self._scales = entries["weight"], entries["scales"]

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + self._scales.nbytes

    def rows(self, start: int, stop: int) -> Parts:
        return Parts(read_rows(self._weight, start, stop), read_rows(self._scales, start, stop))


class _Reached(Exception):
    """Ends a layer's computation where its input to a linear is known."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


def quantise(
    checkpoint: Checkpoint,
    recipe: Recipe,
    encode: Callable[[str], Sequence[int]],
    scratch: Callable[[str], Path],
    progress: Progress,
) -> Checkpoint:
    """Round the layers' matrices that ``recipe`` makes integers of floats, and return a checkpoint that holds them.

    The calibration text is the package's own, cut into tokens by ``encode``. Layer by layer, every input is computed
    from weights that are rounded already. Results go to files that ``scratch`` names. The same arguments give the same
    bytes on any number of threads of one kind of processor. Raises UnsupportedError where memory does not suffice (see
    `rounding_memory`), and UserError for a model whose context is too short.
    """
    config = checkpoint.config
    texts = whole_texts(encode, config.vocab_size, CALIBRATION, config.max_context, TOKENS)
    windows = [window for found in texts.values() for window in found if len(window) > SKIPPED]
    if not windows:
        raise UserError(
            f"P-GPTQ needs windows of more than {SKIPPED} tokens, and the model holds {config.max_context}",
            hint="--method search",
            code="ARK-E143",
        )
    _require_memory(rounding_memory(config, sum(map(len, windows)), max(map(len, windows))))
    source = CheckpointWeights(checkpoint)

    def wanted(name: str) -> Storage | None:
        """Return how a matrix of a layer is to be rounded, or None if it is not."""
        storage = recipe.stored(name)
        return None if recipe.layouts[name].quantised or storage.format not in HEADS else storage

    def fetch(name: str) -> Packed:
        stored = checkpoint.weight(name)
        layer = name.startswith("model.layers.")
        if len(stored.layout.shape) == 1 or (layer and wanted(name) is not None):
            found = read(stored, 0, stored.layout.shape[0])
            if not bool(torch.isfinite(found.weight).all()):
                raise UserError(
                    f"{name} holds values that are not finite numbers",
                    hint="fetch the file again: its weights are damaged",
                    code="ARK-E128",
                )
            return found
        storage = recipe.stored(name, table=not layer)
        fields = {**vars(storage), "dtype": DTYPES[storage.dtype]}
        return source.packed(Weight(name, (name,), stored.layout.shape, **fields))

    run = Layerwise(config, fetch)
    rounded: dict[str, StoredWeight] = {}
    hidden = run.embed(windows)
    with workers() as pool:
        for index, (layer_name, layer) in enumerate(run.layers()):
            progress("P-GPTQ", index, config.layers)
            for stage in _stages(run, layer, hidden[0]):
                jobs = {name: s for name in stage if (s := wanted(f"{layer_name}.{name}.weight")) is not None}
                if not jobs:
                    continue
                factor = inverse_factor(pool, hessian(pool, _inputs(pool, run, layer, stage[0], hidden)))
                for name, storage in jobs.items():
                    linear = layer.get_submodule(name)
                    assert isinstance(linear, Linear)
                    packed = round_weight(pool, linear.weight, factor, storage)
                    full = f"{layer_name}.{name}.weight"
                    rounded[full] = _keep(scratch(f"{full}.safetensors"), packed)
                    linear.pack(Packed("dense", 0, packed.shape, dequantise(packed)))
                del factor
            hidden = list(pool.map(partial(run.forward, layer), hidden))
    progress("P-GPTQ", config.layers, config.layers)
    return RoundedCheckpoint(checkpoint, rounded)


def _require_memory(need: int) -> None:
    available = probe.machine().available
    if 0 < available < need:
        raise UnsupportedError(
            "P-GPTQ needs more memory than this machine has to spare",
            facts={"needed": f"{need / 1e9:.1f} GB", "available": f"{available / 1e9:.1f} GB"},
            hint="--method search rounds each weight by itself, in little memory",
            code="ARK-E315",
        )


def _stages(run: Layerwise, layer: Layer, hidden: torch.Tensor) -> list[list[str]]:
    """Return the names of the layer's linears, those that read the same input together, in order of execution."""
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def note(name: str, arguments: tuple[torch.Tensor, ...]) -> None:
        if seen and seen[-1][0] is arguments[0]:
            seen[-1][1].append(name)
        else:
            seen.append((arguments[0], [name]))

    hooks = [
        part.register_forward_pre_hook(lambda _, arguments, name=name: note(name, arguments))
        for name, part in layer.named_modules()
        if isinstance(part, Linear)
    ]
    run.forward(layer, hidden[: SKIPPED + 1])
    for hook in hooks:
        hook.remove()
    return [names for _, names in seen]


def _inputs(
    pool: Executor, run: Layerwise, layer: Layer, name: str, hidden: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield the input (tokens, K) of the linear ``name`` for each window; what comes after it is not computed."""

    def stop(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        raise _Reached(arguments[0])

    def reach(states: torch.Tensor) -> torch.Tensor:
        try:
            run.forward(layer, states)
        except _Reached as reached:
            return reached.value
        raise AssertionError(f"{name} is not reached")

    hook = layer.get_submodule(name).register_forward_pre_hook(stop)
    try:
        for start in range(0, len(hidden), BATCH):
            yield from pool.map(reach, hidden[start : start + BATCH])
    finally:
        hook.remove()


def hessian(pool: Executor, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return H = 2 X X^T (K, K) of the windows' ``inputs`` (tokens, K), the first SKIPPED rows of each left out.

    Rows and columns are in reversed order, and only the lower triangle is filled: what `inverse_factor` works from.
    """
    total: torch.Tensor | None = None
    for value in inputs:
        x = value[SKIPPED:].flip(1)
        if total is None:
            total = torch.zeros(x.shape[1], x.shape[1])

        def add(start: int, x: torch.Tensor = x, total: torch.Tensor = total) -> None:
            part = x[:, start : start + SLICE]
            total[start:, start : start + SLICE].addmm_(x[:, start:].T, part, alpha=2)

        list(pool.map(add, range(0, len(total), SLICE)))
    assert total is not None
    return total


def inverse_factor(pool: Executor, reversed_hessian: torch.Tensor) -> torch.Tensor:
    """Return upper triangular U (K, K) with U^T U = H^-1, of what `hessian` returns; that is overwritten.

    With rows and columns reversed, H = L L^T, and the inverse of L reversed again is U: one factorisation and one
    triangular inverse, a third of the work of inverting H first. Both go block by block, L in the place of H, so that
    no third matrix of this size is needed. Raises UserError for inputs that are not finite numbers.
    """
    width = len(reversed_hessian)
    mean = float(reversed_hessian.diagonal().double().mean()) or 1.0
    if not math.isfinite(mean):
        raise UserError(
            "the inputs of a matrix on the calibration text are not finite numbers",
            hint="--method search, and look for damaged weights",
            code="ARK-E145",
        )
    lower = reversed_hessian
    lower.diagonal().add_(DAMPING[0] * mean)
    for start in range(0, width, SLICE):
        stop = min(start + SLICE, width)
        corner = _cholesky(lower[start:stop, start:stop], mean)

        def below(row: int, columns: slice = slice(start, stop), corner: torch.Tensor = corner) -> None:
            part = lower[row : row + SLICE, columns]
            part.copy_(torch.linalg.solve_triangular(corner.T, part, upper=True, left=False))

        def update(column: int, columns: slice = slice(start, stop)) -> None:
            part = lower[column : column + SLICE, columns]
            lower[column:, column : column + SLICE].addmm_(lower[column:, columns], part.T, alpha=-1)

        list(pool.map(below, range(stop, width, SLICE)))
        list(pool.map(update, range(stop, width, SLICE)))
    factor = torch.zeros(width, width)

    def invert(start: int) -> None:
        stop = min(start + SLICE, width)
        columns = torch.empty(width - start, stop - start)  # of the inverse of L, from its diagonal down
        for row in range(start, width, SLICE):
            end = min(row + SLICE, width)
            right = torch.eye(stop - start)
            if row > start:
                right = -(lower[row:end, start:row] @ columns[: row - start])
            solved = torch.linalg.solve_triangular(lower[row:end, row:end], right, upper=False)
            columns[row - start : end - start] = solved
        factor[: width - start, width - stop : width - start] = columns.flip(0, 1)

    list(pool.map(invert, range(0, width, SLICE)))
    return factor


def _cholesky(block: torch.Tensor, mean: float) -> torch.Tensor:
    """Put the lower Cholesky factor of ``block`` in its place and return it.

    Where rounding has made the block indefinite, its diagonal takes more of the Hessian's ``mean`` diagonal.
    """
    for damping in (0.0, *DAMPING):
        block.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(block)
        if not int(failed):
            return block.copy_(factor)
    raise UserError(
        "the inputs of a matrix on the calibration text are too far apart for float32",
        hint="--method search",
        code="ARK-E145",
    )


def round_weight(pool: Executor, weight: torch.Tensor, factor: torch.Tensor, storage: Storage) -> Packed:
    """Round ``weight`` (N, K) as ``storage`` says, with ``factor`` (K, K) from `inverse_factor`."""
    rows, width = weight.shape
    bits = 8 if storage.format == "int8" else 4

    def some(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        columns = weight[start : start + ROWS].float().T.contiguous()
        return _round_columns(columns, factor, bits, group_extent(storage.group, width))

    pieces = list(pool.map(some, range(0, rows, ROWS)))
    codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Packed(storage.format, storage.group, (rows, width), codes if bits == 8 else pack_nibbles(codes), scales)


def _round_columns(
    columns: torch.Tensor, factor: torch.Tensor, bits: int, extent: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (n, K) and float16 scales (n, G) of ``columns`` (K, n), a transposed weight that is overwritten.

    Each group's scale is searched when its first column's turn comes, on weights that make up for all errors before.
    """
    width, rows = columns.shape
    block = extent * max(1, COLUMNS // extent) if extent <= COLUMNS else COLUMNS
    codes = torch.empty(width, rows, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(width // extent, rows)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.empty(stop - start, rows)
        for column in range(start, stop):
            if column % extent == 0:
                values = columns[column : column + extent].T.contiguous()
                scale = integer.search_scale(values, bits, torch.empty_like(values)).squeeze(1)
                divisor = torch.where(scale == 0, 1.0, scale)
                scales[column // extent] = scale
            code = integer.round_codes(columns[column] / divisor, bits)
            codes[column] = code if bits == 8 else code + 8
            error = (columns[column] - code * scale) / factor[column, column]
            columns[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous(), scales.T.contiguous().half()


def _keep(file: Path, packed: Packed) -> StoredWeight:
    """Write a rounded weight to ``file`` and return it."""
    assert packed.scales is not None
    arrays = {"weight": packed.weight.numpy(), "scales": packed.scales.numpy()}
    kind = "I8" if packed.format == "int8" else "U8"
    specs = {
        "weight": tensors.TensorSpec(kind, packed.weight.shape),
        "scales": tensors.TensorSpec("F16", packed.scales.shape),
    }
    tensors.write(file, specs, ((name, [array]) for name, array in arrays.items()))
    return _Rounded(file, Layout(packed.format, packed.shape, "F16", packed.group))
