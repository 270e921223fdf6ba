"""Flat views of nested mappings, by path."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.core.meta import AxisMetadata

Path = tuple[Any, ...]


def flatten(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Lists what is not a mapping by its path; an empty branch counts as a leaf, so that it survives a round trip."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Rebuilds nested plain dicts from paths. The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[name] = {} if isinstance(leaf, Mapping) else leaf
    return tree


def is_container(value: Any) -> bool:
    """Tells a param that is a tree itself, a list or a dataclass of arrays; a box of metadata is one leaf."""
    return not isinstance(value, Mapping | AxisMetadata) and not jax.tree_util.all_leaves([value])


def inside(path: Path, value: Any) -> dict[Path, Any]:
    """The leaves of a param by path: of a list or a dataclass each of its arrays, else the param alone."""
    if not is_container(value):
        return {path: value}
    pairs, _ = jax.tree_util.tree_flatten_with_path(value)
    return {(*path, *map(entry_name, keys)): leaf for keys, leaf in pairs}


def joined(path: Path) -> str:
    """Writes a path as globs see it: `Dense_0/kernel`."""
    return "/".join(map(str, path))


def keyed(path: Path, name: str) -> str:
    """Writes a path as errors say it: `params['Dense_0']['kernel']`."""
    return name + "".join(f"[{key!r}]" for key in path)


def bare_path(path: tuple[Any, ...]) -> str:
    """Writes a key path as globs see it: `opt_state/0/count`."""
    return "/".join(str(entry_name(key)) for key in path)


def entry_name(key: Any) -> Any:
    """The bare name in a key path entry, whichever kind of container it came from."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key
