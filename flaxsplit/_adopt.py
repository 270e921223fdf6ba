"""A restored checkpoint becomes a carry again, which the compiled step takes without a recompile."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._carry import is_given
from ._checks import checked, survives
from ._describe import ABSENT, Difference, describe, is_array, kind_of, strong
from ._paths import entry_name
from ._place import placed
from ._refusals.adopt import LIKE, UNADOPTED, Place
from ._refusals.carry import TOO_WIDE, wide
from ._types import Carry

T = TypeVar("T")


@checked
def adopt_carry(restored: Any, like: T, *, strict: bool = True) -> T:
    """Converts a restored checkpoint into a carry that the compiled step takes without a recompile.

    Law: `adopt_carry(carry, carry) == carry` in values, structure, dtypes and placement; also after a round trip
    through NumPy, lists for tuples, dicts for named tuples, key data for keys.

    >>> import jax, jax.numpy as jnp, optax, flaxsplit as fs
    >>> carry = fs.init_carry({"w": jnp.ones(3)}, {}, optax.adam(0.1))
    >>> restored = {"step": 7, "params": {"w": [2., 2., 2.]}, "state": {}, "opt_state": carry.opt_state}
    >>> restored["params"]["w"] = jax.device_get(jnp.full(3, 2.0))
    >>> fs.adopt_carry(restored, carry).params["w"]
    Array([2., 2., 2.], dtype=float32)

    Args:
        restored: the result of the checkpoint library; also a saved `TrainState`, with its collections beside its
            params.
        like: a carry of `init_carry`. Only its shapes, dtypes and shardings are read, so a donated carry or one of
            `jax.ShapeDtypeStruct` works too.
        strict: whether both must have the same leaves. If not, the leaves that both have are kept, also if they are
            frozen now or no longer, or if the optimizer was wrapped or unwrapped. A leaf that `restored` lacks comes
            from `like`; a leaf that `like` lacks is dropped. A leaf of another shape or dtype stays an error. Use it
            to continue with other params frozen, or with a new average.

    Returns:
        A carry of `like`'s structure and placement, with its own buffers.

    Raises:
        CollectionError: leaves are missing, left over, deleted, or of another shape or dtype; all are named.
        SignatureError: a leaf of `like` is not an array.
    """
    LIKE.unless_all(is_array, like, "like")
    wanted, held = _by_path(like), _laid_out(restored, like)
    TOO_WIDE.if_any(_too_wide(held, wanted), where="adopt_carry(restored, like)")
    # what has nothing in common is no carry with parts missing: `like` alone would come out, and the training be lost
    strict = strict or not _moved(held, wanted).keys() & wanted.keys()
    found, wrong = _matched(held, wanted, strict)
    UNADOPTED.unless(not wrong, wrong, restored, held, wanted, lambda: _moved(held, wanted))
    adopted: T = jax.tree.unflatten(jax.tree.structure(like), _alike(found))
    return adopted


class Held(NamedTuple):
    """A leaf, and its key path in words."""

    name: str
    leaf: Any


def _by_path(tree: Any) -> dict[Place, Held]:
    """Every leaf by the bare names on its path: the same for a dict or a named tuple, a list or a tuple, `0` or `"0"`.

    The box of a leaf has no name of its own: an NNX variable, and the `{"value": ...}` that is saved of one.
    """
    pairs = jax.tree_util.tree_flatten_with_path(_opened(tree))[0]
    named = {tuple(str(entry_name(key)) for key in path): (path, leaf) for path, leaf in pairs}
    return {
        place[:-1] if place[-1:] == ("value",) else place: Held("carry" + jax.tree_util.keystr(path), leaf)
        for place, (path, leaf) in named.items()
    }


def _opened(tree: Any) -> Any:
    """A dataclass that JAX does not know as a tree, as the dict of its fields."""
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type) or jax.tree.leaves(tree) != [tree]:
        return tree
    return {field.name: _opened(getattr(tree, field.name)) for field in dataclasses.fields(tree)}


def _laid_out(restored: Any, like: Any) -> dict[Place, Held]:
    """What was restored, by the paths of a carry: a `TrainState` has collections beside its params, and no state."""
    held = _by_path(restored)
    if not isinstance(like, Carry):
        return held
    own = [(), *((name,) for name in Carry._fields)]
    return {place if place[:1] in own else ("state", *place): each for place, each in held.items()}


def _too_wide(held: Mapping[Place, Held], wanted: Mapping[Place, Held]) -> list[str]:
    """Whole numbers that JAX would store as others."""
    given = ((each.name, held[place].leaf) for place, each in wanted.items() if place in held)
    return [f"{name}: {wide(leaf)}" for name, leaf in given if not survives(leaf)]


def _matched(
    held: Mapping[Place, Held], wanted: Mapping[Place, Held], strict: bool
) -> tuple[list[tuple[Held, Any]], list[Difference]]:
    """Each leaf that is wanted beside its value, and what is wrong."""
    if not strict:
        held = _moved(held, wanted)
    found, wrong = [], []
    for place, (name, leaf) in wanted.items():
        value = _unboxed(held[place].leaf, leaf) if place in held else None if strict else leaf
        if value is None:
            wrong.append(Difference(name, describe(leaf), ABSENT))
        elif not is_given(value):
            wrong.append(Difference(name, describe(leaf), kind_of(value)))
        elif _type_of(value, leaf) != _type_of(leaf, leaf):
            wrong.append(Difference(name, describe(leaf), describe(strong(value) if not is_array(value) else value)))
        else:
            found.append((Held(name, leaf), value))
    left = [each for place, each in held.items() if place not in wanted] if strict else []
    return found, [*wrong, *(Difference(name, ABSENT, "in the checkpoint") for name, _ in left)]


def _moved(held: Mapping[Place, Held], wanted: Mapping[Place, Held]) -> dict[Place, Held]:
    """Puts what was restored where it is wanted: params that are frozen now or no longer, a tx that was wrapped."""
    other = {
        place[1:] if place[0] == "state" else ("state", *place): each
        for place, each in held.items()
        if "params" in place[:2]
    }
    return {**other, **held, **_rehung(_under(("opt_state",), held), _under(("opt_state",), wanted))}


def _rehung(old: Mapping[Place, Held], new: Mapping[Place, Held]) -> dict[Place, Held]:
    """An optimizer's state where it is all of one part of the other's, or one part of it all of the other's."""
    inner = [part for part in _parts(new, len(old)) if _is_alike(old, _under(part, new))]
    outer = [part for part in _parts(old, len(new)) if _is_alike(_under(part, old), new)]
    if _is_alike(old, new) or len(inner) + len(outer) != 1:
        return {}
    moved = {(*inner[0], *place): each for place, each in old.items()} if inner else _under(outer[0], old)
    return {("opt_state", *place): each for place, each in moved.items()}


def _parts(tree: Mapping[Place, Held], size: int) -> list[Place]:
    """The branches that have so many leaves."""
    counts = Counter(place[:i] for place in tree for i in range(1, len(place)))
    return [part for part, count in counts.items() if count == size]


def _under(part: Place, tree: Mapping[Place, Held]) -> dict[Place, Held]:
    return {place[len(part) :]: each for place, each in tree.items() if place[: len(part)] == part}


def _is_alike(old: Mapping[Place, Held], new: Mapping[Place, Held]) -> bool:
    return old.keys() == new.keys() and all(
        is_given(value) and _type_of(value, leaf) == _type_of(leaf, leaf)
        for value, leaf in ((_unboxed(old[place].leaf, new[place].leaf), new[place].leaf) for place in new)
    )


def _unboxed(value: Any, leaf: Any) -> Any:
    """Key data becomes keys again where keys are due, and keys become key data where a legacy key is due.

    A dtype that NumPy does not know, such as bf16, comes back from a `.npz` as raw bytes of its size; a count, as whole
    numbers of another size.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind == "V" and value.dtype.itemsize == leaf.dtype.itemsize:
        return value.view(leaf.dtype)
    if _is_count(value) and _is_count(leaf) and value.dtype != leaf.dtype and _fits(value, leaf.dtype):
        return np.asarray(value, leaf.dtype)
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
    """The shape and dtype; a Python scalar has no dtype of its own, and takes the leaf's where JAX would.

    Whole numbers of 64 bits, as NumPy makes them of a list, are those that JAX makes of them.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value.shape, jax.dtypes.canonicalize_dtype(value.dtype)
    return tuple(jnp.shape(value)), value.dtype if is_array(value) else jnp.result_type(value, leaf.dtype)


def _is_count(leaf: Any) -> bool:
    return is_array(leaf) and leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer)


def _fits(count: Any, dtype: Any) -> bool:
    return (
        is_given(count) and not isinstance(count, Tracer) and np.iinfo(dtype).min <= int(count) <= np.iinfo(dtype).max
    )


def _alike(found: Sequence[tuple[Held, Any]]) -> list[jax.Array]:
    """Copies each value, and puts the copy where the leaf that it is to be like lives."""
    copies = {name: jnp.array(value, dtype=leaf.dtype, copy=True) for (name, leaf), value in found}
    goals = {name: leaf.sharding for (name, leaf), _ in found if _is_placed(leaf)}
    put = placed("adopt_carry(restored, like)", {name: (copies[name], goal) for name, goal in goals.items()})
    return list((copies | dict(zip(goals, put, strict=True))).values())


def _is_placed(leaf: Any) -> bool:
    return getattr(leaf, "sharding", None) is not None and getattr(leaf, "committed", True)
