"""Refusals of what turns gradients into the next carry."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxsplit._describe import ABSENT, Difference, describe, differences, form_of, keyed_leaves
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError, StateDriftError, UntouchedStateWarning
from flaxsplit._types import Carry

from .carry import WITH_TX

_UPDATE = "apply_gradients(tx, carry, grads, new_state)"
_STEP = "step(carry, batch)"

_NO_CARRY = Refusal(
    SignatureError,
    _STEP,
    "the first argument must be a Carry",
    "params were passed, or a restored checkpoint was not adopted",
    "init_carry(params, state, tx), or adopt_carry(restored, carry)",
)


@Guess
def NO_CARRY(given: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """What was passed for a carry; a TrainState, which has an update of its own, is told apart."""
    row = _NO_CARRY.but(
        cause="a TrainState was passed, whose update is its own",
        fix="state.apply_gradients(grads=grads); or carry = adopt_carry(state, init_carry(state.params, {}, state.tx))",
    )
    return (row if hasattr(given, "apply_gradients") else _NO_CARRY)(f"carry: {form_of(given)}")


NOT_NUMERIC = Refusal(
    SignatureError,
    _STEP,
    "every leaf of the carry must be an array or a number",
    "the carry was put together by hand",
    "init_carry(params, state, tx)",
)
NO_COUNT = Refusal(
    SignatureError,
    _STEP,
    "carry.step must be the count of updates, i32[]",
    "the carry was put together by hand",
    "init_carry(params, state, tx), or carry._replace(step=jnp.int32(count))",
)
UNAVERAGED = Refusal(
    UntouchedStateWarning,
    "with_optimizer(loss_fn, tx)",
    "state['ema'] must be averaged, by with_ema around the step",
    "with_ema was forgotten, or the tree is of your own",
    "with_ema(with_optimizer(loss_fn, tx), decay=0.999); or state['extra'] for a tree of your own",
)
NOT_OVERWRITTEN = Refusal(
    UntouchedStateWarning,
    _UPDATE,
    "fp8 scales must be overwritten by their gradient at each update",
    "jax.value_and_grad differentiated the params alone, so the scales stay as they were made",
    "(loss, grads), state = value_and_grad(loss_fn)(carry.params, carry.state, batch)",
)
GRADS = Refusal(
    SignatureError,
    _UPDATE,
    "grads must have the structure and shapes of carry.params (params -> grads)",
    "the loss is still beside the gradients, or they belong to other params",
    "(loss, grads), state = value_and_grad(loss_fn)(carry.params, carry.state, batch)",
)


_VALUES = {"value": "loss", "grad": "grads"}
"""What is at hand in an open step, by the name that optax has for it."""
PER_EXAMPLE = Refusal(
    SignatureError,
    _UPDATE,
    "tx takes the gradient of each example, with a leading axis",
    "tx clips every example's gradient (differential privacy), and got their mean",
    "(loss, grads), state = vmap_stateful(value_and_grad(loss_fn))(carry.params, carry.state, batch); "
    "carry = apply_gradients(tx, carry, grads, state)",
)


def _takes(tx: optax.GradientTransformation, carry: Carry, leading: tuple[int, ...]) -> bool:
    """Whether the optimizer takes gradients that have these axes before those of the params."""

    def update(params: Any, opt_state: Any) -> Any:
        grads = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*leading, *leaf.shape)), params)
        return tx.update(grads, opt_state, params)

    try:
        jax.eval_shape(update, carry.params, carry.opt_state)
    except Exception:
        return False
    return True


_OTHER_DTYPE = Refusal(
    SignatureError,
    _UPDATE,
    "grads must have the dtypes of carry.params, since tx keeps them in carry.opt_state (params -> grads)",
    "the gradients were computed or summed in another precision than the params are kept in",
    "grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, carry.params)",
)
_EXTRA = Refusal(
    SignatureError,
    _UPDATE,
    "tx asks for optax's extra arguments",
    "the step is open, and the arguments that with_optimizer passes by itself are missing",
    "apply_gradients(tx, carry, grads, new_state, $given); or with_optimizer(loss_fn, tx)",
)


_LOOKAHEAD = Refusal(
    SignatureError,
    _UPDATE,
    "under optax.lookahead carry.params must be optax.LookaheadParams: fast params and slow ones",
    "the carry was made from the params alone",
    "init_carry(optax.LookaheadParams.init_synced(params), state, tx)",
)
_UNSETTLED = Refusal(
    SignatureError,
    _UPDATE,
    "tx.update must give opt_state the form that tx.init gave it (init -> update)",
    "tx adds leaves at its first update, as optax.monitor does: the step would compile twice",
    "first = jax.eval_shape(tx.update, carry.params, carry.opt_state, carry.params)[1]; carry = adopt_carry(carry, "
    "carry._replace(opt_state=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, "
    "device=carry.step.sharding), first)), strict=False)",
)


@Guess
def OPT_STATE(error: Exception, tx: optax.GradientTransformation, carry: Carry, grads: Any) -> Explained:  # noqa: N802
    """An error of the optimizer: ours, where it is a known one; else its own."""
    if isinstance(error, StateDriftError):
        pairs = zip(keyed_leaves(grads, "grads").items(), jax.tree.leaves(carry.params), strict=False)
        cast = [
            f"{path}: {describe(param)} -> {describe(grad)}"
            for (path, grad), param in pairs
            if jnp.result_type(grad) != jnp.result_type(param)
        ]
        if cast:
            return _OTHER_DTYPE(*cast)
        if all(_is_new_in_opt_state(line) for line in error.leaves) and not _misfits(tx, carry):
            return _UNSETTLED(*error.leaves)
        raise error
    if isinstance(error, AttributeError) and "'fast'" in str(error):
        return _LOOKAHEAD(f"carry.params: {describe(carry.params)}")
    missing = re.search(r"missing \d+ required keyword-only arguments?: (.*)", str(error))
    if isinstance(error, TypeError) and missing:
        names = re.findall(r"'(\w+)'", missing[1])
        given = ", ".join(f"{name}={_VALUES.get(name, '...')}" for name in names)
        return _EXTRA(*(f"{name}: not given" for name in names), given=given)
    made = _misfits(tx, carry)
    if not made and _takes(tx, carry, (2,)) and not _takes(tx, carry, ()):
        return PER_EXAMPLE(f"grads: like carry.params, without an axis of examples ({type(error).__name__})")
    if not made:
        raise error
    return SignatureError(
        _UPDATE,
        "carry.opt_state must be what tx.init(params) gives (tx -> carry)",
        [str(each) for each in made],
        "the carry was made with another tx, or for other params",
        WITH_TX,
    )


def _is_new_in_opt_state(line: str) -> bool:
    return line.startswith("opt_state") and f": {ABSENT} ->" in line


def _misfits(tx: optax.GradientTransformation, carry: Carry) -> list[Difference]:
    """Where the carry's `opt_state` is not what `tx` makes for its params."""
    made = jax.eval_shape(tx.init, carry.params)
    return differences(_strong(made), _strong(carry.opt_state), "carry.opt_state")


def _strong(tree: Any) -> Any:
    """A weak type in the optimizer's state is no difference: a carry has none."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
