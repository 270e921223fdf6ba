"""Run a function over the parts: an apply function becomes a stateful function."""

import difflib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

import flax.linen as nn
import jax
from flax import core, errors

from ._checks import check_form, checked, two_of
from ._describe import describe, plain, wraps
from ._errors import CollectionError, SignatureError, UntouchedStateWarning
from ._filters import flatten, keyed
from ._split import check_halves, merge_state
from ._types import OVERWRITTEN, AnyParams, ApplyFn, LinenModule, Mutable, State, Stateful, Tree

P = ParamSpec("P")
R = TypeVar("R")
ModuleT = TypeVar("ModuleT", bound=nn.Module)
NoCapture = tuple[()]
Names = str | Sequence[str]  # of which an empty one, where it is not written out, counts as names: hence the ignores
Captured = dict[str, Any]

HIDDEN = frozenset({"rngs", "ema"})
"""Collections that a model never sees."""

_MISSING = (errors.ScopeParamNotFoundError, errors.ScopeCollectionNotFound, errors.ScopeVariableNotFoundError)


@overload  # a method of the module's class
def with_mutable(  # type: ignore[overload-overlap]
    fn: ModuleT, *, method: Callable[Concatenate[ModuleT, P], R], mutable: Mutable = ..., capture: NoCapture = ()
) -> Stateful[P, R]: ...
@overload
def with_mutable(
    fn: ModuleT, *, method: Callable[Concatenate[ModuleT, P], R], mutable: Mutable = ..., capture: Names
) -> Stateful[P, tuple[R, Captured]]: ...
@overload  # bound to the module: there is no `self` to leave out
def with_mutable(  # type: ignore[overload-overlap]
    fn: nn.Module, *, method: Callable[P, R], mutable: Mutable = ..., capture: NoCapture = ()
) -> Stateful[P, R]: ...
@overload
def with_mutable(
    fn: nn.Module, *, method: Callable[P, R], mutable: Mutable = ..., capture: Names
) -> Stateful[P, tuple[R, Captured]]: ...
@overload  # of the class again, with `module.apply`
def with_mutable(  # type: ignore[overload-overlap]
    fn: ApplyFn, *, method: Callable[Concatenate[Any, P], R], mutable: Mutable = ..., capture: NoCapture = ()
) -> Stateful[P, R]: ...
@overload
def with_mutable(
    fn: ApplyFn, *, method: Callable[Concatenate[Any, P], R], mutable: Mutable = ..., capture: Names
) -> Stateful[P, tuple[R, Captured]]: ...
@overload
def with_mutable(  # type: ignore[overload-overlap]
    fn: LinenModule[P, R], *, method: None = None, mutable: Mutable = ..., capture: NoCapture = ()
) -> Stateful[P, R]: ...
@overload
def with_mutable(
    fn: LinenModule[P, R], *, method: None = None, mutable: Mutable = ..., capture: Names
) -> Stateful[P, tuple[R, Captured]]: ...
@overload
def with_mutable(
    fn: ApplyFn, *, method: None = None, mutable: Mutable = ..., capture: str | Sequence[str] = ()
) -> Stateful[..., Any]: ...
@overload
def with_mutable(
    fn: ApplyFn | nn.Module, *, method: str, mutable: Mutable = ..., capture: str | Sequence[str] = ()
) -> Stateful[..., Any]: ...
@checked
def with_mutable(
    fn: Any, *, method: Any = None, mutable: Mutable = ..., capture: str | Sequence[str] = ()
) -> Stateful[..., Any]:
    """Wraps a model into a stateful function: `fn(params, state, *args, **kwargs) -> (out, new_state)`.

    Law: equals `module.apply(merge_state(params, state), *args, mutable=[...], **kwargs)`, with every collection that
    is not mutable passed through untouched, and always two results.

    >>> import jax, flax.linen as nn, flaxsplit as fs
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> x = jax.numpy.ones((8, 3))
    >>> params, state = fs.split_params(model.init(jax.random.key(0), x))
    >>> out, new_state = fs.with_mutable(model)(params, state, x)
    >>> out.shape, sorted(new_state)
    ((8, 3), ['batch_stats'])

    Args:
        fn: a Linen module (its `__call__` signature is kept), `module.apply`, what `nn.apply` returns, or a function of
            that form: `fn(variables, *args, mutable=..., **kwargs) -> (out, updated)`.
        method: the module's method to run instead of `__call__`; also its signature is kept.
        mutable: by default every collection in `state` but `'params'`, `'rngs'` and `'ema'`; else one of Flax's own
            collection filters (a name, names, `DenyList`, a bool). `False` reads only.
        capture: sown collections to hand out; `out` becomes `(out, {collection: tree})`. They never enter the state.

    Returns:
        A stateful function. `new_state` has the collections of `state`.

    Raises:
        CollectionError: a collection is missing, unknown or not mutable; nothing was sown; no rngs for a stream.
        SignatureError: `fn` is not a module instance or apply function.

    Warns:
        UntouchedStateWarning: collections were mutable and no leaf of any was written (`train=True` forgotten?).

    As `flax.linen.Module.apply`, but pure in `(params, state)` and of one return form.
    """
    apply = _apply_of(fn, method)
    _check_options(fn, method, mutable, capture)
    captured = (capture,) if isinstance(capture, str) else tuple(capture)

    @wraps(*_signed(fn, method))
    def stateful(params: AnyParams, state: Tree, /, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        check_halves("with_mutable(fn)", params, state)
        visible = {name: tree for name, tree in state.items() if name not in HIDDEN and name not in captured}
        variables = merge_state(params, visible)
        names = _mutable_names(mutable, visible)
        result = _applied(apply, names, captured, state, variables, args, kwargs)
        out, updated = two_of(result, "with_mutable(fn)", "fn(variables, *args, mutable=[...]) -> (out, updated)")
        new_state = {**state, **{name: plain(updated[name]) for name in names if name in updated}}
        _warn_untouched([name for name in names if name != OVERWRITTEN], variables, new_state)
        return ((out, _sown(captured, updated)) if captured else out), new_state

    return stateful


def _apply_of(fn: Any, method: Any) -> Callable[..., Any]:
    if isinstance(fn, nn.Module):
        return fn.apply if method is None else functools.partial(fn.apply, method=method)
    if isinstance(fn, type) or not callable(fn):
        name = fn.__name__ if isinstance(fn, type) else describe(fn)
        raise SignatureError(
            "with_mutable(fn)",
            "fn must be a Linen module instance, its apply, or a function of that form",
            [f"fn: the class {name}" if isinstance(fn, type) else f"fn: {name}"],
            "the module was not constructed" if isinstance(fn, type) else "variables or params were passed",
            f"with_mutable({name}(...))" if isinstance(fn, type) else "with_mutable(model)",
        )
    if getattr(fn, "__code__", None) is _NN_APPLY:
        return _of_nn_apply(fn)
    return fn if method is None else functools.partial(fn, method=method)


def _check_options(fn: Any, method: Any, mutable: Any, capture: Any) -> None:
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    fits = callable(method) or method is None or (isinstance(method, str) and (not owner or hasattr(owner, method)))
    required = "a method of the module, or its name"
    check_form("with_mutable(method=...)", "method", method, fits, required, "with_mutable(model, method=Model.decode)")
    fits = mutable is ... or isinstance(mutable, bool | core.DenyList) or _are_names(mutable)
    required, fix = "a collection's name, names, a DenyList, or a bool", "with_mutable(fn, mutable=['batch_stats'])"
    check_form("with_mutable(mutable=...)", "mutable", mutable, fits, required, fix)
    required, fix = "the name of a sown collection, or names", "with_mutable(fn, capture='intermediates')"
    check_form("with_mutable(capture=...)", "capture", capture, _are_names(capture), required, fix)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Collection) and all(isinstance(each, str) for each in value))


_NN_APPLY: Any = getattr(core.apply(lambda scope: scope), "__code__", None)


def _of_nn_apply(fn: Any) -> Callable[..., Any]:
    """Reopens what `nn.apply` returns: it fixed `mutable` when it was made, and the state alone decides it here."""
    inner = dict(zip(fn.__code__.co_freevars, (cell.cell_contents for cell in fn.__closure__), strict=True))

    def apply(variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        return core.apply(inner["fn"], mutable=mutable, flags=inner.get("flags"))(variables, *args, **kwargs)

    return apply


def _signed(fn: Any, method: Any) -> tuple[Any, tuple[str, ...], int]:
    """Says whose signature the stateful function has, and which leading arguments take the place of which."""
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if isinstance(method, str) and hasattr(type(module), method):
        method = getattr(type(module), method)
    if callable(method):
        return method, ("params", "state"), 0 if inspect.ismethod(method) else 1
    return fn, ("params", "state"), 0 if isinstance(fn, nn.Module) else 1


def _mutable_names(mutable: Mutable, visible: Mapping[str, Any]) -> tuple[str, ...]:
    """Resolves a collection filter against the state's collections; a name that is not among them is an error."""
    candidates = [name for name in visible if name != "params"]
    if mutable is ...:
        return tuple(candidates)
    named = [mutable] if isinstance(mutable, str) else mutable if isinstance(mutable, Collection) else ()
    unknown = [name for name in named if name not in candidates]
    got = [f"{name!r} is not one of {sorted(candidates)}" for name in unknown]
    if "params" in unknown:
        cause, fix = (
            "params are the optimizer's to change",
            "with_mutable(fn) makes every collection of the state mutable",
        )
        raise CollectionError("with_mutable(mutable=...)", "mutable collections must be in the state", got, cause, fix)
    near = [close for name in unknown for close in difflib.get_close_matches(name, candidates, n=1)]
    if near:
        fix = f"did you mean {' and '.join(map(repr, near))}?"
        cause = "a misspelt collection"
        raise CollectionError("with_mutable(mutable=...)", "mutable collections must be in the state", got, cause, fix)
    if unknown:
        cause = "sown collections are not state, or the state lacks a collection"
        fix = f"with_mutable(fn, capture={unknown[0]!r}), or state | {{{unknown[0]!r}: ...}}"
        raise CollectionError("with_mutable(mutable=...)", "mutable collections must be in the state", got, cause, fix)
    return tuple(name for name in candidates if core.scope.in_filter(mutable, name))


def _applied(
    apply: Callable[..., Any],
    names: tuple[str, ...],
    captured: tuple[str, ...],
    state: Tree,
    variables: Tree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls apply; what Flax says about missing variables is said again in terms of params and state."""
    try:
        return apply(variables, *args, mutable=(*names, *captured), **kwargs)
    except errors.ApplyScopeInvalidVariablesTypeError as error:
        raise _misformed(variables) from error
    except errors.InvalidRngError as error:
        raise _no_rngs(_first_sentence(error), state, kwargs) from error
    except errors.ModifyScopeVariableError as error:
        raise _not_mutable(_first_sentence(error), names, variables) from error
    except _MISSING as error:
        raise _not_found(_first_sentence(error), variables) from error
    except errors.ScopeParamShapeError as error:
        raise _misshapen(_first_sentence(error)) from error


def _first_sentence(error: Exception) -> str:
    return str(error).split(" (http")[0]


def _collection_in(sentence: str) -> str:
    found = re.search(r'collection "([^"]+)"', sentence)
    return found[1] if found else "params"


def _no_rngs(sentence: str, state: Tree, kwargs: dict[str, Any]) -> CollectionError:
    found = re.search(r'needs PRNG for "([^"]+)"', sentence)
    stream = found[1] if found else "params"
    drawn, held = kwargs.get("rngs"), state.get("rngs", {})
    forgotten = stream in held and drawn is None
    streams = ", ".join(f"{name}=key" for name in sorted({*held, *(drawn or {}), stream}))
    got = [f"rngs: {sorted(drawn)}"] if drawn else ["rngs: none", f"state['rngs']: {sorted(held) or 'none'}"]
    return CollectionError(
        "with_mutable(fn)",
        f"the model draws from the PRNG stream {stream!r}",
        got,
        "state['rngs'] is there, but nothing draws from it" if forgotten else f"there is no key for {stream!r}",
        "with_rngs(with_mutable(model))"
        if forgotten
        else f"with_rngs(with_mutable(model)), with state | rng_state({streams})",
    )


def _not_mutable(sentence: str, names: tuple[str, ...], variables: Tree) -> CollectionError:
    name = _collection_in(sentence)
    there = name in variables
    return CollectionError(
        "with_mutable(mutable=...)" if there else "with_mutable(fn)",
        f"the model writes to the collection {name!r}",
        [sentence, f"mutable: {sorted(names)}"],
        f"{name!r} is not among the mutable collections" if there else f"the state has no {name!r}",
        f"with_mutable(fn, mutable={sorted([*names, name])})"
        if there
        else f"state | {{{name!r}: ...}}, from module.init",
    )


def _not_found(sentence: str, variables: Tree) -> CollectionError:
    name = _collection_in(sentence)
    absent = name not in variables
    return CollectionError(
        "with_mutable(fn)",
        "params and state must hold every variable that the model reads",
        [
            sentence,
            *(f"{name}: {sorted(map(str, tree))}" for name, tree in variables.items() if isinstance(tree, Mapping)),
        ],
        f"the state has no {name!r}" if absent else "params and state belong to another model, or a part was lost",
        "params, state = split_params(module.init(key, x)); fn(params, state, x)",
    )


def _misformed(variables: Tree) -> CollectionError:
    leaves = [f"{name!r}: {describe(tree)}" for name, tree in variables.items() if not isinstance(tree, Mapping)]
    keys = [keyed(path, "variables") for path, _ in flatten(variables) if not all(isinstance(key, str) for key in path)]
    return CollectionError(
        "with_mutable(fn)",
        "every collection must be a mapping, its keys strings",
        leaves + keys,
        "the state holds leaves beside collections, or trees of another library",
        "state | {'name': {'leaf': leaf}}",
    )


def _misshapen(sentence: str) -> CollectionError:
    found = re.search(r'parameter "([^"]+)" in "([^"]+)"', sentence)  # the rest of the sentence differs by version
    return CollectionError(
        "with_mutable(fn)",
        "every param must have the shape that the model declares for it",
        [f"parameter {found[1]!r} in {found[2]!r}: another shape" if found else sentence],
        "x has another size than at module.init, or the params belong to another model",
        "params, state = split_params(module.init(key, x)), with the x and the module of the call",
    )


def _warn_untouched(names: Sequence[str], before: Tree, after: Tree) -> None:
    """Flax hands an unwritten leaf back as the very same object, eagerly and while tracing, so `is` decides."""
    old = jax.tree.leaves([before[name] for name in names])
    new = jax.tree.leaves([after[name] for name in names])
    if old and len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True)):
        warning = UntouchedStateWarning(
            "with_mutable(fn)",
            "at least one leaf of the mutable collections should be written",
            [f"{name}: no leaf written" for name in names],
            "train=True (or use_running_average=False) was forgotten",
            "fn(params, state, x, train=True), or with_mutable(fn, mutable=False) to only read",
        )
        warnings.warn(warning, stacklevel=3)


def _sown(captured: tuple[str, ...], updated: Mapping[str, Any]) -> Captured:
    missing = [name for name in captured if name not in updated]
    if missing:
        raise CollectionError(
            "with_mutable(capture=...)",
            "the model must sow into each captured collection",
            [f"{name!r}: nothing was sown" for name in missing],
            "a misspelt collection, or the model sows only in another mode",
            "self.sow('intermediates', name, value) with capture='intermediates'",
        )
    return {name: plain(updated[name]) for name in captured}
