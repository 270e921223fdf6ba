"""Steps of real programs, opened between the gradient and the optimizer, beside the same steps by hand: bit for bit."""

import inspect
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

from .flags import needs_jit, needs_x32
from .meshes import KINDS, line
from .models import X, Y, numbers, structure
from .test_hlo import instructions

pytestmark = [needs_jit, needs_x32]
KEY = jax.random.key(0)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
BATCH = (X, Y)


class Net(nn.Module):
    """BatchNorm and dropout on the whole batch."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps `[batch, 10]` to `[batch, 1]`."""
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(1)(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))


MODEL = Net()
VARIABLES = MODEL.init(KEY, X, train=False)
PARAMS, STATE = fs.split_params(VARIABLES)
APPLY: Any = fs.with_mutable(MODEL)  # Any: the module's own signature has no `rngs=`


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compares two trees bit for bit."""
    assert structure(ours) == structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(numbers, ours), jax.tree.map(numbers, theirs))


def run(step: Any, carry: Any, *args: Any, steps: int = 5, **kwargs: Any) -> tuple[Any, Any]:
    """Some steps of one compiled step: traced once, compiled once."""
    jitted: Any = fs.jit_step(fs.assert_max_traces(step), donate=False)
    out = None
    with fs.compile_log() as log:
        for _ in range(steps):
            carry, out = jitted(carry, *args, **kwargs)
    assert max(log.compiles.values(), default=1) == 1
    return carry, out


def by_hand(params: Any, state: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """Flax's apply with keys and statistics."""
    variables = {"params": params, "batch_stats": state["batch_stats"]}
    out, updated = MODEL.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
    return out, {**state, "batch_stats": updated["batch_stats"]}


def keyed_loss(params: Any, state: Any, batch: Any, key: Any) -> tuple[jax.Array, Any]:
    """A loss that is given its key."""
    out, state = APPLY(params, state, batch[0], rngs={"dropout": key})
    return optax.l2_loss(out, batch[1]).mean(), state


def keyed_loss_by_hand(params: Any, state: Any, batch: Any, key: Any) -> tuple[jax.Array, Any]:
    """The same with Flax alone."""
    out, state = by_hand(params, state, batch[0], key)
    return optax.l2_loss(out, batch[1]).mean(), state


# Law 0


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("aux", [False, True], ids=["loss", "aux"])
def test_law_0_with_optimizer_is_the_two_composed(count: int, aux: bool) -> None:
    def loss_fn(params: Any, state: Any, batch: Any, key: Any) -> Any:
        loss, state = keyed_loss(params, state, batch, key)
        return ((loss, {"rows": batch[0].sum()}) if aux else loss), state

    options: Any = {"has_aux": aux, "microbatches": count}
    grads_of = fs.value_and_grad(loss_fn, **options)

    def composed(carry: Any, batch: Any, key: Any) -> Any:
        (value, grads), state = grads_of(carry.params, carry.state, batch, key)
        return fs.apply_gradients(TX, carry, grads, state), value

    whole = fs.with_optimizer(loss_fn, TX, **options)
    composed.__name__ = "loss_fn"  # equal programs of one name are compiled once
    carry = fs.init_carry(PARAMS, STATE, TX)
    assert_equal(run(whole, carry, BATCH, KEY), run(composed, carry, BATCH, KEY))
    assert instructions(whole, carry, BATCH, KEY) == instructions(composed, carry, BATCH, KEY)


# What programs do between the gradient and the optimizer


def norms(carry: Any, batch: Any, key: Any) -> Any:
    """Logs three norms and the learning rate; the key of a step comes from its count."""
    (loss, grads), state = fs.value_and_grad(keyed_loss)(
        carry.params, carry.state, batch, jax.random.fold_in(key, carry.step)
    )
    new = fs.apply_gradients(TX, carry, grads, state, value=loss)
    updates = jax.tree.map(jnp.subtract, new.params, carry.params)
    rate = optax.linear_schedule(1e-2, 0.0, 100)(carry.step)
    return new, {"loss": loss, "norms": [*map(optax.tree.norm, (grads, updates, new.params))], "rate": rate}


def norms_by_hand(carry: Any, batch: Any, key: Any) -> Any:
    """The same without flaxsplit."""
    count, params, state, opt_state = carry
    (loss, new_state), grads = jax.value_and_grad(keyed_loss_by_hand, has_aux=True)(
        params, state, batch, jax.random.fold_in(key, count)
    )
    updates, opt_state = TX.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    moved = jax.tree.map(jnp.subtract, new_params, params)
    rate = optax.linear_schedule(1e-2, 0.0, 100)(count)
    logs = {"loss": loss, "norms": [*map(optax.tree.norm, (grads, moved, new_params))], "rate": rate}
    return fs.Carry(count + 1, new_params, new_state, opt_state), logs


def test_norms_and_rates_are_logged_at_the_cost_of_the_step_by_hand() -> None:
    carry = fs.init_carry(PARAMS, STATE, TX)
    assert_equal(run(norms, carry, BATCH, KEY), run(norms_by_hand, carry, BATCH, KEY))
    assert instructions(norms, carry, BATCH, KEY) == instructions(norms_by_hand, carry, BATCH, KEY)


def test_a_clip_parameter_and_a_key_go_through_every_combinator() -> None:
    """PPO's minibatches: scanned, the traced clip parameter shared by all of them."""

    def ppo(params: Any, state: Any, batch: Any, clip: Any, *, entropy: float) -> Any:
        x, advantage = batch
        ratio = jnp.exp(x @ params["w"])
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
        return -gain.mean() + entropy * (params["w"] ** 2).sum(), state

    def hand(carry: Any, batches: Any, clip: Any, entropy: float) -> Any:
        def body(carry: Any, batch: Any) -> Any:
            count, params, state, opt_state, ema = carry
            (loss, state), grads = jax.value_and_grad(ppo, has_aux=True)(params, state, batch, clip, entropy=entropy)
            updates, opt_state = TX.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (count + 1, params, state, opt_state, optax.incremental_update(params, ema, 1 - 0.9)), loss

        return jax.lax.scan(body, carry, batches)

    params = {"w": jnp.full(10, 0.1)}
    batches = jnp.stack([X] * 4), jnp.stack([Y[:, 0]] * 4)
    carry = fs.init_carry(params, {"ema": params}, TX)
    scanned = fs.scan_steps(fs.with_ema(fs.with_optimizer(ppo, TX), decay=0.9))
    ours, losses = run(scanned, carry, batches, jnp.float32(0.2), entropy=0.01, steps=3)
    theirs: Any = (carry.step, params, {}, TX.init(params), params)
    loop = jax.jit(hand, static_argnums=3)
    expected = None
    for _ in range(3):
        theirs, expected = loop(theirs, batches, jnp.float32(0.2), 0.01)
    assert_equal((ours.params, ours.opt_state, losses), (theirs[1], theirs[3], expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), ours.state["ema"], theirs[4])
    carry = fs.init_carry(params, {}, TX)
    before = fs.with_optimizer(ppo, TX)(carry, (X, Y[:, 0]), 0.2, entropy=0.01)[1]
    parts = fs.with_optimizer(ppo, TX, microbatches=4)(carry, (X, Y[:, 0]), 0.2, entropy=0.01)[1]
    np.testing.assert_allclose(before, parts, rtol=1e-5)


def test_dynamic_scale_skips_an_overflow() -> None:
    """Flax's own, in fp16: one batch overflows, and costs a step."""

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
        out = batch[0].astype(jnp.float16) @ half["w"]
        return ((out[:, 0] - batch[1][:, 0].astype(jnp.float16)).astype(jnp.float32) ** 2).mean(), state

    def scaled(params: Any, state: Any, batch: Any, scale: Any) -> Any:
        loss, state = loss_fn(params, state, batch)
        return loss * scale, state

    def step(both: Any, batch: Any) -> Any:
        carry, scaler = both
        (loss, grads), state = fs.value_and_grad(scaled)(carry.params, carry.state, batch, scaler.scale)
        grads = jax.tree.map(lambda leaf: leaf / scaler.scale, grads)
        finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), grads))
        new = fs.apply_gradients(TX, carry, grads, state)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, carry)
        scale = jnp.where(finite, scaler.scale, scaler.scale * scaler.backoff_factor)
        return (kept, scaler.replace(scale=scale)), (loss / scaler.scale, finite)

    def hand(both: Any, batch: Any) -> Any:
        params, opt_state, scaler = both
        scaler, finite, loss, grads = scaler.value_and_grad(lambda p: loss_fn(p, {}, batch)[0])(params)
        updates, new_opt = TX.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))
        return (*kept, scaler), (loss, finite)

    params = {"w": jnp.full((10, 1), 0.1)}
    scaler = DynamicScale(growth_interval=10_000, scale=2.0**15)
    both: Any = (fs.init_carry(params, {}, TX), scaler)
    theirs: Any = (params, TX.init(params), scaler)
    ours, loop = fs.jit_step(fs.assert_max_traces(step), donate=False), jax.jit(hand)
    told = []
    for size in (1.0, 1e6, 1.0):
        both, out = ours(both, (X * size, Y))
        theirs, expected = loop(theirs, (X * size, Y))
        told.append(bool(out[1]))
        assert_equal((both[0].params, both[0].opt_state, both[1].scale), (*theirs[:2], theirs[2].scale))
        assert bool(out[1]) == bool(expected[1])
    assert told == [True, False, True]
    assert int(both[0].step) == 2


@KINDS
def test_sharpness_aware_steps_per_device(kind: AxisType) -> None:
    """SAM with a perturbation of each device's own, as in GSAM's code: only the second gradient is averaged."""
    mesh = line(kind, 2)
    rho = 0.05

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return ((batch[0] @ params["w"] - batch[1]) ** 2).mean(), {"seen": state["seen"] + 1}

    local, averaged = fs.value_and_grad(loss_fn), fs.value_and_grad(loss_fn, axis_name="data")

    def step(carry: Any, batch: Any) -> Any:
        params = jax.lax.pcast(carry.params, "data", to="varying") if hasattr(jax.lax, "pcast") else carry.params
        (_, grads), _ = local(params, carry.state, batch)
        size = rho / optax.tree.norm(grads)
        there = jax.tree.map(lambda leaf, grad: leaf + size * grad, params, grads)
        (loss, grads), state = averaged(there, carry.state, batch)
        return fs.apply_gradients(TX, carry, grads, state), loss

    def hand(params: Any, opt_state: Any, batch: Any) -> Any:
        parts = [jax.tree.map(lambda leaf, i=i: leaf[i * 16 : (i + 1) * 16], batch) for i in range(2)]
        grads = []
        for part in parts:
            own = jax.grad(lambda p, part=part: loss_fn(p, {"seen": 0}, part)[0])
            first = own(params)
            size = rho / optax.tree.norm(first)
            grads.append(own(jax.tree.map(lambda leaf, grad, size=size: leaf + size * grad, params, first)))
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        updates, opt_state = TX.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = {"w": jnp.full((10, 1), 0.1)}
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    carry = fs.init_carry(params, {"seen": 0}, TX, sharding=NamedSharding(mesh, P()))
    ours, _ = run(sharded, carry, jax.device_put(BATCH, NamedSharding(mesh, P("data"))), steps=3)
    theirs: Any = (params, TX.init(params))
    for _ in range(3):
        theirs = jax.jit(hand)(*theirs, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours.params, theirs[0])
    assert int(ours.state["seen"]) == 3


def test_differentially_private_steps_take_each_examples_gradient() -> None:
    def one(params: Any, state: Any, batch: Any) -> Any:
        return ((batch[0] @ params["w"] - batch[1]) ** 2).sum(), state

    def aggregate() -> Any:
        mean: Any = lambda grads, state, params=None: (jax.tree.map(lambda leaf: leaf.mean(0), grads), state)  # noqa: E731
        clip: Any = lambda grads, state, params=None: (jax.tree.map(_clipped, grads), state)  # noqa: E731
        empty: Any = lambda params: optax.EmptyState()  # noqa: E731
        clipping, averaging = optax.GradientTransformation(empty, clip), optax.GradientTransformation(empty, mean)
        return optax.chain(clipping, averaging, optax.sgd(0.1))

    def _clipped(leaf: Any) -> Any:
        norm = jnp.sqrt((leaf**2).sum(tuple(range(1, leaf.ndim)), keepdims=True))
        return leaf / jnp.maximum(norm, 1.0)

    tx = aggregate()
    grads_of = fs.vmap_stateful(fs.value_and_grad(one))

    def step(carry: Any, batch: Any) -> Any:
        (losses, grads), state = grads_of(carry.params, carry.state, batch)
        return fs.apply_gradients(tx, carry, grads, state), losses.mean()

    def hand(carry: Any, batch: Any) -> Any:
        count, params, state, opt_state = carry
        each = jax.vmap(jax.value_and_grad(lambda p, b: one(p, {}, b)[0]), (None, 0))
        losses, grads = each(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return fs.Carry(count + 1, optax.apply_updates(params, updates), state, opt_state), losses.mean()

    carry = fs.init_carry({"w": jnp.full((10, 1), 0.1)}, {}, tx)
    assert_equal(run(step, carry, BATCH), run(hand, carry, BATCH))


def test_two_networks_that_write_each_others_statistics() -> None:
    """A GAN: each loss runs both networks, and both networks' statistics go on."""
    generator, judge = Net(), Net()
    noise = X[:, ::-1]
    start = [fs.split_params(net.init(jax.random.key(i), X, train=False)) for i, net in enumerate((generator, judge))]
    make: Any = fs.with_mutable(generator)
    judged: Any = fs.with_mutable(judge)

    def fake(params: Any, state: Any, key: Any) -> Any:
        out, state = make(params, state, noise, rngs={"dropout": key})
        return jnp.tile(out, (1, 10)), state

    def judge_loss(params: Any, state: Any, batch: Any, other: Any, key: Any) -> Any:
        making, *judging = jax.random.split(key, 3)
        images, made = fake(other.params, state["other"], making)
        real, own = judged(params, state["own"], batch, rngs={"dropout": judging[0]})
        false, own = judged(params, own, images, rngs={"dropout": judging[1]})
        return (nn.softplus(-real) + nn.softplus(false)).mean(), {"own": own, "other": made}

    def step(carries: Any, batch: Any, key: Any) -> Any:
        gen, jud = carries
        states = {"own": jud.state, "other": gen.state}
        (loss, grads), states = fs.value_and_grad(judge_loss)(jud.params, states, batch, gen, key)
        jud = fs.apply_gradients(TX, jud, grads, states["own"])
        return (gen._replace(state=states["other"]), jud), loss

    def hand(carries: Any, batch: Any, key: Any) -> Any:
        gen, jud = carries

        def loss(params: Any) -> Any:
            def net(params: Any, state: Any, x: Any, key: Any) -> Any:
                variables = {"params": params, **state}
                return Net().apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})

            keys = jax.random.split(key, 3)
            out, made = net(gen.params, gen.state, noise, keys[0])
            real, own = net(params, jud.state, batch, keys[1])
            false, own = net(params, own, jnp.tile(out, (1, 10)), keys[2])
            return (nn.softplus(-real) + nn.softplus(false)).mean(), (own, made)

        (value, (own, made)), grads = jax.value_and_grad(loss, has_aux=True)(jud.params)
        updates, opt_state = TX.update(grads, jud.opt_state, jud.params)
        new = fs.Carry(jud.step + 1, optax.apply_updates(jud.params, updates), dict(own), opt_state)
        return (gen._replace(state=dict(made)), new), value

    carries = [fs.init_carry(*each, TX) for each in start]
    assert_equal(run(step, tuple(carries), X, KEY), run(hand, tuple(carries), X, KEY))


def test_three_optimizers_and_a_target_network() -> None:
    """The frame of SAC: actor, critic and temperature, and a target that follows the critic."""
    tx = optax.adam(1e-2)

    def critic_loss(params: Any, state: Any, batch: Any, actor: Any, alpha: Any) -> Any:
        action = jnp.tanh(batch[0] @ actor["w"])
        goal = batch[1] + 0.9 * (batch[0] @ state["ema"]["q"] * action - alpha)
        return ((batch[0] @ params["q"] * action - jax.lax.stop_gradient(goal)) ** 2).mean(), state

    def actor_loss(params: Any, state: Any, batch: Any, critic: Any, alpha: Any) -> Any:
        action = jnp.tanh(batch[0] @ params["w"])
        return (alpha * action**2 - batch[0] @ critic["q"] * action).mean(), state

    def alpha_loss(params: Any, state: Any, batch: Any, actor: Any) -> Any:
        return (params["log"] * (jnp.tanh(batch[0] @ actor["w"]) ** 2 - 0.5)).mean(), state

    critic_step = fs.with_ema(fs.with_optimizer(critic_loss, tx), decay=0.95)
    actor_step, alpha_step = fs.with_optimizer(actor_loss, tx), fs.with_optimizer(alpha_loss, tx)

    def step(carries: Any, batch: Any) -> Any:
        critic, actor, alpha = carries
        critic, first = critic_step(critic, batch, actor.params, jnp.exp(alpha.params["log"]))
        actor, second = actor_step(actor, batch, critic.params, jnp.exp(alpha.params["log"]))
        alpha, third = alpha_step(alpha, batch, actor.params)
        return (critic, actor, alpha), (first, second, third)

    def hand(all_: Any, batch: Any) -> Any:
        (q, w, log), opts, target = all_

        def updated(loss: Any, params: Any, opt_state: Any, *args: Any) -> Any:
            value, grads = jax.value_and_grad(lambda p: loss(p, {"ema": target}, batch, *args)[0])(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        q, first_opt, first = updated(critic_loss, q, opts[0], w, jnp.exp(log["log"]))
        new_target = optax.incremental_update(q, target, 1 - 0.95)
        w, second_opt, second = updated(actor_loss, w, opts[1], q, jnp.exp(log["log"]))
        log, third_opt, third = updated(alpha_loss, log, opts[2], w)
        return ((q, w, log), (first_opt, second_opt, third_opt), new_target), (first, second, third)

    params: Any = ({"q": jnp.full((10, 1), 0.1)}, {"w": jnp.full((10, 1), 0.2)}, {"log": jnp.float32(0)})
    carries = tuple(fs.init_carry(each, {"ema": each} if i == 0 else {}, tx) for i, each in enumerate(params))
    ours, losses = run(step, carries, BATCH)
    theirs: Any = (params, tuple(map(tx.init, params)), params[0])
    expected = None
    loop = jax.jit(hand)
    for _ in range(5):
        theirs, expected = loop(theirs, BATCH)
    close: Any = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)  # noqa: E731 (an average follows)
    jax.tree.map(
        close, (tuple(each.params for each in ours), ours[0].state["ema"], losses), (theirs[0], theirs[2], expected)
    )


def test_a_teacher_that_is_averaged_every_ten_steps() -> None:
    def of(carry: Any) -> Any:
        return {"params": carry.params, "batch_stats": carry.state["batch_stats"]}

    def step_of(every: int) -> Any:
        return fs.with_ema(fs.with_optimizer(keyed_loss, TX), decay=0.9, of=of, every=every)

    carry = fs.init_carry(PARAMS, STATE | {"ema": {"params": PARAMS, **STATE}}, TX)
    jitted = fs.jit_step(fs.assert_max_traces(step_of(10)), donate=False)
    teacher, seen = carry.state["ema"], []
    for i in range(20):
        carry, _ = jitted(carry, BATCH, jax.random.fold_in(KEY, i))
        if i % 10 == 9:
            teacher = optax.incremental_update(of(carry), teacher, 1 - 0.9)
        seen.append(carry.state["ema"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-12), carry.state["ema"], teacher)
    assert_equal(seen[9], seen[18])
    # between them nothing is averaged: the arithmetic lies in a branch that is taken every tenth time
    assert any(eqn.primitive.name == "cond" for eqn in jax.make_jaxpr(step_of(10))(carry, BATCH, KEY).eqns)
    assert not any(eqn.primitive.name == "cond" for eqn in jax.make_jaxpr(step_of(1))(carry, BATCH, KEY).eqns)


def test_a_counter_beside_averaged_statistics_is_copied() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return (params["w"] * batch).sum(), {**state, "stats": {"n": state["stats"]["n"] + 7}}

    step = fs.with_ema(fs.with_optimizer(loss_fn, TX), decay=0.5, of=lambda carry: carry.state["stats"])
    stats = {"n": jnp.int32(0)}
    carry, _ = step(fs.init_carry({"w": jnp.ones(2)}, {"stats": stats, "ema": stats}, TX), jnp.ones(2))
    assert int(carry.state["ema"]["n"]) == 7


def test_a_model_object_that_holds_its_own_params() -> None:
    class Classifier:
        """As in a library of pretrained models: called with params, a key and a mode."""

        def __init__(self) -> None:
            self.module = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
            self.params = self.module.init(KEY, X)["params"]

        def __call__(self, x: Any, params: Any = None, dropout_rng: Any = None, train: bool = False) -> Any:
            keep = jax.random.bernoulli(dropout_rng, 0.9, x.shape) if train else 1.0
            return self.module.apply({"params": self.params if params is None else params}, x * keep)

    model = Classifier()

    def loss_fn(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return ((model(batch[0], params=params, dropout_rng=key, train=True) - batch[1]) ** 2).mean(), state

    def hand(carry: Any, batch: Any, key: Any) -> Any:
        count, params, state, opt_state = carry
        value, grads = jax.value_and_grad(lambda p: loss_fn(p, state, batch, key)[0])(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return fs.Carry(count + 1, optax.apply_updates(params, updates), state, opt_state), value

    carry = fs.init_carry(model.params, {}, TX)
    assert_equal(run(fs.with_optimizer(loss_fn, TX), carry, BATCH, KEY), run(hand, carry, BATCH, KEY))


def test_a_gradient_step_inside_the_loss() -> None:
    """MAML: the inner loss is differentiated by the same function."""

    def inner(params: Any, state: Any, batch: Any) -> Any:
        return ((jnp.tanh(batch[0] @ params["w"]) - batch[1]) ** 2).mean(), state

    def outer(params: Any, state: Any, batch: Any) -> Any:
        (_, grads), state = fs.value_and_grad(inner)(params, state, batch)
        return inner(jax.tree.map(lambda a, b: a - 0.1 * b, params, grads), state, batch)

    def hand(carry: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            grads = jax.grad(lambda p: inner(p, {}, batch)[0])(params)
            return inner(jax.tree.map(lambda a, b: a - 0.1 * b, params, grads), {}, batch)[0]

        count, params, state, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return fs.Carry(count + 1, optax.apply_updates(params, updates), state, opt_state), value

    carry = fs.init_carry({"w": jnp.full((10, 1), 0.1)}, {}, TX)
    assert_equal(run(fs.with_optimizer(outer, TX), carry, BATCH), run(hand, carry, BATCH))


def test_a_population_of_carries() -> None:
    def loss_fn(params: Any, state: Any, batch: Any, rate: Any) -> Any:
        return rate * ((batch[0] @ params["w"] - batch[1]) ** 2).mean(), {"seen": state["seen"] + 1}

    step = fs.with_optimizer(loss_fn, TX)
    start = fs.init_carry({"w": jnp.full((10, 1), 0.1)}, {"seen": 0}, TX)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), start)
    rates = jnp.array([0.5, 1.0, 2.0])
    many, losses = run(jax.vmap(step, in_axes=(0, None, 0)), stacked, BATCH, rates)
    for i in range(3):
        alone, loss = run(step, start, BATCH, rates[i])
        close: Any = lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(close, (many, losses), (alone, loss))


def test_keys_and_metrics_as_arguments_of_an_nnx_module() -> None:
    class Holder(nnx.Module):
        """Holds a model with its metric: both are in the graph that is taken apart."""

        def __init__(self) -> None:
            self.model = nnx.Sequential(nnx.Linear(10, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
            self.metric = nnx.metrics.Average("loss")

        def __call__(self, batch: Any, key: Any) -> Any:
            keep = jax.random.bernoulli(key, 0.9, batch[0].shape)
            loss = ((self.model(batch[0] * keep) - batch[1]) ** 2).mean()
            self.metric.update(loss=loss)
            return loss

    fn, params, state = fs.from_nnx(Holder())
    carry, _ = run(fs.with_optimizer(fn, TX), fs.init_carry(params, state, TX), BATCH, KEY)
    model = fs.to_nnx(Holder(), carry.params, carry.state)
    split: Any = nnx.split
    graphdef, own, rest = split(Holder(), nnx.Param, ...)
    optimizer = TX.init(own)
    copies: Any = {"copy": True} if "copy" in inspect.signature(nnx.merge).parameters else {}  # flax < 0.11 lacks it
    losses = []
    for _ in range(5):

        def loss(own: Any, rest: Any) -> Any:
            module = nnx.merge(graphdef, own, rest, **copies)
            value = module(BATCH, KEY)
            return value, split(module, nnx.Param, ...)[2]

        (value, rest), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(own, rest)
        updates, optimizer = jax.jit(TX.update)(grads, optimizer, own)
        own = optax.apply_updates(own, updates)
        losses.append(float(value))
    np.testing.assert_allclose(float(model.metric.compute()), np.mean(losses), rtol=1e-5)


def test_an_average_follows_the_updates_of_multi_steps() -> None:
    """`carry.step` counts calls: with `every=` as many as make an update, only what was updated is averaged."""
    tx = optax.MultiSteps(TX, every_k_schedule=3)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return ((params["w"] - batch) ** 2).sum(), state

    step = fs.jit_step(fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.9, every=3), donate=False)
    carry = fs.init_carry({"w": jnp.zeros(2)}, {"ema": {"w": jnp.zeros(2)}}, tx)
    params: Any = jnp.zeros(2)
    average, opt_state = jnp.zeros(2), TX.init(params)
    for update in range(4):
        grads = jnp.zeros(2)
        for call in range(3):
            batch = jnp.array([update, call], jnp.float32)
            grads += 2 * (params - batch) / 3
            carry, _ = step(carry, batch)
        updates, opt_state = TX.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        average = 0.9 * average + 0.1 * params
        np.testing.assert_allclose(carry.params["w"], params, rtol=1e-6)
        np.testing.assert_allclose(carry.state["ema"]["w"], average, rtol=1e-6)
    assert int(carry.step) == 12
    assert int(carry.opt_state.gradient_step) == 4


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_mean_over_tokens_in_parts_is_that_of_the_whole_batch(parts: int) -> None:
    lengths = np.array([6, 6, 6, 6, 1, 1, 2, 1])
    mask = jnp.asarray(np.arange(6) < lengths[:, None], jnp.float32)
    x = jax.random.normal(jax.random.key(0), (8, 6, 3))

    def loss_fn(params: Any, state: Any, batch: Any, count: Any) -> Any:
        x, mask = batch
        return parts * (((x @ params["w"]) ** 2) * mask).sum() / count, state

    w = {"w": jnp.arange(3.0)}
    (loss, grads), _ = fs.value_and_grad(loss_fn, microbatches=parts)(w, {}, (x, mask), mask.sum())
    by_hand = jax.value_and_grad(lambda w: (((x @ w["w"]) ** 2) * mask).sum() / mask.sum())(w)
    np.testing.assert_allclose(loss, by_hand[0], rtol=1e-5)
    np.testing.assert_allclose(grads["w"], by_hand[1]["w"], rtol=1e-5)
