"""A step that is not taken if its numbers are not finite."""

import fnmatch
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from ._checks import check_kept, checked, is_function, two_of
from ._drift import check_drift
from ._paths import bare_path
from ._refusals.keep import FINITE_STEP, MOVING, UNMOVED
from ._types import CarryStepT
from ._update import check_carry
from ._upstream import varying_axes
from ._wraps import wraps

KEYS = "state/rngs/*"
"""Moves at each step, taken or not: the same keys would meet the same batch with the same masks."""


@checked
def skip_nonfinite(step: CarryStepT, *, moving: str | Sequence[str] = ()) -> CarryStepT:
    """Takes a step only if its results are finite; else keeps the whole old carry, with fresh keys.

    Law: if the new carry and the loss are finite, equals `step` (bit for bit, as far as XLA fuses both alike). If not,
    returns the old carry, except `state['rngs']` and the leaves of `moving`, and `out` unchanged.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> loss_fn = lambda params, state, batch: (jnp.sum(params["w"] * batch), state)
    >>> tx = optax.sgd(1.0)
    >>> step = fs.skip_nonfinite(fs.with_optimizer(loss_fn, tx))
    >>> carry, loss = step(fs.init_carry({"w": jnp.ones(2)}, {}, tx), jnp.array([1.0, jnp.nan]))
    >>> int(carry.step), carry.params["w"].tolist(), float(loss)
    (0, [1.0, 1.0], nan)

    Args:
        step: a step over a `Carry` that averages its gradients itself. Only `scan_steps` and `jit_step` go outside.
        moving: leaves that change even if the step is not taken, such as a loss scale: one or several globs on the
            `/`-joined path in the carry, `"state/extra/scale/*"`.

    Returns:
        A step with the same `out`. `carry.step` counts the steps that were taken.

    Raises:
        SignatureError: `moving` is not a glob.
        CollectionError: a glob matches nothing.

    As `optax.apply_if_finite`, but for the whole carry: also batch statistics, averages and moments, and without a
    limit. A bad batch costs one step, not the run. Leaves that were not finite before the step, such as a best loss
    that starts at infinity, are not checked. Under `jax.shard_map` either all devices take a step or none, after each
    checked its own part of the carry. With `check_vma=False` JAX does not know what is in parts, so all devices must
    have the same loss, averaged.
    """
    FINITE_STEP.unless(is_function(step), step=step)
    globs: Any = (moving,) if isinstance(moving, str) else moving
    MOVING.unless(isinstance(globs, Sequence) and all(isinstance(each, str) for each in globs), moving=moving)

    @wraps(step)
    def skipping(carry: Any, batch: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        check_carry(carry)
        paths = [bare_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(carry)[0]]
        lost = [glob for glob in globs if not any(fnmatch.fnmatchcase(path, glob) for path in paths)]
        UNMOVED.unless(not lost, lost, paths)
        result = step(carry, batch, *args, **kwargs)
        new_carry, out = two_of(result, "skip_nonfinite(step)", "step(carry, batch) -> (carry, out)")
        check_kept("skip_nonfinite(step)", carry)
        new_carry = check_drift("skip_nonfinite(step)", "carry", carry, new_carry)
        taken = _everywhere(_is_finite(new_carry, carry) & _is_finite(out[0] if isinstance(out, tuple) else out))
        taken = jax.lax.optimization_barrier(taken)  # XLA would work it out again for each leaf that it chooses
        old, treedef = jax.tree.flatten(carry)
        moves = [any(fnmatch.fnmatchcase(path, glob) for glob in (KEYS, *globs)) for path in paths]
        leaves = zip(moves, jax.tree.leaves(new_carry), old, strict=True)
        kept = [new if move else jnp.where(taken, new, before) for move, new, before in leaves]
        return jax.tree.unflatten(treedef, kept), out

    return cast(CarryStepT, skipping)


def _is_finite(tree: Any, before: Any = None) -> Any:
    """Whether nothing floating in a tree is infinite or no number, but where it was so before."""
    new = jax.tree.leaves(tree)
    old = [None] * len(new) if before is None else jax.tree.leaves(before)
    fine = [
        jnp.all(jnp.isfinite(leaf) if was is None else jnp.isfinite(leaf) | ~jnp.isfinite(was))
        for leaf, was in zip(new, old, strict=True)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.stack(fine).all() if fine else jnp.array(True)


def _everywhere(taken: Any) -> Any:
    """Under `shard_map` all devices take a step or none does, each having seen its own part."""
    axes = varying_axes(taken)
    return jax.lax.pmin(taken.astype(jnp.int32), axes) == 1 if axes else taken
