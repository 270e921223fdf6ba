"""Settings that must stand before JAX starts, and how hard hypothesis tries."""

import gc
import os
import pathlib

import pytest
from hypothesis import HealthCheck, settings

# JAX reads both once. Machine code as LLVM makes it fastest: what is compared are results and XLA's instructions, and
# neither changes. Eight devices for the tests on a mesh; the CPU even where there is an accelerator, since results are
# compared bit for bit. What the user already set is kept: of equal flags the last counts.
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
if not os.environ.get("XLA_FLAGS", "").endswith(_EIGHT_DEVICES):  # a process that this one starts has them already
    os.environ["XLA_FLAGS"] = f"{_FAST} {os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 (reads the variables above)

# What XLA compiled once is read back, by the other tests and by the next run; counts of compiles stay what they are. It
# is no variable: processes that tests start, some to be killed, would write there too.
_CACHE = os.environ.get("FLAXSPLIT_JAX_CACHE", str(pathlib.Path(__file__).parent.parent / "build" / "jax"))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", _CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# No test reads of an XLA instruction in which line of Python it was: to write that down is a twentieth of the run.
jax.config.update("jax_traceback_in_locations_limit", 0)

# JAX keeps what it traced in caches of many objects; walked less often, they cost a tenth of the run less.
gc.set_threshold(100_000, 20, 100)

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


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks docstrings as tests are marked, and of tests that compile much most cases."""
    from . import few, flags  # imports JAX, which reads the variables above

    few.mark(items)
    for item in items:
        if item.name in flags.DOCTESTS:
            item.add_marker(flags.DOCTESTS[item.name])
