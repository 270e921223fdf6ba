"""Marks for tests of what JAX does not do under one of its flags. `make flags` runs the suite under each of them."""

from typing import Any

import jax
import pytest

CONFIG: Any = jax.config  # its flags are attributes that no checker sees

ONCE = 0 if CONFIG.jax_disable_jit else 1
"""How often a step is traced and compiled."""

needs_jit = pytest.mark.skipif(
    CONFIG.jax_disable_jit,
    reason="JAX_DISABLE_JIT: nothing is compiled, donated, traced just once or shared by processes",
)
needs_donation = pytest.mark.skipif(
    CONFIG.jax_disable_jit or CONFIG.jax_debug_nans,
    reason="JAX_DEBUG_NANS: JAX keeps what goes in, to look where a NaN came from, and donates nothing",
)
needs_nan = pytest.mark.skipif(CONFIG.jax_debug_nans, reason="JAX_DEBUG_NANS: JAX refuses a NaN itself")
needs_caches = pytest.mark.skipif(
    CONFIG.jax_check_tracer_leaks, reason="JAX_CHECK_TRACER_LEAKS: JAX compiles anew for each of 10,000 leaves"
)
needs_promotion = pytest.mark.skipif(
    CONFIG.jax_numpy_rank_promotion == "raise",
    reason="JAX_NUMPY_RANK_PROMOTION=raise: a state that takes on another rank is what this test is about",
)
needs_x32 = pytest.mark.skipif(
    CONFIG.jax_enable_x64, reason="JAX_ENABLE_X64: data without a dtype are f64, Flax's batch statistics f32"
)

needs_defaults = pytest.mark.skipif(
    CONFIG.jax_check_tracer_leaks
    or CONFIG.jax_debug_nans
    or CONFIG.jax_enable_x64
    or CONFIG.jax_numpy_rank_promotion == "raise",
    reason="a flag is set that changes what is measured: the package is tested under it, its benchmarks are not",
)

DOCTESTS = {
    "flaxsplit._adopt.adopt_carry": needs_x32,
    "flaxsplit._explain.explain_step": needs_jit,
    "flaxsplit._nnx.from_nnx": needs_x32,
    "flaxsplit._nnx.to_nnx": needs_x32,
    "flaxsplit._jit.jit_step": needs_x32,
    "flaxsplit._scan.scan_steps": needs_x32,
    "flaxsplit._ema.with_ema": needs_x32,
    "flaxsplit._traces.assert_max_traces": needs_jit,
    "flaxsplit._traces.compile_log": needs_jit,
}
"""Docstrings that print float32 or count compiles."""
