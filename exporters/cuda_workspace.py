"""The bytes of a plan's workspace from shapes alone: the values of a prompt's step, in the places that they will have.

It follows exporters/cuda_lowering.py launch by launch, without the graph; a test compares the two for every family.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arkinfer.artifact.plan import ALIGNMENT, CONTROL_SIZE, whole_blocks
from arkinfer.config import ModelConfig
from arkinfer.exporters import arena, cuda_outline
from arkinfer.structure import Structure

TOKENS, ROWS = 512, 64  # of the largest schedule, whose values take the most


def nbytes(structure: Structure, context: int) -> int:
    """Return the bytes of the arena, of control, inputs and outputs, for ``context`` tokens."""
    config, capacity = structure.config, whole_blocks(context)
    tables = 2 * capacity * (config.head_dim // 2)  # of rotation
    logits = ROWS * config.vocab_size
    return _arena(structure, capacity) + 4 * (CONTROL_SIZE + TOKENS + ROWS + tables + capacity + logits + 1)


@dataclass
class _Launches:
    """How long values live: the first and the last launch that names each."""

    sizes: dict[str, int] = field(default_factory=dict)
    lives: dict[str, tuple[int, int]] = field(default_factory=dict)
    count: int = 0

    def add(self, *names: str, **made: int) -> None:
        """Note a launch that reads ``names`` and makes values of so many bytes."""
        self.sizes |= made
        for name in (*names, *made):
            self.lives[name] = (self.lives.get(name, (self.count, 0))[0], self.count)
        self.count += 1

    def end(self) -> int:
        values = [arena.Lifetime(size, *self.lives[name]) for name, size in self.sizes.items()]
        return arena.place(values, ALIGNMENT)[1]


def _arena(structure: Structure, capacity: int) -> int:
    config, launches = structure.config, _Launches()
    half, hidden, inner = 2 * TOKENS, config.hidden_size, config.intermediate_size  # half: bytes of a float16 column
    by_source = {source: matrix for matrix in structure.matrices for source in matrix.sources}
    launches.add(stream=2 * half * hidden)
    launches.add("stream", first=half * hidden)
    normed = "first"
    for layer in range(config.layers):
        stem = f"model.layers.{layer}"
        columns = (config.heads + 2 * config.kv_heads) * config.head_dim
        for _ in {by_source[f"{stem}.self_attn.{name}_proj.weight"] for name in "qkv"}:
            launches.add(normed, **{f"qkv{layer}": half * columns})
        _attention(launches, config, capacity, layer)
        launches.add(f"mixed{layer}", **{f"branch{layer}": 2 * half * hidden})
        launches.add("stream", f"branch{layer}", **{f"between{layer}": half * hidden})
        gates = {by_source[f"{stem}.mlp.{name}_proj.weight"] for name in ("gate", "up")}
        if any(matrix.gated for matrix in gates):
            launches.add(f"between{layer}", **{f"gate{layer}": half * inner})
        else:
            for _ in gates:
                launches.add(f"between{layer}", **{f"both{layer}": 2 * half * inner})
            launches.add(f"both{layer}", **{f"gate{layer}": half * inner})
        launches.add(f"gate{layer}", **{f"down{layer}": 2 * half * hidden})
        normed = f"normed{layer}"
        launches.add("stream", f"down{layer}", **{normed: half * hidden})
    # The head may run again and again: what it reads lives to the end.
    launches.add(normed, rows=2 * ROWS * hidden)
    launches.add(normed, "rows")
    return launches.end()


def _attention(launches: _Launches, config: ModelConfig, capacity: int, layer: int) -> None:
    half, sparse = 2 * TOKENS, cuda_outline.selects(config)
    query = half * config.heads * config.head_dim
    q, mixed = f"q{layer}", f"mixed{layer}"
    if sparse is None:
        launches.add(f"qkv{layer}", **{q: query})
        launches.add(q, **{mixed: query})
        return
    own = f"nope{layer}" if sparse.use_nope else q
    launches.add(f"qkv{layer}", **{q: query, own: query})
    launches.add()  # compressed keys go into caches
    held = -(-capacity // sparse.block_size)
    rows = 4 * TOKENS * config.kv_heads
    lse, scores, blocks, counts = (f"{name}{layer}" for name in ("lse", "scores", "blocks", "counts"))
    launches.add(own, **{lse: 4 * TOKENS * config.heads})
    launches.add(own, lse, **{scores: 2 * rows * held})
    launches.add(scores, **{blocks: rows * sparse.budget, counts: rows})
    launches.add(q, blocks, counts, **{mixed: query})
    launches.add(q, blocks, counts, mixed)
