"""Arguments of another form: what is always looked for, and whole signatures where that is asked for.

`FLAXSPLIT_TYPECHECKER=typeguard`, set before the import, checks signatures at run time. Off, `checked` gives back the
very function. On, functions are checked where they are called, so what a jitted step does is checked while tracing
only. An error of ours, which names the leaf, comes before the checker's.
"""

import functools
import importlib
import inspect
import os
import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

from ._describe import is_deleted, is_numeric
from ._errors import Explained
from ._refusals.options import COUNT, DONATED, TWO, TX

F = TypeVar("F", bound=Callable[..., Any])

TYPECHECKER = os.environ.get("FLAXSPLIT_TYPECHECKER", "")
"""`typeguard`, `beartype`, or a path to any decorator, `package.decorator`; empty for none."""


def is_function(fn: Any) -> bool:
    """Tells functions from modules, which are to be wrapped first, and from classes, which are to be constructed."""
    return callable(fn) and not isinstance(fn, type) and not hasattr(fn, "apply") and not hasattr(fn, "sow")


def is_inexact(leaf: Any) -> bool:
    """Tells what has a gradient."""
    return is_numeric(leaf) and bool(jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact))


def survives(leaf: Any) -> bool:
    """Tells what JAX stores as the number that it is: of 64-bit whole numbers, what fits into its 32."""
    is_stored = isinstance(leaf, jax.Array | bool) or not is_numeric(leaf)
    if is_stored or np.asarray(leaf).dtype.kind not in "iuO" or not np.size(leaf):
        return True
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(np.int64 if isinstance(leaf, int) else leaf.dtype))
    return bool(limits.min <= np.min(leaf) and np.max(leaf) <= limits.max)


def check_tx(where: str, tx: Any) -> None:
    """Fails where an optax transformation is due."""
    fits = callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)) and not isinstance(tx, type)
    TX.unless(fits, where=where, tx=tx)


def check_count(where: str, count: Any) -> None:
    """Fails where a number of parts, steps or lanes is due."""
    COUNT.unless(isinstance(count, int) and not isinstance(count, bool) and count >= 1, where, count)


def two_of(result: Any, where: str, form: str, many: str = "") -> tuple[Any, Any]:
    """Gives the two things that a function returned, or says that they are not two."""
    TWO.unless(isinstance(result, tuple) and len(result) == 2, result, where, form, many)
    first, second = result
    return first, second


def check_kept(where: str, carry: Any) -> None:
    """Fails where a step that was compiled already has deleted the carry that it was given."""
    DONATED.unless_all(lambda leaf: not is_deleted(leaf), carry, "carry", where=where)


def checked(fn: F) -> F:
    """Checks the arguments and the result of `fn` against its annotations, if that was asked for."""
    if not TYPECHECKER:
        return fn
    fn.__annotations__ = {name: _checkable(hint) for name, hint in fn.__annotations__.items()}
    checking: Any = jaxtyping.jaxtyped(fn, typechecker=_typechecker())

    @functools.wraps(fn)
    def explaining(*args: Any, **kwargs: Any) -> Any:
        try:
            return checking(*args, **kwargs)
        except jaxtyping.TypeCheckError:
            _raise_ours(fn, args, kwargs)
            raise

    explaining_fn: Any = explaining
    return explaining_fn  # type: ignore[no-any-return]


def _raise_ours(fn: Any, args: Any, kwargs: Any) -> None:
    try:
        fn(*args, **kwargs)
    except Explained:
        raise
    except Exception:  # noqa: S110 (whatever comes of a wrong argument, the checker has said it better)
        pass


def _typechecker() -> Any:
    if TYPECHECKER == "typeguard":
        return typechecked
    module, _, name = ("beartype.beartype" if TYPECHECKER == "beartype" else TYPECHECKER).rpartition(".")
    if not module:
        raise ImportError(
            f"FLAXSPLIT_TYPECHECKER: typeguard, beartype, or a path such as package.decorator; got {name!r}"
        )
    return getattr(importlib.import_module(module), name)


def typechecked(fn: F) -> F:
    """As `typeguard.typechecked`, which is lost at jaxtyping's strings in a function's source."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def checking(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            for each in _values(value, parameter.kind):
                _check(each, parameter.annotation)
        out = fn(*args, **kwargs)
        _check(out, signature.return_annotation)
        return out

    checking_fn: Any = checking
    return checking_fn  # type: ignore[no-any-return]


def _values(bound: Any, kind: Any) -> Any:
    if kind is inspect.Parameter.VAR_KEYWORD:
        return bound.values()
    return bound if kind is inspect.Parameter.VAR_POSITIONAL else (bound,)


def _check(value: Any, hint: Any) -> None:
    import typeguard  # only where it is asked for: it is not quick to import

    if hint is not inspect.Signature.empty:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)


def _checkable(hint: Any) -> Any:
    """Says protocols and type variables as checkers read them: no value fits a protocol with ParamSpec at run time."""
    origin = get_origin(hint) or hint
    bound = getattr(hint, "__bound__", None)
    is_protocol = any(getattr(each, "_is_protocol", False) for each in (origin, bound))
    if is_protocol or isinstance(bound, type(Callable[..., Any])):
        return Callable[..., Any]
    if isinstance(hint, TypeVar):
        return Any
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_checkable, get_args(hint)))]  # noqa: UP007 (made from a list)
    if origin is tuple and get_args(hint):
        return types.GenericAlias(tuple, tuple(map(_checkable, get_args(hint))))
    return hint
