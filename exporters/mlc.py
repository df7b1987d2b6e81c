"""The exporter of the mlc backend: a folder in MLC's format, and the model library that its apps link.

``payload/mlc`` is what an app takes as it is; ``payload/<model_lib>.tar`` is the library for the app's build, beside it
the two JSON files that MLC's packaging and its apps read. ``payload/check`` holds the library for this machine, which
the backend drives as MLC's engine would drive the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from arkinfer import conversation
from arkinfer.artifact import Artifact
from arkinfer.artifact.journal import Journal
from arkinfer.errors import UnsupportedError
from arkinfer.exporters import compiled, mlc_config, mlc_outline, mlc_weights, outline, platforms
from arkinfer.exporters import weights as weight_file
from arkinfer.exporters.base import BuildOptions, Payload, Progress, StandIn
from arkinfer.exporters.compiler import Compiler
from arkinfer.exporters.mlc_lowering import MlcLowering
from arkinfer.exporters.program import Program
from arkinfer.exporters.tvm import TOOLS, installed
from arkinfer.graph import ModelGraph
from arkinfer.passes.formats import linears
from arkinfer.reference import RowSource, WeightSource
from arkinfer.targets import Target

FOLDER = "mlc"  # of the payload
PLAN_FORMAT = 1  # of payload/plan.json; the backend refuses any other
CHECK = "x86-64-v3"  # the level of the library for this machine
_COMPILER = "mlc_relax"
_SOURCES = ("mlc_program.py", "mlc_relax.py")  # besides those that every library is made with


class MlcExporter:
    """Writes an MLC package; its kernels are those of CPUs, its attention works on the pages of MLC's cache."""

    precision = "float"  # rounding activations to int8 moves logits more than a cache in float16 does

    def __init__(self) -> None:
        self._compilers: dict[str, Compiler] = {}

    def prepare(self, target: Target) -> None:
        """Start the compilers: they load TVM while the graph is captured."""
        if not self._compilers and all(installed(tool) for tool in TOOLS):
            self._compilers = {isa: Compiler(isa, platform, _COMPILER) for isa, platform in _levels(target).items()}

    def close(self) -> None:
        """End compilers that nobody waits for."""
        for compiler in self._compilers.values():
            compiler.close()
        self._compilers = {}

    def support(self, model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
        """Return why ``model`` cannot be packed for MLC; empty if it can."""
        return mlc_outline.reasons(model.config, target, options)

    def export(
        self,
        model: ModelGraph,
        weights: RowSource,
        target: Target,
        options: BuildOptions,
        path: Callable[[str], Path],
        progress: Progress,
        journal: Journal | None = None,
    ) -> Payload:
        """Compile both forms of the library in processes of their own while this one packs the weights.

        Tokenizer, template and generation.json are read from where the build has put them. The journal stays empty:
        shards that an interrupted build wrote are written again. Raises UnsupportedError (ARK-E336) for a chat template
        that MLC cannot express.
        """
        if absent := [tool for tool in TOOLS if not installed(tool)]:
            raise UnsupportedError(
                f"building for the target {target.name} needs {', '.join(absent)}",
                hint="pip install 'arkinfer[build]'",
                code="ARK-E312",
            )
        config = model.config
        chat, generation = conversation.read(path, config.family)
        lowering = MlcLowering(model, options)
        program = lowering.run()
        specs = weight_file.specs(program)
        formats = sorted({weight.format for weight in model.weights.values()} - {"dense"})
        quantization = "-".join(["ark", *formats, options.kv])
        facts = mlc_config.metadata(config, program, specs, options, quantization)
        model_lib, description = _describe(model, program, options, facts)
        libraries = {target.arch[0]: path(f"payload/{model_lib}.tar"), CHECK: path(f"payload/check/{CHECK}.so")}
        toolchain = {tool: metadata.version(tool) for tool in TOOLS}
        keys = {isa: _key(description, isa, platform, toolchain) for isa, platform in _levels(target).items()}
        missing = [isa for isa, out in libraries.items() if not compiled.fetch(keys[isa], out, out.suffix)]
        folder = path(f"payload/{FOLDER}/{mlc_weights.INDEX}").parent
        try:
            self.prepare(target)
            for isa in missing:
                self._compilers[isa].start(description, libraries[isa])
            with mlc_weights.ShardWriter(folder, specs) as writer:
                origins = weight_file.fill(writer, program, lowering.stored, weights, progress)
            for done, isa in enumerate(missing):
                progress("compile", done, len(missing))
                self._compilers[isa].finish()
                compiled.keep(keys[isa], libraries[isa], libraries[isa].suffix)
            progress("compile", len(missing), len(missing))
        finally:
            self.close()
        tokenizer = path("tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(tokenizer)
        stated = mlc_config.chat_config(config, options, quantization, chat.fields, generation, json.loads(tokenizer))
        _write(folder / "mlc-chat-config.json", stated)
        device = mlc_outline.PLATFORMS[str(target.platform)]
        usage = facts["memory_usage"]
        for name, content in mlc_config.app_files(device, model_lib, FOLDER, config, specs, options, usage).items():
            _write(path(f"payload/{name}"), content)
        _write(path("payload/plan.json"), _plan(model, program, options, model_lib))
        path("payload/library.json").write_text(description + "\n", encoding="utf-8")
        path("payload/program.txt").write_text(program.dump(), encoding="utf-8")
        toolchain["torch"] = torch.__version__.split("+")[0]
        return Payload(toolchain, {"max_context": options.context}, origins, chat.notes)

    def weights(
        self, model: ModelGraph, file: Callable[[str], Path], origins: Mapping[str, str] | None = None
    ) -> WeightSource:
        """Return the weights of a package in canonical form, unpacked from the kernels' layout."""
        arrays = mlc_weights.load(file(f"payload/{FOLDER}/{mlc_weights.INDEX}").parent)
        return weight_file.ArtifactWeights(model, arrays, origins)

    def stand_in(self, artifact: Artifact) -> StandIn:
        """Return what drives the package's library for this machine."""
        from arkinfer.stand_in import in_place_of_app

        return StandIn(in_place_of_app(artifact), f"compiled, the library's {CHECK} form called as MLC's engine does")


def _levels(target: Target) -> dict[str, platforms.Platform]:
    """Return the platform of each library to be compiled, by level; the first is the app's."""
    return {target.arch[0]: platforms.of(target), CHECK: platforms.find("linux-x86_64")}


def _describe(model: ModelGraph, program: Program, options: BuildOptions, facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of the model library and what its compiler reads; other content has another name."""
    config = model.config
    frequencies = next(iter(model.constants.values())).float().tolist()
    content = {
        "program": json.loads(program.to_json()),
        "metadata": facts,
        "cache": {
            "layers": config.layers,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "dtype": outline.KV[options.kv],
            "frequencies": [value.hex() for value in frequencies],
            "magnitude": float(config.rope.magnitude(config.max_context)),
        },
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    name = f"ark_{config.family}_{digest[:12]}"
    return name, json.dumps({**content, "prefix": f"{name}_"}, sort_keys=True)


def _key(description: str, isa: str, platform: platforms.Platform, toolchain: Mapping[str, str]) -> str:
    sources = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _SOURCES]
    return compiled.key(description, isa, platform, json.dumps([dict(toolchain), sources], sort_keys=True))


def _plan(model: ModelGraph, program: Program, options: BuildOptions, model_lib: str) -> dict[str, Any]:
    """Return what the backend needs to know to drive the library for this machine."""
    matrices = [model.weight_of(node) for node in linears(model)]
    return {
        "format": PLAN_FORMAT,
        "model_lib": model_lib,
        "folder": FOLDER,
        "isa": CHECK,
        "vocab_size": model.config.vocab_size,
        "hidden_size": model.config.hidden_size,
        "max_context": options.context,
        **{name: mlc_config.limits(options)[name] for name in ("prefill_chunk_size", "max_batch_size")},
        "parameters": [value.name for value in program.parameters],
        "taps": [public for public, _ in program.taps],
        "ops_per_token": sum(2 * weight.shape[0] * weight.shape[1] for weight in matrices),
    }


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
