"""Refusals of what guards and averages a carry."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from flaxsplit._describe import ABSENT, describe, differences
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError

from .options import form, function

# ---- skip_nonfinite

FINITE_STEP = function("skip_nonfinite(step)", "step", "skip_nonfinite(with_optimizer(loss_fn, tx))")
MOVING = form(
    "skip_nonfinite(moving=...)",
    "a glob on the '/'-joined path in the carry, or several",
    "skip_nonfinite(step, moving='state/extra/scale/*')",
)


@Guess
def UNMOVED(globs: Sequence[str], paths: Sequence[str]) -> Explained:  # noqa: N802
    """Globs that match nothing in the carry, with the paths that come near."""
    near = [close for glob in globs for close in difflib.get_close_matches(glob, paths, n=1, cutoff=0.3)]
    return CollectionError(
        "skip_nonfinite(moving=...)",
        "each glob must match a leaf of the carry",
        [f"{glob!r} matches none of {len(paths)}" for glob in globs],
        "a misspelt path, or one that does not begin with step, params, state or opt_state",
        f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else "moving='state/extra/*'",
    )


# ---- with_ema

DECAY = Refusal(
    SignatureError,
    "with_ema(decay=...)",
    "a number between 0 and 1, or a schedule",
    "1 - decay was passed, or a percentage",
    "with_ema(step, decay=0.999)",
)
OF = form(
    "with_ema(of=...)",
    "of must be a function of the carry",
    "with_ema(step, decay=0.999, of=lambda carry: carry.params)",
)
EMA_STEP = function("with_ema(step, decay=...)", "step", "with_ema(with_optimizer(loss_fn, tx), decay=0.999)")


def decay_of(decay: Any) -> str:
    """Says a decay as it was written, if it is a number: it is no value of the user's data."""
    return f"decay: {decay!r}" if isinstance(decay, int | float) else f"decay: {describe(decay)}"


_EMA = Refusal(
    CollectionError,
    "with_ema(step)",
    "state['ema'] must have the structure of the params (params -> ema)",
    "$cause",
    "$fix",
)


@Guess
def EMA(averaged: Any, state: Any, source: str) -> Explained:  # noqa: N802
    """An average of another structure than what it is of. The fix keeps what was averaged, where it fits."""
    changed = differences(averaged, state.get("ema", {}), "state['ema']")
    fits = "ema" in state and all(ABSENT in each for each in changed)
    anew = f"carry._replace(state={{**carry.state, 'ema': jax.tree.map(jnp.copy, {source})}})"
    wider = f"adopt_carry(carry, init_carry(carry.params, {{**carry.state, 'ema': {source}}}, tx), strict=False)"
    if "ema" in state and _shares_nothing(averaged, state["ema"]):
        cause = "a collection of the model's own is named 'ema', or the average is of other params"
        fix = f"another name for the model's own collection, self.variable('averages', ...); or {anew}"
        return _EMA(*map(str, changed), cause=cause, fix=fix)
    cause = "it belongs to other params" if "ema" in state else "the average was not put into the state"
    return _EMA(*map(str, changed), cause=cause, fix=wider if fits else anew)


def _shares_nothing(averaged: Any, ema: Any) -> bool:
    """Whether no name of the one is one of the other."""
    return isinstance(averaged, Mapping) and isinstance(ema, Mapping) and bool(ema) and averaged.keys().isdisjoint(ema)
