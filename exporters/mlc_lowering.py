"""Lower the model graph to a Program whose attention is a call of MLC's paged cache."""

from __future__ import annotations

from arkinfer.exporters import outline
from arkinfer.exporters.lowering import Lowering, head_norms, source_of
from arkinfer.exporters.mlc_program import ATTENTION
from arkinfer.exporters.program import Program, Value
from arkinfer.graph import Node


class MlcLowering(Lowering):
    """As for CPUs, without caches among the tensors: positions and earlier keys are the runtime's affair."""

    def run(self) -> Program:
        """Return the program of the whole graph."""
        program = super().run()
        program.inputs = [value for value in program.inputs if value.name != "rotation"]
        program.caches, program.scalars = [], []
        return program

    def _attention(self, node: Node) -> None:
        config, kind = self.config, outline.KV[self.options.kv]
        q, k, v = node.args[:3]
        qkv = source_of(v)
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        norms = head_norms(q, k)
        shape = {"heads": heads, "head_dim": dim, "dtype": kind}
        fused = Value(f"{node.name}.qkv", kind, ("n", heads + 2 * kv_heads, dim))
        if kind == "float32" and not norms:
            self._call("reshape", {}, [self.names[qkv]], fused)
        else:
            eps = float(norms[0].args[3]) if norms else None
            weights = [self._vector(norm.args[2]) for norm in norms]
            options = {**shape, "kv_heads": kv_heads, "norm_eps": eps}
            self._call("to_heads", options, [self.names[qkv], *weights], fused)
        attended = Value(f"{node.name}.attended", kind, ("n", heads, dim))
        self._call(ATTENTION, {"layer": self.layer, "scale": float(node.args[13])}, [fused.name], attended)
        out = Value(node.name, "float32", ("n", heads * dim))
        if kind == "float32":
            self._call("reshape", {}, [attended.name], out)
        else:
            self._call("from_heads", shape, [attended.name], out)
        self.names[node] = out.name
        self.layer += 1

    def _flatten(self, node: Node) -> None:
        self.names[node] = self.names[node.args[0]]
