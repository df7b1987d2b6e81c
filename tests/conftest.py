"""Settings that every test shares: two threads, no network model hubs, records kept out of the user's cache."""

from __future__ import annotations

import os

import pytest

# Before anything imports tvm or torch: both read these once. Tests run side by side, one thread pool each.
os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_BIND_THREADS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ARKINFER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


# What shares an artifact, or a compiler's run, that takes long to make goes to one of the processes that run the tests.
_FILES = ("kernels/triton/test_compiled.py", "kernels/triton/test_interpreted.py")
_FOLDERS = ("cuda", "mlc", "native", "onnx", "tensorrt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.as_posix()
        group = next((name for name in (*_FILES, *(f"/tests/{name}/" for name in _FOLDERS)) if name in path), None)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group.strip("/")))
