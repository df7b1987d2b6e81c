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
