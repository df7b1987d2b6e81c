"""Hostile and damaged files, one case a rule: one clear error that names the file, before anything large is made."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from arkinfer.artifact.tensors import read_header
from arkinfer.checkpoint import open_checkpoint
from arkinfer.checkpoint.gguf_file import read_gguf
from arkinfer.config import ModelConfig
from arkinfer.errors import ArkError
from arkinfer.pipeline import lower
from arkinfer.quant.packed import read
from arkinfer.recipe import Recipe
from tests.checkpoints import CONFIGS, write_checkpoint

LIMIT = 32 << 20  # bytes that any refusal may allocate
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refusal(action: Callable[[], object]) -> ArkError:
    """Return the error that ``action`` raises, which must be an ArkError that allocated little."""
    tracemalloc.start()
    try:
        with pytest.raises(ArkError) as caught:
            action()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LIMIT
    assert "\n" not in caught.value.message
    caught.value.render().encode("utf-8")  # can be printed
    return caught.value


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": safetensors({}, length=100),
    "header of 2^63 bytes": safetensors({}, length=1 << 63),
    "header of 2^64 - 1 bytes": safetensors({}, length=(1 << 64) - 1),
    "header not JSON": safetensors(b"{x"),
    "header not UTF-8": safetensors(b'{"\xff": 1}'),
    "header a list": safetensors([]),
    "header a number": safetensors(3),
    "header nested deeply": safetensors(b"[" * 100_000),
    "tensor named twice": safetensors(b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}"),
    "entry a number": safetensors({"a": 3}, b"\0" * 8),
    "entry a list": safetensors({"a": []}, b"\0" * 8),
    "entry null": safetensors({"a": None}, b"\0" * 8),
    "no dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "unknown dtype": safetensors({"a": {**F32, "dtype": "F31"}}, b"\0" * 8),
    "dtype a list": safetensors({"a": {**F32, "dtype": ["F32"]}}, b"\0" * 8),
    "shape a text": safetensors({"a": {**F32, "shape": "22"}}, b"\0" * 8),
    "shape negative": safetensors({"a": {**F32, "shape": [-2]}}, b"\0" * 8),
    "shape a float": safetensors({"a": {**F32, "shape": [2.0]}}, b"\0" * 8),
    "shape true": safetensors({"a": {**F32, "shape": [2, True]}}, b"\0" * 8),
    "shape overflowing 64 bits": safetensors({"a": {**F32, "shape": [1 << 62, 1 << 62, 16]}}, b"\0" * 8),
    "shape beyond 64 bits": safetensors({"a": {**F32, "shape": [1 << 70, 0]}}, b"\0" * 8),
    "a thousand axes": safetensors({"a": {**F32, "shape": [1] * 1000}}, b"\0" * 8),
    "an integer of 10000 digits": safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b"]}}"),
    "one offset": safetensors({"a": {**F32, "data_offsets": [0]}}, b"\0" * 8),
    "three offsets": safetensors({"a": {**F32, "data_offsets": [0, 8, 8]}}, b"\0" * 8),
    "offsets backwards": safetensors({"a": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8),
    "offsets negative": safetensors({"a": {**F32, "data_offsets": [-8, 0]}}, b"\0" * 8),
    "shape larger than its range": safetensors({"a": {**F32, "shape": [3]}}, b"\0" * 8),
    "range past the end": safetensors({"a": F32}, b"\0" * 4),
    "bytes left over": safetensors({"a": F32}, b"\0" * 9),
    "hole before a tensor": safetensors({"a": {**F32, "data_offsets": [8, 16]}}, b"\0" * 16),
    "two tensors overlap": safetensors({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12),
    "two tensors in one place": safetensors({"a": F32, "b": F32}, b"\0" * 8),
    "name empty": safetensors({"": F32}, b"\0" * 8),
    "name with a line break": safetensors({"a\nb": F32}, b"\0" * 8),
    "name a lone surrogate": safetensors(b'{"\\ud800":' + json.dumps(F32).encode() + b"}", b"\0" * 8),
    "name of 100000 letters": safetensors({"a" * 100_000: F32}, b"\0" * 8),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors(case: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HEADERS[case])
    error = refusal(lambda: read_header(file))
    assert error.message.startswith("model.safetensors is not a sound safetensors file")


def test_mutated_safetensors_headers(tmp_path: Path) -> None:
    file, source = tmp_path / "model.safetensors", random.Random(11)
    names = {
        f"t{index}": {"dtype": "F16", "shape": [2, 3], "data_offsets": [12 * index, 12 * index + 12]}
        for index in range(4)
    }
    sound = safetensors(names, b"\0" * 48)
    tokens = [b"9" * 25, b"-1", b"null", b"{", b"]", b'"F64"', b"1e999", b"true", b'"\\ud800"', b"", b"0.5", b"[0,0]"]
    for _ in range(2000):
        data = bytearray(sound)
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(data))
            if source.random() < 0.5:
                data[place] = source.randrange(256)
            else:
                data[place : place + source.randint(0, 6)] = source.choice(tokens)
        if source.random() < 0.7:
            data[:8] = struct.pack("<Q", max(0, len(data) - 8 - 48))
        file.write_bytes(data)
        with suppress(ArkError):
            read_header(file)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sound"), CONFIGS["llama"])


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """Return a fresh folder with the sound checkpoint's files, the weights as hard links."""
    for file in sound.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


INDEX = "model.safetensors.index.json"
INDICES: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", INDEX),
    "not an object": ([], INDEX),
    "no map": ({}, "weight_map"),
    "map a list": ({"weight_map": []}, "weight_map"),
    "map empty": ({"weight_map": {}}, "weight_map"),
    "file a number": ({"weight_map": {"a": 3}}, "names a file"),
    "file in another folder": ({"weight_map": {"a": "../x.safetensors"}}, "names a file"),
    "absolute file": ({"weight_map": {"a": "/etc/x.safetensors"}}, "names a file"),
    "file a pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "names a file"),
    "file name empty": ({"weight_map": {"a": ""}}, "names a file"),
    "file name with a null": ({"weight_map": {"a": "x\0.safetensors"}}, "names a file"),
    "file missing": ({"weight_map": {"a": "x.safetensors"}}, "missing"),
    "tensor missing": ({"weight_map": {"a": "model.safetensors"}}, "no file holds"),
    "nested deeply": (b'{"weight_map":' * 50_000, INDEX),
}


@pytest.mark.parametrize("case", INDICES)
def test_index(case: str, folder: Path) -> None:
    content, words = INDICES[case]
    (folder / INDEX).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert words in refusal(lambda: open_checkpoint(folder)).message


CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "infinite layers": {"num_hidden_layers": float("inf")},
    "not a number of layers": {"num_hidden_layers": float("nan")},
    "half a layer": {"num_hidden_layers": 1.5},
    "layers true": {"num_hidden_layers": True},
    "no layers": {"num_hidden_layers": 0},
    "layers a text": {"num_hidden_layers": "2"},
    "negative width": {"hidden_size": -128},
    "absurd width": {"hidden_size": 1 << 40},
    "a width of 400 digits": {"hidden_size": 10**400},
    "absurd vocabulary": {"vocab_size": 1 << 60},
    "heads that do not divide": {"num_attention_heads": 3, "head_dim": None},
    "kv heads that do not divide": {"num_key_value_heads": 3},
    "odd heads": {"head_dim": 31},
    "an eps of 400 digits": {"rms_norm_eps": 10**400},
    "negative eps": {"rms_norm_eps": -1e-6},
    "eps infinite": {"rms_norm_eps": float("inf")},
    "architecture a number": {"architectures": 3},
    "architecture unknown": {"architectures": ["EvilForCausalLM"]},
    "rope a text": {"rope_scaling": "yarn"},
    "rope of an unknown kind": {"rope_scaling": {"type": "sorcery"}},
    "rope kind a list": {"rope_scaling": {"type": ["yarn"]}},
    "rope factors too few": {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
    "rope factor infinite": {"rope_scaling": {"type": "linear", "factor": float("inf")}},
    "token id a text": {"eos_token_id": "2"},
    "dtype unknown": {"torch_dtype": "float8"},
}


@pytest.mark.parametrize("case", CONFIG_CHANGES)
def test_config(case: str) -> None:
    raw = json.loads(json.dumps({**CONFIGS["llama"], **CONFIG_CHANGES[case]}))
    refusal(lambda: ModelConfig.from_json(raw))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 4000}, "lacks"),
        ({"hidden_size": 256}, "shape"),
        ({"vocab_size": 1 << 24}, "shape"),
        ({"intermediate_size": 1 << 20}, "shape"),
        ({"tie_word_embeddings": None, "mlp_bias": True}, "lacks"),
    ],
)
def test_a_config_of_another_size_is_refused_before_a_graph_is_made(
    changes: dict[str, Any], words: str, folder: Path
) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**CONFIGS["llama"], **changes}))
    checkpoint = open_checkpoint(folder)
    recipe = Recipe("fp32", "float", checkpoint.layouts())
    error = refusal(lambda: lower(checkpoint.config, 64, recipe, checkpoint.layouts(), "fp32"))
    assert words in error.message


def test_files_that_are_no_files(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # opening it would wait for ever
    assert "not a regular file" in refusal(lambda: open_checkpoint(folder)).message


def test_links_that_leave_the_folder(sound: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(sound / "model.safetensors")
    error = refusal(lambda: open_checkpoint(folder))
    assert (error.code, "model.safetensors" in error.message) == ("ARK-E162", True)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    assert "broken link" in refusal(lambda: open_checkpoint(folder)).message
    (folder / "model.safetensors").unlink()
    os.link(sound / "model.safetensors", folder / "other.safetensors")
    (folder / "model.safetensors").symlink_to("other.safetensors")
    assert open_checkpoint(folder).weights, "links within the folder are followed"


def test_a_json_file_of_a_terabyte(folder: Path) -> None:
    (folder / "config.json").unlink()
    with (folder / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)
    assert "too long" in refusal(lambda: open_checkpoint(folder)).message


def test_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refusal(lambda: open_checkpoint(folder))
    assert "pytorch_model.bin" in str(error.facts)
    assert "safe_serialization" in error.hint
    file = refusal(lambda: open_checkpoint(folder / "pytorch_model.bin"))
    assert "safe_serialization" in file.hint


def test_a_file_that_shrinks_after_its_header_was_read(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(data)
    weight = open_checkpoint(folder).weight("lm_head.weight")
    os.truncate(folder / "model.safetensors", 4096)
    assert "became shorter" in refusal(lambda: read(weight, 0, 400)).message


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def entry(name: str = "t", shape: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(keys: list[bytes], tensors: list[bytes], data: int = 64, version: int = 3, counts: Any = None) -> bytes:
    first = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(keys))))
    head = first + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


ARCH = key("general.architecture", 8, text("llama"))
BIG = (1 << 64) - 1
GGUFS: dict[str, bytes] = {
    "empty file": b"",
    "another signature": b"GGML" + b"\0" * 60,
    "signature alone": b"GGUF",
    "version 1": gguf([], [], version=1),
    "version 4": gguf([], [], version=4),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + b"\0" * 64,
    "2^64 - 1 tensors": gguf([], [], counts=(BIG, 0)),
    "2^64 - 1 keys": gguf([], [], counts=(0, BIG)),
    "more keys than there are": gguf([ARCH], [], counts=(0, 9)),
    "more tensors than there are": gguf([], [entry()], counts=(90, 0)),
    "key of 2^64 - 1 bytes": gguf([struct.pack("<Q", BIG)], []),
    "key of 600 bytes": gguf([key("k" * 600, 4, b"\0" * 4)], []),
    "key empty": gguf([key("", 4, b"\0" * 4)], []),
    "key not UTF-8": gguf([key(b"\xff\xfe", 4, b"\0" * 4)], []),
    "key with a line break": gguf([key("a\nb", 4, b"\0" * 4)], []),
    "key twice": gguf([ARCH, ARCH], []),
    "value of an unknown type": gguf([key("a", 13, b"\0" * 8)], []),
    "value of type 2^32 - 1": gguf([key("a", (1 << 32) - 1, b"\0" * 8)], []),
    "text longer than the file": gguf([key("a", 8, struct.pack("<Q", 1 << 20))], []),
    "text of 2^64 - 1 bytes": gguf([key("a", 8, struct.pack("<Q", BIG))], []),
    "text not UTF-8": gguf([key("a", 8, text(b"\x80"))], []),
    "a truth of 7": gguf([key("a", 7, b"\7")], []),
    "array of 2^64 - 1 items": gguf([key("a", 9, struct.pack("<IQ", 4, BIG))], []),
    "array of 4 million numbers": gguf([key("a", 9, struct.pack("<IQ", 4, 1 << 22))], []),
    "array of 4 million texts": gguf([key("a", 9, struct.pack("<IQ", 8, 1 << 22))], []),
    "array of arrays": gguf([key("a", 9, struct.pack("<IQ", 9, 1))], []),
    "array of an unknown type": gguf([key("a", 9, struct.pack("<IQ", 99, 1))], []),
    "array of truths of 7": gguf([key("a", 9, struct.pack("<IQ", 7, 1) + b"\7")], []),
    "alignment 0": gguf([key("general.alignment", 4, struct.pack("<I", 0))], []),
    "alignment 33": gguf([key("general.alignment", 4, struct.pack("<I", 33))], []),
    "alignment 2^31": gguf([key("general.alignment", 4, struct.pack("<I", 1 << 31))], []),
    "alignment a text": gguf([key("general.alignment", 8, text("32"))], []),
    "tensor twice": gguf([], [entry(), entry(offset=32)]),
    "tensor without axes": gguf([], [text("t") + struct.pack("<IIQ", 0, 0, 0)]),
    "tensor of 2^32 - 1 axes": gguf([], [text("t") + struct.pack("<I", (1 << 32) - 1)]),
    "tensor of 5 axes": gguf([], [entry(shape=(1, 1, 1, 1, 1))]),
    "tensor without elements": gguf([], [entry(shape=(0,))]),
    "tensor of 2^64 - 1 elements": gguf([], [entry(shape=(BIG,))]),
    "tensor overflowing 64 bits": gguf([], [entry(shape=(1 << 33, 1 << 33))]),
    "tensor of an unknown type": gguf([], [entry(kind=999)]),
    "tensor of half a block": gguf([], [entry(shape=(33,), kind=2)]),
    "tensor not aligned": gguf([], [entry(offset=4)]),
    "tensor past the end": gguf([], [entry(offset=1 << 20)]),
    "tensor at 2^64 - 32": gguf([], [entry(offset=BIG - 31)]),
    "tensors overlap": gguf([], [entry("a", (16,)), entry("b", (16,), offset=32)]),
    "tensor name empty": gguf([], [entry("")]),
}


@pytest.mark.parametrize("case", GGUFS)
def test_gguf(case: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(GGUFS[case])
    error = refusal(lambda: read_gguf(file))
    assert error.code in ("ARK-E165", "ARK-E166")
    assert "model.gguf" in error.message + str(error.facts)


def number(name: str, value: int) -> bytes:
    return key(f"llama.{name}", 4, struct.pack("<I", value))


SHAPE = [
    ARCH, number("block_count", 1), number("embedding_length", 32), number("attention.head_count", 2),
    number("feed_forward_length", 32), number("context_length", 64),
    key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
]  # fmt: skip
EMBEDDING = entry("token_embd.weight", (32, 4))
MODELS: dict[str, bytes] = {
    "no architecture": gguf([], []),
    "architecture a number": gguf([key("general.architecture", 4, b"\0" * 4)], []),
    "architecture unknown": gguf([key("general.architecture", 8, text("evil"))], []),
    "no sizes": gguf([ARCH], [EMBEDDING], 512),
    "no embedding": gguf(SHAPE, []),
    "embedding a vector": gguf(SHAPE, [entry("token_embd.weight", (32,))], 512),
    "a size a text": gguf([*SHAPE[:2], key("llama.embedding_length", 8, text("32"))], [EMBEDDING], 512),
    "2^32 - 1 layers": gguf([ARCH, number("block_count", (1 << 32) - 1), *SHAPE[2:]], [EMBEDDING], 512),
    "experts": gguf([*SHAPE, number("expert_count", 8)], [EMBEDDING], 512),
    "layers of different sizes": gguf(
        [*SHAPE, key("llama.attention.head_count_kv", 9, struct.pack("<IQII", 4, 2, 1, 2))], [EMBEDDING], 512
    ),
    "rope factors too many": gguf(SHAPE, [EMBEDDING, entry("rope_freqs.weight", (2048,), offset=512)], 16384),
    "rope factors one list": gguf(SHAPE, [EMBEDDING, entry("rope_factors_long.weight", (8,), offset=512)], 1024),
    "rope factors zero": gguf(SHAPE, [EMBEDDING, entry("rope_freqs.weight", (8,), offset=512)], 1024),
    "rope scaling unknown": gguf([*SHAPE, key("llama.rope.scaling.type", 8, text("magic"))], [EMBEDDING], 512),
    "unknown tensor": gguf(SHAPE, [EMBEDDING, entry("blk.0.evil.weight", (2,), offset=512)], 1024),
    "q rows that no head has": gguf(SHAPE, [EMBEDDING, entry("blk.0.attn_q.weight", (32, 7), offset=512)], 4096),
    "a weight of three axes": gguf(SHAPE, [EMBEDDING, entry("blk.0.ffn_up.weight", (2, 2, 2), offset=512)], 1024),
}


@pytest.mark.parametrize("case", MODELS)
def test_gguf_model(case: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(MODELS[case])
    refusal(lambda: open_checkpoint(tmp_path / "model.gguf"))


def test_mutated_gguf_headers(tmp_path: Path) -> None:
    file, source = tmp_path / "model.gguf", random.Random(12)
    tensors = [EMBEDDING, entry("blk.0.attn_q.weight", (32, 32), 8, 512), entry("output_norm.weight", (32,), 0, 1600)]
    sound = gguf(SHAPE, tensors, 4096)
    head = len(sound) - 4096
    for _ in range(1500):
        data = bytearray(sound)
        for _ in range(source.randint(1, 4)):
            place = source.randrange(4, head)
            if source.random() < 0.5:
                data[place] = source.randrange(256)
            else:
                width = source.choice([4, 8])
                value = source.choice([0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), 1 << 31, 9, 8])
                data[place : place + width] = value.to_bytes(width, "little")
        file.write_bytes(data[: source.choice([len(data), len(data), source.randrange(len(data))])])
        with suppress(ArkError):
            checkpoint = open_checkpoint(file)
            for weight in checkpoint.weights.values():
                weight.rows(0, 1)
            checkpoint.asset("tokenizer.json")
