"""A step over an NNX module is dispatched in at most 1.05 of the time of one written by hand over the same dicts.

The 8-layer MLP of 119 leaves, 16 wide, Adam, the carry donated by every contender. First over dicts of one level,
beside NNX's own ways: `nnx.jit`, and `nnx.cached_partial`, which looks at the module once and not at every call. Then
over nested dicts, as `from_nnx` gives them: what these cost is JAX's to open and make, by hand too.
"""

from collections.abc import Iterator
from typing import Any

import jax
import optax
from flax import nnx

import flaxsplit as fs

from . import _nets as nets
from ._measure import AGAIN, HAND, OURS, Effort, Row, Run, Tell, timed
from ._models import Stepper, batch_of, copy, loss_of
from ._peers import BEST, CACHED, NNX, PARTIAL, Task, build, present, stepper

STEPS = 20
WIDTH = 16


def module() -> nets.Nnx:
    """The model of `dispatch`, in NNX."""
    return nets.Nnx(nets.mlp(8, WIDTH), WIDTH, rngs=nnx.Rngs(0))


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as one, by `/`-joined path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {at: leaf for name, each in tree.items() for at, leaf in flat(each, f"{path}/{name}".lstrip("/")).items()}


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`, for the two levels of this model."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        owner, name = path.split("/")
        tree.setdefault(owner, {})[name] = leaf
    return tree


def same(tree: dict[str, Any]) -> dict[str, Any]:
    """Leaves dicts nested."""
    return tree


def by_hand(tx: optax.GradientTransformation, take: Any = flat, give: Any = nested) -> tuple[Any, fs.Carry]:
    """The functional API of NNX inside a plain `jax.jit`, over dicts of arrays; the step and its carry."""
    split: Any = nnx.split  # its types are too narrow for mypy
    graphdef, params, stats = split(module(), nnx.Param, ...)

    def step(carry: Any, batch: Any) -> Any:
        count, params, stats, opt_state = carry

        def objective(params: Any) -> Any:
            model = nnx.merge(graphdef, give(params), give(stats))
            loss = loss_of(model(batch[0]), batch[1])
            return loss, take(nnx.to_pure_dict(split(model, nnx.Param, ...)[2]))

        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return fs.Carry(count + 1, optax.apply_updates(params, updates), stats, opt_state), loss

    return step, fs.init_carry(take(nnx.to_pure_dict(params)), take(nnx.to_pure_dict(stats)), tx)


def ours(tx: optax.GradientTransformation, take: Any = flat, give: Any = nested) -> tuple[Any, fs.Carry]:
    """The same out of combinators."""
    fn, params, state = fs.from_nnx(module())

    def each(change: Any, state: Any) -> Any:
        return {name: change(tree) for name, tree in state.items()}

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        pred, state = fn(give(params), each(give, state), batch[0])
        return loss_of(pred, batch[1]), each(take, state)

    return fs.with_optimizer(loss_fn, tx), fs.init_carry(take(params), each(take, state), tx)


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """By hand twice and ours, over each kind of dicts, and NNX's two; twenty steps at a time."""
    if not effort.wants("all of it"):
        return
    tx, batch = optax.adam(1e-3), batch_of(width=WIDTH)
    task = Task(nets.mlp(8, WIDTH), (WIDTH,))

    def contenders(*how: Any) -> dict[str, Run]:
        (hand, carry), (step, our_carry) = by_hand(tx, *how), ours(tx, *how)
        again = jax.jit(lambda carry, batch: hand(carry, batch), donate_argnums=0)
        return {
            HAND: Stepper(jax.jit(hand, donate_argnums=0), copy(carry), batch, STEPS),
            AGAIN: Stepper(again, copy(carry), batch, STEPS),
            OURS: Stepper(fs.jit_step(step), our_carry, batch, STEPS),
        }

    one_level, deep = contenders(flat, nested), contenders(same, same)
    theirs: dict[str, Run] = {
        NNX: stepper(build(NNX + BEST, task), batch, STEPS),
        **{name: stepper(build(name, task), batch, STEPS) for name in present((CACHED + BEST, PARTIAL + BEST))},
        "flaxsplit, nested dicts": deep[OURS],
    }
    yield timed("dicts of one level", one_level | theirs, effort, tell, per=STEPS, bounds={OURS: 1.05})
    yield timed("nested dicts", deep, effort, tell, per=STEPS, bounds={OURS: 1.05})
