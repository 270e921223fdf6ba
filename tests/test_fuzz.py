"""The laws again, over models, optimizers and stacks that hypothesis draws, against loops written out by hand.

Each test draws for FUZZ_SECONDS and no longer; `make fuzz` sets more.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from . import strategies as some
from .drawn_models import BATCH, Drawn, Dropout, Model, Sow, Stack
from .flags import needs_jit
from .models import structure
from .test_mesh import assert_close, by_shape, on

pytestmark = needs_jit
DECAY = 0.9
PAIRS = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)  # two divides a drawn model's width
SGD = optax.sgd(0.05, momentum=0.9)


def assert_bits(left: Any, right: Any) -> None:
    """Compares two trees bit for bit, NaN equal to NaN."""
    assert_close(left, right, 0)
    assert [leaf.dtype for leaf in jax.tree.leaves(left)] == [leaf.dtype for leaf in jax.tree.leaves(right)]


# With flaxsplit


def applied(model: Model, stack: Stack) -> Any:
    """The stateful function of a stack; `out` is `(out, captured)` where the model sows."""
    axis_name = "batch" if "vmap" in stack.functions else None
    fn: Any = fs.with_mutable(Drawn(model, axis_name), capture=("intermediates",) if model.has(Sow) else ())
    wrap: dict[str, Callable[[Any], Any]] = {"rngs": fs.with_rngs, "vmap": fs.vmap_stateful}
    for name in stack.functions:
        fn = wrap[name](fn)
    return fn


def error(model: Model, result: Any, y: Any) -> Any:
    """The loss of an `out`, sown values included."""
    out, sown = result if model.has(Sow) else (result, {})
    return ((out - y) ** 2).mean() + sum((leaf.astype(jnp.float32) ** 2).mean() for leaf in jax.tree.leaves(sown))


def stepped(model: Model, stack: Stack, tx: optax.GradientTransformation) -> Any:
    """The step of a stack."""
    fn = applied(model, stack)

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        out, state = fn(params, state, batch[0])
        return error(model, out, batch[1]), state

    step: Any = fs.with_optimizer(loss_fn, tx, microbatches=stack.microbatches)
    wrap: dict[str, Callable[[Any], Any]] = {
        "ema": lambda step: fs.with_ema(step, decay=DECAY),
        "traced": fs.assert_max_traces,
    }
    for name in stack.steps:
        step = wrap[name](step)
    return step


# By hand: Flax, jax.value_and_grad, optax


def merged(params: Any, frozen: Any) -> Any:
    """All params."""
    return some.nested(some.flat(params) | some.flat(frozen))


def applied_by_hand(model: Model, stack: Stack, params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """One call of Flax's apply on the batch, or one per example."""
    rest = {name: tree for name, tree in state.items() if name not in ("params", "rngs", "ema")}
    variables = {**rest, "params": merged(params, state.get("params", {}))}
    mapped = "vmap" in stack.functions

    def call(x: Any, key: Any) -> tuple[Any, Any]:
        if key is not None and stack.functions == ("rngs", "vmap"):
            key = jax.random.split(key)[1]  # drawn once more, per lane
        rngs: Any = {} if key is None else {"rngs": {"dropout": key}}
        module = Drawn(model, "batch" if mapped else None)
        out, new = module.apply(variables, x, mutable=[*rest, "intermediates"], **rngs)
        new = dict(new)
        sown = new.pop("intermediates", {})
        return ((out, {"intermediates": sown}) if model.has(Sow) else out), {**rest, **new}

    keys, key = {}, None
    if model.has(Dropout):
        first, key = jax.random.split(state["rngs"]["dropout"])
        keys = {"rngs": {"dropout": first}}
    if mapped:
        lanes = None if key is None else jax.random.split(key, len(x))
        each = jax.vmap(call, in_axes=(0, None if key is None else 0), out_axes=(0, None), axis_name="batch")
        out, new = each(x, lanes)
    else:
        out, new = call(x, key)
    return out, state | new | keys


def step_by_hand(model: Model, stack: Stack, tx: Any) -> Any:
    """The guide's loop body over `(params, state, opt_state)`."""
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        out, state = applied_by_hand(model, stack, params, state, x)
        return error(model, out, y), state

    def step(params: Any, state: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
        count = stack.microbatches
        losses, grads = [], []
        for i in range(count):
            x, y = (leaf[i * BATCH // count : (i + 1) * BATCH // count] for leaf in batch)
            (loss, state), grad = jax.value_and_grad(loss_fn, has_aux=True)(params, state, x, y)
            losses.append(loss)
            grads.append(grad)
        loss, mean = losses[0], grads[0]
        if count > 1:
            loss = sum(losses) / count
            mean = jax.tree.map(lambda *each: sum(each) / count, *grads)
        updates, opt_state = tx.update(mean, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        if "ema" in stack.steps:
            ema = optax.incremental_update(params, state["ema"], 1 - DECAY)
            state = {**state, "ema": jax.tree.map(lambda new, old: new.astype(old.dtype), ema, state["ema"])}
        return params, state, opt_state, loss

    return step


def parts(carry: fs.Carry) -> tuple[Any, Any, Any]:
    """What the loop by hand carries, in buffers of its own."""
    copy: tuple[Any, Any, Any] = jax.tree.map(jnp.copy, (carry.params, carry.state, carry.opt_state))
    return copy


def jitted(step: Any, stack: Stack, carry: fs.Carry) -> Any:
    """As the stack says."""
    return fs.jit_step(step, like=carry if stack.like else None, donate=stack.donate)


# Law 1


@some.fuzzed(model=some.models(), data=st.data())
def test_law_1_split_and_merge(model: Model, data: st.DataObject) -> None:
    variables = model.variables()
    for _ in range(8):  # a model takes much longer to make than to split
        trainable, chosen = data.draw(some.trainables(variables["params"]))
        params, state = fs.split_params(variables, trainable=trainable)
        assert some.flat(params).keys() == chosen
        back = fs.merge_state(params, state)
        assert_bits(back, variables)
        assert_bits(fs.split_params(back, trainable=trainable), (params, state))


# Law 2


@some.fuzzed(model=some.models(), seed=st.integers(0, 99))
def test_law_2_apply(model: Model, seed: int) -> None:
    params, state = model.halves()
    rngs = {"dropout": state.pop("rngs")["dropout"]} if model.has(Dropout) else None
    x, _ = model.batch(seed)
    fn = applied(model, Stack())
    written = sorted(state.keys() - {"params", "ema"})

    @jax.jit
    def by_hand(x: Any) -> Any:
        rest = {name: state[name] for name in written}
        variables = {**rest, "params": merged(params, state.get("params", {}))}
        out, new = Drawn(model).apply(variables, x, rngs=rngs, mutable=[*written, "intermediates"])
        sown = {"intermediates": dict(new).get("intermediates", {})}
        return ((out, sown) if model.has(Sow) else out), {name: dict(new)[name] for name in written}

    out, new_state = jax.jit(lambda x: fn(params, state, x, **({} if rngs is None else {"rngs": rngs})))(x)
    expected, updated = by_hand(x)
    assert_bits(out, expected)
    assert_bits(new_state, {**state, **updated})


# Law 3


@some.fuzzed(model=some.models(rounding=False, dropout=False, cached=False), seed=st.integers(0, 99))
def test_law_3_vmap(model: Model, seed: int) -> None:
    params, state = model.halves()
    x, y = model.batch(seed)

    def run(stack: Stack) -> Any:
        fn = applied(model, stack)

        def loss(params: Any) -> tuple[Any, Any]:
            result, new = fn(params, state, x)
            return error(model, result, y), (result, new)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert_close(run(Stack(("vmap",))), run(Stack()))


# Laws 4 and 6: a frozen leaf is in the state, which is compared too


def trained(model: Model, stack: Stack, tx: optax.GradientTransformation, check: Any) -> None:
    """Takes three steps by flaxsplit and by hand."""
    params, state = model.halves()
    carry = fs.init_carry(params, state, tx)
    hand = parts(carry)
    step, by_hand = jitted(stepped(model, stack, tx), stack, carry), jax.jit(step_by_hand(model, stack, tx))
    assert structure(carry.opt_state) == structure(tx.init(params))
    for seed in range(3):
        batch = model.batch(seed)
        carry, loss = step(carry, batch)
        *hand, expected = by_hand(*hand, batch)
        check((carry.params, carry.state, carry.opt_state, loss), (*hand, expected))
    assert step._cache_size() == 1
    assert_bits(carry.state.get("params", {}), state.get("params", {}))


@some.fuzzed(model=some.models(), tx=some.optimizers(), data=st.data())
def test_laws_4_and_6_the_loop_of_the_guide(model: Model, tx: optax.GradientTransformation, data: Any) -> None:
    trained(model, data.draw(some.stacks(model)), tx, assert_bits)


# Law 5


@some.fuzzed(model=some.models(rounding=False), data=st.data(), unroll=st.integers(1, 2))
def test_law_5_scan(model: Model, data: st.DataObject, unroll: int) -> None:
    stack = data.draw(some.stacks(model, [1, 2]))
    carry = fs.init_carry(*model.halves(), SGD)
    hand = parts(carry)
    scan = jitted(fs.scan_steps(stepped(model, stack, SGD), unroll=unroll), stack, carry)
    by_hand = jax.jit(step_by_hand(model, stack, SGD))
    batches = [model.batch(seed) for seed in range(2)]
    carry, losses = scan(carry, jax.tree.map(lambda *each: jnp.stack(each), *batches))
    for i, batch in enumerate(batches):
        *hand, expected = by_hand(*hand, batch)
        assert_close(losses[i], expected)
    assert_close((carry.params, carry.state, carry.opt_state), tuple(hand))


@some.fuzzed(model=some.models(rounding=False), data=st.data())
def test_law_5_microbatches(model: Model, data: st.DataObject) -> None:
    trained(model, data.draw(some.stacks(model, [2, 4])), SGD, assert_close)


# Law 8


@some.fuzzed(model=some.models(rounding=False), data=st.data())
def test_law_8_mesh(model: Model, data: st.DataObject) -> None:
    stack = data.draw(some.stacks(model))
    single = fs.init_carry(*model.halves(), SGD)
    sharded = jax.device_put(jax.tree.map(jnp.copy, single), by_shape(PAIRS, single))
    step = jitted(stepped(model, stack, SGD), Stack(), single)
    on_mesh: Any = fs.jit_step(stepped(model, stack, SGD), like=sharded)
    for seed in range(2):
        x, y = (jnp.concatenate([leaf, leaf]) for leaf in model.batch(seed))  # eight examples
        if model.cached:
            x, y = x[:BATCH], y[:BATCH]
        spread = NamedSharding(PAIRS, P(("data", "model"))) if len(x) == 8 else on(PAIRS, "data")
        single, expected = step(single, (x, y))
        sharded, loss = on_mesh(sharded, jax.device_put((x, y), spread))
        assert_close((sharded, loss), (single, expected), 1e-3)
    assert on_mesh._cache_size() == 1


# Law 7, and all in any order


class Training(RuleBasedStateMachine):
    """Splits, merges, steps, scans, evaluates, saves, restores and adopts, beside the plain loop."""

    budget: Any = None

    @initialize(
        model=some.models(rounding=False),
        tx=st.sampled_from(["momentum", "adam", "inject_hyperparams"]),
        data=st.data(),
    )
    def begin(self, model: Model, tx: str, data: st.DataObject) -> None:
        self.budget.next()
        self.model, self.stack = model, data.draw(some.stacks(model))
        self.tx = some.OPTIMIZERS[tx]
        self.carry = fs.init_carry(*model.halves(), self.tx)
        self.first = jax.tree.map(jnp.copy, self.carry)
        self.hand: Any = parts(self.carry)
        step = stepped(model, self.stack, self.tx)
        self.step = jitted(step, self.stack, self.carry)
        self.scan: Any = fs.jit_step(fs.scan_steps(stepped(model, self.stack, self.tx)))
        self.by_hand = jax.jit(step_by_hand(model, self.stack, self.tx))
        self.saved: Any = None
        self.count = self.at = 0

    @rule(seed=st.integers(0, 9))
    def steps(self, seed: int) -> None:
        batch = self.model.batch(seed)
        self.carry, loss = self.step(self.carry, batch)
        *self.hand, expected = self.by_hand(*self.hand, batch)
        assert_bits(loss, expected)
        self.count += 1

    @rule(seed=st.integers(0, 9))
    def scans(self, seed: int) -> None:
        batches = [self.model.batch(seed), self.model.batch(seed + 1)]
        self.carry, _ = self.scan(self.carry, jax.tree.map(lambda *each: jnp.stack(each), *batches))
        for batch in batches:
            *self.hand, _ = self.by_hand(*self.hand, batch)
        # Two programs: XLA may round otherwise. From here on both go on from the same numbers.
        assert_close(parts(self.carry), tuple(self.hand), 1e-3)
        self.hand = parts(self.carry)
        self.count += 2

    @rule()
    def splits_and_merges(self) -> None:
        own = {name: tree for name, tree in self.carry.state.items() if name not in ("rngs", "ema")}
        variables = fs.merge_state(self.carry.params, own)
        params, state = fs.split_params(variables, trainable=self.model.trainable)
        self.carry = self.carry._replace(params=params, state=self.carry.state | state)

    @rule(seed=st.integers(0, 9))
    def evaluates(self, seed: int) -> None:
        rest = {name: tree for name, tree in self.carry.state.items() if name not in ("rngs", "ema", "params")}
        read = fs.with_mutable(Drawn(self.model), mutable=False)
        state = {name: tree for name, tree in self.carry.state.items() if name != "rngs"}
        x, _ = self.model.batch(seed)
        if self.model.cached:
            return  # a cache that is not written cannot be read: Flax
        out, after = read(self.carry.params, state, x, train=False)
        variables = {**rest, "params": merged(self.hand[0], self.hand[1].get("params", {}))}
        assert_bits(out, Drawn(self.model).apply(variables, x, train=False))
        assert_bits(after, state)

    @rule(how=st.sampled_from(["msgpack", "orbax"]))
    def saves(self, how: str) -> None:
        self.kept, self.at = jax.tree.map(jnp.copy, tuple(self.hand)), self.count
        if how == "msgpack":
            self.saved = flax.serialization.to_bytes(bare(self.carry))
        else:
            with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
                saver.save(pathlib.Path(folder) / "carry", self.carry)
                saver.wait_until_finished()
                self.saved = saver.restore(pathlib.Path(folder) / "carry", self.carry)
        self.goes_back()  # at once: few examples save, step and go back by chance

    @rule()
    def goes_back(self) -> None:
        if self.saved is None:
            return
        restored = self.saved
        if isinstance(restored, bytes):
            restored = flax.serialization.from_bytes(bare(self.first), restored)
        self.carry = fs.adopt_carry(restored, self.first)
        self.hand, self.count = jax.tree.map(jnp.copy, self.kept), self.at

    @invariant()
    def is_the_plain_loop(self) -> None:
        if hasattr(self, "carry"):
            assert_bits(parts(self.carry), tuple(self.hand))
            assert int(self.carry.step) == self.count
            assert self.step._cache_size() <= 1
            assert self.scan._cache_size() <= 1

    def teardown(self) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            self.budget.failed = True
        elif error is None:
            self.budget.end()


def bare(carry: Any) -> Any:
    """Keys as their numbers: msgpack knows no others."""
    is_key: Any = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), carry)


def test_training_in_any_order_is_the_plain_loop() -> None:
    budget = some.Budget("test_training_in_any_order_is_the_plain_loop")
    machine = type("Training", (Training,), {"budget": budget})
    deep = settings(max_examples=max(1000, settings().max_examples), stateful_step_count=12)
    budget.spend(lambda: run_state_machine_as_test(machine, settings=deep))
