"""Train tiny-minicpm, then tiny-bitcpm from it: `python examples/train_tiny/train.py --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import model as tiny
import tokens
import torch
from corpus import sample
from muon import Optimiser
from tokenizers import Tokenizer

STEP_TOKENS = 8192
LENGTH, LONG_LENGTH = 512, 2048
LONG_SHARE = 0.12  # of the steps, at the end, with long rows: so that every position up to the limit has been seen


def rows(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless rows (ids, weights) of a length that is sent in: whole samples, packed so that little is padding."""
    random = Random(seed)
    pool: list[tuple[list[int], list[float]]] = []
    length = yield  # type: ignore[misc]
    while True:
        if len(pool) < 256:
            pool += tokens.encode(tokenizer, [sample(random) for _ in range(1024)])
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
    return min(1.0, (step + 1) / warm, (steps - step) / (decay * steps))


def train(
    model: tiny.CausalLM,
    tokenizer: Tokenizer,
    steps: int,
    rate: float,
    other_rate: float,
    decay: float,
    as_ternary: bool,
    seed: int,
    work: Path,
) -> None:
    """Train in place."""
    parameters = dict(model.named_parameters())
    matrices = {name: p for name, p in parameters.items() if tiny.is_matrix(name)}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    optimiser = Optimiser(matrices, others, rate, other_rate)
    stream = rows(tokenizer, seed)
    next(stream)

    def loss_of(
        ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        current = tiny.quantised(parameters) if as_ternary else parameters

        hidden = torch.func.functional_call(model, current, (ids, positions))
        logits = torch.nn.functional.linear(
            hidden * model.config.logit_scale, current["model.embed_tokens.weight"]
        ).float()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (losses * weights).sum() / weights.sum()

    began = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        length = LONG_LENGTH if step >= steps * (1 - LONG_SHARE) else LENGTH
        count = STEP_TOKENS // length
        batch = [stream.send(length) for _ in range(count)]  # type: ignore[attr-defined]
        ids = torch.stack([ids for ids, _ in batch])
        weights = torch.stack([w for _, w in batch])[:, 1:].reshape(-1)
        positions = torch.arange(length).repeat(count)
        with tiny.batched(count), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids[:, :-1].reshape(-1), positions, ids[:, 1:].reshape(-1), weights)
        loss.backward()
        optimiser.step(factor(step, steps, 40, decay), momentum=min(0.95, 0.85 + 0.1 * step / 200))
        recent.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == steps:
            spent = time.monotonic() - began
            rate_now = (step + 1) * STEP_TOKENS / spent
            message = f"{step + 1}/{steps} loss {sum(recent) / len(recent):.4f} {rate_now:.0f} tokens/s {spent:.0f} s"
            print(message, file=sys.stderr, flush=True)
            recent = []
        if (step + 1) % 200 == 0:
            torch.save(model.state_dict(), work / ("bitcpm.pt" if as_ternary else "minicpm.pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives tiny-minicpm/ and tiny-bitcpm/")
    parser.add_argument("--steps", type=int, default=1500, help=f"steps of {STEP_TOKENS} tokens in bfloat16")
    parser.add_argument("--ternary-steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokens.train()
    model = tiny.new(arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    train(model, tokenizer, arguments.steps, 0.02, 0.004, 0.4, False, arguments.seed + 1, arguments.out)
    tiny.export(model, tokenizer, arguments.out / "tiny-minicpm", as_ternary=False)
    train(model, tokenizer, arguments.ternary_steps, 0.01, 0.002, 0.6, True, arguments.seed + 2, arguments.out)
    tiny.export(model, tokenizer, arguments.out / "tiny-bitcpm", as_ternary=True)


if __name__ == "__main__":
    main()
