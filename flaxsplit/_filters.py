"""Which part: what `trainable` chooses."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax

from ._describe import describe, keyed_leaves
from ._paths import Path, flatten, inside, joined, keyed
from ._refusals.apart import MASK, NO_BOOL, NO_FILTER, NOTHING_CHOSEN
from ._types import Trainable, Tree


def choose(trainable: Trainable | None, params: Mapping[Path, Any]) -> set[Path]:
    """Gives the paths that `trainable` chooses. What is empty is always chosen: there is nothing to freeze."""
    leaves: dict[Path, Any] = {}
    owners: dict[Path, Path] = {}
    for path, param in params.items():
        inner = {} if isinstance(param, Mapping) else inside(path, param)
        leaves |= inner
        owners |= dict.fromkeys(inner, path)
    empty = params.keys() - owners.values()
    return empty | (set(leaves) if trainable is None else _chosen(trainable, leaves, owners))


def _chosen(trainable: Trainable, leaves: Mapping[Path, Any], owners: Mapping[Path, Path]) -> set[Path]:
    match trainable:
        case str():
            chosen = {path for path in leaves if any(_matches(each, trainable) for each in (path, owners[path]))}
        case Mapping():
            return _masked(trainable, leaves)
        case list() | tuple():
            chosen = set().union(*(_chosen(each, leaves, owners) for each in trainable))
        case _:
            NO_FILTER.unless(callable(trainable), trainable=trainable)
            predicate: Any = trainable
            chosen = {path for path, leaf in leaves.items() if predicate(joined(path), leaf)}
    NOTHING_CHOSEN.unless(chosen, trainable, leaves)
    return chosen


def _matches(path: Path, glob: str) -> bool:
    return fnmatch.fnmatchcase(joined(path), glob)


def _masked(mask: Tree, leaves: Mapping[Path, Any]) -> set[Path]:
    """Reads a tree of bools (optax's mask); one bool may stand for a whole branch."""
    flat = {at: bools for path, each in flatten(mask) for at, bools in inside(path, each).items()}
    owners = {
        path: next((path[:end] for end in range(1, len(path) + 1) if path[:end] in flat), None) for path in leaves
    }
    strange = [f"{keyed(path, 'params')}: no bool in the mask" for path, owner in owners.items() if owner is None]
    unused = [path for path, leaf in flat.items() if path not in owners.values() and not isinstance(leaf, Mapping)]
    strange += [f"{keyed(path, 'mask')}: no such param" for path in unused]
    chosen = {path for path, owner in owners.items() if owner is not None and _bool_of(flat[owner], owner)}
    MASK.if_any(strange or ([] if chosen else ["no True in the mask"]))
    return chosen


def _bool_of(value: Any, path: Path) -> bool:
    """Takes a bool, or a box or tuple of one and the same bool: a mask made by `jax.tree.map` keeps the boxes."""
    bools = jax.tree.leaves(value)
    is_one = all(isinstance(each, bool) for each in bools) and len(set(bools)) == 1
    leaves = () if is_one else keyed_leaves(value, keyed(path, "mask")).items()
    NO_BOOL.unless(is_one, *(f"{at}: {describe(leaf)}" for at, leaf in leaves))
    return bool(bools[0])
