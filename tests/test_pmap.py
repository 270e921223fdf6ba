"""Under `jax.pmap`, whence programs come: what is counted there, and that what is said of it works."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils

import flaxsplit as fs

from .flags import needs_jit, needs_x32
from .models import X

pytestmark = needs_jit
TX = optax.adam(1e-2)
PARTS = np.asarray(X).reshape(8, 4, 10)


def loss_fn(params: Any, state: Any, batch: Any) -> Any:
    """The loss of a layer."""
    out, state = fs.with_mutable(nn.Dense(3))(params, state, batch)
    return (out**2).mean(), state


def start() -> fs.Carry:
    """A carry on one device."""
    return fs.init_carry(*fs.split_params(nn.Dense(3).init(jax.random.key(0), X)), TX)


def train(mapped: Any, carry: Any) -> None:
    """Four steps."""
    for _ in range(4):
        carry, _ = mapped(carry, PARTS)


def traces_of_jax(options: dict[str, Any], carry: Any) -> int:
    """How often JAX's `pmap` traces a step by hand over the same carry."""
    count = 0

    def step(carry: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        return jax.tree.map(lambda leaf: leaf, carry), jax.lax.pmean(batch.sum(), "batch")

    train(jax.pmap(step, axis_name="batch", **options), carry)
    return count


replicate: Any = jax_utils.replicate
PLACES: dict[str, tuple[dict[str, Any], Any]] = {
    "replicated": ({}, lambda: replicate(start())),
    "one carry": ({"in_axes": (None, 0), "out_axes": (None, 0)}, start),
    "donated": ({"donate_argnums": 0}, lambda: replicate(start())),
}


@needs_x32
@pytest.mark.parametrize("place", PLACES)
def test_traces_are_counted_as_they_are_and_the_advice_works(place: str) -> None:
    options, make = PLACES[place]
    step = fs.with_optimizer(loss_fn, TX, axis_name="batch")
    due = traces_of_jax({}, make()) if place != "one carry" else traces_of_jax(options, make())
    train(jax.pmap(fs.assert_max_traces(step, max_traces=due), axis_name="batch", **options), make())
    if due == 1:  # jax < 0.8
        return
    mapped = jax.pmap(fs.assert_max_traces(step), axis_name="batch", **options)
    with pytest.raises(fs.RetraceError) as caught:
        train(mapped, make())
    assert caught.value.leaves == ("no argument changed",)
    assert caught.value.cause == (
        "jax.pmap traces once more, where its outputs come back as inputs: they are placed as it places them"
    )
    assert caught.value.fix == (
        "jax.pmap(assert_max_traces(step, max_traces=2), ...); or jax.jit over a mesh, which traces once"
    )


def test_without_pmap_the_cause_is_another() -> None:
    step = fs.assert_max_traces(lambda x: 2 * x)
    jax.jit(lambda x: step(x))(jnp.ones(3))
    with pytest.raises(fs.RetraceError) as caught:
        jax.jit(lambda x: step(x))(jnp.ones(3))
    assert caught.value.fix == "step = jit_step(...) once, before the loop"
