"""Refusals of what turns a loss into gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxsplit._describe import describe, form_of, is_array, keyed_leaves, same_leaves, same_structure
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError, UnsyncedStateError, UntouchedStateWarning
from flaxsplit._upstream import is_about_explicit, is_about_mask, is_about_meshes

from .options import LISTED, form, function, mesh_in_type, unbound

_GRADIENT = "value_and_grad(loss_fn)"

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
    "as many rows as a multiple of $count times the size of those axes, or fewer microbatches",
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
        came, cause, fix = "a value and params", "params were returned where the new state is due", form
        if not same_leaves(result[1], params):
            came, cause = "a value and a tree like params", "loss_fn is differentiated already, by jax.value_and_grad"
            fix = "value_and_grad(loss_fn), with the loss itself"
        return _misreturned("a loss and the new state", came, cause, fix)
    if not isinstance(result, tuple) or len(result) != 2:
        if isinstance(result, tuple) and len(result) > 2:
            cause, form = "aux is beside the loss, not with it", "return (loss, aux), new_state, and has_aux=True"
        else:
            cause = LISTED if isinstance(result, list) else "the new state was not returned"
        return _misreturned("two things", form_of(result), cause, form)
    out = result[0]
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        required = "((loss, aux), new_state) where has_aux=True"
        cause = LISTED if isinstance(out, list) else "aux is missing, or is not beside the loss"
        return _misreturned(required, f"out: {form_of(out)}", cause, form)
    loss = out[0] if has_aux else out
    if not has_aux and isinstance(loss, tuple):
        fix = "value_and_grad(loss_fn, has_aux=True), with_optimizer(loss_fn, tx, has_aux=True)"
        return _misreturned("a scalar loss first", f"out: {form_of(loss)}", "loss_fn returns aux as well", fix)
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


@Guess
def UNCOMPUTED(  # noqa: N802
    error: Exception, params: Any, state: Any, batch: Any, further: Any, count: int
) -> Explained:
    """An error in the loss: ours, where it has one of three causes that its words do not say; else its own."""
    if isinstance(error, Explained):
        raise error
    if is_about_explicit(error):
        return _elsewhere(error, params, state, batch) or _untold(error, params, batch)
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if is_array(leaf) and leaf.shape}
    leaves = {name: leaf for tree in further for name, leaf in keyed_leaves(tree, "argument").items() if is_array(leaf)}
    whole = [f"{name}: {describe(leaf)}" for name, leaf in leaves.items() if leaf.shape and leaf.shape[0] in rows]
    if count == 1 or not whole or not isinstance(error, TypeError | ValueError):
        raise error
    return SignatureError(
        "value_and_grad(loss_fn, microbatches=...)",
        f"what is split into {count} parts must be in the batch: further arguments go to each part whole",
        [*whole, f"{type(error).__name__} in loss_fn"],
        "the batch was passed as several arguments",
        "def loss_fn(params, state, batch): x, y = batch; ..., and step(carry, (x, y))",
    )


_ELSEWHERE = Refusal(
    SignatureError,
    _GRADIENT,
    "on a mesh of Explicit axes the carry and the batch must lie on one mesh",
    "the carry was made on one device, and not placed on the mesh",
    "carry = jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))",
)
_ON_ANOTHER = _ELSEWHERE.but(cause="the carry was placed on another mesh than the batch")
_ON_NONE = _ELSEWHERE.but(
    cause="the batch was left on one device",
    fix="jit_step(step, like=carry, batch=NamedSharding(mesh, PartitionSpec('data')))",
)


def _elsewhere(error: Exception, params: Any, state: Any, batch: Any) -> Explained | None:
    """What lies on another mesh than the batch does; of params also on none, since JAX cannot place its gradient."""
    learned, read, given = keyed_leaves(params, "params"), keyed_leaves(state, "state"), keyed_leaves(batch, "batch")
    home = {mesh_in_type(leaf) for leaf in given.values()} - {""}
    wrong = {path: leaf for path, leaf in learned.items() if mesh_in_type(leaf) not in home}
    wrong |= {path: leaf for path, leaf in read.items() if mesh_in_type(leaf) not in {"", *home}}
    if home and wrong:
        row = _ON_ANOTHER if any(map(mesh_in_type, wrong.values())) else _ELSEWHERE
        return row(*_with_meshes(given | wrong))
    if wrong and not _split(learned):
        return _ON_NONE(*_with_meshes(given | wrong))
    if is_about_meshes(error):
        raise error
    return None


def _with_meshes(leaves: Mapping[str, Any]) -> list[str]:
    return [f"{path}: {describe(leaf)}, {mesh_in_type(leaf) or 'no mesh'}" for path, leaf in leaves.items()]


def _split(leaves: Mapping[str, Any]) -> list[str]:
    return [f"{path}: {describe(leaf)}" for path, leaf in leaves.items() if "@" in describe(leaf)]


def _untold(error: Exception, params: Any, batch: Any) -> Explained:
    """On a mesh of Explicit axes, which `jax.make_mesh` makes, JAX places no result and gathers no weight by itself."""
    split = _split(keyed_leaves(params, "params") | keyed_leaves(batch, "batch"))
    cause = "an operation of the model was written for Auto axes"
    if is_about_mask(error):
        cause = "a mask lies elsewhere than what it masks, as that of nn.Dropout does (google/flax#5209)"
    elif any(line.startswith("params") for line in split):
        cause = "params are split along an axis of the mesh, and nothing says where they are gathered"
    return SignatureError(
        _GRADIENT,
        "on a mesh of Explicit axes each operation of the loss must say where its result lies",
        [*split, f"{type(error).__name__} in loss_fn"],
        cause,
        "with_optimizer(jax.sharding.auto_axes(loss_fn, out_sharding=NamedSharding(mesh, PartitionSpec())), tx); "
        "or jax.make_mesh(..., axis_types=(AxisType.Auto,))",
    )
