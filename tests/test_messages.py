"""Every message, whole: what a Flax user reads when something is wrong, and that the fix it gives works."""

import functools
import pickle
import textwrap
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import DenyList
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs
from tests.models import MLP, BiasAdder, Dropping, X, Y, structure

from .flags import needs_jit, needs_promotion, needs_x32

KEY = jax.random.key(0)
TX = optax.sgd(0.1)
ADAM = optax.adam(0.1)


def fails(kind: type[Exception], fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls, and gives the error; the arguments are the same afterwards, and the error survives pickling."""
    before = _snapshot((args, kwargs))
    with pytest.raises(kind) as caught:
        fn(*args, **kwargs)
    assert _snapshot((args, kwargs)) == before
    assert type(caught.value) is kind
    error: Any = caught.value
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.leaves) == (str(error), error.leaves)
    return error


def _snapshot(tree: Any) -> Any:
    """Structure, identity and bytes of every leaf: nothing was mutated, replaced or deleted."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(id(leaf), _bytes(leaf)) for leaf in leaves]


def _bytes(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes() if isinstance(leaf, jax.Array | np.ndarray) else None


def whole(text: str) -> str:
    """A message as it is written in these tests, without their indentation."""
    return textwrap.dedent(text).strip()


def variables_of(model: nn.Module, x: Any) -> Any:
    return model.init({"params": KEY, "dropout": KEY}, x)


def halves(model: nn.Module, x: Any, **kwargs: Any) -> Any:
    return fs.split_params(variables_of(model, x), **kwargs)


def squares(params: Any, state: Any, batch: Any) -> Any:
    """A loss without a model."""
    return jnp.sum((params["w"] - batch) ** 2), state


def one(**state: Any) -> Any:
    return fs.init_carry({"w": jnp.ones(3)}, state, TX)


def returning(out: Any) -> Any:
    """A loss function that returns what `out` makes of its arguments."""
    return fs.with_optimizer(lambda params, state, batch: out(params, state, batch), TX)


# ---- the classes


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (fs.CollectionError, ValueError),
        (fs.SignatureError, TypeError),
        (fs.StateDriftError, TypeError),
        (fs.UnsyncedStateError, ValueError),
        (fs.RetraceError, RuntimeError),
        (fs.UntouchedStateWarning, UserWarning),
    ],
)
def test_every_class_is_a_builtins_child_of_one_anatomy(kind: Any, base: type[Exception]) -> None:
    error = kind("f(x)", "must", ["leaf"], "cause", "fix")
    assert isinstance(error, base)
    assert (kind.__module__, kind.__qualname__) == ("flaxsplit", kind.__name__)
    assert getattr(fs, kind.__name__) is kind
    assert str(error) == "f(x): must\n  got:\n    leaf\n  likely cause: cause\n  fix: fix"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    parts = ("f(x)", "must", ("leaf",), "cause", "fix")
    assert (again.where, again.required, again.leaves, again.cause, again.fix) == parts


@needs_x32
def test_a_long_message_is_shortened_but_leaves_keeps_all() -> None:
    params = {f"w{i}": jnp.ones(3) for i in range(600)}
    carry = fs.init_carry(params, {}, TX)
    wider = carry._replace(params=jax.tree.map(lambda leaf: np.ones((2, 3), np.float32), params))
    error = fails(fs.CollectionError, fs.adopt_carry, wider, carry)
    assert len(error.leaves) == 600
    assert str(error) == whole("""
    adopt_carry(restored, like): every leaf must have the shape and dtype that it has in like (like -> restored)
      got:
        carry.params['w0']: f32[3] -> f32[2,3]
        carry.params['w1']: f32[3] -> f32[2,3]
        carry.params['w10']: f32[3] -> f32[2,3]
        carry.params['w100']: f32[3] -> f32[2,3]
        carry.params['w101']: f32[3] -> f32[2,3]
        carry.params['w102']: f32[3] -> f32[2,3]
        carry.params['w103']: f32[3] -> f32[2,3]
        carry.params['w104']: f32[3] -> f32[2,3]
        carry.params['w105']: f32[3] -> f32[2,3]
        carry.params['w106']: f32[3] -> f32[2,3]
        carry.params['w107']: f32[3] -> f32[2,3]
        carry.params['w108']: f32[3] -> f32[2,3]
        ... and 588 more
      likely cause: the checkpoint is of another model or optimizer
      fix: adopt_carry(restored, init_carry(params, state, tx)) with the model and tx that were saved
    """)


def test_no_message_shows_a_value() -> None:
    params = {"w": jnp.full(3, 123456.0), "name": "a string that is no leaf of a carry 123456"}
    assert "123456" not in str(fails(fs.SignatureError, fs.init_carry, params, {}, TX))
    assert "123456" not in str(fails(fs.SignatureError, fs.split_params, jnp.full(3, 123456.0)))
    odd = {"params": {"params": jnp.full(3, 123456.0)}}  # a param that is called 'params' is no mistake
    assert fs.merge_state(*fs.split_params(odd)) == odd


# ---- split_params, merge_state


def test_variables_of_another_kind() -> None:
    error = fails(fs.SignatureError, fs.split_params, [jnp.ones(3)])
    assert str(error) == whole("""
    split_params(variables): variables must be a mapping {collection: tree}
      got:
        variables: list
      likely cause: something else than what module.init returns was passed
      fix: split_params(module.init(key, x))
    """)


def test_no_params_collection() -> None:
    error = fails(fs.CollectionError, fs.split_params, {"batch_stats": {"mean": jnp.ones(3)}})
    assert str(error) == whole("""
    split_params(variables): variables must have a 'params' collection
      got:
        collections: ['batch_stats']
      likely cause: variables['params'] was passed instead of variables, or the model has no params
      fix: split_params(module.init(key, x)), or split_params({'params': {}, **variables})
    """)
    assert fs.split_params({"params": {}, "batch_stats": {}}) == ({}, {"batch_stats": {}})


def test_params_instead_of_variables() -> None:
    variables = variables_of(nn.Dense(2), X)
    error = fails(fs.CollectionError, fs.split_params, variables["params"])
    assert str(error) == whole("""
    split_params(variables): variables must have a 'params' collection
      got:
        collections: ['bias', 'kernel']
      likely cause: variables['params'] was passed instead of variables, or the model has no params
      fix: split_params(module.init(key, x)), or split_params({'params': {}, **variables})
    """)


def test_params_doubled() -> None:
    variables = variables_of(MLP(), X[0])
    error = fails(fs.CollectionError, fs.split_params, {"params": variables})
    assert str(error) == whole("""
    split_params(variables): 'params' must hold the params themselves
      got:
        variables['params']: ['batch_stats', 'params']
      likely cause: variables were wrapped in {'params': ...} once too often
      fix: split_params(variables['params'])
    """)
    error = fails(fs.CollectionError, fs.split_params, {"params": {"params": {"w": X}}})
    assert str(error) == whole("""
    split_params(variables): 'params' must hold the params themselves
      got:
        variables['params']: ['params']
      likely cause: variables were wrapped in {'params': ...} once too often, or the only submodule of the model is \
named 'params'
      fix: split_params(variables['params']); or another name for the submodule
    """)


def test_a_module_called_params_is_no_mistake() -> None:
    variables = {"params": {"params": {"kernel": X}, "head": {"kernel": X}}, "batch_stats": {}}
    assert fs.merge_state(*fs.split_params(variables)) == variables


def test_glob_with_a_near_miss() -> None:
    variables = variables_of(Dropping(), X[0])
    error = fails(fs.CollectionError, fs.split_params, variables, trainable="Dense0/*")
    assert str(error) == whole("""
    split_params(trainable=...): the filter must match at least one param
      got:
        'Dense0/*' matches none of 6: 'Dense_0/kernel', 'Dense_0/bias', 'BatchNorm_0/scale', ...
      likely cause: a misspelt path
      fix: did you mean 'Dense_0/*' or 'Dense_0/bias' or 'Dense_0/kernel'?
    """)
    assert list(fs.split_params(variables, trainable="Dense_0/*")[0]) == ["Dense_0"]
    error = fails(fs.CollectionError, fs.split_params, variables, trainable="head/kernal")
    assert str(error) == whole("""
    split_params(trainable=...): the filter must match at least one param
      got:
        'head/kernal' matches none of 6: 'Dense_0/kernel', 'Dense_0/bias', 'BatchNorm_0/scale', ...
      likely cause: a misspelt path
      fix: did you mean 'head/kernel' or 'head/bias' or 'head/*'?
    """)


def test_glob_without_a_near_miss() -> None:
    variables = variables_of(Dropping(), X[0])
    error = fails(fs.CollectionError, fs.split_params, variables, trainable="zzzzzzzz")
    assert str(error) == whole("""
    split_params(trainable=...): the filter must match at least one param
      got:
        'zzzzzzzz' matches none of 6: 'Dense_0/kernel', 'Dense_0/bias', 'BatchNorm_0/scale', ...
      likely cause: a misspelt path
      fix: a glob on the '/'-joined path: 'head/*'
    """)


def test_predicate_that_chooses_nothing() -> None:
    variables = variables_of(Dropping(), X[0])
    error = fails(fs.CollectionError, fs.split_params, variables, trainable=lambda path, leaf: path[0] == "head")
    assert str(error) == whole("""
    split_params(trainable=...): the filter must match at least one param
      got:
        the predicate matches none of 6: 'Dense_0/kernel', 'Dense_0/bias', 'BatchNorm_0/scale', ...
      likely cause: the predicate takes (path, leaf), the path joined by '/'
      fix: a glob on the '/'-joined path: 'head/*'
    """)
    assert list(fs.split_params(variables, trainable=lambda path, leaf: path.startswith("head/"))[0]) == ["head"]


def test_no_filter_at_all() -> None:
    error = fails(fs.CollectionError, fs.split_params, {"params": {"w": X}}, trainable=[])
    assert str(error) == whole("""
    split_params(trainable=...): the filter must match at least one param
      got:
        an empty list matches none of 1: 'w'
      likely cause: the filters were lost on the way
      fix: a glob on the '/'-joined path: 'head/*'
    """)


def test_mask_of_another_structure() -> None:
    variables = {"params": {"body": {"w": X, "b": Y}, "head": {"w": X}}}
    error = fails(fs.CollectionError, fs.split_params, variables, trainable={"body": {"w": True}, "tail": True})
    assert str(error) == whole("""
    split_params(trainable=...): a tree of bools must have the structure of the params, and at least one True
      got:
        params['body']['b']: no bool in the mask
        params['head']['w']: no bool in the mask
        mask['tail']: no such param
      likely cause: the mask was made for other params
      fix: trainable=jax.tree.map(lambda leaf: ..., variables['params'])
    """)
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, variables["params"])
    assert fs.split_params(variables, trainable=mask)[0] == variables["params"]


def test_mask_without_true() -> None:
    error = fails(fs.CollectionError, fs.split_params, {"params": {"w": X}}, trainable={"w": False})
    assert str(error) == whole("""
    split_params(trainable=...): a tree of bools must have the structure of the params, and at least one True
      got:
        no True in the mask
      likely cause: the mask was made for other params
      fix: trainable=jax.tree.map(lambda leaf: ..., variables['params'])
    """)


@needs_x32
def test_mask_that_is_not_of_bools() -> None:
    error = fails(fs.SignatureError, fs.split_params, {"params": {"w": X}}, trainable={"w": jnp.ones(2)})
    assert str(error) == whole("""
    split_params(trainable=...): every leaf of the mask must be one bool
      got:
        mask['w']: f32[2]
      likely cause: arrays or strings where bools are due, or two answers for one boxed param
      fix: trainable=jax.tree.map(lambda leaf: leaf.ndim > 1, variables['params'])
    """)


def test_trainable_of_another_kind() -> None:
    error = fails(fs.SignatureError, fs.split_params, {"params": {"w": X}}, trainable=3)
    assert str(error) == whole("""
    split_params(trainable=...): a glob, a predicate (path, leaf) -> bool, a tree of bools, or a list of these
      got:
        trainable: int
      likely cause: something else was passed
      fix: split_params(variables, trainable='head/*')
    """)


def test_overlap() -> None:
    params = {"head": {"w": X}, "body": {"w": X}}
    error = fails(fs.CollectionError, fs.merge_state, params, {"params": {"head": {"w": Y}}})
    assert str(error) == whole("""
    merge_state(params, state): each param must be in params or in state['params'], not in both
      got:
        params['head']['w']
      likely cause: params and state come from different calls of split_params, or params were merged before
      fix: params, state = split_params(variables, trainable=...); merge_state(params, state)
    """)


def test_variables_where_params_are_wanted() -> None:
    variables = variables_of(MLP(), X[0])
    params, state = fs.split_params(variables)
    error = fails(fs.CollectionError, fs.merge_state, variables, state)
    assert str(error) == whole("""
    merge_state(params, state): params must be the params themselves
      got:
        params: ['batch_stats', 'params']
      likely cause: variables were passed where params are wanted
      fix: params, state = split_params(variables)
    """)
    error = fails(fs.CollectionError, fs.with_mutable(MLP()), variables, state, X[0])
    assert str(error) == whole("""
    with_mutable(fn): params must be the params themselves
      got:
        params: ['batch_stats', 'params']
      likely cause: variables were passed where params are wanted
      fix: params, state = split_params(variables)
    """)
    assert fs.merge_state(params, state) == variables


def test_params_and_state_swapped() -> None:
    params, state = halves(MLP(), X[0])
    error = fails(fs.CollectionError, fs.merge_state, state, params)
    assert str(error) == whole("""
    merge_state(params, state): params come first, then state
      got:
        params: ['batch_stats']
        state: ['BatchNorm_0', 'Dense_0', 'Dense_1']
      likely cause: params and state were swapped
      fix: merge_state(params, state)
    """)
    error = fails(fs.CollectionError, fs.with_mutable(MLP()), state, params, X[0])
    assert str(error) == whole("""
    with_mutable(fn): params come first, then state
      got:
        params: ['batch_stats']
        state: ['BatchNorm_0', 'Dense_0', 'Dense_1']
      likely cause: params and state were swapped
      fix: fn(params, state, *args)
    """)
    error = fails(fs.CollectionError, fs.vmap_stateful(fs.with_mutable(MLP())), state, params, X)
    assert str(error) == whole("""
    vmap_stateful(fn): params come first, then state
      got:
        params: ['batch_stats']
        state: ['BatchNorm_0', 'Dense_0', 'Dense_1']
      likely cause: params and state were swapped
      fix: fn(params, state, *args)
    """)
    keyed = state | fs.rng_state(dropout=KEY)
    error = fails(fs.CollectionError, fs.with_rngs(fs.with_mutable(MLP())), keyed, params, X[0])
    assert str(error) == whole("""
    with_rngs(fn): params come first, then state
      got:
        params: ['batch_stats', 'rngs']
        state: ['BatchNorm_0', 'Dense_0', 'Dense_1']
      likely cause: params and state were swapped
      fix: fn(params, state, *args)
    """)


def test_variables_without_a_collection() -> None:
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            self.variable("counts", "n", lambda: jnp.zeros(())).value += 1
            return nn.Dense(2)(x)

    params, state = halves(Counting(), X)
    error = fails(fs.CollectionError, fs.with_mutable(Counting()), {"params": params}, state, X)
    assert str(error) == whole("""
    with_mutable(fn): params must be the params themselves
      got:
        params: ['params']
      likely cause: variables were passed where params are wanted, or the only submodule of the model is named 'params'
      fix: params, state = split_params(variables); or another name for the submodule
    """)
    error = fails(fs.CollectionError, fs.with_mutable(Counting()), {"params": params, **state}, X)
    assert str(error) == whole("""
    with_mutable(fn): params must be the params themselves
      got:
        params: ['counts', 'params']
      likely cause: variables were passed where params are wanted
      fix: params, state = split_params(variables)
    """)


@pytest.mark.parametrize("name", ["cache", "intermediates", "ema", "extra"])
def test_a_submodule_that_is_named_as_a_collection_is_no_mistake(name: str) -> None:
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            self.variable("counts", "n", lambda: jnp.zeros(())).value += 1
            return nn.Dense(2, name=name)(x)

    variables = Named().init(KEY, X)
    params, state = fs.split_params(variables)
    assert fs.merge_state(params, state) == variables
    out, new_state = fs.vmap_stateful(fs.with_mutable(Named()), axis_name=None, in_axes=0)(params, state, X)
    assert (out.shape, [*new_state]) == ((32, 2), ["counts"])
    fs.settle_state(fs.with_mutable(Named()), params, state, X)


def test_an_attribute_of_any_name_is_no_mistake() -> None:
    class Named(nnx.Module):
        def __init__(self) -> None:
            self.params, self.calls = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Cache(jnp.zeros(()))

        def __call__(self, x: Any) -> Any:
            return self.params(x)

    model = Named()
    fn, params, state = fs.from_nnx(model)
    assert fn(params, state, jnp.ones(2))[0].shape == (3,)
    fs.to_nnx(model, params, state)
    error = fails(fs.CollectionError, fn, {"params": params, **state}, state, jnp.ones(2))
    assert error.cause == "variables were passed where params are wanted"


def test_swapped_with_frozen_params() -> None:
    params, state = halves(MLP(), X[0], trainable="Dense_1/*")
    error = fails(fs.CollectionError, fs.merge_state, state, params)
    assert str(error) == whole("""
    merge_state(params, state): params come first, then state
      got:
        params: ['batch_stats', 'params']
        state: ['Dense_1']
      likely cause: params and state were swapped
      fix: merge_state(params, state)
    """)


def test_state_forgotten() -> None:
    params, _ = halves(MLP(), X[0])
    error = fails(fs.SignatureError, fs.with_mutable(MLP()), params, X[0])
    assert str(error) == whole("""
    with_mutable(fn): state must be a mapping
      got:
        state: f32[10]
      likely cause: params or state was forgotten, or the arguments are in another order
      fix: fn(params, state, *args)
    """)
    error = fails(fs.SignatureError, fs.merge_state, X, {})
    assert str(error) == whole("""
    merge_state(params, state): params must be a mapping
      got:
        params: f32[32,10]
      likely cause: params or state was forgotten, or the arguments are in another order
      fix: merge_state(params, state)
    """)


# ---- with_mutable


def test_module_class() -> None:
    error = fails(fs.SignatureError, fs.with_mutable, MLP)
    assert str(error) == whole("""
    with_mutable(fn): fn must be a Linen module instance, its apply, or a function of that form
      got:
        fn: the class MLP
      likely cause: the module was not constructed
      fix: with_mutable(MLP(...))
    """)
    assert callable(fs.with_mutable(MLP()))


def test_variables_instead_of_a_module() -> None:
    error = fails(fs.SignatureError, fs.with_mutable, {"params": {}})
    assert str(error) == whole("""
    with_mutable(fn): fn must be a Linen module instance, its apply, or a function of that form
      got:
        fn: dict
      likely cause: variables or params were passed
      fix: with_mutable(model)
    """)


class Coder(nn.Module):
    """Has a method beside `__call__`."""

    def encode(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("name", "fix"),
    [("generate", "with_mutable(model, method=Model.decode)"), ("encod", "with_mutable(model, method='encode')")],
)
@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.apply], ids=["module", "apply"])
def test_a_method_that_the_module_does_not_have(name: str, fix: str, of: Any) -> None:
    error = fails(fs.SignatureError, fs.with_mutable, of(Coder()), method=name)
    assert str(error) == whole(f"""
    with_mutable(method=...): method must be a method of the module, or its name
      got:
        method: Coder has no {name!r}
      likely cause: a misspelt method, or one of another model
      fix: {fix}
    """)


def test_a_method_beside_nn_apply() -> None:
    error = fails(fs.SignatureError, fs.with_mutable, nn.apply(MLP.__call__, MLP(4)), method="__call__")
    assert str(error) == whole("""
    with_mutable(method=...): no method beside a function that nn.apply made
      got:
        method: str
      likely cause: nn.apply was told what to run when it was called, and takes no method
      fix: with_mutable(model, method=Model.decode), or with_mutable(nn.apply(Model.decode, model))
    """)


def test_a_stateful_function_is_no_apply_function() -> None:
    error = fails(fs.SignatureError, fs.with_mutable, fs.with_mutable(MLP(4)))
    assert str(error) == whole("""
    with_mutable(fn): fn must be a Linen module instance, its apply, or a function of that form
      got:
        fn: a function of (params, state, ...)
      likely cause: with_mutable was called twice, or fn is stateful already
      fix: fn(params, state, x), as it is
    """)


def test_a_module_of_nnx_is_no_linen_module() -> None:
    error = fails(fs.SignatureError, fs.with_mutable, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert str(error) == whole("""
    with_mutable(fn): fn must be a Linen module instance, its apply, or a function of that form
      got:
        fn: Linear, an NNX module
      likely cause: it belongs to Flax's other API
      fix: fn, params, state = from_nnx(module)
    """)


def test_an_axis_that_nothing_binds() -> None:
    params, state = halves(MLP(), X[0])
    error = fails(fs.SignatureError, fs.with_mutable(MLP()), params, state, X, train=True)
    assert str(error) == whole("""
    with_mutable(fn): each axis that a layer averages over must be bound around the call
      got:
        axis_name='batch': not bound here
      likely cause: the model is one of a single example, and was called with a batch; or it is to run under shard_map \
or pmap
      fix: vmap_stateful(with_mutable(model), axis_name='batch'); or axis_name=None in the layer, for a batch at once
    """)
    fs.vmap_stateful(fs.with_mutable(MLP()), axis_name="batch")(params, state, X, train=True)


def test_a_step_in_the_place_of_a_loss() -> None:
    error = fails(fs.SignatureError, ANY.value_and_grad(fs.with_optimizer(squares, TX)), {"w": jnp.ones(3)}, {}, Y)
    assert error.cause == "a step was passed, which has a gradient and an optimizer already"


def test_a_checkpoint_of_params_alone() -> None:
    carry = one(stats={"n": jnp.zeros(())})
    error = fails(fs.CollectionError, fs.adopt_carry, {"w": np.full(3, 2, np.float32)}, carry)
    assert error.cause == "params alone were saved, without the state, the optimizer's state and the count of steps"
    assert error.fix == "carry = adopt_carry({'params': restored}, like, strict=False), where the rest is that of like"
    adopted = fs.adopt_carry({"params": {"w": np.full(3, 2, np.float32)}}, carry, strict=False)
    assert (float(adopted.params["w"][0]), structure(adopted)) == (2.0, structure(carry))


def test_mutable_unknown() -> None:
    params, state = halves(MLP(), X[0])
    error = fails(fs.CollectionError, fs.with_mutable(MLP(), mutable=["batch_stat"]), params, state, X[0])
    assert str(error) == whole("""
    with_mutable(mutable=...): mutable collections must be in the state
      got:
        'batch_stat' is not one of ['batch_stats']
      likely cause: a misspelt collection
      fix: did you mean 'batch_stats'?
    """)


def test_mutable_params() -> None:
    params, state = halves(MLP(), X[0])
    error = fails(fs.CollectionError, fs.with_mutable(MLP(), mutable=["params"]), params, state, X[0])
    assert str(error) == whole("""
    with_mutable(mutable=...): mutable collections must be in the state
      got:
        'params' is not one of ['batch_stats']
      likely cause: params are the optimizer's to change
      fix: with_mutable(fn), or mutable=True, makes every collection of the state mutable
    """)


class Overreaching(nn.Module):
    """Writes to its params."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        self.param("scale", nn.initializers.ones, ())
        self.put_variable("params", "scale", x.sum())
        return x


@pytest.mark.parametrize("mutable", [..., True, DenyList(())])
def test_a_model_that_writes_to_its_params(mutable: Any) -> None:
    apply = fs.with_mutable(Overreaching(), mutable=mutable)
    trained: Any = {"scale": Y[0, 0]}
    for params, state in ((trained, {}), ({}, {"params": trained})):
        assert str(fails(fs.CollectionError, apply, params, state, X)) == whole("""
        with_mutable(fn): the model writes to the collection 'params'
          got:
            Cannot update variable "scale" in "/" because collection "params" is immutable.
            mutable: []
          likely cause: params are the optimizer's to change
          fix: self.variable('counts', ...) for what the model itself writes
        """)


@pytest.mark.parametrize(("name", "owner"), [("rngs", "with_rngs"), ("ema", "with_ema")])
def test_a_collection_that_is_named_as_one_of_flaxsplit(name: str, owner: str) -> None:
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x + self.variable(name, "last", jnp.zeros, ()).value

    class Written(nn.Module):
        def __call__(self, x: Any) -> Any:
            self.put_variable(name, "last", x)
            return x

    cause = f"likely cause: {name!r} in the state belongs to {owner}, and no model sees it"
    state = {name: {"last": Y[0, 0]}}
    for apply in (fs.with_mutable(Named()), fs.with_mutable(Written())):
        error = str(fails(fs.CollectionError, apply, {}, state, X))
        assert cause in error
        assert "fix: another name for the model's own collection: self.variable('averages', ...)" in error
    error = str(fails(fs.CollectionError, fs.with_mutable(Named(), mutable=name), {}, state, X))
    assert cause in error
    assert "fix: with_mutable(fn) makes every other collection of the state mutable" in error
    assert f"the state has no {name!r}" in str(fails(fs.CollectionError, fs.with_mutable(Written()), {}, {}, X))


class Looping(nn.Module):
    """Counts in a loop, whether the loop passes the count on or not."""

    passes_on: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        self.variable("counts", "turns", jnp.zeros, ())
        carried: Any = {"carry_variables": "counts"} if self.passes_on else {}
        return nn.while_loop(lambda _, turn: turn < 3, _turn, self, 0, **carried) + x


def _turn(model: nn.Module, turn: Any) -> Any:
    model.put_variable("counts", "turns", model.get_variable("counts", "turns") + 1)
    return turn + 1


@needs_jit
def test_a_loop_that_does_not_pass_a_collection_on() -> None:
    state = {"counts": {"turns": jnp.zeros(())}}
    error = fails(fs.CollectionError, fs.with_mutable(Looping(False)), {}, state, X)
    assert str(error) == whole("""
    with_mutable(fn): the model writes to the collection 'counts'
      got:
        Cannot update variable "turns" in "/while_loop()" because collection "counts" is immutable.
        mutable: ['counts']
      likely cause: 'counts' is mutable, but a lifted transform or an apply around the layer does not pass it on
      fix: carry_variables='counts' in nn.while_loop, variable_carry='counts' in nn.scan; mutable= in an inner apply
    """)
    assert fs.with_mutable(Looping(True))({}, state, X)[1]["counts"]["turns"] == 3


def test_mutable_forgotten() -> None:
    model = MLP(axis_name=None)
    params, state = halves(model, X)
    error = fails(fs.CollectionError, fs.with_mutable(model, mutable=False), params, state, X, train=True)
    assert str(error) == whole("""
    with_mutable(mutable=...): the model writes to the collection 'batch_stats'
      got:
        Cannot update variable "mean" in "/BatchNorm_0" because collection "batch_stats" is immutable.
        mutable: []
      likely cause: 'batch_stats' is not among the mutable collections, and the layer '/BatchNorm_0' is in a mode that \
writes to it
      fix: with_mutable(fn, mutable=['batch_stats']); or, where it is to stay as it is, '/BatchNorm_0' in the mode \
that only reads: use_running_average=True, train=False
    """)
    _, same = fs.with_mutable(model, mutable=False)(params, state, X, train=False)
    assert structure(same) == structure(state)
    _, new_state = fs.with_mutable(model, mutable=["batch_stats"])(params, state, X, train=True)
    assert new_state.keys() == state.keys()


class Counter(nn.Module):
    """Counts its calls in a collection of its own, made at the first."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        count = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        count.value += 1
        return x


def test_a_collection_that_the_state_lacks() -> None:
    error = fails(fs.CollectionError, fs.with_mutable(Counter()), {}, {}, X)
    assert str(error) == whole("""
    with_mutable(fn): params and state must hold every variable that the model reads
      got:
        Tried to access "count" from collection "calls" in "/" but the collection is empty.
        params: []
      likely cause: the state has no 'calls'
      fix: params, state = split_params(module.init(key, x)); fn(params, state, x)
    """)
    params, state = fs.split_params({"params": {}, **Counter().init(KEY, X)})
    assert fs.with_mutable(Counter())(params, state, X)[1]["calls"]["count"] == 2


class Writer(nn.Module):
    """Writes to a collection that it never declares."""

    def __call__(self, x: Any) -> Any:
        self.put_variable("log", "last", x)
        return x


def test_a_collection_that_is_only_written() -> None:
    error = fails(fs.CollectionError, fs.with_mutable(Writer()), {}, {}, X)
    assert str(error) == whole("""
    with_mutable(fn): the model writes to the collection 'log'
      got:
        Cannot update variable "last" in "/" because collection "log" is immutable.
        mutable: []
      likely cause: the state has no 'log'
      fix: state | {'log': ...}, from module.init
    """)
    fs.with_mutable(Writer())({}, {"log": {"last": Y}}, X)


def test_mutable_unknown_and_unlike_any() -> None:
    params, state = halves(MLP(), X[0])
    apply = fs.with_mutable(MLP(), mutable=["batch_stats", "intermediates"])
    error = fails(fs.CollectionError, apply, params, state, X[0])
    assert str(error) == whole("""
    with_mutable(mutable=...): mutable collections must be in the state
      got:
        'intermediates' is not one of ['batch_stats']
      likely cause: sown collections are not state, or the state lacks a collection
      fix: with_mutable(fn, capture='intermediates'), or state | {'intermediates': ...}
    """)


def test_a_state_without_batch_stats() -> None:
    model = MLP(axis_name=None)
    params, _ = halves(model, X)
    error = fails(fs.CollectionError, fs.with_mutable(model), params, {}, X, train=True)
    assert str(error) == whole("""
    with_mutable(fn): params and state must hold every variable that the model reads
      got:
        Tried to access "mean" from collection "batch_stats" in "/BatchNorm_0" but the collection is empty.
        params: ['BatchNorm_0', 'Dense_0', 'Dense_1']
      likely cause: the state has no 'batch_stats'
      fix: params, state = split_params(module.init(key, x)); fn(params, state, x)
    """)


def test_params_of_another_model() -> None:
    params, state = halves(MLP(axis_name=None), X)
    error = fails(fs.CollectionError, fs.with_mutable(Dropping(axis_name=None)), params, state, X)
    assert str(error) == whole("""
    with_mutable(fn): the model draws from the PRNG stream 'dropout'
      got:
        rngs: none
        state['rngs']: none
      likely cause: there is no key for 'dropout'
      fix: with_rngs(with_mutable(model)), with state | rng_state(dropout=key)
    """)


def test_params_of_another_shape() -> None:
    params, _ = halves(nn.Dense(3), X)
    error = fails(fs.CollectionError, fs.with_mutable(nn.Dense(2)), params, {}, X)
    assert str(error) == whole("""
    with_mutable(fn): every param must have the shape that the model declares for it
      got:
        parameter 'kernel' in '/': another shape
      likely cause: x has another size than at module.init, or the params belong to another model
      fix: params, state = split_params(module.init(key, x)), with the x and the module of the call
    """)


def test_capture_of_nothing() -> None:
    params, state = halves(nn.Dense(2), X)
    error = fails(fs.CollectionError, fs.with_mutable(nn.Dense(2), capture="intermediates"), params, state, X)
    assert str(error) == whole("""
    with_mutable(capture=...): the model must sow into each captured collection
      got:
        'intermediates': nothing was sown
      likely cause: a misspelt collection, or the model sows only in another mode
      fix: self.sow('intermediates', name, value) with capture='intermediates'
    """)


class Penalty(nn.Module):
    """Sows a loss of its own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.Dense(2)(x)
        self.sow("losses", "l2", (y**2).sum())
        return y


def test_capture_of_nothing_by_its_name() -> None:
    params, state = halves(nn.Dense(2), X)
    error = fails(fs.CollectionError, fs.with_mutable(nn.Dense(2), capture="losses"), params, state, X)
    assert error.fix == "self.sow('losses', name, value) with capture='losses'"
    params, state = halves(Penalty(), X)
    (_, sown), _ = fs.with_mutable(Penalty(), capture="losses")(params, state, X)
    assert len(sown["losses"]["l2"]) == 1


@needs_x32
def test_a_sown_collection_in_the_state() -> None:
    params, state = halves(Penalty(), X)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = fs.with_mutable(Penalty())(params, state, batch)
        return out.mean(), state

    error = fails(fs.StateDriftError, fs.with_optimizer(loss_fn, TX), fs.init_carry(params, state, TX), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state['losses']['l2'][1]: absent -> f32[]
      likely cause: the model sows into 'losses', and each call adds to what the state holds of it
      fix: with_mutable(model, capture='losses'), whose out is (out, {'losses': ...})
    """)
    error = fails(fs.StateDriftError, fs.settle_state, fs.with_mutable(Penalty()), params, state, X)
    assert (error.cause, error.fix) == ("the model sows into 'losses'", "with_mutable(model, capture='losses')")

    def fixed(params: Any, state: Any, batch: Any) -> Any:
        (_, sown), state = fs.with_mutable(Penalty(), capture="losses")(params, state, batch)
        return sum(sown["losses"]["l2"]), state

    assert fs.with_optimizer(fixed, TX)(fs.init_carry(params, state, TX), X)[1].shape == ()


def test_capture_of_what_the_model_reads() -> None:
    model = MLP(axis_name=None)
    params, state = halves(model, X)
    error = fails(fs.CollectionError, fs.with_mutable(model, capture="batch_stats"), params, state, X, train=True)
    assert str(error) == whole("""
    with_mutable(capture=...): what is captured must be sown, and must not be the state that layers read
      got:
        'batch_stats' is in the state
      likely cause: the new state was wanted, which is the second result
      fix: out, new_state = with_mutable(fn)(params, state, x)
    """)
    _, made = fs.with_mutable(model, capture="batch_stats")(params, {}, X, train=True)[0]
    assert structure(made) == structure({"batch_stats": state["batch_stats"]})


def test_a_collection_in_the_place_of_the_state() -> None:
    model = MLP(axis_name=None)
    params, state = halves(model, X)
    error = fails(fs.CollectionError, fs.with_mutable(model), params, state["batch_stats"], X, train=True)
    assert error.cause == "state['batch_stats'] was passed, and not the state"
    assert error.fix == "fn(params, {'batch_stats': ...}, x), or the whole state"


class Perturbed(nn.Module):
    """Can be asked for the gradient of a hidden value."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(self.perturb("hidden", nn.Dense(3)(x)))


def test_a_perturbation_of_another_batch() -> None:
    params, state = halves(Perturbed(), X)
    apply = fs.with_mutable(Perturbed())
    error = fails(fs.CollectionError, apply, params, state, X[:5])
    assert error.leaves[0] == "state['perturbations']['hidden']: f32[32,3]"
    assert str(error) == whole(f"""
    with_mutable(fn): a perturbation must have the shape of what it is added to
      got:
        state['perturbations']['hidden']: f32[32,3]
        {str(error.__cause__).splitlines()[0]}
      likely cause: x has another batch size than at module.init, which made the perturbations
      fix: state | {{'perturbations': module.init(key, x)['perturbations']}} with the x of the call; or a state \
without 'perturbations', where nothing is perturbed
    """)
    apply(params, state | {"perturbations": Perturbed().init(KEY, X[:5])["perturbations"]}, X[:5])
    apply(params, {}, X[:5])


def test_an_apply_function_that_returns_one_thing() -> None:
    error = fails(fs.SignatureError, fs.with_mutable(lambda variables, x, mutable: x), {}, {}, X)
    assert str(error) == whole("""
    with_mutable(fn): must return two things: fn(variables, *args, mutable=[...]) -> (out, updated)
      got:
        f32[32,10]
      likely cause: a result is missing
      fix: fn(variables, *args, mutable=[...]) -> (out, updated)
    """)


@needs_x32
def test_arguments_that_the_model_does_not_take() -> None:
    params, state = fs.split_params(MLP(4).init(jax.random.key(0), X[0]))
    apply: Any = fs.with_mutable(MLP(4))
    keys = {"dropout": jax.random.key(0)}
    error = fails(fs.SignatureError, apply, params, state, X[0], True, keys)
    assert str(error) == whole("""
    with_mutable(fn): fn takes (params, state, x, train)
      got:
        fn(params, state, f32[10], bool, dict): too many positional arguments
      likely cause: an argument is surplus, missing or misspelt, or rngs= was not passed by name
      fix: fn(params, state, x, train); with_mutable(model.apply) for rngs=
    """)
    assert isinstance(error.__cause__, TypeError)
    error = fails(fs.SignatureError, apply, params, state, X[0], trian=True, rngs=keys)
    assert error.fix == "did you mean train=?"
    assert error.leaves == ("fn(params, state, f32[10], trian=, rngs=): got an unexpected keyword argument 'trian'",)


@needs_x32
def test_a_loss_function_that_closed_over_its_state() -> None:
    closed: Any = lambda params: (params["w"].sum(), {})  # noqa: E731
    error = fails(fs.SignatureError, fs.with_optimizer(closed, TX), one(), jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn is called as loss_fn(params, state, batch)
      got:
        loss_fn(params): too many positional arguments
      likely cause: the state or the batch came in by a closure
      fix: def loss_fn(params, state, batch): ...; return loss, new_state
    """)
    step: Any = fs.with_optimizer(squares, TX)
    error = fails(fs.SignatureError, step, one(), jnp.ones(3), jnp.ones(2), clip=0.1)
    assert error.required == "loss_fn is called as loss_fn(params, state, batch, f32[2], clip)"
    assert error.cause == "an argument of the call is not one of loss_fn"


def test_a_type_error_of_the_users_own_stays_as_it_is() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine") as caught:
        fs.with_optimizer(loss_fn, TX)(one(), jnp.ones(3))
    assert type(caught.value) is TypeError

    class Net(nn.Module):
        def __call__(self, x: Any) -> Any:
            raise TypeError("its own")

    with pytest.raises(TypeError, match="its own") as caught:
        fs.with_mutable(Net())({}, {}, X)
    assert type(caught.value) is TypeError


def test_mutable_at_the_call() -> None:
    params, state = fs.split_params(nn.Dense(2).init(jax.random.key(0), X))
    apply: Any = fs.with_mutable(nn.Dense(2))
    error = fails(fs.SignatureError, apply, params, state, X, mutable=["batch_stats"])
    assert str(error) == whole("""
    with_mutable(fn): mutable= belongs where the model is wrapped, not into the call
      got:
        mutable= in the call
      likely cause: the arguments of module.apply were kept
      fix: with_mutable(model, mutable=['batch_stats'])(params, state, x), or with_mutable(model): all of the state is
    """)


def test_train_forgotten() -> None:
    model = MLP(axis_name=None)
    params, state = halves(model, X)
    with pytest.warns(fs.UntouchedStateWarning) as caught:
        fs.with_mutable(model)(params, state, X)
    assert caught[0].filename == __file__
    assert str(caught[0].message) == whole("""
    with_mutable(fn): at least one leaf of the mutable collections should be written
      got:
        batch_stats: no leaf written
      likely cause: train=True (or use_running_average=False) was forgotten
      fix: fn(params, state, x, train=True), or with_mutable(fn, mutable=False) to only read
    """)
    fs.with_mutable(model)(params, state, X, train=True)
    fs.with_mutable(model, mutable=False)(params, state, X)


# ---- rngs

DROPOUT = nn.Dropout(0.5, deterministic=False)


def test_a_seed_for_a_key() -> None:
    error = fails(fs.SignatureError, fs.rng_state, noise=0)
    assert str(error) == whole("""
    rng_state(**keys): at least one stream, each a PRNG key
      got:
        noise: int
      likely cause: a seed was passed instead of a key
      fix: rng_state(noise=jax.random.key(0))
    """)


def test_no_stream() -> None:
    error = fails(fs.SignatureError, fs.rng_state)
    assert str(error) == whole("""
    rng_state(**keys): at least one stream, each a PRNG key
      got:
        no stream
      likely cause: the streams were forgotten
      fix: rng_state(dropout=jax.random.key(0))
    """)


def test_rngs_without_a_state_of_rngs() -> None:
    error = fails(fs.CollectionError, fs.with_rngs(fs.with_mutable(DROPOUT)), {}, {}, X)
    assert str(error) == whole("""
    with_rngs(fn): the state must have an 'rngs' collection
      got:
        state: []
      likely cause: rng_state was not merged into the state
      fix: init_carry(params, state | rng_state(dropout=key), tx)
    """)


def test_rngs_by_hand() -> None:
    apply = fs.with_rngs(fs.with_mutable(DROPOUT))
    error = fails(fs.SignatureError, apply, {}, fs.rng_state(dropout=KEY), X, rngs={"dropout": KEY})
    assert str(error) == whole("""
    with_rngs(fn): rngs come from state['rngs']
      got:
        rngs=['dropout'] in the call
      likely cause: keys were passed by hand to a function that draws its own
      fix: fn(params, state, x), or with_mutable(model.apply)(params, state, x, rngs=...)
    """)
    by_hand: Any = fs.with_mutable(DROPOUT)
    by_hand({}, {}, X, rngs={"dropout": KEY})


def test_state_of_rngs_without_with_rngs() -> None:
    error = fails(fs.CollectionError, fs.with_mutable(DROPOUT), {}, fs.rng_state(dropout=KEY), X)
    assert str(error) == whole("""
    with_mutable(fn): the model draws from the PRNG stream 'dropout'
      got:
        rngs: none
        state['rngs']: ['dropout']
      likely cause: state['rngs'] is there, but nothing draws from it
      fix: with_rngs(with_mutable(model))
    """)
    fs.with_rngs(fs.with_mutable(DROPOUT))({}, fs.rng_state(dropout=KEY), X)


def test_a_stream_without_a_key() -> None:
    apply = fs.with_rngs(fs.with_mutable(DROPOUT))
    error = fails(fs.CollectionError, apply, {}, fs.rng_state(noise=KEY), X)
    assert str(error) == whole("""
    with_mutable(fn): the model draws from the PRNG stream 'dropout'
      got:
        rngs: ['noise']
      likely cause: there is no key for 'dropout'
      fix: with_rngs(with_mutable(model)), with state | rng_state(dropout=key, noise=key)
    """)
    apply({}, fs.rng_state(dropout=KEY, noise=KEY), X)


def test_no_key_at_all() -> None:
    error = fails(fs.CollectionError, fs.with_mutable(DROPOUT), {}, {}, X)
    assert str(error) == whole("""
    with_mutable(fn): the model draws from the PRNG stream 'dropout'
      got:
        rngs: none
        state['rngs']: none
      likely cause: there is no key for 'dropout'
      fix: with_rngs(with_mutable(model)), with state | rng_state(dropout=key)
    """)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0)])
def test_typed_and_legacy_keys_both_work(key: Any) -> None:
    model = Dropping()
    params, state = halves(model, X[0])
    apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(model)))
    state = fs.settle_state(apply, params, state | fs.rng_state(dropout=key), X)
    assert apply(params, state, X)[1]["rngs"]["dropout"].dtype == key.dtype


@pytest.mark.parametrize(("saved", "due"), [(KEY, jax.random.PRNGKey(1)), (jax.random.PRNGKey(0), jax.random.key(1))])
def test_a_saved_key_becomes_one_of_the_kind_that_is_due(saved: Any, due: Any) -> None:
    like = one(**fs.rng_state(dropout=due))
    adopted = fs.adopt_carry(one(**fs.rng_state(dropout=saved)), like).state["rngs"]["dropout"]
    assert adopted.dtype == due.dtype
    assert _bytes(adopted) == _bytes(saved)


def test_keys_without_the_names_of_their_streams() -> None:
    params, state = halves(Dropping(axis_name=None), X)
    apply: Any = fs.with_mutable(Dropping(axis_name=None))
    for rngs, came in ((jax.random.split(KEY, 3), "key<fry>[3]"), ([KEY], "list")):
        error = fails(fs.CollectionError, apply, params, state, X, rngs=rngs)
        assert str(error) == whole("""
        with_mutable(fn): rngs must be a dict of one key per stream
          got:
            rngs: CAME
          likely cause: keys without the names of their streams, or another mapping than a dict
          fix: rngs={'dropout': key}
        """).replace("CAME", came)
    error = fails(fs.CollectionError, apply, params, state, X, rngs={"dropout": 0})
    assert str(error) == whole("""
    with_mutable(fn): rngs must be a dict of one key per stream
      got:
        rngs['dropout']: int
      likely cause: a seed, or a stack of keys, is there, where one key is due
      fix: rngs={'dropout': jax.random.key(0)}
    """)
    apply(params, state, X, rngs={"dropout": KEY})
    apply(params, state, X, rngs=KEY)  # one key for whatever stream is drawn from, as in Flax


@pytest.mark.parametrize("rngs", [jax.random.split(KEY, 3), KEY, [KEY], "test", 5])
def test_lanes_that_are_given_keys_without_names(rngs: Any) -> None:
    lanes: Any = fs.vmap_stateful(fs.with_mutable(DROPOUT))
    error = str(fails(fs.CollectionError, lanes, {}, {}, X, rngs=rngs))
    assert error.startswith("vmap_stateful(fn): rngs must be a dict of one key per stream")
    assert "likely cause: keys without the names of their streams" in error
    seeds = str(fails(fs.CollectionError, lanes, {}, {}, X, rngs={"dropout": 0}))
    assert "rngs['dropout']: int" in seeds
    lanes({}, {}, X, rngs={"dropout": KEY})


def test_an_error_of_the_models_own_is_left_as_it_is() -> None:
    error = ValueError("of the model")

    def apply(_variables: Any, /, **_: Any) -> Any:
        raise error

    with pytest.raises(ValueError, match="of the model") as caught:
        fs.with_mutable(apply)({}, {})
    assert caught.value is error


def test_a_stream_that_a_lifted_transform_does_not_pass_on() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return nn.Dropout(0.5, deterministic=False)(x), None

    def scanned(split: dict[str, bool]) -> Any:
        model: Any = nn.scan(Layer, length=2, split_rngs=split)()
        return fs.with_mutable(model)

    error = fails(fs.CollectionError, scanned({}), {}, {}, X, None, rngs={"dropout": KEY})
    assert str(error) == whole("""
    with_mutable(fn): the model draws from the PRNG stream 'dropout'
      got:
        rngs: ['dropout']
      likely cause: 'dropout' is given, but a lifted transform or an apply around the layer does not pass it on
      fix: split_rngs={'dropout': True} in nn.scan, nn.vmap or nn.while_loop; rngs= in an inner apply
    """)
    error = fails(fs.CollectionError, scanned({}), {}, {}, X, None, rngs=KEY)
    assert (error.leaves, error.cause) == (("rngs: key<fry>[]",), "rngs is no mapping of streams to keys")
    assert error.fix == "rngs={'dropout': key}"
    scanned({"dropout": True})({}, {}, X, None, rngs={"dropout": KEY})


def test_keys_by_hand_of_any_form_beside_those_of_the_state() -> None:
    apply: Any = fs.with_rngs(fs.with_mutable(Dropping()))
    params, state = halves(Dropping(), X[0])
    error = fails(fs.SignatureError, apply, params, state | fs.rng_state(dropout=KEY), X, rngs=jax.random.split(KEY, 3))
    assert error.leaves == ("rngs=key<fry>[3] in the call",)


# ---- vmap_stateful


def test_state_differs_per_lane() -> None:
    model = MLP(axis_name=None)
    params, state = halves(model, X[0])
    error = fails(fs.UnsyncedStateError, fs.vmap_stateful(fs.with_mutable(model)), params, state, X, train=True)
    assert str(error) == whole("""
    vmap_stateful(fn): state without an axis must come out the same in every lane
      got:
        state['batch_stats']['BatchNorm_0']['mean']: differs per lane
        state['batch_stats']['BatchNorm_0']['var']: differs per lane
      likely cause: BatchNorm_0 lacks axis_name='batch': the statistics are per lane
      fix: nn.BatchNorm(..., axis_name='batch') in BatchNorm_0, or state_axes={'batch_stats': 0} and a state with that axis
    """)  # noqa: E501
    fs.vmap_stateful(fs.with_mutable(MLP()))(params, state, X, train=True)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(X)), state)
    fs.vmap_stateful(fs.with_mutable(model), state_axes={"batch_stats": 0})(params, stacked, X, train=True)


def test_state_differs_per_lane_and_the_axis_has_no_name() -> None:
    model = MLP(axis_name=None)
    params, state = halves(model, X[0])
    apply = fs.vmap_stateful(fs.with_mutable(model), axis_name=None)
    error = fails(fs.UnsyncedStateError, apply, params, state, X, train=True)
    assert str(error) == whole("""
    vmap_stateful(fn): state without an axis must come out the same in every lane
      got:
        state['batch_stats']['BatchNorm_0']['mean']: differs per lane
        state['batch_stats']['BatchNorm_0']['var']: differs per lane
      likely cause: the statistics of BatchNorm_0 are computed per lane: axis_name=None leaves nothing to average them over
      fix: vmap_stateful(fn, axis_name='batch') and nn.BatchNorm(..., axis_name='batch') in BatchNorm_0
    """)  # noqa: E501


class Twice(nn.Module):
    """Two layers that are not synced."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        return norm(name="second")(nn.Dense(2)(norm(name="first")(x)))


def test_two_layers_lack_the_axis_name() -> None:
    params, state = halves(Twice(), X[0])
    error = fails(fs.UnsyncedStateError, fs.vmap_stateful(fs.with_mutable(Twice())), params, state, X)
    assert str(error) == whole("""
    vmap_stateful(fn): state without an axis must come out the same in every lane
      got:
        state['batch_stats']['first']['mean']: differs per lane
        state['batch_stats']['first']['var']: differs per lane
        state['batch_stats']['second']['mean']: differs per lane
        state['batch_stats']['second']['var']: differs per lane
      likely cause: first, second lack axis_name='batch': the statistics are per lane
      fix: nn.BatchNorm(..., axis_name='batch') in first, second, or state_axes={'batch_stats': 0} and a state with that axis
    """)  # noqa: E501


class Mixed(nn.Module):
    """One layer synced, two not, and a collection of its own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.BatchNorm(use_running_average=False, axis_name="batch", name="synced")(x)
        x = nn.BatchNorm(use_running_average=False, name="first")(x)
        last = self.variable("memory", "last", lambda: jnp.zeros(x.shape))
        last.value = x
        return nn.Dense(2)(x)


def test_only_the_layers_at_fault_are_named() -> None:
    variables = jax.vmap(Mixed().init, in_axes=(None, 0), axis_name="batch")(KEY, X[:1])
    params, state = fs.split_params(jax.tree.map(lambda leaf: leaf[0], variables))
    apply = fs.vmap_stateful(fs.with_mutable(Mixed()))
    error = fails(fs.UnsyncedStateError, apply, params, state, X)
    assert str(error) == whole("""
    vmap_stateful(fn): state without an axis must come out the same in every lane
      got:
        state['batch_stats']['first']['mean']: differs per lane
        state['batch_stats']['first']['var']: differs per lane
        state['memory']['last']: differs per lane
      likely cause: what is kept is computed per lane and not averaged over the axis, in first, the model
      fix: jax.lax.pmean(value, 'batch') there, or state_axes={'batch_stats': 0, 'memory': 0} and a state with that axis
    """)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(X)), state)
    fs.vmap_stateful(fs.with_mutable(Mixed()), state_axes={"batch_stats": 0, "memory": 0})(params, stacked, X)


def test_an_ensemble_that_shares_its_state() -> None:
    model = MLP(axis_name=None)
    variables = jax.vmap(lambda key: model.init(key, X))(jax.random.split(KEY, 4))
    params, state = fs.split_params(variables)
    shared = jax.tree.map(lambda leaf: leaf[0], state)
    apply = fs.vmap_stateful(fs.with_mutable(model), in_axes=None, params_axes=0, axis_name="member")
    error = fails(fs.UnsyncedStateError, apply, params, shared, X, train=True)
    assert str(error) == whole("""
    vmap_stateful(fn): state without an axis must come out the same in every lane
      got:
        state['batch_stats']['BatchNorm_0']['mean']: differs per lane
        state['batch_stats']['BatchNorm_0']['var']: differs per lane
      likely cause: params_axes makes an ensemble, and every member has its own state
      fix: vmap_stateful(fn, params_axes=..., state_axes={'batch_stats': 0}), the state stacked like the params
    """)
    own = {"batch_stats": 0}
    apply = fs.vmap_stateful(fs.with_mutable(model), in_axes=None, params_axes=0, state_axes=own, axis_name="member")
    apply(params, state, X, train=True)


def test_axis_name_bound_twice() -> None:
    params, state = halves(MLP(), X[0])
    apply = fs.vmap_stateful(fs.vmap_stateful(fs.with_mutable(MLP())))
    error = fails(fs.SignatureError, apply, params, state, X.reshape(4, 8, 10), train=True)
    assert str(error) == whole("""
    vmap_stateful(axis_name=...): the name must be free
      got:
        axis_name: 'batch' is bound by an enclosing vmap, pmap or shard_map
      likely cause: vmap_stateful was applied twice with the same name
      fix: vmap_stateful(fn, axis_name='inner_batch'), and axis_name=('batch', 'inner_batch') in the layers
    """)
    inner = fs.vmap_stateful(fs.with_mutable(MLP(axis_name=("batch", "inner_batch"))), axis_name="inner_batch")
    fs.vmap_stateful(inner)(params, state, X.reshape(4, 8, 10), train=True)


def test_batch_sizes_differ() -> None:
    apply = fs.vmap_stateful(lambda params, state, x, y: (x + y, state))
    error = fails(fs.SignatureError, apply, {}, {}, {"a": X, "b": X}, Y[:31])
    assert str(error) == whole("""
    vmap_stateful(in_axes=...): all mapped axes must have one size
      got:
        args[1]: f32[31,1], axis 0
        args[0]['a']: f32[32,10], axis 0
        args[0]['b']: f32[32,10], axis 0
      likely cause: the arguments are not of one batch, or one of them has no batch axis
      fix: in_axes=(0, None) for an argument that all lanes share
    """)


def test_the_odd_leaf_of_many_comes_first() -> None:
    many = {f"w{i:03}": jnp.ones((4, 2)) for i in range(600)}
    apply = fs.vmap_stateful(lambda params, state, x: (x, state), params_axes=0)
    error = fails(fs.SignatureError, apply, many, {}, X)
    assert len(error.leaves) == 601
    assert error.leaves[0] == "args[0]: f32[32,10], axis 0"


def test_a_scalar_is_mapped() -> None:
    apply = fs.vmap_stateful(lambda params, state, x, scale: (x * scale, state))
    error = fails(fs.SignatureError, apply, {}, {}, X, jnp.float32(2))
    assert str(error) == whole("""
    vmap_stateful(in_axes=...): all mapped axes must have one size
      got:
        args[0]: f32[32,10], axis 0
        args[1]: f32[], axis 0
      likely cause: the arguments are not of one batch, or one of them has no batch axis
      fix: in_axes=(0, None) for an argument that all lanes share
    """)
    shared: Any = fs.vmap_stateful(lambda params, state, x, scale: (x * scale, state), in_axes=(0, None))
    shared({}, {}, X, jnp.float32(2))


def test_nothing_is_mapped() -> None:
    apply: Any = fs.vmap_stateful(lambda params, state, x: (x, state))
    error = fails(fs.SignatureError, apply, {}, {}, x=X)
    assert str(error) == whole("""
    vmap_stateful(in_axes=...): all mapped axes must have one size
      got:
        no axis is mapped
      likely cause: every argument was passed by keyword, or in_axes is None
      fix: fn(params, state, x): arguments to map come by position; or axis_size=
    """)
    apply({}, {}, X)


def test_an_argument_has_other_lanes_than_axis_size_says() -> None:
    apply: Any = functools.partial(fs.vmap_stateful, lambda params, state, x, y: (x, state))
    error = fails(fs.SignatureError, apply(axis_size=10), {}, {}, X, Y[:10])
    assert str(error) == whole("""
    vmap_stateful(in_axes=...): all mapped axes must have the size that axis_size= says
      got:
        args[0]: f32[32,10], axis 0
        axis_size: 10
      likely cause: axis_size= is for lanes that no argument has, and here one has lanes of its own
      fix: leave axis_size= out; or in_axes=None for an argument that all lanes share
    """)
    for axis in (2, -3):
        assert fails(fs.SignatureError, apply(in_axes=(axis, 0), axis_size=10), {}, {}, X, Y[:10]).leaves == (
            f"args[0]: f32[32,10], axis {axis}",
            "axis_size: 10",
        )
    assert apply(in_axes=(None, 0), axis_size=10)({}, {}, X, Y[:10])[0].shape == (10, *X.shape)
    assert apply(in_axes=(1, 0), axis_size=10)({}, {}, X, Y[:10])[0].shape == (10, 32)


def test_in_axes_of_another_length() -> None:
    apply = fs.vmap_stateful(lambda params, state, x: (x, state), in_axes=(None, None, 0))
    error = fails(fs.SignatureError, apply, {}, {}, X)
    assert str(error) == whole("""
    vmap_stateful(in_axes=...): in_axes must have one entry per positional argument after params and state
      got:
        in_axes: 3 entries, for 1 arguments
      likely cause: params and state were counted too, or keyword arguments were
      fix: vmap_stateful(fn, in_axes=0)
    """)


def test_state_axes_unknown() -> None:
    apply = fs.vmap_stateful(lambda params, state, x: (x, state), state_axes={"cach": 0})
    error = fails(fs.CollectionError, apply, {}, {"cache": {}}, X)
    assert str(error) == whole("""
    vmap_stateful(state_axes=...): every collection that an axis is given for must be in the state
      got:
        'cach' is not one of ['cache']
      likely cause: a misspelt collection, or it was not split off with the state
      fix: vmap_stateful(fn, state_axes={'batch_stats': 0})
    """)


@needs_x32
def test_a_collection_is_dropped_in_the_lanes() -> None:
    apply: Any = fs.vmap_stateful(lambda params, state, x: (x, {}))
    error = fails(fs.StateDriftError, apply, {}, {"batch_stats": {"mean": jnp.ones(3)}}, X)
    assert str(error) == whole("""
    vmap_stateful(fn): fn must return the collections that it was given
      got:
        state['batch_stats']['mean']: f32[3] -> absent
      likely cause: a collection was dropped or added
      fix: return out, {**state, 'batch_stats': new_batch_stats}
    """)


# ---- settle_state


@needs_x32
def test_shapes_that_grow() -> None:
    def grow(params: Any, state: Any) -> Any:
        return None, {"cache": {"seen": jnp.concatenate([state["cache"]["seen"], jnp.ones(1)])}}

    error = fails(fs.StateDriftError, fs.settle_state, grow, {}, {"cache": {"seen": jnp.ones(3)}})
    assert str(error) == whole("""
    settle_state(fn, params, state, ...): shapes must reach a fixed point
      got:
        state['cache']['seen']: f32[10] -> f32[11]
      likely cause: they still change after 8 rounds: does each call append?
      fix: make fn return every state leaf in the shape and dtype that it was given
    """)


@needs_x32
def test_a_structure_that_changes() -> None:
    def late(params: Any, state: Any) -> Any:
        return None, {"cache": {"index": jnp.int32(0), "key": jnp.ones((2, 3))}}

    error = fails(fs.StateDriftError, fs.settle_state, late, {}, {"cache": {"index": jnp.int32(0)}})
    assert str(error) == whole("""
    settle_state(fn, params, state, ...): the structure must stay
      got:
        state['cache']['key']: absent -> f32[2,3]
      likely cause: leaves come or go: sown values, or a cache made late
      fix: make fn return every state leaf in the shape and dtype that it was given
    """)


@needs_x32
def test_a_fixed_point_that_broadcasting_does_not_reach() -> None:
    def other(params: Any, state: Any) -> Any:
        return None, {"stats": {"mean": jnp.ones(4), "count": jnp.int32(0)}}

    state = {"stats": {"mean": jnp.ones(3), "count": jnp.float32(0)}}
    error = fails(fs.StateDriftError, fs.settle_state, other, {}, state)
    assert str(error) == whole("""
    settle_state(fn, params, state, ...): the state must reach its fixed point by broadcasting or casting
      got:
        state['stats']['count']: f32[] -> i32[]
        state['stats']['mean']: f32[3] -> f32[4]
      likely cause: the state was made for other shapes, or for numbers of another kind
      fix: make fn return every state leaf in the shape and dtype that it was given
    """)


# ---- init_carry, adopt_carry


def test_a_leaf_that_is_no_array() -> None:
    params = {"w": jnp.ones(3), "activation": nn.relu, "name": "mlp", "abstract": jax.ShapeDtypeStruct((3,), "f4")}
    error = fails(fs.SignatureError, fs.init_carry, params, {}, TX)
    assert str(error) == whole("""
    init_carry(params, state, tx): every leaf must be an array or a number
      got:
        params['abstract']: ShapeDtypeStruct f32[3]
        params['activation']: custom_jvp
        params['name']: str
      likely cause: a function, a string, an abstract value, a donated array or another object is in the tree
      fix: keep what does not change in the closure of the step; for an abstract carry, jax.eval_shape of init_carry
    """)


def test_two_devices() -> None:
    first, second = jax.devices()[:2]
    params, state = jax.device_put({"w": X}, first), jax.device_put({"stats": {"mean": Y}}, second)
    error = fails(fs.SignatureError, fs.init_carry, params, state, TX)
    assert str(error) == whole("""
    init_carry(params, state, tx): all leaves must live on one mesh or one device
      got:
        carry.params['w']: cpu:0
        carry.state['stats']['mean']: cpu:1
      likely cause: params and state were placed apart
      fix: jax.device_put((params, state), sharding) before init_carry
    """)
    params, state = jax.device_put((params, state), first)
    fs.init_carry(params, state, TX)


def test_two_meshes() -> None:
    devices = np.array(jax.devices())
    one_axis, two_axes = Mesh(devices, "data"), Mesh(devices[:2].reshape(1, 2), ("data", "model"))
    params = jax.device_put({"w": X}, NamedSharding(one_axis, P()))
    state = jax.device_put({"stats": {"mean": Y}}, NamedSharding(two_axes, P()))
    error = fails(fs.SignatureError, fs.init_carry, params, state, TX)
    assert str(error) == whole("""
    init_carry(params, state, tx): all leaves must live on one mesh or one device
      got:
        carry.params['w']: mesh(data=8) of cpu:0, cpu:1, cpu:2, cpu:3, ... and 4 more
        carry.state['stats']['mean']: mesh(data=1, model=2) of cpu:0, cpu:1
      likely cause: params and state were placed apart
      fix: jax.device_put((params, state), sharding) before init_carry
    """)
    params, state = jax.device_put((params, state), NamedSharding(one_axis, P()))
    fs.init_carry(params, state, TX)


@needs_x32
def test_a_checkpoint_of_another_model() -> None:
    like = fs.init_carry({"w": jnp.ones(3), "b": jnp.ones(()), "c": jnp.ones(2)}, {}, TX)
    params = {"w": np.ones((3, 1), np.float32), "b": np.float64(1), "d": np.ones(2), "c": {"kernel": np.ones(2)}}
    restored = {"step": 7, "params": params, "state": {}, "opt_state": [[], []]}
    error = fails(fs.CollectionError, fs.adopt_carry, restored, like)
    assert str(error) == whole("""
    adopt_carry(restored, like): every leaf must have the shape and dtype that it has in like (like -> restored)
      got:
        carry.params['b']: f32[] -> f64[]
        carry.params['c']: f32[2] -> absent
        carry.params['w']: f32[3] -> f32[3,1]
        carry['params']['c']['kernel']: absent -> in the checkpoint
        carry['params']['d']: absent -> in the checkpoint
      likely cause: the checkpoint is of another model or optimizer
      fix: adopt_carry(restored, init_carry(params, state, tx)) with the model and tx that were saved
    """)


@needs_x32
def test_a_checkpoint_with_a_missing_and_a_strange_leaf() -> None:
    like = fs.init_carry({"w": jnp.ones(3)}, {"stats": {"mean": jnp.ones(3)}}, ADAM)
    restored = {"step": "seven", "params": {"w": np.ones(3, np.float32)}, "state": {}, "opt_state": like.opt_state}
    error = fails(fs.CollectionError, fs.adopt_carry, restored, like)
    assert str(error) == whole("""
    adopt_carry(restored, like): every leaf must have the shape and dtype that it has in like (like -> restored)
      got:
        carry.step: i32[] -> str
        carry.state['stats']['mean']: f32[3] -> absent
      likely cause: the checkpoint is of another model or optimizer
      fix: adopt_carry(restored, init_carry(params, state, tx)) with the model and tx that were saved
    """)


# ---- with_optimizer


@needs_x32
@needs_promotion
def test_state_drifts_in_shape() -> None:
    params, state = halves(BiasAdder(), X)
    apply = fs.with_mutable(BiasAdder())

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        pred, state = apply(params, state, batch)
        return jnp.mean(pred**2), state

    step = fs.with_optimizer(loss_fn, TX)
    error = fails(fs.StateDriftError, step, fs.init_carry(params, state, TX), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state['batch_stats']['mean']: f32[10] -> f32[1,10]
      likely cause: the first update gives the state its final shape (keepdims=True?), or a batch axis stayed in
      fix: state = settle_state(loss_fn, params, state, batch), before init_carry
    """)
    error = fails(fs.StateDriftError, jax.jit(step), fs.init_carry(params, state, TX), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state['batch_stats']['mean']: f32[10] -> f32[1,10]
      likely cause: the first update gives the state its final shape (keepdims=True?), or a batch axis stayed in
      fix: state = settle_state(loss_fn, params, state, batch), before init_carry
    """)
    state = fs.settle_state(apply, params, state, X)
    step(fs.init_carry(params, state, TX), X)


@needs_x32
def test_state_drifts_in_dtype() -> None:
    step = returning(lambda p, s, b: (jnp.sum(p["w"]), {"stats": {"mean": b.astype(jnp.bfloat16)}}))
    error = fails(fs.StateDriftError, step, one(stats={"mean": jnp.ones(3)}), jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state['stats']['mean']: f32[3] -> bf16[3]
      likely cause: the state is computed in a precision that differs from its own
      fix: cast in loss_fn, new.astype(old.dtype), or state = settle_state(loss_fn, params, state, batch)
    """)


@needs_x32
def test_state_drifts_in_structure() -> None:
    step = returning(lambda p, s, b: (jnp.sum(p["w"]), {"stats": {"mean": b, "var": b}}))
    error = fails(fs.StateDriftError, step, one(stats={"mean": jnp.ones(3)}, cache={"i": X}), jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state['cache']['i']: f32[32,10] -> absent
        state['stats']['var']: absent -> f32[3]
      likely cause: leaves come or go: a sown collection in the state, a cache made late, a collection not returned
      fix: with_mutable(model, capture='intermediates') for sown values; return out, {**state, ...}
    """)


@needs_x32
def test_every_drifting_leaf_is_listed() -> None:
    state = {"stats": {f"m{i:02}": jnp.ones(2) for i in range(30)}}
    step = returning(lambda p, s, b: (jnp.sum(p["w"]), jax.tree.map(lambda leaf: leaf[None], s)))
    error = fails(fs.StateDriftError, step, one(**state), X)
    assert error.leaves[29] == "state['stats']['m29']: f32[2] -> f32[1,2]"
    assert len(error.leaves) == 30


def test_aux_where_the_state_is_due() -> None:
    step = returning(lambda p, s, b: (jnp.sum(p["w"]), (s, b)))
    error = fails(fs.StateDriftError, step, one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state: dict -> tuple
      likely cause: something else was returned where the new state is due: (loss, aux), new_state needs has_aux=True
      fix: return loss, new_state
    """)


@needs_x32
def test_an_optimizer_that_drifts() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {"count": state["count"][None]}

    tx = optax.GradientTransformation(lambda params: {"count": jnp.zeros(())}, update)
    carry = fs.init_carry({"w": jnp.ones(3)}, {}, tx)
    error = fails(fs.StateDriftError, fs.with_optimizer(squares, tx), carry, jnp.ones(3))
    assert str(error) == whole("""
    HEAD: what comes out must have the structure, shapes and dtypes of what goes in
      got:
        opt_state['count']: f32[] -> f32[1]
      likely cause: tx gives opt_state another form than it took: the carry was made with another tx
      fix: init_carry(carry.params, carry.state, tx) with the tx of the step, whose state begins anew; or, where it is \
of that tx already, a tx that keeps the shapes and dtypes of its state
    """).replace("HEAD", "apply_gradients(tx, carry, grads, new_state)")


@needs_x32
@pytest.mark.parametrize("tx", ["adam", "lion"])
def test_injected_hyperparameters_over_params_of_several_dtypes(tx: str) -> None:
    """Those that are one dtype go through: optax gives the hyperparameters that of the first param."""
    make: Any = getattr(optax, tx)
    params = {"a": jnp.ones(3), "w": jnp.ones(3, jnp.bfloat16)}

    def taken(tx: Any) -> Any:
        return fs.with_optimizer(squares, tx)(fs.init_carry(params, {}, tx), jnp.ones(3, jnp.bfloat16))

    error = fails(fs.StateDriftError, taken, optax.inject_hyperparams(make)(learning_rate=0.1))
    assert str(error).replace("    opt_state.inner_state[0].nu['w']: bf16[3] -> f32[3]\n", "") == whole("""
    HEAD: what comes out must have the structure, shapes and dtypes of what goes in
      got:
        opt_state.inner_state[0].mu['w']: bf16[3] -> f32[3]
      likely cause: optax.inject_hyperparams makes every number an array, and one is wider than what it multiplies
      fix: optax.inject_hyperparams(optax.adam, static_args=('b1', 'b2')), so that these stay numbers of Python
    """).replace("HEAD", "apply_gradients(tx, carry, grads, new_state)")
    mended = optax.inject_hyperparams(make, static_args=("b1", "b2"))(learning_rate=0.1)
    taken(mended)
    step = fs.skip_nonfinite(lambda carry, batch: (carry._replace(state={"n": jnp.float32(0)}), batch))
    error = fails(fs.StateDriftError, step, fs.init_carry(params, {"n": 0}, mended), jnp.float32(0))
    assert error.cause == "the state is computed in a precision that differs from its own"


def test_a_carry_of_an_optimizer_of_another_precision() -> None:
    saved, tx = optax.adam(0.1, mu_dtype=jnp.bfloat16), optax.adam(0.1)
    carry = fs.init_carry({"w": jnp.ones(3)}, {}, saved)
    step = fs.with_optimizer(squares, tx)
    error = fails(fs.StateDriftError, step, carry, jnp.ones(3))
    assert error.leaves[0].startswith("opt_state[0].mu['w']: bf16[3] -> f")
    assert error.fix.startswith("init_carry(carry.params, carry.state, tx) with the tx of the step")
    step(fs.init_carry(carry.params, carry.state, tx), jnp.ones(3))


@needs_x32
def test_aux_in_the_place_of_a_state() -> None:
    step = returning(lambda params, state, batch: (params["w"].sum(), {"norm": batch}))
    error = fails(fs.StateDriftError, step, one(), jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state['norm']: absent -> f32[3]
      likely cause: aux was returned where the new state is due, or a collection that the state does not begin with
      fix: return (loss, aux), new_state, and has_aux=True; or state | {'norm': ...} before init_carry
    """)


def test_a_step_that_returns_three_things() -> None:
    three: Any = lambda carry, batch: (carry, batch, batch)  # noqa: E731
    error = fails(fs.SignatureError, fs.scan_steps(three), X, Y[None])
    assert str(error) == whole("""
    scan_steps(step): must return two things: step(carry, batch) -> (carry, out)
      got:
        a tuple of 3
      likely cause: a result is too many: what else is returned goes into one of the two
      fix: step(carry, batch) -> (carry, out)
    """)


def test_a_list_in_the_place_of_a_tuple() -> None:
    for fn in (lambda params, state, batch: [params["w"].sum(), state], lambda *_: [X, X]):
        error = fails(fs.SignatureError, returning(fn), one(), X)
        assert (error.cause, error.leaves) == ("a list was returned, where a tuple is due", ("list",))
    step = ANY.with_optimizer(lambda params, state, batch: ([params["w"].sum(), X], state), TX, has_aux=True)
    error = fails(fs.SignatureError, step, one(), X)
    assert (error.cause, error.leaves) == ("a list was returned, where a tuple is due", ("out: list",))
    error = fails(fs.SignatureError, ANY.scan_steps(lambda carry, batch: [carry, batch]), X, Y[None])
    assert (error.cause, error.leaves) == ("a list was returned, where a tuple is due", ("list",))


def test_microbatches_of_nothing() -> None:
    step = fs.with_optimizer(squares, TX, microbatches=2)
    error = fails(fs.SignatureError, step, one(), None)
    assert error.leaves == ("no leaf in the batch",)
    assert error.cause == "the batch holds no array, so that there is nothing to split"
    assert error.fix == "microbatches=1, or the arrays that are to be split in batch"


def test_params_without_names() -> None:
    error = fails(fs.CollectionError, fs.split_params, {"params": [X]})
    assert str(error) == whole("""
    split_params(variables): variables['params'] must be a mapping
      got:
        variables['params']: list
      likely cause: an array, a list or another object is there, which has no names
      fix: split_params({'params': {'w': variables['params']}}), so that each param has a name
    """)
    fs.split_params({"params": {"w": [X]}})


@needs_x32
def test_a_loss_that_is_not_a_scalar() -> None:
    step = returning(lambda p, s, b: ((p["w"] - b) ** 2, s))
    error = fails(fs.SignatureError, step, one(), jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return a real scalar loss, f32[]
      got:
        loss: f32[3]
      likely cause: the loss was not reduced to one number
      fix: return loss.mean(), new_state
    """)
    returning(lambda p, s, b: (((p["w"] - b) ** 2).mean(), s))(one(), jnp.ones(3))


@needs_x32
def test_a_loss_that_is_complex() -> None:
    step = returning(lambda p, s, b: (jnp.sum(p["w"]) * 1j, s))
    error = fails(fs.SignatureError, step, one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return a real scalar loss, f32[]
      got:
        loss: c64[]
      likely cause: the loss is complex
      fix: return jnp.abs(loss).mean(), new_state
    """)
    returning(lambda p, s, b: (jnp.abs(jnp.sum(p["w"]) * 1j).mean(), s))(one(), X)


@needs_x32
def test_a_loss_that_counts() -> None:
    step = returning(lambda p, s, b: (jnp.sum(p["w"] > 0), s))
    error = fails(fs.SignatureError, step, one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return a real scalar loss, f32[]
      got:
        loss: i32[]
      likely cause: a count or a truth value has no gradient
      fix: return jnp.mean(per_example), new_state
    """)


def test_a_loss_of_python() -> None:
    error = fails(fs.SignatureError, returning(lambda p, s, b: (1.5, s)), one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return a real scalar loss, f32[]
      got:
        loss: float
      likely cause: a Python object has no gradient
      fix: return jnp.mean(per_example), new_state
    """)


def test_loss_and_state_swapped() -> None:
    error = fails(fs.SignatureError, returning(lambda p, s, b: (s, jnp.sum(p["w"]))), one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return a real scalar loss, f32[]
      got:
        loss: dict
      likely cause: loss and state were swapped
      fix: return loss, new_state
    """)


@needs_x32
def test_a_loss_without_state() -> None:
    error = fails(fs.SignatureError, returning(lambda p, s, b: jnp.sum(p["w"])), one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return two things
      got:
        f32[]
      likely cause: the new state was not returned
      fix: return loss, new_state
    """)


def test_three_results() -> None:
    error = fails(fs.SignatureError, returning(lambda p, s, b: (jnp.sum(p["w"]), b, s)), one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return two things
      got:
        a tuple of 3
      likely cause: aux is beside the loss, not with it
      fix: return (loss, aux), new_state, and has_aux=True
    """)


@pytest.mark.parametrize("has_aux", [False, True])
def test_a_loss_that_is_differentiated_already(has_aux: bool) -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        loss = jnp.sum(params["w"] * batch)
        return (loss, state) if has_aux else loss

    step = returning(jax.value_and_grad(loss_fn, has_aux=has_aux))
    error = fails(fs.SignatureError, step, one(), jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return a loss and the new state
      got:
        a value and a tree like params
      likely cause: loss_fn is differentiated already, by jax.value_and_grad
      fix: value_and_grad(loss_fn), with the loss itself
    """)


@pytest.mark.parametrize("has_aux", [False, True])
def test_params_in_the_place_of_the_new_state(has_aux: Any) -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        loss = jnp.sum(params["w"] * batch)
        return (loss, batch) if has_aux else loss, params

    error = fails(fs.SignatureError, fs.with_optimizer(loss_fn, TX, has_aux=has_aux), one(), jnp.ones(3))
    assert str(error) == whole(f"""
    value_and_grad(loss_fn): loss_fn must return a loss and the new state
      got:
        a value and params
      likely cause: params were returned where the new state is due
      fix: return {"(loss, aux)" if has_aux else "loss"}, new_state
    """)


def test_aux_without_has_aux() -> None:
    step = returning(lambda p, s, b: ((jnp.sum(p["w"]), b), s))
    error = fails(fs.SignatureError, step, one(), X)
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return a scalar loss first
      got:
        out: a tuple of 2
      likely cause: loss_fn returns aux as well
      fix: value_and_grad(loss_fn, has_aux=True), with_optimizer(loss_fn, tx, has_aux=True)
    """)
    fs.with_optimizer(lambda p, s, b: ((jnp.sum(p["w"]), b), s), TX, has_aux=True)(one(), X)


@needs_x32
def test_has_aux_without_aux() -> None:
    step = fs.with_optimizer(squares, TX, has_aux=True)
    error = fails(fs.SignatureError, step, one(), jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): loss_fn must return ((loss, aux), new_state) where has_aux=True
      got:
        out: f32[]
      likely cause: aux is missing, or is not beside the loss
      fix: return (loss, aux), new_state
    """)


def test_a_carry_that_is_none() -> None:
    step = fs.with_optimizer(squares, TX)
    error = fails(fs.SignatureError, step, {"w": jnp.ones(3)}, jnp.ones(3))
    assert str(error) == whole("""
    step(carry, batch): the first argument must be a Carry
      got:
        carry: dict
      likely cause: params were passed, or a restored checkpoint was not adopted
      fix: init_carry(params, state, tx), or adopt_carry(restored, carry)
    """)
    error = fails(fs.SignatureError, step, tuple(one()), jnp.ones(3))
    assert str(error) == whole("""
    step(carry, batch): the first argument must be a Carry
      got:
        carry: a tuple of 4
      likely cause: params were passed, or a restored checkpoint was not adopted
      fix: init_carry(params, state, tx), or adopt_carry(restored, carry)
    """)
    restored = jax.device_get(one())._asdict()
    step(fs.adopt_carry(restored, one()), jnp.ones(3))


@needs_x32
@pytest.mark.parametrize("count", [3_000_000_000, np.int64(3_000_000_000), np.array([1, -3_000_000_000])])
def test_a_number_that_jax_would_store_as_another(count: Any) -> None:
    error = fails(fs.SignatureError, fs.init_carry, {"w": jnp.ones(3)}, {"data": {"seen": count}}, TX)
    assert str(error) == whole("""
    init_carry(params, state, tx): every whole number must fit into the bits that JAX has for it
      got:
        state['data']['seen']: CAME, beyond 32 bits
      likely cause: a number of 64 bits: JAX has 32, unless jax_enable_x64 is set, and would store another number
      fix: jax.config.update('jax_enable_x64', True), or a count in another unit
    """).replace("CAME", {int: "int", np.int64: "i64[]"}.get(type(count), "i64[2]"))
    if np.ndim(count) == 0:
        error = fails(fs.SignatureError, fs.adopt_carry, {"seen": int(count)}, {"seen": jnp.int32(0)})
        assert error.leaves == ("carry['seen']: int, beyond 32 bits",)
    error = fails(fs.SignatureError, fs.adopt_carry, {"seen": np.asarray(count)}, {"seen": jnp.zeros_like(count)})
    assert error.where == "adopt_carry(restored, like)"
    assert error.leaves[0].endswith(", beyond 32 bits")
    error = fails(fs.SignatureError, fs.settle_state, lambda params, state: (0, state), {}, {"data": {"seen": count}})
    assert error.where == "settle_state(fn, params, state, ...)"
    assert error.leaves[0].endswith(", beyond 32 bits")
    carry = fs.init_carry({"w": jnp.ones(3)}, {"data": {"seen": np.int64(3_000)}}, TX)
    assert int(carry.state["data"]["seen"]) == 3_000
    settled = fs.settle_state(lambda params, state: (0, state), {}, {"data": {"seen": np.int64(3_000)}})
    assert (int(settled["data"]["seen"]), settled["data"]["seen"].dtype) == (3_000, jnp.int32)


@needs_x32
@pytest.mark.parametrize("count", [3_000_000_000, np.int64(3_000_000_000)])
def test_a_number_that_a_step_makes_too_wide(count: Any) -> None:
    step = returning(lambda params, state, batch: (params["w"].sum(), {"data": {"seen": count}}))
    error = fails(fs.SignatureError, step, one(data={"seen": jnp.int32(0)}), X)
    assert error.leaves[0].startswith("state['data']['seen']: ")
    assert error.where == "value_and_grad(loss_fn)"


@needs_x32
def test_a_number_that_a_module_of_nnx_would_keep_as_another() -> None:
    class Counted(nnx.Module):
        def __init__(self) -> None:
            self.calls, self.w = nnx.Cache(jnp.int32(0)), nnx.Param(jnp.ones(2))

    model = Counted()
    _, params, _ = fs.from_nnx(model)
    error = fails(fs.SignatureError, fs.to_nnx, model, params, {"cache": {"calls": np.int64(3_000_000_000)}})
    assert error.leaves == ("state['cache']['calls']: i64[], beyond 32 bits",)


@needs_x32
def test_whole_numbers_that_numpy_widened_are_adopted() -> None:
    carry = one(data={"seen": jnp.arange(3)})
    adopted = fs.adopt_carry(carry._replace(state={"data": {"seen": np.array([5, 6, 7])}}), carry)
    assert adopted.state["data"]["seen"].dtype == jnp.int32
    np.testing.assert_array_equal(adopted.state["data"]["seen"], [5, 6, 7])


def test_a_negated_glob() -> None:
    variables = variables_of(MLP(), X[0])
    error = fails(fs.CollectionError, fs.split_params, variables, trainable="!Dense_0/*")
    assert str(error) == whole("""
    split_params(trainable=...): the filter must match at least one param
      got:
        '!Dense_0/*' matches none of 6
      likely cause: a glob has no '!': it chooses what is trained, and nothing takes away from it
      fix: trainable=lambda path, leaf: not path.startswith('Dense_0/')
    """)
    params, state = fs.split_params(variables, trainable=lambda path, leaf: not path.startswith("Dense_0/"))
    assert "Dense_0" not in params
    assert state["params"].keys() == {"Dense_0"}


def test_params_of_whole_numbers() -> None:
    variables = {"params": {"w": jnp.ones(3), "count": jnp.int32(0)}}
    carry = fs.init_carry(variables["params"], {}, TX)
    error = fails(fs.SignatureError, fs.with_optimizer(squares, TX), carry, jnp.ones(3))
    assert str(error) == whole("""
    value_and_grad(loss_fn): every param must be differentiable: of a floating or complex dtype
      got:
        params['count']: i32[]
      likely cause: counters or keys were split off as params
      fix: split_params(variables, trainable=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))
    """)
    params, state = fs.split_params(variables, trainable=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))
    fs.with_optimizer(squares, TX)(fs.init_carry(params, state, TX), jnp.ones(3))


def test_the_carry_of_another_optimizer() -> None:
    error = fails(fs.SignatureError, fs.with_optimizer(squares, ADAM), one(), jnp.ones(3))
    assert str(error) == whole("""
    apply_gradients(tx, carry, grads, new_state): carry.opt_state must be what tx.init(params) gives (tx -> carry)
      got:
        carry.opt_state[0]: ScaleByAdamState -> EmptyState
      likely cause: the carry was made with another tx, or for other params
      fix: adopt_carry(carry, init_carry(carry.params, carry.state, tx), strict=False) with the tx of the step
    """)
    fs.with_optimizer(squares, ADAM)(fs.init_carry({"w": jnp.ones(3)}, {}, ADAM), jnp.ones(3))


def test_microbatches_that_do_not_divide_the_batch() -> None:
    step = fs.with_optimizer(squares, TX, microbatches=5)
    error = fails(fs.SignatureError, step, one(), {"x": X, "scale": jnp.float32(1), "n": 3, "y": Y[:30]})
    assert str(error) == whole("""
    value_and_grad(loss_fn, microbatches=...): the leading axis of every batch leaf must be divisible by 5
      got:
        batch['n']: int
        batch['scale']: f32[]
        batch['x']: f32[32,10]
      likely cause: a ragged last batch, or what every microbatch shares (a key, a number) is in the batch
      fix: drop or pad the last batch, or pass what is shared after the batch: step(carry, batch, key)
    """)


@pytest.mark.parametrize(
    ("count", "came"),
    [(0, "int: 0"), (-1, "int: -1"), (2.0, "float: 2.0"), (True, "bool: True"), ("4", "str"), (None, "NoneType")],
)
def test_microbatches_of_another_kind(count: Any, came: str) -> None:
    error = fails(fs.SignatureError, fs.with_optimizer, squares, TX, microbatches=count)
    assert str(error) == whole("""
    value_and_grad(loss_fn, microbatches=...): a whole number of at least 1
      got:
        CAME
      likely cause: zero, a negative number, a fraction, or no number
      fix: value_and_grad(loss_fn, microbatches=4)
    """).replace("CAME", came)


# ---- with_ema, scan_steps, stack_batches, jit_step


@needs_x32
def test_ema_without_a_state_of_ema() -> None:
    step = fs.with_ema(fs.with_optimizer(squares, TX), decay=0.9)
    error = fails(fs.CollectionError, step, one(), jnp.ones(3))
    assert str(error) == whole("""
    with_ema(step): state['ema'] must have the structure of the params (params -> ema)
      got:
        state['ema']['w']: f32[3] -> absent
      likely cause: the average was not put into the state
      fix: carry._replace(state={**carry.state, 'ema': jax.tree.map(jnp.copy, carry.params)})
    """)
    params = {"w": jnp.ones(3)}
    step(fs.init_carry(params, {} | {"ema": params}, TX), jnp.ones(3))


@needs_x32
def test_ema_of_other_params() -> None:
    step = fs.with_ema(fs.with_optimizer(squares, TX), decay=0.9)
    error = fails(fs.CollectionError, step, one(ema={"w": jnp.ones((1, 3)), "b": X}), jnp.ones(3))
    assert str(error) == whole("""
    with_ema(step): state['ema'] must have the structure of the params (params -> ema)
      got:
        state['ema']['w']: f32[3] -> f32[1,3]
        state['ema']['b']: absent -> f32[32,10]
      likely cause: it belongs to other params
      fix: carry._replace(state={**carry.state, 'ema': jax.tree.map(jnp.copy, carry.params)})
    """)


def test_ema_of_a_model() -> None:
    step = fs.with_ema(fs.with_optimizer(squares, TX), decay=0.9)
    error = fails(fs.CollectionError, step, one(ema={"codes": X}), jnp.ones(3))
    assert error.cause == "a collection of the model's own is named 'ema', or the average is of other params"
    assert error.fix == (
        "another name for the model's own collection, self.variable('averages', ...); or "
        "carry._replace(state={**carry.state, 'ema': jax.tree.map(jnp.copy, carry.params)})"
    )


def test_ema_in_another_precision_is_no_mistake() -> None:
    step = fs.with_ema(fs.with_optimizer(squares, TX), decay=0.9)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    carry = fs.init_carry(params, {"ema": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)}, TX)
    assert step(carry, jnp.ones(3))[0].state["ema"]["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("decay", "came"), [(1.5, "1.5"), (-0.1, "-0.1"), (99, "99"), ("0.9", "str"), (None, "NoneType")]
)
def test_a_decay_that_is_no_fraction(decay: Any, came: str) -> None:
    error = fails(fs.SignatureError, fs.with_ema, fs.with_optimizer(squares, TX), decay=decay)
    assert str(error) == whole("""
    with_ema(decay=...): a number between 0 and 1, or a schedule
      got:
        decay: CAME
      likely cause: 1 - decay was passed, or a percentage
      fix: with_ema(step, decay=0.999)
    """).replace("CAME", came)


@needs_x32
def test_a_scanned_carry_drifts() -> None:
    def step(carry: Any, batch: Any) -> Any:
        return {"mean": batch[None]}, None

    error = fails(fs.StateDriftError, fs.scan_steps(step), {"mean": jnp.ones(3)}, jnp.ones((4, 3)))
    assert str(error) == whole("""
    scan_steps(step): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        carry['mean']: f32[3] -> f32[1,3]
      likely cause: the first update gives the state its final shape (keepdims=True?), or a batch axis stayed in
      fix: state = settle_state(loss_fn, params, state, batch), before init_carry
    """)


@needs_x32
def test_a_scanned_bare_carry_drifts() -> None:
    steps = fs.scan_steps(lambda carry, batch: (carry.astype(jnp.bfloat16), None))
    error = fails(fs.StateDriftError, steps, jnp.ones(3), jnp.ones((4, 3)))
    assert str(error) == whole("""
    scan_steps(step): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        carry: f32[3] -> bf16[3]
      likely cause: the state is computed in a precision that differs from its own
      fix: cast in loss_fn, new.astype(old.dtype), or state = settle_state(loss_fn, params, state, batch)
    """)


@pytest.mark.parametrize("parts", [1, 2])
def test_aux_that_cannot_be_stacked(parts: int) -> None:
    def named(params: Any, state: Any, batch: Any) -> Any:
        loss, state = squares(params, state, batch[0, 0])
        return (loss, {"name": "mine", "n": 3}), state

    step = fs.with_optimizer(named, TX, has_aux=True, microbatches=parts)
    where = "scan_steps(step)" if parts == 1 else "value_and_grad(loss_fn, microbatches=...)"
    leaf = "out[1]['name']" if parts == 1 else "aux['name']"
    error = fails(fs.SignatureError, fs.scan_steps(step), one(), jnp.ones((3, 2, 1)))
    assert str(error) == whole(f"""
    {where}: every leaf of what is stacked must be an array or a number
      got:
        {leaf}: str
      likely cause: names, records or objects are returned beside arrays
      fix: return arrays and numbers alone; what does not change belongs outside the step
    """)
    if parts == 1:
        assert step(one(), jnp.ones((2, 1)))[1][1]["name"] == "mine"  # nothing is stacked


def test_batches_that_are_not_stacked() -> None:
    steps = fs.scan_steps(fs.with_optimizer(squares, TX))
    error = fails(fs.SignatureError, steps, one(), {"x": X, "y": Y[:8], "scale": 1.0})
    assert str(error) == whole("""
    scan_steps(step): every leaf of batches must have one leading axis, of one size: the steps
      got:
        batches['scale']: float
        batches['x']: f32[32,10]
        batches['y']: f32[8,1]
      likely cause: a single batch was passed, or batches were stacked apart
      fix: for batches in stack_batches(loader, 10): carry, outs = step(carry, batches)
    """)
    error = fails(fs.SignatureError, steps, one(), {})
    assert str(error) == whole("""
    scan_steps(step): every leaf of batches must have one leading axis, of one size: the steps
      got:
        no leaf in batches
      likely cause: a single batch was passed, or batches were stacked apart
      fix: for batches in stack_batches(loader, 10): carry, outs = step(carry, batches)
    """)
    for batches in fs.stack_batches([jnp.ones(3)] * 4, 2):
        steps(one(), batches)


@pytest.mark.parametrize("size", [0, 2.5, "2"])
def test_stacks_of_no_size(size: Any) -> None:
    came = {0: "int: 0", 2.5: "float: 2.5", "2": "str"}[size]
    error = fails(fs.SignatureError, fs.stack_batches, [X], size)
    assert str(error) == whole("""
    stack_batches(batches, size=...): a whole number of at least 1
      got:
        CAME
      likely cause: zero, a negative number, a fraction, or no number
      fix: stack_batches(batches, size=4)
    """).replace("CAME", came)


@needs_x32
def test_like_of_numpy() -> None:
    like = jax.device_get(one())
    error = fails(fs.SignatureError, fs.jit_step, fs.with_optimizer(squares, TX), like=like)
    assert str(error) == whole("""
    jit_step(like=...): every leaf of like must say its sharding
      got:
        like.step: ndarray i32[]
        like.params['w']: ndarray f32[3]
      likely cause: abstract values without a sharding, NumPy arrays or numbers
      fix: jit_step(step, like=init_carry(params, state, tx))
    """)
    fs.jit_step(fs.with_optimizer(squares, TX), like=fs.init_carry({"w": jnp.ones(3)}, {}, TX))


def test_an_error_while_tracing_donates_nothing() -> None:
    carry = one(ema={"w": jnp.ones(2)})
    step = fs.jit_step(fs.with_ema(fs.with_optimizer(squares, TX), decay=0.9))
    fails(fs.CollectionError, step, carry, jnp.ones(3))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(carry))


# ---- assert_max_traces


def retraced(first: tuple[Any, ...], second: tuple[Any, ...], max_traces: int = 1, **options: Any) -> Any:
    """The error of the second call of one jitted function."""

    def step(carry: fs.Carry, batch: Any = None) -> Any:
        return carry, batch

    jitted = jax.jit(fs.assert_max_traces(step, max_traces), **options)
    jitted(*first)
    return fails(fs.RetraceError, jitted, *second)


@needs_jit
@needs_x32
def test_retrace_for_a_shape() -> None:
    carry = one(batch_stats={"mean": jnp.ones(5)})
    other = one(batch_stats={"mean": jnp.ones((1, 5))})
    error = retraced((carry, X), (other, X[:7]))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        carry.state['batch_stats']['mean']: f32[5] -> f32[1,5]
        batch: f32[32,10] -> f32[7,10]
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: state = settle_state(loss_fn, params, state, batch) before init_carry; drop or pad the ragged last batch; or a higher max_traces, if each is meant
    """)  # noqa: E501


@needs_jit
def test_each_change_has_its_own_fix() -> None:
    carry, other = {"mean": jnp.ones(5), "scale": 1.0}, {"mean": jnp.ones((1, 5)), "scale": jnp.float32(1)}
    error = retraced((carry | {"old": Y}, X), (other | {"new": Y}, X[:7]))
    assert error.fix.split("; ") == [
        "state = settle_state(loss_fn, params, state, batch) before init_carry",
        "keep the structure, and make static values, tx and functions once, outside the loop",
        "init_carry for the carry, jnp.asarray(value, dtype) for Python numbers",
        "drop or pad the ragged last batch",
        "or a higher max_traces, if each is meant",
    ]


@needs_jit
def test_a_count_around_what_is_jitted() -> None:
    step = fs.assert_max_traces(jax.jit(lambda carry, batch: (carry, batch)))
    step(X, Y)
    error = fails(fs.RetraceError, step, X, Y)
    assert str(error) == whole("""
    assert_max_traces(<lambda>, max_traces=1): traced 2 times
      got:
        no argument changed
      likely cause: the count is around what is jitted, so that it counts every call
      fix: step = jit_step(assert_max_traces(step))
    """)


@needs_jit
def test_retrace_for_a_dtype() -> None:
    error = retraced((X, Y), (X, Y.astype(jnp.bfloat16)))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        batch: f32[32,1] -> bf16[32,1]
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: jnp.asarray(value, dtype), one dtype in every call; or a higher max_traces, if each is meant
    """)


@needs_jit
@needs_x32
def test_retrace_for_a_weak_type() -> None:
    error = retraced(({"scale": jnp.float32(1)},), ({"scale": 1.0},))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        carry['scale']: f32[] -> f32[] (weak type)
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: init_carry for the carry, jnp.asarray(value, dtype) for Python numbers; or a higher max_traces, if each is meant
    """)  # noqa: E501


@needs_jit
def test_retrace_for_keys() -> None:
    error = retraced(({"x": X, "y": Y},), ({"x": X, "z": {"a": Y}},))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        carry['y']: f32[32,1] -> absent
        carry['z']['a']: absent -> f32[32,1]
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: keep the structure, and make static values, tx and functions once, outside the loop; or a higher max_traces, if each is meant
    """)  # noqa: E501


@needs_jit
def test_retrace_for_an_argument() -> None:
    error = retraced((X,), (X, Y))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        batch: None -> f32[32,1]
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: keep the structure, and make static values, tx and functions once, outside the loop; or a higher max_traces, if each is meant
    """)  # noqa: E501


@needs_jit
def test_retrace_for_a_static_value() -> None:
    error = retraced((X, 3), (X, 4), static_argnums=1)
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        batch: 3 -> 4
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: keep the structure, and make static values, tx and functions once, outside the loop; or a higher max_traces, if each is meant
    """)  # noqa: E501


@needs_jit
def test_retrace_for_a_train_state_of_another_tx() -> None:
    def create(tx: Any) -> Any:
        return TrainState.create(apply_fn=print, params={"w": jnp.ones(3)}, tx=tx)

    error = retraced((create(optax.sgd(0.1)),), (create(optax.sgd(0.1)),))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        carry.tx: GradientTransformationExtraArgs -> another GradientTransformationExtraArgs (not equal to the first)
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: keep the structure, and make static values, tx and functions once, outside the loop; or a higher max_traces, if each is meant
    """)  # noqa: E501


@needs_jit
def test_retrace_for_a_kind_of_container() -> None:
    error = retraced(([X, Y],), ((X, Y),))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        carry: list -> tuple
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: keep the structure, and make static values, tx and functions once, outside the loop; or a higher max_traces, if each is meant
    """)  # noqa: E501


@needs_jit
def test_retrace_for_nothing() -> None:
    step = fs.assert_max_traces(lambda carry, batch: (carry, batch))
    jax.jit(lambda carry, batch: step(carry, batch))(X, Y)
    error = fails(fs.RetraceError, jax.jit(lambda carry, batch: step(carry, batch)), X, Y)
    assert str(error) == whole("""
    assert_max_traces(<lambda>, max_traces=1): traced 2 times
      got:
        no argument changed
      likely cause: jax.jit was applied anew to a new function object, its cache or jax.config changed, or fn ran unjitted
      fix: step = jit_step(...) once, before the loop
    """)  # noqa: E501


@needs_jit
@needs_x32
@pytest.mark.parametrize("axis", ["x", "x1"])
def test_retrace_for_a_sharding_in_the_type(axis: str) -> None:
    mesh = jax.make_mesh((8,), (axis,), axis_types=(jax.sharding.AxisType.Explicit,))
    unsplit, split = (jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, spec)) for spec in (P(), P(axis)))
    error = retraced((unsplit,), (split,))
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=1): traced 2 times
      got:
        carry: f32[8,3] -> f32[8@AXIS,3]
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: jit_step(step, like=carry), and every batch put on the mesh alike; or a higher max_traces, if each is meant
    """).replace("AXIS", axis)


@needs_jit
def test_retrace_for_other_params_that_are_trained() -> None:
    variables = {"params": {"body": {"w": jnp.ones(3)}, "head": {"w": jnp.ones(3)}}}

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return sum(leaf.sum() for leaf in jax.tree.leaves(fs.merge_state(params, state))), state

    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, TX)))
    step(fs.init_carry(*fs.split_params(variables, trainable="head/*"), TX), X)
    error = fails(fs.RetraceError, step, fs.init_carry(*fs.split_params(variables), TX), X)
    assert "carry.params['body']['w']: absent -> f" in error.leaves[0]
    assert error.fix == (
        "a step of its own for each choice of trainable: jit_step(assert_max_traces(step)) anew; or a higher "
        "max_traces, if each is meant"
    )


def test_the_nearest_of_several_traces_is_shown() -> None:
    near, far = {"a": X, "b": X, "c": X}, {"a": Y, "b": Y, "c": X[:3]}

    def step(batch: Any) -> Any:
        return batch

    jitted = jax.jit(fs.assert_max_traces(step, 2))
    jitted(far)
    jitted(near)
    error = fails(fs.RetraceError, jitted, near | {"c": X[:4]})
    assert str(error) == whole("""
    assert_max_traces(step, max_traces=2): traced 3 times
      got:
        batch['c']: f32[32,10] -> f32[4,10]
      likely cause: the call differs from all earlier ones, and JAX compiles each
      fix: drop or pad the ragged last batch; or a higher max_traces, if each is meant
    """)


def test_failing_while_tracing_leaves_no_warning_behind() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fails(fs.SignatureError, fs.with_optimizer(squares, TX), None, X)


# ---- arguments of another form, said before anything is traced

ANY: Any = fs  # so that no type checker rejects before we do


@pytest.mark.parametrize(
    ("call", "where", "name", "fix"),
    [
        (fs.with_rngs, "with_rngs(fn)", "fn", "with_rngs(with_mutable(model))"),
        (fs.vmap_stateful, "vmap_stateful(fn)", "fn", "vmap_stateful(with_mutable(model))"),
        (
            lambda fn: ANY.settle_state(fn, {}, {}),
            "settle_state(fn, params, state, ...)",
            "fn",
            "settle_state(with_mutable(model), params, state, x)",
        ),
        (
            lambda fn: ANY.with_optimizer(fn, TX),
            "value_and_grad(loss_fn)",
            "loss_fn",
            "def loss_fn(params, state, batch): ...; return loss, new_state",
        ),
        (
            lambda fn: ANY.with_ema(fn, decay=0.9),
            "with_ema(step, decay=...)",
            "step",
            "with_ema(with_optimizer(loss_fn, tx), decay=0.999)",
        ),
        (fs.scan_steps, "scan_steps(step)", "step", "scan_steps(with_optimizer(loss_fn, tx))"),
        (fs.jit_step, "jit_step(step)", "step", "jit_step(with_optimizer(loss_fn, tx))"),
    ],
)
@pytest.mark.parametrize(
    ("given", "came"),
    [(MLP(4), "MLP"), (MLP, "the class MLP"), (TX, "GradientTransformationExtraArgs"), (None, "NoneType")],
)
def test_what_is_no_function(call: Any, where: str, name: str, fix: str, given: Any, came: str) -> None:
    error = fails(fs.SignatureError, call, given)
    assert str(error) == whole(f"""
    {where}: {name} must be a function, and no module or class
      got:
        {name}: {came}
      likely cause: something else was passed, or the arguments are in another order
      fix: {fix}
    """)


OTHER_FORMS: list[tuple[Any, str]] = [
    (
        functools.partial(ANY.init_carry, params={}, state={}, tx=optax.adam),
        "init_carry(params, state, tx): tx must be an optax transformation: it has init and update|"
        "tx: function|init_carry(params, state, tx), where tx = optax.adam(1e-3)",
    ),
    (
        functools.partial(ANY.with_optimizer, loss_fn=squares, tx=0.1),
        "with_optimizer(loss_fn, tx): tx must be an optax transformation: it has init and update|"
        "tx: float|with_optimizer(loss_fn, tx), where tx = optax.adam(1e-3)",
    ),
    (
        functools.partial(ANY.vmap_stateful, fn=squares, axis_name=0),
        "vmap_stateful(axis_name=...): axis_name must be the name of an axis, or a tuple of names|"
        "axis_name: int|axis_name='batch'",
    ),
    (
        functools.partial(ANY.vmap_stateful, fn=squares, spmd_axis_name=["data"]),
        "vmap_stateful(spmd_axis_name=...): spmd_axis_name must be the name of an axis, or a tuple of names|"
        "spmd_axis_name: list|spmd_axis_name='batch'",
    ),
    (
        functools.partial(ANY.vmap_stateful, fn=squares, state_axes=0),
        "vmap_stateful(state_axes=...): state_axes must be {collection: axes}|"
        "state_axes: int|vmap_stateful(fn, state_axes={'batch_stats': 0})",
    ),
    (
        functools.partial(ANY.vmap_stateful, fn=squares, split_rngs="dropout"),
        "vmap_stateful(split_rngs=...): split_rngs must be a bool, or {stream: bool}|"
        "split_rngs: str|vmap_stateful(fn, split_rngs={'dropout': True})",
    ),
    (
        functools.partial(ANY.with_mutable, fn=MLP(4), method=nn.Dense),
        "with_mutable(method=...): method must be a method of the module, or its name|"
        "method: the class Dense|with_mutable(model, method=Model.decode)",
    ),
    (
        functools.partial(ANY.with_mutable, fn=MLP(4), mutable=1),
        "with_mutable(mutable=...): mutable must be a collection's name, names, a DenyList, or a bool|"
        "mutable: int|with_mutable(fn, mutable=['batch_stats'])",
    ),
    (
        functools.partial(ANY.with_mutable, fn=MLP(4), capture=True),
        "with_mutable(capture=...): capture must be the name of a sown collection, or names|"
        "capture: bool|with_mutable(fn, capture='intermediates')",
    ),
    (
        functools.partial(ANY.stack_batches, batches={"x": X}, size=2),
        "stack_batches(batches, size): batches must be an iterable of batches|batches: dict|stack_batches(loader, 10)",
    ),
    (
        functools.partial(ANY.assert_max_traces, fn=3),
        "assert_max_traces(fn): fn must be a function|fn: int|assert_max_traces(step)",
    ),
    (
        functools.partial(ANY.from_nnx, module=nnx.Linear(1, 1, rngs=nnx.Rngs(0)), method=3),
        "from_nnx(method=...): method must be a function of the module|"
        "method: int|from_nnx(module, method=Model.decode)",
    ),
]


@pytest.mark.parametrize(("call", "said"), OTHER_FORMS, ids=[said.split(":")[0] for _, said in OTHER_FORMS])
def test_options_of_another_form(call: Any, said: str) -> None:
    error = fails(fs.SignatureError, call)
    required, came, fix = said.split("|")
    assert str(error) == whole(f"""
    {required}
      got:
        {came}
      likely cause: something else was passed, or the arguments are in another order
      fix: {fix}
    """)


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda count: ANY.assert_max_traces(squares, count), "assert_max_traces(fn, max_traces=...)"),
        (lambda count: ANY.scan_steps(squares, unroll=count), "scan_steps(step, unroll=...)"),
        (lambda count: ANY.vmap_stateful(squares, axis_size=count), "vmap_stateful(axis_size=...)"),
    ],
)
def test_counts_that_are_none(call: Any, where: str) -> None:
    error = fails(fs.SignatureError, call, 0)
    assert str(error) == whole(f"""
    {where}: a whole number of at least 1
      got:
        int: 0
      likely cause: zero, a negative number, a fraction, or no number
      fix: {where.replace("...", "4")}
    """)


def test_axes_that_do_not_fit() -> None:
    fn = fs.vmap_stateful(lambda params, state, x: (x, state), in_axes={"x": 0})
    error = fails(fs.SignatureError, fn, {}, {}, {"y": X})
    assert str(error) == whole("""
    vmap_stateful(in_axes=...): axes must be whole numbers or None, or a tree of these that begins as the argument does
      got:
        for args[0]: dict
      likely cause: the axes were made for another argument, or something else was passed
      fix: in_axes=0
    """)


def test_an_argument_that_is_none_is_mapped_over_nothing() -> None:
    fn = ANY.vmap_stateful(lambda params, state, x, mask: (x if mask is None else x * mask, state))
    out, _ = fn({}, {}, X, None)
    assert jnp.array_equal(out, X)


def test_a_stream_that_is_no_key() -> None:
    fn = fs.with_rngs(fs.with_mutable(Dropping()))
    params, state = halves(Dropping(), X)
    error = fails(fs.SignatureError, fn, params, state | {"rngs": {"dropout": 0}}, X)
    assert str(error) == whole("""
    with_rngs(fn): state['rngs'] must hold one PRNG key per stream
      got:
        state['rngs']['dropout']: int
      likely cause: a seed is there, or a collection of the model's own that is named 'rngs'
      fix: state | rng_state(dropout=jax.random.key(0)); or another name for the model's own collection
    """)
    assert fails(fs.SignatureError, fn, params, state | {"rngs": KEY}, X).leaves == ("state['rngs']: key<fry>[]",)


@needs_x32
def test_a_collection_that_is_no_mapping() -> None:
    params, state = halves(MLP(4), X)
    error = fails(fs.CollectionError, fs.with_mutable(MLP(4)), params, state | {"step": jnp.zeros(())}, X)
    assert str(error) == whole("""
    with_mutable(fn): every collection must be a mapping, its keys strings
      got:
        'step': f32[]
      likely cause: the state holds what is no model's: a counter, a queue, the tree of another library
      fix: state | {'extra': ...}, any tree, which no model sees
    """)


def test_a_state_to_settle_holds_no_array() -> None:
    error = fails(fs.SignatureError, fs.settle_state, squares, {}, {"c": {"name": "relu"}})
    assert str(error) == whole("""
    settle_state(fn, params, state, ...): every leaf must be an array, a number, or a jax.ShapeDtypeStruct
      got:
        state['c']['name']: str
      likely cause: a function, a string or another object is in the tree
      fix: params, state = split_params(module.init(key, x))
    """)


@pytest.mark.parametrize("what", ["scan_steps(step)", "with_ema(step)"])
def test_a_step_that_returns_one_thing(what: str) -> None:
    step = ANY.scan_steps(lambda carry, batch: carry) if "scan" in what else ANY.with_ema(lambda c, b: c[:1], decay=0.9)
    carry = fs.init_carry({"w": jnp.ones(3)}, {"ema": {"w": jnp.ones(3)}}, TX)
    error = fails(fs.SignatureError, step, carry, jnp.ones((2, 3)))
    assert str(error) == whole(f"""
    {what}: must return two things: step(carry, batch) -> (carry, out)
      got:
        {"Carry" if "scan" in what else "a tuple of 1"}
      likely cause: a result is missing
      fix: step(carry, batch) -> (carry, out)
    """)


@needs_x32
def test_a_carry_put_together_by_hand() -> None:
    step = fs.with_optimizer(squares, TX)
    error = fails(fs.SignatureError, step, one(c={"mean": jnp.ones(2)})._replace(state={"c": "mean"}), jnp.ones(3))
    assert str(error) == whole("""
    step(carry, batch): every leaf of the carry must be an array or a number
      got:
        carry.state['c']: str
      likely cause: the carry was put together by hand
      fix: init_carry(params, state, tx)
    """)
    error = fails(fs.SignatureError, step, one()._replace(step=jnp.zeros(2)), jnp.ones(3))
    assert str(error) == whole("""
    step(carry, batch): carry.step must be the count of updates, i32[]
      got:
        carry.step: f32[2]
      likely cause: the carry was put together by hand
      fix: init_carry(params, state, tx), or carry._replace(step=jnp.int32(count))
    """)


@needs_x32
def test_a_donated_array_is_named() -> None:
    gone = jnp.ones(3)
    gone.delete()
    error = fails(fs.SignatureError, lambda: fs.init_carry({"w": gone}, {}, TX))
    assert error.leaves == ("params['w']: deleted f32[3]",)
    error = fails(fs.CollectionError, lambda: fs.adopt_carry(one()._replace(params={"w": gone}), one()))
    assert error.leaves == ("carry.params['w']: f32[3] -> deleted f32[3]",)
    assert error.cause == "a step was given this carry, and took its buffers"
    assert error.fix == "adopt what the step returned; or, before the step, keep jax.tree.map(jnp.copy, carry)"


def test_adopting_like_what_is_no_carry() -> None:
    error = fails(fs.SignatureError, fs.adopt_carry, one(), {"w": 1.0})
    assert str(error) == whole("""
    adopt_carry(restored, like): every leaf of like must say its shape and dtype
      got:
        like['w']: float
      likely cause: restored and like were swapped, or like is no carry
      fix: adopt_carry(restored, init_carry(params, state, tx))
    """)


def test_a_tree_of_500_levels_goes_through() -> None:
    tree: Any = jnp.ones(1)
    for _ in range(500):
        tree = {"a": tree}
    params, state = fs.split_params({"params": tree, "c": tree})
    carry = fs.init_carry(params, state, TX)
    assert fs.merge_state(carry.params, carry.state).keys() == {"params", "c"}
    assert len(jax.tree.leaves(fs.adopt_carry(carry, carry))) == 3


def test_lookahead_over_params_that_are_no_pair() -> None:
    tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    error = fails(fs.SignatureError, fs.with_optimizer(squares, tx), fs.init_carry({"w": jnp.ones(3)}, {}, tx), 1.0)
    assert str(error) == whole("""
    HEAD: under optax.lookahead carry.params must be optax.LookaheadParams: fast params and slow ones
      got:
        carry.params: dict
      likely cause: the carry was made from the params alone
      fix: init_carry(optax.LookaheadParams.init_synced(params), state, tx)
    """).replace("HEAD", "apply_gradients(tx, carry, grads, new_state)")


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="optax >= 0.2.7 has it")
def test_an_optimizer_whose_state_grows_at_its_first_update() -> None:
    tx = optax.monitor({"sum": lambda updates: jnp.sum(jax.tree.leaves(updates)[0])})
    error = fails(fs.SignatureError, fs.with_optimizer(squares, tx), fs.init_carry({"w": jnp.ones(3)}, {}, tx), 1.0)
    assert str(error) == whole("""
    HEAD: tx.update must give opt_state the form that tx.init gave it (init -> update)
      got:
        opt_state.measurements['sum']: absent -> f32[]
      likely cause: tx adds leaves at its first update, as optax.monitor does: the step would compile twice
      fix: first = jax.eval_shape(tx.update, carry.params, carry.opt_state, carry.params)[1]; \
carry = adopt_carry(carry, carry._replace(opt_state=jax.tree.map(\
lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=carry.step.sharding), first)), strict=False)
    """).replace("HEAD", "apply_gradients(tx, carry, grads, new_state)")
