"""Every public function, times every kind of wrong argument: what `test_bad_input` tries and `docs/errors.md` lists."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flaxsplit as fs

from .flags import CONFIG

KEY = jax.random.key(0)
X = jnp.ones((4, 2))
TX = optax.adam(0.1)


class Model(nn.Module):
    """Params, batch statistics, and a mode."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))


def squares(params: Any, state: Any, batch: Any) -> Any:
    """A loss without a model."""
    return jnp.sum((params["w"] - batch) ** 2), state


def deleted() -> Any:
    """An array whose buffer is gone."""
    array = jnp.ones(3)
    array.delete()
    return array


def leaked() -> Any:
    """A tracer out of its trace."""
    out: list[Any] = []

    @jax.jit
    def leak(x: Any) -> Any:
        out.append(x)
        return x

    with jax.check_tracer_leaks(False), jax.disable_jit(False):  # else JAX refuses to make one, or traces nothing
        leak(jnp.ones(3))
    return out[0]


def deep(levels: int = 500) -> Any:
    """A tree of one leaf."""
    tree: Any = jnp.ones(1)
    for _ in range(levels):
        tree = {"a": tree}
    return tree


KINDS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a number": lambda: 0.5,
    "NaN": lambda: float("nan"),
    "a string": lambda: "abc",
    "a list": lambda: [1, 2],
    "an empty dict": dict,
    "an object": object,
    "a class": lambda: nn.Dense,
    "a function": lambda: lambda *args: None,
    "an array": lambda: jnp.ones(3),
    "another structure": lambda: {"other": {"w": jnp.ones((2, 7))}},
    "keys that are no strings": lambda: {1: {2: jnp.ones(1)}},
    "odd keys": lambda: {"a/b": {"*": {"雪": {"": jnp.ones(1)}}}},
    "a deleted buffer": lambda: {"w": deleted()},
    "a leaked tracer": lambda: {"w": leaked()},
    "strings as leaves": lambda: {"w": "abc"},
    "None as a leaf": lambda: {"w": None},
    "an array of no element": lambda: {"w": jnp.ones((0, 3))},
    "an array of rank 3": lambda: {"w": jnp.ones((1, 2, 3))},
    "an array on another device": lambda: {"w": jax.device_put(jnp.ones(3), jax.devices()[-1])},
    "500 levels": deep,
    "10,000 leaves": lambda: {f"w{i}": np.float32(i) for i in range(10_000)},
}
if CONFIG.jax_debug_nans:
    del KINDS["NaN"]  # which JAX then refuses itself, and not in every call
if CONFIG.jax_check_tracer_leaks:
    del KINDS["10,000 leaves"]  # for each of which JAX then compiles anew


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What is right in every call; nothing of it may be changed or deleted."""

    variables: Any
    params: Any
    state: Any
    w: Any
    carry: fs.Carry


def fixed() -> Fixed:
    """The right arguments."""
    variables = Model().init(KEY, X)
    params, state = fs.split_params(variables)
    w = {"w": jnp.ones(3)}
    return Fixed(variables, params, state | fs.rng_state(dropout=KEY), w, fs.init_carry(w, {"ema": w}, TX))


def linear() -> Any:
    """An NNX module."""
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def step_of(**options: Any) -> Any:
    """A step over `Fixed.carry`."""
    return fs.with_optimizer(squares, TX, **options)


APPLY = fs.with_mutable(Model())
SAME: Any = lambda params, state, x: (x, state)  # noqa: E731 (a stateful function without a model)
NO_PARAMS: Any = lambda params, state, batch: (jnp.float32(1), state)  # noqa: E731 (a loss of any params)
KEEPS: Any = lambda carry, batch: (carry, None)  # noqa: E731 (a step over any carry)
GRAD_FN = fs.value_and_grad(NO_PARAMS)
EMA: Any = lambda f: f.carry._replace(state={"ema": f.w})  # noqa: E731
BATCH = jnp.zeros(3)

# The argument that is wrong, and the call around it.
CALLS: dict[str, Callable[[Any, Fixed], Any]] = {
    "split_params(variables)": lambda wrong, f: fs.split_params(wrong),
    "split_params(trainable=)": lambda wrong, f: fs.split_params(f.variables, trainable=wrong),
    "merge_state(params)": lambda wrong, f: fs.merge_state(wrong, f.state),
    "merge_state(state)": lambda wrong, f: fs.merge_state(f.params, wrong),
    "with_mutable(fn)": lambda wrong, f: fs.with_mutable(wrong)(f.params, f.state, X),
    "with_mutable(method=)": lambda wrong, f: fs.with_mutable(Model(), method=wrong)(f.params, f.state, X),
    "with_mutable(mutable=)": lambda wrong, f: fs.with_mutable(Model(), mutable=wrong)(f.params, f.state, X),
    "with_mutable(capture=)": lambda wrong, f: fs.with_mutable(Model(), capture=wrong)(f.params, f.state, X),
    "with_mutable(model)(params)": lambda wrong, f: APPLY(wrong, f.state, X),
    "with_mutable(model)(state)": lambda wrong, f: APPLY(f.params, wrong, X),
    "with_rngs(fn)": lambda wrong, f: fs.with_rngs(wrong)(f.params, f.state, X),
    "with_rngs(axis_name=)": lambda wrong, f: fs.with_rngs(APPLY, axis_name=wrong)(f.params, f.state, X),
    "with_rngs(fn)(state['rngs'])": lambda wrong, f: fs.with_rngs(APPLY)(f.params, f.state | {"rngs": wrong}, X),
    "rng_state(dropout=)": lambda wrong, f: fs.rng_state(dropout=wrong),
    "vmap_stateful(fn)": lambda wrong, f: fs.vmap_stateful(wrong)(f.params, f.state, X),
    "vmap_stateful(in_axes=)": lambda wrong, f: fs.vmap_stateful(SAME, in_axes=wrong)(f.params, f.state, X),
    "vmap_stateful(axis_name=)": lambda wrong, f: fs.vmap_stateful(SAME, axis_name=wrong)(f.params, f.state, X),
    "vmap_stateful(params_axes=)": lambda wrong, f: fs.vmap_stateful(SAME, params_axes=wrong)(f.params, f.state, X),
    "vmap_stateful(state_axes=)": lambda wrong, f: fs.vmap_stateful(SAME, state_axes=wrong)(f.params, f.state, X),
    "vmap_stateful(split_rngs=)": lambda wrong, f: fs.vmap_stateful(SAME, split_rngs=wrong)(f.params, f.state, X),
    "vmap_stateful(axis_size=)": lambda wrong, f: fs.vmap_stateful(SAME, axis_size=wrong)(f.params, f.state, X),
    "vmap_stateful(spmd_axis_name=)": lambda wrong, f: fs.vmap_stateful(SAME, spmd_axis_name=wrong)(
        f.params, f.state, X
    ),
    "settle_state(fn)": lambda wrong, f: fs.settle_state(wrong, f.params, f.state, X),
    "settle_state(params)": lambda wrong, f: fs.settle_state(APPLY, wrong, f.state, X),
    "settle_state(state)": lambda wrong, f: fs.settle_state(APPLY, f.params, wrong, X),
    "init_carry(params)": lambda wrong, f: fs.init_carry(wrong, {}, TX),
    "init_carry(state)": lambda wrong, f: fs.init_carry(f.w, {"c": wrong}, TX),
    "init_carry(tx)": lambda wrong, f: fs.init_carry(f.w, {}, wrong),
    "init_carry(sharding=)": lambda wrong, f: fs.init_carry(f.w, {}, TX, sharding=wrong),
    "value_and_grad(loss_fn)": lambda wrong, f: fs.value_and_grad(wrong)(f.w, {}, BATCH),
    "value_and_grad(microbatches=)": lambda wrong, f: fs.value_and_grad(squares, microbatches=wrong)(f.w, {}, BATCH),
    "value_and_grad(axis_name=)": lambda wrong, f: fs.value_and_grad(squares, axis_name=wrong)(f.w, {}, BATCH),
    "value_and_grad(overwrite=)": lambda wrong, f: fs.value_and_grad(squares, overwrite=wrong)(f.w, {}, BATCH),
    "grad_fn(params)": lambda wrong, f: GRAD_FN(wrong, {}, BATCH),
    "grad_fn(state)": lambda wrong, f: GRAD_FN(f.w, wrong, BATCH),
    "apply_gradients(tx)": lambda wrong, f: fs.apply_gradients(wrong, f.carry, f.w, f.carry.state),
    "apply_gradients(carry)": lambda wrong, f: fs.apply_gradients(TX, wrong, f.w, {}),
    "apply_gradients(grads)": lambda wrong, f: fs.apply_gradients(TX, f.carry, wrong, f.carry.state),
    "apply_gradients(new_state)": lambda wrong, f: fs.apply_gradients(TX, f.carry, f.w, wrong),
    "with_optimizer(loss_fn)": lambda wrong, f: fs.with_optimizer(wrong, TX)(f.carry, BATCH),
    "with_optimizer(tx)": lambda wrong, f: fs.with_optimizer(squares, wrong)(f.carry, BATCH),
    "with_optimizer(microbatches=)": lambda wrong, f: step_of(microbatches=wrong)(f.carry, BATCH),
    "with_optimizer(axis_name=)": lambda wrong, f: step_of(axis_name=wrong)(f.carry, BATCH),
    "what loss_fn returns": lambda wrong, f: fs.with_optimizer(lambda p, s, b: wrong, TX)(f.carry, BATCH),
    "the loss": lambda wrong, f: fs.with_optimizer(lambda p, s, b: (wrong, s), TX)(f.carry, BATCH),
    "the new state": lambda wrong, f: fs.with_optimizer(lambda p, s, b: (squares(p, s, b)[0], wrong), TX)(
        f.carry, BATCH
    ),
    "step(carry)": lambda wrong, f: step_of()(wrong, BATCH),
    "step(carry), its step": lambda wrong, f: step_of()(f.carry._replace(step=wrong), BATCH),
    "step(carry), its opt_state": lambda wrong, f: step_of()(f.carry._replace(opt_state=wrong), BATCH),
    "skip_nonfinite(step)": lambda wrong, f: fs.skip_nonfinite(wrong)(f.carry, BATCH),
    "skip_nonfinite(moving=)": lambda wrong, f: fs.skip_nonfinite(step_of(), moving=wrong)(f.carry, BATCH),
    "with_ema(step)": lambda wrong, f: fs.with_ema(wrong, decay=0.9)(f.carry, BATCH),
    "with_ema(decay=)": lambda wrong, f: fs.with_ema(step_of(), decay=wrong)(f.carry, BATCH),
    "with_ema(of=)": lambda wrong, f: fs.with_ema(step_of(), decay=0.9, of=wrong)(EMA(f), BATCH),
    "with_ema(every=)": lambda wrong, f: fs.with_ema(step_of(), decay=0.9, every=wrong)(EMA(f), BATCH),
    "with_ema(step)(carry), its ema": lambda wrong, f: fs.with_ema(step_of(), decay=0.9)(
        f.carry._replace(state={"ema": wrong}), BATCH
    ),
    "scan_steps(step)": lambda wrong, f: fs.scan_steps(wrong)(f.carry, jnp.zeros((2, 3))),
    "scan_steps(unroll=)": lambda wrong, f: fs.scan_steps(step_of(), unroll=wrong)(f.carry, jnp.zeros((2, 3))),
    "stack_batches(batches)": lambda wrong, f: list(fs.stack_batches(wrong, 2)),
    "stack_batches(size)": lambda wrong, f: list(fs.stack_batches([BATCH], wrong)),
    "jit_step(step)": lambda wrong, f: fs.jit_step(wrong)(f.carry, BATCH),
    "jit_step(like=)": lambda wrong, f: fs.jit_step(step_of(), like=wrong, donate=False)(f.carry, BATCH),
    "jit_step(batch=)": lambda wrong, f: fs.jit_step(step_of(), batch=wrong, donate=False)(f.carry, BATCH),
    "adopt_carry(restored)": lambda wrong, f: fs.adopt_carry(wrong, f.carry),
    "adopt_carry(restored), its params": lambda wrong, f: fs.adopt_carry(f.carry._replace(params=wrong), f.carry),
    "adopt_carry(like)": lambda wrong, f: fs.adopt_carry(f.carry, wrong),
    "explain_step(step)": lambda wrong, f: fs.explain_step(wrong, f.carry, BATCH),
    "explain_step(carry)": lambda wrong, f: fs.explain_step(KEEPS, wrong, BATCH),
    "explain_step(batch)": lambda wrong, f: fs.explain_step(KEEPS, f.w, wrong),
    "what step returns to explain_step": lambda wrong, f: fs.explain_step(lambda c, b: wrong, f.w, BATCH),
    "assert_max_traces(fn)": lambda wrong, f: fs.assert_max_traces(wrong),
    "assert_max_traces(max_traces)": lambda wrong, f: fs.assert_max_traces(squares, wrong),
    "from_nnx(module)": lambda wrong, f: fs.from_nnx(wrong),
    "from_nnx(trainable=)": lambda wrong, f: fs.from_nnx(linear(), trainable=wrong),
    "from_nnx(method=)": lambda wrong, f: fs.from_nnx(linear(), method=wrong),
    "to_nnx(module)": lambda wrong, f: fs.to_nnx(wrong, {}, {}),
    "to_nnx(params)": lambda wrong, f: fs.to_nnx(linear(), wrong, {}),
    "to_nnx(state)": lambda wrong, f: fs.to_nnx(linear(), fs.from_nnx(linear())[1], {"params": wrong}),
}

# Right for this argument, although wrong for most: `accepted` is then the right outcome.
_ODD_TREES = {"an empty dict", "another structure", "keys that are no strings", "odd keys", "None as a leaf"}
_ARRAYS = {"an array of no element", "an array of rank 3", "an array on another device"}
_TREES = _ODD_TREES | _ARRAYS | {"500 levels", "10,000 leaves"}
_UNREAD = {"a deleted buffer", "a leaked tracer", "strings as leaves"}  # leaves are handed on, and not looked at
RIGHT: dict[str, set[str]] = {
    "split_params(trainable=)": {"None", "a class"},  # a class is a predicate like any callable
    "merge_state(params)": _TREES | _UNREAD,
    "merge_state(state)": _TREES | _UNREAD,
    "with_mutable(method=)": {"None", "a function"},
    "with_mutable(capture=)": {"an empty dict"},
    "with_rngs(axis_name=)": {"None"},
    "vmap_stateful(axis_name=)": {"None", "a string"},
    "vmap_stateful(params_axes=)": {"None"},
    "vmap_stateful(state_axes=)": {"None", "an empty dict"},
    "vmap_stateful(split_rngs=)": {"an empty dict"},
    "vmap_stateful(axis_size=)": {"None"},
    "vmap_stateful(spmd_axis_name=)": {"None", "a string"},
    "init_carry(params)": _TREES | {"None", "a number", "NaN", "a list", "an array"},  # optax takes any tree
    "init_carry(state)": _TREES | {"None", "a number", "NaN", "a list", "an array"},
    "init_carry(sharding=)": {"None"},
    "value_and_grad(axis_name=)": {"None"},
    "value_and_grad(overwrite=)": {"a string"},
    # as JAX: any tree of floats; this loss reads none of it
    "grad_fn(params)": _TREES | {"None", "a number", "NaN", "an array", "a deleted buffer", "a leaked tracer"},
    "grad_fn(state)": _TREES | _UNREAD,
    "with_optimizer(axis_name=)": {"None"},
    "with_ema(decay=)": {"a number"},
    "stack_batches(batches)": {"a list", "an array"},
    "jit_step(step)": {"a function"},  # of any form: it is called later
    "jit_step(like=)": {"None"},
    "jit_step(batch=)": {"None"},
    "adopt_carry(restored), its params": {"an array on another device"},
    "explain_step(carry)": (_TREES - {"an empty dict", "None as a leaf"})
    | {"a number", "NaN", "a list", "an array", "a deleted buffer", "a leaked tracer"},  # nothing runs
    "explain_step(batch)": set(KINDS),  # of which this step reads nothing
    "assert_max_traces(fn)": {"a class", "a function"},
    "from_nnx(method=)": {"None", "a function"},
    "to_nnx(state)": {"an empty dict"},
}

# Not for us to say: JAX's and Python's own errors, and why.
_LEAKED = {"a leaked tracer": "jax.UnexpectedTracerError"}  # says where the tracer was made, which we cannot
_NOT_CALLED_SO = {"a function": "builtins.TypeError"}  # Python names the function and the argument that it lacks
FOREIGN: dict[str, dict[str, str]] = {
    "with_mutable(fn)": _NOT_CALLED_SO,
    "with_rngs(fn)": _NOT_CALLED_SO,
    "with_ema(decay=)": {"a function": "builtins.TypeError", "a class": "builtins.TypeError"},  # the schedule's result
    "init_carry(params)": _LEAKED,
    "init_carry(state)": _LEAKED,
    "adopt_carry(restored), its params": _LEAKED,
    "with_ema(step)(carry), its ema": _LEAKED | {"an array on another device": "builtins.ValueError"},  # at an op
    "apply_gradients(grads)": _LEAKED
    | {"a deleted buffer": "builtins.RuntimeError", "an array on another device": "builtins.ValueError"},  # at an op
}


def outcome(call: str, kind: str, right: Fixed) -> str:
    """What a call ends in: the name of our error, that of another with its module, or `accepted`."""
    wrong = KINDS[kind]()
    try:
        CALLS[call](wrong, right)
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        return type(error).__name__ if module == "flaxsplit" else f"{module}.{type(error).__name__}"
    return "accepted"
