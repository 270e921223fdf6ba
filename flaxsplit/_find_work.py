"""What the work is: on how many devices, in which precision, and where Python is called."""

from collections import Counter
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from ._compiled import cost_of
from ._describe import describe
from ._find_leaves import LARGE, Found, found
from ._find_state import statistics_of
from ._look import Leaf, Look
from ._tally import Product, callbacks, products

_HALF = ("bfloat16", "float16")


def in_work(look: Look) -> Iterator[Found]:
    """All that the operations show."""
    made = products(look.jaxpr)
    yield from _replicated(look, made)
    yield from _optimizer(look)
    yield from _constants(look)
    yield from _precision(look, made)
    calls = Counter(callbacks(look.jaxpr))
    yield from found("callback", (f"{name}: {count}" for name, count in calls.items()), calls.total(), "calls")


def _whole(leaf: Leaf) -> bool:
    return leaf.place is not None and bool(leaf.place.is_fully_replicated)


def _replicated(look: Look, made: list[Product]) -> Iterator[Found]:
    """A batch is whole on purpose where the params are cut: so only where each device does nearly all the work."""
    flops, cost = sum(each.flops for each in made), cost_of(look.compiled).get("flops", 0.0)
    batch = [leaf for leaf in look.part("batch") if leaf.aval.shape]
    if look.devices > 1 and batch and all(map(_whole, batch)) and flops and cost >= 0.75 * flops:
        lines = (f"{leaf.path}: {describe(leaf.aval)} on each of {look.devices} devices" for leaf in batch)
        yield from found("batch replicated", lines, cost * (1 - 1 / look.devices), "FLOP")


def _optimizer(look: Look) -> Iterator[Found]:
    cut = [leaf for leaf in look.part("carry") if leaf.place is not None and not _whole(leaf)]
    pairs = [
        (leaf, param)
        for leaf in look.part("carry")
        if look.devices > 1 and _whole(leaf) and leaf.bytes >= 1024
        for param in cut
        if leaf.aval.shape == param.aval.shape and leaf.names[-len(param.names) + 2 :] == param.names[2:]
    ]
    lines = (f"{leaf.path}: {describe(leaf.aval)}, cut is {param.path}" for leaf, param in pairs)
    yield from found("optimizer replicated", lines, sum(leaf.bytes for leaf, _ in pairs) * (1 - 1 / look.devices))


def _constants(look: Look) -> Iterator[Found]:
    large = [value for value in look.consts if getattr(value, "nbytes", 0) >= LARGE]
    yield from found("constants", map(describe, large), sum(value.nbytes for value in large))


def _precision(look: Look, made: list[Product]) -> Iterator[Found]:
    by_dtype: Counter[str] = Counter()
    for each in made:
        by_dtype[each.dtype] += each.flops
    floats = [leaf for leaf in look.part("carry") if jnp.issubdtype(leaf.aval.dtype, jnp.floating)]
    half = sum(leaf.bytes // leaf.aval.dtype.itemsize for leaf in floats if str(leaf.aval.dtype) in _HALF)
    halved = sum(by_dtype[name] for name in _HALF) or 2 * half > sum(_size(leaf) for leaf in floats)
    wide = [each for each in made if each.dtype == "float32"]
    if halved and by_dtype["float32"] > 0.75 * by_dtype.total():  # a head in f32 is as it should be
        yield from found("f32 work", dict.fromkeys(each.words for each in wide), by_dtype["float32"], "FLOP")
    if by_dtype["float64"] and not any(leaf.aval.dtype == np.float64 for leaf in floats):
        double = [each.words for each in made if each.dtype == "float64"]
        yield from found("f64", dict.fromkeys(double), by_dtype["float64"], "FLOP")
    lost = [each for each in look.flow.casts if each.bytes >= LARGE // 2]
    casts = Counter(each.words for each in lost)
    lines = (f"cast: {words}" + f", {count} times" * (count > 1) for words, count in casts.items())
    yield from found("cast back", lines, sum(each.bytes for each in lost))
    averages = [*statistics_of(look), *(leaf for leaf in floats if "ema" in leaf.names)]
    kept = [leaf for leaf in averages if str(leaf.aval.dtype) in _HALF]
    yield from found("half statistics", (f"{leaf.path}: {describe(leaf.aval)}" for leaf in kept), len(kept), "leaves")


def _size(leaf: Leaf) -> int:
    return leaf.bytes // max(int(leaf.aval.dtype.itemsize), 1)
