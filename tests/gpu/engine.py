"""The whole engine on the GPU: token by token what the torch reference wrote, and every needle of a long haystack."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from arkinfer import backends
from arkinfer.artifact import Artifact
from arkinfer.interpreter import PlanInterpreter
from arkinfer.parity import divergence
from examples.needle import retrieve

Row = dict[str, Any]
NEAR = 0.05  # logits of the reference that float16 may order either way
CHECKED = 300  # tokens whose logits are compared with the interpreter's


def without_templates() -> None:
    """Let the runtime load where minijinja is not installed: prompts are ids here, and no template is rendered."""
    try:
        import minijinja  # noqa: F401
    except ImportError:
        sys.modules["minijinja"] = ModuleType("minijinja")


def tokens(file: Path) -> Row:
    """Return how the artifact beside the expectation ``file`` (see prepare.py) meets it."""
    without_templates()
    from arkinfer.runtime.engine import Engine
    from arkinfer.runtime.options import Generation
    from arkinfer.runtime.tokenizer import Tokenizer

    name = file.name.removesuffix(".expected.json")
    expected = json.loads(file.read_text(encoding="utf-8"))
    artifact = Artifact.open(file.with_name(f"{name}.ark"))
    prompt, wanted = expected["prompt"], expected["tokens"]
    generation = Generation(eos_ids=frozenset(expected["eos"]))
    tokenizer = Tokenizer.from_file(artifact.file("tokenizer.json"))
    with Engine(backends.open(artifact), tokenizer, generation, None) as engine:
        device = engine.generate(prompt, max_tokens=len(wanted), temperature=0.0).tokens
        engine.executor.draws = False
        host = engine.generate(prompt, max_tokens=len(wanted), temperature=0.0).tokens
        text = [*prompt, *wanted][:CHECKED]
        logits = engine.executor.step(text, engine.executor.new_state(), "all")
    interpreter = PlanInterpreter(artifact)
    other = interpreter.step(text, interpreter.new_state(), "all")
    interpreter.close()
    row: Row = {
        "artifact": name,
        "tokens": len(wanted),
        "host_is_device": host == device,
        "mean_kl_to_interpreter": float(divergence(other, logits).mean()),
        "largest_logit_difference": float(np.abs(logits - other).max()),
    }
    at = next((at for at, pair in enumerate(zip(device, wanted, strict=False)) if pair[0] != pair[1]), None)
    row["exact"] = at is None and len(device) == len(wanted)
    if at is not None:
        row |= {"first_difference": at, "margin_there": expected["margins"][at]}
    near = at is not None and expected["margins"][at] < NEAR
    row["ok"] = bool(host == device and row["mean_kl_to_interpreter"] < 2e-4 and (row["exact"] or near))
    if "text" in expected:
        row["golden"] = tokenizer.decode(device) == expected["text"]
        row["ok"] = row["ok"] and (row["golden"] or near)
    return row


def needles(artifact: Path, length: int, attention: str) -> Row:
    """Return how many of the 32 hidden values are found in a haystack of ``length`` tokens."""
    executor = backends.open(Artifact.open(artifact), attention=attention)
    haystack, answers = retrieve.haystack(length)
    state = executor.new_state(length + 4)
    executor.step(haystack, state, "none")
    right = 0
    for key, value in answers.items():
        state.truncate(length)
        found = int(np.argmax(executor.step([key], state)[-1]))
        right += found == value and int(np.argmax(executor.step([found], state)[-1])) == 2
    executor.close()
    return {"needles": right, "of": len(answers), "length": length, "attention": attention, "ok": right == len(answers)}
