"""The JSON of an MLC package: what its engine, its apps and its packaging read. Field names are theirs.

Formats: mlc_llm.protocol.mlc_chat_config, mlc_llm.interface.package, and cpp/metadata/model.cc of mlc-ai/mlc-llm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arkinfer.artifact.tensors import TensorSpec
from arkinfer.config import ModelConfig
from arkinfer.exporters import mlc_outline, mlc_weights
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.mlc_program import split, workspace
from arkinfer.exporters.program import Program

BATCH = 8  # sequences at once, at most
ENGINE_BYTES = 64 << 20  # what an app's engine takes besides, a guess
_VERSION = "0.1.0"  # of mlc-chat-config.json
_WINDOWS = {"sliding_window_size": -1, "attention_sink_size": -1}  # none
_SHARDS = {"tensor_parallel_shards": 1, "pipeline_parallel_stages": 1}


def limits(options: BuildOptions) -> dict[str, int]:
    """Return the sizes that the engine must keep to."""
    return {
        "context_window_size": options.context,
        "prefill_chunk_size": min(mlc_outline.CHUNK, options.context),
        "max_batch_size": BATCH,
    }


def metadata(
    config: ModelConfig, program: Program, specs: Mapping[str, TensorSpec], options: BuildOptions, quantization: str
) -> dict[str, Any]:
    """Return what the library's function ``_metadata`` says; the order of ``params`` is that of packed_params."""
    sizes = limits(options)
    embed, rest = split(program)
    chunk = sizes["prefill_chunk_size"]
    usage = {
        "embed": workspace(embed, chunk, 0),
        "prefill": workspace(rest, chunk, 1),
        "decode": workspace(rest, 1, 1),
        "batch_prefill": workspace(rest, chunk, BATCH),
        "batch_decode": workspace(rest, BATCH, BATCH),
        "batch_verify": workspace(rest, chunk, chunk),
        "softmax_with_temperature": 4 * BATCH * config.vocab_size,
    }
    return {
        "model_type": config.family,
        "quantization": quantization,
        **sizes,
        **_WINDOWS,
        **_SHARDS,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "active_vocab_size": config.vocab_size,
        "model_task": "chat",
        "kv_cache": {
            "num_hidden_layers": config.layers,
            "head_dim": config.head_dim,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
        },
        "memory_usage": usage,
        "params": [
            {
                "name": name,
                "shape": list(spec.shape),
                "dtype": mlc_weights.NAMES[spec.dtype],
                "preprocs": [],
                "pipeline_stages": [0],
            }
            for name, spec in specs.items()
        ],
    }


def chat_config(
    config: ModelConfig,
    options: BuildOptions,
    quantization: str,
    conversation: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> dict[str, Any]:
    """Return mlc-chat-config.json; ``generation`` is generation.json, ``tokenizer`` tokenizer.json."""
    sizes = limits(options)
    eos = generation["eos_ids"]
    sampled = generation["temperature"] > 0
    return {
        "version": _VERSION,
        "model_type": config.family,
        "quantization": quantization,
        "model_config": {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "num_hidden_layers": config.layers,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            **sizes,
            **_SHARDS,
        },
        "vocab_size": config.vocab_size,
        "active_vocab_size": config.vocab_size,
        "context_window_size": sizes["context_window_size"],
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        **_WINDOWS,
        **_SHARDS,
        "model_task": "chat",
        "temperature": generation["temperature"],
        "top_p": generation["top_p"] if sampled else 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "tokenizer_files": ["tokenizer.json"],
        "tokenizer_info": tokenizer_info(tokenizer),
        "conv_template": dict(conversation),
        "pad_token_id": generation["pad_id"] or 0,
        "bos_token_id": generation["bos_id"],
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
    }


def tokenizer_info(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what MLC needs to know of a tokenizer, told as its Tokenizer::DetectTokenizerInfo tells it."""
    decoders = _steps(tokenizer.get("decoder"), "decoders")
    kinds = [step.get("type") for step in decoders]
    method = (
        "byte_level" if "ByteLevel" in kinds else "byte_fallback" if "ByteFallback" in kinds or not kinds else "raw"
    )
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    strips = any(
        step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1 and step.get("stop") == 0
        for step in decoders
    )
    return {
        "token_postproc_method": method,
        "prepend_space_in_encode": any(
            step.get("type") == "Prepend" and step.get("prepend") == "\u2581" for step in normalizers
        ),
        "strip_space_in_decode": strips,
    }


def _steps(part: Any, several: str) -> list[Mapping[str, Any]]:
    if not isinstance(part, Mapping):
        return []
    return list(part.get(several, ())) if part.get("type") == "Sequence" else [part]


def app_files(
    device: str, model_lib: str, folder: str, config: ModelConfig, specs: Mapping[str, TensorSpec],
    options: BuildOptions, usage: Mapping[str, int],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the files for an app's developer: what `mlc_llm package` reads, and the list that an app reads."""
    cache = sum(mlc_outline.MlcOutline().caches(config, options.kv, options.context).values())
    needed = mlc_outline.parameter_bytes(specs) + cache + max(usage.values()) + ENGINE_BYTES
    model = {"model_id": model_lib.replace("_", "-"), "model_lib": model_lib, "estimated_vram_bytes": needed}
    # iOS apps have the folder in their bundle; Android apps fetch it from a URL, or are given it by MLC's script.
    place = {"model_path": model["model_id"]} if device == "iphone" else {"model_url": folder}
    return {
        "mlc-package-config.json": {
            "device": device,
            "model_list": [{"model": folder, **model, "bundle_weight": True}],
            "model_lib_path_for_prepare_libs": {model_lib: f"{model_lib}.tar"},
        },
        "mlc-app-config.json": {"model_list": [{**place, **model}]},
    }
