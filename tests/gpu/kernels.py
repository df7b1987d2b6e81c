"""Every CUDA kernel on the GPU: against its torch reference in float64, and timed at the sizes of MiniCPM4-8B.

Triton compiles the kernels for the GPU that it finds, so these are not an artifact's own cubins: engine.py and speed.py
run those.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tests.gpu import clock
from tests.kernels.triton.cases import cases
from tests.kernels.triton.samples import Case, Values, deviations, draw, expected, launch

SHAPE = {"heads": 32, "kv_heads": 2, "head_dim": 128}
WINDOWS = {"kernel_size": 32, "kernel_stride": 16}
RULES = {"block_size": 64, "init_blocks": 1, "local_blocks": 32, "budget": 96}
FORMATS: dict[str, dict[str, Any]] = {
    "float16": {"format": "dense"},
    "int8": {"format": "int8", "group": 128},
    "int4": {"format": "int4", "group": 128, "zeros": True},
    "ternary": {"format": "ternary", "group": 128},
}


def larger() -> Iterator[Case]:
    """Yield launches at sizes that the interpreter is too slow for, odd ones among them."""
    for options in FORMATS.values():
        for rows, width in ((4096, 4096), (4096, 16384), (1153, 4096 + 128)):
            yield Case("linear_gemv", {"rows": rows, "width": width, **options})
            yield Case("linear_gemm", {"rows": rows, "width": width, **options}, n=301)
        yield Case("linear_gemv", {"rows": 2 * 3001, "width": 4096, "gated": True, **options})
        yield Case("linear_gemm", {"rows": 2 * 3001, "width": 4096, "gated": True, **options}, n=77)
    for kv in ("float16", "int8"):
        attend = {**SHAPE, "context": 9024, "scale": 0.09, "kv": kv}
        for position in (0, 4095, 9000):
            yield Case("attention_decode", {**attend, "splits": 32}, position=position)
        yield Case("attention_prefill", attend, n=333, position=5001)
        yield Case("attention_prefill", {**attend, "heads": 9, "kv_heads": 3, "head_dim": 96}, n=130, position=77)
    select = {**SHAPE, **WINDOWS, **RULES, "context": 32768, "scale": 0.09}
    for n, position, splits in ((1, 32766, 16), (65, 20003, 1)):
        step = {"n": n, "position": position, "dense_len": 8192}
        for kernel in ("select_lse", "select_scores", "select_blocks"):
            yield Case(kernel, {**select, "splits": splits}, **step)
    for vocab in (73448, 151937):
        yield Case("argmax_partial", {"vocab": vocab})


def on_device(values: Values) -> Values:
    """Return the arguments on the GPU, strides kept."""
    moved: Values = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            place = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            moved[name] = place.copy_(value)
        else:
            moved[name] = value
    return moved


def check(case: Case, arch: str, seed: int) -> dict[str, Any]:
    """Return what one launch deviates by."""
    row: dict[str, Any] = {"case": str(case), "seed": seed}
    try:
        values = draw(case, seed)
        got = on_device(values)
        launch(case, got, arch)
        torch.cuda.synchronize()
        back = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in got.items()}
        found = deviations(case, expected(case, values), back)
        row["outputs"] = {item.argument: {"error": item.error, "allowed": item.allowed} for item in found}
        row["ok"] = all(item.fine for item in found)
    except Exception:
        row |= {"ok": False, "failure": traceback.format_exc().strip().splitlines()[-1]}
    return row


def checks(arch: str, seed: int, only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what each launch deviates by; ``only`` kernels of these names, if any."""
    for case in [*cases(), *larger()]:
        if not only or case.kernel in only:
            yield check(case, arch, seed)


def _read(values: Values, names: tuple[str, ...]) -> int:
    return sum(value.nbytes for name in names if isinstance(value := values.get(name), torch.Tensor))


def _launch_next(case: Case, sets: list[Values], arch: str, index: int) -> None:
    launch(case, sets[index % len(sets)], arch)


def timings(arch: str, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Yield times of memory-bound kernels: every launch reads another copy, 512 MB of them in turn."""
    weights = ("weight", "scales", "zeros")
    timed = [
        (f"{name} {rows}x{width}", Case("linear_gemv", {"rows": rows, "width": width, **options}), weights)
        for name, options in FORMATS.items()
        for rows, width in ((4096, 4096), (32768, 4096), (4096, 16384))
    ]
    for kv in ("float16", "int8"):
        for length in (8192, 32768, 131072):
            options = {**SHAPE, "context": length, "scale": 0.09, "kv": kv, "splits": 64}
            case = Case("attention_decode", options, position=length - 1)
            timed.append((f"decode {kv} at {length}", case, ("k", "v", "k_scale", "v_scale")))
    for title, case, names in timed:
        first = on_device(draw(case))
        size = _read(first, names)
        sets = [first]
        while len(sets) * size < 512 << 20 and len(sets) < 512:
            sets.append({name: value.clone() if name in names else value for name, value in first.items()})  # type: ignore[union-attr]
        run = partial(_launch_next, case, sets, arch)
        took = clock.by_torch(run, launches=max(16, len(sets)))
        yield {"what": title, "microseconds": took * 1e6, "bytes": size, "share_of_copy": size / took / bandwidth}
    for name, options in FORMATS.items():
        case = Case("linear_gemm", {"rows": 4096, "width": 4096, **options}, n=2048)
        took = clock.by_torch(partial(_launch_next, case, [on_device(draw(case))], arch))
        yield {"what": f"gemm {name} 2048x4096x4096", "microseconds": took * 1e6,
               "tflops": 2 * 2048 * 4096 * 4096 / took / 1e12}  # fmt: skip
