"""Operators that stay whole in the model graph: each file holds schema, shape rule, torch reference and cost.

The functions that models call run the plain reference while gradients are recorded (training) and the registered
operator otherwise, so that torch.export sees one node for each.
"""

from __future__ import annotations

import torch


def differentiates(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd must see inside the operator; never while a graph is being exported."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
