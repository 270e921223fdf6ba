"""Mistakes of other projects, small and in our own words, and what flaxsplit does: `docs/cited.md` links them."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import flaxsplit as fs

from .flags import needs_donation, needs_jit, needs_x32
from .meshes import AUTO, EXPLICIT, line, on

pytestmark = [needs_jit, needs_x32]
PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "cited.md").read_text()
NAME = "_overwrite_with_gradient"
TX = optax.adam(1e-2)


def mean_square(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """A loss with nothing to go wrong in it."""
    return ((batch @ params["w"]) ** 2).mean(), state


def compiles(log: fs.CompileLog) -> int:
    """Of every function that was compiled meanwhile and has the loss's name."""
    return log.compiles["mean_square"]


def test_maxtext_4174_a_dummy_batch_without_a_sharding_compiles_the_step_once_more() -> None:
    cut, whole = on(line(AUTO, 2), "data"), on(line(AUTO, 2))
    dummy, real = np.zeros((8, 4), np.float32), jax.device_put(np.ones((8, 4), np.float32), cut)
    step = fs.with_optimizer(mean_square, TX)

    def carry() -> fs.Carry:
        return fs.init_carry({"w": jnp.ones((4, 2))}, {}, TX, sharding=whole)

    by_hand = jax.jit(step)
    with fs.compile_log() as log:
        by_hand(carry(), dummy)
        by_hand(carry(), real)
    assert compiles(log) == 2
    watched = fs.jit_step(fs.assert_max_traces(step), donate=False)
    watched(carry(), dummy)
    with pytest.raises(fs.RetraceError, match="traced 2 times"):
        watched(carry(), real)
    alike = fs.jit_step(fs.assert_max_traces(step), donate=False)
    with fs.compile_log() as log:
        alike(carry(), jax.device_put(dummy, cut))
        alike(carry(), real)
    assert compiles(log) == 1


def test_orbax_2408_a_checkpoint_forgets_that_its_axes_were_explicit() -> None:
    explicit, auto = line(EXPLICIT, 2), line(AUTO, 2)
    batch = jax.device_put(np.ones((8, 4), np.float32), on(explicit, "data"))
    step = fs.with_optimizer(mean_square, TX)

    def carry() -> fs.Carry:
        return fs.init_carry({"w": jnp.ones((4, 2))}, {}, TX, sharding=on(explicit))

    restored = jax.device_put(jax.device_get(carry()), on(auto))
    by_hand = jax.jit(step)
    by_hand(carry(), batch)
    with pytest.raises(Exception, match=r"(?i)mesh"):
        by_hand(restored, batch)
    ours = fs.jit_step(fs.assert_max_traces(step), donate=False)
    with fs.compile_log() as log:
        ours(carry(), batch)
        ours(fs.adopt_carry(restored, carry()), batch)
    assert compiles(log) == 1


@needs_donation
def test_flax_1432_named_tuples_that_come_back_as_dicts_compile_nothing() -> None:
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(mean_square, TX)))
    carry, _ = step(fs.init_carry({"w": jnp.ones((4, 2))}, {}, TX), jnp.ones((8, 4)))
    restored: Any = serialization.msgpack_restore(serialization.to_bytes(carry._asdict()))
    like = fs.init_carry({"w": jnp.ones((4, 2))}, {}, TX)
    assert isinstance(restored["opt_state"], dict)
    assert isinstance(like.opt_state, tuple)
    carry, _ = step(fs.adopt_carry(restored, like), jnp.ones((8, 4)))
    assert int(carry.step) == 2


@jax.custom_vjp
def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """As an fp8 layer: the cotangent of `scale` is its next value, the largest number that went in."""
    return x * 1.0


def _forward(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return scaled(x, scale), jnp.abs(x).max()


def _backward(largest: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent, largest


scaled.defvjp(_forward, _backward)


def with_scale(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """A loss that returns the state as it was given, the scale too."""
    return (scaled(batch, state[NAME]["scale"]) * params["w"]).mean(), state


def test_maxtext_5021_the_old_scale_is_not_written_over_the_new_one() -> None:
    params, state, batch = {"w": jnp.ones(())}, {NAME: {"scale": jnp.float32(2.0)}}, jnp.array([1.0, 3.0])

    def by_hand(params: Any, scales: Any) -> jax.Array:
        return with_scale(params, {NAME: scales}, batch)[0]

    grads = jax.grad(by_hand, argnums=(0, 1))(params, state[NAME])
    assert float(({NAME: grads[1]} | state)[NAME]["scale"]) == 2.0  # merged in the wrong order
    _, new_state = fs.value_and_grad(with_scale)(params, state, batch)
    assert float(new_state[NAME]["scale"]) == 3.0


@pytest.mark.parametrize("number", [19534, 7659], ids=["keras: a mean", "marin: the last"])
def test_microbatches_keep_the_largest_amax(number: int) -> None:
    params, state = {"w": jnp.ones(())}, {NAME: {"scale": jnp.float32(2.0)}}
    batch = jnp.array([1.0, 8.0, 2.0, 3.0])
    largest = [float(jnp.abs(batch[i::4]).max()) for i in range(4)]
    wrong = {19534: sum(largest) / 4, 7659: largest[-1]}[number]
    _, new_state = fs.value_and_grad(with_scale, microbatches=4)(params, state, batch)
    assert float(new_state[NAME]["scale"]) == max(largest) == 8.0 != wrong


def test_axlearn_993_microbatches_keep_each_device_its_own_rows() -> None:
    cut, whole = on(line(AUTO), "data"), on(line(AUTO))
    carry = fs.init_carry({"w": jnp.ones((4, 2))}, {}, TX, sharding=whole)
    batch = jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=cut)

    def by_hand(carry: fs.Carry, batch: jax.Array) -> Any:
        parts = batch.reshape(4, 16, 4)  # blocks of rows: a part lies on two of the eight devices
        return jax.lax.map(lambda part: mean_square(carry.params, {}, part)[0], parts).mean()

    def rows(step: Any) -> set[int]:
        """Of each product with the weights, as a device computes it."""
        text = step.lower(carry, batch).compile().as_text()
        return {int(found) for found in re.findall(r"f32\[(\d+),2\]\S* dot\(", text)}

    ours = fs.jit_step(fs.with_optimizer(mean_square, TX, microbatches=4), like=carry, batch=cut)
    assert rows(ours) - {4} == {64 // 8 // 4}
    assert max(rows(jax.jit(by_hand))) > 64 // 8 // 4


def containers(tree: Any) -> set[type]:
    """Of what a tree is built; what JAX knows itself, it opens without a call into Python."""
    if isinstance(tree, dict):
        return {dict}.union(*map(containers, tree.values()))
    if isinstance(tree, tuple):
        return {tuple}.union(*map(containers, tree))
    return {type(tree)}


@pytest.mark.parametrize("number", [5088, 2607], ids=["maxtext", "tpu-inference"])
def test_no_variable_of_nnx_is_opened_at_a_dispatch(number: int) -> None:
    module = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    assert containers(nnx.split(module)[1]) == {nnx.State}
    _, params, state = fs.from_nnx(module)
    found = containers(fs.init_carry(params, state, TX))
    assert {kind for kind in found if not issubclass(kind, jax.Array)} == {dict, tuple}


def test_the_page_links_each() -> None:
    """And each that it links is here."""
    linked = re.findall(r"\]\(https://github.com/[\w.-]+/([\w.-]+)/(?:issues|pull)/(\d+)\)", PAGE)
    here = pathlib.Path(__file__).read_text()
    assert len(linked) == len(set(linked)) == 9
    assert {number for _, number in linked if number not in here} == set()
