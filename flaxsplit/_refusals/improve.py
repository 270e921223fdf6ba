"""Refusals of what turns a loss into a step: gradients, and updates."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxsplit._describe import describe, differences, form_of, is_array, same_structure
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError, UnsyncedStateError, UntouchedStateWarning
from flaxsplit._types import Carry

from .carry import WITH_TX
from .options import LISTED, form, function, unbound

_GRADIENT = "value_and_grad(loss_fn)"
_UPDATE = "apply_gradients(tx, carry, grads, new_state)"
_STEP = "step(carry, batch)"

# ---- value_and_grad

LOSS_FN = function(_GRADIENT, "loss_fn", "def loss_fn(params, state, batch): ...; return loss, new_state")
OVERWRITE = form(
    "value_and_grad(overwrite=...)",
    "overwrite must be the name of a collection",
    "value_and_grad(loss_fn, overwrite='fp8_metas')",
)
HALVES = Refusal(
    SignatureError,
    _GRADIENT,
    "params and state come first, and state is a mapping",
    "the carry was passed whole, or an argument was forgotten",
    "grad_fn(carry.params, carry.state, batch)",
)
NOT_DIFFERENTIABLE = Refusal(
    SignatureError,
    _GRADIENT,
    "every param must be differentiable: of a floating or complex dtype",
    "counters or keys were split off as params",
    "split_params(variables, trainable=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))",
)
INDIVISIBLE = Refusal(
    SignatureError,
    "value_and_grad(loss_fn, microbatches=...)",
    "the leading axis of every batch leaf must be divisible by $count",
    "a ragged last batch, or what every microbatch shares (a key, a number) is in the batch",
    "drop or pad the last batch, or pass what is shared after the batch: step(carry, batch, key)",
)
NO_BATCH = INDIVISIBLE.but(
    cause="the batch holds no array, so that there is nothing to split",
    fix="microbatches=1, or the arrays that are to be split in batch",
)
UNEVEN = Refusal(
    SignatureError,
    "value_and_grad(loss_fn, microbatches=...)",
    "each of $count microbatches must give every device of its mesh axes the same number of rows",
    "the batch is too small for so many microbatches on so many devices",
    "a number of rows that $count times the size of those axes divides, or fewer microbatches",
)
UNSYNCED = Refusal(
    UnsyncedStateError,
    "value_and_grad(axis_name=...)",
    "state must come out the same on every device of the axis $axis",
    "a layer that updates its state has no axis_name, or lacks this one",
    "nn.BatchNorm(..., axis_name=$axis); or jax.lax.pmean(leaf, $axis) in loss_fn",
)


_ZERO_GRADIENT = Refusal(
    UntouchedStateWarning,
    _GRADIENT,
    "the loss must be computed from the params that loss_fn is given",
    "loss_fn uses params from outside of it, or jax.lax.stop_gradient is around them",
    "def loss_fn(params, state, batch): out, state = fn(params, state, batch); ...",
)


@Guess
def ZERO_GRADIENT(params: Mapping[str, Any]) -> Explained:  # noqa: N802 (a row as the others are)
    """Params that a loss does not use, not one of them."""
    return _ZERO_GRADIENT(*(f"{path}: the gradient is zero" for path in params))


@Guess
def ARGUMENTS(error: Exception, loss_fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Explained:  # noqa: N802
    """A loss function that does not take what it is called with; any other error stays as it is."""
    why, names = unbound(loss_fn, args, kwargs)
    if not why:
        raise error
    given = ["params", "state", "batch", *map(describe, args[3:]), *kwargs]
    cause = "an argument of the call is not one of loss_fn"
    if names[:1] == ["carry"]:
        cause = "a step was passed, which has a gradient and an optimizer already"
    elif len(names) < 3:
        cause = "the state or the batch came in by a closure"
    return SignatureError(
        _GRADIENT,
        f"loss_fn is called as loss_fn({', '.join(given)})",
        [f"loss_fn({', '.join(names)}): {why}"],
        cause,
        "def loss_fn(params, state, batch): ...; return loss, new_state",
    )


@Guess
def MISRETURNED(result: Any, has_aux: bool, params: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """What a loss function returned, which is no loss with a new state."""
    form = "return (loss, aux), new_state" if has_aux else "return loss, new_state"
    if isinstance(result, tuple) and len(result) == 2 and _are_gradients(result[1], params):
        came, cause = "a value and a tree like params", "loss_fn is differentiated already, by jax.value_and_grad"
        return _misreturned("a loss and the new state", came, cause, "value_and_grad(loss_fn), with the loss itself")
    if not isinstance(result, tuple) or len(result) != 2:
        if isinstance(result, tuple) and len(result) > 2:
            cause, form = "aux is beside the loss, not with it", "return (loss, aux), new_state, and has_aux=True"
        else:
            cause = LISTED if isinstance(result, list) else "the new state was not returned"
        return _misreturned("two things", form_of(result), cause, form)
    out = result[0]
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        required = "((loss, aux), new_state) where has_aux=True"
        cause = LISTED if isinstance(out, list) else "aux is missing"
        return _misreturned(required, f"out: {form_of(out)}", cause, form)
    loss = out[0] if has_aux else out
    if not has_aux and isinstance(loss, tuple):
        cause, fix = "loss_fn returns aux as well", "value_and_grad(loss_fn, has_aux=True), or with_optimizer likewise"
        return _misreturned("a scalar loss first", f"out: {form_of(loss)}", cause, fix)
    cause, instead = _unlike_a_loss(loss)
    return _misreturned("a real scalar loss, f32[]", f"loss: {form_of(loss)}", cause, form.replace("loss", instead, 1))


def _are_gradients(tree: Any, params: Any) -> bool:
    return bool(jax.tree.leaves(params)) and same_structure(tree, params)


def _misreturned(required: str, came: str, cause: str, fix: str) -> Explained:
    return SignatureError(_GRADIENT, f"loss_fn must return {required}", [came], cause, fix)


def _unlike_a_loss(loss: Any) -> tuple[str, str]:
    if isinstance(loss, Mapping):
        return "loss and state were swapped", "loss"
    if not is_array(loss):
        return "a Python object has no gradient", "jnp.mean(per_example)"
    if jnp.issubdtype(loss.dtype, jnp.complexfloating):
        return "the loss is complex", "jnp.abs(loss).mean()"
    if loss.shape == ():
        return "a count or a truth value has no gradient", "jnp.mean(per_example)"
    return "the loss was not reduced to one number", "loss.mean()"


# ---- apply_gradients, with_optimizer

NO_CARRY = Refusal(
    SignatureError,
    _STEP,
    "the first argument must be a Carry",
    "params were passed, or what a checkpoint gave back was not adopted",
    "init_carry(params, state, tx), or adopt_carry(restored, carry)",
)
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
GRADS = Refusal(
    SignatureError,
    _UPDATE,
    "grads must have the structure and shapes of carry.params (params -> grads)",
    "the value came with the gradients, or they are of other params",
    "(loss, grads), state = value_and_grad(loss_fn)(carry.params, carry.state, batch)",
)


PER_EXAMPLE = Refusal(
    SignatureError,
    _UPDATE,
    "tx takes the gradient of each example, with a leading axis",
    "tx clips every example's gradient (differential privacy), and got their mean",
    "(loss, grads), state = vmap_stateful(value_and_grad(loss_fn))(carry.params, carry.state, batch), then "
    "apply_gradients(tx, carry, grads, state)",
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


@Guess
def OPT_STATE(error: Exception, tx: optax.GradientTransformation, carry: Carry) -> Explained:  # noqa: N802
    """An error of the optimizer: ours, where the carry was made for another one; else its own."""
    made = differences(_strong(jax.eval_shape(tx.init, carry.params)), _strong(carry.opt_state), "carry.opt_state")
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


def _strong(tree: Any) -> Any:
    """A weak type in the optimizer's state is no difference: a carry has none."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
