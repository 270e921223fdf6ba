"""Settings that must stand before JAX starts, and how hard hypothesis tries."""

import os

import pytest
from hypothesis import HealthCheck, settings

# JAX reads both once. Eight devices for the tests on a mesh; the CPU even where there is an accelerator,
# since results are compared bit for bit. What the user already set is kept.
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The first example of a test pays for compiling: no deadline, and no complaint about slow input.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.register_profile("deep", settings.get_profile("default"), max_examples=10_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Read by type checkers (`make types`), not run: half of it is there to be rejected. And a process of its own.
collect_ignore = ["typing", "distributed/law_worker.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks docstrings as tests are marked."""
    from .flags import DOCTESTS  # imports JAX, which reads the variables above

    for item in items:
        if item.name in DOCTESTS:
            item.add_marker(DOCTESTS[item.name])
