"""What a checkpoint gave back becomes a carry again, which the compiled step takes without compiling."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ._carry import is_given, survives
from ._checks import checked
from ._describe import Difference, describe, is_array, kind_of, strong
from ._place import placed
from ._refusals.carry import LIKE, TOO_WIDE, UNADOPTED

T = TypeVar("T")


@checked
def adopt_carry(restored: Any, like: T, *, strict: bool = True) -> T:
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
        strict: whether both must have the same leaves. If not, a leaf that `restored` lacks is the one of `like`, and
            what it has beyond `like` is left out; a leaf that both have in another shape or dtype stays an error. So
            training goes on with other params frozen, or with an average that was not there before.

    Returns:
        A carry of `like`'s structure and placement, with buffers of its own.

    Raises:
        CollectionError: leaves are missing, left over, deleted, or of another shape or dtype; names every one.
        SignatureError: a leaf of `like` is no array.
    """
    LIKE.unless_all(is_array, like, "like")
    wanted, treedef = jax.tree_util.tree_flatten_with_path(like)
    found, wrong, used = {}, [], set()
    for path, leaf in wanted:
        name = "carry" + jax.tree_util.keystr(path)
        value = _unwrapped(_walk(restored, path), leaf)
        value = leaf if value is _NOTHING and not strict else value
        used.add(_plain_path(path))
        if value is _NOTHING:
            wrong.append(Difference(name, describe(leaf), "absent"))
        elif not is_given(value):
            wrong.append(Difference(name, describe(leaf), kind_of(value)))
        elif _type_of(value, leaf) != _type_of(leaf, leaf):
            wrong.append(Difference(name, describe(leaf), describe(strong(value) if not is_array(value) else value)))
        else:
            found[name] = (value, leaf)
    held = jax.tree_util.tree_flatten_with_path(restored)[0] if strict else []
    left = [path for path, _ in held if _plain_path(path) not in used]
    wrong += [Difference("carry" + jax.tree_util.keystr(path), "absent", "in the checkpoint") for path in left]
    UNADOPTED.if_any(map(str, wrong))
    wide = (f"{name}: {describe(value)}, beyond 32 bits" for name, (value, _) in found.items() if not survives(value))
    TOO_WIDE.if_any(wide, where="adopt_carry(restored, like)")
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
        tree = _child(tree, key)
    return tree


def _child(tree: Any, key: Any) -> Any:
    """One level of it. A checkpoint may have made numbers of names, and names of numbers."""
    if isinstance(tree, Mapping):
        names = [key, str(key), *([int(key)] if isinstance(key, str) and key.isdecimal() else [])]
        return next((tree[name] for name in names if name in tree), _NOTHING)
    if key in _fields(tree):
        return getattr(tree, key)
    is_place = isinstance(key, int) and isinstance(tree, list | tuple) and key < len(tree)
    return tree[key] if is_place else _NOTHING


def _fields(tree: Any) -> Sequence[str]:
    """The fields of a named tuple or a dataclass; what else it has, such as a tuple's `count`, is no leaf."""
    if dataclasses.is_dataclass(tree):
        return [field.name for field in dataclasses.fields(tree)]
    fields: Sequence[str] = getattr(tree, "_fields", ())
    return fields


def _unwrapped(value: Any, leaf: Any) -> Any:
    """Key data becomes keys again where keys are due, and keys become key data where a legacy key is due.

    A dtype that NumPy does not know, such as bf16, comes back from a `.npz` as raw bytes of its size.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind == "V" and value.dtype.itemsize == leaf.dtype.itemsize:
        return value.view(leaf.dtype)
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
