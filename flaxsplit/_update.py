"""From gradients to the next carry, and both in one: a loss function becomes a step."""

import inspect
from contextvars import ContextVar
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ._checks import check_tx, checked
from ._describe import describe, differences, is_array, is_numeric, same_leaves, same_structure
from ._drift import check_drift
from ._gradient import mean_loss, value_and_grad
from ._refusals.update import GRADS, NO_CARRY, NO_COUNT, NOT_NUMERIC, NOT_OVERWRITTEN, OPT_STATE, UNAVERAGED
from ._types import OVERWRITTEN, AuxT, AxisName, BatchT, Carry, GivenLoss, HostStep, P, State, Transformation
from ._wraps import wraps

AVERAGED: ContextVar[bool] = ContextVar("averaged", default=False)
"""Whether `with_ema` is around what is called."""


@checked
def apply_gradients(tx: Transformation, carry: Carry, grads: Any, new_state: State, **extra: Any) -> Carry:
    """Updates the params by gradients, and counts the update: the next carry.

    Law: equals `tx.update`, `optax.apply_updates`, `carry.step + 1` and the new state, in a `Carry`.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> tx = optax.sgd(0.5)
    >>> carry = fs.init_carry({"w": jnp.ones(3)}, {}, tx)
    >>> carry = fs.apply_gradients(tx, carry, {"w": jnp.ones(3)}, carry.state)
    >>> carry.params["w"], carry.step
    (Array([0.5, 0.5, 0.5], dtype=float32), Array(1, dtype=int32))

    Args:
        tx: the optax transformation that the carry was made with.
        carry: the carry that the step was given.
        grads: a tree like `carry.params`, as from `value_and_grad`; under `optax.lookahead` like `carry.params.fast`.
            Those of complex params are conjugated here, since optax wants what JAX's gradient is the conjugate of.
        new_state: the state that came with the gradients.
        extra: optax's extra arguments (`value=loss`, ...); `tx.update` gets those that it takes.

    Returns:
        The next carry.

    Raises:
        SignatureError: `grads` is not a tree like the params, or the carry was made for another optimizer.
        StateDriftError: state, params or opt_state would come out in another structure, shape or dtype.
        UntouchedStateWarning: fp8 scales in the state come back as they were: they were not overwritten.

    As `TrainState.apply_gradients`, but a function, with the state beside the gradients.
    """
    where = "apply_gradients(tx, carry, grads, new_state)"
    check_tx(where, tx)
    check_carry(carry)
    _check_grads(carry.params, grads)
    new_state = check_drift(where, "state", carry.state, new_state)
    if OVERWRITTEN in carry.state and same_leaves(carry.state[OVERWRITTEN], new_state[OVERWRITTEN]):
        NOT_OVERWRITTEN.warn(f"state[{OVERWRITTEN!r}]: stays as it is")
    try:
        updates, opt_state = tx.update(ascent(grads), carry.opt_state, carry.params, **_taken(tx, extra))
        params = check_drift(where, "params", carry.params, optax.apply_updates(carry.params, updates))
        opt_state = check_drift(where, "opt_state", carry.opt_state, opt_state)
    except Exception as error:
        OPT_STATE.instead_of(error, error, tx, carry, grads)
    return Carry(carry.step + 1, params, new_state, opt_state)


@overload
def with_optimizer(
    loss_fn: GivenLoss[Any, BatchT, P, tuple[Float[Array, ""], AuxT]],
    tx: Transformation,
    *,
    has_aux: Literal[True],
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    overwrite: str = ...,
) -> HostStep[BatchT, tuple[Float[Array, ""], AuxT], P]: ...
@overload
def with_optimizer(
    loss_fn: GivenLoss[Any, BatchT, P, Float[Array, ""]],
    tx: Transformation,
    *,
    has_aux: Literal[False] = False,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    overwrite: str = ...,
) -> HostStep[BatchT, Float[Array, ""], P]: ...
@checked
def with_optimizer(
    loss_fn: Any,
    tx: Transformation,
    *,
    has_aux: bool = False,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    overwrite: str = OVERWRITTEN,
) -> Any:
    """Turns a loss function into a step: `step(carry, batch) -> (carry, loss)`.

    Law: equals `value_and_grad` followed by `apply_gradients`, bit for bit; so it equals the loop written out:
    `jax.value_and_grad(loss_fn, has_aux=True)`, `tx.update`, `optax.apply_updates`, with the state threaded.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> def loss_fn(params, state, batch):
    ...     return jnp.sum((params["w"] - batch) ** 2), state
    >>> tx = optax.sgd(0.1)
    >>> carry, loss = fs.with_optimizer(loss_fn, tx)(fs.init_carry({"w": jnp.ones(3)}, {}, tx), jnp.zeros(3))
    >>> float(loss), carry.step
    (3.0, Array(1, dtype=int32))

    Args:
        loss_fn: `(params, state, batch, *args, **kwargs) -> (loss, new_state)`, the loss a real scalar. Under
            `optax.lookahead`, whose params are a pair, it is given the fast ones.
        tx: an optax transformation; `value=`, `grad=`, `value_fn=`, `grad_fn=` and `obj_fn=` reach one that takes them.
        has_aux: whether `loss_fn` returns `((loss, aux), new_state)`; the step's `out` is then `(loss, aux)`.
        microbatches: as in `value_and_grad`.
        axis_name: as in `value_and_grad`.
        overwrite: as in `value_and_grad`.

    Returns:
        A step, `(carry, batch, *args, **kwargs)`: with `batch` alone the body that `jax.lax.scan` takes. Further
        arguments go to `loss_fn` as they are. Not jitted: see `jit_step`.

    Raises:
        SignatureError: as `value_and_grad`; or the carry was made for another optimizer.
        StateDriftError: state, params or opt_state would come out in another structure, shape or dtype.
        UnsyncedStateError: under `shard_map` a state leaf would come out different per device of `axis_name`.

    As the update step of Flax's guide on managing params and state, in one call.
    """
    check_tx("with_optimizer(loss_fn, tx)", tx)
    options: Any = {"has_aux": has_aux, "microbatches": microbatches, "axis_name": axis_name}
    grads_of: Any = value_and_grad(loss_fn, **options, overwrite=overwrite)
    loss_of = mean_loss(loss_fn, **options)

    @wraps(loss_fn, ("carry",), replaces=2)
    def step(carry: Carry, batch: Any, *args: Any, **kwargs: Any) -> tuple[Carry, Any]:
        check_carry(carry)
        if "ema" in carry.state and not AVERAGED.get():
            UNAVERAGED.warn("state['ema']: stays as it is")

        # a line search of optax fails on an extra argument that its value_fn does not name
        def value_fn(_params: Any, grad_fn: Any = None, obj_fn: Any = None) -> Any:
            del grad_fn, obj_fn
            return loss_of(_params, carry.state, batch, *args, **kwargs)

        def grad_fn(_params: Any, *_: Any) -> Any:
            return ascent(grads_of(_params, carry.state, batch, *args, **kwargs)[0][1])

        (value, grads), new_state = grads_of(trained(carry.params), carry.state, batch, *args, **kwargs)
        loss = value[0] if has_aux else value
        extra: Any = {"grad": ascent(grads), "grad_fn": grad_fn, "value_fn": value_fn, "obj_fn": value_fn}
        return apply_gradients(tx, carry, grads, new_state, value=loss, **extra), value

    return step


def _taken(tx: Transformation, extra: dict[str, Any]) -> dict[str, Any]:
    """What `tx.update` takes of optax's extra arguments. Some transformations take one by name and no other."""
    parameters = inspect.signature(tx.update).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return extra
    return {each.name: extra[each.name] for each in parameters if each.name in extra}


def check_carry(carry: Any) -> None:
    """Recognises what is often passed for a carry."""
    NO_CARRY.unless(isinstance(carry, Carry), carry)
    NOT_NUMERIC.unless_all(is_numeric, carry, "carry")
    is_count = (is_array(carry.step) or isinstance(carry.step, int)) and not jnp.shape(carry.step)
    NO_COUNT.unless(is_count, f"carry.step: {describe(carry.step)}")


def trained(params: Any) -> Any:
    """What a loss sees of the params: `optax.lookahead` keeps a slow copy beside them, which has no gradient."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def ascent(grads: Any) -> Any:
    """The gradients as optax wants them: JAX's own, but for complex params, where they are the conjugate."""
    return jax.tree.map(lambda leaf: leaf.conj() if jnp.iscomplexobj(leaf) else leaf, grads)


def _check_grads(params: Any, grads: Any) -> None:
    """Compares structure and shapes; a transformation may want each example's own gradients, with a leading axis."""
    params = trained(params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=False)
    fits = same_structure(params, grads) and all(
        jnp.shape(grad)[-jnp.ndim(param) :] == jnp.shape(param) for param, grad in pairs if jnp.ndim(param)
    )
    GRADS.if_any(() if fits else map(str, differences(params, grads, "grads")))
