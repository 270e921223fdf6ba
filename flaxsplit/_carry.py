"""The carry of a step, made so that the first compile is the last."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ._checks import check_tx, checked, survives
from ._describe import is_deleted, is_numeric, keyed_leaves, plain
from ._place import placed
from ._refusals.carry import APART, NO_STATE, NOT_GIVEN, SHARDING, TOO_WIDE, UNINITIALIZED, wide
from ._types import AnyParams, Carry, Transformation, Tree

T = TypeVar("T")


@checked
def init_carry(params: AnyParams, state: Tree, tx: Transformation, *, sharding: Sharding | None = None) -> Carry:
    """Makes the carry: everything that a step changes, in one pytree.

    Law: it has the values of `Carry(0, params, state, tx.init(params))`, and a step returns it with the same
    structure, shapes, dtypes and placement.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> carry = fs.init_carry({"w": jnp.ones(3)}, {}, optax.sgd(0.1))
    >>> carry.step, carry.params["w"].committed
    (Array(0, dtype=int32), True)

    Args:
        params: the tree to optimize. All of the carry is copied, so a donated step deletes no array of the caller.
        state: `{collection: tree}`; an EMA may start as the params, `state | {"ema": params}`.
        tx: an optax transformation.
        sharding: the sharding of leaves that are on no mesh yet. `NamedSharding(mesh, PartitionSpec())` replicates
            them, as `jax.jit` over a mesh and `jax.shard_map` need it.

    Returns:
        A `Carry` of JAX arrays without weak types or aliases, committed to one placement: if one leaf is on a mesh,
        every leaf is (the others replicated); else all are on one device.

    Raises:
        SignatureError: a leaf is not an array or number, or an integer too large for JAX's dtype; params and state are
            on different devices or meshes; or `tx` holds a mask of FrozenDicts.

    As `flax.training.train_state.TrainState.create`, without functions in the tree.
    """
    check_tx("init_carry(params, state, tx)", tx)
    place: Any = sharding
    SHARDING.unless(place is None or isinstance(place, Sharding), sharding=place)
    tree: Any = state
    NO_STATE.unless(isinstance(tree, Mapping), state=tree)
    own_params, own_state = _owned(plain(params), "params"), _owned(plain(state), "state")
    opt_state = _owned(_initialized(tx, own_params), "opt_state")
    return _placed(Carry(jnp.zeros((), jnp.int32), own_params, own_state, opt_state), sharding)


def _initialized(tx: Transformation, params: Any) -> Any:
    try:
        return tx.init(params)
    except Exception as error:
        UNINITIALIZED.instead_of(error, error, tx, params)


def _owned(tree: T, name: str) -> T:
    NOT_GIVEN.unless_all(is_given, tree, name)
    TOO_WIDE.unless_all(survives, tree, name, say=wide, where="init_carry(params, state, tx)")
    owned: T = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jax.typeof(leaf).dtype, copy=True), tree)
    return owned


def is_given(leaf: Any) -> bool:
    """Tells what has a value that can be copied."""
    return is_numeric(leaf) and not is_deleted(leaf)


def _placed(carry: Carry, sharding: Sharding | None) -> Carry:
    """Commits all leaves to one placement. While tracing there is none yet, and the carry is returned as it is."""
    leaves = keyed_leaves(carry, "carry")
    if any(isinstance(leaf, Tracer) for leaf in leaves.values()):
        return carry
    on_mesh = {path: leaf.sharding for path, leaf in leaves.items() if isinstance(leaf.sharding, NamedSharding)}
    given = {} if sharding is None else {"sharding": sharding}
    meshes = {path: _mesh_of(place) for path, place in (on_mesh | given).items()}
    if meshes:
        _check_one(meshes)
        home = sharding or NamedSharding(next(iter(meshes.values())), PartitionSpec())
    else:
        chosen = {path: leaf.sharding for path, leaf in leaves.items() if leaf.committed}
        _check_one(chosen)
        home = next(iter(chosen.values()), carry.step.sharding)
    goals = {path: (leaf, on_mesh.get(path, home)) for path, leaf in leaves.items()}
    put: Carry = jax.tree.unflatten(jax.tree.structure(carry), placed("init_carry(params, state, tx)", goals))
    return put


def _mesh_of(placement: Sharding) -> Any:
    """What leaves must have in common: the mesh, or a sharding that has none."""
    return getattr(placement, "mesh", placement)


def _check_one(placements: Mapping[str, Any]) -> None:
    APART.unless(len(set(placements.values())) <= 1, placements)
