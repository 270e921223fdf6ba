"""What the leaves alone show: types, places, buffers, and what lies on the host."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ._describe import Abstract, Difference, describe, differences, is_array, is_deleted, keyed_leaves, same_structure
from ._look import Leaf, Look

LARGE = 1 << 20
"""From here on bytes are worth a word."""


class Found(NamedTuple):
    """A fault as data: its kind, a line for each leaf or operation, what it costs."""

    kind: str
    lines: tuple[str, ...]
    cost: float = 0.0
    unit: str = "bytes"


def found(kind: str, lines: Iterable[str], cost: float = 0.0, unit: str = "bytes") -> Iterator[Found]:
    """One finding, if there is a line."""
    if told := tuple(lines):
        yield Found(kind, told, cost, unit)


def in_leaves(look: Look) -> Iterator[Found]:
    """All that leaves show."""
    yield from _types(look)
    yield from _placement(look)
    yield from _donation(look)
    yield from _twice(look)
    yield from _host(look)


def _types(look: Look) -> Iterator[Found]:
    changed = [(old, new) for old, new in look.pairs if _type(old) != _type(new)]
    shape = [(old, new) for old, new in changed if old.aval.shape != new.aval.shape]
    alike = [(old, new) for old, new in changed if old.aval.shape == new.aval.shape]
    dtype = [(old, new) for old, new in alike if old.aval.dtype != new.aval.dtype]
    weak = [(old, new) for old, new in alike if old.aval.dtype == new.aval.dtype]
    for kind, pairs in (("shape", shape), ("dtype", dtype), ("weak type", weak)):
        yield from found(kind, map(_change, pairs), sum(new.bytes for _, new in pairs))
    yield from found("static number", _static_numbers(look))
    paired = {leaf.path for leaf, _ in look.pairs}
    yield from found("structure", (str(each) for each in _structure(look) if each.path not in paired))


def _static_numbers(look: Look) -> Iterator[str]:
    """Numbers that Equinox takes for constants, and arrays in their place."""
    traced, given = {leaf.path for leaf in look.inputs}, keyed_leaves(look.carry, "carry")
    for leaf in look.new_leaves:
        if leaf.path in given and leaf.path not in traced:
            yield f"{leaf.path}: {describe(given[leaf.path])} -> {describe(leaf.aval)}"


def _type(leaf: Leaf) -> Any:
    return leaf.aval.shape, leaf.aval.dtype, getattr(leaf.aval, "weak_type", False)


def _change(pair: tuple[Leaf, Leaf]) -> str:
    old, new = pair
    return f"{old.path}: {describe(old.aval)} -> {describe(new.aval)}"


def _structure(look: Look) -> list[Difference]:
    if same_structure(look.carry, look.new_carry):
        return []
    return differences(_said(look.carry), _said(look.new_carry), "carry")


def _said(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: Abstract(describe(leaf)), tree)


def _placement(look: Look) -> Iterator[Found]:
    if look.devices == 1:
        return
    moved = [(old, new) for old, new in look.pairs if _moves(old, new)]
    lines = (f"{old.path}: {_place(_given_place(old))} -> {_place(new.place)}" for old, new in moved)
    yield from found("placement", lines, sum(new.bytes for _, new in moved))


def _given_place(leaf: Leaf) -> Any:
    return getattr(leaf.given, "sharding", None)


def _moves(old: Leaf, new: Leaf) -> bool:
    before = _given_place(old)
    if before is None or new.place is None or not hasattr(before, "is_equivalent_to"):
        return False
    return not (before.device_set == new.place.device_set and before.is_equivalent_to(new.place, len(new.aval.shape)))


def _place(place: Any) -> str:
    """A sharding in few words: by its spec on a mesh, else by its devices."""
    spec = getattr(place, "spec", None)
    count = len(place.device_set)
    devices = f"{count} devices" if count > 1 else str(next(iter(place.device_set)))
    return f"P({', '.join(map(repr, spec))}) on {devices}" if spec is not None else devices


def _donation(look: Look) -> Iterator[Found]:
    carry = [leaf for leaf in look.part("carry") if is_array(leaf.given)]
    kept = [leaf for leaf in carry if not leaf.donated]
    if carry and len(kept) == len(carry) and look.trains:
        yield from found("not donated", [f"carry: {len(kept)} leaves"], sum(leaf.bytes for leaf in kept))
    outs = Counter((leaf.aval.shape, leaf.aval.dtype) for leaf in look.outputs)
    told = {old.path for old, new in look.pairs if _type(old) != _type(new)}
    vain = [leaf for leaf in look.inputs if leaf.donated and is_array(leaf.given) and not _reused(leaf, outs)]
    vain = [leaf for leaf in vain if leaf.path not in told and (leaf in carry or not look.filtered)]
    lines = (f"{leaf.path}: {describe(leaf.aval)}" for leaf in vain)
    yield from found("donated in vain", lines, sum(leaf.bytes for leaf in vain))


def _reused(leaf: Leaf, outs: Counter[Any]) -> bool:
    kind = (leaf.aval.shape, leaf.aval.dtype)
    outs[kind] -= 1
    return outs[kind] >= 0


def _twice(look: Look) -> Iterator[Found]:
    owners: dict[Any, Leaf] = {}
    again: list[tuple[Leaf, Leaf]] = []
    for leaf in look.inputs:
        first = owners.setdefault(_buffer(leaf), leaf)
        if first is not leaf and first.donated:
            again.append((first, leaf))
    lines = (f"{leaf.path}: the buffer of {first.path}" for first, leaf in again)
    yield from found("buffer twice", lines, sum(leaf.bytes for _, leaf in again))


def _buffer(leaf: Leaf) -> Any:
    """The address of its buffer where there is one, else what no other leaf has."""
    given: Any = leaf.given
    if not isinstance(given, jax.Array) or is_deleted(given) or given.size == 0:
        return leaf.path
    return id(given)


def _host(look: Look) -> Iterator[Found]:
    held = [leaf for leaf in look.inputs if isinstance(leaf.given, np.ndarray)]
    carried = [leaf for leaf in held if leaf.names[0] == "carry"]
    beside = [leaf for leaf in held if leaf.names[0] not in ("carry", "batch") and leaf.bytes >= LARGE]
    for kind, leaves in (("host carry", carried), ("host constants", beside)):
        lines = (f"{leaf.path}: {describe(leaf.given)}" for leaf in leaves)
        yield from found(kind, lines, sum(leaf.bytes for leaf in leaves))
