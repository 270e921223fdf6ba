"""Refusals of what runs many steps, and of what compiles them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from flaxsplit._describe import describe, differences, is_array, keyed_leaves
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError

from .options import form, function, mesh_in_type, place_of

# ---- scan_steps, stack_batches

SCAN_STEP = function("scan_steps(step)", "step", "scan_steps(with_optimizer(loss_fn, tx))")
LEADING = Refusal(
    SignatureError,
    "scan_steps(step)",
    "every leaf of batches must have one leading axis, of one size: the steps",
    "a single batch was passed, or batches were stacked apart",
    "for batches in stack_batches(loader, 10): carry, outs = step(carry, batches)",
)
OUT = Refusal(
    SignatureError,
    "$where",
    "every leaf of what is stacked must be an array or a number",
    "names, records or objects are returned beside arrays",
    "return arrays and numbers alone; what does not change belongs outside the step",
)
BATCHES = form("stack_batches(batches, size)", "batches must be an iterable of batches", "stack_batches(loader, 10)")
BATCH = Refusal(
    SignatureError,
    "stack_batches(batches, size)",
    "every leaf of a batch must be an array or a number",
    "the iterable gives names, records or objects beside arrays, or it is one batch",
    "stack_batches(({'x': b['x'], 'y': b['y']} for b in loader), 10)",
)

# ---- jit_step

JIT_STEP = function("jit_step(step)", "step", "jit_step(with_optimizer(loss_fn, tx))")
LIKE = Refusal(
    SignatureError,
    "jit_step(like=...)",
    "every leaf of like must say its sharding",
    "abstract values without a sharding, NumPy arrays or numbers",
    "jit_step(step, like=init_carry(params, state, tx))",
)


@Guess
def UNLIKE(result: Any, like: Any) -> Explained:  # noqa: N802
    """What a step returned, which has no carry like the one that was named."""
    carry = result[0] if isinstance(result, tuple) and result else result
    changed = differences(like, carry, "carry")
    return SignatureError(
        "jit_step(like=...)",
        "the step must return a carry of the structure of like, alone or first in a tuple (like -> returned)",
        [str(each) for each in changed],
        "like is the carry of another step, or the step returns something else first",
        "jit_step(step, like=carry), where the step returns (carry, out)",
    )


_ELSEWHERE = Refusal(
    SignatureError,
    "jit_step(like=...)",
    "the carry must come on the mesh of like (carry -> like)",
    "the carry was made or restored on another mesh than like",
    "carry = adopt_carry(carry, like)",
)


@Guess
def ELSEWHERE(carry: Any, like: Any) -> Explained:  # noqa: N802
    """A carry that JAX cannot take to the mesh of like, leaf by leaf."""
    pairs = zip(keyed_leaves(carry, "carry").items(), jax.tree.leaves(like), strict=False)
    both = ((path, describe(leaf), mesh_in_type(leaf), mesh_in_type(goal)) for (path, leaf), goal in pairs)
    return _ELSEWHERE(*(f"{path}: {leaf}, {mesh} -> {goal}" for path, leaf, mesh, goal in both if mesh))


_ON_ONE = _ELSEWHERE.but(
    required="like must lie on the mesh that the step runs on (like -> the step)",
    cause="the carry was made for one device; the batch, or a shard_map in the step, is on a mesh",
    fix="init_carry(params, state, tx, sharding=NamedSharding(mesh, PartitionSpec()))",
)


@Guess
def ON_ONE(like: Any, spread: list[Any]) -> Explained:  # noqa: N802
    """A carry on one device for a step on several: JAX speaks of the sharding that `like` stands for."""
    meshes = ", ".join(sorted({mesh_in_type(leaf) for leaf in spread}))
    named = ((path, leaf) for path, leaf in keyed_leaves(like, "like").items() if is_array(leaf))
    return _ON_ONE(*(f"{path}: {describe(leaf)}, {place_of(leaf.sharding)} -> {meshes}" for path, leaf in named))


PLACES = Refusal(
    SignatureError,
    "jit_step(batch=...)",
    "batch must be a sharding, or a tree of them whose structure the batch has or begins with",
    "a PartitionSpec or a mesh alone, or shardings of another batch",
    "jit_step(step, like=carry, batch=NamedSharding(mesh, PartitionSpec('data')))",
)
SECOND = PLACES.but(
    required="the batch must be the second argument, and without its name",
    cause="the batch was passed by name, or not at all",
    fix="step(carry, batch)",
)
_UNDIVIDED = Refusal(
    SignatureError,
    "jit_step(batch=...)",
    "every leaf of the batch must be cut into equal parts, one per device",
    "a ragged last batch, or a leaf that every device needs whole (a key, a number) is in the batch",
    "drop or pad the last batch; pass what is shared after the batch, or give it a sharding of its own in a tree",
)


@Guess
def UNDIVIDED(batch: Any, places: list[Any], fits: Callable[[Any, Any], bool]) -> Explained:  # noqa: N802
    """Leaves that the mesh does not divide, each with the axes that it was to be cut along."""
    named = zip(keyed_leaves(batch, "batch").items(), places, strict=True)
    wrong = ((path, leaf, place) for (path, leaf), place in named if not fits(leaf, place))
    return _UNDIVIDED(*(f"{path}: {describe(leaf)}, along {_axes_of(place)}" for path, leaf, place in wrong))


def _axes_of(place: NamedSharding) -> str:
    names = [name for each in place.spec if each is not None for name in ([each] if isinstance(each, str) else each)]
    return ", ".join(f"{name}={place.mesh.shape[name]}" for name in names)


def leading(batches: Any) -> list[str]:
    """Says every leaf of what was to be scanned."""
    return [f"{path}: {describe(leaf)}" for path, leaf in keyed_leaves(batches, "batches").items()] or [
        "no leaf in batches"
    ]
