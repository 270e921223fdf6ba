"""Run a function over the parts: an apply function becomes a stateful function."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

import flax.linen as nn
from flax import core, errors

from ._checks import checked, two_of
from ._declared import declaring
from ._describe import plain
from ._linear import noted
from ._refusals.apply import (
    ARGUMENTS,
    AT_CALL,
    CAPTURE,
    CAPTURED_STATE,
    FORM,
    METHOD,
    METHOD_OF_APPLY,
    MODEL,
    MUTABLE,
    NOT_IN_STATE,
    NOTHING_SOWN,
    is_stateful,
)
from ._refusals.upstream import FLAX
from ._split import check_halves, merge_state
from ._types import AnyParams, ApplyFn, LinenModule, Mutable, State, Stateful, Tree
from ._untouched import warn_of_untouched
from ._upstream import is_nn_apply, is_nnx, reopened
from ._wraps import wraps

P = ParamSpec("P")
R = TypeVar("R")
ModuleT = TypeVar("ModuleT", bound=nn.Module)
NoCapture = tuple[()]
Names = str | Collection[str]  # of which an empty one, where it is not written out, counts as names: hence the ignores
Captured = dict[str, Any]

HIDDEN = frozenset({"rngs", "ema", "extra"})
"""Collections that a model never sees."""

_READ = frozenset({"params", "batch_stats", "cache"})
"""Collections that layers of Flax read: taken out of the state to be captured, they would be made anew at each call."""


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
    fn: ApplyFn, *, method: None = None, mutable: Mutable = ..., capture: str | Collection[str] = ()
) -> Stateful[..., Any]: ...
@overload
def with_mutable(
    fn: ApplyFn | nn.Module, *, method: str, mutable: Mutable = ..., capture: str | Collection[str] = ()
) -> Stateful[..., Any]: ...
@checked
def with_mutable(
    fn: Any, *, method: Any = None, mutable: Mutable = ..., capture: str | Collection[str] = ()
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
        mutable: by default every collection in `state` except `'params'`, `'rngs'`, `'ema'` and `'extra'` (the caller's
            own tree). Otherwise one of Flax's own collection filters (a name, names, `DenyList`, a bool), which
            chooses among these. `False` reads only.
        capture: sown collections to return; `out` becomes `(out, {collection: tree})`. They never enter the state.

    Returns:
        A stateful function. `new_state` has the collections of `state`.

    Raises:
        CollectionError: a collection is missing, unknown or not mutable; nothing was sown; no rngs for a stream.
        SignatureError: `fn` is not a module instance or apply function.

    Warns:
        UntouchedStateWarning: the model reads mutable collections and no leaf of any was written (`train=True`
            forgotten?), or some layers with batch statistics wrote none, while others wrote theirs. It does not warn
            of a layer with frozen params; it does not check single layers if `mutable` names what is written.

    As `flax.linen.Module.apply`, but pure in `(params, state)`, and with one return form.
    """
    MODEL.unless(isinstance(fn, nn.Module) or _is_apply(fn), fn)
    _check_options(fn, method, mutable, capture)
    apply = _apply_of(fn, method)
    captured = (capture,) if isinstance(capture, str) else tuple(capture)

    signed, leading, replaces = _signed(fn, method)

    @wraps(signed, leading, replaces)
    @noted
    def stateful(params: AnyParams, state: Tree, /, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        check_halves("with_mutable(fn)", params, state)
        AT_CALL.unless("mutable" not in kwargs, "mutable= in the call")
        CAPTURED_STATE.if_any(f"{name!r} is in the state" for name in captured if name in state and name in _READ)
        visible = {name: tree for name, tree in state.items() if name not in HIDDEN and name not in captured}
        variables = merge_state(params, visible)
        names = _mutable_names(mutable, visible)
        run = functools.partial(_call, apply, args, (*names, *captured), kwargs)
        try:
            result = run(variables)
        except (errors.FlaxError, ValueError, NameError) as error:
            FLAX.instead_of(error, error, names, variables, state, kwargs.get("rngs"))
        except TypeError as error:
            ARGUMENTS.instead_of(error, error, stateful, (params, state, *args), kwargs)
        out, updated = two_of(result, "with_mutable(fn)", FORM)
        new_state = {**state, **{name: plain(updated[name]) for name in names if name in updated}}
        is_named = not (mutable is ... or mutable is True)
        warn_of_untouched(run, names, variables, new_state, params, state.get("params", {}), is_named)
        return ((out, _sown(captured, updated)) if captured else out), new_state

    return declaring(stateful, "with_mutable(fn)", signed, replaces)


def _is_apply(fn: Any) -> bool:
    return callable(fn) and not (isinstance(fn, type) or is_nnx(fn) or is_stateful(fn))


def _call(apply: Any, args: Any, mutable: Any, kwargs: Any, variables: Any) -> Any:
    return apply(variables, *args, mutable=mutable, **kwargs)


def _apply_of(fn: Any, method: Any) -> Callable[..., Any]:
    if is_nn_apply(fn):
        return reopened(fn)
    apply = fn.apply if isinstance(fn, nn.Module) else fn
    return apply if method is None else functools.partial(apply, method=method)


def _check_options(fn: Any, method: Any, mutable: Any, capture: Any) -> None:
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    is_name = isinstance(method, str) and (not owner or hasattr(owner, method))
    is_function = callable(method) and not isinstance(method, type)
    METHOD.unless(method is None or is_function or is_name, method, owner)
    METHOD_OF_APPLY.unless(method is None or not is_nn_apply(fn), method=method)
    is_filter = mutable is ... or isinstance(mutable, bool | core.DenyList) or _are_names(mutable)
    MUTABLE.unless(is_filter, mutable=mutable)
    CAPTURE.unless(_are_names(capture), capture=capture)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Collection) and all(isinstance(each, str) for each in value))


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
    NOT_IN_STATE.unless(not unknown, unknown, candidates)
    return tuple(name for name in candidates if core.scope.in_filter(mutable, name))


def _sown(captured: tuple[str, ...], updated: Mapping[str, Any]) -> Captured:
    missing = [name for name in captured if name not in updated]
    NOTHING_SOWN.unless(not missing, missing)
    return {name: plain(updated[name]) for name in captured}
