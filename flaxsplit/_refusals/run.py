"""Refusals of what runs a function over the parts: apply functions, keys, lanes, settling."""

from collections.abc import Mapping
from typing import Any

from flaxsplit._describe import describe, differences
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError, StateDriftError

from .options import function, sown_in

# ---- named axes

UNBOUND = Refusal(
    SignatureError,
    "$where",
    "the axis must be bound by an enclosing shard_map, vmap or pmap",
    "the name is misspelt, or the call is in a plain jit, where the mesh needs no name",
    "jax.shard_map(step, mesh=mesh, ...) over a mesh with that axis; or no axis_name",
)

# ---- rng_state, with_rngs

RNGS_FN = function("with_rngs(fn)", "fn", "with_rngs(with_mutable(model))")


@Guess
def KEYS(keys: Mapping[str, Any], wrong: list[str]) -> Explained:  # noqa: N802 (a row as the others are)
    """Streams that are none, or that are no keys."""
    return SignatureError(
        "rng_state(**keys)",
        "at least one stream, each a PRNG key",
        [f"{name}: {describe(keys[name])}" for name in wrong] or ["no stream"],
        "a seed was passed instead of a key" if wrong else "the streams were forgotten",
        f"rng_state({next(iter(keys), 'dropout')}=jax.random.key(0))",
    )


NO_RNGS = Refusal(
    CollectionError,
    "with_rngs(fn)",
    "the state must have an 'rngs' collection",
    "rng_state was not merged into the state",
    "init_carry(params, state | rng_state(dropout=key), tx)",
)
NO_KEYS = Refusal(
    SignatureError,
    "with_rngs(fn)",
    "state['rngs'] must hold one PRNG key per stream",
    "a seed is there, or a collection of the model's own that is named 'rngs'",
    "state | rng_state(dropout=jax.random.key(0)); or another name for the model's own collection",
)
OWN_RNGS = Refusal(
    SignatureError,
    "with_rngs(fn)",
    "rngs come from state['rngs']",
    "keys were passed by hand to a function that draws its own",
    "fn(params, state, x), or with_mutable(model.apply)(params, state, x, rngs=...)",
)

# ---- settle_state

SETTLE = "settle_state(fn, params, state, ...)"
FORM = "fn(params, state, ...) -> (out, new_state)"

SETTLE_FN = function(SETTLE, "fn", "settle_state(with_mutable(model), params, state, x)")
NO_SHAPE = Refusal(
    SignatureError,
    SETTLE,
    "every leaf must be an array, a number, or a jax.ShapeDtypeStruct",
    "a function, a string or another object is in the tree",
    "params, state = split_params(module.init(key, x))",
)
UNREACHED = Refusal(
    StateDriftError,
    SETTLE,
    "the state must reach its fixed point by broadcasting or casting",
    "the state was made for other shapes, or for numbers of another kind",
    "make fn return every state leaf in the shape and dtype that it was given",
)
_RESTRUCTURED = UNREACHED.but(
    required="the structure must stay", cause="leaves come or go: sown values, or a cache made late"
)
_ENDLESS = UNREACHED.but(
    required="shapes must reach a fixed point", cause="they still change after $rounds rounds: does each call append?"
)


@Guess
def RESTRUCTURED(before: Any, after: Any) -> Explained:  # noqa: N802
    """A call changes the structure."""
    changed = differences(before, after, "state")
    row, sown = _RESTRUCTURED, sown_in(changed)
    if sown:
        row = row.but(cause=f"the model sows into {sown!r}", fix=f"with_mutable(model, capture={sown!r})")
    return row(*map(str, changed))


@Guess
def ENDLESS(before: Any, after: Any, rounds: int) -> Explained:  # noqa: N802
    """Each call changes the shapes again."""
    return _ENDLESS(*map(str, differences(before, after, "state")), rounds=rounds)
