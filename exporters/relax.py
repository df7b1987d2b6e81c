"""Turn a Program into a shared library with TVM. Runs in a process of its own: a compiler crash becomes an error.

``python -m arkinfer.exporters.relax ISA PLATFORM GLIBC`` reads the output path from the first line of standard input,
and the program, as JSON, from the rest.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_BIND_THREADS", "0")
# tvm_ffi imports torch wherever it finds it, only to exchange tensors with it: seconds that this process does not have.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]

import tvm
from tvm import relax, tirx

from arkinfer.exporters import linker, platforms
from arkinfer.exporters.kernels import tir
from arkinfer.exporters.kernels.tir import peak
from arkinfer.exporters.kernels.tir.isa import ISAS, Isa
from arkinfer.exporters.platforms import Platform
from arkinfer.exporters.program import Argument, Call, Program, Value

RAISED = Path(__file__).parent / "kernels" / "raised.c"


class Emitter:
    """Emits one Relax function from a Program, for one form of its kernels."""

    def __init__(self, builder: relax.BlockBuilder, program: Program, isa: Isa, functions: dict[str, Any]) -> None:
        self.builder, self.program, self.isa, self.functions = builder, program, isa, functions

    def emit(self, name: str, tokens: str, taps: bool = False) -> None:
        """Emit ``name``: ``tokens`` is "one" (n and r are 1) or "many"; with ``taps`` inner values are returned too."""
        many = tokens == "many"
        symbols: dict[str, Any] = {
            "n": tirx.Var("n", "int64") if many else 1,
            "r": tirx.Var("r", "int64") if many else 1,
        }
        for cache in self.program.caches:
            for extent in cache.shape:
                if isinstance(extent, str):
                    symbols.setdefault(extent, tirx.Var(extent, "int64"))

        def kind(value: Value) -> relax.TensorType:
            return relax.TensorType([symbols.get(e, e) if isinstance(e, str) else e for e in value.shape], value.dtype)

        scalars = {scalar: tirx.Var(scalar, "int64") for scalar in self.program.scalars}
        inputs = [relax.Var(value.name, kind(value)) for value in self.program.inputs]
        caches = [relax.Var(value.name, kind(value)) for value in self.program.caches]
        packed = relax.Var("parameters", relax.TupleType([kind(value) for value in self.program.parameters]))
        shape = relax.Var("scalars", relax.ShapeType(list(scalars.values())))
        known: dict[str, Any] = {}
        with self.builder.function(name, [*inputs, shape, *caches, packed]):
            for value, variable in zip([*self.program.inputs, *self.program.caches], [*inputs, *caches], strict=True):
                known[value.name] = variable
            for index, value in enumerate(self.program.parameters):
                known[value.name] = self.builder.emit(relax.TupleGetItem(packed, index))
            for call in self.program.calls:
                self.call(call, tokens, known, scalars, kind)
            # The caches are returned so that no pass may take the kernels that update them for dead code.
            results = [known[self.program.result]]
            results += [known[inner] for _, inner in self.program.taps] if taps else []
            self.builder.emit_func_output(
                relax.Tuple([*results, *(known[value.name] for value in self.program.caches)])
            )

    def call(self, call: Call, tokens: str, known: dict[str, Any], scalars: Mapping[str, Any], kind: Any) -> None:
        if call.kernel == "reshape":
            (output,) = call.outputs
            known[output.name] = self.builder.emit(relax.op.reshape(known[str(call.inputs[0])], kind(output).shape))
            return
        function = self._function(call, tokens)

        def argument(item: Argument) -> Any:
            if isinstance(item, int):
                return relax.prim_value(item)
            return relax.prim_value(scalars[item]) if item in scalars else known[item]

        arguments = [argument(item) for item in call.inputs]
        types = [kind(output) for output in call.outputs]
        if not call.mutates:
            result = self.builder.emit(relax.call_tir(function, arguments, types if len(types) > 1 else types[0]))
            self._bind(call.outputs, result, known)
            return
        names = [*call.mutates]
        places = [list(call.inputs).index(name) for name in names]
        types = [known[name].ty for name in names] + types
        result = self.builder.emit(
            relax.op.call_tir_inplace(
                function, arguments, [*places, *[-1] * len(call.outputs)], types if len(types) > 1 else types[0]
            )
        )
        outputs = [Value(name, "", ()) for name in names] + list(call.outputs)
        self._bind(outputs, result, known)

    def _bind(self, outputs: Sequence[Value], result: Any, known: dict[str, Any]) -> None:
        if len(outputs) == 1:
            known[outputs[0].name] = result
            return
        for index, output in enumerate(outputs):
            known[output.name] = self.builder.emit(relax.TupleGetItem(result, index))

    def names(self, tokens: str) -> list[str | None]:
        """Return the name of each of the program's kernels for ``tokens`` "one" or "many"; None for a view."""
        keys = (_key(kernel, options, tokens) for kernel, options in self.program.kernels())
        return [self.functions[key].name_hint if key in self.functions else None for key in keys]

    def _function(self, call: Call, tokens: str) -> Any:
        key = _key(call.kernel, call.options, tokens)
        if key not in self.functions:
            # Variants share a name; without one they are private, and the builder numbers them.
            kernel = tir.build(call.kernel, self.isa, tokens, call.options).without_attr("global_symbol")
            self.functions[key] = self.builder.add_func(kernel, call.kernel)
        return self.functions[key]


def _key(kernel: str, options: Mapping[str, Any], tokens: str) -> str:
    return json.dumps([kernel, options, tokens], sort_keys=True)


def module(program: Program, isa: Isa) -> tuple[tvm.IRModule, dict[str, list[str | None]]]:
    """Return the Relax module with the functions ``step`` (any tokens), ``decode`` (one) and ``trace`` (with taps).

    With it come the names of the compiled kernels: for any number of tokens ("many") and for one, in the order of
    ``program.kernels()``; None for a view. Kernels whose code is the same share a name.
    """
    builder = relax.BlockBuilder()
    emitter = Emitter(builder, program, isa, {})
    emitter.emit("step", "many")
    emitter.emit("decode", "one")
    emitter.emit("trace", "many", taps=True)
    _emit_peak(builder, isa, any(call.kernel == "linear_int8" for call in program.calls))
    return builder.get(), {form: emitter.names(form) for form in ("many", "one")}


def _emit_peak(builder: relax.BlockBuilder, isa: Isa, whole: bool) -> None:
    """Emit ``peak``: how fast this machine runs the instruction that the program's matrix products are made of."""
    kernel = builder.add_func(peak.peak(isa, "many", whole=whole).without_attr("global_symbol"), "peak_kernel")
    items = tirx.Var("items", "int64")
    size, dtype = (64, "int8") if whole else (16, "float32")
    x = relax.Var("x", relax.TensorType([peak.SOURCES * size], dtype))
    count = relax.Var("count", relax.ShapeType([items]))
    with builder.function("peak", [x, count]):
        sums = relax.TensorType([items, peak.chains(isa), isa.lanes], "int32" if whole else "float32")
        builder.emit_func_output(builder.emit(relax.call_tir(kernel, [x], sums)))


def compile_program(program: Program, isa: Isa, platform: Platform, out: Path) -> None:
    """Compile ``program`` for ``isa`` into the library ``out`` of ``platform``.

    Beside it, with the suffix .json, goes which kernel has which name there: see ``module``.
    """
    target = tvm.target.Target({**isa.target, "mtriple": platform.triple})

    def link(output: str, objects: Sequence[str], *_: object, **__: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            raised = Path(folder) / "raised.o"
            linker.compile_c(platform, [RAISED], raised)
            linker.link(platform, [*objects, raised], Path(output))

    link.output_format = platform.suffix[1:]  # type: ignore[attr-defined]  # how tvm asks what its linker makes
    # Our kernels allocate exactly what they use; looking for what could shrink takes a fifth of the time.
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        built, names = module(program, isa)
        executable = relax.build(built, target=target, exec_mode="bytecode")
    executable.export_library(str(out), fcompile=link)
    out.with_suffix(".json").write_text(json.dumps(names), encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    isa, platform, glibc = arguments
    out = Path(sys.stdin.readline().rstrip("\n"))
    compile_program(Program.from_json(sys.stdin.read()), ISAS[isa], platforms.find(platform, glibc), out)


if __name__ == "__main__":
    main(sys.argv[1:])
