"""A step compiles exactly once: 20 steps in every situation that is known to compile again, counted."""

import functools
import gc
import inspect
import threading
import warnings
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flaxsplit as fs
from flaxsplit import _again
from flaxsplit._caller import caller

from .flags import needs_jit, needs_promotion, needs_x32
from .meshes import KINDS, line, on, placement, told
from .models import MLP, BiasAdder, Block, Coder, Dropping, Sowing, Two, X, Y
from .test_messages import whole

pytestmark = needs_jit
STEPS = 20
KEY = jax.random.key(0)
TX = optax.adam(1e-2)
BATCH = (X, Y)


def loss_of(apply: Any) -> Any:
    """The loss function of a model, and of whatever it gives out."""

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        out, state = apply(params, state, batch[0])
        return sum((leaf**2).mean() for leaf in jax.tree.leaves(out)), state

    return loss_fn


def train_mlp(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """The loss function of the guide's MLP."""
    pred, state = fs.vmap_stateful(fs.with_mutable(MLP()))(params, state, batch[0], train=True)
    return optax.l2_loss(pred, batch[1]).mean(), state


def mlp() -> tuple[dict[str, Any], dict[str, Any]]:
    """Params and state of the guide's MLP."""
    return fs.split_params(MLP().init(KEY, X[0]))


def types(carry: fs.Carry) -> tuple[Any, Any]:
    """What must stay as it is: structure, shapes, dtypes, weak types and placement."""
    kinds = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(carry)]
    return jax.tree.structure(carry), [*zip(kinds, placement(carry), strict=True)]


def assert_once(
    step: Any, carry: fs.Carry, batches: Any = (BATCH,), edit: Any = lambda i, carry: carry, **options: Any
) -> fs.Carry:
    """Runs a step 20 times: one trace, one compile, and the carry goes on as it came."""
    given = types(carry)
    name = step.__name__
    jitted = fs.jit_step(fs.assert_max_traces(step), **options)
    with fs.compile_log() as log:
        for i in range(STEPS):
            carry, _ = jitted(edit(i, carry), batches[i % len(batches)])
    assert (log.traces[name], log.compiles[name]) == (1, 1), str(log)
    assert int(carry.step) == STEPS
    assert types(carry) == given
    return carry


def scanned(model: Any) -> Any:
    """Stacks layers by `nn.scan`."""
    return nn.scan(model, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)()


def widened(model: Any) -> Any:
    """An ensemble by `nn.vmap`."""
    axes = {"params": 0, "batch_stats": 0}
    return nn.vmap(model, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=3)()


def on_batch(model: Any) -> tuple[Any, Any]:
    """A model that takes the batch."""
    return fs.with_mutable(model), model.init(KEY, X)


def on_example(model: Any) -> tuple[Any, Any]:
    """A model that takes one example."""
    return fs.with_rngs(fs.vmap_stateful(fs.with_mutable(model))), model.init(KEY, X[0], train=False)


MODELS: dict[str, Any] = {
    "Dropping": lambda: on_example(Dropping()),
    "Coder": lambda: on_batch(Coder()),
    "nn.jit": lambda: on_batch(nn.jit(Coder)()),
    "nn.remat": lambda: on_batch(nn.remat(Coder)()),
    "nn.vmap": lambda: on_batch(widened(Coder)),
    "nn.scan": lambda: (
        lambda params, state, x: fs.with_mutable(scanned(Block))(params, state, x, None),
        scanned(Block).init(KEY, X, None),
    ),
    "Two": lambda: on_batch(Two()),
    "Dense": lambda: on_batch(nn.Dense(3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str) -> None:
    apply, variables = MODELS[name]()
    params, state = fs.split_params(variables)
    state |= fs.rng_state(dropout=jax.random.key(1)) if name == "Dropping" else {}
    assert_once(fs.with_optimizer(loss_of(apply), TX), fs.init_carry(params, state, TX))


def test_steady_state() -> None:
    assert_once(fs.with_optimizer(train_mlp, TX), fs.init_carry(*mlp(), TX))


@needs_promotion
def test_the_guides_drift_after_settle_state() -> None:
    apply, x = fs.with_mutable(BiasAdder()), jnp.ones((10, 5))
    params, state = fs.split_params(BiasAdder().init(KEY, x))
    with pytest.raises(fs.StateDriftError):
        fs.with_optimizer(loss_of(apply), TX)(fs.init_carry(params, state, TX), (x,))
    settled = fs.settle_state(apply, params, state, x)
    assert_once(fs.with_optimizer(loss_of(apply), TX), fs.init_carry(params, settled, TX), [(x,)])


def test_python_scalars_in_the_state() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        return (params["w"] * batch).sum(), {"mine": {"n": state["mine"]["n"] + 1, "rate": state["mine"]["rate"] * 0.5}}

    state = {"mine": {"n": 0, "rate": 1.0}}
    carry = assert_once(fs.with_optimizer(loss_fn, TX), fs.init_carry({"w": 2.0}, state, TX), [np.ones(3, np.float32)])
    assert int(carry.state["mine"]["n"]) == STEPS


def test_python_scalars_that_the_loss_function_returns() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        return (params["w"] * batch).sum(), {"mine": {"n": 1, "rate": 0.5}}

    carry = fs.init_carry({"w": jnp.ones(3)}, {"mine": {"n": 0, "rate": 1.0}}, TX)
    assert_once(fs.with_optimizer(loss_fn, TX), carry, [np.ones(3, np.float32)])


def test_bf16_compute_with_f32_state() -> None:
    model = nn.Sequential([nn.Dense(8, dtype=jnp.bfloat16), nn.BatchNorm(False, dtype=jnp.bfloat16)])
    apply, variables = on_batch(model)
    carry = fs.init_carry(*fs.split_params(variables), TX)
    assert {leaf.dtype for leaf in jax.tree.leaves(carry.state)} == {np.dtype("float32")}
    assert_once(fs.with_optimizer(loss_of(apply), TX), carry, [(X.astype(jnp.bfloat16),)])


@pytest.mark.parametrize("frozen", ["variables", "halves", "by the model"])
def test_frozen_dicts(frozen: str) -> None:
    variables = MLP().init(KEY, X[0])
    halves = fs.split_params(freeze(variables))
    params, state = map(freeze, halves) if frozen == "halves" else halves

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        loss, state = train_mlp(params, state, batch)
        return loss, freeze(state) if frozen == "by the model" else state

    if frozen == "by the model":  # another structure than went in: said, not compiled again
        with pytest.raises(fs.StateDriftError):
            fs.with_optimizer(loss_fn, TX)(fs.init_carry(params, state, TX), BATCH)
        return
    assert_once(fs.with_optimizer(loss_fn, TX), fs.init_carry(params, state, TX))


def test_a_fresh_apply_and_an_equal_new_module_per_loop() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        pred, state = fs.vmap_stateful(fs.with_mutable(MLP().apply))(params, state, batch[0], train=True)
        return optax.l2_loss(pred, batch[1]).mean(), state

    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, TX)))
    with fs.compile_log() as log:
        for seed in range(4):
            model = MLP()  # what a new loop makes anew: module, params, carry. None of it is static in the step
            carry = fs.init_carry(*fs.split_params(model.init(jax.random.key(seed), X[0])), TX)
            for _ in range(STEPS // 4):
                carry, _ = step(carry, BATCH)
    assert (log.traces["loss_fn"], log.compiles["loss_fn"]) == (1, 1)


def test_train_and_eval_alternating() -> None:
    @fs.assert_max_traces
    def evaluate(params: Any, state: Any, x: jax.Array) -> Any:
        return fs.vmap_stateful(fs.with_mutable(MLP(), mutable=False))(params, state, x)[0]

    step, evaluate = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(train_mlp, TX))), jax.jit(evaluate)
    carry = fs.init_carry(*mlp(), TX)
    with fs.compile_log() as log:
        for _ in range(STEPS):
            carry, _ = step(carry, BATCH)
            evaluate(carry.params, carry.state, X)
    for name in ("train_mlp", "evaluate"):
        assert (log.traces[name], log.compiles[name]) == (1, 1)


def test_sown_intermediates() -> None:
    apply = fs.with_mutable(Sowing(), capture=("intermediates", "losses"))
    params, state = fs.split_params(Sowing().init(KEY, X))
    state.pop("losses")  # what init sowed
    carry = assert_once(fs.with_optimizer(loss_of(apply), TX), fs.init_carry(params, state, TX))
    assert carry.state.keys() == {"batch_stats"}


def test_a_restored_checkpoint() -> None:
    def through_a_file(i: int, carry: fs.Carry) -> fs.Carry:
        if i not in (5, 11):
            return carry
        numpy = jax.tree.map(np.asarray, tuple(carry))
        return fs.adopt_carry({"step": numpy[0], "params": numpy[1], "state": numpy[2], "opt_state": numpy[3]}, carry)

    assert_once(fs.with_optimizer(train_mlp, TX), fs.init_carry(*mlp(), TX), edit=through_a_file)


@pytest.mark.parametrize("how", ["adopt_carry", "jit_step like"])
def test_a_learning_rate_changed_through_inject_hyperparams(how: str) -> None:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    start = fs.init_carry(*mlp(), tx)

    def changed(i: int, carry: fs.Carry) -> fs.Carry:
        old = carry.opt_state
        rate = 0.1 / (i + 1) if how == "adopt_carry" else jnp.float32(0.1 / (i + 1))
        new = carry._replace(opt_state=old._replace(hyperparams={"learning_rate": rate}))
        return fs.adopt_carry(new, carry) if how == "adopt_carry" else new

    options = {"like": start} if how == "jit_step like" else {}
    carry = assert_once(fs.with_optimizer(train_mlp, tx), start, edit=changed, **options)
    assert float(carry.opt_state.hyperparams["learning_rate"]) == pytest.approx(0.1 / STEPS)


HERE = jax.devices()[0]
PLACES: dict[str, Any] = {
    "numpy": jax.device_get,
    "uncommitted": lambda tree: jax.tree.map(jnp.asarray, jax.device_get(tree)),
    "committed": lambda tree: jax.device_put(tree, HERE),
}


@pytest.mark.parametrize("batch", PLACES)
@pytest.mark.parametrize("params", PLACES)
def test_committed_and_uncommitted_inputs(params: str, batch: str) -> None:
    start, state = PLACES[params](mlp())
    assert_once(fs.with_optimizer(train_mlp, TX), fs.init_carry(start, state, TX), [PLACES[batch](BATCH)])


def test_numpy_batches_and_jax_batches_in_turn() -> None:
    batches = [PLACES["numpy"](BATCH), PLACES["uncommitted"](BATCH)]
    assert_once(fs.with_optimizer(train_mlp, TX), fs.init_carry(*mlp(), TX), batches)


def test_committed_and_uncommitted_batches_in_turn() -> None:
    carry, batches = fs.init_carry(*mlp(), TX), [place(BATCH) for place in PLACES.values()]
    assert_once(fs.with_optimizer(train_mlp, TX), carry, batches, like=carry)


def test_params_put_on_a_device_by_hand() -> None:
    params, state = mlp()
    carry = fs.init_carry(jax.device_put(params, jax.devices()[3]), state, TX)
    carry = assert_once(fs.with_optimizer(train_mlp, TX), carry, [jax.device_get(BATCH)])
    assert {device.id for leaf in jax.tree.leaves(carry) for device in leaf.devices()} == {3}


@KINDS
@pytest.mark.parametrize("spec", [P(), P("data")], ids=["replicated", "fsdp"])
def test_params_on_a_mesh(spec: Any, kind: AxisType) -> None:
    mesh = line(kind)
    place, whole = on(mesh, *spec), on(mesh)
    params, state = mlp()
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, whole if leaf.shape[0] % 8 else place), params)
    carry = fs.init_carry(placed, state, TX)
    batch = jax.device_put(BATCH, on(mesh, "data"))
    carry = assert_once(fs.with_optimizer(told(train_mlp, mesh), TX), carry, [batch], like=carry)
    for tree in (carry.params, carry.opt_state[0].mu):
        assert placement(tree["Dense_1"]["kernel"]) == [place]


@KINDS
def test_what_the_loop_by_hand_does_on_a_mesh(kind: AxisType) -> None:
    """The reason for `init_carry` and `like`: without them, the usual loop compiles twice there."""
    params, state = jax.device_put(mlp(), on(line(kind)))
    batch = jax.device_put(BATCH, on(line(kind), "data"))
    step = fs.with_optimizer(told(train_mlp, line(kind)), TX)
    jitted = jax.jit(step, donate_argnums=0)
    carry = fs.Carry(jnp.int32(0), params, state, TX.init(params))
    with fs.compile_log() as log:
        for _ in range(STEPS):
            carry, _ = jitted(carry, batch)
    assert log.compiles[step.__name__] == 2


STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), BATCH)


def test_a_scan_and_an_average_and_microbatches() -> None:
    params, state = mlp()
    carry = fs.init_carry(params, state | {"ema": params}, TX)
    step = fs.with_ema(fs.with_optimizer(train_mlp, TX, microbatches=4), decay=0.9)
    jitted = fs.jit_step(fs.assert_max_traces(fs.scan_steps(step)))
    with fs.compile_log() as log:
        for _ in range(3):
            carry, _ = jitted(carry, STACKED)
    assert log.compiles["train_mlp"] == 1
    assert int(carry.step) == 3 * STEPS


# What keeps the carry apart from others', and small


def buffers(tree: Any) -> Any:
    """Where every leaf lies in memory."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_an_average_never_aliases_the_params() -> None:
    params, state = mlp()
    carry = fs.init_carry(params, state | {"ema": params}, TX)
    step = fs.jit_step(fs.with_ema(fs.with_optimizer(train_mlp, TX), decay=0.9))
    for _ in range(STEPS):
        every = buffers(carry)
        assert len(set(every)) == len(every)
        carry, _ = step(carry, BATCH)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), carry.params, carry.state["ema"])))


@needs_x32
def test_memory_grows_with_the_microbatch() -> None:
    width, size = 256, 4096

    def loss_fn(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        for _ in range(3):
            x = jnp.tanh(x @ params["w"])
        return x.mean(), state

    tx = optax.sgd(0.1)
    carry, batch = fs.init_carry({"w": jnp.ones((width, width))}, {}, tx), jnp.ones((size, width))

    def temporary(microbatches: int, batch: jax.Array) -> Any:
        step = fs.jit_step(fs.with_optimizer(loss_fn, tx, microbatches=microbatches))
        compiled: Any = step.lower(carry, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts, small = temporary(1, batch), temporary(16, batch), temporary(1, batch[: size // 16])
    accumulator = width * width * 4
    assert parts < whole / 4
    assert parts < small + 4 * accumulator


# compile_log, and what assert_max_traces counts


def new_function(name: str = "doubled") -> Any:
    """A function that JAX has not seen: its caches go by identity."""

    def doubled(x: jax.Array) -> Any:
        return 2 * x

    doubled.__name__ = name
    return doubled


def test_a_log_of_nothing() -> None:
    jitted, x = jax.jit(new_function()), jnp.ones(3)
    jitted(x)
    with fs.compile_log() as log:
        jitted(x)
    assert not log.traces
    assert not log.compiles
    assert str(log) == "traces   seconds compiles    seconds  function"


def test_logs_nest() -> None:
    x = jnp.ones(3)
    with fs.compile_log() as outer:
        jax.jit(new_function("first"))(x)
        with fs.compile_log() as inner:
            jax.jit(new_function("second"))(x)
        jax.jit(new_function("third"))(x)
    assert outer.compiles == outer.traces == {"first": 1, "second": 1, "third": 1}
    assert inner.compiles == inner.traces == {"second": 1}
    assert 0 < inner.compile_seconds["second"] == outer.compile_seconds["second"]
    assert 0 < inner.trace_seconds["second"] == outer.trace_seconds["second"]
    assert str(inner).splitlines()[1].split()[0::2] == ["1", "1", "second"]


def test_a_log_is_closed_by_an_exception_too() -> None:
    x = jnp.ones(3)
    with pytest.raises(ZeroDivisionError), fs.compile_log() as log:
        raise ZeroDivisionError
    jax.jit(new_function())(x)
    assert not log.traces
    assert not log.compiles


def test_a_log_counts_every_thread() -> None:
    x, barrier = jnp.ones(3), threading.Barrier(4)

    def work(name: str) -> None:
        barrier.wait()
        jax.jit(new_function(name))(x)

    names = ["a", "b", "c", "d"]
    with fs.compile_log() as log:
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert log.compiles == log.traces == dict.fromkeys(names, 1)


def test_more_traces_are_allowed_where_they_are_meant() -> None:
    jitted = jax.jit(fs.assert_max_traces(new_function(), 2))
    jitted(jnp.ones(3))
    jitted(jnp.ones(4))
    jitted(jnp.ones(3))
    with pytest.raises(fs.RetraceError, match=r"traced 3 times"):
        jitted(jnp.ones(5))


def test_without_jit_nothing_is_counted() -> None:
    jitted = jax.jit(fs.assert_max_traces(new_function()))
    with jax.disable_jit():
        for size in (3, 3, 4):
            assert jitted(jnp.ones(size)).shape == (size,)
    jitted(jnp.ones(3))
    with pytest.raises(fs.RetraceError, match=r"traced 2 times"):
        jitted(jnp.ones(4))


# Steps made anew


def squared(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """A loss without a model."""
    return ((params["w"] * batch) ** 2).sum(), state


RATE = 1.0


def by_a_global(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """A loss whose number is one of its module."""
    return RATE * (params["w"] * batch).sum(), state


def made(loss_fn: Any = squared, tx: Any = TX, most: int = 1) -> Any:
    """A step, made anew at each call."""
    return fs.assert_max_traces(fs.with_optimizer(loss_fn, tx), most)


def over_a_model(model: Any) -> Any:
    """A loss over a model."""
    apply = fs.with_mutable(model)

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch)
        return (out**2).mean(), state

    return loss_fn


def traced(steps: Any, params: Any = None, batch: Any = None) -> list[Any]:
    """Traces each step, and gives what was told."""
    _again._seen.clear()  # pyright: ignore[reportPrivateUsage]
    params = {"w": jnp.ones(3)} if params is None else params
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            jax.eval_shape(step, fs.Carry(jnp.int32(0), params, {}, TX.init(params)), X[0] if batch is None else batch)
    return [each.message for each in caught]


def test_a_step_made_anew_for_each_epoch_is_told() -> None:
    x = jnp.ones(3)
    first, second = traced((made() for _ in range(3)), batch=x)
    assert isinstance(first, fs.RetraceWarning)
    assert str(first) == whole(
        """
        assert_max_traces(squared, max_traces=1): a step must be made once, and not anew for each epoch
          got:
            another function, of the same code over equal values, was traced with equal arguments
          likely cause: the step is made in a loop, or in a function that is called for each epoch, and JAX compiles \
each
          fix: step = jit_step(...) once, before the loop; or a higher max_traces, if each is meant
        """
    )
    assert str(second) == str(first)
    step = fs.jit_step(made())
    assert traced([step] * 3, batch=x) == [], "its fix"
    assert traced((made(most=3) for _ in range(3)), batch=x) == [], "its other fix"
    params = nn.Dense(2).init(KEY, x)["params"]
    named = functools.partial(lambda _, *args: squared(*args), "a")
    assert len(traced((made(over_a_model(nn.Dense(2)), optax.adam(1e-2)) for _ in range(2)), params, x)) == 1
    assert len(traced((made(functools.partial(named, *())) for _ in range(2)), batch=x)) == 1


def test_it_points_at_the_line_that_makes_the_step_and_is_shown_once() -> None:
    _again._seen.clear()  # pyright: ignore[reportPrivateUsage]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(4):
            jax.jit(fs.assert_max_traces(squared))({"w": X}, {}, X)
    line = inspect.getsourcelines(test_it_points_at_the_line_that_makes_the_step_and_is_shown_once)[1] + 5
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_steps_for_other_models_numbers_sizes_and_lines_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.ones(3)
    params = nn.Dense(2).init(KEY, x)["params"]
    assert traced((made(over_a_model(nn.Dense(2, use_bias=bias))) for bias in (True, False)), params, x)[1:] == []
    assert traced((made(tx=optax.adam(rate)) for rate in (0.1, 0.2)), batch=x) == []
    assert traced((made(lambda p, s, b, n=n: squared(p, s, n * b)) for n in (1, 2)), batch=x) == []
    arrays = [jnp.ones(3), jnp.zeros(3)]
    assert traced((made(lambda p, s, b, y=y: squared(p, s, y * b)) for y in arrays), batch=x) == []
    assert traced([made(), fs.assert_max_traces(fs.with_optimizer(squared, TX))], batch=x) == []
    assert traced([made()], batch=x) + traced([made()], batch=jnp.ones((4, 3))) == []

    def rated() -> Any:
        for rate in (1.0, 2.0):
            monkeypatch.setitem(globals(), "RATE", rate)
            yield made(by_a_global)

    assert traced(rated(), batch=x) == []


def test_what_is_known_of_functions_keeps_nothing_alive_and_is_bounded() -> None:
    big = np.ones(3)
    gone = weakref.ref(big)
    assert traced([made(lambda p, s, b, y=big: squared(p, s, y * b))], batch=jnp.ones(3)) == []
    del big
    gc.collect()
    assert gone() is None
    _again._seen.clear()  # pyright: ignore[reportPrivateUsage]
    for rate in range(300):
        assert _again.Traced(functools.partial(squared, rate), caller()).again(()) == 1
    assert len(_again._seen) == 256  # pyright: ignore[reportPrivateUsage]
    around: list[Any] = []
    around.append(around)
    assert _again.fingerprint(around) is not None
    assert _again.Traced(functools.partial(squared, 299), caller()).again(()) == 1, "of another line"
    large = functools.partial(squared, [[i] for i in range(9000)])
    assert [_again.Traced(large, caller()).again(()) for _ in range(2)] == [1, 1]


def test_the_functions_that_were_traced_last_are_known() -> None:
    known: Any = _again
    known._seen.clear()
    line = caller()
    counts = [known.Traced(functools.partial(squared, rate), line).again(()) for rate in (*range(300), 299, 0, 299)]
    assert counts == [1] * 300 + [2, 1, 3]


def test_what_is_too_large_to_compare_is_unknown() -> None:
    assert [_again.fingerprint([()] * count) is None for count in (4999, 5000)] == [False, True]


def test_an_object_is_itself_while_it_lives() -> None:
    same: Any = _again._Same  # pyright: ignore[reportPrivateUsage]
    one, other = np.ones(3), np.ones(3)
    known = same(one)
    assert known == same(one)
    assert known not in (same(other), 3)
    del one
    gc.collect()
    assert known not in (same(other), same(np.zeros(3)))
    assert known != known


def test_a_name_that_is_bound_later_is_nothing() -> None:
    def reader() -> int:
        return later

    before = _again.fingerprint(reader)
    later = 1
    assert before is not None
    assert before != _again.fingerprint(reader)


def test_threads_are_counted_together() -> None:
    _again._seen.clear()  # pyright: ignore[reportPrivateUsage]
    barrier, counts, line = threading.Barrier(8), list[int](), caller()

    def work() -> None:
        one = _again.Traced(squared, line)
        barrier.wait()
        counts.append(one.again(()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [*range(1, 9)]
