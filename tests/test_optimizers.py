"""Every transformation of optax in a step: one compile, and the loop by hand."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import flaxsplit as fs
from tools import optimizers

from .flags import needs_jit, needs_x32

pytestmark = [needs_jit, needs_x32]
NAMES = sorted(name for name in {*optimizers.names()} if optimizers.kind(name) == "transformation")
TRIED = [name for name in NAMES if name.rpartition(".")[2] not in optimizers.PARTIAL]
DESCENDED = 0.05


def release(version: str) -> list[int]:
    """A version as numbers."""
    return [int(each) for each in re.findall(r"\d+", version)[:3]]


def test_every_public_name_is_on_the_page() -> None:
    page = optimizers.PAGE.read_text()
    tried = re.findall(r"Tried with optax (\S+)\.", page)[0]
    unknown = {*optimizers.names()} - optimizers.listed(page)
    assert len(TRIED) > 90
    assert not unknown or release(optax.__version__) < release(tried), "python tools/optimizers.py --write"


@pytest.mark.parametrize("name", TRIED)
def test_a_step_is_the_loop_by_hand(name: str) -> None:
    each = optimizers.trial(name)
    assert optimizers.fault(each) is None
    row = next(line for line in optimizers.PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert row.endswith(f"| {f'`{each.error.fix}`' if each.error else 'as it is'} |")


def test_what_is_no_step_by_hand_is_seen() -> None:
    each = optimizers.trial("optax.adam")
    assert optimizers.fault(each._replace(theirs=optimizers.by_hand(optax.adam(0.2)))) is not None
    drifting = each._replace(ours=lambda carry, _: (carry._replace(step=carry.step * 1.0), 0.0))
    assert optimizers.fault(drifting) == "the carry comes out in other types"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_three_steps_compile_once_and_give_the_same_bits(name: str) -> None:
    each = optimizers.trial(name)
    step: Any = fs.jit_step(fs.assert_max_traces(each.ours), donate=False)
    hand: Any = jax.jit(each.theirs)
    ours = theirs = each.carry
    for _ in range(3):
        (ours, loss), (theirs, expected) = step(ours, optimizers.BATCH), hand(theirs, optimizers.BATCH)
        np.testing.assert_array_equal(loss, expected)
    assert step._cache_size() == 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        other = dict(jax.tree_util.tree_leaves_with_path(theirs))[path]
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


def test_lookahead_moves_the_fast_params_and_pulls_the_slow_ones_after_them() -> None:
    tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    start = {"w": jnp.ones(2)}
    carry = fs.init_carry(optax.LookaheadParams.init_synced(start), {}, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(lambda p, s, b: ((p["w"] * b).sum(), s), tx)))
    carry, _ = step(carry, jnp.ones(2))
    params: Any = carry.params
    np.testing.assert_allclose(params.fast["w"], 0.9)
    np.testing.assert_allclose(params.slow["w"], 1.0)
    carry, _ = step(carry, jnp.ones(2))
    params = carry.params
    np.testing.assert_allclose(params.fast["w"], 0.9)  # half of the way from 1.0 to 0.8, and synchronized
    np.testing.assert_allclose(params.slow["w"], 0.9)


def test_sam_in_one_call_asks_for_gradients_elsewhere() -> None:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    tx = optax.contrib.sam(optax.sgd(0.1), adversary, sync_period=2, opaque_mode=True)
    carry = fs.init_carry(optimizers.PARAMS, {}, tx)
    ours = fs.with_optimizer(optimizers.loss_fn, tx)
    assert optimizers.fault(optimizers.Trial(ours, optimizers.by_hand(tx), carry)) is None
    step = fs.jit_step(fs.assert_max_traces(ours))
    losses = []
    for _ in range(50):
        carry, loss = step(carry, optimizers.BATCH)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.contrib.split_real_and_imaginary(optax.adam(0.3)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.2)),
    ],
    ids=["sgd", "adam", "clipped"],
)
def test_complex_params_are_conjugated_as_optax_wants(tx: optax.GradientTransformation) -> None:
    goal = jnp.array([3 - 1j, 2j])
    start = {"w": jnp.array([1 + 2j, -1j])}

    def loss_fn(params: Any, state: Any, goal: Any) -> Any:
        return jnp.sum(jnp.abs(params["w"] - goal) ** 2), state

    def hand(carry: fs.Carry, goal: Any) -> Any:
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(carry.params, carry.state, goal)
        grads = jax.tree.map(jnp.conj, grads)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return fs.Carry(carry.step + 1, params, state, opt_state), loss

    carry = expected = fs.init_carry(start, {}, tx)
    step: Any = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)), donate=False)
    by_hand: Any = jax.jit(hand)
    for _ in range(60):
        (carry, _), (expected, _) = step(carry, goal), by_hand(expected, goal)
    assert float(loss_fn(carry.params, {}, goal)[0]) < DESCENDED
    np.testing.assert_array_equal(carry.params["w"], expected.params["w"])


def test_gradients_that_are_handed_to_the_optimizer_are_conjugated_too() -> None:
    seen: list[Any] = []

    def update(updates: Any, state: Any, params: Any = None, *, grad: Any, grad_fn: Any) -> Any:
        del params
        seen.extend([updates["w"], grad["w"], grad_fn({"w": jnp.array([1 + 2j])})["w"]])
        return updates, state

    given: Any = update
    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), given)
    carry = fs.init_carry({"w": jnp.array([1 + 2j])}, {}, tx)
    fs.with_optimizer(lambda p, s, b: (jnp.sum(jnp.abs(p["w"]) ** 2) * b, s), tx)(carry, jnp.float32(1))
    for each in seen:
        np.testing.assert_allclose(each, [2 + 4j])
