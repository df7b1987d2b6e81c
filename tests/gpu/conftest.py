"""The artifacts of tests/cuda, for the dry run."""

from tests.cuda.conftest import checkpoints, llama, one_thread

__all__ = ["checkpoints", "llama", "one_thread"]
