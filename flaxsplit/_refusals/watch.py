"""Refusals of what watches the compiler."""

from collections.abc import Sequence
from typing import Any

from flaxsplit._describe import Difference, differences
from flaxsplit._errors import Explained, Guess, RetraceError, RetraceWarning
from flaxsplit._upstream import is_under_pmap
from flaxsplit._wraps import name_of

from .options import form

UNPLACED = "{}: {}; jit_step(step, like=carry, batch=sharding) splits a batch"
"""A line below the table of `compile_log`: the function, and its arguments."""
TRACED = form("assert_max_traces(fn)", "fn must be a function", "assert_max_traces(step)")


@Guess
def RETRACED(fn: Any, seen: Sequence[Any], call: dict[str, Any], most: int) -> Explained:  # noqa: N802 (a row)
    """One trace more than is due, beside the earlier one that is nearest."""
    changed = min((_changed(earlier, call) for earlier in seen), key=len)
    cause = "jax.jit was applied anew to a new function object, its cache or jax.config changed, or fn ran unjitted"
    fix = "step = jit_step(...) once, before the loop"
    if changed:
        cause = "the call differs from all earlier ones, and JAX compiles each"
        fix = _fix(changed) + "; or a higher max_traces, if each is meant"
    elif hasattr(fn, "lower"):
        cause = "the count is around what is jitted, so that it counts every call"
        fix = "step = jit_step(assert_max_traces(step))"
    elif is_under_pmap():
        cause = "jax.pmap traces once more, where its outputs come back as inputs: they are placed as it places them"
        fix = (
            f"jax.pmap(assert_max_traces(step, max_traces={most + 1}), ...); or jax.jit over a mesh, which traces once"
        )
    return RetraceError(
        f"assert_max_traces({name_of(fn)}, max_traces={most})",
        f"traced {len(seen) + 1} times",
        [str(each) for each in changed] or ["no argument changed"],
        cause,
        fix,
    )


@Guess
def REMADE(name: str, most: int) -> Explained:  # noqa: N802 (a row as the others are)
    """A function that the same lines made of the same things before, and that was traced with equal arguments then."""
    return RetraceWarning(
        f"assert_max_traces({name}, max_traces={most})",
        "a step must be made once, and not anew for each epoch",
        ["another function, of the same code over equal values, was traced with equal arguments"],
        "the step is made in a loop, or in a function that is called for each epoch, and JAX compiles each",
        "step = jit_step(...) once, before the loop; or a higher max_traces, if each is meant",
    )


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[Difference]:
    both = {**before, **after}
    return [each for name in both for each in differences(before.get(name), after.get(name), name)]


def _fix(changed: list[Difference]) -> str:
    if any("state['params']" in each.path for each in changed):
        return "a step of its own for each choice of trainable: jit_step(assert_max_traces(step)) anew"
    return "; ".join(dict.fromkeys(_MENDED[each.kind] for each in changed))


_MENDED = {
    "structure": "keep the structure, and make static values, tx and functions once, outside the loop",
    "rows": "drop or pad the ragged last batch",
    "shape": "state = settle_state(loss_fn, params, state, batch) before init_carry",
    "dtype": "jnp.asarray(value, dtype), one dtype in every call",
    "weak": "init_carry for the carry, jnp.asarray(value, dtype) for Python numbers",
    "place": "jit_step(step, like=carry), and every batch put on the mesh alike",
}
