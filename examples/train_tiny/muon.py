"""Muon (Jordan 2024): momentum with orthogonal updates for the matrices of the layers; AdamW for everything else."""

from __future__ import annotations

from collections.abc import Mapping

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives all singular values towards 1


def orthogonal(batch: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate U V^T of each matrix of ``batch`` (matrices, rows, columns) by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = batch.shape[1] > batch.shape[2]
    x = batch.mT if tall else batch
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(batch.dtype)


class Optimiser:
    """Muon over the matrices in ``matrices``, AdamW over ``others``; both rates are scaled by one schedule factor."""

    def __init__(
        self,
        matrices: Mapping[str, torch.Tensor],
        others: Mapping[str, torch.Tensor],
        rate: float,
        other_rate: float,
        decay: float = 0.05,
    ) -> None:
        self.groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for tensor in matrices.values():
            self.groups.setdefault(tuple(tensor.shape), []).append(tensor)
        self.momenta = {shape: torch.zeros(len(tensors), *shape) for shape, tensors in self.groups.items()}
        self.adam = torch.optim.AdamW(list(others.values()), lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.rate, self.other_rate, self.decay = rate, other_rate, decay

    @torch.no_grad()
    def step(self, factor: float, momentum: float = 0.95) -> None:
        """Apply one update at ``factor`` times the base rates and clear the gradients."""
        for shape, tensors in self.groups.items():
            gradient = torch.stack([tensor.grad for tensor in tensors if tensor.grad is not None])
            buffer = self.momenta[shape]
            buffer.lerp_(gradient, 1 - momentum)
            update = orthogonal(gradient.lerp(buffer, momentum))
            rate = self.rate * factor
            for tensor, change in zip(tensors, update, strict=True):
                tensor.mul_(1 - rate * self.decay).add_(change, alpha=-rate * max(1.0, shape[0] / shape[1]) ** 0.5)
                tensor.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.other_rate * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
