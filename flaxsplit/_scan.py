"""Many steps in one dispatch, and the batches for them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import check_count, checked, is_function, two_of
from ._describe import describe, is_array, is_numeric
from ._drift import check_drift
from ._refusals.many import BATCH, BATCHES, LEADING, OUT, SCAN_STEP, leading
from ._types import StepT
from ._wraps import wraps

BatchT = TypeVar("BatchT")


@checked
def scan_steps(step: StepT, *, unroll: int = 1) -> StepT:
    """Runs many steps in one dispatch: `(carry, batches) -> (carry, outs)` over a leading axis.

    Law: equals calling `step` in a loop and stacking the outs. Equals `lambda c, b: jax.lax.scan(step, c, b)`.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> fs.scan_steps(lambda carry, batch: (carry + batch, carry))(jnp.int32(0), jnp.arange(4))
    (Array(6, dtype=int32), Array([0, 0, 1, 3], dtype=int32))

    Args:
        step: a step over any carry.
        unroll: as in `jax.lax.scan`.

    Returns:
        A step over stacked batches; see `stack_batches`. It passes further arguments to each step as they are.

    Raises:
        SignatureError: the batches' leading axes differ, or an output is not an array.
        StateDriftError: the carry comes out with another structure, shape or dtype.
    """
    SCAN_STEP.unless(is_function(step), step=step)
    if not isinstance(unroll, bool):
        check_count("scan_steps(step, unroll=...)", unroll)

    @wraps(step)
    def scanned(carry: Any, batches: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        def body(_carry: Any, _batch: Any) -> tuple[Any, Any]:
            _result = step(_carry, _batch, *args, **kwargs)
            _new_carry, _out = two_of(_result, "scan_steps(step)", "step(carry, batch) -> (carry, out)")
            OUT.unless_all(is_numeric, _out, "out", say=describe, where="scan_steps(step)")
            return check_drift("scan_steps(step)", "carry", _carry, _new_carry), _out

        LEADING.if_any(() if _have_one_axis(batches) else leading(batches))
        return jax.lax.scan(body, carry, batches, unroll=unroll)

    return cast(StepT, scanned)


def _have_one_axis(batches: Any) -> bool:
    sizes = {leaf.shape[0] if is_array(leaf) and leaf.shape else None for leaf in jax.tree.leaves(batches)}
    return len(sizes) == 1 and None not in sizes


@checked
def stack_batches(batches: Iterable[BatchT], size: int) -> Iterator[BatchT]:
    """Stacks batches from any iterable, `size` at a time, for `scan_steps`.

    Law: `[b for stack in stack_batches(batches, n) for b in unstacked(stack)] == list(batches)`: no batch is lost.

    >>> import numpy as np, flaxsplit as fs
    >>> ragged = [np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((1, 2))]
    >>> [stack.shape for stack in fs.stack_batches(ragged, 2)]
    [(2, 4, 2), (1, 4, 2), (1, 1, 2)]

    Args:
        batches: an iterable of batches; it is read lazily, so it may be endless.
        size: the number of batches in a stack.

    Yields:
        Stacks of `size` batches; fewer at the end, or if the next batch has another shape.

    Raises:
        SignatureError: `batches` cannot be iterated, or is one batch; `size` is not an integer of at least 1.
    """
    given: Any = batches
    BATCHES.unless(isinstance(given, Iterable) and not isinstance(given, Mapping | str | type), batches=given)
    check_count("stack_batches(batches, size=...)", size)
    return _stacks(batches, size)


def _stacks(batches: Iterable[Any], size: int) -> Iterator[Any]:
    for _, same in itertools.groupby(batches, key=_type_of):
        while group := list(itertools.islice(same, size)):
            yield jax.tree.map(_stacked, *group)


def _type_of(batch: Any) -> Any:
    """What batches of one stack have in common: structure, shapes, dtypes, and that a number is one of Python."""
    BATCH.unless_all(is_numeric, batch, "batch")
    return jax.tree.flatten(jax.tree.map(lambda leaf: describe(leaf) if is_array(leaf) else type(leaf), batch))


def _stacked(*leaves: Any) -> Any:
    """Numbers of Python stay weakly typed, so that a scanned step promotes them as a loop does."""
    on_host = all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack([jnp.asarray(leaf) for leaf in leaves])
