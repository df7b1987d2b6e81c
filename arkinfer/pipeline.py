"""The build: checkpoint to graph to payload to verified, sealed artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import arkinfer
from arkinfer import backends, exporters, passes, planning, resume, structure, targets
from arkinfer import graph as graphs
from arkinfer import parity as verification
from arkinfer import quality as qualities
from arkinfer.artifact import Artifact, Writer
from arkinfer.backends.base import Executor
from arkinfer.checkpoint import Checkpoint, open_checkpoint
from arkinfer.checkpoint.stored import Layout
from arkinfer.config import ModelConfig
from arkinfer.errors import UnsupportedError, UserError, nearest
from arkinfer.exporters.base import BuildOptions, Exporter
from arkinfer.graph import ModelGraph
from arkinfer.options import computed, fallback, resolve
from arkinfer.quant import pgptq
from arkinfer.recipe import Recipe, Rounding, Rule, choose
from arkinfer.reference import Reference, WeightSource
from arkinfer.runtime.tokenizer import Tokenizer
from arkinfer.targets import probe
from arkinfer.weights import CheckpointWeights

Progress = Callable[[str, int, int], None]
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Lowered:
    """A captured graph after all passes, and the recipe that shaped it."""

    graph: ModelGraph
    recipe: Recipe


def _quiet(stage: str, done: int, total: int) -> None:
    pass


def _unheard(text: str) -> None:
    pass


def lower(
    config: ModelConfig,
    context: int,
    recipe: Recipe | Callable[[ModelGraph], Recipe],
    layouts: Mapping[str, Layout],
    kv: str,
) -> Lowered:
    """Capture the graph of ``config`` and run the passes; ``layouts`` are the weights that there are.

    Raises UserError where these are not the weights that ``config`` implies.
    """
    structure.require(layouts, structure.shapes(config))  # before a graph of absurdly many layers is captured
    graph = graphs.capture(config, context, kv)
    chosen = recipe if isinstance(recipe, Recipe) else recipe(graph)
    return Lowered(passes.run(graph, chosen), chosen)


def build(
    model: str | Path,
    target: str | Path = "cpu",
    *,
    out: str | Path | None = None,
    weights: str = "auto",
    activations: str = "auto",
    kv: str | None = None,
    attention: str = "auto",
    context: int | None = None,
    group: int | None = None,
    head: str | None = None,
    method: str | None = None,
    rules: Sequence[str | Rule] = (),
    verify: str = "fast",
    quality: str = "auto",
    force: bool = False,
    revision: str | None = None,
    offline: bool = False,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Artifact:
    """Compile ``model`` for ``target`` and return the sealed artifact.

    ``model``: a checkpoint folder, a bundled model's name, or ``owner/name`` of the Hugging Face hub, at ``revision``;
    ``offline`` takes only what was fetched before. ``adapter``: the folder of a LoRA adapter, merged into the weights.

    ``weights``: auto, fp32, fp16, int8, int4 or ternary; auto keeps ternary checkpoints ternary. ``kv``: fp32, fp16 or
    int8 caches. ``attention``: the artifact's default gear. ``context``: largest number of tokens. ``verify``: fast,
    full or none. ``out`` defaults to ``<model>-<target>.ark`` in the current folder; an existing artifact is replaced
    only with ``force``.

    For weights that are quantised here, ``group`` (32, 64 or 128 inputs) shares an int4 scale, ``head`` (int8 or int4)
    is the format of the embedding table and the output head, and ``method`` is search or pgptq. ``rules`` such as
    "*.down_proj.*=int4:32" overrule ``weights`` by name, the first that matches. The target says what is not given.
    ``quality``: on measures what that costs against the checkpoint's own weights, off does not; auto measures small
    models (see arkinfer.quality) unless ``verify`` is none.

    Before the long work starts, ``say`` is told in one line what it will take, and warned where the artifact will not
    fit the target's memory.

    Raises UserError for bad input and a full disk, UnsupportedError where the target cannot run the model, ParityError
    when the result differs from the torch reference; in all of these cases nothing is left at ``out``. When it is
    interrupted, or the disk is full, finished weights stay in a hidden folder beside ``out``: an equal call goes on
    with them.
    """
    report = progress or _quiet
    description = targets.load(str(target))
    exporter = exporters.get(description.backend)
    if verify not in ("none", *verification.SUITES):
        raise UserError(f"verify is fast, full or none, not {verify!r}", hint=nearest(verify, ["fast", "full", "none"]))
    checkpoint = open_checkpoint(model, revision, offline, adapter=adapter)
    measured = qualities.wanted(quality, verify, checkpoint.parameters)
    options = resolve(checkpoint.config, description, kv, attention, context)
    rounding = Rounding.of(description.defaults, group, head, method, rules)
    destination = Path(out) if out is not None else Path(f"{checkpoint.name}-{description.name}.ark")
    expected = structure.shapes(checkpoint.config)
    structure.require(checkpoint.layouts(), expected)
    body = structure.body(checkpoint.config)
    recipe = choose(
        weights, fallback(description), body, expected, checkpoint, computed(description, activations), rounding
    )
    if context is None and description.defaults.context == "fit":
        options = planning.fitted(options, checkpoint.config, recipe, description)
    tokenizer = _tokenizer(checkpoint)
    line, warnings = planning.outlook(checkpoint, recipe, description, options, destination)
    for text in (line, *(f"warning: {warning}" for warning in warnings)):
        (say or _unheard)(text)
    with Writer(destination, force) as writer, closing(exporter):
        exporter.prepare(description)
        report("graph", 0, 1)
        lowered = lower(checkpoint.config, options.context, recipe, checkpoint.layouts(), options.kv)
        report("graph", 1, 1)
        refused = exporter.support(lowered.graph, description, options)
        if refused:
            raise UnsupportedError(
                f"target {description.name} cannot run this model",
                facts={f"reason {index}": reason for index, reason in enumerate(refused, 1)},
                code="ARK-E302",
            )
        journal = writer.resume(resume.key(checkpoint, lowered.graph, lowered.recipe, description, options))
        _copy_assets(checkpoint, tokenizer, writer)
        encode = Tokenizer.from_file(writer.path("tokenizer.json")).encode
        rounded = checkpoint
        if lowered.recipe.method == "pgptq":
            rounded = pgptq.quantise(checkpoint, lowered.recipe, encode, writer.scratch, report)
        source = CheckpointWeights(rounded)
        payload = exporter.export(lowered.graph, source, description, options, writer.path, report, journal)
        writer.path("payload/graph.txt").write_text(lowered.graph.dump(), encoding="utf-8")
        notes = [*checkpoint.config.notes, *payload.notes]
        fields = {
            "name": destination.name.removesuffix(".ark"),
            "arkinfer": arkinfer.__version__,
            "target": description.to_dict(),
            "backend": description.backend,
            "model": {
                "family": checkpoint.config.family,
                "config": checkpoint.raw_config,
                "parameters": checkpoint.parameters,
                "recipe": lowered.recipe.to_dict(),
            },
            "weights": lowered.recipe.weights,
            "activations": lowered.recipe.activations,
            "kv": options.kv,
            "attention": options.attention,
            "context": options.context,
            "graph_digest": lowered.graph.digest(),
            "toolchain": dict(payload.toolchain),
            "limits": dict(payload.limits),
            "parity": None,
            "quality": None,
            "provenance": {"model": checkpoint.name, **checkpoint.source, "notes": notes},
        }
        if verify != "none":
            staged = writer.preview(fields)
            packed = exporter.weights(lowered.graph, staged.file, payload.origins)
            try:
                opened = open_executor(staged, exporter)
            except UnsupportedError as absent:
                if probe.level_for(description) is not None:
                    raise
                notes.append(f"compiled, not verified: {absent.message}")
                (say or _unheard)(f"warning: {notes[-1]}; {absent.hint}")
            else:
                outcome = _compare(staged, opened, exporter, lowered, packed, options, verify, report)
                verification.require(outcome)
                fields["parity"] = outcome.to_dict()
        fields["quality"] = qualities.examine(
            checkpoint, lowered.graph, lowered.recipe, source, encode, measured, report
        )
        return writer.seal(fields)


def verify_artifact(artifact: Artifact, suite: str = "fast", progress: Progress | None = None) -> verification.Report:
    """Verify a sealed artifact against the torch reference, with the weights that the artifact itself holds.

    Raises UnsupportedError where nothing here can run it.
    """
    manifest = artifact.manifest
    exporter = exporters.get(manifest.backend)
    opened = open_executor(artifact, exporter)
    config = ModelConfig.from_json(manifest.model["config"])
    recipe = Recipe.from_dict(manifest.weights, manifest.activations, manifest.model["recipe"])
    lowered = lower(config, manifest.context, recipe, recipe.layouts, manifest.kv)
    options = BuildOptions(manifest.kv, manifest.attention, manifest.context)
    source = exporter.weights(lowered.graph, artifact.file)
    return _compare(artifact, opened, exporter, lowered, source, options, suite, progress or _quiet)


def _compare(
    artifact: Artifact,
    opened: tuple[Executor, str],
    exporter: Exporter,
    lowered: Lowered,
    source: WeightSource,
    options: BuildOptions,
    suite: str,
    progress: Progress,
) -> verification.Report:
    tokenizer = Tokenizer.from_file(artifact.file("tokenizer.json"))
    texts = verification.windows(tokenizer.encode, lowered.graph.config.vocab_size, suite, options.context)
    path = "int8" if "int8" in (options.kv, lowered.recipe.activations) else "fp16" if options.kv == "fp16" else "float"
    if path == "int8" and exporter.precision == "fp16":
        path = "fp16"  # its own rounding is coarser than what int8 caches add
    executor, evidence = opened
    try:
        rounding = exporters.ROUNDING.get(artifact.manifest.backend, "int8")
        reference = Reference(lowered.graph.with_activations(rounding), source, options.kv, options.attention)
        report = verification.compare(executor, reference, texts, suite, path, progress)
        return replace(report, evidence=evidence)
    finally:
        executor.close()


def open_executor(artifact: Artifact, exporter: Exporter) -> tuple[Executor, str]:
    """Open what can run ``artifact`` on this machine, and say what its results are worth."""
    target = artifact.manifest.target
    if probe.usable(target["arch"], target.get("platform")) is None:
        stand_in = exporter.stand_in(artifact)
        if stand_in is not None:
            return stand_in.executor, stand_in.evidence
    return backends.open(artifact), "ran"


def _tokenizer(checkpoint: Checkpoint) -> bytes:
    tokenizer = checkpoint.asset("tokenizer.json")
    if tokenizer is None:
        raise UserError(
            f"{checkpoint.path} has no tokenizer.json",
            hint="save the tokenizer with a fast tokenizer class: tokenizer.save_pretrained(folder)",
            code="ARK-E127",
        )
    return tokenizer


def _copy_assets(checkpoint: Checkpoint, tokenizer: bytes, writer: Writer) -> None:
    """Copy the tokenizer and the chat template, and write what generation needs to know as generation.json."""
    writer.path("tokenizer.json").write_bytes(tokenizer)
    settings = checkpoint.json_asset("tokenizer_config.json")
    defaults = checkpoint.json_asset("generation_config.json")
    template = checkpoint.asset("chat_template.jinja")
    text = template.decode("utf-8") if template is not None else settings.get("chat_template")
    if isinstance(text, list):  # several named templates: the one for chatting is "default"
        text = next((item.get("template") for item in text if item.get("name") == "default"), None)
    if isinstance(text, str) and text:
        writer.path("template.jinja").write_text(text, encoding="utf-8")
    config = checkpoint.config
    eos = defaults.get("eos_token_id", list(config.eos_ids))
    sampled = defaults.get("do_sample", False)
    generation = {
        "bos_id": config.bos_id,
        "eos_ids": sorted({*config.eos_ids, *(eos if isinstance(eos, list) else [eos])} - {None}),
        "pad_id": config.pad_id,
        "add_bos": _adds_bos(writer.path("tokenizer.json"), settings, config.bos_id),
        "tokens": {name: token for name in SPECIAL if (token := _spelling(settings.get(name))) is not None},
        "temperature": float(defaults.get("temperature", 1.0)) if sampled else 0.0,
        "top_p": float(defaults.get("top_p", 1.0)),
        "top_k": int(defaults.get("top_k", 0) or 0),
        "thinking": {"open": "<think>", "close": "</think>"} if isinstance(text, str) and "<think>" in text else None,
    }
    writer.path("generation.json").write_text(json.dumps(generation, sort_keys=True, indent=1) + "\n", encoding="utf-8")


def _spelling(token: object) -> str | None:
    """Return the text of a special token, which tokenizer_config.json gives as a string or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _adds_bos(tokenizer: Path, settings: Mapping[str, Any], bos_id: int | None) -> bool:
    """Tell whether plain text starts with BOS: by ``add_bos_token``, else by what the tokenizer itself adds."""
    if (stated := settings.get("add_bos_token")) is not None or bos_id is None:
        return bool(stated)
    return Tokenizer.from_file(tokenizer).puts_first(bos_id)


def describe(model: str | Path, revision: str | None = None, offline: bool = False) -> dict[str, Any]:
    """Return what a checkpoint is, from its config and headers: no codes or floats of a weight are read."""
    checkpoint = open_checkpoint(model, revision, offline, headers_only=True)
    stored: dict[str, int] = {}
    for weight in checkpoint.weights.values():
        layout = weight.layout
        kind = layout.scheme or (layout.format if layout.quantised else layout.dtype)
        stored[kind] = stored.get(kind, 0) + weight.nbytes
    config = asdict(checkpoint.config)
    config["rope"] = {key: value for key, value in config["rope"].items() if not isinstance(value, (list, tuple))}
    return {
        "model": checkpoint.name,
        **checkpoint.source,
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.weights),
        "bytes_by_dtype": stored,
        "config": config,
    }
