"""State that a call was to update, and left as it was: told where the model reads it, and only there."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from ._describe import same_leaves
from ._paths import Path, flatten, unflatten
from ._refusals.apply import UNTOUCHED, UNTOUCHED_LAYERS
from ._types import OVERWRITTEN, Tree

Run = Callable[[Any], Any]
"""The same call over other variables: `variables -> (out, updated)`."""

_NEVER_WRITTEN = frozenset({OVERWRITTEN, "perturbations"})
"""Collections whose next value is a gradient, or that are only added to what a gradient is asked of."""


def warn_of_untouched(
    run: Run, names: Sequence[str], variables: Tree, new_state: Tree, trained: Any, frozen: Any, named: bool
) -> None:
    """Warns where no leaf of the mutable collections was written, or none of a layer that keeps batch statistics.

    Flax hands an unwritten leaf back as the very same object, eagerly and while tracing, so identity decides. Layers
    are looked at where the caller did not name what is mutable. What is frozen is meant to stay as it is. While a
    cache is written a model decodes, and its statistics stay.
    """
    names = [name for name in names if name not in _NEVER_WRITTEN and jax.tree.leaves(variables[name])]
    if not names:
        return
    written = [name for name in names if not same_leaves(variables[name], new_state[name])]
    if not named and written and "batch_stats" in names and "cache" not in written:
        _warn_of_layers(run, variables, new_state["batch_stats"], trained, frozen, written)
    elif not written:
        layers = {(name, *layer) for name in names for layer in _layers(variables[name])}
        suspects = {layer for layer in layers if not _is_frozen(layer[1:], trained, frozen)}
        if suspects and (found := _read(run, variables, suspects, suspects)):
            UNTOUCHED.warn([name for name in names if any(name == path[0] for path in found)])


def _warn_of_layers(run: Run, variables: Tree, after: Tree, trained: Any, frozen: Any, written: Sequence[str]) -> None:
    old, new = _layers(variables["batch_stats"]), _layers(after)
    still = [layer for layer in old if same_leaves(old[layer], new.get(layer))]
    suspects = {("batch_stats", *layer) for layer in still if not _is_frozen(layer, trained, frozen)}
    if suspects and (found := _read(run, variables, suspects, ())):
        UNTOUCHED_LAYERS.warn(sorted(found), written)


def _layers(tree: Tree) -> dict[Path, list[Any]]:
    """What each layer keeps, by its path."""
    layers: dict[Path, list[Any]] = {}
    for (*layer, _), leaf in flatten(tree):
        layers.setdefault(tuple(layer), []).append(leaf)
    return layers


def _is_frozen(layer: Path, trained: Any, frozen: Any) -> bool:
    """Whether the params of a layer are frozen; where it has none, those of the nearest module around it that has."""
    for end in range(len(layer), -1, -1):
        own, other = (jax.tree.leaves(_at(tree, layer[:end])) for tree in (trained, frozen))
        if own or other:
            return not own
    return False


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
    return tree


def _read(run: Run, variables: Tree, layers: Collection[Path], doubtful: Collection[Path]) -> set[Path]:
    """Which layers the call reads: those that it makes anew where they are missing. Runs it abstractly, without them.

    A call may need them and not make them; `doubtful` is the answer then.
    """
    rest = {path: leaf for path, leaf in flatten(variables) if path[:-1] not in layers}
    try:
        made = jax.eval_shape(lambda: run({name: {} for name in variables} | unflatten(rest))[1])
        return {path[:-1] for path, _ in flatten(made) if path[:-1] in layers}
    except Exception:
        return set(doubtful)
