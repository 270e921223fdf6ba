"""PRNG streams are state: each call draws from them and advances them."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from ._axes import check_bound
from ._checks import checked, is_function
from ._describe import describe, is_array
from ._linear import noted
from ._refusals.run import KEYS, NO_KEYS, NO_RNGS, OWN_RNGS, RNGS_FN
from ._split import check_halves
from ._types import AxisName, PRNGKey, State, StatefulT, Tree
from ._wraps import wraps


@checked
def rng_state(**keys: PRNGKey) -> State:
    """Makes the collection that `with_rngs` draws from.

    Law: `rng_state(dropout=key) == {"rngs": {"dropout": key}}`.

    >>> import jax, flaxsplit as fs
    >>> sorted(fs.rng_state(dropout=jax.random.key(0), noise=jax.random.key(1))["rngs"])
    ['dropout', 'noise']

    Args:
        keys: one PRNG key per stream, typed or legacy uint32.

    Returns:
        `{'rngs': {stream: key}}`; merge it into the state: `state | rng_state(dropout=key)`.

    Raises:
        SignatureError: a value is not a key.
    """
    wrong = [name for name, key in keys.items() if not _is_key(key)]
    KEYS.unless(keys and not wrong, keys, wrong)
    return {"rngs": dict(keys)}


def are_keys(rngs: Any) -> bool:
    """Tells keys by stream."""
    return isinstance(rngs, Mapping) and all(map(_is_key, rngs.values()))


def _is_key(key: Any) -> bool:
    if not is_array(key):
        return False
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return bool(typed or (key.dtype == jnp.uint32 and len(key.shape) > 0))


@checked
def with_rngs(fn: StatefulT, *, axis_name: AxisName | None = None) -> StatefulT:
    """Draws fresh `rngs=` from `state['rngs']` at each call, and advances them.

    Law: equals `fn(params, rest, *args, rngs={s: split(key)[1]})` with `{s: split(key)[0]}` in the new state.

    >>> import jax, flax.linen as nn, flaxsplit as fs
    >>> apply = fs.with_rngs(fs.with_mutable(nn.Dropout(0.5, deterministic=False)))
    >>> out, state = apply({}, fs.rng_state(dropout=jax.random.key(0)), jax.numpy.ones(4))
    >>> out.shape, state["rngs"].keys()
    ((4,), dict_keys(['dropout']))

    Args:
        fn: a stateful function that takes `rngs=`.
        axis_name: each device along this axis of an enclosing `shard_map` draws its own keys, from one stream. Without
            it, every device draws the same masks.

    Returns:
        The stateful function without `rngs=`. Around `vmap_stateful`, each lane gets its own keys.

    Raises:
        CollectionError: the state has no `'rngs'`.
        SignatureError: `rngs=` was also passed by hand, or `axis_name` is not bound.

    As Flax's `rngs=` argument, but the keys are in the carry, so a checkpoint and a scan continue the streams.
    """
    RNGS_FN.unless(is_function(fn), fn=fn)

    @wraps(fn)
    @noted
    def stateful(params: Tree, state: Tree, /, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        check_halves("with_rngs(fn)", params, state)
        _check_rngs(state, kwargs)
        advanced, drawn = draw(state["rngs"])
        drawn = _per_place(drawn, axis_name)
        rest = {name: tree for name, tree in state.items() if name != "rngs"}
        out, new_state = fn(params, rest, *args, rngs=drawn, **kwargs)
        return out, {**new_state, "rngs": advanced}

    return cast(StatefulT, stateful)


def draw(rngs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits every stream into what it goes on with and the key for this call."""
    pairs = {name: split_key(key, 2) for name, key in rngs.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def split_key(key: Any, count: int) -> Any:
    """As `jax.random.split`, but takes stacked keys too, such as one per layer; the new axis comes first."""
    return _of_each_key(lambda each: jax.random.split(each, count), key, out_axes=1)


def _of_each_key(fn: Callable[[Any], Any], key: Any, out_axes: int) -> Any:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    for _ in key.shape if typed else key.shape[1:]:
        fn = jax.vmap(fn, out_axes=out_axes)
    return fn(key)


def _per_place(keys: dict[str, Any], axis_name: AxisName | None) -> dict[str, Any]:
    if axis_name is None:
        return keys
    check_bound("with_rngs(axis_name=...)", axis_name)
    place = jax.lax.axis_index(axis_name)
    return {name: _of_each_key(lambda key: jax.random.fold_in(key, place), key, 0) for name, key in keys.items()}


def _check_rngs(state: Tree, kwargs: Mapping[str, Any]) -> None:
    rngs = state.get("rngs", {})
    NO_RNGS.unless(not isinstance(rngs, Mapping) or rngs, f"state: {sorted(map(str, state))}")
    NO_KEYS.unless(isinstance(rngs, Mapping), f"state['rngs']: {describe(rngs)}")
    wrong = ((name, key) for name, key in rngs.items() if not _is_key(key))
    NO_KEYS.if_any(f"state['rngs'][{name!r}]: {describe(key)}" for name, key in wrong)
    if "rngs" in kwargs:
        OWN_RNGS.unless(False, f"rngs={_names(kwargs['rngs'])} in the call")


def _names(rngs: Any) -> Any:
    return sorted(rngs) if isinstance(rngs, Mapping) else describe(rngs)
