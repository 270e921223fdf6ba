"""Refusals of `explain_step`, before it looks."""

from collections.abc import Mapping
from typing import Any

from flaxsplit._describe import describe, keyed_leaves
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError
from flaxsplit._upstream import is_about_devices

from .options import form, place_of

STEP = form(
    "explain_step(step)",
    "step must be a function (carry, batch, ...) -> (carry, out), jitted or not, and no module or class",
    "explain_step(step, carry, batch)",
)
CARRY = Refusal(
    SignatureError,
    "explain_step(carry)",
    "carry must be a tree of arrays, numbers or jax.ShapeDtypeStruct",
    "objects or strings are in the carry, or the arguments are in another order",
    "explain_step(step, carry, batch)",
)
AS_STEP = "def as_step(carry, batch): *new, out = step(*carry, batch); return tuple(new), out"
CALL = Refusal(
    SignatureError,
    "explain_step(step)",
    "step must take and return one carry: step(carry, batch) -> (carry, out)",
    "what the step threads comes and goes as several arguments, or one is missing",
    AS_STEP,
)
_APART = Refusal(
    SignatureError,
    "explain_step(step)",
    "carry, batch and step must be on the same devices",
    "the carry was made for one device; the batch, or a shard_map in the step, is on a mesh",
    "carry = jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))",
)


@Guess
def APART(error: Exception, arguments: Mapping[str, Any]) -> Explained:  # noqa: N802 (a row as the others are)
    """What was put on devices, each with those: JAX names the first of them, by its number."""
    if not is_about_devices(error):
        raise error
    named = (pair for name, tree in arguments.items() for pair in keyed_leaves(tree, name).items())
    placed = ((path, leaf) for path, leaf in named if getattr(leaf, "committed", False))
    return _APART(*(f"{path}: {describe(leaf)}, {place_of(leaf.sharding)}" for path, leaf in placed))
