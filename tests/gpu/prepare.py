"""Make what tests/gpu/run.py takes to a GPU that is lent: artifacts, what the torch reference writes, plans of shapes.

    python tests/gpu/prepare.py OUT [--target h100] [--only artifacts shapes]

Needs the build's packages and no GPU. OUT stays below 64 MiB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from arkinfer import pipeline, targets
from arkinfer.artifact import Artifact
from arkinfer.config import ModelConfig
from arkinfer.exporters.cuda import CudaExporter
from arkinfer.interpreter import PlanInterpreter
from arkinfer.recipe import Recipe
from arkinfer.reference import Reference
from arkinfer.runtime.tokenizer import Tokenizer
from tests.checkpoints import CONFIGS, write_checkpoint
from tests.gpu import shapes

GOLDEN = Path(__file__).parents[1] / "pipeline" / "golden.json"
LENGTH = 120
# Name -> model and options. "random" ones are written here: sparse from their 96th token on.
ARTIFACTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "minicpm-bf16": ("tiny-minicpm", {"weights": "fp32"}),
    "minicpm-int8": ("tiny-minicpm", {"weights": "int8"}),
    "minicpm-int4": ("tiny-minicpm", {"weights": "int4"}),
    "minicpm-int8-kv": ("tiny-minicpm", {"weights": "int8", "kv": "int8"}),
    "bitcpm-ternary": ("tiny-bitcpm", {"weights": "ternary"}),
    "random-sparse-int4": ("random:minicpm", {"weights": "int4"}),
    "random-sparse-int8-kv": ("random:minicpm", {"weights": "int8", "kv": "int8"}),
    "random-llama-int4": ("random:llama", {"weights": "int4"}),
    "random-qwen3-fp16": ("random:qwen3", {"weights": "fp16"}),
}
RANDOM_PROMPT = [(17 * index + index * index) % 400 for index in range(200)]


def artifact(out: Path, name: str, target: str, count: int = LENGTH) -> Artifact:
    """Build the artifact ``name`` and write what is expected of it beside it."""
    model, options = ARTIFACTS[name]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint: str | Path = model
        if model.startswith("random:"):
            checkpoint = write_checkpoint(Path(folder) / "model", CONFIGS[model.removeprefix("random:")])
        built = pipeline.build(checkpoint, target, out=out / f"{name}.ark", verify="none", force=True, **options)
    expect(out, name, built, count)
    return built


def expect(out: Path, name: str, built: Artifact, count: int) -> None:
    """Write the tokens that the torch reference chooses with the artifact's own weights, and by what margin each."""
    manifest = built.manifest
    config = ModelConfig.from_json(manifest.model["config"])
    recipe = Recipe.from_dict(manifest.weights, manifest.activations, manifest.model["recipe"])
    graph = pipeline.lower(config, manifest.context, recipe, recipe.layouts, manifest.kv).graph
    reference = Reference(graph, CudaExporter().weights(graph, built.file), manifest.kv, manifest.attention)
    tokenizer = Tokenizer.from_file(built.file("tokenizer.json"))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    model = ARTIFACTS[name][0]
    exact = manifest.weights in ("fp32", "ternary") and model in golden
    prompt = prompt_of(built, golden["messages"]) if model in golden else RANDOM_PROMPT
    state = reference.new_state(len(prompt) + count)
    logits = reference.step(prompt, state)[-1]
    tokens, margins = [], []
    for _ in range(count):
        best = logits.argsort()[-2:]
        tokens.append(int(best[1]))
        margins.append(float(logits[best[1]] - logits[best[0]]))
        logits = reference.step(tokens[-1:], state)[-1]
    expected: dict[str, Any] = {"prompt": prompt, "eos": [], "tokens": tokens, "margins": margins}
    if exact:
        text = tokenizer.decode(tokens)
        if not golden[model].startswith(text.rstrip("\ufffd")):
            raise SystemExit(f"the reference does not write the golden text of {model}: {text}")
        expected["text"] = text
    (out / f"{name}.expected.json").write_text(json.dumps(expected), encoding="utf-8")


def prompt_of(built: Artifact, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of ``messages``, rendered by the artifact's template with thinking off, as the engine does."""
    from arkinfer.runtime.engine import Engine
    from arkinfer.runtime.options import Generation
    from arkinfer.runtime.template import ChatTemplate

    generation = Generation.from_file(built.file("generation.json"))
    tokenizer = Tokenizer.from_file(built.file("tokenizer.json"))
    template = ChatTemplate(built.file("template.jinja").read_text(encoding="utf-8"), dict(generation.tokens))
    with Engine(PlanInterpreter(built), tokenizer, generation, template) as engine:
        return engine.prepare(messages, {"thinking": False}).ids


def needle(out: Path, target: str, context: int = 131136) -> Artifact:
    return pipeline.build("needle", target, out=out / "needle.ark", context=context, verify="none", force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="h100")
    parser.add_argument("--only", nargs="*", choices=("artifacts", "shapes"), default=["artifacts", "shapes"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if "artifacts" in arguments.only:
        for name in ARTIFACTS:
            artifact(arguments.out, name, arguments.target)
            print(name, flush=True)
        needle(arguments.out, arguments.target)
    if "shapes" in arguments.only:
        (level,) = targets.load(arguments.target).arch
        for shape, weights in shapes.TIMED:
            shapes.write(arguments.out / f"shape-{shape}-{weights}", shape, weights, level, shapes.CONTEXT)
            print(shape, weights, flush=True)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{size / (1 << 20):.1f} MiB in {arguments.out}")


if __name__ == "__main__":
    main()
