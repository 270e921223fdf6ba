"""The laws of the design, each a property. Models and optimizers are few, since each compiles; trees are many."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxsplit as fs

from . import strategies as some
from .flags import needs_promotion
from .models import MLP, UNBIASED, Dropping, X, Y, numbers, structure

KEY = jax.random.key(0)
OPTIMIZERS = some.OPTIMIZERS


def assert_same_leaves(left: Any, right: Any) -> None:
    """The very same objects at the same places, in plain dicts: nothing was copied, cast or unboxed."""
    left, right = some.arrays(left), some.arrays(right)
    assert left.keys() == right.keys()
    assert all(left[path] is right[path] for path in left)


def assert_equal(left: Any, right: Any) -> None:
    """Compares two trees bit for bit, keys included."""
    assert structure(left) == structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(numbers(a), numbers(b))


def assert_close(left: Any, right: Any, tolerance: float = 1e-5) -> None:
    """Compares two trees to rounding."""
    assert structure(left) == structure(right)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(lambda a, b: close(np.float32(a), np.float32(b)), left, right)


def all_plain(tree: Any) -> bool:
    """Whether every mapping in a tree is a dict."""
    return type(tree) is dict and all(all_plain(v) for v in tree.values() if hasattr(v, "keys"))


# Law 0: with_optimizer equals value_and_grad followed by apply_gradients


@some.examples(12)
@given(tx=some.optimizers(), has_aux=st.booleans(), count=st.sampled_from([1, 2, 4]))
def test_with_optimizer_is_the_two_composed(tx: optax.GradientTransformation, has_aux: bool, count: int) -> None:
    plain, (params, state) = regression()

    def loss_fn(params: Any, state: Any, batch: Any, weight: Any) -> tuple[Any, Any]:
        loss, state = plain(params, state, batch)
        return (weight * loss, {"plain": loss}) if has_aux else weight * loss, state

    options: Any = {"has_aux": has_aux, "microbatches": count}

    def composed(carry: fs.Carry, batch: Any, weight: Any) -> Any:
        (value, grads), state = fs.value_and_grad(loss_fn, **options)(carry.params, carry.state, batch, weight)
        loss = value[0] if has_aux else value
        return fs.apply_gradients(tx, carry, grads, state, value=loss), value

    whole: Any = fs.with_optimizer(loss_fn, tx, **options)
    composed.__name__ = "loss_fn"  # equal programs of one name are compiled once
    results = []
    for step in (whole, composed):
        jitted = fs.jit_step(fs.assert_max_traces(step), donate=False)
        carry, values = fs.init_carry(params, state, tx), []
        for weight in (1.0, 0.5, 2.0):
            carry, value = jitted(carry, (X, Y), jnp.float32(weight))
            values.append(value)
        results.append((carry, values))
    assert_equal(*results)


# Law 1: merge_state is the inverse of split_params


@some.examples(200)
@given(st.data())
def test_merge_is_the_inverse_of_split(data: st.DataObject) -> None:
    plain = data.draw(some.variables())
    given_variables = some.dressed(plain, data.draw(some.kinds()))
    before = jax.tree.structure(plain), dict(some.flat(plain))
    trainable, chosen = data.draw(some.trainables(plain["params"]))
    params, state = fs.split_params(given_variables, trainable=trainable)
    assert some.arrays(params).keys() == chosen  # as chosen without the library's own filters
    assert some.arrays(state.get("params", {})).keys() == some.arrays(plain["params"]).keys() - chosen
    merged = fs.merge_state(params, state)
    assert_same_leaves(merged, plain)
    assert structure(merged) == structure(plain)  # empty branches too
    assert all_plain(params)
    assert all_plain(state)
    again = fs.split_params(merged, trainable=trainable)
    assert structure(again) == structure((params, state))
    assert_same_leaves(again[0], params)
    assert_same_leaves(again[1], state)
    assert (structure(plain), some.flat(plain).keys()) == (before[0], before[1].keys())


@pytest.mark.parametrize("kind", some.KINDS)
def test_split_and_merge_under_jit_grad_and_vmap(kind: some.Kind) -> None:
    variables = {"params": {"a": jnp.ones(3), "b": jnp.full(3, 2.0)}, "batch_stats": {"m": jnp.zeros(3)}}

    def total(a: Any) -> Any:
        params, state = fs.split_params(
            some.dressed({**variables, "params": {"a": a, "b": 2 * a}}, kind), trainable="a"
        )
        merged = fs.merge_state(params, state)
        return (merged["params"]["a"] * merged["params"]["b"]).sum()

    a = jnp.arange(3.0)
    np.testing.assert_allclose(jax.jit(total)(a), total(a))
    np.testing.assert_allclose(jax.grad(total)(a), 4 * a)
    np.testing.assert_allclose(jax.vmap(total)(jnp.stack([a, a])), [total(a)] * 2)


# Law 2: with_mutable equals module.apply, the rest of the state untouched

MODELS: dict[str, Any] = {"dense": nn.Dense(3), "norm": MLP(axis_name=None), "dropping": Dropping(axis_name=None)}


@some.examples(60)
@given(
    name=st.sampled_from(sorted(MODELS)),
    kind=some.kinds(),
    trainable=st.sampled_from([None, "*kernel", "*bias"]),
    extra=some.trees(max_leaves=4),
    seed=st.integers(0, 2**30),
)
def test_with_mutable_equals_apply(name: str, kind: some.Kind, trainable: str | None, extra: Any, seed: int) -> None:
    model, key = MODELS[name], jax.random.key(seed)
    call = {} if name == "dense" else {"train": True}
    variables = dict(model.init({"params": key, "dropout": key}, X[:4], **call))
    params, state = fs.split_params(some.dressed(variables, kind), trainable=trainable)
    state = {**state, "ema": extra}
    out, new_state = fs.with_mutable(model)(params, state, X[:4], rngs={"dropout": key}, **call)
    expected, updated = model.apply(variables, X[:4], rngs={"dropout": key}, mutable=["batch_stats"], **call)
    assert_equal(out, expected)
    assert new_state.keys() == state.keys()
    for collection in state:
        if collection == "batch_stats":
            assert_equal(new_state[collection], updated[collection])
        else:
            assert new_state[collection] is state[collection]


# Law 3: vmap_stateful with a named axis equals the batched model without one


@some.examples(15)
@given(
    seed=st.integers(0, 2**30), trainable=st.sampled_from([None, "Dense_1/*"]), how=st.sampled_from(["eager", "jit"])
)
def test_vmap_equals_the_batched_model(seed: int, trainable: str | None, how: str) -> None:
    x = jax.random.normal(jax.random.key(seed), (16, 10), jnp.float32)
    y = x[:, :1] ** 2
    variables = MLP().init(jax.random.key(seed), x[0])
    params, state = fs.split_params(variables, trainable=trainable)
    batched = fs.with_mutable(MLP(axis_name=None))
    mapped = fs.vmap_stateful(fs.with_mutable(MLP()))

    def loss(apply: Any) -> Any:
        def value(params: Any) -> tuple[Any, Any]:
            pred, new_state = apply(params, state, x, train=True)
            return optax.l2_loss(pred, y).mean(), (pred, new_state)

        return jax.value_and_grad(value, has_aux=True)

    run = jax.jit if how == "jit" else lambda fn: fn
    assert_close(run(loss(mapped))(params), run(loss(batched))(params), 1e-4)
    grads = jax.grad(lambda p: loss(mapped)(p)[0][0])(params)
    assert some.flat(grads).keys() == some.flat(params).keys()


# Law 4: with_optimizer equals the loop of the guide, written out


def regression() -> tuple[Any, tuple[Any, Any]]:
    """A loss function over an MLP with BatchNorm, and where to start."""
    apply = fs.vmap_stateful(fs.with_mutable(MLP(hidden_size=4)))

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        pred, state = apply(params, state, batch[0], train=True)
        return optax.l2_loss(pred, batch[1]).mean(), state

    return loss_fn, fs.split_params(MLP(hidden_size=4).init(KEY, X[0]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_optimizer_equals_the_guides_loop(name: str) -> None:
    assert_equals_the_loop(OPTIMIZERS[name])


@some.examples(8)
@given(some.chains())
def test_with_optimizer_equals_the_guides_loop_for_any_chain(tx: optax.GradientTransformation) -> None:
    assert_equals_the_loop(tx)


def assert_equals_the_loop(transformation: optax.GradientTransformation) -> None:
    """Trains by hand and by `with_optimizer` from one start, and compares bit for bit."""
    loss_fn, (params, state) = regression()
    tx = optax.with_extra_args_support(transformation)

    @jax.jit
    def by_hand(params: Any, state: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), state, opt_state, loss

    carry = fs.init_carry(params, state, transformation)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, transformation)))
    assert_equal(carry.opt_state, tx.init(params))
    opt_state = jax.tree.map(
        jnp.copy, carry.opt_state
    )  # not tx.init's own: with its weak types XLA may round otherwise
    for _ in range(5):
        params, state, opt_state, expected = by_hand(params, state, opt_state, (X, Y))
        carry, loss = step(carry, (X, Y))
        assert_equal(loss, expected)
    assert_equal(carry.params, params)
    assert_equal(carry.state, state)
    assert_equal(carry.opt_state, opt_state)
    assert int(carry.step) == 5


# Law 5: scan_steps equals the loop; microbatches


def stack(batches: Any) -> Any:
    """Stacks batches along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


@some.examples(8)
@given(name=st.sampled_from(sorted(OPTIMIZERS)), count=st.integers(1, 4), unroll=st.sampled_from([1, 2]))
def test_scan_equals_the_loop(name: str, count: int, unroll: int) -> None:
    apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(UNBIASED)))

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch)
        return (out**2).mean(), state

    params, state = fs.split_params(UNBIASED.init(KEY, X[0], train=False))
    state |= fs.rng_state(dropout=KEY) | {"ema": params}
    tx = OPTIMIZERS[name]
    step = fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.9)
    batches = [X * i for i in range(1, count + 1)]
    loop, losses = fs.init_carry(params, state, tx), []
    jitted = fs.jit_step(step)
    for batch in batches:
        loop, loss = jitted(loop, batch)
        losses.append(loss)
    scanned, outs = fs.jit_step(fs.scan_steps(step, unroll=unroll))(fs.init_carry(params, state, tx), stack(batches))
    assert int(scanned.step) == count
    assert_equal(scanned.state.pop("rngs"), loop.state.pop("rngs"))
    # Two programs: XLA may fuse the body of a loop otherwise than the step alone, and round otherwise.
    assert_close((scanned, outs), (loop, jnp.stack(losses)), 1e-6)


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=5), st.sampled_from([1, 2]))
def test_scan_equals_the_loop_bit_for_bit_where_nothing_is_rounded(numbers: list[int], unroll: int) -> None:
    """With small integers and halves, sums and products are exact in whatever order XLA takes them."""

    def loss_fn(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return x * params["w"].sum(), state | {"seen": state["seen"] + x}

    tx = optax.sgd(0.5, momentum=0.5)
    step = fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.5)
    w = jnp.arange(3.0)
    loop, start = (fs.init_carry({"w": w}, {"seen": 0.0, "ema": {"w": w}}, tx) for _ in range(2))
    scanned, outs = fs.jit_step(fs.scan_steps(step, unroll=unroll))(start, jnp.asarray(numbers, jnp.float32))
    jitted, losses = fs.jit_step(step), []
    for number in numbers:
        loop, loss = jitted(loop, jnp.float32(number))
        losses.append(loss)
    assert_equal((scanned, outs), (loop, jnp.stack(losses)))


@some.examples(10)
@given(count=st.sampled_from([1, 2, 4, 8, 16, 32]), name=st.sampled_from(["sgd", "adam", "clip"]))
def test_microbatches_without_state_equal_the_full_batch(count: int, name: str) -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        return optax.l2_loss(batch[0] @ params["w"], batch[1]).mean(), state

    tx, params = OPTIMIZERS[name], {"w": jnp.full((10, 1), 0.3)}
    full, loss = fs.jit_step(fs.with_optimizer(loss_fn, tx))(fs.init_carry(params, {}, tx), (X, Y))
    parts, mean = fs.jit_step(fs.with_optimizer(loss_fn, tx, microbatches=count))(fs.init_carry(params, {}, tx), (X, Y))
    (assert_equal if count == 1 else assert_close)((full, loss), (parts, mean))


def test_accumulation_over_batch_norm_equals_the_loop_by_hand() -> None:
    loss_fn, (params, state) = regression()
    tx = optax.sgd(0.1)
    carry, loss = fs.jit_step(fs.with_optimizer(loss_fn, tx, microbatches=4))(fs.init_carry(params, state, tx), (X, Y))
    total, losses = jax.tree.map(jnp.zeros_like, params), []
    for i in range(4):
        part = (X[i::4], Y[i::4])
        (value, state), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, state, part)
        total = jax.tree.map(jnp.add, total, grads)
        losses.append(value)
    updates, _ = tx.update(jax.tree.map(lambda leaf: leaf / 4, total), tx.init(params), params)
    assert_close(carry.params, optax.apply_updates(params, updates), 1e-6)
    assert_close(carry.state, state, 1e-6)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)


@given(st.lists(st.integers(1, 3), max_size=8), st.integers(1, 4))
def test_stacking_loses_no_batch(sizes: list[int], count: int) -> None:
    batches = [(np.full((size, 2), i), np.full(size, i)) for i, size in enumerate(sizes)]
    stacks = list(fs.stack_batches(iter(batches), count))
    back = [jax.tree.map(lambda leaf, i=i: leaf[i], each) for each in stacks for i in range(len(each[0]))]
    assert len(back) == len(batches)
    for left, right in zip(back, batches, strict=True):
        assert_equal(left, right)
    assert all(len(each[0]) <= count for each in stacks)


# Law 6: a frozen leaf never changes, has no gradient and no optimizer state, and a clip does not see it


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_leaf_is_not_there_for_the_optimizer(name: str) -> None:
    loss_fn, _ = regression()
    variables = MLP(hidden_size=4).init(KEY, X[0])
    params, state = fs.split_params(variables, trainable="Dense_1/*")
    carry = fs.init_carry(params, state, OPTIMIZERS[name])
    frozen_shapes = {leaf.shape for leaf in jax.tree.leaves(state["params"])} - {
        p.shape for p in jax.tree.leaves(params)
    }
    assert frozen_shapes >= {(10, 4), (4,)}
    assert not frozen_shapes & {leaf.shape for leaf in jax.tree.leaves(carry.opt_state)}
    step = fs.jit_step(fs.with_optimizer(loss_fn, OPTIMIZERS[name]))
    for _ in range(4):
        carry, _ = step(carry, (X, Y))
    assert_equal(carry.state["params"], state["params"])
    changed = jax.tree.map(lambda new, old: bool((new != old).any()), carry.params, params)
    assert any(jax.tree.leaves(changed))
    assert structure(carry.params) == structure(params)


@some.examples(10)
@given(st.floats(1e-3, 10.0))
def test_a_global_norm_clip_does_not_see_frozen_leaves(norm: float) -> None:
    loss_fn, (all_params, all_state) = regression()
    params, state = fs.split_params({"params": all_params, **all_state}, trainable="Dense_1/*")
    tx = optax.chain(optax.clip_by_global_norm(norm), optax.sgd(1.0))
    carry, _ = fs.with_optimizer(loss_fn, tx)(fs.init_carry(params, state, tx), (X, Y))
    grads = jax.grad(lambda p: loss_fn(p, state, (X, Y))[0])(params)
    size = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
    expected = jax.tree.map(lambda p, g: p - g * jnp.minimum(1.0, norm / size), params, grads)
    assert_close(carry.params, expected, 1e-5)


# What the laws stand on: a carry that owns its leaves, a settled state, an adopted checkpoint


@some.examples(60)
@given(some.trees(), some.trees())
def test_a_carry_owns_strong_committed_leaves(params: Any, extra: Any) -> None:
    tree = {"params": params, "mine": extra, "ema": params}
    if any(len(getattr(leaf, "devices", set)()) > 1 for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)):
        tree = jax.tree.map(jnp.asarray, tree)
    carry = fs.init_carry({}, tree, optax.sgd(0.1))
    leaves, originals = jax.tree.leaves(carry.state), jax.tree.leaves(tree)
    assert structure(carry.state) == structure(tree)
    assert all(
        isinstance(leaf, jax.Array) and leaf.committed and not getattr(leaf, "weak_type", False) for leaf in leaves
    )
    buffers = [
        shard.data.unsafe_buffer_pointer() for leaf in leaves if _plain(leaf) for shard in leaf.addressable_shards
    ]
    theirs = {
        shard.data.unsafe_buffer_pointer()
        for leaf in originals
        if isinstance(leaf, jax.Array) and _plain(leaf)
        for shard in leaf.addressable_shards
    }
    assert len(buffers) == len(set(buffers))
    assert not theirs & set(buffers)
    for new, old in zip(leaves, originals, strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert bool((new == old).all())


def _plain(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.size > 0


@needs_promotion
@some.examples(40)
@given(lead=st.integers(0, 2), size=st.integers(1, 4), dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32]))
def test_a_settled_state_is_a_fixed_point(lead: int, size: int, dtype: Any) -> None:
    x = jnp.ones((3, size))

    def fn(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        mean = state["s"]["mean"] + x.mean(0).reshape((1,) * lead + (size,))
        return x, {"s": {"mean": mean, "n": state["s"]["n"] + 1}}

    start = {"s": {"mean": jnp.zeros(size, dtype), "n": 0}}
    settled = fs.settle_state(fn, {}, start, x)
    after = jax.eval_shape(fn, {}, settled, x)[1]
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(after)] == [
        (b.shape, b.dtype) for b in jax.tree.leaves(settled)
    ]
    assert_equal(fs.settle_state(fn, {}, settled, x), settled)
    words = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), start)
    given: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)  # to a checker no array
    abstract = fs.settle_state(fn, {}, words, given)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert abstract["s"]["mean"].shape == settled["s"]["mean"].shape


def loosened(tree: Any) -> Any:
    """As a checkpoint library without a target gives it back: NumPy, lists for tuples, dicts for named tuples."""
    if hasattr(tree, "_fields"):
        return {name: loosened(getattr(tree, name)) for name in tree._fields}
    if isinstance(tree, tuple | list):
        return [loosened(each) for each in tree]
    if isinstance(tree, dict):
        return {key: loosened(value) for key, value in tree.items()}
    return numbers(tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_adopted_carry_is_the_carry(name: str) -> None:
    params, state = fs.split_params(Dropping().init(KEY, X[0], train=False))
    carry = fs.init_carry(params, state | fs.rng_state(dropout=KEY) | {"ema": params}, OPTIMIZERS[name])
    for restored in (carry, loosened(carry)):
        adopted = fs.adopt_carry(restored, carry)
        assert_equal(adopted, carry)
        for new, old in zip(jax.tree.leaves(adopted), jax.tree.leaves(carry), strict=True):
            assert (new.sharding, new.committed) == (old.sharding, old.committed)
            assert new is not old
