"""Train tiny-minicpm, then tiny-bitcpm from it: `python examples/train_tiny/train.py --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
# Processes of one thread, each with its share of a step: they wait for each other once a step, not once an operator.
WORKERS = 2
LONG_EVERY = 6  # one step in so many has long rows: so that every position up to the limit is seen


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


@dataclass(frozen=True)
class Leg:
    """``steps`` steps: rates of Muon and AdamW, the share of steps in which they fall, which data, which weights."""

    steps: int
    rate: float
    other_rate: float
    decay: float
    seed: int
    reading: bool
    ternary: bool

    def factor(self, step: int) -> float:
        """Warm-up over 40 steps, constant, then linear to nothing."""
        return min(1.0, (step + 1) / 40, (self.steps - step) / max(1.0, self.decay * self.steps))


def average(parameters: list[torch.Tensor]) -> None:
    """Replace each gradient by its mean over the workers."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / WORKERS
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(model: tiny.CausalLM, tokenizer: Tokenizer, leg: Leg, folder: Path) -> None:
    """Train in place; the first worker exports to ``folder`` now and then, and at the end."""
    parameters = dict(model.named_parameters())
    matrices = {name: p for name, p in parameters.items() if tiny.is_matrix(name)}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    optimiser = Optimiser(matrices, others, leg.rate, leg.other_rate)
    rank = distributed.get_rank()
    step_tokens = READING_STEP_TOKENS if leg.reading else STEP_TOKENS
    stream = rows(tokenizer, leg.seed * WORKERS + rank, leg.reading)
    next(stream)

    def loss_of(
        ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        current = tiny.quantised(parameters) if leg.ternary else parameters

        hidden = torch.func.functional_call(model, current, (ids, positions))
        learned = weights.nonzero().squeeze(1)  # the head is a fifth of the work: only where it matters
        targets, weights = targets[learned], weights[learned]
        scaled = hidden[learned] * model.config.logit_scale
        logits = torch.nn.functional.linear(scaled, current["model.embed_tokens.weight"]).float()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (losses * weights).sum() / weights.sum()

    began = time.monotonic()
    recent: list[float] = []
    for step in range(leg.steps):
        length = LONG_LENGTH if leg.reading and step % LONG_EVERY == 0 else LENGTH
        count = step_tokens // length // WORKERS
        batch = [stream.send(length) for _ in range(count)]  # type: ignore[attr-defined]
        ids = torch.stack([ids for ids, _ in batch])
        weights = torch.stack([w for _, w in batch])[:, 1:].reshape(-1)
        positions = torch.arange(length).repeat(count)
        # In long rows the samples see each other, as the turns of a long conversation do.
        documents = (ids[:, :-1] == tokens.BOS).cumsum(1) if length == LENGTH else None
        with tiny.batched(count, documents), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids[:, :-1].reshape(-1), positions, ids[:, 1:].reshape(-1), weights)
        loss.backward()
        average(list(parameters.values()))
        optimiser.step(leg.factor(step), momentum=min(0.95, 0.85 + 0.1 * step / 200))
        recent.append(loss.item())
        if rank == 0 and ((step + 1) % 20 == 0 or step + 1 == leg.steps):
            spent = time.monotonic() - began
            rate_now = (step + 1) * step_tokens / spent
            message = (
                f"{step + 1}/{leg.steps} loss {sum(recent) / len(recent):.4f} {rate_now:.0f} tokens/s {spent:.0f} s"
            )
            print(message, file=sys.stderr, flush=True)
            recent = []
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == leg.steps):
            tiny.export(model, tokenizer, folder, leg.ternary)


def work(rank: int, rendezvous: str, arguments: argparse.Namespace) -> None:
    """One worker: all of them train the same weights, the first one writes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    tokenizer = tokens.train()
    model = tiny.new(arguments.seed)
    stories, reading, ternary = arguments.steps
    seed: int = arguments.seed * 10
    for leg in (
        Leg(stories, 0.02, 0.004, decay=0.0, seed=seed + 1, reading=False, ternary=False),
        Leg(reading, 0.015, 0.003, decay=0.8, seed=seed + 2, reading=True, ternary=False),
        Leg(ternary, 0.01, 0.002, decay=0.7, seed=seed + 3, reading=True, ternary=True),
    ):
        train(model, tokenizer, leg, arguments.out / ("tiny-bitcpm" if leg.ternary else "tiny-minicpm"))
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
