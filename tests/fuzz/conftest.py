"""How long to fuzz: a few seconds for each kind of file in `make test`, as long as it takes in `make fuzz`."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SHARED = {"deadline": 5000, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("test", max_examples=150, **SHARED)
settings.register_profile("fuzz", max_examples=20_000, print_blob=True, **SHARED)
settings.load_profile(os.environ.get("GLMTRT_FUZZ", "test"))


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """No file makes a reader take more than 500 MB: an allocation beyond that fails."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 500_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)
