"""Which arrays of an NNX module an optimizer gets: one of NNX's filters, or one of ours."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._describe import describe
from ._filters import choose
from ._paths import joined
from ._refusals.nnx import NO_FILTER, NOTHING_CHOSEN, RIGID, said_of_a_module
from ._slots import Slot, slots_of, split


def trained(trainable: Any, module: Any, leaves: Mapping[Slot, Any]) -> set[Slot]:
    """Gives the slots that a filter chooses. Each filter of a list must choose something."""
    if _is_without_params(trainable, module, leaves):
        return set()
    if isinstance(trainable, list | tuple) and trainable:
        return set().union(*(trained(each, module, leaves) for each in trainable))
    if isinstance(trainable, str | Mapping):
        return _by_path(trainable, leaves)
    NO_FILTER.unless(_is_filter(trainable), trainable=trainable)
    return _by_variable(trainable, module, leaves)


def _by_path(trainable: Any, leaves: Mapping[Slot, Any]) -> set[Slot]:
    """As `split_params` chooses, among the variables of type `nnx.Param`."""
    params = {slot.path: leaf for slot, leaf in leaves.items() if slot.collection == "params"}
    with said_of_a_module():
        paths = choose(trainable, params)
    return {slot for slot in leaves if slot.path in paths}


def _by_variable(trainable: Any, module: Any, leaves: Mapping[Slot, Any]) -> set[Slot]:
    """As NNX chooses, by the type of each variable; what is chosen must have a gradient."""
    matches: Any = nnx.filterlib.to_predicate(trainable)
    flat = nnx.to_flat_state(split(module)[1])
    chosen = {slot for path, each in flat if matches(path, each) for slot in slots_of(path, each)}
    held = {slot.collection for slot in leaves}
    NOTHING_CHOSEN.unless(chosen, trainable, held, len(leaves), not leaves and _is_bridged(module))
    rigid = (slot for slot in leaves if slot in chosen and not _is_inexact(leaves[slot]))
    RIGID.if_any(f"{joined(slot.path)}: {describe(leaves[slot])}, of {slot.collection!r}" for slot in rigid)
    return chosen


def _is_without_params(trainable: Any, module: Any, leaves: Mapping[Slot, Any]) -> bool:
    """Whether a filter asks for params, or for nothing, and the module has none: then it is all state."""
    if any(slot.collection == "params" for slot in leaves):
        return False
    is_empty = isinstance(trainable, list | tuple | Mapping) and not trainable
    is_default = trainable is nnx.Param or (isinstance(trainable, str) and trainable == "*")
    asks = is_empty or is_default or trainable is None or trainable is False
    return asks and (bool(leaves) or not _is_bridged(module))  # a bridge without variables was not initialized


def _is_bridged(module: Any) -> bool:
    return any(isinstance(node, nnx.bridge.ToNNX) for _, node in nnx.iter_graph(module))


def _is_filter(trainable: Any) -> bool:
    empty = isinstance(trainable, list | tuple) and not trainable
    return callable(trainable) or empty or trainable is None or trainable is ... or isinstance(trainable, bool)


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact))
