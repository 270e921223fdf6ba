"""What becomes of the state: what is returned as it came, drawn from again, updated by nothing, or never read."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ._describe import describe
from ._find_leaves import Found, found
from ._flow import Draw
from ._look import Leaf, Look
from ._values import union

_TRAINED = ("scale", "bias", "weight", "kernel")
_OWN = ("extra", "ema")  # what no model reads


def in_state(look: Look) -> Iterator[Found]:
    """All that the flow of values shows."""
    yield from _keys(look)
    yield from _kept(look)
    yield from _no_gradient(look)


def _words(leaf: Leaf) -> str:
    return f"{leaf.path}: {describe(leaf.aval)}"


def _unchanged(look: Look) -> list[Leaf]:
    return [old for old, new in look.pairs if look.flow.outs[new.at].same == old.at]


def _is_itself(look: Look, out: int) -> bool:
    """Whether an output is an input, and no more."""
    return look.flow.outs[out].same is not None


def _kept(look: Look) -> Iterator[Found]:
    """Leaves that come back as they came: which of them should not have."""
    flow, own = look.flow, set(_OWN)
    kept = [leaf for leaf in _unchanged(look) if not _is_key(leaf) and not set(leaf.names) & own]
    touched = [leaf for leaf in kept if flow.touched >> leaf.at & 1]
    never = [leaf for leaf in kept if not flow.touched >> leaf.at & 1 and _is_float(leaf)]  # a counter may wait
    live = union(out.reads for i, out in enumerate(flow.outs) if not _is_itself(look, i))
    dropped = [leaf for leaf in touched if flow.remade >> leaf.at & ~(live >> leaf.at) & 1]
    read, same = {leaf.at for leaf in touched if live >> leaf.at & 1}, {leaf.at for leaf in kept}
    still = [leaf for leaf in statistics_of(look) if leaf.at in read and _is_trained_around(look, leaf, same)]
    others = (("statistics unchanged", still), ("never read", never)) if look.trains else ()
    for kind, leaves in (("state dropped", dropped), *others):
        yield from found(kind, map(_words, leaves), sum(leaf.bytes for leaf in leaves))


def statistics_of(look: Look) -> list[Leaf]:
    """Batch statistics of Linen by their collection, of NNX and Equinox by the class of what holds them."""
    held = _held_by(look.carry, ("BatchStat", "State"), ("flax.nnx", "equinox"))
    return [leaf for leaf in look.part("carry") if _is_linen(leaf.names) or leaf.path in held]


def _is_linen(names: tuple[Any, ...]) -> bool:
    """By the collection, or where that has another name by the layer's own."""
    layer = any("BatchNorm" in str(name) for name in names)
    return "batch_stats" in names or (layer and names[-1] in ("mean", "var"))


def _held_by(carry: Any, kinds: tuple[str, ...], modules: tuple[str, ...]) -> set[str]:
    """The paths under nodes of some class, told by name: neither library is imported for it."""

    def is_holder(node: Any) -> bool:
        kind: type = node.type if type(node).__name__ == "VariableState" else type(node)  # flax < 0.11
        return kind.__name__ in kinds and kind.__module__.startswith(modules) and not _is_nnx_state(kind)

    nodes = jax.tree_util.tree_flatten_with_path(carry, is_leaf=is_holder)[0]
    return {
        "carry" + jax.tree_util.keystr((*path, *inner))
        for path, node in nodes
        if is_holder(node)
        for inner, _ in jax.tree_util.tree_flatten_with_path(node)[0]
    }


def _is_nnx_state(kind: type) -> bool:
    return kind.__name__ == "State" and kind.__module__.startswith("flax")


def _is_trained_around(look: Look, statistic: Leaf, kept: set[int]) -> bool:
    """Whether the params of the same layer change; a frozen layer keeps its statistics too."""
    names = _bare(statistic)
    module = names[names.index("batch_stats") + 1 : -1] if "batch_stats" in names else names[-2:-1]
    beside = [leaf for leaf in look.part("carry") if _bare(leaf)[-1] in _TRAINED and _ends(_bare(leaf)[:-1], module)]
    return not any(leaf.at in kept for leaf in beside)


def _bare(leaf: Leaf) -> tuple[Any, ...]:
    return tuple(name for name in leaf.names if name not in ("value", "raw_value"))


def _ends(names: tuple[Any, ...], end: tuple[Any, ...]) -> bool:
    return names[len(names) - len(end) :] == end


def _is_key(leaf: Leaf) -> bool:
    """Typed keys, and the two or four words of old ones."""
    if jnp.issubdtype(leaf.aval.dtype, jax.dtypes.prng_key):
        return True
    return leaf.aval.dtype == jnp.uint32 and leaf.aval.shape[-1:] in ((2,), (4,))


def _keys(look: Look) -> Iterator[Found]:
    flow, kept = look.flow, {leaf.at: leaf for leaf in _unchanged(look)}
    bits = sum(1 << index for index in kept)
    drawn = [draw for draw in flow.draws if draw.shape is not None]
    again = {i for draw in drawn if draw.reads and not draw.reads & ~bits for i in kept if draw.reads >> i & 1}
    same = [kept[i] for i in sorted(again) if _is_key(kept[i])]
    yield from found("key unchanged", map(_words, same), len(same), "keys")
    constant = [draw for draw in drawn if not draw.reads]
    yield from found("key constant", sorted({f"random bits: {_bits(draw.shape)}" for draw in constant}), 1, "keys")
    yield from found("key drawn twice", sorted(set(_twice(look))), 1, "keys")


def _twice(look: Look) -> Iterator[str]:
    uses: dict[Any, list[Draw]] = {}
    for draw in look.flow.draws:
        uses.setdefault(draw.number, []).append(draw)
    for draws in uses.values():
        pairs = [(one, other) for one, other in itertools.combinations(draws, 2) if _clash(one, other)]
        if pairs:
            keys = [leaf.path for leaf in look.inputs if draws[0].reads >> leaf.at & 1 and _is_key(leaf)]
            shapes = {shape: one.shape == other.shape for one, other in pairs for shape in (one.shape, other.shape)}
            drawn = sorted(_bits(shape) + " twice" * twice for shape, twice in shapes.items())
            yield f"{', '.join(keys) or 'a key of the step'}: {', '.join(drawn)}"


def _clash(one: Draw, other: Draw) -> bool:
    """Whether two draws are of use together; a loss computed again draws in the same line, called from another one."""
    branches = dict(one.branches)
    if any(branches.get(number, branch) != branch for number, branch in other.branches):
        return False  # of two branches one is taken
    if one.shape != other.shape:
        return True
    known = one.shape is not None and one.lines and other.lines
    return bool(known and (one.lines[0] != other.lines[0] or one.lines == other.lines))


def _bits(shape: tuple[int, ...] | None) -> str:
    return "split" if shape is None else f"bits[{','.join(map(str, shape))}]"


def _no_gradient(look: Look) -> Iterator[Found]:
    """Params that get something added that neither the batch nor another param has a part in, made of zeros."""
    outs = look.flow.outs
    data = sum(1 << leaf.at for leaf in look.inputs if leaf.names[0] != "carry")
    params = {old.at for old, new in look.pairs if outs[new.at].base == old.at and _is_float(old)}
    others = sum(1 << index for index in params)
    idle = []
    for old, new in look.pairs:
        out = outs[new.at]
        if old.at not in params or not out.nil or out.added & (data | others & ~(1 << old.at)):
            continue
        if out.added or not _is_in_out(look, old):  # frozen on purpose, by an update of nothing, is no fault
            idle.append(old)
    yield from found("no gradient", map(_words, idle), sum(leaf.bytes for leaf in idle))


def _is_float(leaf: Leaf) -> bool:
    return bool(jnp.issubdtype(leaf.aval.dtype, jnp.inexact))


def _is_in_out(look: Look, leaf: Leaf) -> bool:
    new = {leaf.at for leaf in look.new_leaves}
    return any(out.reads >> leaf.at & 1 for i, out in enumerate(look.flow.outs) if i not in new)
