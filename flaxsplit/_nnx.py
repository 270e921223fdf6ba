"""NNX modules as stateful functions over plain dicts, so that a step over them is dispatched by `jax.jit` alone."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from ._checks import checked, survives
from ._declared import declaring
from ._describe import ABSENT, Difference, describe, is_array, kind_of, wraps
from ._errors import CollectionError, SignatureError, StateDriftError
from ._filters import choose
from ._jaxprs import source
from ._linear import noted
from ._mutable import HIDDEN
from ._paths import Path, flatten, joined, keyed, unflatten
from ._refusals.carry import TOO_WIDE, wide
from ._refusals.nnx import METHOD, NOTHING_CHOSEN, REFERENCES, WITHOUT_VALUE, WRITTEN
from ._split import check_mappings, check_names
from ._types import AnyParams, Params, State, Stateful, Trainable, Tree

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


class _Slot(NamedTuple):
    """One array of a module: where it is among the params, and where in the state if it is not one of them."""

    path: Path
    collection: str

    @property
    def place(self) -> Path:
        """The path in the state. Keys lie flat, as `rng_state` makes them, so that `vmap_stateful` can split them."""
        return ("rngs", joined(self.path)) if self.collection == "rngs" else (self.collection, *self.path)


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
    _check_module("from_nnx(module)", module)
    graphdef, treedef, slots, leaves = _apart(module)
    _check_concrete(slots, leaves)
    _check_values("from_nnx(module)", slots, leaves)
    chosen = _trainable(trainable, module, dict(zip(slots, leaves, strict=True)))
    given: Any = method
    METHOD.unless(given is None or (callable(given) and not isinstance(given, type)), given, module)
    call = type(module).__call__ if method is None else getattr(method, "__func__", method)  # bound: brings its module

    @wraps(call, ("params", "state"), 1)
    @noted
    def stateful(params: AnyParams, state: Tree, /, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        check_mappings("from_nnx(module)", params, state)
        found = _found("fn(params, state, *args)", slots, params, state)

        def run(_leaves: list[Any]) -> tuple[list[Any], Any]:
            _module = nnx.merge(graphdef, jax.tree.unflatten(treedef, _leaves))
            _out = call(_module, *args, **kwargs)
            _graphdef, _, _slots, _new_leaves = _apart(_module)
            _check_slots(dict(zip(slots, _leaves, strict=True)), dict(zip(_slots, _new_leaves, strict=True)))
            if _graphdef != graphdef:
                _raise_changed(nnx.merge(graphdef, jax.tree.unflatten(treedef, _leaves)), _module)
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
    _check_module(where, module)
    check_mappings(where, params, state)
    _, treedef, slots, leaves = _apart(module)
    _check_values(where, slots, leaves)
    own = {name: tree for name, tree in state.items() if name not in ("ema", "extra")}
    found = _found(where, slots, params, own, strict=True)
    too_wide = (f"{keyed(path[1:], path[0])}: {wide(leaf)}" for path, leaf in found.items() if not survives(leaf))
    TOO_WIDE.if_any(too_wide, where=where)
    wrong: list[Difference] = []
    for (path, leaf), own in zip(found.items(), leaves, strict=True):
        if _type_of(leaf) != _type_of(own):
            wrong.append(Difference(keyed(path[1:], path[0]), describe(own), describe(leaf)))
    _check_fit(where, wrong)
    copies = [_copied(leaf, own) for leaf, own in zip(found.values(), leaves, strict=True)]
    nnx.update(module, jax.tree.unflatten(treedef, copies))
    return module


def _copied(leaf: Any, own: Any) -> Any:
    """A number of Python stays one where the module holds one."""
    return leaf if not is_array(leaf) and not is_array(own) else jnp.array(leaf, copy=True)


def _apart(module: Any) -> tuple[Any, Any, list[_Slot], list[Any]]:
    """Splits a module into its graph, the structure of its `nnx.State`, and its arrays with the place of each."""
    graphdef, state = _split(module)
    leaves, treedef = jax.tree.flatten(state)
    return graphdef, treedef, [slot for path, each in nnx.to_flat_state(state) for slot in _slots(path, each)], leaves


# Always by graph, which takes shared variables; flax < 0.11.3 has no other way and no such argument.
_split: Any = nnx.split
if "graph" in inspect.signature(nnx.split).parameters:
    _split = functools.partial(nnx.split, graph=True)


def _slots(path: Path, variable: Any) -> list[_Slot]:
    """Lists the arrays of one variable: mostly one, at its own path; more where its value is a tree."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(variable)
    inner = [tuple(_bare(key) for key in keys[1:]) for keys, _ in pairs]  # the first is Variable's own `.value`
    return [_Slot((*map(str, path), *keys), _collection(_kind(variable))) for keys in inner]


def _bare(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _kind(variable: Any) -> type:
    """The type of a variable; flax < 0.11 keeps it in a `VariableState`."""
    return type(variable) if isinstance(variable, nnx.Variable) else getattr(variable, "type", type(variable))


def _collection(kind: type) -> str:
    if issubclass(kind, nnx.Param):  # a kind of Param that is not trained is a frozen param
        return "params"
    if issubclass(kind, nnx.RngKey):
        return "rngs"
    if issubclass(kind, nnx.RngCount):
        return "rng_counts"
    if not issubclass(kind, nnx.Variable):
        return "arrays"
    try:
        name = nnx.variable_name_from_type(kind)
    except ValueError:  # a type that nobody registered
        name = kind.__name__
    return f"{name}_" if name in HIDDEN else name


def _trainable(trainable: Any, module: Any, leaves: Mapping[_Slot, Any]) -> set[_Slot]:
    """Gives the slots that a filter of NNX's or of ours chooses. Each filter of a list must choose something."""
    where = "from_nnx(trainable=...)"
    if _is_without_params(trainable, module, leaves):
        return set()
    if isinstance(trainable, list | tuple) and trainable:
        return set().union(*(_trainable(each, module, leaves) for each in trainable))
    if isinstance(trainable, str | Mapping):
        params = {slot.path: leaf for slot, leaf in leaves.items() if slot.collection == "params"}
        try:
            paths = choose(trainable, params)
        except (CollectionError, SignatureError) as error:
            fix = error.fix.replace("variables['params']", "params").replace(
                "split_params(variables)", "from_nnx(module)"
            )
            raise type(error)(where, error.required, error.leaves, error.cause, fix) from None
        return {slot for slot in leaves if slot.path in paths}
    if not _is_filter(trainable):
        raise SignatureError(
            where,
            "one of NNX's filters, a glob, a tree of bools, or a list of these",
            [f"trainable: {describe(trainable)}"],
            "something else was passed",
            "from_nnx(module, trainable=nnx.Param)",
        )
    matches: Any = nnx.filterlib.to_predicate(trainable)
    flat = nnx.to_flat_state(_split(module)[1])
    chosen = {slot for path, each in flat if matches(path, each) for slot in _slots(path, each)}
    held = {slot.collection for slot in leaves}
    NOTHING_CHOSEN.unless(chosen, trainable, held, len(leaves), not leaves and _is_bridged(module))
    rigid = [slot for slot in leaves if slot in chosen and not _is_inexact(leaves[slot])]
    if rigid:
        raise CollectionError(
            where,
            "every param must be differentiable: of a floating or complex dtype",
            [f"{joined(slot.path)}: {describe(leaves[slot])}, of {slot.collection!r}" for slot in rigid],
            "the filter chooses more than params",
            "trainable=nnx.All(nnx.Param, ...) with the filter for ...",
        )
    return chosen


def _is_without_params(trainable: Any, module: Any, leaves: Mapping[_Slot, Any]) -> bool:
    """Whether a filter asks for params, or for nothing, and the module has none: then it is all state."""
    if any(slot.collection == "params" for slot in leaves):
        return False
    is_empty = isinstance(trainable, list | tuple | Mapping) and not trainable
    asks = is_empty or trainable is None or trainable is nnx.Param or trainable is False or _is_glob(trainable, "*")
    return asks and (bool(leaves) or not _is_bridged(module))  # a bridge without variables was not initialized


def _is_glob(trainable: Any, glob: str) -> bool:
    return isinstance(trainable, str) and trainable == glob


def _is_bridged(module: Any) -> bool:
    return any(isinstance(node, nnx.bridge.ToNNX) for _, node in nnx.iter_graph(module))


def _is_filter(trainable: Any) -> bool:
    empty = isinstance(trainable, list | tuple) and not trainable
    return callable(trainable) or empty or trainable is None or trainable is ... or isinstance(trainable, bool)


def _found(where: str, slots: list[_Slot], params: Any, state: Tree, strict: bool = False) -> dict[Path, Any]:
    """Looks every slot up in the half that has it, and says which. Each leaf must have a slot, each slot one leaf.

    A collection that the module knows nothing of, such as averaged weights, is let be, unless `strict`.
    """
    collections = {*state} if strict else {slot.place[0] for slot in slots} | {"params"}
    wrong = [
        Difference(keyed((name,), "state"), "a mapping", describe(state[name]))
        for name in state.keys() & collections
        if not isinstance(state[name], Mapping)
    ]
    _check_fit(where, wrong)
    flat = {("params", *path): leaf for path, leaf in flatten(params) if not isinstance(leaf, Mapping)}
    flat |= {
        ("state", name, *path): leaf
        for name in state.keys() & collections
        for path, leaf in flatten(state[name])
        if not isinstance(leaf, Mapping)
    }
    found: dict[Path, Any] = {}
    for slot in slots:
        places = [path for path in (("params", *slot.path), ("state", *slot.place)) if path in flat]
        found |= {path: flat.pop(path) for path in places}
        if len(places) != 1:
            name = keyed(slot.path, "params") if slot.collection == "params" else keyed(slot.place, "state")
            wrong.append(Difference(name, "one leaf", "in params and in state" if places else ABSENT))
    wrong += [Difference(keyed(path[1:], path[0]), ABSENT, describe(leaf)) for path, leaf in flat.items()]
    if wrong:
        check_names(where, params, state)  # not before: an attribute of the module may have any name
    _check_fit(where, wrong)
    return found


def _check_fit(where: str, wrong: list[Difference]) -> None:
    if wrong:
        raise CollectionError(
            where,
            "params and state must hold each variable of the module and no other (module -> given)",
            [str(each) for each in wrong],
            "they are of another architecture, or a part was lost",
            "fn, params, state = from_nnx(module), and to_nnx with this module",
        )


def _check_slots(before: Mapping[_Slot, Any], after: Mapping[_Slot, Any]) -> None:
    if before.keys() == after.keys():
        return
    come = [
        Difference(keyed(slot.place, "state"), ABSENT, describe(after[slot])) for slot in after if slot not in before
    ]
    gone = [
        Difference(keyed(slot.place, "state"), describe(before[slot]), ABSENT) for slot in before if slot not in after
    ]
    kind = _named({slot.collection for slot in after if slot not in before})
    raise StateDriftError(
        "from_nnx(module)",
        "a call must leave the module with the variables that it had",
        [str(each) for each in come + gone],
        "self.sow, or a variable made in __call__",
        f"make it in __init__, or hand it out: from_nnx(m, method=lambda m, x: (m(x), nnx.pop(m, {kind})))",
    )


def _named(collections: set[str]) -> str:
    """The type of variable that a collection is of, as its user writes it."""
    name = min(collections, default="intermediates")
    try:
        kind = nnx.variable_type_from_name(name)
    except (ValueError, AttributeError):  # named by its class; or an older flax, which knows no way back
        return name
    return f"nnx.{kind.__name__}" if hasattr(nnx, kind.__name__) else kind.__name__


def _raise_changed(before: Any, after: Any) -> None:
    """Names the Python attributes that a call changed. NNX would compile again for each of their values."""
    old, new = dict(_attributes(before)), dict(_attributes(after))
    paths = [path for path in old | new if old.get(path, ABSENT) != new.get(path, ABSENT)]
    raise StateDriftError(
        "from_nnx(module)",
        "a call must leave the module's attributes as they were",
        [f"{path}: {old.get(path, ABSENT)} -> {new.get(path, ABSENT)}" for path in paths] or ["the graph of modules"],
        "a counter or a mode kept in a Python attribute",
        "keep it in a variable, nnx.Variable(jnp.zeros((), jnp.int32)); change modes before from_nnx",
    )


def _attributes(module: Any) -> Iterator[tuple[str, str]]:
    for path, node in nnx.iter_graph(module):
        for name, value in vars(node).items() if isinstance(node, nnx.Module) else ():
            if isinstance(value, int | float | str | None):
                yield ".".join(map(str, ("module", *path, name))), repr(value)


def _check_unwritten(run: Any, found: Mapping[Path, Any], new_leaves: list[Any]) -> None:
    """Fails where a param was written. One that was not comes out as it went in, but for `nnx.remat` and `nnx.jit`."""
    if all(leaf is new for (path, leaf), new in zip(found.items(), new_leaves, strict=True) if path[0] == "params"):
        return
    with jax.disable_jit(False):  # unrolled, a scan of layers would stack its params anew
        jaxpr = jax.make_jaxpr(lambda leaves: run(leaves)[0])([*found.values()]).jaxpr
    pairs = zip(found, jaxpr.invars, jaxpr.outvars, strict=True)
    written = [path for path, old, new in pairs if path[0] == "params" and source(jaxpr, new) is not old]
    WRITTEN.unless(not written, [path[1:] for path in written])


def _check_module(where: str, module: Any) -> None:
    if isinstance(module, nnx.Module):
        return
    if isinstance(module, type):
        came, cause, fix = f"the class {module.__name__}", "the module was not constructed", f"{module.__name__}(...)"
    elif isinstance(module, nn.Module):
        came, cause = f"{type(module).__name__}, a Linen module", "it belongs to Flax's other API"
        fix = "with_mutable(module), or nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=rngs), x)"
    else:
        came, cause = describe(module), "what nnx.split returns was passed, or another object"
        fix = "from_nnx(nnx.merge(graphdef, state))"
    raise SignatureError(where, "module must be an instance of nnx.Module", [f"module: {came}"], cause, fix)


def _check_concrete(slots: list[_Slot], leaves: list[Any]) -> None:
    empty = ((slot, leaf) for slot, leaf in zip(slots, leaves, strict=True) if isinstance(leaf, jax.ShapeDtypeStruct))
    WITHOUT_VALUE.if_any(f"{joined(slot.path)}: {kind_of(leaf)}" for slot, leaf in empty)


def _check_values(where: str, slots: list[_Slot], leaves: list[Any]) -> None:
    refs = ((slot, type(leaf)) for slot, leaf in zip(slots, leaves, strict=True) if _is_reference(leaf))
    REFERENCES.if_any((f"{joined(slot.path)}: {kind.__name__}" for slot, kind in refs), where=where)


def _is_reference(leaf: Any) -> bool:
    """Tells variables that are no values: `ref=True` makes one of JAX's references, `hijax=True` one of its boxes."""
    return isinstance(leaf, nnx.Variable) or type(leaf).__name__ == "Ref"


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact))


def _type_of(leaf: Any) -> tuple[Any, Any]:
    array = leaf if is_array(leaf) else jnp.asarray(leaf)
    return tuple(array.shape), array.dtype
