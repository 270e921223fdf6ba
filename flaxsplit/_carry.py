"""What a step threads: made so that the first step compiles the last time, and kept so."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ._checks import check_leaves, check_tx, checked
from ._describe import (
    Difference,
    alike,
    describe,
    differences,
    is_array,
    is_deleted,
    is_numeric,
    keyed_leaves,
    kind_of,
    plain,
    shorten,
    strong,
)
from ._errors import CollectionError, SignatureError, StateDriftError
from ._place import placed
from ._types import AnyParams, Carry, Tree

T = TypeVar("T")


@checked
def init_carry(params: AnyParams, state: Tree, tx: optax.GradientTransformation) -> Carry:
    """Makes the carry that a step threads.

    Law: it has the values of `Carry(0, params, state, tx.init(params))`, and a step gives it back in the same
    structure, shapes, dtypes and placement.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> carry = fs.init_carry({"w": jnp.ones(3)}, {}, optax.sgd(0.1))
    >>> carry.step, carry.params["w"].committed
    (Array(0, dtype=int32), True)

    Args:
        params: the tree to optimize. Copied, as is all of the carry: a donated step deletes nothing of the caller's.
        state: `{collection: tree}`; an EMA may start as the params themselves, `state | {"ema": params}`.
        tx: an optax transformation.

    Returns:
        A `Carry` of JAX arrays without weak types or aliases, committed to one placement: if any leaf lives on a mesh
        every leaf does (others replicated), else all are on one device.

    Raises:
        SignatureError: a leaf is not an array or number, or params and state live on different devices or meshes.

    As `flax.training.train_state.TrainState.create`, without functions in the tree.
    """
    check_tx("init_carry(params, state, tx)", tx)
    own_params, own_state = _owned(plain(params), "params"), _owned(plain(state), "state")
    opt_state = _owned(tx.init(own_params), "opt_state")
    return _placed(Carry(jnp.zeros((), jnp.int32), own_params, own_state, opt_state))


def _owned(tree: T, name: str) -> T:
    check_leaves(
        "init_carry(params, state, tx)",
        "every leaf must be an array or a number",
        keyed_leaves(tree, name),
        _is_given,
        "a function, a string, an abstract value, a donated array or another object is in the tree",
        "keep what does not change in the closure of the step; for an abstract carry, jax.eval_shape of init_carry",
    )
    owned: T = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jax.typeof(leaf).dtype, copy=True), tree)
    return owned


def _is_given(leaf: Any) -> bool:
    return is_numeric(leaf) and not is_deleted(leaf)


def _placed(carry: Carry) -> Carry:
    """Commits all leaves to one placement. While tracing there is none yet, and the carry is returned as it is."""
    leaves = keyed_leaves(carry, "carry")
    if any(isinstance(leaf, Tracer) for leaf in leaves.values()):
        return carry
    meshes = {path: leaf.sharding.mesh for path, leaf in leaves.items() if isinstance(leaf.sharding, NamedSharding)}
    if meshes:
        _check_one(meshes)
        everywhere = NamedSharding(next(iter(meshes.values())), PartitionSpec())
        return _put(carry, lambda leaf: leaf.sharding if isinstance(leaf.sharding, NamedSharding) else everywhere)
    chosen = {path: leaf.sharding for path, leaf in leaves.items() if leaf.committed}
    _check_one(chosen)
    there = next(iter(chosen.values()), carry.step.sharding)
    return _put(carry, lambda _: there)


def _put(carry: Carry, where: Callable[[jax.Array], Any]) -> Carry:
    leaves = {path: (leaf, where(leaf)) for path, leaf in keyed_leaves(carry, "carry").items()}
    put: Carry = jax.tree.unflatten(jax.tree.structure(carry), placed("init_carry(params, state, tx)", leaves))
    return put


def _check_one(placements: Mapping[str, Any]) -> None:
    if len(set(placements.values())) > 1:
        where = [f"{path}: {_place(placement)}" for path, placement in placements.items()]
        raise SignatureError(
            "init_carry(params, state, tx)",
            "all leaves must live on one mesh or one device",
            where,
            "params and state were placed apart",
            "jax.device_put((params, state), sharding) before init_carry",
        )


def _place(placement: Any) -> str:
    """Says a mesh or a sharding by its axes and devices; the words of JAX differ by version."""
    axes = ", ".join(f"{name}={size}" for name, size in getattr(placement, "shape", {}).items())
    devices = list(placement.devices.flat if axes else placement.device_set)
    names = ", ".join(shorten(sorted(f"{device.platform}:{device.id}" for device in devices), 4))
    return f"mesh({axes}) of {names}" if axes else names


@checked
def adopt_carry(restored: Any, like: T) -> T:
    """Makes what a checkpoint gave back into a carry that the compiled step takes without compiling again.

    Law: `adopt_carry(carry, carry) == carry` in values, structure, dtypes and placement; also after a round trip
    through NumPy, lists for tuples, dicts for named tuples, key data for keys.

    >>> import jax, jax.numpy as jnp, optax, flaxsplit as fs
    >>> carry = fs.init_carry({"w": jnp.ones(3)}, {}, optax.adam(0.1))
    >>> restored = {"step": 7, "params": {"w": [2., 2., 2.]}, "state": {}, "opt_state": carry.opt_state}
    >>> restored["params"]["w"] = jax.device_get(jnp.full(3, 2.0))
    >>> fs.adopt_carry(restored, carry).params["w"]
    Array([2., 2., 2.], dtype=float32)

    Args:
        restored: what the checkpoint library returned.
        like: a carry as `init_carry` makes it; only its shapes, dtypes and shardings are read, so a donated one, or
            one of `jax.ShapeDtypeStruct`, does too.

    Returns:
        A carry of `like`'s structure and placement, with buffers of its own.

    Raises:
        CollectionError: leaves are missing, left over, deleted, or of another shape or dtype; names every one.
        SignatureError: a leaf of `like` is no array.
    """
    check_leaves(
        "adopt_carry(restored, like)",
        "every leaf of like must say its shape and dtype",
        keyed_leaves(like, "like"),
        is_array,
        "restored and like were swapped, or like is no carry",
        "adopt_carry(restored, init_carry(params, state, tx))",
    )
    wanted, treedef = jax.tree_util.tree_flatten_with_path(like)
    found, wrong, used = {}, [], set()
    for path, leaf in wanted:
        name = "carry" + jax.tree_util.keystr(path)
        value = _walk(restored, path)
        used.add(_plain_path(path))
        value = _unwrapped(value, leaf)
        if value is _NOTHING:
            wrong.append(Difference(name, describe(leaf), "absent"))
        elif not _is_given(value):
            wrong.append(Difference(name, describe(leaf), kind_of(value)))
        elif _type_of(value, leaf) != _type_of(leaf, leaf):
            wrong.append(Difference(name, describe(leaf), describe(strong(value) if not is_array(value) else value)))
        else:
            found[name] = (value, leaf)
    left = [path for path, _ in jax.tree_util.tree_flatten_with_path(restored)[0] if _plain_path(path) not in used]
    wrong += [Difference("carry" + jax.tree_util.keystr(path), "absent", "in the checkpoint") for path in left]
    if wrong:
        raise CollectionError(
            "adopt_carry(restored, like)",
            "every leaf must have the shape and dtype that it has in like (like -> restored)",
            [str(each) for each in wrong],
            "the checkpoint is of another model or optimizer",
            "adopt_carry(restored, init_carry(params, state, tx)) with the model and tx that were saved",
        )
    adopted: T = jax.tree.unflatten(treedef, _alike(found))
    return adopted


_NOTHING: Any = type("Nothing", (), {"__repr__": lambda self: "absent"})()


def _plain_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(_entry(key)) for key in path)


def _entry(key: Any) -> Any:
    """The bare name in a key path entry, whichever kind of container it came from."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _walk(tree: Any, path: tuple[Any, ...]) -> Any:
    """Follows a path through containers of another kind: a dict for a named tuple, a list for a tuple."""
    for key in map(_entry, path):
        if isinstance(tree, Mapping):
            tree = tree.get(key, tree.get(str(key), _NOTHING))
        elif isinstance(key, str) and not isinstance(tree, list) and hasattr(tree, key):
            tree = getattr(tree, key)
        elif isinstance(key, int) and isinstance(tree, list | tuple) and key < len(tree):
            tree = tree[key]
        else:
            return _NOTHING
    return tree


def _unwrapped(value: Any, leaf: Any) -> Any:
    """Key data becomes keys again where keys are due, and keys become key data where a legacy key is due."""
    wants_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if wants_key and is_array(value) and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return (
            jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
            if value.dtype == jnp.uint32
            else value
        )
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and leaf.dtype == jnp.uint32:
        return jax.random.key_data(value)
    return value


def _type_of(value: Any, leaf: Any) -> Any:
    """The shape and dtype; a Python scalar has no dtype of its own, and takes the leaf's where JAX would."""
    return tuple(jnp.shape(value)), value.dtype if is_array(value) else jnp.result_type(value, leaf.dtype)


def _alike(found: Mapping[str, tuple[Any, Any]]) -> list[jax.Array]:
    """Copies each value, and puts the copy where the leaf that it is to be like lives."""
    copies = {path: jnp.array(value, dtype=leaf.dtype, copy=True) for path, (value, leaf) in found.items()}
    goals = {path: leaf.sharding for path, (_, leaf) in found.items() if _is_placed(leaf)}
    put = placed("adopt_carry(restored, like)", {path: (copies[path], goal) for path, goal in goals.items()})
    return list((copies | dict(zip(goals, put, strict=True))).values())


def _is_placed(leaf: Any) -> bool:
    return getattr(leaf, "sharding", None) is not None and getattr(leaf, "committed", True)


def check_drift(where: str, name: str, before: Any, after: Any) -> Any:
    """Gives `after` without weak types, if it has the structure, shapes and dtypes of `before`; else names each leaf.

    Costs a comparison per leaf while tracing. The words are looked for only once something differs.
    """
    after = jax.tree.map(strong, after)
    if alike(before, after):
        return after
    changed = differences(jax.tree.map(strong, before), after, name)
    raise StateDriftError(
        where,
        "what comes out must have the structure, shapes and dtypes of what went in",
        [str(each) for each in changed],
        *_cause_and_fix(name, changed),
    )


def _kind_of(changed: list[Difference]) -> str:
    sides = [(each.before.split("["), each.after.split("[")) for each in changed]
    if any(len(side) != 2 for pair in sides for side in pair):
        return "structure"
    return "shape" if any(before[1] != after[1] for before, after in sides) else "dtype"


def _cause_and_fix(name: str, changed: list[Difference]) -> tuple[str, str]:
    if name in ("params", "opt_state"):
        return f"tx gives {name} another form than it took", "init_carry(params, state, tx) with the tx of the step"
    kind = _kind_of(changed)
    if kind == "structure" and [each.path for each in changed] == [name]:
        return "something else was returned where the new state is due: (loss, aux), new_state needs has_aux=True", (
            "return loss, new_state" if name == "state" else "return carry, out"
        )
    return {
        "structure": (
            "leaves come or go: a sown collection in the state, a cache made late, a collection not returned",
            "with_mutable(model, capture='intermediates') for sown values; return out, {**state, ...}",
        ),
        "shape": (
            "the first update gives the state its final shape (keepdims=True?), or a batch axis stayed in",
            "state = settle_state(fn, params, state, x), before init_carry",
        ),
        "dtype": (
            "the state is computed in another precision than it is kept in",
            "cast in fn, new.astype(old.dtype), or state = settle_state(fn, params, state, x)",
        ),
    }[kind]
