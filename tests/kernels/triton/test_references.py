"""The torch references of the CUDA kernels, launched one after another, against the model's own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.artifact.plan import evaluate
from arkinfer.config import SparseConfig
from arkinfer.errors import UnsupportedError
from arkinfer.exporters.kernels import triton as kernels
from arkinfer.exporters.kernels.triton import layout
from arkinfer.ops import attention
from arkinfer.quant.packed import Packed, dequantise, pack_crumbs, pack_nibbles
from arkinfer.runtime import sampling
from tests.kernels.triton import draws

HEADS, KV_HEADS, DIM, CONTEXT = 6, 2, 16, 320
SHAPE = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "context": CONTEXT}
SPARSE = SparseConfig(
    kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=3, dense_len=150
)


@given(
    format=st.sampled_from(["int8", "int4", "int2", "ternary"]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 48, 128, 0]),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(format: str, rows: int, groups: int, group: int, zeros: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = (group or 36) * groups
    levels = {"int8": 256, "int4": 16, "int2": 4, "ternary": 3}[format]
    codes = torch.randint(0, levels, (rows, width), generator=generator, dtype=torch.uint8)
    pack = {"int8": lambda c: (c.int() - 128).to(torch.int8), "int4": pack_nibbles}.get(format, pack_crumbs)
    count = groups if group else 1
    packed = Packed(
        format,
        group,
        (rows, width),
        pack(codes),
        torch.rand(rows, count, generator=generator).half(),
        torch.randint(0, levels, (rows, count), generator=generator, dtype=torch.uint8) if zeros else None,
    )
    parts = layout.pack(packed)
    assert parts["weight"].shape == (rows, layout.words(format, width))
    back = layout.canonical(format, group, packed.shape, **parts)
    assert torch.equal(back.weight, packed.weight)
    assert torch.equal(layout.dequantise(format, group, width, **parts), dequantise(packed))


def test_what_the_kernels_cannot_read_is_refused() -> None:
    codes = pack_nibbles(torch.zeros(1, 40, dtype=torch.uint8))
    with pytest.raises(UnsupportedError, match="steps of 16"):
        layout.pack(Packed("int4", 8, (1, 40), codes, torch.ones(1, 5)))
    options = {"heads": 64, "kv_heads": 64, "head_dim": 256, "context": 131072}
    with pytest.raises(UnsupportedError, match="more than") as error:
        kernels.kernel("rope_append").variant(kernels.kernel("rope_append").parse(options), "sm_89")
    context = int(error.value.hint.split()[1])
    kernels.kernel("rope_append").variant(kernels.kernel("rope_append").parse({**options, "context": context}), "sm_89")


def test_rows_pack_alone_as_they_do_together() -> None:
    codes = torch.randint(0, 16, (6, 96), dtype=torch.uint8)
    whole = Packed("int4", 32, (6, 96), pack_nibbles(codes), torch.rand(6, 3))
    part = Packed("int4", 32, (2, 96), whole.weight[2:4], whole.scales[2:4])  # type: ignore[index]
    for name, value in layout.pack(part).items():
        assert torch.equal(value, layout.pack(whole)[name][2:4])


class Layer:
    """One attention layer as an artifact runs it: the kernels' references over caches that persist."""

    def __init__(self, kv: str, dense_len: int) -> None:
        self.kv, self.dense_len, self.scale = kv, dense_len, DIM**-0.5
        cache = layout.TORCH[kv]
        angles = torch.arange(CONTEXT)[:, None] * 0.6 ** torch.arange(DIM // 2)
        self.known: dict[str, Any] = {
            "cos": angles.cos(),
            "sin": angles.sin(),
            "k": torch.zeros(CONTEXT, KV_HEADS, DIM, dtype=cache),
            "v": torch.zeros(CONTEXT, KV_HEADS, DIM, dtype=cache),
            "k_scale": torch.zeros(CONTEXT, KV_HEADS),
            "v_scale": torch.zeros(CONTEXT, KV_HEADS),
            "fine": torch.zeros(CONTEXT // 4, KV_HEADS, DIM, dtype=torch.float16),
            "coarse": torch.zeros(CONTEXT // 16, KV_HEADS, DIM, dtype=torch.float16),
        }
        self.length = 0

    def launch(self, name: str, options: dict[str, Any], n: int, **renamed: str) -> None:
        kernel = kernels.kernel(name)
        parsed = kernel.parse(options)
        given = {}
        for argument in kernel.arguments(parsed):
            source = renamed.get(argument.name, argument.name)
            shape = tuple(evaluate(extent, {"n": n, "r": 1, "c": CONTEXT}) for extent in argument.shape)
            if argument.role == "out":
                self.known[source] = torch.full(shape, 77, dtype=layout.TORCH[argument.dtype])
            given[argument.name] = n if argument.role == "scalar" else self.known[source]
            if argument.role != "scalar":
                assert given[argument.name].shape == shape, (name, argument.name)
        kernel.reference(parsed, given, n, 1)

    def step(self, qkv: torch.Tensor) -> torch.Tensor:
        n = qkv.shape[0]
        control = torch.zeros(16, dtype=torch.int32)
        control[:3] = torch.tensor([self.length, self.dense_len, n])
        self.known |= {"qkv": qkv, "control": control}
        kv, windows = {"kv": self.kv}, {"kernel_size": 8, "kernel_stride": 4}
        attend = {**SHAPE, **kv, "scale": self.scale, "budget": SPARSE.budget, "block": 16}
        select = {**SHAPE, **windows, "scale": self.scale, "block_size": 16, "init_blocks": 1, "local_blocks": 2}
        select |= {"budget": SPARSE.budget, "splits": 3}
        self.launch("rope_append", {**SHAPE, **kv}, n)
        self.launch("compress", {"kv_heads": KV_HEADS, "head_dim": DIM, "context": CONTEXT, **windows, **kv}, n)
        self.launch("select_lse", select, n, keys="coarse")
        self.launch("select_scores", select, n)
        self.launch("select_blocks", select, n)
        if n == 1:
            self.launch("attention_decode", {**attend, "splits": 2}, n)
            self.launch("attention_combine", {**attend, "splits": 2}, n, lse="lse")
        else:
            out = torch.zeros(n, HEADS, DIM, dtype=torch.float16)
            for name in ("attention_prefill", "attention_sparse"):
                self.launch(name, attend, n, out=name)
                written = self.known["counts"][:, 0] < 0
                out = torch.where((written if name == "attention_prefill" else ~written)[:, None, None],
                                  self.known[name], out)  # fmt: skip
            self.known["out"] = out
        self.length += n
        out_of_step: torch.Tensor = self.known["out"]
        return out_of_step


@pytest.mark.parametrize("kv", ["float16", "int8"])
@pytest.mark.parametrize("chunks", [[130, 70, 1, 1, 30, 1], [1, 1, 200, 33]])
def test_a_layer_equals_the_operator(kv: str, chunks: list[int]) -> None:
    """Dense rows, sparse rows, the switch between them within a step, and single tokens."""
    torch.manual_seed(sum(chunks))
    layer = Layer(kv, SPARSE.dense_len)
    cache = attention.LayerCache(
        *(torch.zeros(KV_HEADS, CONTEXT, DIM, dtype=layout.TORCH[kv]) for _ in range(2)),
        *(torch.zeros(KV_HEADS, size, DIM, dtype=torch.float16) for size in (79, 19, 0)),
        *((torch.zeros(KV_HEADS, CONTEXT), torch.zeros(KV_HEADS, CONTEXT)) if kv == "int8" else (None, None)),
    )
    for n in chunks:
        start = layer.length
        qkv = torch.randn(n, (HEADS + 2 * KV_HEADS) * DIM).half()
        got = layer.step(qkv)
        parts = qkv.float().view(n, -1, DIM)
        cos, sin = (layer.known[name][start : start + n, None] for name in ("cos", "sin"))
        first, second = parts.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        q, k = turned[:, :HEADS].half(), turned[:, HEADS:-KV_HEADS]
        positions = torch.arange(start, start + n)
        want = attention.attention(q, k, parts[:, -KV_HEADS:], cache, positions, layer.scale, SPARSE)
        assert torch.allclose(got.float(), want.float(), atol=2e-3)
        assert torch.equal(layer.known["k"].transpose(0, 1), cache.k)
        assert torch.equal(layer.known["fine"][:79].transpose(0, 1), cache.fine)
    assert layer.length > SPARSE.dense_len


@given(
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    number=st.floats(0, 0.9999),
    seed=st.integers(0, 10000),
)
@settings(max_examples=25, deadline=None)
def test_a_draw_is_the_sampler_s(temperature: float, top_k: int, top_p: float, number: float, seed: int) -> None:
    logits = torch.randn(4500, generator=torch.Generator().manual_seed(seed)) * 4
    logits[::9] = (logits[::9] * 2).round() / 2  # equal ones
    known = draws.start(logits, temperature, top_k, top_p, number)
    for _ in draws.launches(known):
        pass
    options = sampling.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ids, weights = sampling.distribution(logits.numpy(), options)
    got = int(known["token"][0])
    assert got in ids
    # Where the running sum passes the number; a bound within rounding of it may fall to either side.
    place = ids.tolist().index(got)
    below = float(weights[:place].sum())
    assert below - 1e-5 <= float(known["random"][3]) <= below + float(weights[place]) + 1e-5
    assert int(known["control"][0]) == 4
    assert int(known["tokens"][0]) == got
