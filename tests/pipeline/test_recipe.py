"""Which format each weight gets: by target, command line and rules, on checkpoints that are quantised or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer import pipeline, targets
from arkinfer.checkpoint import open_checkpoint
from arkinfer.checkpoint.stored import Layout, Parts, StoredWeight
from arkinfer.errors import UserError
from arkinfer.passes import formats
from arkinfer.recipe import GROUPS, HEADS, RULES, Recipe, Rounding, Rule, choose
from tests.checkpoints import CONFIGS, write_checkpoint

TYPES = {"llama": CONFIGS["llama"], "tied": CONFIGS["qwen3"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: write_checkpoint(root / name, raw) for name, raw in TYPES.items()}
    found["ternary"] = write_checkpoint(root / "ternary", CONFIGS["minicpm"], ternary=64)
    return found


class Relabelled(StoredWeight):
    """A weight whose headers say that it is quantised; nobody reads it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @property
    def nbytes(self) -> int:
        return 0

    def rows(self, start: int, stop: int) -> Parts:
        raise AssertionError("a recipe is chosen by layouts alone")


def decide(folder: Path, weights: str = "auto", stored: dict[str, Layout] | None = None, **wishes: Any) -> Recipe:
    """Choose a recipe as a build does; ``stored`` relabels weights of the checkpoint."""
    checkpoint = open_checkpoint(folder)
    checkpoint.weights = {
        **checkpoint.weights,
        **{name: Relabelled(layout) for name, layout in (stored or {}).items()},
    }
    body = [name for name in checkpoint.weights if name.endswith("_proj.weight")]
    rounding = Rounding.of(targets.load("cpu").defaults, **wishes)
    return choose(weights, "int8", body, checkpoint.weights, checkpoint, rounding=rounding)


def found(recipe: Recipe, name: str) -> str:
    storage = recipe.stored(name, "_proj" not in name)
    return f"{storage.format}:{storage.group}" if storage.format != "dense" else storage.dtype


DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_group_and_head_decide_where_no_rule_does(folders: dict[str, Path]) -> None:
    recipe = decide(folders["llama"], "int4", group=32, head="int4", rules=["layers.0.*=int8:64", "*.q_proj.*=fp16"])
    names = (DOWN, QUERY, HEAD, EMBEDDING)
    assert [found(recipe, name) for name in names] == ["int4:32", "int8:64", "int4:32", "int4:32"]
    plain = decide(folders["llama"], "int4")
    assert [found(plain, name) for name in names] == ["int4:64", "int4:64", "int8:128", "int8:128"]
    # 192 inputs: the largest group that divides them.
    assert found(decide(folders["llama"], "int4", group=128), DOWN) == "int4:96"
    assert found(decide(folders["llama"], "int8", head="int4"), HEAD) == "int4:64"


def test_the_first_rule_that_matches_counts(folders: dict[str, Path]) -> None:
    rules = ["model.layers.1.*=fp32", "*.down_proj.*=int4:32", "lm_head.*=fp16"]
    recipe = decide(folders["llama"], "int8", rules=rules)
    assert found(recipe, DOWN) == "BF16"
    assert found(recipe, DOWN.replace("1", "0")) == "int4:32"
    assert found(recipe, HEAD) == "F16"
    assert found(recipe, QUERY) == "int8:128"
    assert Recipe.from_dict("int8", recipe.activations, recipe.to_dict()) == recipe


def test_rules_are_read_from_text() -> None:
    assert Rule.parse("*.q_proj.*=int4:32") == Rule("*.q_proj.*", "int4", 32)
    assert Rule.parse("a=b=fp16") == Rule("a=b", "fp16")
    for text in ("", "int4", "=int4", "x=", "x=int5", "x=int4:", "x=int4:48", "x=fp16:32", "x=ternary", "x=int4:32:32"):
        with pytest.raises(UserError, match="not a rule") as caught:
            Rule.parse(text)
        assert caught.value.code == "ARK-E136" and "--rule" in caught.value.hint


@given(st.text(min_size=1), st.sampled_from(RULES), st.sampled_from((0, *GROUPS)))
@settings(max_examples=50, deadline=None)
def test_a_rules_text_is_the_rule(pattern: str, weights: str, group: int) -> None:
    rule = Rule(pattern, weights, group if weights in HEADS else 0)
    assert Rule.parse(str(rule)) == rule


def test_a_rule_that_matches_nothing_shows_the_nearest(folders: dict[str, Path]) -> None:
    for rule, near in (("*.downproj.*=int4", "mlp.down_proj"), ("layer.1.*=int8", "layers.1."), ("*norm*=fp16", "")):
        with pytest.raises(UserError, match="matches no weight") as caught:
            decide(folders["llama"], rules=[rule])
        assert near in str(caught.value.facts["nearest"])
    with pytest.raises(UserError, match="matches no weight") as caught:
        decide(folders["tied"], rules=["lm_head.*=int4"])


@pytest.mark.parametrize(
    ("weights", "wishes"),
    [
        ("int8", {"group": 32}),
        ("fp16", {"head": "int8"}),
        ("int4", {"group": 32, "head": "int8", "rules": ["*=int4:64"]}),
        ("int4", {"head": "int4", "rules": ["*embed*=fp16", "lm_head*=fp16"]}),
    ],
)
def test_a_wish_without_effect_is_refused(folders: dict[str, Path], weights: str, wishes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="changes nothing"):
        decide(folders["llama"], weights, **wishes)


def test_unknown_words_are_named() -> None:
    defaults = targets.load("cpu").defaults
    for wishes in ({"group": 48}, {"head": "int5"}, {"method": "serach"}):
        with pytest.raises(UserError, match="unknown") as caught:
            Rounding.of(defaults, **wishes)  # type: ignore[arg-type]
        assert caught.value.hint


def test_integers_of_the_checkpoint_are_kept_or_multiplied_out_but_not_rounded_again(folders: dict[str, Path]) -> None:
    shape = open_checkpoint(folders["llama"]).weights[DOWN].layout.shape
    stored = {DOWN: Layout("int4", shape, "F16", group=64, zeros=True, scheme="gptq", bits=4)}
    assert found(decide(folders["llama"], stored=stored), DOWN) == "int4:64"
    assert found(decide(folders["llama"], stored=stored, rules=["*.down_proj.*=int4"]), DOWN) == "int4:64"
    assert found(decide(folders["llama"], stored=stored, rules=["*.down_proj.*=fp16"]), DOWN) == "F16"
    for rule in ("*.down_proj.*=int8", "*.down_proj.*=int4:32"):
        with pytest.raises(UserError, match="again") as caught:
            decide(folders["llama"], stored=stored, rules=[rule])
        assert caught.value.code == "ARK-E129" and caught.value.facts["weight"] == DOWN
    # The others may be rounded as one likes where a rule takes the quantised ones out.
    recipe = decide(folders["llama"], "int8", stored=stored, rules=["layers.1.mlp.down*=fp16"])
    assert (found(recipe, DOWN), found(recipe, QUERY)) == ("F16", "int8:128")


def test_matrices_that_a_quantised_checkpoint_left_as_floats_take_the_targets_default(folders: dict[str, Path]) -> None:
    shape = open_checkpoint(folders["llama"]).weights[DOWN].layout.shape
    stored = {DOWN: Layout("int4", shape, "F16", group=64, scheme="gptq", bits=4)}
    recipe = decide(folders["llama"], stored=stored)
    assert (recipe.weights, found(recipe, DOWN), found(recipe, QUERY)) == ("int4", "int4:64", "int8:128")
    assert Recipe.from_dict(recipe.weights, recipe.activations, recipe.to_dict()) == recipe
    assert found(decide(folders["llama"], "int4", stored=stored), QUERY) == "int4:64"


def test_a_rule_goes_before_the_recognition_of_ternary_weights(folders: dict[str, Path]) -> None:
    recipe = decide(folders["ternary"], rules=["*.down_proj.*=int8", "*.q_proj.*=fp32"])
    assert (recipe.weights, found(recipe, DOWN), found(recipe, QUERY)) == ("ternary", "int8:96", "BF16")
    assert found(recipe, QUERY.replace("q_proj", "o_proj")) == "ternary:64"


def test_the_command_line_goes_before_the_targets_defaults(tmp_path: Path) -> None:
    target = tmp_path / "board.yaml"
    target.write_text('extends: cpu\ndefaults: {group: 32, head: int4, rules: ["*.v_proj.*=int8", "*=int4:64"]}\n')
    defaults = targets.load(target).defaults
    rounding = Rounding.of(defaults)
    assert (rounding.group, rounding.head, len(rounding.rules), rounding.stated) == (32, "int4", 2, frozenset())
    rounding = Rounding.of(defaults, group=128, rules=["*=int8"])
    assert (rounding.group, rounding.head, rounding.rules) == (128, "int4", (Rule("*", "int8"),))
    assert rounding.stated == {"group"}


def test_a_graph_holds_what_the_recipe_says(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["llama"])
    rounding = Rounding.of(targets.load("cpu").defaults, rules=["*.k_proj.*=int4:32", "*.up_proj.*=fp16"])

    def recipe(graph: Any) -> Recipe:
        names = [source for weight in graph.weights.values() for source in weight.sources]
        return choose("int8", "int8", formats.body(graph), names, checkpoint, rounding=rounding)

    lowered = pipeline.lower(checkpoint.config, 256, recipe, checkpoint.layouts(), "fp32")
    stored = {source: weight for weight in lowered.graph.weights.values() for source in weight.sources}
    layer = "model.layers.0"
    assert stored[f"{layer}.self_attn.k_proj.weight"].group == 32
    assert stored[f"{layer}.self_attn.k_proj.weight"].sources == (f"{layer}.self_attn.k_proj.weight",)
    assert stored[f"{layer}.mlp.up_proj.weight"].format == "dense"
    assert stored[f"{layer}.mlp.gate_proj.weight"].format == "int8"
