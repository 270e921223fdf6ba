"""`skip_nonfinite`: law 10, on every stack of combinators; a bad batch costs one step and not the run."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from .flags import needs_jit, needs_x32
from .meshes import KINDS, line
from .models import numbers, structure

# Every carry has an average, to see that a step not taken leaves it.
pytestmark = [needs_jit, pytest.mark.filterwarnings("ignore:with_optimizer:flaxsplit.UntouchedStateWarning")]
X = jax.random.normal(jax.random.key(0), (16, 4))
BAD = X.at[3, 1].set(jnp.nan)
TX = optax.adam(0.1)


class Net(nn.Module):
    """Dense, BatchNorm, Dropout."""

    axis_name: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps `[batch, 4]` to `[batch, 1]`."""
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.2, deterministic=not train)(x))


def loss_of(axis_name: Any = None) -> Any:
    """The loss function of `Net`."""
    apply: Any = fs.with_rngs(fs.with_mutable(Net(axis_name)))

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = apply(params, state, batch)
        return (out**2).mean(), state

    return loss_fn


def start(sharding: Any = None) -> fs.Carry:
    """A carry with statistics, keys, an average, and a tree of the caller's that began at infinity."""
    params, state = fs.split_params(Net().init(jax.random.key(1), X, train=False))
    state = state | fs.rng_state(dropout=jax.random.key(2)) | {"ema": params, "extra": {"best": jnp.inf, "n": 3}}
    return fs.init_carry(params, state, TX, sharding=sharding)


def assert_equal(left: Any, right: Any, rtol: float = 0.0) -> None:
    """Compares two trees, keys by their data: bit for bit, or as far as XLA rounds what it fuses in another way."""
    assert structure(left) == structure(right)
    close: Any = {"rtol": rtol, "atol": rtol / 10}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(numbers(a), numbers(b), **close), left, right)


def without_keys(carry: fs.Carry) -> Any:
    """All of a carry but what moves at each step."""
    return carry._replace(state={name: tree for name, tree in carry.state.items() if name != "rngs"})


STACKS: dict[str, Any] = {
    "alone": lambda: fs.with_optimizer(loss_of(), TX),
    "microbatches": lambda: fs.with_optimizer(loss_of(), TX, microbatches=4),
    "average": lambda: fs.with_ema(fs.with_optimizer(loss_of(), TX), decay=0.9),
    "accumulation": lambda: fs.with_ema(fs.with_optimizer(loss_of(), TX, microbatches=2), decay=0.9, every=2),
    "aux": lambda: with_aux(fs.with_optimizer(loss_of(), TX)),
}


def with_aux(step: Any) -> Any:
    """A step that gives out more than a loss; what is beside the loss may be what it likes."""

    def stepping(carry: Any, batch: Any) -> Any:
        carry, loss = step(carry, batch)
        return carry, (loss, {"share": jnp.float32(jnp.nan)})

    return stepping


@pytest.mark.parametrize("stack", STACKS)
def test_law_10_it_is_the_step_and_a_poisoned_batch_changes_the_keys_alone(stack: str) -> None:
    step = STACKS[stack]()
    plain = fs.jit_step(step, donate=False)
    guarded = fs.jit_step(fs.assert_max_traces(fs.skip_nonfinite(step)), donate=False)
    carry = start()
    for _ in range(2):
        expected, out = plain(carry, X)
        carry, same = guarded(carry, X)
        assert_equal((carry, same), (expected, out), rtol=1e-6)
        carry = expected
    after, out = guarded(carry, BAD)
    assert_equal(without_keys(after), without_keys(carry))
    assert_equal(after.state["rngs"], plain(carry, BAD)[0].state["rngs"])
    assert np.isnan(jax.tree.leaves(out)[0])
    on, _ = guarded(after, X)
    assert int(on.step) == 3
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), (on.params, on.state["batch_stats"])))


def test_under_scan_a_bad_batch_among_good_ones() -> None:
    step = fs.skip_nonfinite(fs.with_optimizer(loss_of(), TX))
    many = fs.jit_step(fs.scan_steps(step), donate=False)
    carry, losses = many(start(), jnp.stack([X, BAD, 2 * X]))
    assert np.isfinite(losses).tolist() == [True, False, True]
    expected = start()
    for batch in (X, BAD, 2 * X):
        expected, _ = fs.jit_step(step, donate=False)(expected, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), carry.params, expected.params)
    assert int(carry.step) == 2


def test_without_keys_a_run_is_the_run_without_its_bad_batches() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = fs.with_mutable(nn.BatchNorm(False))(params, state, batch)
        return (out**2 - out).mean(), state

    carry = other = fs.init_carry(*fs.split_params(nn.BatchNorm(False).init(jax.random.key(0), X)), TX)
    step = fs.with_optimizer(loss_fn, TX)
    guarded, plain = fs.jit_step(fs.skip_nonfinite(step), donate=False), fs.jit_step(step, donate=False)
    for i in range(20):
        batch = jnp.roll(X, i, 1)
        carry, _ = guarded(carry, batch.at[0].set(jnp.inf) if i % 3 == 1 else batch)
        other = other if i % 3 == 1 else plain(other, batch)[0]
    assert_equal(carry, other, rtol=1e-5)


def two_devices(kind: Any) -> Any:
    """A mesh of as many devices as the smallest machine has cores: more wait for each other's collectives."""
    return line(kind, 2)


@KINDS
def test_on_a_mesh(kind: Any) -> None:
    mesh = two_devices(kind)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = fs.with_mutable(nn.Dense(1))(params, state, batch)
        return (out**2).mean(), state

    params, state = fs.split_params(nn.Dense(1).init(jax.random.key(1), X))
    carry = fs.init_carry(params, state, TX, sharding=NamedSharding(mesh, P()))
    step = fs.skip_nonfinite(fs.with_optimizer(loss_fn, TX))
    compiled = fs.jit_step(step, like=carry, batch=NamedSharding(mesh, P("data")), donate=False)
    after, _ = jax.block_until_ready(compiled(carry, np.asarray(BAD)))
    assert_equal(after, carry)
    after, _ = jax.block_until_ready(compiled(carry, np.asarray(X)))
    assert int(after.step) == 1


@KINDS
def test_under_shard_map_all_devices_take_a_step_or_none(kind: AxisType) -> None:
    """The params are in parts, one of which gets a gradient that is no number: the other devices see nothing of it."""
    mesh = two_devices(kind)
    cut = NamedSharding(mesh, P("data"))

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return (params["w"] * batch).sum(), state

    step = fs.skip_nonfinite(fs.with_optimizer(loss_fn, optax.sgd(0.1)))
    carry = fs.init_carry({"w": jax.device_put(jnp.arange(16.0), cut)}, {}, optax.sgd(0.1))
    whole: Any = P()
    specs = fs.Carry(whole, {"w": P("data")}, whole, whole)

    def summed(carry: Any, batch: Any) -> Any:
        carry, loss = step(carry, batch)
        return carry, jax.lax.psum(loss, "data")

    mapped = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P())))
    after, loss = jax.block_until_ready(mapped(carry, jax.device_put(jnp.ones(16).at[5].set(jnp.inf), cut)))
    assert_equal(after, carry)
    assert not np.isfinite(loss)
    after, _ = mapped(carry, jax.device_put(jnp.ones(16), cut))
    np.testing.assert_allclose(after.params["w"], jnp.arange(16.0) - 0.1, rtol=1e-6)


def test_overwritten_state_is_kept_too() -> None:
    """The scales of fp8, whose gradient is their new value."""
    state = {"_overwrite_with_gradient": {"scale": jnp.ones(())}}

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        scale = state["_overwrite_with_gradient"]["scale"]
        return (params["w"] * batch).sum() + scale * batch.max(), state

    carry = fs.init_carry({"w": jnp.ones(4)}, state, TX)
    step = fs.jit_step(fs.skip_nonfinite(fs.with_optimizer(loss_fn, TX)), donate=False)
    assert_equal(step(carry, BAD[3])[0], carry)
    moved = step(carry, jnp.arange(4.0))[0]
    assert float(moved.state["_overwrite_with_gradient"]["scale"]) == 3.0


def test_what_is_named_moves_all_the_same() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        loss = (params["w"] * batch).sum()
        extra = state["extra"]
        scale = jnp.where(jnp.isfinite(loss), extra["scale"], extra["scale"] / 2)
        return loss, {"extra": {"scale": scale, "seen": extra["seen"] + 1}}

    carry = fs.init_carry({"w": jnp.ones(4)}, {"extra": {"scale": 8.0, "seen": 0}}, TX)
    step = fs.skip_nonfinite(fs.with_optimizer(loss_fn, TX), moving="state/extra/scale")
    after, _ = fs.jit_step(step, donate=False)(carry, BAD[3])
    assert (float(after.state["extra"]["scale"]), int(after.state["extra"]["seen"]), int(after.step)) == (4.0, 0, 0)
    several = fs.skip_nonfinite(fs.with_optimizer(loss_fn, TX), moving=["state/extra/*", "step"])
    after, _ = several(carry, BAD[3])
    assert (float(after.state["extra"]["scale"]), int(after.state["extra"]["seen"]), int(after.step)) == (4.0, 1, 1)
    assert_equal(after.params, carry.params)


@needs_x32
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older XLA drops the barrier on a CPU")
def test_the_guard_costs_a_few_instructions_for_each_leaf() -> None:
    params = {f"w{i}": jnp.full(3, float(i)) for i in range(40)}

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return sum(jnp.sum((leaf - batch) ** 2) for leaf in params.values()), state

    tx = optax.adam(0.1)
    carry, step = fs.init_carry(params, {}, tx), fs.with_optimizer(loss_fn, tx)
    lowered: Any = [fs.jit_step(each).lower(carry, jnp.zeros(3)) for each in (step, fs.skip_nonfinite(step))]
    texts = [each.compile().as_text() for each in lowered]
    bare, guarded = (sum(" = " in line for line in text.splitlines()) for text in texts)
    leaves = len(jax.tree.leaves(carry))
    assert guarded - bare < 20 * leaves  # one flag for all: worked out for each leaf it would be their square


@pytest.mark.parametrize(("weight", "loss", "taken"), [(1.0, jnp.nan, 0), (jnp.inf, 1.0, 0), (1.0, 1.0, 1), (2, 3, 1)])
def test_the_loss_and_the_carry_are_looked_at(weight: float, loss: float, taken: int) -> None:
    """Whole numbers are finite."""

    def set_weight(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
        del batch
        new = jnp.full_like(carry.params["w"], weight)
        return carry._replace(step=carry.step + 1, params={"w": new}), jnp.asarray(loss)

    step = fs.skip_nonfinite(set_weight)
    carry, out = step(fs.init_carry({"w": jnp.asarray(type(weight)(0))}, {}, optax.identity()), None)
    assert (int(carry.step), float(carry.params["w"])) == (taken, weight if taken else 0)
    np.testing.assert_equal(np.asarray(out), loss)
    assert step.__name__ == "set_weight"


def test_what_it_refuses() -> None:
    step: Any = fs.with_optimizer(loss_of(), TX)
    with pytest.raises(fs.CollectionError) as caught:
        fs.skip_nonfinite(step, moving="state/extras/*")(start(), X)
    assert str(caught.value).splitlines()[2:] == [
        "    'state/extras/*' matches none of 31",
        "  likely cause: a misspelt path, or one that does not begin with step, params, state or opt_state",
        "  fix: did you mean 'state/extra/n'?",
    ]
    no_step: Any = Net()
    wrong: list[Any] = [3, [1, 2], None]
    for each in wrong:
        with pytest.raises(fs.SignatureError):
            fs.skip_nonfinite(step, moving=each)
    with pytest.raises(fs.SignatureError):
        fs.skip_nonfinite(no_step)
    with pytest.raises(fs.StateDriftError) as drift:  # where a select would have broadcast
        fs.skip_nonfinite(lambda carry, batch: (carry._replace(params={"w": jnp.ones((2, 3))}), 0.0))(
            fs.init_carry({"w": jnp.ones(3)}, {}, TX), X
        )
    assert drift.value.leaves == ("carry.params['w']: f32[3] -> f32[2,3]",)
