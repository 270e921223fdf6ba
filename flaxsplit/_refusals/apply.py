"""Refusals of `with_mutable`: its options, and what a call leaves."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from flaxsplit._describe import describe
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError, UntouchedStateWarning, said
from flaxsplit._paths import Path, keyed
from flaxsplit._types import RESERVED
from flaxsplit._upstream import is_nnx

from .options import form, parameters, unbound
from .upstream import FN, OWNERS, RENAMED, WHICH, misperturbed, owned, perturbed

FORM = "fn(variables, *args, mutable=[...]) -> (out, updated)"

# ---- options

_METHOD = form(
    "with_mutable(method=...)",
    "method must be a method of the module, or its name",
    "with_mutable(model, method=Model.decode)",
)
MUTABLE = form(
    WHICH,
    "mutable must be a collection's name, names, a DenyList, or a bool",
    "with_mutable(fn, mutable=['batch_stats'])",
)
CAPTURE = form(
    "with_mutable(capture=...)",
    "capture must be the name of a sown collection, or names",
    "with_mutable(fn, capture='intermediates')",
)


CAPTURED_STATE = Refusal(
    CollectionError,
    "with_mutable(capture=...)",
    "what is captured must be sown, and must not be the state that layers read",
    "the new state was wanted, which is the second result",
    "out, new_state = with_mutable(fn)(params, state, x)",
)
AT_CALL = Refusal(
    SignatureError,
    FN,
    "mutable= belongs where the model is wrapped, not into the call",
    "the arguments of module.apply were kept",
    "with_mutable(model, mutable=['batch_stats'])(params, state, x), or with_mutable(model): all of the state is",
)


@Guess
def ARGUMENTS(error: Exception, stateful: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Explained:  # noqa: N802
    """Arguments that the model does not take; any other error stays as it is."""
    if came := perturbed(error, args[1]):
        return misperturbed(error, came)
    own = {name: value for name, value in kwargs.items() if name not in ("rngs", "capture_intermediates")}
    why, names = unbound(stateful, args, own)
    if not why:
        raise error
    given = ", ".join(["params", "state", *map(describe, args[2:]), *(f"{name}=" for name in kwargs)])
    cause = "an argument is surplus, missing or misspelt, or rngs= was not passed by name"
    near = [close for name in own for close in difflib.get_close_matches(name, names, n=1) if name not in names]
    fix = f"did you mean {near[0]}=?" if near else f"fn({', '.join(names)}); with_mutable(model.apply) for rngs="
    return SignatureError(FN, f"fn takes ({', '.join(names)})", [f"fn({given}): {why}"], cause, fix)


@Guess
def METHOD(method: Any, owner: Any) -> Explained:  # noqa: N802
    """What is no method; a name that the module does not have is said as it was written."""
    if not isinstance(method, str):
        return _METHOD(f"method: {said(method)}")
    own = {*dir(type(owner))}.difference(dir(nn.Module))
    near = difflib.get_close_matches(method, [name for name in own if callable(getattr(type(owner), name))], n=1)
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


def is_stateful(fn: Any) -> bool:
    """Whether a function says that it takes params and state, as what `with_mutable` gives does."""
    return callable(fn) and [*parameters(fn)][:2] == ["params", "state"]


@Guess
def MODEL(fn: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """What is no module and no apply function, or is stateful already."""
    required = "fn must be a Linen module instance, its apply, or a function of that form"
    if isinstance(fn, type):
        came, fix = f"fn: the class {fn.__name__}", f"with_mutable({fn.__name__}(...))"
        return SignatureError(FN, required, [came], "the module was not constructed", fix)
    if is_nnx(fn):
        cause, fix = "it belongs to Flax's other API", "fn, params, state = from_nnx(module)"
        return SignatureError(FN, required, [f"fn: {type(fn).__name__}, an NNX module"], cause, fix)
    if is_stateful(fn):
        cause, fix = (
            "with_mutable was called twice, or fn is stateful already",
            "fn(params, state, x), as it is",
        )
        return SignatureError(FN, required, ["fn: a function of (params, state, ...)"], cause, fix)
    came, cause = f"fn: {describe(fn)}", "variables or params were passed"
    return SignatureError(FN, required, [came], cause, "with_mutable(model)")


@Guess
def NOT_IN_STATE(unknown: Sequence[str], candidates: Sequence[str]) -> Explained:  # noqa: N802
    """Mutable collections that the state has not."""
    near = [close for name in unknown for close in difflib.get_close_matches(name, candidates, n=1)]
    cause = "sown collections are not state, or the state lacks a collection"
    fix = f"with_mutable(fn, capture={unknown[0]!r}), or state | {{{unknown[0]!r}: ...}}"
    if "params" in unknown:
        cause = "params are the optimizer's to change"
        fix = "with_mutable(fn), or mutable=True, makes every collection of the state mutable"
    elif theirs := [name for name in unknown if name in OWNERS]:
        cause = owned(theirs[0])
        fix = f"with_mutable(fn) makes every other collection of the state mutable; or {RENAMED}"
    elif near:
        cause, fix = "a misspelt collection", f"did you mean {' and '.join(map(repr, near))}?"
    came = [f"{name!r} is not one of {sorted(candidates)}" for name in unknown]
    return CollectionError(WHICH, "mutable collections must be in the state", came, cause, fix)


# ---- what a call leaves

_UNTOUCHED = Refusal(
    UntouchedStateWarning,
    FN,
    "at least one leaf of the mutable collections should be written",
    "train=True (or use_running_average=False) was forgotten",
    "fn(params, state, x, train=True), or with_mutable(fn, mutable=False) to only read",
)
_UNTOUCHED_OR_CONSTANT = _UNTOUCHED.but(cause="train=True was forgotten, or what the model reads there is constant")


@Guess
def UNTOUCHED(names: Sequence[str]) -> Explained:  # noqa: N802
    """Collections that a call left as they were: Flax's own, or of a name that nobody knows."""
    row = _UNTOUCHED if RESERVED & {*names} else _UNTOUCHED_OR_CONSTANT
    return row(*(f"{name}: no leaf written" for name in names))


@Guess
def UNTOUCHED_LAYERS(layers: Sequence[Path], written: Sequence[str]) -> Explained:  # noqa: N802
    """Layers whose statistics stayed as they were, where others were written."""
    return UntouchedStateWarning(
        FN,
        "each layer that keeps batch statistics should write them, where the call writes others",
        [f"{keyed(path, 'state')}: no leaf written" for path in layers],
        "train=True (or use_running_average=False) was forgotten, or does not reach these layers",
        "fn(params, state, x, train=True), handed on to each layer. Where they are to stay as they are: "
        f"split_params(variables, trainable=...) that freezes them, or with_mutable(fn, mutable={sorted(written)})",
    )


@Guess
def NOTHING_SOWN(missing: Sequence[str]) -> Explained:  # noqa: N802
    """Collections that were to be handed out, and that the model left empty."""
    return CollectionError(
        "with_mutable(capture=...)",
        "the model must sow into each captured collection",
        [f"{name!r}: nothing was sown" for name in missing],
        "a misspelt collection, or the model sows only in another mode",
        f"self.sow({missing[0]!r}, name, value) with capture={missing[0]!r}",
    )
