"""NNX modules trained through flaxsplit against NNX's own loop, and what from_nnx and to_nnx promise."""

import inspect
import pathlib
import re
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxsplit as fs
from flaxsplit._paths import flatten

from . import nnx_models as m
from .flags import ONCE, needs_x32
from .models import numbers, structure

STEPS = 20
ADAM = optax.adam(1e-2)
OPTIMIZERS = {
    "sgd": optax.sgd(0.05, momentum=0.9),
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)),
}


def leaves_of(model: nnx.Module) -> dict[str, Any]:
    """The arrays of a module by path, keys as numbers."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    return {jax.tree_util.keystr(path): numbers(leaf) for path, leaf in pairs}


def assert_equal(left: Any, right: Any) -> None:
    """Compares two trees bit for bit."""
    assert structure(left) == structure(right)
    assert jax.tree.leaves(left)
    left, right = jax.tree.map(numbers, (left, right))
    jax.tree.map(np.testing.assert_array_equal, left, right)


def loss_fn_of(fn: Any) -> Any:
    def loss_fn(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        out, state = fn(params, state, x)
        return m.loss_of(out), state

    return loss_fn


def trained(make: Any, x: Any, tx: Any, wrt: Any) -> tuple[nnx.Module, Any, Any]:
    """Trains through flaxsplit, counting traces and compiles; writes back into a module of another seed."""
    fn, params, state = fs.from_nnx(make(rngs=m.rngs()), trainable=wrt)
    loss_fn = loss_fn_of(fn)
    grads = jax.jit(jax.grad(loss_fn, has_aux=True))(params, state, x)[0]
    carry = fs.init_carry(params, state, tx)
    # not donated, as NNX's loop is not: XLA may fuse otherwise where it may reuse buffers, and round otherwise
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)), donate=False)
    losses = []
    with fs.compile_log() as log:
        for _ in range(STEPS):
            carry, loss = step(carry, x)
            losses.append(loss)
    assert (log.traces["loss_fn"], log.compiles["loss_fn"]) == (ONCE, ONCE), str(log)
    return fs.to_nnx(make(rngs=m.rngs(7)), carry.params, carry.state), losses, grads


def assert_as_nnx(name: str, tx: Any) -> None:
    make, x, wrt = m.MODELS[name]
    theirs = make(rngs=m.rngs())
    before = leaves_of(theirs)
    grads = m.gradient(make(rngs=m.rngs()), x, wrt)
    losses = m.train(theirs, x, tx, wrt, STEPS)
    model, our_losses, our_grads = trained(make, x, tx, wrt)
    assert_equal(our_losses, losses)
    assert losses[-1] < losses[0]
    assert_equal(leaves_of(model), leaves_of(theirs))
    assert any((before[path] != leaf).any() for path, leaf in leaves_of(model).items())
    their_grads = {tuple(map(str, path)): jax.tree.leaves(each)[0] for path, each in nnx.to_flat_state(grads)}
    assert_equal(dict(flatten(our_grads)), their_grads)


@pytest.mark.parametrize("name", m.MODELS)
def test_training_equals_nnx_bit_for_bit(name: str) -> None:
    assert_as_nnx(name, ADAM)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["MLP", "Block"])
def test_with_any_optimizer(name: str, optimizer: str) -> None:
    assert_as_nnx(name, OPTIMIZERS[optimizer])


# ---- what comes out


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def test_params_and_state_are_plain_dicts_with_readable_paths() -> None:
    _, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()))
    linear = {"kernel": (6, 16), "bias": (16,)}
    assert shapes(params) == {
        "first": linear,
        "norm": {"scale": (16,), "bias": (16,)},
        "head": {"kernel": (16, 2), "bias": (2,)},
    }
    stream = "drop/rngs/key" if m.NEW else "drop/rngs/dropout/key"
    assert shapes(state) | {"rng_counts": ()} == {
        "batch_stats": {"norm": {"mean": (16,), "var": (16,)}},
        "Calls": {"calls": ()},
        "rngs": {stream: ()} if m.NEW else {"drop/rngs/default/key": (), stream: ()},
        "rng_counts": (),
    }
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((params, state)))
    assert not any(isinstance(leaf, nnx.Variable) for leaf in jax.tree.leaves((params, state)))


def test_the_modules_signature_is_kept() -> None:
    fn, _, _ = fs.from_nnx(m.MLP(rngs=m.rngs()))
    parameters = inspect.signature(fn).parameters.values()
    assert [(each.name, each.kind.name) for each in parameters] == [
        ("params", "POSITIONAL_ONLY"),
        ("state", "POSITIONAL_ONLY"),
        ("x", "POSITIONAL_OR_KEYWORD"),
        ("scale", "KEYWORD_ONLY"),
    ]
    named: Any = fn
    assert named.__name__ == "MLP"


def test_a_shared_variable_occurs_once() -> None:
    _, params, _ = fs.from_nnx(m.Tied(rngs=m.rngs()))
    assert sorted(params) == ["embed", "mix"]


def test_a_call_is_the_modules_call_and_leaves_the_module_alone() -> None:
    model, twin = m.MLP(rngs=m.rngs()), m.MLP(rngs=m.rngs())
    before = leaves_of(model)
    fn, params, state = fs.from_nnx(model)
    given = shapes((params, state))
    out, new_state = fn(params, state, m.X, scale=2.0)
    assert_equal(leaves_of(model), before)
    assert_equal(out, twin(m.X, scale=2.0))
    assert shapes((params, new_state)) == given
    assert fs.to_nnx(model, params, new_state) is model
    assert_equal(leaves_of(model), leaves_of(twin))


def test_from_nnx_after_to_nnx_is_the_identity() -> None:
    model = m.MLP(rngs=m.rngs())
    before = leaves_of(model)
    fs.to_nnx(model, *fs.from_nnx(model)[1:])
    assert_equal(leaves_of(model), before)


def test_what_is_written_back_outlives_a_donated_step() -> None:
    fn, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()))
    step = fs.jit_step(fs.with_optimizer(loss_fn_of(fn), ADAM))
    carry, _ = step(fs.init_carry(params, state, ADAM), m.X)
    model = fs.to_nnx(m.MLP(rngs=m.rngs(3)), carry.params, carry.state)
    step(carry, m.X)
    assert np.isfinite(model(m.X)).all()


def test_a_mode_is_static() -> None:
    model = m.MLP(rngs=m.rngs())
    training, params, state = fs.from_nnx(model)
    model.eval()  # type: ignore[no-untyped-call]
    evaluating, _, _ = fs.from_nnx(model)
    _, trained_on = training(params, state, m.X)
    out, same = evaluating(params, state, m.X)
    assert (trained_on["batch_stats"]["norm"]["mean"] != 0).any()
    assert_equal(same["batch_stats"], state["batch_stats"])
    assert_equal(out, model(m.X))


def test_any_function_of_the_module_is_a_method() -> None:
    model = m.MLP(rngs=m.rngs())
    methods: tuple[Any, ...] = (m.MLP.hidden, model.hidden, lambda model, x, width: model.hidden(x, width))
    for method in methods:
        fn, params, state = fs.from_nnx(model, method=method)
        (out, width), _ = fn(params, state, m.X, 4)
        assert (out.shape, width) == ((8, 4), 4)


class Sower(nnx.Module):
    """Adds a variable when it is called."""

    def __init__(self) -> None:
        self.w = nnx.Param(jnp.ones(3))

    def __call__(self, x: Any) -> Any:
        self.seen = nnx.Intermediate(x)
        return x * (self.w[...] if m.NEW else self.w.value)


def test_what_a_call_adds_can_be_popped() -> None:
    def call(model: Any, x: jax.Array) -> tuple[Any, Any]:
        return model(x), nnx.pop(model, nnx.Intermediate)

    fn, params, state = fs.from_nnx(Sower(), method=call)
    (_, sown), state = fn(params, state, jnp.ones(3))
    assert (jax.tree.leaves(sown)[0] == 1).all()
    assert state == {}


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="flax 0.12.4 has nnx.capture")
def test_what_is_sown_can_be_captured() -> None:
    class Sowing(Sower):
        def __call__(self, x: jax.Array) -> Any:
            self.sow(nnx.Intermediate, "seen", x)
            return x

    fn, params, state = fs.from_nnx(Sowing(), method=lambda model, x: nnx.capture(model, nnx.Intermediate)(x))
    (_, sown), state = fn(params, state, jnp.ones(3))
    assert (jax.tree.leaves(sown)[0] == 1).all()
    assert state == {}


class Odd(nnx.Module):
    """A value that is a tree, an empty one, and a stream of its own."""

    def __init__(self) -> None:
        self.tree = nnx.Variable({"a": jnp.ones(2), "b": (jnp.ones(3),)})
        self.nothing = nnx.Cache(None)
        self.w = nnx.Param(jnp.ones(2))

    def __call__(self, x: Any) -> Any:
        return x


def test_a_value_may_be_a_tree() -> None:
    model = Odd()
    fn, params, state = fs.from_nnx(model)
    (collection,) = state
    assert shapes(state[collection]) == {"tree": {"a": (2,), "b": {"0": (3,)}}}
    _, new_state = fn(params, state, 1)
    assert_equal(new_state, state)
    fs.to_nnx(model, params, state)


class Average(nnx.Variable[Any]):
    """Registered under a name that flaxsplit gives a meaning of its own."""


nnx.register_variable_name("ema", Average)


def test_a_collection_of_the_modules_own_is_not_taken_for_ours() -> None:
    model: Any = m.Dropping(rngs=m.rngs())
    model.average = Average(jnp.ones(2))
    assert "ema_" in fs.from_nnx(model)[2]


def test_a_kind_of_param_that_is_not_trained_is_a_frozen_param() -> None:
    _, params, state = fs.from_nnx(m.Adapted(rngs=m.rngs()), trainable="body/kernel")
    assert shapes(params) == {"body": {"kernel": (6, 8)}}
    assert {"lora_a", "lora_b"} <= {name for path, _ in flatten(state["params"]) for name in path}


def test_every_key_is_a_string() -> None:
    _, params, _ = fs.from_nnx(m.Containers(rngs=m.rngs()))
    assert {type(name) for path, _ in flatten(params) for name in path} == {str}
    assert "10" in params["many"]


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="flax 0.12 has two modes")
def test_shared_variables_are_taken_in_tree_mode_too() -> None:
    model = m.Tied(rngs=m.rngs())
    with nnx.set_graph_mode(False):  # type: ignore[no-untyped-call]
        fn, params, state = fs.from_nnx(model)
        out, _ = fn(params, state, m.WORDS)
    assert_equal(out, model(m.WORDS))


# ---- which params


FILTERS: dict[str, Any] = {
    "type": nnx.Param,
    "path": nnx.All(nnx.Param, nnx.PathContains("head")),
    "callable": lambda path, variable: path[0] == "head",
    "glob": "head/*",
    "list": [nnx.PathContains("head")],
    "globs": ["head/k*", "*d/bias"],
    "mask": {"first": False, "norm": False, "head": True},
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_of_nnx_and_of_ours(name: str) -> None:
    fn, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()), trainable=FILTERS[name])
    frozen = [] if name == "type" else ["first", "norm"]
    assert sorted({*params} | {*state.get("params", {})}) == ["first", "head", "norm"]
    assert sorted(state.get("params", {})) == frozen
    out, _ = fn(params, state, m.X)
    assert_equal(out, m.MLP(rngs=m.rngs())(m.X))


def test_frozen_params_never_change_and_have_no_optimizer_state() -> None:
    fn, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()), trainable="head/*")
    carry = fs.init_carry(params, state, ADAM)
    assert shapes(carry.opt_state[0].mu) == shapes(params)
    carry, _ = fs.jit_step(fs.with_optimizer(loss_fn_of(fn), ADAM))(carry, m.X)
    assert_equal(carry.state["params"], state["params"])


# ---- with the other combinators


def test_vmap_stateful_shares_statistics_and_splits_dropout() -> None:
    whole, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()))
    lane, _, _ = fs.from_nnx(m.MLP(rngs=m.rngs(), axis_name="batch"))
    _, by_batch = whole(params, state, m.X)
    _, by_lane = fs.vmap_stateful(lane)(params, state, m.X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), by_lane["batch_stats"], by_batch["batch_stats"]
    )
    assert int(by_lane["Calls"]["calls"]) == 1

    drop, params, state = fs.from_nnx(m.Dropping(rngs=m.rngs()))
    first, state = fs.vmap_stateful(drop)(params, state, jnp.ones((8, 64)))
    second, _ = fs.vmap_stateful(drop)(params, state, jnp.ones((8, 64)))
    assert len({row.tobytes() for row in np.asarray((*first, *second))}) == 16
    same, _ = fs.vmap_stateful(drop, split_rngs=False)(params, state, jnp.ones((8, 64)))
    assert len({row.tobytes() for row in np.asarray(same)}) == 1


@pytest.mark.skipif(not m.NEW, reason="before flax 0.11 a stack of layers held no streams")
def test_vmap_stateful_splits_the_stacked_streams_of_a_scan() -> None:
    model = m.Stacked(rngs=m.rngs())
    model.set_attributes(use_running_average=True)
    fn, params, state = fs.from_nnx(model)
    assert state["rngs"]["layers/drop/rngs/key"].shape == (3,)
    out, _ = fs.vmap_stateful(fn)(params, state, jnp.ones((8, 6)))
    assert len({row.tobytes() for row in np.asarray(out)}) == 8


def test_a_scan_of_layers_without_jit() -> None:
    fn, params, state = fs.from_nnx(m.Stacked(rngs=m.rngs()))
    out, new_state = fn(params, state, m.X)
    with jax.disable_jit():
        by_python, updated = fn(params, state, m.X)
    np.testing.assert_allclose(by_python, out, rtol=1e-5)
    assert structure(updated) == structure(new_state)


def test_a_missing_axis_name_is_told_by_the_path() -> None:
    fn, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()))
    with pytest.raises(fs.UnsyncedStateError, match=r"state\['batch_stats'\]\['norm'\]\['mean'\]: differs per lane"):
        fs.vmap_stateful(fn)(params, state, m.X[:, None])


def test_scan_steps_equals_the_loop_and_ema_is_written_back() -> None:
    fn, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()))
    step = fs.with_ema(fs.with_optimizer(loss_fn_of(fn), ADAM), decay=0.9)
    carry = fs.init_carry(params, state | {"ema": params}, ADAM)
    scanned, losses = fs.jit_step(fs.assert_max_traces(fs.scan_steps(step)), donate=False)(carry, jnp.stack([m.X] * 5))
    jitted = fs.jit_step(fs.assert_max_traces(step), donate=False)
    for i in range(5):
        carry, loss = jitted(carry, m.X)
        np.testing.assert_allclose(loss, losses[i], rtol=1e-5)
    assert_equal(scanned.state["rngs"], carry.state["rngs"])
    assert_equal(scanned.state["rng_counts"], carry.state["rng_counts"])
    model = fs.to_nnx(m.MLP(rngs=m.rngs(5)), carry.state["ema"], carry.state)
    assert_equal(leaves_of(model)["['head']['kernel'].value"], np.asarray(carry.state["ema"]["head"]["kernel"]))


def test_a_checkpoint_is_adopted_and_training_goes_on_bit_for_bit() -> None:
    fn, params, state = fs.from_nnx(m.MLP(rngs=m.rngs()))
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn_of(fn), ADAM)))
    carry, _ = step(fs.init_carry(params, state, ADAM), m.X)
    saved = jax.tree.map(numbers, carry)
    straight, _ = step(carry, m.X)
    restored, _ = step(fs.adopt_carry(saved, straight), m.X)
    assert_equal(jax.tree.map(numbers, restored), jax.tree.map(numbers, straight))


def test_nnx_in_linen_is_a_linen_module() -> None:
    model = nnx.bridge.ToLinen(m.Placed)
    variables = model.init(jax.random.key(0), m.X)
    params, state = fs.split_params(variables)
    out, new_state = fs.with_mutable(model, mutable=False)(params, state, m.X)
    assert_equal(out, model.apply(variables, m.X))
    assert new_state.keys() == state.keys()


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="flax 0.12 has two modes")
@pytest.mark.parametrize("graph", [True, False])
def test_in_graph_mode_and_in_tree_mode(graph: bool) -> None:
    with nnx.set_graph_mode(graph):  # type: ignore[no-untyped-call]
        model = m.MLP(rngs=m.rngs())
        fn, params, state = fs.from_nnx(model)
        carry = fs.init_carry(params, state, ADAM)
        step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn_of(fn), ADAM)))
        for _ in range(3):
            carry, _ = step(carry, m.X)
        fs.to_nnx(model, carry.params, carry.state)
    twin = m.MLP(rngs=m.rngs())
    m.train(twin, m.X, ADAM, nnx.Param, 3)
    assert_equal(leaves_of(model), leaves_of(twin))


# ---- what goes wrong


def fails(kind: type[Exception], fn: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        fn(*args, **kwargs)
    assert type(caught.value) is kind
    return str(caught.value)


def whole(text: str) -> str:
    return textwrap.dedent(text).strip()


class Writer(nnx.Module):
    """Normalizes its own param when it is called, under a transformation if wanted."""

    def __init__(self, lifted: Any = lambda fn: fn) -> None:
        self.w, self.b = nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones(3))
        self.lifted = lifted

    def __call__(self, x: Any) -> Any:
        def call(w: Any, b: Any) -> Any:
            if m.NEW:
                w[...] = w[...] / jnp.linalg.norm(w[...])
                return x * w[...] + b[...]
            w.value = w.value / jnp.linalg.norm(w.value)
            return x * w.value + b.value

        return self.lifted(call)(self.w, self.b)


def test_a_class() -> None:
    assert fails(fs.SignatureError, fs.from_nnx, m.MLP) == whole("""
    from_nnx(module): module must be an instance of nnx.Module
      got:
        module: the class MLP
      likely cause: the module was not constructed
      fix: MLP(...)
    """)


def test_a_linen_module() -> None:
    assert fails(fs.SignatureError, fs.from_nnx, m.Linen()) == whole("""
    from_nnx(module): module must be an instance of nnx.Module
      got:
        module: Linen, a Linen module
      likely cause: it belongs to Flax's other API
      fix: with_mutable(module), or nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=rngs), x)
    """)


@pytest.mark.parametrize("part", [0, 1])
def test_a_split_module(part: int) -> None:
    split = nnx.split(m.MLP(rngs=m.rngs()))[part]
    assert fails(fs.SignatureError, fs.from_nnx, split) == whole(f"""
    from_nnx(module): module must be an instance of nnx.Module
      got:
        module: {type(split).__name__}
      likely cause: what nnx.split returns was passed, or another object
      fix: from_nnx(nnx.merge(graphdef, state))
    """)
    assert "to_nnx(module, params, state): module must be" in fails(fs.SignatureError, fs.to_nnx, split, {}, {})


def test_an_abstract_module() -> None:
    model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert fails(fs.SignatureError, fs.from_nnx, model) == whole("""
    from_nnx(module): every variable must have a value
      got:
        bias: ShapeDtypeStruct f32[3]
        kernel: ShapeDtypeStruct f32[2,3]
      likely cause: the module was made by nnx.eval_shape and not filled
      fix: from_nnx(Model(..., rngs=nnx.Rngs(0))), or nnx.update(module, state) before
    """)


def test_a_bridged_module_without_variables() -> None:
    model = nnx.bridge.ToNNX(m.Linen())
    assert fails(fs.CollectionError, fs.from_nnx, model) == whole("""
    from_nnx(trainable=...): the filter must choose at least one variable
      got:
        the module has no variables
      likely cause: a bridged module that was not initialized
      fix: from_nnx(nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), x))
    """)
    bridged: Any = nnx.bridge.lazy_init(nnx.bridge.ToNNX(m.Linen(), rngs=m.rngs()), m.X)
    assert "Dense_0" in fs.from_nnx(bridged)[1]


def test_a_filter_that_leaves_no_params() -> None:
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    assert fails(fs.CollectionError, fs.from_nnx, model, trainable=nnx.LoRAParam) == whole("""
    from_nnx(trainable=...): the filter must choose at least one variable
      got:
        LoRAParam matches none of 4 arrays, which are of 'batch_stats', 'params'
      likely cause: another type, or a path that the module does not have
      fix: from_nnx(module, trainable=nnx.Param)
    """)
    assert "the filter must choose" in fails(fs.CollectionError, fs.from_nnx, model, trainable=[nnx.Param, None])
    assert fails(fs.CollectionError, fs.from_nnx, model, trainable="scal") == whole("""
    from_nnx(trainable=...): the filter must match at least one param
      got:
        'scal' matches none of 2: 'bias', 'scale'
      likely cause: a misspelt path
      fix: did you mean 'scale'?
    """)


def test_a_filter_that_is_none() -> None:
    assert fails(fs.SignatureError, fs.from_nnx, m.MLP(rngs=m.rngs()), trainable=3) == whole("""
    from_nnx(trainable=...): one of NNX's filters, a glob, a tree of bools, or a list of these
      got:
        trainable: int
      likely cause: something else was passed
      fix: from_nnx(module, trainable=nnx.Param)
    """)


def test_a_filter_that_chooses_counters() -> None:
    assert fails(fs.CollectionError, fs.from_nnx, m.MLP(rngs=m.rngs()), trainable=(nnx.Param, m.Calls)) == whole("""
    from_nnx(trainable=...): every param must be differentiable: of a floating or complex dtype
      got:
        calls: i32[], of 'Calls'
      likely cause: the filter chooses more than params
      fix: trainable=nnx.All(nnx.Param, ...) with the filter for ...
    """)


@needs_x32
def test_a_variable_made_in_the_call() -> None:
    fn, params, state = fs.from_nnx(Sower())
    assert fails(fs.StateDriftError, fn, params, state, jnp.ones(3)) == whole("""
    from_nnx(module): a call must leave the module with the variables that it had
      got:
        state['intermediates']['seen']: absent -> f32[3]
      likely cause: self.sow, or a variable made in __call__
      fix: make it in __init__, or hand it out: from_nnx(m, method=lambda m, x: (m(x), nnx.pop(m, nnx.Intermediate)))
    """)


class Losses(nnx.Variable[Any]):
    """What a module sows, by a type of its own."""


def test_a_sown_type_of_ones_own_is_named() -> None:
    class Penalty(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(3))

        def __call__(self, x: Any) -> Any:
            self.l2 = Losses(jnp.sum(x))  # as self.sow does
            return x

    fn, params, state = fs.from_nnx(Penalty())
    text = fails(fs.StateDriftError, fn, params, state, jnp.ones(3))
    assert text.endswith("hand it out: from_nnx(m, method=lambda m, x: (m(x), nnx.pop(m, Losses)))")
    popping, params, state = fs.from_nnx(Penalty(), method=lambda m, x: (m(x), nnx.pop(m, Losses)))
    (out, sown), _ = popping(params, state, jnp.ones(3))
    assert (out.shape, len(jax.tree.leaves(sown))) == ((3,), 1)


class Counter(nnx.Module):
    """Counts its calls in a Python number, down in a module of it."""

    def __init__(self) -> None:
        self.inner, self.w = Dull(), nnx.Param(jnp.ones(3))

    def __call__(self, x: Any) -> Any:
        self.inner.calls += 1
        return x


class Dull(nnx.Module):
    """Holds a Python number."""

    def __init__(self) -> None:
        self.calls = 0


def test_an_attribute_changed_in_the_call() -> None:
    fn, params, state = fs.from_nnx(Counter())
    assert fails(fs.StateDriftError, fn, params, state, jnp.ones(3)) == whole("""
    from_nnx(module): a call must leave the module's attributes as they were
      got:
        module.inner.calls: 0 -> 1
      likely cause: a counter or a mode kept in a Python attribute
      fix: keep it in a variable, nnx.Variable(jnp.zeros((), jnp.int32)); change modes before from_nnx
    """)


@pytest.mark.parametrize("lifted", [lambda fn: fn, nnx.remat, nnx.jit], ids=["plain", "remat", "jit"])
def test_a_param_written_in_the_call(lifted: Any) -> None:
    fn, params, state = fs.from_nnx(Writer(lifted))
    assert fails(fs.CollectionError, fn, params, state, jnp.ones(3)) == whole("""
    from_nnx(trainable=...): params are the optimizer's to change
      got:
        params['w']: written in the call
      likely cause: the module keeps in a param what it computes: a normalized kernel, which is to be trained, or an \
average, which is state
      fix: for a kernel, from_nnx(module, method=call), with def call(m, x): before = jax.tree.map(lambda leaf: leaf, \
nnx.state(m, nnx.Param)); out = m(x); nnx.update(m, before); return out. For an average, trainable=nnx.All(nnx.Param, \
lambda path, _: '/'.join(map(str, path)) not in ['w'])
    """)
    as_state = nnx.All(nnx.Param, lambda path, _: "/".join(map(str, path)) not in ["w"])
    fn, params, state = fs.from_nnx(Writer(lifted), trainable=as_state)
    assert [*params] == ["b"]
    _, state = fn(params, state, jnp.ones(3))
    np.testing.assert_allclose(state["params"]["w"], 3**-0.5, rtol=1e-6)


def putting_back(module: Any, x: Any) -> Any:
    before = jax.tree.map(lambda leaf: leaf, nnx.state(module, nnx.Param))
    out = module(x)
    nnx.update(module, before)
    return out


@pytest.mark.parametrize("lifted", [lambda fn: fn, nnx.remat, nnx.jit], ids=["plain", "remat", "jit"])
def test_a_normalized_kernel_is_trained(lifted: Any) -> None:
    model = Writer(lifted)
    fn, params, state = fs.from_nnx(model, method=putting_back)
    assert (sorted(params), state) == (["b", "w"], {})
    grads = jax.grad(lambda params: fn(params, state, jnp.arange(3.0))[0].sum())(params)
    length = jnp.linalg.norm
    by_hand = jax.grad(lambda w: (jnp.arange(3.0) * w / length(w)).sum())(params["w"])
    np.testing.assert_allclose(grads["w"], by_hand, rtol=1e-6)


def test_every_kernel_under_weight_norm_is_trained() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.normed = nnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(self.normed(x))

    if not hasattr(nnx, "WeightNorm"):
        pytest.skip("of a later flax")
    fn, params, state = fs.from_nnx(Net(nnx.Rngs(0)))
    text = fails(fs.CollectionError, fn, params, state, jnp.ones((2, 3)))
    assert "not in ['normed/layer_instance/kernel'])" in text
    fn, params, state = fs.from_nnx(Net(nnx.Rngs(0)), method=putting_back)
    grads = jax.grad(lambda params: fn(params, state, jnp.arange(6.0).reshape(2, 3))[0].sum())(params)
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if "kernel" in str(path[-1])]
    assert len(kernels) >= 2
    assert all(bool(jnp.any(leaf != 0)) for leaf in kernels)


@pytest.mark.parametrize("around", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_a_custom_gradient_writes_no_param(around: Any) -> None:
    class Custom(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear, self.norm = nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            @nnx.custom_vjp
            def call(module: Any, x: Any) -> Any:
                return module.norm(module.linear(x))

            def forward(module: Any, x: Any) -> Any:
                return call(module, x), (module, x)

            def backward(kept: Any, grads: Any) -> Any:
                return grads[0]

            call.defvjp(forward, backward)
            return call(self, x)

    model = Custom(nnx.Rngs(0))
    fn, params, state = fs.from_nnx(model)
    out, new_state = around(fn)(params, state, jnp.ones((4, 2)))
    twin = nnx.clone(model)
    np.testing.assert_allclose(out, twin(jnp.ones((4, 2))), rtol=1e-6)
    np.testing.assert_allclose(
        new_state["batch_stats"]["norm"]["mean"], fs.from_nnx(twin)[2]["batch_stats"]["norm"]["mean"], rtol=1e-6
    )


class Pool(nnx.Module):
    """Has no variables at all."""

    def __call__(self, x: Any) -> Any:
        return x.mean(-1)


@pytest.mark.parametrize("trainable", [nnx.Param, None, False, "*", [], (), {}], ids=str)
def test_a_module_without_params_is_all_state(trainable: Any) -> None:
    from_nnx: Any = fs.from_nnx
    fn, params, state = from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), trainable=trainable)
    assert (params, "rngs" in state) == ({}, True)
    out, state = fn(params, state, jnp.ones(8))
    assert out.shape == (8,)
    norm = nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    fn, params, state = from_nnx(norm, trainable=trainable)
    assert (params, sorted(state["batch_stats"])) == ({}, ["mean", "var"])
    _, new_state = fn(params, state, jnp.ones((4, 3)))
    assert bool((new_state["batch_stats"]["mean"] != state["batch_stats"]["mean"]).all())
    fn, params, state = from_nnx(Pool(), trainable=trainable)
    assert (params, state, float(fn(params, state, jnp.ones(3))[0])) == ({}, {}, 1.0)


def test_a_filter_for_a_module_without_params() -> None:
    assert fails(fs.CollectionError, fs.from_nnx, Pool(), trainable=nnx.BatchStat) == whole("""
    from_nnx(trainable=...): the filter must choose at least one variable
      got:
        the module has no variables
      likely cause: nothing of this module can be trained
      fix: from_nnx(module)
    """)
    assert fails(fs.CollectionError, fs.from_nnx, Pool(), trainable="head/*") == whole("""
    from_nnx(trainable=...): the filter must match at least one param
      got:
        no params
      likely cause: there are no params to choose from
      fix: from_nnx(module)
    """)


@pytest.mark.skipif(not hasattr(nnx, "var_defaults"), reason="of a later flax")
@pytest.mark.parametrize(("kind", "name"), [("ref", "Ref"), ("hijax", "HijaxVariable")])
def test_variables_that_are_no_values(kind: str, name: str) -> None:
    defaults: Any = getattr(nnx, "var_defaults")  # noqa: B009 (older flax does not have it)
    with defaults(**{kind: True}):
        model = nnx.BatchNorm(2, use_scale=False, rngs=nnx.Rngs(0))
    assert fails(fs.SignatureError, fs.from_nnx, model) == whole(f"""
    from_nnx(module): every variable must hold a value: an array, or a number
      got:
        bias: {name}
        mean: {name}
        var: {name}
      likely cause: the module was made with ref=True or hijax=True, and a call would write into what the caller holds
      fix: with nnx.var_defaults(ref=False, hijax=False): module = Model(..., rngs=nnx.Rngs(0))
    """)
    assert fails(fs.SignatureError, fs.to_nnx, model, {}, {}).startswith(
        "to_nnx(module, params, state): every variable"
    )
    with defaults(ref=False, hijax=False):
        model = nnx.BatchNorm(2, use_scale=False, rngs=nnx.Rngs(0))
    assert [*fs.from_nnx(model)[1]] == ["bias"]


def test_a_number_of_python_in_a_variable_stays_one() -> None:
    class Counted(nnx.Module):
        def __init__(self) -> None:
            self.calls, self.w = nnx.Cache(0), nnx.Param(jnp.ones(2))

        def __call__(self, x: Any) -> Any:
            return x

    model = Counted()
    _, params, state = fs.from_nnx(model)
    fs.to_nnx(model, params, state)
    assert type(state["cache"]["calls"]) is int
    assert type(fs.from_nnx(model)[2]["cache"]["calls"]) is int
    carry = fs.init_carry(params, state, optax.sgd(0.1))
    fs.to_nnx(model, carry.params, carry.state)
    assert not fs.from_nnx(model)[2]["cache"]["calls"].weak_type


@pytest.mark.parametrize(
    ("method", "came", "cause", "fix"),
    [
        ("decode", "'decode', which Linear does not have", "a name was passed, and not the function", "Model.decode"),
        ("set_attribute", "'set_attribute', which Linear", "a name was passed, and not the", "Linear.set_attributes"),
        ("eval", "'eval'", "a name was passed, and not the function", "Linear.eval"),
    ],
)
def test_a_method_by_its_name(method: str, came: str, cause: str, fix: str) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    text = fails(fs.SignatureError, fs.from_nnx, model, method=method)
    assert f"method: {came}" in text
    assert f"likely cause: {cause}" in text
    assert text.endswith(f"fix: from_nnx(module, method={fix})")


@needs_x32
def test_another_architecture() -> None:
    _, params, _ = fs.from_nnx(m.Dropping(rngs=m.rngs()))
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    text = fails(fs.CollectionError, fs.to_nnx, linear, params, {"rngs": {"drop": jnp.ones(())}, "ema": params})
    assert text == whole("""
    to_nnx(module, params, state): params and state must hold each variable of the module and no other (module -> given)
      got:
        params['bias']: one leaf -> absent
        params['kernel']: one leaf -> absent
        params['scale']: absent -> f32[]
        state['rngs']['drop']: absent -> f32[]
      likely cause: they are of another architecture, or a part was lost
      fix: fn, params, state = from_nnx(module), and to_nnx with this module
    """)


def test_another_shape_and_a_leaf_in_both_halves() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = leaves_of(model)
    fn, params, state = fs.from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    assert "params['kernel']: f32[2,3] -> f32[4,3]\n  likely" in fails(
        fs.CollectionError, fs.to_nnx, model, params, state
    )
    twice = {"params": {"bias": params["bias"]}}
    assert fails(fs.CollectionError, fn, params, twice, jnp.ones(4)) == whole("""
    fn(params, state, *args): params and state must hold each variable of the module and no other (module -> given)
      got:
        params['bias']: one leaf -> in params and in state
      likely cause: they are of another architecture, or a part was lost
      fix: fn, params, state = from_nnx(module), and to_nnx with this module
    """)
    assert_equal(leaves_of(model), before)


# ---- the page


PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "nnx.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_all_code_of_the_page_is_run() -> None:
    assert BLOCKS.keys() == {"before", "after", "modes", "flat"}
    assert PAGE.count("```python") == len(BLOCKS)


@needs_x32
@pytest.mark.skipif(not m.NEW, reason="before flax 0.11 nnx.Optimizer.update took the gradients alone")
def test_before_and_after_are_the_same_bit_for_bit() -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS["before"], names)  # noqa: S102 (the page's own code)
    loss = names["loss"]
    exec(BLOCKS["after"], names)  # noqa: S102
    assert_equal(names["loss"], loss)
    assert_equal(leaves_of(names["trained"]), leaves_of(names["model"]))
    exec(BLOCKS["modes"], names)  # noqa: S102
    names["model"].eval()
    assert_equal(names["pred"], names["model"](names["x"]))


@needs_x32
@pytest.mark.skipif(not m.NEW, reason="before flax 0.11 nnx.Optimizer.update took the gradients alone")
def test_a_carry_of_one_level_trains_to_the_same() -> None:
    names: dict[str, Any] = {}
    for block in ("before", "after"):
        exec(BLOCKS[block], names)  # noqa: S102
    before = names["params"], names["state"]
    first = names["loss_fn"](*before, (names["x"], names["y"]))[0]
    exec(BLOCKS["flat"], names)  # noqa: S102
    np.testing.assert_allclose(names["loss"], first, rtol=1e-5)
    carry = names["flat_carry"]
    assert [*carry.params][:2] == ["hidden/bias", "hidden/kernel"]
    assert sorted(carry.state["batch_stats"]) == ["norm/mean", "norm/var"]
    carry, _ = names["flat_step"](carry, (names["x"], names["y"]))
    assert names["flat_step"]._cache_size() == ONCE
