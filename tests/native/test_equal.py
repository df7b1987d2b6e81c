"""The runner computes what the Python runtime computes: logits bit for bit, the same text, the same random choices."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import arkinfer
from arkinfer import backends
from arkinfer.artifact import Artifact
from arkinfer.runtime.sampling import Sampler, Sampling
from examples.needle import retrieve
from tests.native import capi
from tests.native.conftest import Build

GOLDEN = json.loads((Path(__file__).parents[1] / "pipeline" / "golden.json").read_text(encoding="utf-8"))
EXACT = {"tiny-minicpm": "fp32", "tiny-bitcpm": "ternary"}  # what golden.json was written with
PROMPT = [5, 9, 300, 41, 77]


@pytest.mark.parametrize("model", EXACT)
def test_golden_text(model: str, build: Build, library: capi.Library) -> None:
    artifact = build(model, weights=EXACT[model], activations="float", kv="fp32")
    with arkinfer.load(artifact.path) as engine:
        prompt = engine.prepare(GOLDEN["messages"], {"thinking": False}).ids
        for threads in (1, 2):
            native = library.open(artifact.path, threads)
            session = native.session()
            text = engine.tokenizer.decode(session.generate(prompt, 120))
            assert text == GOLDEN[model]
            session.close()
            native.close()


@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_bit_for_bit(kv: str, threads: int, build: Build, library: capi.Library) -> None:
    """However tokens are cut, for steps larger and smaller than the runner's own, one token and many."""
    artifact = build("tiny-minicpm", kv=kv)
    tokens = np.random.default_rng(3).integers(0, 2048, 300).tolist()
    executor = backends.open(artifact, threads=2)
    expected = executor.step(tokens, executor.new_state(320), "all")
    executor.close()
    engine = library.open(artifact.path, threads, chunk=[0, 37][threads - 1])
    session = engine.session(320)
    found, cuts = [], [0, 1, 2, 35, 200, 201, 300]
    for start, stop in itertools.pairwise(cuts):
        found.append(session.step(tokens[start:stop]))
    assert np.array_equal(np.concatenate(found), expected)
    session.truncate(120)
    assert np.array_equal(session.step(tokens[120:300], capi.LAST), expected[299:])
    session.truncate(64)
    twin = session.fork()
    assert twin.length == 64
    session.step(tokens[:60])
    assert np.array_equal(twin.step(tokens[64:90]), expected[64:90])
    for item in (twin, session):
        item.close()
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "top_p": 1, "seed": 1},
        {"temperature": 1.3, "top_k": 20, "top_p": 1, "seed": 2**40 + 3},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 3},
        {"temperature": 0.7, "top_p": 0.5, "min_p": 0.1, "seed": 0},
        {"temperature": 2.0, "top_p": 1, "min_p": 0.02, "seed": 17},
    ],
)
def test_same_seed_same_tokens(options: dict[str, float], tiny: Artifact, library: capi.Library) -> None:
    with arkinfer.load(tiny.path) as engine:
        expected = engine.generate(PROMPT, max_tokens=60, **options).tokens  # type: ignore[arg-type]
    native = library.open(tiny.path)
    session = native.session()
    assert tuple(session.generate(PROMPT, 60, **options)) == expected
    session.close()
    native.close()


def test_sampling_of_made_logits(library: capi.Library) -> None:
    """Ties, infinities and long rows, 200 draws each."""
    random = np.random.default_rng(5)
    rows = [
        random.standard_normal(5000).astype(np.float32) * 4,
        np.round(random.standard_normal(700)).astype(np.float32),  # many equal
        np.where(random.random(900) < 0.5, -np.inf, random.standard_normal(900)).astype(np.float32),
        np.zeros(65, np.float32),
    ]
    for logits in rows:
        for choice in ({}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.6}, {"min_p": 0.3}):
            sampler = Sampler(Sampling(temperature=0.9, seed=11, **choice), logits.size, [])  # type: ignore[arg-type]
            state = capi.Random()
            library.seed(state, 11)
            sampling = capi.Sampling(temperature=0.9, **choice)
            assert [library.sample(logits, sampling, state) for _ in range(200)] == [
                sampler(logits) for _ in range(200)
            ]


def test_needle_with_sparse_attention(build: Build, library: capi.Library) -> None:
    """Every hidden value is found in 16K tokens; in the first 4K logits are the Python runtime's to the bit."""
    length = 16384
    artifact = build("needle", context=length + 64)
    tokens, answers = retrieve.haystack(length)
    engine = library.open(artifact.path, attention="sparse", chunk=512)
    session = engine.session()
    executor = backends.open(artifact, attention="sparse")
    state = executor.new_state(4096)
    executor.step(tokens[:4000], state, "none")
    session.step(tokens[:4000], capi.NONE)
    assert np.array_equal(session.step(tokens[4000:4090]), executor.step(tokens[4000:4090], state, "all"))
    executor.close()
    session.step(tokens[4090:], capi.NONE)
    found = {}
    for key in answers:
        session.truncate(length)
        value = int(session.step([key], capi.LAST).argmax())
        found[key] = value if int(session.step([value], capi.LAST).argmax()) == 2 else -1
    assert found == answers
    session.close()
    engine.close()
