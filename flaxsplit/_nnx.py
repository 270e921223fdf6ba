"""NNX modules as stateful functions over plain dicts, so that a step over them is dispatched by `jax.jit` alone."""

from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx

from ._checks import checked, survives
from ._declared import declaring
from ._describe import describe, is_array, kind_of
from ._jaxprs import source
from ._linear import noted
from ._paths import Path, joined, keyed, unflatten
from ._refusals.carry import TOO_WIDE, wide
from ._refusals.nnx import METHOD, MODULE, OTHER_ATTRIBUTES, OTHER_VARIABLES, REFERENCES, UNFIT, WITHOUT_VALUE, WRITTEN
from ._slots import Slot, apart, look_up
from ._split import check_mappings
from ._trainable import trained
from ._types import AnyParams, Params, State, Stateful, Trainable, Tree
from ._wraps import wraps

if TYPE_CHECKING:
    import typing_extensions  # typing itself takes a default from Python 3.13 on

    # Of a module that is Any nothing is known; without these defaults mypy asks for an annotation of what comes out.
    P = typing_extensions.ParamSpec("P", default=...)
    R = typing_extensions.TypeVar("R", default=Any)
    R_co = typing_extensions.TypeVar("R_co", default=Any, covariant=True)
else:
    P, R, R_co = ParamSpec("P"), TypeVar("R"), TypeVar("R_co", covariant=True)
M = TypeVar("M")

NnxTrainable: TypeAlias = Trainable | type | Callable[[Any, Any], bool] | EllipsisType | bool
"""One of NNX's filters, a glob, a tree of bools, or a sequence of these. A callable is NNX's: `(path, variable)`."""


class NnxModule(Protocol[P, R_co]):
    """An NNX module, seen through the signature of its own `__call__`."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    # Keeps out Linen modules, whose `sow` names its arguments otherwise, and classes, where it lacks one.
    def sow(self, *, variable_type: Any, name: str, value: Any) -> Any: ...


@overload
def from_nnx(
    module: M, *, trainable: NnxTrainable = ..., method: Callable[Concatenate[M, P], R]
) -> tuple[Stateful[P, R], Params, State]: ...
@overload  # bound to the module: there is no `self` to leave out
def from_nnx(
    module: Any, *, trainable: NnxTrainable = ..., method: Callable[P, R]
) -> tuple[Stateful[P, R], Params, State]: ...
@overload
def from_nnx(
    module: NnxModule[P, R], *, trainable: NnxTrainable = ..., method: None = None
) -> tuple[Stateful[P, R], Params, State]: ...
@checked
def from_nnx(
    module: Any, *, trainable: Any = nnx.Param, method: Callable[..., Any] | None = None
) -> tuple[Stateful[..., Any], Params, State]:
    """Takes an NNX module apart into a stateful function, its params and its state.

    Law: `fn(params, state, x)` is `module(x)`, and `to_nnx(module, params, new_state)` leaves the module as that call
    would have. Equals `nnx.split(module)`, and `nnx.merge` inside `fn`, with plain dicts for `nnx.State`.

    >>> import jax, flaxsplit as fs
    >>> from flax import nnx
    >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    >>> fn, params, state = fs.from_nnx(model)
    >>> sorted(params), sorted(state["batch_stats"])
    (['bias', 'scale'], ['mean', 'var'])
    >>> out, state = fn(params, state, jax.numpy.ones((8, 3)))
    >>> out.shape
    (8, 3)

    Args:
        module: an instance. It is only read; its mode (`train()`, `eval()`) is that of `fn` for good.
        trainable: the params to optimize: one of NNX's filters, where a callable takes `(path, variable)`; or, among
            the variables of type `nnx.Param`, a glob on the `/`-joined path, a tree of bools; or a list of these.
        method: a method, or any function of the module and further arguments, to run instead of `__call__`.

    Returns:
        `(fn, params, state)`. The state is `{collection: tree}`, the collections named as NNX names the types of
        variables (`batch_stats`, `cache`; a type of your own by its class). Params not chosen are in
        `state['params']`, the keys of RNG streams in `state['rngs']`, by path, and their counts in
        `state['rng_counts']`. Shared variables occur once, at their first path.

    Raises:
        SignatureError: `module` is not an NNX module instance with values.
        CollectionError: `trainable` chooses nothing or what has no gradient; later, params and state do not fit, or
            `__call__` writes to a param, which would be lost.
        StateDriftError: `__call__` adds or removes variables, or changes a Python attribute.

    As `nnx.split`, but a call is pure, and nothing of NNX is left in what a step carries.
    """
    where = "from_nnx(module)"
    MODULE.unless(isinstance(module, nnx.Module), where, module)
    graphdef, treedef, slots, leaves = apart(module)
    _check_concrete(slots, leaves)
    _check_values(where, slots, leaves)
    chosen = trained(trainable, module, dict(zip(slots, leaves, strict=True)))
    given: Any = method
    METHOD.unless(given is None or (callable(given) and not isinstance(given, type)), given, module)
    call = type(module).__call__ if method is None else getattr(method, "__func__", method)  # bound: brings its module

    @wraps(call, ("params", "state"), 1)
    @noted
    def stateful(params: AnyParams, state: Tree, /, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        check_mappings(where, params, state)
        found = look_up("fn(params, state, *args)", slots, params, state)

        def run(_leaves: list[Any]) -> tuple[list[Any], Any]:
            _module = nnx.merge(graphdef, jax.tree.unflatten(treedef, _leaves))
            _out = call(_module, *args, **kwargs)
            _graphdef, _, _slots, _new_leaves = apart(_module)
            before, after = dict(zip(slots, _leaves, strict=True)), dict(zip(_slots, _new_leaves, strict=True))
            OTHER_VARIABLES.unless(before.keys() == after.keys(), before, after)
            OTHER_ATTRIBUTES.unless(_graphdef == graphdef, (graphdef, treedef.unflatten(_leaves)), _module)
            return _new_leaves, _out

        new_leaves, out = run([*found.values()])
        _check_unwritten(run, found, new_leaves)
        kept = {path[1:]: leaf for path, leaf in zip(found, new_leaves, strict=True) if path[0] == "state"}
        return out, {**state, **unflatten(kept)}

    if method is None:
        stateful.__name__ = stateful.__qualname__ = type(module).__name__
    params = {slot.path: leaf for slot, leaf in zip(slots, leaves, strict=True) if slot in chosen}
    state = {slot.place: leaf for slot, leaf in zip(slots, leaves, strict=True) if slot not in chosen}
    return declaring(stateful, "from_nnx(module)", call, 1), unflatten(params), unflatten(state)


@checked
def to_nnx(module: M, params: AnyParams, state: Tree) -> M:
    """Writes params and state back into an NNX module.

    Law: the inverse of `from_nnx`: what it gave, `to_nnx(module, params, state)` writes back, and changes nothing.
    Equals `nnx.update(module, ...)`.

    >>> import jax, flaxsplit as fs
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> fn, params, state = fs.from_nnx(model)
    >>> trained = jax.tree.map(jax.numpy.zeros_like, params)
    >>> fs.to_nnx(model, trained, state)(jax.numpy.ones(2))
    Array([0., 0., 0.], dtype=float32)

    Args:
        module: the module that `from_nnx` took, or another of the same architecture. It is changed in place.
        params: as from `from_nnx`, trained; or averaged: `carry.state['ema']`.
        state: the state beside them. `'ema'` and `'extra'` in it are not written.

    Returns:
        The module, with buffers of its own: a donated step deletes nothing of it.

    Raises:
        SignatureError: `module` is not an NNX module instance.
        CollectionError: the leaves are not those of the module, or of another shape or dtype; names every one.

    As `nnx.update`, but every leaf must have its place, and every place its leaf.
    """
    where = "to_nnx(module, params, state)"
    MODULE.unless(isinstance(module, nnx.Module), where, module)
    check_mappings(where, params, state)
    _, treedef, slots, leaves = apart(module)
    _check_values(where, slots, leaves)
    own = {name: tree for name, tree in state.items() if name not in ("ema", "extra")}
    found = look_up(where, slots, params, own, strict=True)
    too_wide = (f"{keyed(path[1:], path[0])}: {wide(leaf)}" for path, leaf in found.items() if not survives(leaf))
    TOO_WIDE.if_any(too_wide, where=where)
    pairs = zip(found.items(), leaves, strict=True)
    wrong = ((path, own, leaf) for (path, leaf), own in pairs if _type_of(leaf) != _type_of(own))
    lines = (f"{keyed(path[1:], path[0])}: {describe(own)} -> {describe(leaf)}" for path, own, leaf in wrong)
    UNFIT.if_any(lines, where=where)
    copies = [_copied(leaf, own) for leaf, own in zip(found.values(), leaves, strict=True)]
    nnx.update(module, jax.tree.unflatten(treedef, copies))
    return module


def _copied(leaf: Any, own: Any) -> Any:
    """A number of Python stays one where the module holds one."""
    return leaf if not is_array(leaf) and not is_array(own) else jnp.array(leaf, copy=True)


def _check_unwritten(run: Any, found: Mapping[Path, Any], new_leaves: list[Any]) -> None:
    """Fails where a param was written. One that was not comes out as it went in, but for `nnx.remat` and `nnx.jit`."""
    if all(leaf is new for (path, leaf), new in zip(found.items(), new_leaves, strict=True) if path[0] == "params"):
        return
    with jax.disable_jit(False):  # unrolled, a scan of layers would stack its params anew
        jaxpr = jax.make_jaxpr(lambda leaves: run(leaves)[0])([*found.values()]).jaxpr
    pairs = zip(found, jaxpr.invars, jaxpr.outvars, strict=True)
    written = [path for path, old, new in pairs if path[0] == "params" and source(jaxpr, new) is not old]
    WRITTEN.unless(not written, [path[1:] for path in written])


def _check_concrete(slots: list[Slot], leaves: list[Any]) -> None:
    empty = ((slot, leaf) for slot, leaf in zip(slots, leaves, strict=True) if isinstance(leaf, jax.ShapeDtypeStruct))
    WITHOUT_VALUE.if_any(f"{joined(slot.path)}: {kind_of(leaf)}" for slot, leaf in empty)


def _check_values(where: str, slots: list[Slot], leaves: list[Any]) -> None:
    refs = ((slot, type(leaf)) for slot, leaf in zip(slots, leaves, strict=True) if _is_reference(leaf))
    REFERENCES.if_any((f"{joined(slot.path)}: {kind.__name__}" for slot, kind in refs), where=where)


def _is_reference(leaf: Any) -> bool:
    """Tells variables that are no values: `ref=True` makes one of JAX's references, `hijax=True` one of its boxes."""
    return isinstance(leaf, nnx.Variable) or type(leaf).__name__ == "Ref"


def _type_of(leaf: Any) -> tuple[Any, Any]:
    array = leaf if is_array(leaf) else jnp.asarray(leaf)
    return tuple(array.shape), array.dtype
