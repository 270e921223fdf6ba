"""The batch in parts, one after another: gradients summed, the state threaded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import devices_along, varying
from ._describe import describe, is_array, is_numeric, keyed_leaves
from ._refusals.improve import INDIVISIBLE, NO_BATCH, UNEVEN
from ._refusals.many import OUT
from ._types import AxisName, Tree


def accumulated(
    gradient: Any, learned: tuple[Any, Any], count: int, axis_name: AxisName | None
) -> Callable[..., tuple[Any, Any]]:
    """`gradient` over each microbatch in turn, the state threaded, as one result of its form.

    Gradients are summed in at least f32, so that many small bf16 gradients are not lost in their sum.
    """
    params, overwritten = learned

    def over_batch(state: Tree, batch: Any) -> tuple[Any, Any]:
        def body(_sums: Any, _batch: Any) -> tuple[Any, Any]:
            _total, _most, _state = _sums
            (_loss, (_aux, _state)), (_grads, _new) = gradient(_state, _batch)
            OUT.unless_all(is_numeric, _aux, "aux", say=describe, where="value_and_grad(loss_fn, microbatches=...)")
            _joined = jax.tree.map(jnp.add, _total, _grads), jax.tree.map(jnp.maximum, _most, _new)
            return (*_joined, _state), (_loss, _aux)

        zeros = varying((jax.tree.map(_zeros, params), jax.tree.map(jnp.zeros_like, overwritten)), axis_name)
        (total, most, new_state), (losses, aux) = scan_parts(body, (*zeros, state), batch, count)
        grads = jax.tree.map(lambda sum_, param: (sum_ / count).astype(jnp.result_type(param)), total, params)
        return (jnp.mean(losses), (aux, new_state)), (grads, most)

    return over_batch


def _zeros(leaf: Any) -> Any:
    return jnp.zeros_like(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def scan_parts(body: Callable[[Any, Any], tuple[Any, Any]], start: Any, batch: Any, count: int) -> tuple[Any, Any]:
    """`jax.lax.scan` over microbatches: part `i` of `n` has the rows `i, i + n, ...`.

    In blocks of rows, a part would lie on one n-th of the devices of a mesh. Each part is sliced where it is used: a
    batch put in another order would be a second batch in memory.
    """
    NO_BATCH.unless(jax.tree.leaves(batch), "no leaf in the batch", count=count)
    INDIVISIBLE.if_any(_indivisible(batch, count), count=count)
    UNEVEN.if_any(_uneven(batch, count), count=count)
    parts = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), batch)

    def on_part(carry: Any, index: Any) -> tuple[Any, Any]:
        return body(carry, jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 1, False), parts))

    return jax.lax.scan(on_part, start, jnp.arange(count))


def _indivisible(batch: Any, count: int) -> list[str]:
    leaves = keyed_leaves(batch, "batch")
    fits = {path: is_array(leaf) and leaf.shape and not leaf.shape[0] % count for path, leaf in leaves.items()}
    return [f"{path}: {describe(leaf)}" for path, leaf in leaves.items() if not fits[path]]


def _uneven(batch: Any, count: int) -> list[str]:
    """Where axes are Explicit the mesh is part of the type, and JAX splits no sharded axis into uneven parts."""
    rows = {path: (leaf, devices_along(leaf)) for path, leaf in keyed_leaves(batch, "batch").items()}
    return [
        f"{path}: {describe(leaf)}, {len(leaf) // count} rows a microbatch on {devices} devices"
        for path, (leaf, devices) in rows.items()
        if len(leaf) // count % devices
    ]
