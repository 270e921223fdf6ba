"""Words for trees: a leaf as `f32[2,3]`, a place as a key path, two trees as the list of what differs."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_SHORT = re.compile(r"^(b|f|i|u|c)[a-z]*?(\d+)")  # bfloat16 -> b, 16; kept apart from float16 below
_ARRAY = re.compile(r"(?:\w+ )*([\w<>]+)\[(.*)\]( \(weak type\))?")  # what `kind_of` says of one
_SIZES = re.compile(r"(?:^|,)(\d+)")  # without the mesh axes, whose names may hold digits: `64@x1,4`


class Abstract(str):
    """An array leaf reduced to its words, so that a recorded tree holds neither buffers nor tracers."""


class Difference(NamedTuple):
    """One place where two trees are not the same, with each side in words."""

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"

    @property
    def kind(self) -> str:
        """What sets the sides apart: `structure`, or of arrays `rows`, another `shape`, `dtype`, `weak` or `place`."""
        before, after = _ARRAY.fullmatch(self.before), _ARRAY.fullmatch(self.after)
        if not before or not after:
            return "structure"
        old, new = _SIZES.findall(before[2]), _SIZES.findall(after[2])
        if old != new:
            return "rows" if old and new and old[1:] == new[1:] else "shape"
        if before[1] != after[1]:
            return "dtype"
        return "place" if before[3] == after[3] else "weak"


ABSENT = "absent"


def is_array(leaf: object) -> bool:
    """Tells arrays (of JAX, NumPy, abstract, traced, keys) from everything else."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_numeric(leaf: object) -> bool:
    """Tells what JAX computes with: its arrays, and numbers of Python and NumPy, but no objects, strings and dates."""
    if isinstance(leaf, jax.Array | bool | int | float | complex):
        return True
    return isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "OSUMm"


def is_deleted(leaf: object) -> bool:
    """Tells arrays whose buffer was donated."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()


def describe(leaf: Any) -> str:
    """Says a leaf in JAX's short form, never its value: `f32[2,3]`, `key<fry>[]`, `f32[] (weak type)`, `str`."""
    if not is_array(leaf):
        return type(leaf).__name__
    name = str(leaf.dtype)
    short = name.replace("bfloat", "bf") if name.startswith("bfloat") else _SHORT.sub(r"\1\2", name)
    weak = " (weak type)" if getattr(leaf, "weak_type", False) else ""
    return f"{short}[{_dimensions(leaf)}]{weak}"


def form_of(value: Any) -> str:
    """As `describe`, with the size of a tuple."""
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else describe(value)


def kind_of(leaf: Any) -> str:
    """As `describe`, with the type where what is wrong with an array is that it is none of JAX's."""
    if is_deleted(leaf):
        return f"deleted {describe(leaf)}"
    return describe(leaf) if not is_array(leaf) else f"{type(leaf).__name__} {describe(leaf)}"


def _dimensions(leaf: Any) -> str:
    """Joins the sizes; where the mesh is part of the type (explicit axes) each size carries its axis: `8@x`."""
    spec = _explicit_spec(leaf)
    return ",".join(f"{size}@{axis}" if axis else str(size) for size, axis in zip(leaf.shape, spec, strict=False))


def _explicit_spec(leaf: Any) -> tuple[Any, ...]:
    nothing = (None,) * len(leaf.shape)
    if not isinstance(leaf, jax.Array):
        return nothing
    sharding: Any = getattr(jax.typeof(leaf), "sharding", None)
    return (*getattr(sharding, "spec", ()), *nothing)


def abstract(tree: Any) -> Any:
    """Replaces every array by its words and keeps the rest: structure, static fields, Python values."""
    return jax.tree.map(lambda leaf: Abstract(describe(leaf)) if is_array(leaf) else leaf, tree)


def keyed_leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """Lists the leaves by key path: `{"state['batch_stats']['mean']": ...}`."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name + jax.tree_util.keystr(path): leaf for path, leaf in pairs}


def differences(before: Any, after: Any, path: str = "") -> list[Difference]:
    """Lists where two trees differ: in structure, in static fields, or in the words for a leaf."""
    return list(_differences(abstract(before), abstract(after), path))


def _differences(before: Any, after: Any, path: str) -> Iterator[Difference]:
    old, new = _children(before), _children(after)
    if old is None or new is None or _kind(before) != _kind(after):
        if not (old is None and new is None and _same(before, after)):
            yield Difference(path, *_told_apart(before, after))
        return
    for name in old | new:
        if name not in new:
            yield from (Difference(path, _words(leaf), ABSENT) for path, leaf in _below(old[name], path + name))
        elif name not in old:
            yield from (Difference(path, ABSENT, _words(leaf)) for path, leaf in _below(new[name], path + name))
        else:
            yield from _differences(old[name], new[name], path + name)
    yield from _static_differences(before, after, path, old.keys())


def _children(tree: Any) -> dict[str, Any] | None:
    """Takes one level of a pytree apart, by key; None for a leaf."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    if len(pairs) == 1 and pairs[0][0] == ():
        return None
    return {jax.tree_util.keystr(path): child for path, child in pairs}


def _below(tree: Any, path: str) -> list[tuple[str, Any]]:
    """Lists every leaf under a place, or the place itself where it holds none."""
    return list(keyed_leaves(tree, path).items()) or [(path, tree)]


def _static_differences(before: Any, after: Any, path: str, children: Any) -> Iterator[Difference]:
    """Compares what a pytree keeps beside its children: by field in a dataclass, as a whole in any other node."""
    if dataclasses.is_dataclass(before):
        for field in dataclasses.fields(before):
            old, new = getattr(before, field.name, None), getattr(after, field.name, None)
            if f".{field.name}" not in children and not _same(old, new):
                yield Difference(f"{path}.{field.name}", *_told_apart(old, new))
    elif not isinstance(before, Mapping) and not _same(_node_data(before), _node_data(after)):
        yield Difference(path, *_told_apart(_node_data(before), _node_data(after)))


def _node_data(tree: Any) -> Any:
    treedef: Any = jax.tree.structure(tree, is_leaf=lambda node: node is not tree)
    data = treedef.node_data()
    return None if data is None else data[1]


def _kind(tree: Any) -> str:
    return type(tree).__name__


def _same(old: Any, new: Any) -> bool:
    return old is new or (type(old) is type(new) and bool(old == new))


def _words(value: Any) -> str:
    """Says a static value: small ones as written, others by type, since their repr may be pages."""
    if isinstance(value, Abstract):
        return str(value)
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else _kind(value)


def _told_apart(old: Any, new: Any) -> tuple[str, str]:
    """Two values in words; unequal objects that read alike are told apart, since JAX compares them by `==`."""
    before, after = _words(old), _words(new)
    return (before, after) if before != after else (before, f"another {after} (not equal to the first)")


def shorten(lines: Sequence[str], most: int = 12) -> list[str]:
    """Keeps a message readable where every leaf of a large tree is at fault."""
    return [*lines] if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]


def same_structure(before: Any, after: Any) -> bool:
    """Compares two trees but for their leaves."""
    old: Any = jax.tree.structure(before)
    return bool(old == jax.tree.structure(after))


def alike(before: Any, after: Any) -> bool:
    """Compares two trees of arrays but for their values: cheap, and without words."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=False)
    return same_structure(before, after) and all(_type_of(old) == _type_of(new) for old, new in pairs)


def _type_of(leaf: Any) -> tuple[Any, Any]:
    if not is_numeric(leaf):
        return type(leaf), None
    kind = jax.typeof(leaf)
    return kind.shape, kind.dtype


def same_leaves(before: Any, after: Any) -> bool:
    """Whether two trees hold the very same objects: what a call did not write comes back as it went in."""
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def shapes_of(tree: Any) -> list[tuple[int, ...]]:
    """The shapes of the leaves."""
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def plain(tree: Any) -> Any:
    """Rebuilds nested mappings as plain dicts, never a view of the argument; leaves and boxes stay as they are."""
    if not isinstance(tree, Mapping):
        return tree
    copied = {}
    for key, value in tree.items():  # no comprehension, which would take a second frame of the stack for each level
        copied[key] = plain(value)
    return copied


def strong(leaf: Any) -> Any:
    """Drops a weak type, which loses nothing; Python scalars and NumPy arrays become JAX arrays."""
    if not is_numeric(leaf) or (isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False)):
        return leaf
    return jnp.asarray(leaf, dtype=jax.typeof(leaf).dtype)
