"""Which part: what `trainable` chooses."""

import difflib
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax

from ._describe import describe, keyed_leaves
from ._errors import CollectionError, SignatureError
from ._paths import Path, flatten, joined, keyed
from ._types import Trainable, Tree


def choose(trainable: Trainable | None, params: Mapping[Path, Any]) -> set[Path]:
    """Gives the paths that `trainable` chooses. Empty branches are always chosen: there is nothing to freeze."""
    branches = {path for path, leaf in params.items() if isinstance(leaf, Mapping)}
    leaves = {path: leaf for path, leaf in params.items() if path not in branches}
    return branches | (set(leaves) if trainable is None else _chosen(trainable, leaves))


def _chosen(trainable: Trainable, leaves: Mapping[Path, Any]) -> set[Path]:
    match trainable:
        case str():
            chosen = {path for path in leaves if fnmatch.fnmatchcase(joined(path), trainable)}
        case Mapping():
            return _masked(trainable, leaves)
        case list() | tuple():
            chosen = set().union(*(_chosen(each, leaves) for each in trainable))
        case _ if callable(trainable):
            chosen = {path for path, leaf in leaves.items() if trainable(joined(path), leaf)}
        case _:
            raise SignatureError(
                "split_params(trainable=...)",
                "a glob, a predicate (path, leaf) -> bool, a tree of bools, or a list of these",
                [f"trainable: {describe(trainable)}"],
                "something else was passed",
                "split_params(variables, trainable='head/*')",
            )
    if not chosen:
        raise _nothing_chosen(trainable, leaves)
    return chosen


def _negated(asked: str, paths: int) -> CollectionError:
    """What `!` stands for elsewhere: everything but that."""
    start = asked.lstrip("!").rstrip("*")
    return CollectionError(
        "split_params(trainable=...)",
        "the filter must match at least one param",
        [f"{asked!r} matches none of {paths}"],
        "a glob has no '!': it chooses what is trained, and nothing takes away from it",
        f"trainable=lambda path, leaf: not path.startswith({start!r})",
    )


def _nothing_chosen(trainable: Trainable, leaves: Mapping[Path, Any]) -> CollectionError:
    if isinstance(trainable, str) and trainable.startswith("!"):
        return _negated(trainable, len(leaves))
    paths = [joined(path) for path in leaves]
    branches = {joined(path[:end]) + "/*" for path in leaves for end in range(1, len(path))}
    asked = trainable if isinstance(trainable, str) else ""
    near = difflib.get_close_matches(asked, [*sorted(branches), *paths], n=3, cutoff=0.5)
    shown = repr(trainable) if asked else "the predicate" if callable(trainable) else f"an empty {describe(trainable)}"
    return CollectionError(
        "split_params(trainable=...)",
        "the filter must match at least one param",
        [f"{shown} matches none of {len(paths)}: {', '.join(map(repr, paths[:3]))}{', ...' if len(paths) > 3 else ''}"],
        "a misspelt path"
        if asked
        else "the predicate takes (path, leaf), the path joined by '/'"
        if callable(trainable)
        else "the filters were lost on the way",
        f"did you mean {' or '.join(map(repr, near))}?" if near else "a glob on the '/'-joined path: 'head/*'",
    )


def _masked(mask: Tree, leaves: Mapping[Path, Any]) -> set[Path]:
    """Reads a tree of bools (optax's mask); one bool may stand for a whole branch."""
    flat = dict(flatten(mask))
    owners = {
        path: next((path[:end] for end in range(1, len(path) + 1) if path[:end] in flat), None) for path in leaves
    }
    strange = [f"{keyed(path, 'params')}: no bool in the mask" for path, owner in owners.items() if owner is None]
    unused = [path for path, leaf in flat.items() if path not in owners.values() and not isinstance(leaf, Mapping)]
    strange += [f"{keyed(path, 'mask')}: no such param" for path in unused]
    chosen = {path for path, owner in owners.items() if owner is not None and _bool_of(flat[owner], owner)}
    if strange or not chosen:
        raise CollectionError(
            "split_params(trainable=...)",
            "a tree of bools must have the structure of the params, and at least one True",
            strange or ["no True in the mask"],
            "the mask was made for other params",
            "trainable=jax.tree.map(lambda leaf: ..., variables['params'])",
        )
    return chosen


def _bool_of(value: Any, path: Path) -> bool:
    """Takes a bool, or a box or tuple of one and the same bool: a mask made by `jax.tree.map` keeps the boxes."""
    bools = jax.tree.leaves(value)
    if all(isinstance(each, bool) for each in bools) and len(set(bools)) == 1:
        return bool(bools[0])
    raise SignatureError(
        "split_params(trainable=...)",
        "every leaf of the mask must be one bool",
        [f"{at}: {describe(leaf)}" for at, leaf in keyed_leaves(value, keyed(path, "mask")).items()],
        "arrays or strings where bools are due, or two answers for one boxed param",
        "trainable=jax.tree.map(lambda leaf: leaf.ndim > 1, variables['params'])",
    )
