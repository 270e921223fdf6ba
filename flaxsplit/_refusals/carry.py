"""Refusals of what makes and keeps a carry."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import freeze

from flaxsplit._describe import Difference, describe, differences, keyed_leaves, same_structure, strong
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError, StateDriftError

from .options import place_of, sown_in

_INIT = "init_carry(params, state, tx)"

_RENEWED = (
    "init_carry(carry.params, carry.state, tx) with the tx of the step, whose state begins anew; or, where it is of "
    "that tx already, a tx that keeps the shapes and dtypes of its state"
)
WITH_TX = "adopt_carry(carry, init_carry(carry.params, carry.state, tx), strict=False) with the tx of the step"
"""What mends a carry of another optimizer, and loses nothing."""

# ---- where leaves live

UNEQUAL = Refusal(
    SignatureError,
    "$where",
    "leaves that are not on the mesh yet must be the same in every process",
    "each process drew its own key, or read its own file",
    "the same jax.random.key(seed) in every process; their batches may differ",
)

# ---- init_carry

NOT_GIVEN = Refusal(
    SignatureError,
    _INIT,
    "every leaf must be an array or a number",
    "a function, a string, an abstract value, a donated array or another object is in the tree",
    "keep what does not change in the closure of the step; for an abstract carry, jax.eval_shape of init_carry",
)
NO_STATE = Refusal(
    SignatureError,
    _INIT,
    "state must be a mapping {collection: tree}",
    "the model has no state, or the arguments are in another order",
    "init_carry(params, {}, tx) for a model without state",
)
TOO_WIDE = Refusal(
    SignatureError,
    "$where",
    "every whole number must fit into the bits that JAX has for it",
    "a number of 64 bits: JAX has 32, unless jax_enable_x64 is set, and would store another number",
    "jax.config.update('jax_enable_x64', True), or a count in another unit",
)


def wide(leaf: Any) -> str:
    """Says a number that does not fit."""
    return f"{describe(leaf)}, beyond 32 bits"


SHARDING = Refusal(
    SignatureError,
    "init_carry(sharding=...)",
    "sharding must be one of JAX's shardings",
    "a mesh or a PartitionSpec alone, or a tree of shardings",
    "init_carry(params, state, tx, sharding=NamedSharding(mesh, PartitionSpec()))",
)


@Guess
def UNINITIALIZED(error: Exception, tx: Any, params: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """An error of `tx.init`: ours, where it would have taken a FrozenDict; else its own."""
    try:
        jax.eval_shape(tx.init, freeze(params))
    except Exception:
        raise error from None
    return SignatureError(
        _INIT,
        "tx must take params that are plain dicts",
        ["tx.init takes these params as a FrozenDict, and not as a dict"],
        "its mask or labels were made from a FrozenDict of params, and a carry holds plain dicts",
        "flax.core.unfreeze(labels) in optax.multi_transform(transforms, labels), or of the mask in optax.masked",
    )


@Guess
def APART(placements: Mapping[str, Any]) -> Explained:  # noqa: N802 (a row as the others are)
    """Leaves on different meshes or devices."""
    return SignatureError(
        _INIT,
        "all leaves must live on one mesh or one device",
        [f"{path}: {place_of(placement)}" for path, placement in placements.items()],
        "params and state were placed apart",
        "jax.device_put((params, state), sharding) before init_carry",
    )


# ---- drift: a carry that would come out in another form


@Guess
def DRIFT(where: str, name: str, before: Any, after: Any) -> Explained:  # noqa: N802
    """What comes out is not of the form of what went in."""
    changed = differences(jax.tree.map(strong, before), after, name)
    part = _part_of(before, after) if name == "state" else None
    if part is None and name == "state" and (other := _others(before, after, changed)):
        cause = "aux was returned where the new state is due, or a collection that the state does not begin with"
        begins = "state | {" + ", ".join(f"{each!r}: ..." for each in other) + "} before init_carry"
        lines = [str(each) for each in changed]
        return StateDriftError(
            where, _SAME, lines, cause, f"return (loss, aux), new_state, and has_aux=True; or {begins}"
        )
    words = (f"{part!r} was returned, and not the state", _WHOLE) if part else _cause_and_fix(name, changed, before)
    return StateDriftError(where, _SAME, [str(each) for each in changed], *words)


_SAME = "what comes out must have the structure, shapes and dtypes of what goes in"
_WHOLE = "return loss, new_state"


def _others(before: Any, after: Any, changed: list[Difference]) -> list[str]:
    """The collections that the state lacks, where nothing else changed or nothing of the state is there; none sown."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return []
    new = sorted(map(str, after.keys() - before.keys()))
    alone = all(each.path.startswith(tuple(f"state[{name!r}]" for name in new)) for each in changed)
    return new if before.keys().isdisjoint(after) or (alone and not sown_in(changed)) else []


def _part_of(before: Any, after: Any) -> str | None:
    """Which collection was returned in the place of all."""
    kept = before.items() if isinstance(before, Mapping) else ()
    return next((name for name, tree in kept if jax.tree.leaves(tree) and same_structure(tree, after)), None)


def _kind_of(changed: list[Difference]) -> str:
    kinds = {each.kind for each in changed}
    if "structure" in kinds:
        return "structure"
    return "dtype" if kinds <= {"dtype", "weak"} else "shape"


def _cause_and_fix(name: str, changed: list[Difference], before: Any) -> tuple[str, str]:
    if any("FrozenDict" in (each.before, each.after) for each in changed):
        return "a FrozenDict where a plain dict is due", (
            "return loss, flax.core.unfreeze(new_state); for a carry, init_carry(params, state, tx) makes plain dicts"
        )
    kind = _kind_of(changed)
    of_tx = all("opt_state" in each.path for each in changed)
    if kind == "dtype" and of_tx and any(".hyperparams[" in path for path in keyed_leaves(before)):
        return "optax.inject_hyperparams makes every number an array, and one is wider than what it multiplies", (
            "optax.inject_hyperparams(optax.adam, static_args=('b1', 'b2')), so that these stay numbers of Python"
        )
    if name in ("params", "opt_state"):
        cause = f"tx gives {name} another form than it took"
        return (cause, WITH_TX) if kind == "structure" else (f"{cause}: the carry was made with another tx", _RENEWED)
    if kind == "structure" and [each.path for each in changed] == [name]:
        return "something else was returned where the new state is due: (loss, aux), new_state needs has_aux=True", (
            "return loss, new_state" if name == "state" else "return carry, out"
        )
    if kind == "structure" and (sown := sown_in(changed)):
        return f"the model sows into {sown!r}, and each call adds to what the state holds of it", (
            f"with_mutable(model, capture={sown!r}), whose out is (out, {{{sown!r}: ...}})"
        )
    return {
        "structure": (
            "leaves come or go: a sown collection in the state, a cache made late, a collection not returned",
            "with_mutable(model, capture='intermediates') for sown values; return out, {**state, ...}",
        ),
        "shape": (
            "the first update gives the state its final shape (keepdims=True?), or a batch axis stayed in",
            "state = settle_state(loss_fn, params, state, batch), before init_carry",
        ),
        "dtype": (
            "the state is computed in a precision that differs from its own",
            "cast in loss_fn, new.astype(old.dtype), or state = settle_state(loss_fn, params, state, batch)",
        ),
    }[kind]
