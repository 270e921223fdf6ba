"""What is said of a loss function whose state is not linear: an update lost, a key drawn from twice."""

from collections.abc import Sequence
from typing import Any

from flaxsplit._errors import DroppedStateWarning, Explained, Guess, Refusal

_ON_PURPOSE = "; or, to drop an update on purpose, fn(params, jax.tree.map(jnp.copy, state), x)"

_DROPPED = Refusal(
    DroppedStateWarning,
    "value_and_grad(loss_fn)",
    "the loss must return the state that its last call gave",
    "the new state of the call was thrown away (`out, _ = fn(...)`), or the old one was returned",
    "out, state = fn(params, state, x); return loss, state" + _ON_PURPOSE,
)
_FORKED = _DROPPED.but(
    required="each call must be given the state that the call before it gave",
    cause="two calls were given the same state, so that $harm",
    fix="first, state = fn(params, state, x); second, state = fn(params, state, y)" + _ON_PURPOSE,
)
_REUSED = _DROPPED.but(
    required="no key may be drawn from twice",
    cause="two calls were given the same rngs, so that their masks are the same",
    fix="key, other = jax.random.split(key), one for each call; or with_rngs(fn), which draws anew at each call",
)


@Guess
def DROPPED(lost: Sequence[Any]) -> Explained:  # noqa: N802 (a row as the others are)
    """Leaves that a call wrote, where the loss returned those that the call was given."""
    return _DROPPED(*(f"{each.path}: {_verb(each)} {each.write.call}, returned as it was before" for each in lost))


@Guess
def FORKED(lost: Sequence[Any]) -> Explained:  # noqa: N802
    """Leaves that two calls wrote, each from the same one."""
    lines = (f"{each.path}: {_verb(each)} {each.write.call}, and by {each.kept}, which is kept" for each in lost)
    harms = {"both draw the same masks" if each.write.is_key else "one update is lost" for each in lost}
    return _FORKED(*lines, harm=" and ".join(sorted(harms, reverse=True)))


@Guess
def REUSED(reused: Sequence[Any]) -> Explained:  # noqa: N802
    """Keys by hand that two calls drew from."""
    return _REUSED(*(f"rngs[{stream!r}]: drawn from by {first}, and by {second}" for stream, first, second in reused))


def _verb(lost: Any) -> str:
    return "drawn from by" if lost.write.is_key else "written by"
