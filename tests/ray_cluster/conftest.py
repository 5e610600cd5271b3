"""A Ray cluster of this machine. Without Ray nothing here is collected: see `tests/e2e/test_ray.py`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import psutil
import pytest

collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[psutil.Process]:
    """Run Ray, as small as it goes; give this process, of which all of Ray's are descendants."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield psutil.Process()
    ray.shutdown()
