"""Refusals of `with_mutable`: its options, and what Flax says of variables, in terms of params and state."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from flax import errors

from flaxsplit._describe import describe
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError, UntouchedStateWarning, said
from flaxsplit._paths import flatten, keyed
from flaxsplit._types import RESERVED
from flaxsplit._upstream import collection_in, first_sentence, is_about_rngs, param_in, stream_in

from .options import form, unbound

_FN = "with_mutable(fn)"
_MUTABLE = "with_mutable(mutable=...)"
_OWNERS = {"rngs": "with_rngs", "ema": "with_ema", "extra": "the caller"}
_RENAMED = "another name for the model's own collection: self.variable('averages', ...)"
_CALL = "params, state = split_params(module.init(key, x))"

FORM = "fn(variables, *args, mutable=[...]) -> (out, updated)"

# ---- options

_METHOD = form(
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


AT_CALL = Refusal(
    SignatureError,
    _FN,
    "what is mutable is said once, where the model is wrapped",
    "the arguments of module.apply were kept",
    "with_mutable(model, mutable=['batch_stats'])(params, state, x), or with_mutable(model): all of the state is",
)


@Guess
def ARGUMENTS(error: Exception, stateful: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Explained:  # noqa: N802
    """Arguments that the model does not take; any other error stays as it is."""
    own = {name: value for name, value in kwargs.items() if name not in ("rngs", "capture_intermediates")}
    why, names = unbound(stateful, args, own)
    if not why:
        raise error
    given = ", ".join(["params", "state", *map(describe, args[2:]), *(f"{name}=" for name in kwargs)])
    cause = "an argument is too many, missing or misspelt, or rngs= was not given by name"
    fix = "fn(params, state, x, train=True, rngs={'dropout': key})"
    return SignatureError(_FN, f"fn takes ({', '.join(names)})", [f"fn({given}): {why}"], cause, fix)


@Guess
def METHOD(method: Any, owner: Any) -> Explained:  # noqa: N802
    """What is no method; a name that the module does not have is said as it was written."""
    if not isinstance(method, str):
        return _METHOD(f"method: {said(method)}")
    near = difflib.get_close_matches(method, [name for name in dir(type(owner)) if not name.startswith("_")], n=1)
    fix = f"with_mutable(model, method={near[0]!r})" if near else _METHOD.fix
    row = _METHOD.but(cause="a misspelt method, or one of another model", fix=fix)
    return row(f"method: {type(owner).__name__} has no {method!r}")


METHOD_OF_APPLY = Refusal(
    SignatureError,
    "with_mutable(method=...)",
    "no method beside a function that nn.apply made",
    "nn.apply was told what to run when it was called, and takes no method",
    "with_mutable(model, method=Model.decode), or with_mutable(nn.apply(Model.decode, model))",
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
        fix = "with_mutable(fn), or mutable=True, makes every collection of the state mutable"
    elif owned := [name for name in unknown if name in _OWNERS]:
        cause, fix = _owned(owned[0]), "with_mutable(fn) makes every other collection of the state mutable"
    elif near:
        cause, fix = "a misspelt collection", f"did you mean {' and '.join(map(repr, near))}?"
    came = [f"{name!r} is not one of {sorted(candidates)}" for name in unknown]
    return CollectionError(_MUTABLE, "mutable collections must be in the state", came, cause, fix)


# ---- what a call leaves

_UNTOUCHED = Refusal(
    UntouchedStateWarning,
    _FN,
    "at least one leaf of the mutable collections should be written",
    "train=True (or use_running_average=False) was forgotten",
    "fn(params, state, x, train=True), or with_mutable(fn, mutable=False) to only read",
)
_UNTOUCHED_OR_NO_MODELS = _UNTOUCHED.but(
    cause="they are not the model's own, or train=True was forgotten",
    fix="state | {'extra': ...} for what no model sees; or fn(params, state, x, train=True)",
)


@Guess
def UNTOUCHED(names: Sequence[str]) -> Explained:  # noqa: N802
    """Collections that a call left as they were: Flax's own, or of a name that nobody knows."""
    row = _UNTOUCHED if RESERVED & {*names} else _UNTOUCHED_OR_NO_MODELS
    return row(*(f"{name}: no leaf written" for name in names))


NOTHING_SOWN = Refusal(
    CollectionError,
    "with_mutable(capture=...)",
    "the model must sow into each captured collection",
    "a misspelt collection, or the model sows only in another mode",
    "self.sow('intermediates', name, value) with capture='intermediates'",
)

# ---- what Flax says


@Guess
def RNGS(where: str, rngs: Any) -> Explained:  # noqa: N802
    """Keys by hand that are not one key per stream."""
    required = "rngs must be a dict of one key per stream"
    if isinstance(rngs, dict):
        came = [f"rngs[{name!r}]: {describe(key)}" for name, key in rngs.items()]
        cause = "a seed, or a stack of keys, is there, where one key is due"
        return CollectionError(where, required, came, cause, f"rngs={{{next(iter(rngs))!r}: jax.random.key(0)}}")
    cause = "keys without the names of their streams, or another mapping than a dict"
    return CollectionError(where, required, [f"rngs: {describe(rngs)}"], cause, "rngs={'dropout': key}")


@Guess
def FLAX(error: Exception, names: Sequence[str], variables: Any, state: Any, rngs: Any) -> Explained:  # noqa: N802
    """An error of Flax about variables or keys, in terms of params and state; any other one stays as it is."""
    match error:
        case errors.ApplyScopeInvalidVariablesTypeError():
            return _misformed(variables)
        case errors.InvalidRngError():
            stream = stream_in(error)
            return _no_rngs(stream, state.get("rngs", {}), rngs) if stream else RNGS(_FN, rngs)
        case errors.ModifyScopeVariableError():
            return _not_mutable(error, names, variables, state)
        case errors.ScopeParamNotFoundError() | errors.ScopeCollectionNotFound() | errors.ScopeVariableNotFoundError():
            return _not_found(error, variables, state)
        case errors.ScopeParamShapeError():
            return _misshapen(error)
        case ValueError() if is_about_rngs(error):
            return RNGS(_FN, rngs)
        case _:
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


def _not_mutable(error: Exception, names: Sequence[str], variables: Any, state: Any) -> Explained:
    name = collection_in(error)
    where, cause, fix = _why_not_mutable(name, names, variables, state)
    came = [first_sentence(error), f"mutable: {sorted(names)}"]
    return CollectionError(where, f"the model writes to the collection {name!r}", came, cause, fix)


def _why_not_mutable(name: str, names: Sequence[str], variables: Any, state: Any) -> tuple[str, str, str]:
    if name == "params":
        return (
            _FN,
            "params are the optimizer's to change",
            "self.variable('counts', ...) for what the model itself writes",
        )
    if name in names:
        cause = f"{name!r} is mutable, but a lifted transform around the layer does not pass it on"
        return _FN, cause, f"carry_variables={name!r} in nn.while_loop, variable_carry={name!r} in nn.scan"
    if name in variables:
        fix = f"with_mutable(fn, mutable={sorted([*names, name])})"
        return _MUTABLE, f"{name!r} is not among the mutable collections", fix
    if name in state and name in _OWNERS:
        return _FN, _owned(name), _RENAMED
    return _FN, f"the state has no {name!r}", f"state | {{{name!r}: ...}}, from module.init"


def _owned(name: str) -> str:
    return f"{name!r} in the state belongs to {_OWNERS[name]}, and no model sees it"


def _not_found(error: Exception, variables: Any, state: Any) -> Explained:
    name = collection_in(error)
    held = (f"{name}: {sorted(map(str, tree))}" for name, tree in variables.items() if isinstance(tree, Mapping))
    cause, fix = "params and state belong to another model, or a part was lost", f"{_CALL}; fn(params, state, x)"
    if name not in variables:
        cause = f"the state has no {name!r}"
        if name in state and name in _OWNERS:
            cause, fix = _owned(name), _RENAMED
    required = "params and state must hold every variable that the model reads"
    return CollectionError(_FN, required, [first_sentence(error), *held], cause, fix)


def _misformed(variables: Any) -> Explained:
    leaves = [f"{name!r}: {describe(tree)}" for name, tree in variables.items() if not isinstance(tree, Mapping)]
    keys = [keyed(path, "variables") for path, _ in flatten(variables) if not all(isinstance(key, str) for key in path)]
    return CollectionError(
        _FN,
        "every collection must be a mapping, its keys strings",
        leaves + keys,
        "the state holds what is no model's: a counter, a queue, the tree of another library",
        "state | {'extra': ...}, any tree, which no model sees",
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
