"""What `arkinfer plan` derives from a config in closed form is what capture, passes and lowering make of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from arkinfer import graph, passes, structure
from arkinfer.checkpoint.stored import Layout
from arkinfer.config import ModelConfig
from arkinfer.exporters import outline
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.lowering import Lowering
from arkinfer.graph import ModelGraph
from arkinfer.passes import formats
from arkinfer.quant.packed import DTYPES
from arkinfer.recipe import Recipe, Rule
from tests.checkpoints import CONFIGS

FAMILIES: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "biased": {**CONFIGS["llama"], "mlp_bias": True, "num_hidden_layers": 3},
    "tied": {**CONFIGS["minicpm"], "tie_word_embeddings": True, "num_hidden_layers": 1},
    "odd": {**CONFIGS["qwen3"], "vocab_size": 403, "intermediate_size": 256, "tie_word_embeddings": False},
}
QUANTISED = Layout("int4", (), "F16", 32)


@cache
def capture(family: str) -> ModelGraph:
    return graph.capture(ModelConfig.from_json(FAMILIES[family]), 256)


def assigned(family: str, recipe: Recipe) -> ModelGraph:
    """Return the family's graph after all passes; what was captured stays as it is."""
    copy = capture(family).with_attention("auto")
    return passes.run(replace(copy, weights=dict(copy.weights)), recipe)


def recipe_for(config: ModelConfig, weights: str, changed: dict[str, Layout] | None = None, **fields: Any) -> Recipe:
    layouts = {name: Layout("dense", shape, "BF16") for name, shape in structure.shapes(config).items()}
    for pattern, layout in (changed or {}).items():
        for name, found in layouts.items():
            if pattern in name and len(found.shape) == 2:
                layouts[name] = replace(layout, shape=found.shape)
    return Recipe(weights, "float" if weights in ("fp16", "fp32") else "int8", layouts, **fields)


RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {"weights": "fp32"},
    "fp16": {"weights": "fp16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "head": "int4", "group": 32},
    "ruled": {"weights": "int4", "rules": (Rule("layers.0.*.k_proj.*", "int8"), Rule("*down_proj*", "fp16"))},
    "ternary": {"weights": "ternary", "changed": {"_proj": Layout("ternary", (), "BF16", 64, scheme="ternary")}},
    "ordered": {
        "weights": "int4",
        "changed": {
            "_proj": Layout("int4", (), "F16", 32, True, "own"),
            "down_proj": Layout("int4", (), "F16", 32, True, "other"),
            **{name: Layout("int4", (), "F16", 32, True, "shared") for name in ("q_proj", "k_proj", "v_proj")},
        },
    },
    "mixed": {"weights": "int4", "changed": {"k_proj": QUANTISED, "up_proj": replace(QUANTISED, group=64)}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_implies_the_weights_of_its_graph(family: str) -> None:
    config = ModelConfig.from_json(FAMILIES[family])
    found = capture(family)
    assert structure.shapes(config) == {weight.sources[0]: weight.shape for weight in found.weights.values()}
    assert sorted(structure.body(config)) == sorted(formats.body(found))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_structure_equals_the_graph_after_all_passes(family: str, name: str) -> None:
    config = ModelConfig.from_json(FAMILIES[family])
    recipe = recipe_for(config, **RECIPES[name])
    found, planned = assigned(family, recipe), structure.Structure(config, recipe)
    assert planned.operators() == found.operators()

    program = Lowering(found, BuildOptions("int8", "auto", 256))
    program.run()
    matrices = {
        item.weight.sources: (item.weight.format, item.weight.group, item.weight.dtype, item.gated)
        for item in program.stored.values()
        if item.part == "weight"
    }
    stored = {matrix: planned.storage(matrix) for matrix in planned.matrices}
    assert matrices == {
        matrix.sources: (how.format, how.group, DTYPES[how.dtype], matrix.gated) for matrix, how in stored.items()
    }
    vectors = [value.shape[0] for value in program.program.parameters if value.name.endswith(":vector")]
    assert sum(map(int, vectors)) == sum(planned.vectors)
    orders = [value.shape[0] for value in program.program.parameters if value.name.endswith(":order")]
    assert sum(map(int, orders)) == planned.orders()


def test_every_operator_is_lowered_or_absorbed() -> None:
    config = ModelConfig.from_json(FAMILIES["minicpm"])
    planned = structure.Structure(config, recipe_for(config, **RECIPES["mixed"]))
    native = outline.CpuOutline().native(planned.operators())
    assert set(native) == {
        "arkinfer.add_rms_norm", "arkinfer.attention", "arkinfer.embedding", "arkinfer.linear", "arkinfer.swiglu",
        "aten.cat", "aten.index_select", "aten.mul.Tensor", "aten.rms_norm",
    }  # fmt: skip
