"""More steps of real programs, each in no more lines than the step by hand, and with the same bits."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from .flags import needs_jit, needs_nan, needs_x32
from .meshes import KINDS, line
from .models import X, Y
from .test_hlo import instructions
from .test_open_step import APPLY, BATCH, KEY, MODEL, PARAMS, STATE, TX, Net, assert_equal, run

pytestmark = [needs_jit, needs_x32]
W = {"w": jnp.full((10, 1), 0.1)}


def no_longer(ours: Callable[..., Any], by_hand: Callable[..., Any]) -> bool:
    """Whether a step has as few lines as the other, or fewer."""
    return len(inspect.getsourcelines(ours)[0]) <= len(inspect.getsourcelines(by_hand)[0])


def linear_loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Linear regression, without state."""
    return ((batch[0] @ params["w"] - batch[1]) ** 2).mean(), state


def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Regression by `Net`, whose dropout has one key."""
    out, state = APPLY(params, state, batch[0], rngs={"dropout": KEY})
    return optax.l2_loss(out, batch[1]).mean(), state


def loss_by_hand(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """The same with Flax alone."""
    out, state = MODEL.apply({"params": params, **state}, batch[0], mutable=["batch_stats"], rngs={"dropout": KEY})
    return optax.l2_loss(out, batch[1]).mean(), dict(state)


# What happens to gradients


def surgery(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
    """Stops one layer by its name, and clips another."""
    (loss, grads), state = fs.value_and_grad(loss_fn)(carry.params, carry.state, batch)
    grads["Dense_0"] = jax.tree.map(jnp.zeros_like, grads["Dense_0"])
    grads["Dense_1"]["kernel"] = jnp.clip(grads["Dense_1"]["kernel"], -0.01, 0.01)
    return fs.apply_gradients(TX, carry, grads, state), loss


def surgery_by_hand(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
    """The same without flaxsplit."""
    (loss, state), grads = jax.value_and_grad(loss_by_hand, has_aux=True)(carry.params, carry.state, batch)
    grads["Dense_0"] = jax.tree.map(jnp.zeros_like, grads["Dense_0"])
    grads["Dense_1"]["kernel"] = jnp.clip(grads["Dense_1"]["kernel"], -0.01, 0.01)
    updates, opt_state = TX.update(grads, carry.opt_state, carry.params)
    return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), state, opt_state), loss


def weighted(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
    """Adds the gradients of two losses, the statistics threaded through both."""
    (first, grads), state = fs.value_and_grad(loss_fn)(carry.params, carry.state, batch)
    (second, others), state = fs.value_and_grad(loss_fn)(carry.params, state, (batch[0], -batch[1]))
    grads = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, grads, others)
    return fs.apply_gradients(TX, carry, grads, state), first + second


def weighted_by_hand(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
    """The same without flaxsplit."""
    (first, state), grads = jax.value_and_grad(loss_by_hand, has_aux=True)(carry.params, carry.state, batch)
    (second, state), others = jax.value_and_grad(loss_by_hand, has_aux=True)(carry.params, state, (batch[0], -batch[1]))
    grads = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, grads, others)
    updates, opt_state = TX.update(grads, carry.opt_state, carry.params)
    return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), state, opt_state), first + second


@pytest.mark.parametrize(("ours", "theirs"), [(surgery, surgery_by_hand), (weighted, weighted_by_hand)])
def test_gradients_are_changed_by_name_and_added_with_weights(ours: Any, theirs: Any) -> None:
    carry = fs.init_carry(PARAMS, STATE, TX)
    new, loss = run(ours, carry, BATCH)
    assert_equal((new, loss), run(theirs, carry, BATCH))
    assert instructions(ours, carry, BATCH) == instructions(theirs, carry, BATCH)
    assert no_longer(ours, theirs)
    if ours is surgery:
        assert_equal(new.params["Dense_0"], PARAMS["Dense_0"])


def test_the_learning_rate_is_read_from_the_optimizers_state() -> None:
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-2, 0.0, 4))

    def step(carry: fs.Carry, batch: Any) -> Any:
        carry, loss = fs.with_optimizer(loss_fn, tx)(carry, batch)
        return carry, {"loss": loss, "rate": carry.opt_state.hyperparams["learning_rate"]}

    def hand(carry: fs.Carry, batch: Any) -> Any:
        (loss, state), grads = jax.value_and_grad(loss_by_hand, has_aux=True)(carry.params, carry.state, batch)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        carry = fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), state, opt_state)
        return carry, {"loss": loss, "rate": carry.opt_state.hyperparams["learning_rate"]}

    carry = fs.init_carry(PARAMS, STATE, tx)
    ours = run(step, carry, BATCH, steps=3)
    assert_equal(ours, run(hand, carry, BATCH, steps=3))
    np.testing.assert_allclose(ours[1]["rate"], 5e-3, rtol=1e-6)  # the rate of the third update
    assert no_longer(step, hand)


@needs_nan
def test_dynamic_scale_differentiates_the_loss_function_itself() -> None:
    """Flax's own takes the loss as it is; what overflowed is dropped, statistics too; and the scale grows again."""

    class Half(nn.Module):
        """Dense and BatchNorm in float16, the loss so too."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            """Maps `[batch, 10]` to `[batch, 1]`."""
            x = nn.BatchNorm(use_running_average=False, dtype=jnp.float16)(nn.Dense(8, dtype=jnp.float16)(x))
            return nn.Dense(1, dtype=jnp.float16)(x)

    model = Half()
    params, state = fs.split_params(model.init(KEY, X))
    apply: Any = fs.with_mutable(model)

    def half_loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch[0])
        return optax.l2_loss(out, batch[1]).mean().astype(jnp.float32), state

    def step(both: Any, batch: Any) -> Any:
        carry, scale = both
        grads_of = scale.value_and_grad(half_loss, has_aux=True)
        scale, finite, (loss, state), grads = grads_of(carry.params, carry.state, batch)
        new = fs.apply_gradients(TX, carry, grads, state)
        return (jax.tree.map(functools.partial(jnp.where, finite), new, carry), scale), (loss, finite)

    def hand(both: Any, batch: Any) -> Any:
        carry, scale = both

        def loss(params: Any) -> Any:
            out, updated = model.apply({"params": params, **carry.state}, batch[0], mutable=["batch_stats"])
            return optax.l2_loss(out, batch[1]).mean().astype(jnp.float32), dict(updated)

        scale, finite, (value, state), grads = scale.value_and_grad(loss, has_aux=True)(carry.params)
        updates, opt_state = TX.update(grads, carry.opt_state, carry.params)
        new = fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), state, opt_state)
        return (jax.tree.map(functools.partial(jnp.where, finite), new, carry), scale), (value, finite)

    carry = fs.init_carry(params, state, TX)
    scale: Any = DynamicScale(growth_interval=2).replace(fin_steps=jnp.int32(0), scale=jnp.float32(2.0**13))
    ours, theirs = (carry, scale), (carry, scale)
    # like: what lies beside a carry is not committed at first, as the carry is, and JAX would compile for both
    jitted, by_hand = (fs.jit_step(fs.assert_max_traces(each), like=ours, donate=False) for each in (step, hand))
    told, scales = [], []
    with fs.compile_log() as log:
        for size in (1.0, 1e6, 1.0, 1.0, 1.0):
            before = ours[0]
            ours, (_, finite) = jitted(ours, (X * size, Y))
            if not finite:
                assert_equal(ours[0], before)
            told.append(bool(finite))
            scales.append(float(ours[1].scale))
    assert log.compiles["step"] == 1
    for size in (1.0, 1e6, 1.0, 1.0, 1.0):
        theirs, _ = by_hand(theirs, (X * size, Y))
    assert_equal((ours[0], ours[1].scale), (theirs[0], theirs[1].scale))
    assert told == [True, False, True, True, True]
    assert scales == [2.0**13, 2.0**12, 2.0**12, 2.0**12, 2.0**13]
    assert int(ours[0].step) == 4


# Each device, each example, each member


@KINDS
@pytest.mark.parametrize("alpha", [0.0, 0.4], ids=["sam", "gsam"])
def test_each_device_perturbs_by_its_own_gradient(alpha: float, kind: AxisType) -> None:
    """SAM, and GSAM, which takes from the average what of the plain gradient is orthogonal to it."""
    mesh = line(kind, 2)

    class Synced(nn.Module):
        """BatchNorm over all devices."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            """Maps `[batch, 10]` to `[batch, 1]`."""
            x = nn.BatchNorm(use_running_average=False, axis_name="data")(nn.Dense(8)(x))
            return nn.Dense(1)(jnp.tanh(x))

    model = Synced()
    apply: Any = fs.with_mutable(model)

    def synced_loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch[0])
        return optax.l2_loss(out, batch[1]).mean(), state

    def combined(plain: Any, robust: Any) -> Any:
        size = optax.tree.vdot(plain, robust) / optax.tree.vdot(robust, robust)
        return jax.tree.map(lambda p, r: r - alpha * (p - size * r), plain, robust)

    def climbed(params: Any, grads: Any) -> Any:
        return optax.tree.add_scale(params, 0.05 / optax.tree.norm(grads), grads)

    def step(carry: fs.Carry, batch: Any) -> Any:
        grads_of = fs.value_and_grad(synced_loss)
        (loss, plain), state = grads_of(carry.params, carry.state, batch)
        (_, robust), _ = grads_of(climbed(carry.params, plain), carry.state, batch)
        loss, plain, robust = jax.lax.pmean((loss, plain, robust), "data")
        return fs.apply_gradients(TX, carry, combined(plain, robust), state), loss

    def hand(carry: fs.Carry, batch: Any) -> Any:
        def loss_of(params: Any) -> Any:
            out, state = model.apply({"params": params, **carry.state}, batch[0], mutable=["batch_stats"])
            return optax.l2_loss(out, batch[1]).mean(), dict(state)

        grads_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, state), plain = grads_of(carry.params)
        _, robust = grads_of(climbed(carry.params, plain))
        loss, plain, robust = jax.lax.pmean((loss, plain, robust), "data")
        updates, opt_state = TX.update(combined(plain, robust), carry.opt_state, carry.params)
        return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), state, opt_state), loss

    # check_vma=False: a gradient is each device's own, as under pmap. Else JAX itself sums that of replicated params.
    sharded: Any = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=False
    )
    params, state = _initial(Synced, "data")
    carry = fs.init_carry(params, state, TX, sharding=NamedSharding(mesh, P()))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    ours = run(sharded(step), carry, batch)
    assert_equal(ours, run(sharded(hand), carry, batch))
    assert no_longer(step, hand)
    whole, _ = run(sharded(fs.with_optimizer(synced_loss, TX, axis_name="data")), carry, batch)
    assert not bool((whole.params["Dense_0"]["kernel"] == ours[0].params["Dense_0"]["kernel"]).all())


def _initial(module: Any, axis_name: str) -> Any:
    """Variables of a module that names an axis: initialized under a `vmap` of one lane."""
    variables = jax.vmap(lambda x: module().init(KEY, x), axis_name=axis_name)(X[None])
    return fs.split_params(jax.tree.map(lambda leaf: leaf[0], variables))


def test_differentially_private_steps_by_optaxs_own_aggregate() -> None:
    """Each example's gradient is clipped, and noise is added, by `optax.contrib.differentially_private_aggregate`."""
    tx = optax.chain(optax.contrib.differentially_private_aggregate(1.0, 0.5, 0), optax.adam(1e-2))
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
    apply: Any = fs.with_mutable(model)

    def one_loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch[0])
        return optax.l2_loss(out, batch[1]).sum(), state

    def step(carry: fs.Carry, batch: Any) -> Any:
        (losses, grads), state = fs.vmap_stateful(fs.value_and_grad(one_loss))(carry.params, carry.state, batch)
        return fs.apply_gradients(tx, carry, grads, state), losses.mean()

    def hand(carry: fs.Carry, batch: Any) -> Any:
        def loss(params: Any, batch: Any) -> jax.Array:
            return optax.l2_loss(model.apply({"params": params}, batch[0]), batch[1]).sum()

        losses, grads = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(carry.params, batch)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), {}, opt_state), losses.mean()

    params, state = fs.split_params(model.init(KEY, X))
    carry = fs.init_carry(params, state, tx)
    ours = run(step, carry, BATCH)
    assert_equal(ours, run(hand, carry, BATCH))
    assert instructions(step, carry, BATCH) == instructions(hand, carry, BATCH)
    assert no_longer(step, hand)
    wider, _ = fs.vmap_stateful(fs.value_and_grad(one_loss))(params, state, BATCH)
    assert wider[1]["layers_0"]["kernel"].shape == (32, 10, 8)


def test_a_population_whose_members_share_the_batch() -> None:
    def shared_loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = APPLY(params, state, batch[0], rngs={"dropout": KEY})
        return optax.l2_loss(out, batch[1]).mean(), state

    start = [fs.split_params(MODEL.init(jax.random.key(i), X, train=False)) for i in range(3)]
    params, state = jax.tree.map(lambda *each: jnp.stack(each), *start)
    mapped = fs.vmap_stateful(
        fs.value_and_grad(shared_loss), in_axes=None, axis_name=None, params_axes=0, state_axes={"batch_stats": 0}
    )

    def step(carry: fs.Carry, batch: Any) -> Any:
        (losses, grads), state = mapped(carry.params, carry.state, batch)
        return fs.apply_gradients(optax.sgd(0.1), carry, grads, state), losses

    def hand(carry: fs.Carry, batch: Any) -> Any:
        grads_of = jax.vmap(jax.value_and_grad(loss_by_hand, has_aux=True), in_axes=(0, 0, None))
        (losses, state), grads = grads_of(carry.params, carry.state, batch)
        updates, opt_state = optax.sgd(0.1).update(grads, carry.opt_state, carry.params)
        return fs.Carry(carry.step + 1, optax.apply_updates(carry.params, updates), state, opt_state), losses

    carry = fs.init_carry(params, state, optax.sgd(0.1))
    ours = run(step, carry, BATCH)
    assert_equal(ours, run(hand, carry, BATCH))
    assert no_longer(step, hand)
    assert len({float(loss) for loss in ours[1]}) == 3


# Several networks


@pytest.mark.filterwarnings("ignore::flaxsplit.DroppedStateWarning")  # one key for all, by hand too
def test_both_losses_of_a_gan_write_both_networks_statistics() -> None:
    """Each loss runs both networks in training mode. What one update wrote, the next one reads."""
    nets: Any = {"g": Net(), "d": Net()}
    start = {
        name: fs.split_params(net.init(jax.random.key(i), X, train=False)) for i, (name, net) in enumerate(nets.items())
    }
    make, judge = (_keyed(fs.with_mutable(nets[name])) for name in nets)

    def judge_loss(params: Any, state: Any, batch: Any, other: Any) -> tuple[jax.Array, Any]:
        fake, g = make(other, state["g"], batch[1])
        real, d = judge(params, state["d"], batch[0])
        false, d = judge(params, d, jnp.tile(fake, (1, 10)))
        return (nn.softplus(-real) + nn.softplus(false)).mean(), {"g": g, "d": d}

    def make_loss(params: Any, state: Any, batch: Any, other: Any) -> tuple[jax.Array, Any]:
        fake, g = make(params, state["g"], batch[1])
        false, d = judge(other, state["d"], jnp.tile(fake, (1, 10)))
        return nn.softplus(-false).mean(), {"g": g, "d": d}

    def step(carries: Any, batch: Any) -> Any:
        g, d = carries["g"], carries["d"]
        (d_loss, grads), state = fs.value_and_grad(judge_loss)(d.params, {"g": g.state, "d": d.state}, batch, g.params)
        d = fs.apply_gradients(TX, d, grads, state["d"])
        (g_loss, grads), state = fs.value_and_grad(make_loss)(g.params, state, batch, d.params)
        g = fs.apply_gradients(TX, g, grads, state["g"])
        return {"g": g, "d": d._replace(state=state["d"])}, (d_loss, g_loss)

    def hand(carries: Any, batch: Any) -> Any:
        g, d = carries["g"], carries["d"]
        judge_grads = jax.value_and_grad(judge_by_hand, has_aux=True)
        (d_loss, state), grads = judge_grads(d.params, {"g": g.state, "d": d.state}, batch, g.params)
        updates, opt_state = TX.update(grads, d.opt_state, d.params)
        d = fs.Carry(d.step + 1, optax.apply_updates(d.params, updates), state["d"], opt_state)
        (g_loss, state), grads = jax.value_and_grad(make_by_hand, has_aux=True)(g.params, state, batch, d.params)
        updates, opt_state = TX.update(grads, g.opt_state, g.params)
        g = fs.Carry(g.step + 1, optax.apply_updates(g.params, updates), state["g"], opt_state)
        return {"g": g, "d": d._replace(state=state["d"])}, (d_loss, g_loss)

    def net(params: Any, state: Any, x: Any) -> Any:
        out, state = Net().apply({"params": params, **state}, x, mutable=["batch_stats"], rngs={"dropout": KEY})
        return out, dict(state)

    def judge_by_hand(params: Any, state: Any, batch: Any, other: Any) -> tuple[jax.Array, Any]:
        fake, g = net(other, state["g"], batch[1])
        real, d = net(params, state["d"], batch[0])
        false, d = net(params, d, jnp.tile(fake, (1, 10)))
        return (nn.softplus(-real) + nn.softplus(false)).mean(), {"g": g, "d": d}

    def make_by_hand(params: Any, state: Any, batch: Any, other: Any) -> tuple[jax.Array, Any]:
        fake, g = net(params, state["g"], batch[1])
        false, d = net(other, state["d"], jnp.tile(fake, (1, 10)))
        return nn.softplus(-false).mean(), {"g": g, "d": d}

    carries = {name: fs.init_carry(params, state, TX) for name, (params, state) in start.items()}
    ours = run(step, carries, (X, X[:, ::-1]))
    assert_equal(ours, run(hand, carries, (X, X[:, ::-1])))
    assert instructions(step, carries, (X, X[:, ::-1])) == instructions(hand, carries, (X, X[:, ::-1]))
    assert no_longer(step, hand)
    jax.tree.map(
        lambda new, old: np.testing.assert_array_less(0, abs(np.asarray(new - old)).max()),
        {name: each.state for name, each in ours[0].items()},
        {name: each.state for name, each in carries.items()},
    )


def _keyed(apply: Any) -> Any:
    return lambda params, state, x: apply(params, state, x, rngs={"dropout": KEY})


# Arguments of a call


def test_further_arguments_reach_every_part_as_they_are() -> None:
    """A microbatch and a scanned step get a part of the batch, and all else whole: the very same objects, in Python."""
    seen: list[Any] = []

    def told_loss(params: Any, state: Any, batch: Any, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        seen.append((jax.tree.map(jnp.shape, batch), args, kwargs))
        return linear_loss(params, state, batch)

    inner = fs.with_ema(fs.with_optimizer(told_loss, TX, microbatches=4), decay=0.9, every=2)
    step = fs.assert_max_traces(fs.scan_steps(fs.assert_max_traces(inner)))
    batches = jnp.stack([X] * 3), jnp.stack([Y] * 3)
    args: Any = (jnp.ones(7), None, "mode", print)
    kwargs: Any = {"rival": {"w": jnp.ones((5, 3))}, "clip": 0.2}
    step(fs.init_carry(W, {"ema": W}, TX), batches, *args, **kwargs)
    assert seen
    for shapes, got, named in seen:
        assert shapes == ((8, 10), (8, 1))
        assert len(got) == len(args)
        assert all(a is b for a, b in zip(got, args, strict=True))
        assert named.keys() == kwargs.keys()
        assert all(named[name] is kwargs[name] for name in kwargs)


def test_arguments_are_traced_once_whatever_their_values() -> None:
    def told_loss(params: Any, state: Any, batch: Any, key: Any, *, clip: Any, rival: Any) -> tuple[jax.Array, Any]:
        noise = jax.random.normal(key, batch[0].shape)
        loss, state = linear_loss(params, state, (batch[0] + clip * noise, batch[1]))
        return loss + (rival["w"] ** 2).sum(), state

    carry = fs.init_carry(W, {"ema": W}, TX)
    inner = fs.with_ema(fs.with_optimizer(told_loss, TX, microbatches=2), decay=0.9)
    step = fs.jit_step(fs.assert_max_traces(fs.scan_steps(inner)), donate=False)
    batches, losses = (jnp.stack([X] * 3), jnp.stack([Y] * 3)), []
    with fs.compile_log() as log:
        for i in range(4):
            rival = {"w": jnp.full(3, float(i))}
            carry, out = step(carry, batches, jax.random.key(i), clip=jnp.float32(i), rival=rival)
            losses.append(out)
    assert log.compiles["told_loss"] == 1
    assert int(carry.step) == 12
    assert len({float(each[0]) for each in losses}) == 4


def test_an_nnx_module_that_takes_streams_and_a_metric() -> None:
    """A holder keeps model, `nnx.Rngs` and metric; its call hands them to the model as the model wants them."""

    class Model(nnx.Module):
        """Takes its streams as an argument."""

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.last = nnx.Linear(10, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
            """Maps `[batch, 10]` to `[batch, 1]`."""
            return self.last(self.dropout(nnx.relu(self.first(x)), rngs=rngs))

    class Holder(nnx.Module):
        """The loss, with all that it needs."""

        def __init__(self) -> None:
            self.model, self.rngs = Model(nnx.Rngs(0)), nnx.Rngs(dropout=1)
            self.metric = nnx.metrics.Average("loss")

        def __call__(self, batch: Any) -> jax.Array:
            """Gives the loss, and notes it."""
            loss = optax.l2_loss(self.model(batch[0], self.rngs), batch[1]).mean()
            self.metric.update(loss=loss)
            return loss

    fn, params, state = fs.from_nnx(Holder())
    carry = fs.init_carry(params, state, TX)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(fn, TX)), like=carry, donate=False)
    losses = []
    for _ in range(4):
        carry, loss = step(carry, BATCH)
        losses.append(float(loss))
    trained: Any = fs.to_nnx(Holder(), carry.params, carry.state)
    assert int(trained.rngs.dropout.count[...]) == 4
    np.testing.assert_allclose(trained.metric.compute(), np.mean(losses), rtol=1e-6)

    by_hand: Any = Holder()
    merge = functools.partial(nnx.merge, copy=True) if "copy" in inspect.signature(nnx.merge).parameters else nnx.merge
    split: Any = nnx.split
    graph, own, rest = split(by_hand, nnx.Param, ...)

    @jax.jit
    def hand(own: Any, opt_state: Any, rest: Any, batch: Any) -> Any:
        def loss(own: Any) -> Any:
            module: Any = merge(graph, own, rest)
            return module(batch), split(module, nnx.Param, ...)[2]

        (value, new_rest), grads = jax.value_and_grad(loss, has_aux=True)(own)
        updates, opt_state = TX.update(grads, opt_state, own)
        return optax.apply_updates(own, updates), opt_state, new_rest, value

    opt_state, expected = TX.init(own), []
    for _ in range(4):
        own, opt_state, rest, value = hand(own, opt_state, rest, BATCH)
        expected.append(float(value))
    assert losses == expected
