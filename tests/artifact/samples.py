"""A small artifact to write, open and spoil."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from arkinfer.artifact import Artifact, Writer

FILES = {
    "tokenizer.json": b'{"version": "1.0"}',
    "generation.json": b'{"eos_ids": [2]}',
    "weights-00001.safetensors": bytes(range(256)) * 12,
    "payload/plan.json": b"{}",
    "payload/x86-64-v3.so": b"\x7fELF" + bytes(1500),
    "payload/empty": b"",
}


def fields(**changes: Any) -> dict[str, Any]:
    """Return the fields that a build hands to ``Writer.seal``."""
    return {
        "name": "sample",
        "arkinfer": "0.1.0",
        "target": {"name": "cpu", "arch": ["x86-64-v3"]},
        "backend": "tvm",
        "model": {"family": "minicpm", "config": {"hidden_size": 64, "rope_theta": 10000.0}, "parameters": 12345},
        "weights": "int8",
        "activations": "int8",
        "kv": "fp16",
        "attention": "auto",
        "context": 4096,
        "graph_digest": "0" * 64,
        "toolchain": {"apache-tvm": "0.27.0.post1"},
        "limits": {"context": 4096},
        "parity": {"mean_kl": 1.5e-7, "top1": 1.0},
        "quality": {"lossless": True},
        "provenance": {"model": "小模型", "notes": []},
        **changes,
    }


def write(destination: Path, force: bool = False, **changes: Any) -> Artifact:
    """Write the sample artifact at ``destination``."""
    with Writer(destination, force) as writer:
        for name, content in FILES.items():
            writer.path(name).write_bytes(content)
        return writer.seal(fields(**changes))


def copy(artifact: Artifact, destination: Path) -> Path:
    """Return a copy of the artifact's folder, replacing what is at ``destination``."""
    if destination.exists():
        shutil.rmtree(destination)
    shutil.copytree(artifact.path, destination)
    return destination


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder`` by its relative name."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
