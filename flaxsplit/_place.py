"""Where arrays live: put onto a mesh, also onto one of several processes, of which each sees its own part only."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from ._describe import describe
from ._refusals.carry import UNEQUAL


def placed(where: str, leaves: Mapping[str, tuple[jax.Array, Sharding]]) -> list[jax.Array]:
    """Puts each leaf where its sharding says, as `jax.device_put`.

    Onto a mesh of several processes JAX puts neither PRNG keys nor what is committed to a device, and it compares the
    values of all processes array by array. Here all are compared at once, by checksum, and what differs is named.
    """
    spread = {path: leaf for path, (leaf, sharding) in leaves.items() if _spreads(leaf, sharding) and _is_all(sharding)}
    _check_equal(where, spread)
    return [
        _spread(leaf, sharding) if _spreads(leaf, sharding) else jax.device_put(leaf, sharding)
        for leaf, sharding in leaves.values()
    ]


def _spreads(leaf: jax.Array, sharding: Sharding) -> bool:
    """Whether the leaf is whole in this process and is to be shared with others."""
    return leaf.is_fully_addressable and not sharding.is_fully_addressable


def _is_all(sharding: Sharding) -> bool:
    """Whether every process has a part: only then do all of them come here, and can be compared."""
    devices: Any = sharding.device_set
    return bool(len({device.process_index for device in devices}) == jax.process_count())


def _spread(leaf: jax.Array, sharding: Sharding) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _spread(jax.random.key_data(leaf), sharding)
        keys: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return keys
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])


def _check_equal(where: str, leaves: Mapping[str, jax.Array]) -> None:
    """Compares checksums over all processes, so that all of them raise, and none waits for one that did."""
    if not leaves:
        return
    ours = np.array([_checksum(leaf) for leaf in leaves.values()], np.uint32)
    gathered: Any = multihost_utils.process_allgather(ours)
    differ = (gathered != gathered[0]).any(axis=0)
    strange = [f"{path}: {describe(leaf)}" for (path, leaf), each in zip(leaves.items(), differ, strict=True) if each]
    UNEQUAL.if_any(strange, where=where)


def _checksum(leaf: jax.Array) -> int:
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return zlib.crc32(np.ascontiguousarray(data).tobytes())
