"""One trace of any step: what goes in by name, and what it gives away."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flaxsplit._tracing import trace_of

from .flags import needs_jit, needs_x32

pytestmark = [needs_jit, needs_x32]
CARRY: dict[str, Any] = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
BATCH = jnp.ones(3)


def step(carry: Any, batch: Any, *further: Any, **named: Any) -> Any:
    del further, named
    return {name: leaf + batch for name, leaf in carry.items()}, batch.sum()


def aliased(traced: Any) -> int:
    """How many outputs take the place of an argument."""
    return int(traced.lower().as_text().count("tf.aliasing_output"))


def by(**options: Any) -> Any:
    """The step, jitted as a whole and called through a function that is no `jax.jit`."""
    jitted: Any = jax.jit(step, **options)
    return lambda *args, **kwargs: jitted(*args, **kwargs)


def first_alone(donated: int) -> Any:
    """A step over two halves of a carry, of which it donates one."""
    jitted: Any = jax.jit(lambda a, b, batch: step({"a": a, "b": b}, batch), donate_argnums=donated)
    return lambda carry, batch: jitted(carry["a"], carry["b"], batch)


@pytest.mark.parametrize(
    ("whole", "donated", "jitted"),
    [
        (step, (True, True, False), False),
        (by(donate_argnums=0), (True, True, False), True),
        (by(), (False, False, False), True),
        (first_alone(0), (True, False, False), True),
        (first_alone(1), (False, True, False), True),
        (lambda carry, batch: by(donate_argnums=0)(carry, 2 * batch), (True, True, False), False),
        (jax.jit(step), (False, False, False), True),
        (jax.jit(step, donate_argnums=0), (True, True, False), True),
    ],
)
def test_what_a_step_gives_away_is_its_own_choice_if_it_is_jitted(whole: Any, donated: Any, jitted: bool) -> None:
    traced = trace_of(whole, (CARRY, BATCH), {})
    assert (traced.donated, traced.jitted, aliased(traced)) == (donated, jitted, sum(donated))
    assert traced.named == {"carry": CARRY, "batch": BATCH}
    assert [each.shape for each in jax.tree.leaves(traced.result)] == [(3,), (3,), ()]


@pytest.mark.parametrize(
    ("static", "further", "named"),
    [
        ((), (), {}),
        ((2,), ("mode",), {}),
        ((2,), ("mode", 2 * BATCH), {"args[0]": 2 * BATCH}),
        ((3,), ({}, "mode"), {"args[0]": {}}),
        ((2, 3), ("one", "two", 2 * BATCH), {"args[0]": 2 * BATCH}),
    ],
)
def test_arguments_that_are_static_are_none_of_what_goes_in(static: Any, further: Any, named: dict[str, Any]) -> None:
    traced = trace_of(jax.jit(step, static_argnums=static), (CARRY, BATCH, *further), {"scale": BATCH})
    assert [*traced.named] == ["carry", "batch", *named, "scale"]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, {name: traced.named[name] for name in named}, named))


def test_of_a_function_without_jit_what_is_no_array_is_closed_over() -> None:
    seen = []

    def picky(carry: Any, batch: Any, mode: str, scale: Any) -> Any:
        seen.append((mode, scale))
        return step(carry, batch)

    traced = trace_of(functools.partial(picky, scale=2.0), (CARRY, BATCH, "mode"), {})
    assert seen == [("mode", 2.0)]
    assert [*traced.named] == ["carry", "batch", "args[0]"]
    assert len(traced.donated) == 3


@jax.tree_util.register_pytree_node_class
class Module:
    """Stands for a module of Equinox, which is known by where its class is from."""

    __module__ = "equinox.nn"

    def __init__(self, w: Any, size: Any) -> None:
        self.w, self.size = w, size

    def tree_flatten(self) -> Any:
        return (self.w, self.size), None

    @classmethod
    def tree_unflatten(cls, _: None, parts: Any) -> "Module":
        return cls(*parts)


def test_numbers_in_a_carry_of_equinox_are_constants() -> None:
    def moved(carry: Any, batch: Any) -> Any:
        assert carry["layers"][0].size == 3
        return carry, batch.sum()

    traced = trace_of(moved, ({"layers": [Module(BATCH, 3)]}, BATCH), {})
    assert traced.donated == (True, False)
