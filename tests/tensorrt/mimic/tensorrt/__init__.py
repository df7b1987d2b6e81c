"""TensorRT as a Jetson has it, as far as a machine without one can show it.

The parser and the builder are those of TensorRT for RTX, told to build for sm_89. The runtime, which needs a GPU, is in
tests/tensorrt/runtime.py. Processes find this package by their PYTHONPATH, in tests alone.
"""

import os

import tensorrt_rtx
from tensorrt_rtx import *  # noqa: F403

from tests.tensorrt.runtime import Runtime as Runtime

__version__ = os.environ.get("MIMIC_VERSION", "10.16.2.10")
del CudaGraphStrategy  # noqa: F821 - RTX only


class Builder(tensorrt_rtx.Builder):
    """Builds for a GPU that is named, since there is none at hand."""

    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return config
