"""TensorRT, and TensorRT for RTX: the one file that loads either. Everything else gets the module as a parameter.

An engine is built in a process of its own, which anybody can end at any moment: a fault inside the library, or too
little memory for it, is an error of that process alone, and all that it took is given back when it ends.

    python -m arkinfer.artifact.tensorrt    reads a request from standard input and reports on standard output
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import arkinfer
from arkinfer.artifact.engine_recipe import LEAST_SPAN, PROFILES, EngineRecipe
from arkinfer.errors import UnsupportedError, UserError

STEPS = 1000  # units of progress
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
_WITHOUT = {
    "tensorrt": "arkinfer build MODEL --target jetson-orin-cuda needs no TensorRT",
    "tensorrt_rtx": "arkinfer build MODEL --target rtx-4090 needs no TensorRT",
}
_SHOWN = 3  # of many errors


def library(name: str) -> Any:
    """Return the module ``name``, "tensorrt" or "tensorrt_rtx". Raises ImportError, or OSError of its libraries."""
    if name == "tensorrt_rtx":
        import tensorrt_rtx

        return tensorrt_rtx
    import tensorrt

    return tensorrt


@dataclass(frozen=True)
class Request:
    """What the building process is asked for: read ``model``, and, if ``engine`` is a path, build and write there.

    ``level``: the GPU architecture to build for, "" for the GPU at hand. ``timing``: a file of measured kernel times
    to start from and to add to, or None.
    """

    library: str
    recipe: str  # JSON
    model: str
    level: str
    engine: str | None = None
    timing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came out: the version that built, the layers that the parser made (kind -> count), bytes of the engine."""

    version: str
    layers: Mapping[str, int]
    nbytes: int


def build(request: Request, progress: Callable[[int, int], None]) -> Outcome:
    """Carry ``request`` out in another process. Raises UnsupportedError where TensorRT refuses, UserError where the
    engine cannot be written. An interrupt ends the process; what it wrote of the engine stays for the caller to remove.
    """
    root = str(Path(arkinfer.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-P", "-m", "arkinfer.artifact.tensorrt"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise,
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=noise, text=True) as process,
    ):
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died while loading; its last words tell
                process.stdin.write(json.dumps(asdict(request)))
                process.stdin.close()
            process.stdin = None
            answer: dict[str, Any] = {}
            for line in process.stdout:
                with contextlib.suppress(ValueError):  # the library may print there too
                    answer = found if isinstance(found := json.loads(line), dict) else answer
                    if "done" in answer:
                        progress(answer["done"], STEPS)
            process.wait()
        except BaseException:
            process.kill()
            raise
        noise.seek(0)
        words = [line for line in noise.read().splitlines() if line.strip()]
    if "layers" in answer:
        return Outcome(answer["version"], answer["layers"], answer["nbytes"])
    if "unwritten" in answer:
        raise UserError(
            "the engine could not be written",
            facts={"reason": answer["unwritten"], "file": request.engine},
            hint="free some space, or name another folder: ARKINFER_CACHE=/path/to/folder",
            code="ARK-E155",
        )
    if "refused" in answer:
        raise UnsupportedError(
            f"{NAMES[request.library]} {answer['version']} {answer['what']}",
            facts={f"reason {index}": reason for index, reason in enumerate(answer["refused"], 1)},
            hint=f"report this with the model's config.json\n{_WITHOUT[request.library]}",
            code="ARK-E346",
        )
    raise UnsupportedError(
        f"{NAMES[request.library]} stopped while it built the engine",
        facts={"exit status": process.returncode, "last words": words[-1][:400] if words else "none"},
        hint="a status of -9 is the system's, for want of memory: close other programs, or build with a smaller "
        "--context",
        code="ARK-E347",
    )


class Refusal(Exception):
    """TensorRT will not have the model. ``what`` it did, and its ``reasons``."""

    def __init__(self, what: str, reasons: list[str]) -> None:
        super().__init__(what)
        self.what, self.reasons = what, reasons[-_SHOWN:] or ["it names no reason"]


def logger(module: Any) -> Any:
    """Return a logger of ``module`` that keeps what went wrong in its ``errors``, and prints nothing."""

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split())[:400])

    return Log()


def parse(module: Any, log: Any, model: Path) -> tuple[Any, Any, dict[str, int]]:
    """Return a builder, the strongly typed network that it makes of an ONNX file, and the count of each kind of layer.

    Raises Refusal with the parser's words.
    """
    builder = module.Builder(log)
    # From 11 on every network is strongly typed, and the flag may be gone.
    flag = getattr(getattr(module, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = module.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"{error.node_operator()} {error.node_name()}: {error.desc()}"[:400] for error in found[:_SHOWN]]
        raise Refusal("cannot read the model", reasons or log.errors)
    layers: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        layers[kind] = layers.get(kind, 0) + 1
        if kind == "ATTENTION_INPUT":
            # Where no kernel does it at once, it may be done in parts. The bindings hand out every layer as the base
            # class; naming its own is their way to reach what is special to it.
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = True
    return builder, network, layers


def configure(module: Any, builder: Any, network: Any, recipe: EngineRecipe, level: str) -> Any:
    """Return the builder's configuration: profiles, limit of memory, and the architecture where it must be named.

    Raises Refusal where the network is not the one that ``recipe`` is for.
    """
    inputs = {tensor.name: tensor for tensor in (network.get_input(index) for index in range(network.num_inputs))}
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    expected = {"tokens", "position", "rows", *(cache.name for cache in recipe.caches)}
    if set(inputs) - {"span"} != expected or outputs != {"logits", *(f"{cache.name}.out" for cache in recipe.caches)}:
        raise Refusal("reads another model than the recipe's", sorted((set(inputs) - {"span"}) ^ expected)[:_SHOWN])
    if shaping := [name for name in ("position", "rows", "span") if name in inputs and inputs[name].is_shape_tensor]:
        # Such a value would have to lie in the host's memory, and a captured graph could not be replayed.
        raise Refusal("lets values decide shapes", shaping)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, recipe.workspace)
    if level:
        config.num_compute_capabilities = 1
        name = level.upper().replace("_", "")
        if not hasattr(module.ComputeCapability, name):
            raise Refusal(f"builds nothing for {level}", [", ".join(module.ComputeCapability.__members__)])
        config.set_compute_capability(getattr(module.ComputeCapability, name), 0)
    for profile in (recipe.profiles[name] for name in PROFILES):
        shapes = builder.create_optimization_profile()
        shapes.set_shape("tokens", (1,), (profile.tokens,), (profile.tokens,))
        shapes.set_shape("rows", (1,), (1 if profile.tokens > profile.rows else profile.rows,), (profile.rows,))
        if "span" in inputs:  # fastest where the caches are full: at the start there is little to read
            shapes.set_shape("span", (min(LEAST_SPAN, recipe.capacity),), (recipe.capacity,), (recipe.capacity,))
        config.add_optimization_profile(shapes)
    return config


def compile_engine(
    module: Any, recipe: EngineRecipe, model: Path, level: str, timing: bytes | None, report: Callable[[int], bool]
) -> tuple[Any, bytes | None, dict[str, int]]:
    """Return the serialised engine (a buffer), the timing cache, if any, and the count of each kind of layer.

    ``report`` is told how far it is, of STEPS, and says whether to go on. Raises Refusal.
    """
    log = logger(module)
    builder, network, layers = parse(module, log, model)
    config = configure(module, builder, network, recipe, level)
    if timing is not None:
        # A file that is none of this TensorRT's is worth nothing, and no reason to fail.
        cache = config.create_timing_cache(timing) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    monitor = _monitor(module, report)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refusal("could not build the engine", log.errors)
    kept = None
    if timing is not None and (timed := config.get_timing_cache()) is not None:
        kept = bytes(memoryview(timed.serialize()))
    return engine, kept, layers


def _monitor(module: Any, report: Callable[[int], bool]) -> Any:
    """Return a progress monitor of ``module``: a step of an inner phase is a part of a step of the outer one."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}  # name -> steps done and in all, the outermost first
            self.most = 0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [0, max(steps, 1)]

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][0] = step + 1
            part, done = 1.0, 0.0
            for finished, steps in list(self.phases.values()):
                part /= steps
                done += part * min(finished, steps - 1)
            self.most = max(self.most, int(STEPS * done))
            return report(self.most)

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

    return Monitor()


def _answers(request: Request) -> Iterator[dict[str, Any]]:
    """Carry ``request`` out in this process, and yield what it has to say, the outcome last."""
    module = library(request.library)
    recipe = EngineRecipe.from_json(request.recipe)
    version = str(module.__version__)
    try:
        if request.engine is None:
            log = logger(module)
            builder, network, layers = parse(module, log, Path(request.model))
            configure(module, builder, network, recipe, request.level)
            yield {"version": version, "layers": layers, "nbytes": 0}
            return
        timing = None
        if request.timing is not None:
            timing = Path(request.timing).read_bytes() if Path(request.timing).is_file() else b""
        engine, kept, layers = compile_engine(
            module, recipe, Path(request.model), request.level, timing, _tell_while_wanted
        )
    except Refusal as error:
        yield {"version": version, "what": error.what, "refused": error.reasons}
        return
    data = memoryview(engine)
    try:
        _write(Path(request.engine), data)
        if kept and request.timing is not None:
            # In the engine's folder, which is locked: builds of other engines add to the same file.
            part = Path(request.engine).with_name("timing.part")
            _write(part, memoryview(kept))
            os.replace(part, request.timing)
    except OSError as error:
        Path(request.engine).unlink(missing_ok=True)
        yield {"unwritten": error.strerror or str(error)}
        return
    _say({"done": STEPS})
    yield {"version": version, "layers": layers, "nbytes": data.nbytes}


def _write(file: Path, data: memoryview) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _tell_while_wanted(done: int) -> bool:
    """Say how far the build is; return False once whoever asked for it is gone, however that came."""
    try:
        _say({"done": done})
    except OSError:
        return False
    return True


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read one request, answer it line by line."""
    request = Request(**json.loads(sys.stdin.read()))
    for answer in _answers(request):
        _say(answer)


if __name__ == "__main__":
    main()
