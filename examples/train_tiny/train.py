"""Train tiny-minicpm, then tiny-bitcpm from it: `python examples/train_tiny/train.py --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import model as tiny
import tokens
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from corpus import sample
from muon import Optimiser
from tokenizers import Tokenizer

STEP_TOKENS = 8192
READING_STEP_TOKENS = 4096
LENGTH, LONG_LENGTH = 512, 2048
WORKERS = (
    2  # processes of one thread, each with half of a step: they wait for each other once a step, not once an operator
)
LONG_SHARE = 0.12  # of the steps, at the end, with long rows: so that every position up to the limit has been seen


def rows(tokenizer: Tokenizer, seed: int, reading: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless rows (ids, weights) of a length that is sent in: whole samples, packed so that little is padding."""
    random = Random(seed)
    pool: list[tuple[list[int], list[float]]] = []
    length = yield  # type: ignore[misc]
    while True:
        if len(pool) < 256:
            pool += tokens.encode(tokenizer, [sample(random, reading) for _ in range(1024)])
        ids: list[int] = []
        weights: list[float] = []
        while (room := length + 1 - len(ids)) > 0:
            window = range(min(len(pool), 64))
            fitting = [i for i in window if len(pool[i][0]) <= room]
            # Random while there is room, the longest that fits at the end.
            pick = (
                (fitting[0] if room > length // 2 else max(fitting, key=lambda i: len(pool[i][0]))) if fitting else None
            )
            if pick is None:
                if not ids:
                    pool.pop(0)  # longer than a whole row
                    continue
                ids += [tokens.EOS] * room
                weights += [0.0] * room
                break
            new_ids, new_weights = pool.pop(pick)
            ids += new_ids
            weights += new_weights
        length = yield torch.tensor(ids), torch.tensor(weights)


def factor(step: int, steps: int, warm: int, decay: float) -> float:
    """Warm-up, constant, then linear to nothing over the last ``decay`` share."""
    return min(1.0, (step + 1) / warm, (steps - step) / max(1.0, decay * steps))


def average(parameters: list[torch.Tensor]) -> None:
    """Replace each gradient by its mean over the workers."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / WORKERS
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(
    model: tiny.CausalLM,
    tokenizer: Tokenizer,
    steps: int,
    rate: float,
    other_rate: float,
    decay: float,
    as_ternary: bool,
    seed: int,
    reading: bool,
    work: Path,
) -> None:
    """Train in place."""
    parameters = dict(model.named_parameters())
    matrices = {name: p for name, p in parameters.items() if tiny.is_matrix(name)}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    optimiser = Optimiser(matrices, others, rate, other_rate)
    rank = distributed.get_rank()
    step_tokens = READING_STEP_TOKENS if reading else STEP_TOKENS
    stream = rows(tokenizer, seed * WORKERS + rank, reading)
    next(stream)

    def loss_of(
        ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        current = tiny.quantised(parameters) if as_ternary else parameters

        hidden = torch.func.functional_call(model, current, (ids, positions))
        learned = weights.nonzero().squeeze(1)  # the head is a fifth of the work: only where it matters
        targets, weights = targets[learned], weights[learned]
        scaled = hidden[learned] * model.config.logit_scale
        logits = torch.nn.functional.linear(scaled, current["model.embed_tokens.weight"]).float()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (losses * weights).sum() / weights.sum()

    began = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        length = LONG_LENGTH if decay and step >= steps * (1 - LONG_SHARE) else LENGTH
        count = step_tokens // length // WORKERS
        batch = [stream.send(length) for _ in range(count)]  # type: ignore[attr-defined]
        ids = torch.stack([ids for ids, _ in batch])
        weights = torch.stack([w for _, w in batch])[:, 1:].reshape(-1)
        positions = torch.arange(length).repeat(count)
        with tiny.batched(count), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids[:, :-1].reshape(-1), positions, ids[:, 1:].reshape(-1), weights)
        loss.backward()
        average(list(parameters.values()))
        optimiser.step(factor(step, steps, 40, decay), momentum=min(0.95, 0.85 + 0.1 * step / 200))
        recent.append(loss.item())
        if rank == 0 and ((step + 1) % 20 == 0 or step + 1 == steps):
            spent = time.monotonic() - began
            rate_now = (step + 1) * step_tokens / spent
            message = f"{step + 1}/{steps} loss {sum(recent) / len(recent):.4f} {rate_now:.0f} tokens/s {spent:.0f} s"
            print(message, file=sys.stderr, flush=True)
            recent = []
        if rank == 0 and (step + 1) % 100 == 0:
            torch.save(model.state_dict(), work / ("bitcpm.pt" if as_ternary else "minicpm.pt"))


def work(rank: int, rendezvous: str, arguments: argparse.Namespace) -> None:
    """One worker: all of them train the same weights, the first one writes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    tokenizer = tokens.train()
    model = tiny.new(arguments.seed)
    stories, reading, ternary = arguments.steps
    seed, out = arguments.seed, arguments.out
    train(model, tokenizer, stories, 0.02, 0.004, 0.0, False, seed + 1, False, out)
    train(model, tokenizer, reading, 0.015, 0.003, 0.8, False, seed + 3, True, out)
    if rank == 0:
        tiny.export(model, tokenizer, out / "tiny-minicpm", as_ternary=False)
    train(model, tokenizer, ternary, 0.01, 0.002, 0.7, True, seed + 2, True, out)
    if rank == 0:
        tiny.export(model, tokenizer, out / "tiny-bitcpm", as_ternary=True)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives tiny-minicpm/ and tiny-bitcpm/")
    parser.add_argument(
        "--steps", type=int, nargs=3, default=(1000, 2200, 1000), metavar=("STORIES", "READING", "TERNARY")
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (str(Path(folder) / "rendezvous"), arguments), nprocs=WORKERS)


if __name__ == "__main__":
    main()
