"""Every array of an NNX module, with its place: among the params, or in the state."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from ._describe import ABSENT, Difference, describe
from ._mutable import HIDDEN
from ._paths import Path, flatten, joined, keyed
from ._refusals.nnx import UNFIT
from ._split import check_names
from ._types import Tree


class Slot(NamedTuple):
    """One array of a module: where it is among the params, and where in the state if it is not one of them."""

    path: Path
    collection: str

    @property
    def place(self) -> Path:
        """The path in the state. Keys lie flat, as `rng_state` makes them, so that `vmap_stateful` can split them."""
        return ("rngs", joined(self.path)) if self.collection == "rngs" else (self.collection, *self.path)


def apart(module: Any) -> tuple[Any, Any, list[Slot], list[Any]]:
    """Splits a module into its graph, the structure of its `nnx.State`, and its arrays with the place of each."""
    graphdef, state = split(module)
    leaves, treedef = jax.tree.flatten(state)
    return graphdef, treedef, [slot for path, each in nnx.to_flat_state(state) for slot in slots_of(path, each)], leaves


# Always by graph, which takes shared variables; flax < 0.11.3 has no other way and no such argument.
split: Any = nnx.split
if "graph" in inspect.signature(nnx.split).parameters:
    split = functools.partial(nnx.split, graph=True)


def slots_of(path: Path, variable: Any) -> list[Slot]:
    """Lists the arrays of one variable: mostly one, at its own path; more where its value is a tree."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(variable)
    inner = [tuple(_bare(key) for key in keys[1:]) for keys, _ in pairs]  # the first is Variable's own `.value`
    return [Slot((*map(str, path), *keys), _collection(_kind(variable))) for keys in inner]


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


def look_up(where: str, slots: list[Slot], params: Any, state: Tree, strict: bool = False) -> dict[Path, Any]:
    """Looks every slot up in the half that has it, and says which. Each leaf must have a slot, each slot one leaf.

    A collection that the module knows nothing of, such as averaged weights, is let be, unless `strict`.
    """
    own = state.keys() & ({*state} if strict else {slot.place[0] for slot in slots} | {"params"})
    flawed = ((name, state[name]) for name in own if not _is_tree(state[name]))
    UNFIT.if_any((f"{keyed((name,), 'state')}: a mapping -> {describe(tree)}" for name, tree in flawed), where=where)
    flat = {("params", *path): leaf for path, leaf in flatten(params) if not _is_tree(leaf)}
    flat |= {("state", name, *path): leaf for name in own for path, leaf in flatten(state[name]) if not _is_tree(leaf)}
    found: dict[Path, Any] = {}
    wrong: list[Difference] = []
    for slot in slots:
        places = [path for path in (("params", *slot.path), ("state", *slot.place)) if path in flat]
        found |= {path: flat.pop(path) for path in places}
        if len(places) != 1:
            name = keyed(slot.path, "params") if slot.collection == "params" else keyed(slot.place, "state")
            wrong.append(Difference(name, "one leaf", "in params and in state" if places else ABSENT))
    wrong += [Difference(keyed(path[1:], path[0]), ABSENT, describe(leaf)) for path, leaf in flat.items()]
    if wrong:
        check_names(where, params, state)  # not before: an attribute of the module may have any name
    UNFIT.if_any(map(str, wrong), where=where)
    return found


def _is_tree(value: Any) -> bool:
    return isinstance(value, Mapping)
