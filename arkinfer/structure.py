"""What a config implies before any graph is captured: the weights, the matrices they are stored as, the operators.

Nothing here loads torch. It says in closed form what arkinfer.models defines and arkinfer.passes makes of it; tests
compare the two for every family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arkinfer.checkpoint.stored import Layout
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError, nearest
from arkinfer.recipe import Recipe, Storage

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Matrix:
    """Weights of the checkpoint that are stored as one: ``shape`` (N, K), with ``outputs`` read from each source.

    ``table``: the embedding table or the output head. ``gated``: gate rows, then up rows, of a layer without biases.
    ``reads`` tells how often a token multiplies by it: 0 for an embedding table that is no head.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, int]
    table: bool = False
    gated: bool = False
    reads: int = 1


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight that ``config`` implies, by transformers' names, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {TABLE: (config.vocab_size, hidden)}
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for layer in range(config.layers):
        stem = f"model.layers.{layer}"
        for block, linears, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for name, shape in linears.items():
                found[f"{stem}.{block}.{name}.weight"] = shape
                if bias:
                    found[f"{stem}.{block}.{name}.bias"] = shape[:1]
        if config.qk_norm:
            found[f"{stem}.self_attn.q_norm.weight"] = (config.head_dim,)
            found[f"{stem}.self_attn.k_norm.weight"] = (config.head_dim,)
        found[f"{stem}.input_layernorm.weight"] = (hidden,)
        found[f"{stem}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        found[HEAD] = (config.vocab_size, hidden)
    return found


def body(config: ModelConfig) -> list[str]:
    """Return the names of the matrices between the embedding table and the output head."""
    return [name for name, shape in shapes(config).items() if len(shape) == 2 and name not in (TABLE, HEAD)]


def require(layouts: Mapping[str, Layout], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError where ``layouts``, a checkpoint's, are not the weights that its config implies."""
    missing = sorted(set(expected) - set(layouts))
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the tensors that its config implies",
            facts={"first": missing[0], "nearest": nearest(missing[0], list(layouts))},
            hint="complete the download, or use the config.json that belongs to these weights",
            code="ARK-E124",
        )
    for name, shape in expected.items():
        if layouts[name].shape != shape:
            raise UserError(
                "a weight does not have the shape that config.json implies",
                facts={"tensor": name, "expected": list(shape), "found": list(layouts[name].shape)},
                hint="use the config.json that belongs to these weights",
                code="ARK-E125",
            )


class Structure:
    """The graph after all passes, in closed form."""

    def __init__(self, config: ModelConfig, recipe: Recipe) -> None:
        self.config, self.recipe = config, recipe
        self.concatenations = 0
        self.matrices = [
            Matrix(TABLE, (TABLE,), (config.vocab_size, config.hidden_size), True, reads=int(config.tie_embeddings))
        ]
        found = shapes(config)
        for layer in range(config.layers):
            stem = f"model.layers.{layer}"
            self._join([f"{stem}.self_attn.{name}_proj.weight" for name in "qkv"], found)
            self._join([f"{stem}.self_attn.o_proj.weight"], found)
            self._join([f"{stem}.mlp.{name}_proj.weight" for name in ("gate", "up")], found, not config.mlp_bias)
            self._join([f"{stem}.mlp.down_proj.weight"], found)
        if not config.tie_embeddings:
            self.matrices.append(Matrix(HEAD, (HEAD,), (config.vocab_size, config.hidden_size), True))
        # Norm weights and biases: stored as float32 vectors.
        self.vectors = [shape[0] for shape in found.values() if len(shape) == 1]
        self.biases = [shape[0] for name, shape in found.items() if name.endswith(".bias")]

    def orders(self) -> int:
        """Return how many column indices are stored: matrices whose columns lie in one order share them."""
        found = {how.order: matrix.shape[1] for matrix in self.matrices if (how := self.storage(matrix)).order}
        return sum(found.values())

    def storage(self, matrix: Matrix) -> Storage:
        return self.recipe.storage(matrix, matrix.table)

    def _join(self, names: Sequence[str], found: Mapping[str, tuple[int, ...]], gated: bool = False) -> None:
        separate = [Matrix(name, (name,), (found[name][0], found[name][1])) for name in names]
        if len(separate) > 1 and not self.recipe.joinable(separate):
            self.concatenations += 1
            self.matrices += separate
            return
        rows = sum(matrix.shape[0] for matrix in separate)
        joined = Matrix(names[0], tuple(names), (rows, separate[0].shape[1]), gated=gated and len(separate) > 1)
        self.matrices.append(joined)

    def linears(self) -> list[Matrix]:
        """Return the matrices that tokens are multiplied by."""
        return [matrix for matrix in self.matrices if matrix.reads]

    def operators(self) -> dict[str, int]:
        """Return how often each operator occurs in the graph, as ModelGraph.operators does."""
        config, layers = self.config, self.config.layers
        counts = {
            "arkinfer.add_rms_norm": 2 * layers,
            "arkinfer.attention": layers,
            "arkinfer.embedding": 1,
            "arkinfer.linear": len(self.linears()),
            "arkinfer.rope": 2 * layers,
            "arkinfer.swiglu": layers,
            "aten.cat": self.concatenations,
            "aten.flatten.using_ints": layers,
            "aten.index_select": 1,
            "aten.mul.Tensor": int(config.family == "minicpm"),  # the logits' scale; all others are folded
            "aten.rms_norm": 1 + (2 * layers if config.qk_norm else 0),
            "aten.slice.Tensor": 3 * layers,
            "aten.unflatten.int": 3 * layers,
            "getitem": 4 * layers - 1,  # two of each add_rms_norm; nobody reads the last sum
        }
        return {name: count for name, count in counts.items() if count}
