"""Take apart and put back: `split_params` and its inverse."""

from collections.abc import Mapping
from typing import Any

import jax

from ._checks import checked
from ._describe import describe, plain, same_structure
from ._filters import choose
from ._paths import Path, flatten, inside, keyed, unflatten
from ._refusals.apart import NO_HALF, NO_MAPPING, NO_PARAMS, OVERLAP, SWAPPED, VARIABLES, WRAPPED_TWICE
from ._types import RESERVED, AnyParams, Params, State, Trainable, Tree, Variables


@checked
def split_params(variables: Tree, *, trainable: Trainable | None = None) -> tuple[Params, State]:
    """Splits variables into the params to optimize and the state, which is everything else.

    Law: `merge_state(*split_params(variables, trainable=t)) == variables`, leaf for leaf, for every `t`.
    Equals `variables.pop('params')` if every param is trainable.

    >>> import jax, flax.linen as nn, flaxsplit as fs
    >>> variables = nn.Sequential([nn.Dense(4), nn.Dense(2)]).init(jax.random.key(0), jax.numpy.ones(3))
    >>> params, state = fs.split_params(variables, trainable="layers_1/*")
    >>> sorted(params), sorted(state["params"])
    (['layers_1'], ['layers_0'])

    Args:
        variables: Flax's whole mapping, `{collection: tree}`: dict, FrozenDict or any Mapping. Boxes stay boxed.
        trainable: the params to optimize; all by default. A glob on the `/`-joined path (`*` crosses `/`), a predicate
            `(path, leaf) -> bool`, a tree of bools (one may stand for a branch), or a list of these, of which any may
            match. The path of a list or a dataclass of arrays chooses it whole; `blocks/0` chooses a part.

    Returns:
        `(params, state)`, plain nested dicts. Params that `trainable` does not choose are in `state['params']`. A list
            or a dataclass that is chosen in part is in both, with None for each leaf of the other half.

    Raises:
        CollectionError: `'params'` is missing or nested twice, or a filter matches nothing.

    As `equinox.partition`, but by path, into halves without holes; a filter that matches nothing is an error.
    """
    tree = _params_of(variables)
    leaves = dict(flatten(tree))
    chosen = choose(trainable, leaves)
    params, frozen = (unflatten(_half(leaves, chosen, trained)) for trained in (True, False))
    state = {name: plain(tree) for name, tree in variables.items() if name != "params"}
    return params, state | ({"params": frozen} if frozen else {})


@checked
def merge_state(params: AnyParams, state: Tree) -> Variables:
    """Puts params and state together into Flax's variables.

    Law: the inverse of `split_params`. Equals `{"params": params, **state}` if no param is frozen.

    >>> import flaxsplit as fs
    >>> fs.merge_state({"head": {"w": 1}}, {"params": {"body": {"w": 2}}, "batch_stats": {}})
    {'params': {'body': {'w': 2}, 'head': {'w': 1}}, 'batch_stats': {}}

    Args:
        params: the tree that the optimizer updates.
        state: `{collection: tree}`; frozen params in `state['params']`.

    Returns:
        `{collection: tree}` in plain dicts, the two parts of `'params'` joined.

    Raises:
        CollectionError: a param is in both halves, whole variables came in the place of params, or the two are swapped.

    As `{**params, **state}`, but overlap is an error, not a silent choice.
    """
    check_halves("merge_state(params, state)", params, state)
    frozen, trained = dict(flatten(state.get("params", {}))), dict(flatten(params))
    collections = {name: plain(tree) for name, tree in state.items() if name != "params"}
    return {"params": _joined(frozen, trained) if frozen else plain(params), **collections}


def _half(leaves: dict[Path, Any], chosen: set[Path], trained: bool) -> dict[Path, Any]:
    """The params that are trained, or those that are not. A list or a dataclass of both is in both, None for a hole."""
    half: dict[Path, Any] = {}
    for path, param in leaves.items():
        inner = inside(path, param)
        mine = [(at in chosen) is trained for at in inner]
        if all(mine) and (inner or trained):
            half[path] = param
        elif any(mine):
            kept = [leaf if own else None for own, leaf in zip(mine, inner.values(), strict=True)]
            half[path] = jax.tree.unflatten(jax.tree.structure(param), kept)
    return half


def _joined(frozen: dict[Any, Any], trained: dict[Any, Any]) -> dict[str, Any]:
    for path in frozen.keys() & trained.keys():
        if _are_halves(frozen[path], trained[path]):
            trained[path] = jax.tree.map(_either, trained[path], frozen.pop(path), is_leaf=_is_hole)
    frozen = {path: leaf for path, leaf in frozen.items() if not _is_empty(leaf) or path not in _prefixes(trained)}
    trained = {path: leaf for path, leaf in trained.items() if not _is_empty(leaf) or path not in _prefixes(frozen)}
    both = (frozen.keys() & _prefixes(trained)) | (trained.keys() & _prefixes(frozen))
    OVERLAP.if_any(sorted(keyed(path, "params") for path in both))
    return unflatten(frozen | trained)


def _are_halves(one: Any, other: Any) -> bool:
    """Whether two containers are of one structure, and each leaf is in one of them at most."""
    ones, others = (jax.tree.leaves(each, is_leaf=_is_hole) for each in (one, other))
    is_same = same_structure(*(jax.tree.map(_is_hole, each, is_leaf=_is_hole) for each in (one, other)))
    return is_same and all(a is None or b is None for a, b in zip(ones, others, strict=True))


def _either(one: Any, other: Any) -> Any:
    return other if one is None else one


def _is_hole(leaf: Any) -> bool:
    return leaf is None


def _prefixes(leaves: dict[Any, Any]) -> set[Any]:
    return {path[:end] for path in leaves for end in range(1, len(path) + 1)}


def _is_empty(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and not leaf


def _params_of(variables: Any) -> Tree:
    NO_MAPPING.unless(isinstance(variables, Mapping), variables=variables)
    tree = variables.get("params")
    NO_PARAMS.unless(isinstance(tree, Mapping), variables)
    is_wrapped = isinstance(tree.get("params"), Mapping) and RESERVED.issuperset(tree)
    WRAPPED_TWICE.unless(not is_wrapped, tree)
    params: Tree = tree
    return params


def check_halves(where: str, params: Any, state: Any) -> None:
    """Recognises what is often passed for params and state: the two swapped, variables, or one of them forgotten."""
    check_mappings(where, params, state)
    check_names(where, params, state)


def check_mappings(where: str, params: Any, state: Any) -> None:
    """Recognises one of the two halves forgotten."""
    call = where if "params, state" in where else "fn(params, state, *args)"
    if isinstance(params, Mapping) and not isinstance(state, Mapping):
        VARIABLES.unless(not _are_variables(params, state), params, where)
    for half, tree in (("params", params), ("state", state)):
        NO_HALF.unless(isinstance(tree, Mapping), f"{half}: {describe(tree)}", where=where, half=half, call=call)


def check_names(where: str, params: Tree, state: Tree) -> None:
    """Recognises the two halves swapped, and variables, by the names that they have."""
    if _are_swapped(params, state):
        call = where if "params, state" in where else "fn(params, state, *args)"
        SWAPPED.if_any([f"params: {_names(params)}", f"state: {_names(state)}"], where=where, call=call)
    VARIABLES.unless(not _are_variables(params, state), params, where)


def _are_swapped(params: Tree, state: Tree) -> bool:
    """Whether params hold collections, and state holds none. A submodule may be called `cache`; then more must fit."""
    if not (params and state and RESERVED.issuperset(params) and RESERVED.isdisjoint(state)):
        return False
    modules = {name for tree in params.values() if isinstance(tree, Mapping) for name in tree}
    is_sure = not {"batch_stats", "rngs"}.isdisjoint(params) or ("params" in params and len(params) > 1)
    return is_sure or not modules.isdisjoint(state) or not all(isinstance(tree, Mapping) for tree in state.values())


def _are_variables(params: Tree, state: Any) -> bool:
    """Whether params are variables: other names beside `'params'` are collections; else a module is called so."""
    known = RESERVED | set(state if isinstance(state, Mapping) else params)
    return isinstance(params.get("params"), Mapping) and known.issuperset(params)


def _names(tree: Tree) -> list[str]:
    return sorted(map(str, tree))
