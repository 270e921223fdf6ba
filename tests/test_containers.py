"""Params that are lists, tuples or dataclasses of arrays: chosen whole or in part, merged, trained, saved, adopted."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, struct

import flaxsplit as fs

from .models import structure

TX = optax.adam(0.1)


@struct.dataclass
class Affine:
    """A dataclass of arrays."""

    w: Any
    b: Any


class Net(nn.Module):
    """Holds a list, a dataclass, and a dict with a tuple in it."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        blocks = self.param("blocks", lambda key: [jax.random.normal(each, (3, 3)) for each in jax.random.split(key)])
        affine = self.param("affine", lambda key: Affine(jax.random.normal(key, (3, 1)), jnp.zeros(1)))
        scale: Any = self.param("scale", lambda _: {"a": jnp.ones(3), "rest": (jnp.zeros(3), None)})
        for block in blocks:
            x = jnp.tanh(x @ block) * scale["a"] + scale["rest"][0]
        return (x @ affine.w + affine.b)[:, 0]


X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
VARIABLES: Any = Net().init(jax.random.key(0), X)
ALL = ["affine/b", "affine/w", "blocks/0", "blocks/1", "scale/a", "scale/rest/0"]

CHOICES: list[tuple[Any, list[str]]] = [
    (None, ALL),
    ("*", ALL),
    ("blocks", ["blocks/0", "blocks/1"]),
    ("blocks/0", ["blocks/0"]),
    ("affine/w", ["affine/w"]),
    ("scale/a", ["scale/a"]),
    ("scale/rest/0", ["scale/rest/0"]),
    (["blocks/1", "affine/b"], ["affine/b", "blocks/1"]),
    (lambda path, leaf: leaf.ndim > 1, ["affine/w", "blocks/0", "blocks/1"]),
    (lambda path, leaf: path.startswith("a"), ["affine/b", "affine/w"]),
    (jax.tree.map(lambda leaf: leaf.ndim > 1, VARIABLES["params"]), ["affine/w", "blocks/0", "blocks/1"]),
    ({"blocks": True, "affine": False, "scale": {"a": False, "rest": False}}, ["blocks/0", "blocks/1"]),
]


def paths(tree: Any) -> list[str]:
    """The leaves of a tree as globs see them."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return sorted(
        "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path)
        for path, _ in pairs
    )


@pytest.mark.parametrize(("trainable", "chosen"), CHOICES)
def test_each_leaf_is_in_one_half_and_merged_again(trainable: Any, chosen: list[str]) -> None:
    params, state = fs.split_params(VARIABLES, trainable=trainable)
    assert paths(params) == chosen
    assert sorted([*paths(params), *paths(state.get("params", {}))]) == ALL
    merged: Any = fs.merge_state(params, state)
    assert structure(merged) == structure(VARIABLES)
    assert all(one is other for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(VARIABLES), strict=True))
    again = fs.split_params(merged, trainable=trainable)
    assert structure(again) == structure((params, state))


def test_a_part_of_a_list_is_trained() -> None:
    params, state = fs.split_params(VARIABLES, trainable=["blocks/0", "affine/w"])
    apply = fs.with_mutable(Net(), mutable=False)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = apply(params, state, batch)
        return jnp.mean((out - 1.0) ** 2), state

    step = fs.jit_step(fs.assert_max_traces(fs.with_ema(fs.with_optimizer(loss_fn, TX), decay=0.5)))
    carry = fs.init_carry(params, state | {"ema": params}, TX)
    for _ in range(2):
        carry, _ = step(carry, X)
    trained: Any = fs.merge_state(carry.params, {"params": carry.state["params"]})
    before, after = VARIABLES["params"], trained["params"]
    assert bool((after["blocks"][0] != before["blocks"][0]).any())
    assert bool((after["affine"].w != before["affine"].w).any())
    np.testing.assert_array_equal(after["blocks"][1], before["blocks"][1])
    np.testing.assert_array_equal(after["affine"].b, before["affine"].b)
    saved = serialization.msgpack_restore(serialization.to_bytes(carry))
    adopted = fs.adopt_carry(saved, carry)
    assert structure(adopted) == structure(carry)
    step(adopted, X)
    wider = fs.init_carry(*fs.split_params(VARIABLES), TX)
    moved = fs.adopt_carry(carry, wider, strict=False)
    np.testing.assert_array_equal(moved.params["blocks"][1], before["blocks"][1])
    np.testing.assert_array_equal(moved.params["blocks"][0], carry.params["blocks"][0])


def test_a_leaf_in_both_halves_of_a_list() -> None:
    one, other = {"blocks": [jnp.ones(1), None]}, {"blocks": [jnp.ones(1), jnp.ones(1)]}
    with pytest.raises(fs.CollectionError, match=r"not in both\n  got:\n    params\['blocks'\]"):
        fs.merge_state(one, {"params": other})


def test_a_carry_that_holds_none_is_adopted() -> None:
    carry = fs.init_carry({"layers": (jnp.ones(2), None)}, {"nothing": {"a": None}}, TX)
    assert structure(fs.adopt_carry(jax.device_get(carry), carry)) == structure(carry)
    text = serialization.msgpack_restore(serialization.to_bytes(carry))
    assert structure(fs.adopt_carry(text, carry)) == structure(carry)
    with pytest.raises(fs.CollectionError, match=r"carry.params\['layers'\]\[0\]: f32\[2\] -> absent"):
        fs.adopt_carry(carry._replace(params={"layers": (None, None)}), carry)
