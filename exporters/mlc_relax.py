"""Turn a Program into a model library of MLC with TVM. Runs in a process of its own, as relax.py does.

``python -m arkinfer.exporters.mlc_relax ISA PLATFORM GLIBC`` reads the output path from the first line of standard
input, and a description, as JSON, from the rest. A path that ends in .tar gets the objects of a system library, for the
build of an app; any other a shared library, that has the function ``trace`` as well.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arkinfer.exporters import relax as emission  # first: it settles how TVM is loaded

import tvm  # isort: skip
from tvm import relax, tirx
from tvm.relax.frontend.nn.llm import _page_kernels as copying

from arkinfer.exporters import linker, platforms
from arkinfer.exporters.kernels.tir import logits, paged
from arkinfer.exporters.kernels.tir.isa import ISAS, Isa
from arkinfer.exporters.mlc_program import ATTENTION, split
from arkinfer.exporters.program import Call, Program, Value

_CREATE = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
_NORMAL = 1  # RopeMode.NORMAL: rotated when written
_MHA = 0  # AttnKind.MHA


class _Emitter(emission.Emitter):
    """Emits the functions of one model library from its Program."""

    def __init__(self, builder: relax.BlockBuilder, program: Program, isa: Isa) -> None:
        super().__init__(builder, program, isa, {})
        self._embed, self._rest = split(program)
        self._cache: Any = None
        self._rows = "given"

    def embed_tokens(self) -> None:
        """Emit ``embed``: input_ids (n,) int32 -> (n, hidden) float32."""
        kind = self._kind({"n": tirx.Var("n", "int64")})
        (tokens,) = (relax.Var("input_ids", kind(value)) for value in self._embed.inputs)
        packed = self._parameters(kind)
        with self.builder.function("embed", [tokens, packed]):
            known = {"tokens": tokens}
            self._run(self._embed, packed, known, "many", kind)
            self.builder.emit_func_output(known[self._embed.result])

    def forward(self, name: str, shape: tuple[str | int, str | int], rows: str, taps: bool = False) -> None:
        """Emit ``name``: embeddings (*shape, hidden), cache[, logit_positions] -> logits, cache.

        ``rows`` says which tokens get logits: the "last" (1, 1, vocab), those "given" (1, r, vocab), or "all", where
        logits have the ``shape`` of the embeddings.
        """
        symbols: dict[str, Any] = {extent: tirx.Var(extent, "int64") for extent in shape if isinstance(extent, str)}
        extents = [symbols.get(extent, extent) if isinstance(extent, str) else extent for extent in shape]
        tokens = extents[0] if shape[1] == 1 else extents[1]
        wanted = {"last": 1, "all": tokens, "given": tirx.Var("r", "int64")}[rows]
        kind = self._kind({"n": tokens, "r": wanted})
        hidden = self._rest.inputs[0]
        embeddings = relax.Var("input_embeds", relax.TensorType([*extents, hidden.shape[1]], hidden.dtype))
        cache = relax.Var("paged_kv_cache", relax.AnyType())
        positions = relax.Var("logit_positions", relax.TensorType([wanted], "int32"))
        packed = self._parameters(kind)
        given = [positions] if rows == "given" else []
        with self.builder.function(name, [embeddings, *given, cache, packed]):
            self._cache, self._rows = cache, rows
            known = {"rows": positions}
            known[hidden.name] = _view(self.builder, embeddings, kind(hidden))
            form = "one" if shape == (1, 1) else "many"
            self._run(self._rest, packed, known, form, kind)
            found = known[self._rest.result]
            vocabulary = found.ty.shape[1]
            outer = {"last": [1, 1], "given": [1, wanted], "all": extents}[rows]
            found = _view(self.builder, found, relax.TensorType([*outer, vocabulary], "float32"))
            inner = [known[value] for _, value in self._rest.taps] if taps else []
            self.builder.emit_func_output(relax.Tuple([found, cache, *inner]))

    def _parameters(self, kind: Any) -> relax.Var:
        return relax.Var("packed_params", relax.TupleType([kind(value) for value in self.program.parameters]))

    def _kind(self, symbols: Mapping[str, Any]) -> Any:
        def kind(value: Value) -> relax.TensorType:
            return relax.TensorType([symbols.get(e, e) if isinstance(e, str) else e for e in value.shape], value.dtype)

        return kind

    def _run(self, part: Program, packed: relax.Var, known: dict[str, Any], tokens: str, kind: Any) -> None:
        read = {name for call in part.calls for name in call.inputs}
        for index, value in enumerate(self.program.parameters):
            if value.name in read:
                known[value.name] = self.builder.emit(relax.TupleGetItem(packed, index))
        for call in part.calls:
            self.call(call, tokens, known, {}, kind)

    def call(self, call: Call, tokens: str, known: dict[str, Any], scalars: Mapping[str, Any], kind: Any) -> None:
        if call.kernel == ATTENTION:
            (output,) = call.outputs
            layer, scale = relax.prim_value(call.options["layer"]), relax.prim_value(float(call.options["scale"]))
            arguments = [self._cache, layer, scale, known[str(call.inputs[0])]]
            known[output.name] = self.builder.emit(
                relax.call_dps_packed(
                    "vm.builtin.attention_kv_cache_attention_with_fused_qkv", arguments, out_ty=kind(output)
                )
            )
        elif call.kernel == "reshape":
            known[call.outputs[0].name] = _view(self.builder, known[str(call.inputs[0])], kind(call.outputs[0]))
        elif call.kernel == "take_rows" and (self._rows == "all" or tokens == "one"):
            known[call.outputs[0].name] = known[str(call.inputs[0])]
        elif call.kernel == "take_rows" and self._rows == "last":
            super().call(Call("take_last", {}, call.inputs[:1], call.outputs), tokens, known, scalars, kind)
        else:
            super().call(call, tokens, known, scalars, kind)


def _view(builder: relax.BlockBuilder, value: Any, kind: relax.TensorType) -> Any:
    """Emit ``value`` in the shape of ``kind`` on the same memory; relax.op.reshape would become a copy."""
    return builder.emit(relax.call_pure_packed("vm.builtin.reshape", value, kind.shape, ty_args=kind))


def _emit_cache(builder: relax.BlockBuilder, isa: Isa, cache: Mapping[str, Any]) -> None:
    """Emit ``create_tir_paged_kv_cache``: five numbers, each in a Shape of its own -> the runtime's paged cache.

    The frequencies of rotation, LongRoPE's factors included, go where the runtime has an argument for factors: they are
    what our rotation kernel is called with.
    """
    heads, kv_heads, dim, dtype = (cache[name] for name in ("heads", "kv_heads", "head_dim", "dtype"))
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "dtype": dtype}

    def add(name: str, function: Any) -> Any:
        return builder.add_func(function.without_attr("global_symbol"), name)

    def own(name: str) -> relax.Tuple:
        function = add(name, getattr(paged, name)(isa, "many", **shape))
        return relax.Tuple([tvm.ir.StringImm("tirx"), function])

    absent = relax.Tuple([])  # for sliding windows and for MLA
    numbers = {name: tirx.Var(name, "int64") for name in _CREATE}
    parameters = [relax.Var(f"{name}_", relax.ShapeType([number])) for name, number in numbers.items()]
    rotation = {**shape, "magnitude": cache["magnitude"]}
    copies = {"num_heads": kv_heads, "head_dim": dim, "dtype": dtype}
    with builder.function("create_tir_paged_kv_cache", parameters):
        arguments = [
            relax.ShapeExpr(list(numbers.values())),
            relax.ShapeExpr([0, cache["layers"]]),
            *(relax.prim_value(number) for number in (heads, kv_heads, dim, dim)),
            relax.ShapeExpr([_MHA] * cache["layers"]),
            relax.prim_value(False),  # disaggregation
            relax.prim_value(_NORMAL),
            relax.prim_value(1),  # scale and theta of rotations that are not ours
            relax.prim_value(10000),
            relax.const([float.fromhex(value) for value in cache["frequencies"]], "float32"),
            relax.const(0, dtype),  # says the type of the pages
            add("append", paged.append(isa, "many", kv_heads=kv_heads, head_dim=dim, dtype=dtype)),
            relax.prim_value(0),
            own("ragged"),
            own("prefill"),
            own("decode"),
            absent,
            absent,
            own("paged_tree"),
            own("ragged_tree"),
            absent,
            relax.Tuple([add("merge", paged.merge(isa, "many", heads=heads, head_dim=dim, dtype=dtype))]),
            add("split_rotary", paged.split_rotary(isa, "many", **rotation)),
            add("copy_page", copying._copy_single_page_cpu(page_size=paged.PAGE, **copies)),
            add("debug_keys", copying._kv_cache_debug_get_kv(cache["layers"], kv_heads, dim, dtype)),
            add("compact", copying._compact_kv_copy_cpu(**copies)),
        ]
        made = relax.call_pure_packed("vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=relax.AnyType())
        builder.emit_func_output(builder.emit(made))


def _emit_sampling(builder: relax.BlockBuilder, isa: Isa) -> None:
    """Emit ``softmax_with_temperature`` and what the engine's logit processor calls."""
    batch, vocabulary = tirx.Var("b", "int64"), tirx.Var("vocab", "int64")
    x = relax.Var("logits", relax.TensorType([batch, 1, vocabulary], "float32"))
    temperature = relax.Var("temperature", relax.TensorType([batch], "float32"))
    kernel = builder.add_func(logits.softmax_with_temperature(isa).without_attr("global_symbol"), "softmax")
    with builder.function("softmax_with_temperature", [x, temperature]):
        flat = relax.TensorType([batch, vocabulary], "float32")
        drawn = builder.emit(relax.call_tir(kernel, [_view(builder, x, flat), temperature], flat))
        builder.emit_func_output(_view(builder, drawn, x.ty))
    for name in ("apply_logit_bias_inplace", "apply_penalty_inplace", "apply_bitmask_inplace"):
        builder.add_func(getattr(logits, name)(isa), name)


def module(description: Mapping[str, Any], isa: Isa, traced: bool) -> tvm.IRModule:
    """Return the Relax module with the functions that MLC's engine asks a model library for."""
    builder = relax.BlockBuilder()
    emitter = _Emitter(builder, Program.from_json(json.dumps(description["program"])), isa)
    emitter.embed_tokens()
    emitter.forward("prefill", (1, "n"), "last")
    emitter.forward("decode", (1, 1), "all")
    emitter.forward("batch_prefill", (1, "n"), "given")
    emitter.forward("batch_decode", ("n", 1), "all")
    emitter.forward("batch_verify", (1, "n"), "all")
    if traced:
        emitter.forward("trace", (1, "n"), "all", taps=True)
    metadata = description["metadata"]
    chunk, hidden = metadata["prefill_chunk_size"], emitter.program.calls[0].outputs[0].shape[1]
    with builder.function("alloc_embedding_tensor", []):
        place = relax.op.builtin.alloc_tensor(relax.ShapeExpr([chunk, hidden]), "float32", runtime_device_index=0)
        builder.emit_func_output(builder.emit(place))
    with builder.function("_metadata", []):
        builder.emit_func_output(tvm.ir.StringImm(json.dumps(metadata, sort_keys=True)))
    _emit_cache(builder, isa, description["cache"])
    _emit_sampling(builder, isa)
    return builder.get()


def compile_library(description: Mapping[str, Any], isa: Isa, platform: platforms.Platform, out: Path) -> None:
    """Compile the model library that ``description`` describes for ``isa`` into ``out``."""
    target = tvm.target.Target({**isa.target, "mtriple": platform.triple})
    system = out.suffix == ".tar"
    built = module(description, isa, traced=not system)
    prefix = description["prefix"] if system else ""

    def lower(before: tvm.IRModule) -> tvm.IRModule:
        return _with_prefix(relax.get_pipeline("default_build")(before), prefix)

    def link(output: str, objects: Sequence[str], *_: object, **__: object) -> None:
        if system:
            _pack(Path(output), sorted(map(Path, objects), key=lambda item: item.name))
        else:
            linker.link(platform, objects, Path(output))

    link.output_format = out.suffix[1:]  # type: ignore[attr-defined]  # how tvm asks what its linker makes
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        executable = relax.build(built, target=target, relax_pipeline=lower, exec_mode="bytecode", system_lib=system)
    executable.export_library(str(out), fcompile=link)


def _with_prefix(lowered: tvm.IRModule, prefix: str) -> tvm.IRModule:
    """Let the symbols of a system library's kernels begin with ``prefix``.

    TVM's own pass for it, AttachGlobalSymbol, fails on kernels that call an intrinsic without a result, as prefetches
    are; without a prefix it has nothing to rename, and works.
    """
    if prefix:
        for name, function in lowered.functions_items():
            if isinstance(function, tirx.PrimFunc):
                lowered.update_func(name, function.with_attr("global_symbol", prefix + function.attrs["global_symbol"]))
        lowered = lowered.with_attr("system_lib_prefix", prefix)
    return lowered


def _pack(out: Path, objects: Sequence[Path]) -> None:
    """Write ``objects`` into a tar file; the same objects give the same bytes."""
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as archive:
        for item in objects:
            data = item.read_bytes()
            entry = tarfile.TarInfo(item.name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def main(arguments: Sequence[str]) -> None:
    isa, platform, glibc = arguments
    out = Path(sys.stdin.readline().rstrip("\n"))
    compile_library(json.loads(sys.stdin.read()), ISAS[isa], platforms.find(platform, glibc), out)


if __name__ == "__main__":
    main(sys.argv[1:])
