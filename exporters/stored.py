"""Weights in an artifact's file: tensors as arrays and back, and whether they are still what was packed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import torch

from arkinfer.errors import ParityError
from arkinfer.graph import ModelGraph, Weight


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as an array; bfloat16 as its uint16 bits."""
    tensor = tensor.contiguous()
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class Dtypes:
    """The dtypes that the parts of a model's weights have in its graph; files hold bfloat16 as uint16."""

    def __init__(self, model: ModelGraph) -> None:
        found = {node.name: node.meta["val"].dtype for node in model.placeholders() if node.name in model.weights}
        self._dtypes = {(weight.name, weight.part): found[name] for name, weight in model.weights.items()}

    def tensor(self, weight: Weight, part: str, array: np.ndarray) -> torch.Tensor:
        """Return ``array`` as the tensor that ``array_of`` made it from, sharing its memory."""
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self._dtypes.get((weight.name, part)) == torch.bfloat16 else tensor


class Origins:
    """Digests of weights as they were packed; each is compared once."""

    def __init__(self, digests: Mapping[str, str] | None) -> None:
        self._unchecked = dict(digests or {})

    def check(self, name: str, weight: Weight, digest: Callable[[], hashlib._Hash]) -> None:
        """Compare what ``digest`` makes of what was read. Raises ParityError (ARK-E402) if it is something else."""
        origin = self._unchecked.pop(name, None)
        if origin is not None and digest().hexdigest() != origin:
            raise ParityError(
                "a weight of the artifact is not the one that was packed",
                facts={"weight": weight.name, "format": weight.format, "group": weight.group},
                hint="build again; if it recurs, report it with the model's config.json",
                code="ARK-E402",
            )
