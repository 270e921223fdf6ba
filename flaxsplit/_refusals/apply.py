"""Refusals of `with_mutable`: its options, and what Flax says of variables, in terms of params and state."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from flax import errors

from flaxsplit._describe import describe
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError, UntouchedStateWarning
from flaxsplit._paths import flatten, keyed
from flaxsplit._upstream import collection_in, first_sentence, param_in, stream_in

from .options import form

_FN = "with_mutable(fn)"
_MUTABLE = "with_mutable(mutable=...)"
_CALL = "params, state = split_params(module.init(key, x))"

# ---- options

METHOD = form(
    "with_mutable(method=...)",
    "method must be a method of the module, or its name",
    "with_mutable(model, method=Model.decode)",
)
MUTABLE = form(
    _MUTABLE,
    "mutable must be a collection's name, names, a DenyList, or a bool",
    "with_mutable(fn, mutable=['batch_stats'])",
)
CAPTURE = form(
    "with_mutable(capture=...)",
    "capture must be the name of a sown collection, or names",
    "with_mutable(fn, capture='intermediates')",
)


@Guess
def MODEL(fn: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """What is no module and no apply function."""
    required = "fn must be a Linen module instance, its apply, or a function of that form"
    if isinstance(fn, type):
        came, fix = f"fn: the class {fn.__name__}", f"with_mutable({fn.__name__}(...))"
        return SignatureError(_FN, required, [came], "the module was not constructed", fix)
    came, cause = f"fn: {describe(fn)}", "variables or params were passed"
    return SignatureError(_FN, required, [came], cause, "with_mutable(model)")


@Guess
def NOT_IN_STATE(unknown: Sequence[str], candidates: Sequence[str]) -> Explained:  # noqa: N802
    """Mutable collections that the state has not."""
    near = [close for name in unknown for close in difflib.get_close_matches(name, candidates, n=1)]
    cause = "sown collections are not state, or the state lacks a collection"
    fix = f"with_mutable(fn, capture={unknown[0]!r}), or state | {{{unknown[0]!r}: ...}}"
    if "params" in unknown:
        cause = "params are the optimizer's to change"
        fix = "with_mutable(fn) makes every collection of the state mutable"
    elif near:
        cause, fix = "a misspelt collection", f"did you mean {' and '.join(map(repr, near))}?"
    came = [f"{name!r} is not one of {sorted(candidates)}" for name in unknown]
    return CollectionError(_MUTABLE, "mutable collections must be in the state", came, cause, fix)


# ---- what a call leaves

UNTOUCHED = Refusal(
    UntouchedStateWarning,
    _FN,
    "at least one leaf of the mutable collections should be written",
    "train=True (or use_running_average=False) was forgotten",
    "fn(params, state, x, train=True), or with_mutable(fn, mutable=False) to only read",
)
NOTHING_SOWN = Refusal(
    CollectionError,
    "with_mutable(capture=...)",
    "the model must sow into each captured collection",
    "a misspelt collection, or the model sows only in another mode",
    "self.sow('intermediates', name, value) with capture='intermediates'",
)

# ---- what Flax says

RNGS = Refusal(
    CollectionError,
    _FN,
    "rngs must be a dict of one key per stream",
    "keys without the names of their streams, or another mapping than a dict",
    "rngs={'dropout': key}",
)


@Guess
def FLAX(error: Exception, names: Sequence[str], variables: Any, state: Any, rngs: Any) -> Explained:  # noqa: N802
    """An error of Flax about variables or keys, in terms of params and state; any other one stays as it is."""
    match error:
        case errors.ApplyScopeInvalidVariablesTypeError():
            return _misformed(variables)
        case errors.InvalidRngError():
            stream = stream_in(error)
            return _no_rngs(stream, state.get("rngs", {}), rngs) if stream else RNGS(f"rngs: {describe(rngs)}")
        case errors.ModifyScopeVariableError():
            return _not_mutable(error, names, variables)
        case errors.ScopeParamNotFoundError() | errors.ScopeCollectionNotFound() | errors.ScopeVariableNotFoundError():
            return _not_found(error, variables)
        case errors.ScopeParamShapeError():
            return _misshapen(error)
    raise error


def _no_rngs(stream: str, held: Any, given: Any) -> Explained:
    streams = ", ".join(f"{name}=key" for name in sorted({*held, *_streams(given), stream}))
    cause, fix = f"there is no key for {stream!r}", f"with_rngs(with_mutable(model)), with state | rng_state({streams})"
    if stream in _streams(given):
        cause = f"{stream!r} is given, but a lifted transform around the layer does not pass it on"
        fix = f"split_rngs={{{stream!r}: True}} in nn.scan, nn.vmap or nn.while_loop"
    elif given is not None and not isinstance(given, Mapping):
        cause, fix = "rngs is no mapping of streams to keys", f"rngs={{{stream!r}: key}}"
    elif stream in held and given is None:
        cause, fix = "state['rngs'] is there, but nothing draws from it", "with_rngs(with_mutable(model))"
    came = [f"rngs: {sorted(given) if isinstance(given, Mapping) else describe(given)}"]
    if given is None or (isinstance(given, Mapping) and not given):
        came = ["rngs: none", f"state['rngs']: {sorted(held) or 'none'}"]
    return CollectionError(_FN, f"the model draws from the PRNG stream {stream!r}", came, cause, fix)


def _streams(given: Any) -> Any:
    return given if isinstance(given, Mapping) else ()


def _not_mutable(error: Exception, names: Sequence[str], variables: Any) -> Explained:
    name = collection_in(error)
    there = name in variables
    return CollectionError(
        _MUTABLE if there else _FN,
        f"the model writes to the collection {name!r}",
        [first_sentence(error), f"mutable: {sorted(names)}"],
        f"{name!r} is not among the mutable collections" if there else f"the state has no {name!r}",
        f"with_mutable(fn, mutable={sorted([*names, name])})"
        if there
        else f"state | {{{name!r}: ...}}, from module.init",
    )


def _not_found(error: Exception, variables: Any) -> Explained:
    name = collection_in(error)
    held = (f"{name}: {sorted(map(str, tree))}" for name, tree in variables.items() if isinstance(tree, Mapping))
    cause = "params and state belong to another model, or a part was lost"
    return CollectionError(
        _FN,
        "params and state must hold every variable that the model reads",
        [first_sentence(error), *held],
        cause if name in variables else f"the state has no {name!r}",
        f"{_CALL}; fn(params, state, x)",
    )


def _misformed(variables: Any) -> Explained:
    leaves = [f"{name!r}: {describe(tree)}" for name, tree in variables.items() if not isinstance(tree, Mapping)]
    keys = [keyed(path, "variables") for path, _ in flatten(variables) if not all(isinstance(key, str) for key in path)]
    return CollectionError(
        _FN,
        "every collection must be a mapping, its keys strings",
        leaves + keys,
        "the state holds leaves beside collections, or trees of another library",
        "state | {'name': {'leaf': leaf}}",
    )


def _misshapen(error: Exception) -> Explained:
    found = param_in(error)
    return CollectionError(
        _FN,
        "every param must have the shape that the model declares for it",
        [f"parameter {found[0]!r} in {found[1]!r}: another shape" if found else first_sentence(error)],
        "x has another size than at module.init, or the params belong to another model",
        f"{_CALL}, with the x and the module of the call",
    )
