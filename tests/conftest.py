"""Settings that must stand before JAX starts, and how hard hypothesis tries."""

import os

from hypothesis import HealthCheck, settings

# JAX reads both once. Eight devices for the tests on a mesh; the CPU even where there is an accelerator,
# since results are compared bit for bit. What the user already set is kept.
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Not switched on: jax_numpy_rank_promotion="raise". Flax runs under it, but the models of its guide, which
# we run as they are written, subtract a mean of shape (5,) from a batch of shape (3, 5).

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
