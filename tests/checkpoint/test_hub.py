"""Models of the hub through the real client, from a hub on the loopback interface, and from caches that it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from arkinfer.artifact import tensors
from arkinfer.artifact.tensors import TensorSpec
from arkinfer.checkpoint import BUNDLED, open_checkpoint
from arkinfer.checkpoint.hub import HubModel, parse_id
from arkinfer.cli import commands
from arkinfer.errors import UserError
from tests.checkpoint.fake_hub import COMMIT, FakeHub, serve


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "published"
    shutil.copytree(BUNDLED / "tiny-minicpm", folder)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a checkpoint ran')")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch, serve(folder, tmp_path / "cache", patch) as served:
        yield served


def split(folder: Path) -> list[str]:
    """Turn model.safetensors into two shards and an index; return their names."""
    single = folder / "model.safetensors"
    loaded = tensors.load(single)
    entries = tensors.read_header(single)
    names = sorted(name for name in entries if not name.startswith("~"))
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        specs = {name: TensorSpec(entries[name].dtype, entries[name].shape) for name in held}
        tensors.write(folder / shard, specs, iter([(name, [loaded[name]]) for name in held]))
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    single.unlink()
    return list(shards)


def refusal(model: str, **options: object) -> UserError:
    with pytest.raises(UserError) as caught:
        open_checkpoint(model, **options)  # type: ignore[arg-type]
    return caught.value


def test_fetches_weights_and_texts_but_never_code_or_pickles(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("owner/tiny")
    assert hub.fetched() == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert (checkpoint.name, checkpoint.source) == ("tiny", {"hub": "owner/tiny", "revision": COMMIT})
    local = open_checkpoint("tiny-minicpm")
    assert checkpoint.layouts() == local.layouts()
    name = "model.layers.0.mlp.up_proj.weight"
    assert (checkpoint.weight(name).rows(0, 9).weight == local.weight(name).rows(0, 9).weight).all()


def test_a_second_time_nothing_is_fetched(hub: FakeHub) -> None:
    open_checkpoint("owner/tiny")
    hub.log.clear()
    open_checkpoint("owner/tiny@main")
    assert hub.fetched() == set()
    hub.log.clear()
    open_checkpoint("owner/tiny", offline=True)
    assert not hub.log


def test_headers_alone_tell_the_layouts(hub: FakeHub) -> None:
    split(hub.folder)
    checkpoint = open_checkpoint("owner/tiny", headers_only=True)
    assert checkpoint.headers_only
    assert checkpoint.layouts() == open_checkpoint("tiny-minicpm").layouts()
    weights = [(name, part) for method, name, part in hub.log if method == "GET" and name.endswith("safetensors")]
    assert len(weights) == 4
    assert all(part is not None for _, part in weights)
    with pytest.raises(UserError, match="only its header was read"):
        checkpoint.weight("model.norm.weight").rows(0, 1)
    open_checkpoint("owner/tiny")
    assert open_checkpoint("owner/tiny", headers_only=True).weight("model.norm.weight").rows(0, 1).weight.shape == (1,)


@pytest.mark.parametrize("headers_only", [False, True])
def test_weight_files_of_another_name_without_an_index(hub: FakeHub, headers_only: bool) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "model_gptq.safetensors")
    checkpoint = open_checkpoint("owner/tiny", headers_only=headers_only)
    assert checkpoint.layouts() == open_checkpoint("tiny-minicpm").layouts()


def test_a_server_without_ranges_is_not_downloaded_whole(hub: FakeHub) -> None:
    hub.ranges = False
    error = refusal("owner/tiny", headers_only=True)
    assert "does not send parts" in error.message
    assert "build" in error.hint


def test_shards_that_the_index_names_are_checked(hub: FakeHub) -> None:
    shards = split(hub.folder)
    assert open_checkpoint("owner/tiny").layouts() == open_checkpoint("tiny-minicpm").layouts()
    held = Path(constants.HF_HUB_CACHE) / "models--owner--tiny" / "snapshots" / COMMIT / shards[1]
    blob = held.resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-8])  # as an interrupted copy of the cache leaves it
    error = refusal("owner/tiny")
    assert (error.code, shards[1] in error.message, str(blob) in error.hint) == ("ARK-E123", True, True)
    offline = refusal("owner/tiny", offline=True)
    assert (offline.code, shards[1] in offline.message) == ("ARK-E121", True)
    blob.unlink()
    held.unlink()
    missing = refusal("owner/tiny", offline=True)
    assert (missing.code, shards[1] in str(missing.facts)) == ("ARK-E123", True)
    assert open_checkpoint("owner/tiny").parameters == open_checkpoint("tiny-minicpm").parameters


def test_a_shard_that_was_never_uploaded(hub: FakeHub) -> None:
    shards = split(hub.folder)
    (hub.folder / shards[0]).unlink()
    error = refusal("owner/tiny")
    assert shards[0] in str(error.facts)
    assert not any(name.endswith("safetensors") for name in hub.fetched()), "nothing large is fetched in vain"


def test_a_transfer_that_ends_early(hub: FakeHub) -> None:
    hub.short.add("model.safetensors")
    error = refusal("owner/tiny")
    assert (error.code, "not fetched whole" in error.message) == ("ARK-E123", True)
    hub.short.clear()
    command, path = error.hint.splitlines()[0].split(" ", 1)
    assert command == "rm"
    Path(path).unlink()
    assert open_checkpoint("owner/tiny").weights


def test_only_pickles(hub: FakeHub) -> None:
    (hub.folder / "model.safetensors").unlink()
    error = refusal("owner/tiny")
    assert "pytorch_model.bin" in str(error.facts)
    assert "safe_serialization" in error.hint
    assert "pytorch_model.bin" not in hub.fetched()


def test_a_model_larger_than_the_disk(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 20, 1 << 20, 1000))
    error = refusal("owner/tiny")
    assert (error.code, "HF_HOME" in error.hint) == ("ARK-E163", True)
    assert "model.safetensors" not in hub.fetched()


def test_unknown_names(hub: FakeHub) -> None:
    assert "no folder owner/none" in refusal("owner/none").message
    assert "no revision v7" in refusal("owner/tiny@v7").message
    assert "another" in refusal("owner/tiny@v7", revision="v8").message
    assert "--revision" in refusal("tiny-minicpm", revision="v8").message
    assert "neither a folder" in refusal("./owner/tiny").message


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "--offline" in refusal("owner/tiny").hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refusal("owner/tiny")
    assert "not in the local cache" in error.message
    assert "HF_HUB_OFFLINE" in error.hint


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert refusal("owner/tiny").hint == "pip install 'arkinfer[hub]'"


def test_links_may_lead_into_the_models_own_cache_only(hub: FakeHub, tmp_path: Path) -> None:
    snapshot = open_checkpoint("owner/tiny").path
    assert open_checkpoint(snapshot).parameters, "a snapshot's path is a folder like any other"
    secret = tmp_path / "secret.json"
    shutil.copy(snapshot / "config.json", secret)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    for model in ("owner/tiny", str(snapshot)):
        error = refusal(model, offline=model == "owner/tiny")
        assert (error.code, str(secret) in str(error.facts)) == ("ARK-E162", True)


def test_inspect_through_the_command_line(hub: FakeHub) -> None:
    done = CliRunner().invoke(commands, ["inspect", "owner/tiny", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["hub"], facts["revision"], facts["model"]) == ("owner/tiny", COMMIT, "tiny")
    assert "model.safetensors" not in {name for _, name, part in hub.log if part is None and _ == "GET"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openbmb/MiniCPM4.1-8B", HubModel("openbmb/MiniCPM4.1-8B")),
        ("openbmb/MiniCPM4-0.5B@v1.0/x", HubModel("openbmb/MiniCPM4-0.5B", "v1.0/x")),
        ("a/b/c", None),
        ("../b", None),
        ("/a/b", None),
        ("a/..", None),
        ("a/b@../c", None),
        ("a", None),
        ("a/b@", None),
        ("a/b\n", None),
        (".a/b", None),
    ],
)
def test_what_a_hub_name_is(text: str, expected: HubModel | None) -> None:
    assert parse_id(text) == expected
