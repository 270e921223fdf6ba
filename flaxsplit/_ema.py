"""A moving average in the state: of the params, of params and statistics, or of a part."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._checks import check_count, check_kept, checked, is_function, two_of
from ._context import during
from ._describe import same_structure, shapes_of
from ._refusals.keep import DECAY, EMA, EMA_STEP, OF, decay_of
from ._types import Carry, CarryStepT
from ._update import AVERAGED, check_carry
from ._wraps import wraps

Decay: TypeAlias = float | int | np.floating[Any] | Float[Array, ""] | Callable[[Any], Any]
"""How much of an average stays: a number of Python, NumPy or JAX, or a schedule of the step count."""


def params_of(carry: Carry) -> Any:
    """What is averaged where nothing else is named."""
    return carry.params


@checked
def with_ema(step: CarryStepT, *, decay: Decay, of: Callable[[Carry], Any] = params_of, every: int = 1) -> CarryStepT:
    """Keeps an exponential moving average of the params, or of `of(carry)`, in `state['ema']`.

    Law: after each step `ema = decay * ema + (1 - decay) * of(carry)`. Evaluate by `apply(carry.state["ema"], ...)`.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> loss_fn = lambda params, state, batch: (jnp.sum(params["w"] * batch), state)
    >>> tx, params = optax.sgd(1.0), {"w": jnp.ones(2)}
    >>> step = fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.5)
    >>> carry, _ = step(fs.init_carry(params, {"ema": params}, tx), jnp.ones(2))
    >>> carry.params["w"], carry.state["ema"]["w"]
    (Array([0., 0.], dtype=float32), Array([0.5, 0.5], dtype=float32))

    Args:
        step: a step over a `Carry`.
        decay: the share of the old average that stays, between 0 and 1; or a schedule of the step count.
        of: chooses the tree to average: `lambda carry: {"params": carry.params, "batch_stats":
            carry.state["batch_stats"]}` for a model with its statistics. `state['ema']` starts as such a tree. Leaves
            that are not floating or complex, such as counters, are copied.
        every: averages only at each `every`-th update; between them the average stays, and costs nothing.

    Returns:
        A step with the same `out`.

    Raises:
        CollectionError: `state['ema']` is missing, or has another structure than the averaged tree.
        SignatureError: `decay` is not between 0 and 1.

    As `optax.ema`, but on params instead of gradients. The average is state, so a scan, mesh or checkpoint carries it.
    """
    EMA_STEP.unless(is_function(step), step=step)
    DECAY.unless(callable(decay) or _is_fraction(decay), decay_of(decay))
    OF.unless(callable(of), of=of)
    check_count("with_ema(step, every=...)", every)

    source = "carry.params" if of is params_of else "of(carry)"

    @wraps(step)
    def averaging(carry: Carry, batch: Any, *args: Any, **kwargs: Any) -> tuple[Carry, Any]:
        check_carry(carry)
        ema = carry.state.get("ema", {})
        EMA.unless(_is_alike(of(carry), ema), of(carry), carry.state, source)
        with during(AVERAGED, True):
            result = step(carry, batch, *args, **kwargs)
        new_carry, out = two_of(result, "with_ema(step)", "step(carry, batch) -> (carry, out)")
        check_kept("with_ema(step, decay=0.999)", carry)
        weight = 1 - (decay(carry.step) if callable(decay) else decay)

        def average() -> Any:
            return jax.tree.map(lambda new, old: _averaged(new, old, weight), of(new_carry), ema)

        due = new_carry.step % every == 0
        new_ema = average() if every == 1 else jax.lax.cond(due, average, lambda: ema)
        return new_carry._replace(state={**new_carry.state, "ema": new_ema}), out

    return cast(CarryStepT, averaging)


def _averaged(new: Any, old: Any, weight: Any) -> Any:
    """In the precision of the average, which may be kept in f32 beside bf16 params."""
    if not jnp.issubdtype(jnp.asarray(old).dtype, jnp.inexact):
        return new
    return (weight * new + (1.0 - weight) * old).astype(old.dtype)


def _is_fraction(decay: Any) -> bool:
    if isinstance(decay, jax.Array):  # perhaps traced: its value is not there to be asked
        return decay.shape == ()
    return isinstance(decay, int | float | np.number) and bool(0 <= decay <= 1)


def _is_alike(tree: Any, ema: Any) -> bool:
    """Compares structure and shapes, and no dtypes."""
    return same_structure(tree, ema) and shapes_of(tree) == shapes_of(ema)
