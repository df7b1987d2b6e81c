"""Small checkpoints in each quantised format, with the weights that they multiply out to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from tests.checkpoint import packers
from tests.checkpoint.packers import Drawn, Tensors
from tests.checkpoints import write_checkpoint

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Scheme:
    """A format with its settings; ``head``: the output head is quantised too; ``joined``: as CPM.cu joins layers."""

    pack: Callable[[Drawn], Tensors]
    settings: Mapping[str, Any]
    bits: int = 4
    size: int = 64
    symmetric: bool = True
    act_order: bool = False
    head: bool = False
    joined: bool = False
    file: str = "model.safetensors"
    beside: str = ""


def _gptq(version: int = 1, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "checkpoint_format": ("gptq", "gptq_v2")[version - 1], "group_size": 64, **more}


def _compressed(bits: int, strategy: str, symmetric: bool, format: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights |= {"group_size": 64} if strategy == "group" else {}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


SCHEMES: Mapping[str, Scheme] = {
    "gptq": Scheme(packers.gptq, _gptq(bits=4, sym=True, desc_act=False)),
    "gptq-act-order": Scheme(packers.gptq, _gptq(bits=4, desc_act=True), act_order=True, head=True),
    "gptq-v2-asymmetric": Scheme(
        lambda drawn: packers.gptq(drawn, 2), _gptq(2, bits=4, sym=False), symmetric=False
    ),
    "gptq-2bit": Scheme(packers.gptq, _gptq(bits=2, sym=True), bits=2),
    "gptq-3bit": Scheme(packers.gptq, _gptq(bits=3, sym=False), bits=3, symmetric=False),
    "gptq-8bit": Scheme(packers.gptq, _gptq(bits=8, sym=False), bits=8, symmetric=False),
    "gptq-beside": Scheme(
        packers.gptq, {"bits": 4, "group_size": -1, "desc_act": False}, size=-1, beside="quantize_config.json"
    ),
    "awq": Scheme(
        packers.awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, symmetric=False
    ),
    "awq-beside": Scheme(
        packers.awq,
        {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        symmetric=False,
        beside="quant_config.json",
    ),
    "marlin-autogptq": Scheme(
        lambda drawn: packers.marlin(drawn, ("B", "s")), _gptq(bits=4, is_marlin_format=True, sym=True, desc_act=False)
    ),
    "marlin-cpmcu": Scheme(
        packers.marlin, _gptq(bits=4, sym=True, desc_act=False), joined=True, file="model_gptq.safetensors"
    ),
    "packed-int4": Scheme(
        packers.packed_integers, _compressed(4, "group", False, "pack-quantized"), symmetric=False
    ),
    "packed-int8": Scheme(packers.packed_integers, _compressed(8, "channel", True, "pack-quantized"), 8, -1),
    "plain-int8": Scheme(packers.plain_integers, _compressed(8, "channel", True, "int-quantized"), 8, -1),
}  # fmt: skip


def write_quantised(folder: Path, raw: dict[str, Any], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Write a checkpoint of ``raw``'s shape in ``scheme``; return its weights multiplied out, float32."""
    write_checkpoint(folder, raw)
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    tensors: dict[str, np.ndarray] = {}
    drawn: dict[str, Drawn] = {}
    for seed, (name, value) in enumerate(sorted(state.items())):
        stem = name.removesuffix(".weight")
        if stem.endswith("_proj") or (scheme.head and stem == "lm_head"):
            # One order for all: those that read the same input share theirs, as GPTQ's packers write it.
            part = packers.draw(seed, *value.shape, scheme.bits, scheme.size, scheme.symmetric)
            if scheme.act_order:
                part = packers.reorder(part, part.codes.shape[1])
            drawn[stem] = part
            state[name] = torch.from_numpy(part.matrix)
        else:
            tensors[name] = value.numpy().astype(np.float32)
    for stem, parts in _packed_together(drawn, scheme.joined).items():
        packed = scheme.pack(parts[0] if len(parts) == 1 else packers.joined(parts))
        tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, folder / scheme.file)
    config = raw if scheme.beside else raw | {"quantization_config": dict(scheme.settings)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if scheme.beside:
        (folder / scheme.beside).write_text(json.dumps(dict(scheme.settings)), encoding="utf-8")
    return state


def _packed_together(drawn: dict[str, Drawn], joined: bool) -> dict[str, list[Drawn]]:
    if not joined:
        return {stem: [part] for stem, part in drawn.items()}
    found: dict[str, list[Drawn]] = {}
    for stem in drawn:
        parent, _, last = stem.rpartition(".")
        whole = next((name for name, parts in JOINED.items() if last in parts), last)
        members = JOINED.get(whole, (last,))
        found[f"{parent}.{whole}"] = [drawn[f"{parent}.{member}"] for member in members]
    return found
