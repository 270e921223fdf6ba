"""A step over an NNX module is dispatched in at most 1.05 of the time of one written by hand over flat dicts.

The 8-layer MLP of 119 leaves, 16 wide, Adam, the carry donated by every contender. Beside it NNX's own ways: `nnx.jit`,
and `nnx.cached_partial`, which looks at the module once and not at every call.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import optax
from flax import nnx

import flaxsplit as fs

from ._measure import AGAIN, HAND, OURS, Effort, Row, Run, Tell, timed
from ._models import Stepper, batch_of, copy, loss_of

STEPS = 20
WIDTH = 16


class DenseNorm(nnx.Module):
    """`layers` times Linear, BatchNorm and relu: the model of `dispatch`, in NNX."""

    def __init__(self, layers: int = 8, *, rngs: nnx.Rngs) -> None:
        """Makes the layers, each under a name of its own, which every version of NNX takes."""
        self.layers = layers
        for i in range(layers):
            setattr(self, f"linear_{i}", nnx.Linear(WIDTH, WIDTH, rngs=rngs))
            setattr(self, f"norm_{i}", nnx.BatchNorm(WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Maps `[batch, WIDTH]` to `[batch, 1]`."""
        for i in range(self.layers):
            x = nnx.relu(getattr(self, f"norm_{i}")(getattr(self, f"linear_{i}")(x)))
        return self.head(x)


class NnxStepper:
    """Runs a step that changes model and optimizer in place, as NNX's do."""

    def __init__(self, step: Any, batch: Any) -> None:
        self.step, self.batch = step, batch

    def __call__(self) -> Any:
        """Takes the steps; the last loss needs all steps before it."""
        for _ in range(STEPS):
            loss = self.step(self.batch)
        return loss


def flat(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Nested dicts as one, by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {at: leaf for name, each in tree.items() for at, leaf in flat(each, (*path, name)).items()}


def by_hand(tx: optax.GradientTransformation, x: Any) -> tuple[Any, fs.Carry]:
    """The functional API of NNX inside a plain `jax.jit`, over flat dicts of arrays; the step and its carry."""
    split: Any = nnx.split  # its types are too narrow for mypy
    graphdef, params, stats = split(DenseNorm(rngs=nnx.Rngs(0)), nnx.Param, ...)

    def names(state: Any) -> dict[str, Any]:
        return {"/".join(path): leaf for path, leaf in flat(nnx.to_pure_dict(state)).items()}

    def pure(leaves: dict[str, Any]) -> Any:
        tree: dict[str, Any] = {}
        for name, leaf in leaves.items():
            owner, attribute = name.split("/")
            tree.setdefault(owner, {})[attribute] = leaf
        return tree

    def step(carry: Any, batch: Any) -> Any:
        count, params, stats, opt_state = carry

        def objective(params: Any) -> Any:
            model = nnx.merge(graphdef, pure(params), pure(stats))
            loss = loss_of(model(batch[0]), batch[1])
            return loss, names(split(model, nnx.Param, ...)[2])

        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return fs.Carry(count + 1, optax.apply_updates(params, updates), stats, opt_state), loss

    return step, fs.init_carry(names(params), names(stats), tx)


def ours(tx: optax.GradientTransformation) -> tuple[Any, fs.Carry]:
    """The same out of combinators."""
    fn, params, state = fs.from_nnx(DenseNorm(rngs=nnx.Rngs(0)))

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        pred, state = fn(params, state, batch[0])
        return loss_of(pred, batch[1]), state

    return fs.with_optimizer(loss_fn, tx), fs.init_carry(params, state, tx)


def nnx_step(tx: optax.GradientTransformation) -> tuple[Any, Any, Any]:
    """The step of NNX's guide with its model and optimizer."""
    model = DenseNorm(rngs=nnx.Rngs(0))
    optimizer: Any = nnx.Optimizer(model, tx, wrt=nnx.Param)
    takes_model = "model" in inspect.signature(optimizer.update).parameters  # flax 0.11

    def train_step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: loss_of(model(batch[0]), batch[1]))(model)
        optimizer.update(model, grads) if takes_model else optimizer.update(grads)
        return loss

    return nnx.jit(train_step, donate_argnums=(0, 1)), model, optimizer


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """By hand twice, ours, and NNX's two, twenty steps at a time."""
    tx, batch = optax.adam(1e-3), batch_of(width=WIDTH)
    hand, carry = by_hand(tx, batch[0])
    step, our_carry = ours(tx)
    whole, model, optimizer = nnx_step(tx)
    cached, *held = nnx_step(tx)
    contenders: dict[str, Run] = {
        HAND: Stepper(jax.jit(hand, donate_argnums=0), copy(carry), batch, STEPS),
        AGAIN: Stepper(jax.jit(lambda carry, batch: hand(carry, batch), donate_argnums=0), copy(carry), batch, STEPS),
        OURS: Stepper(fs.jit_step(step), our_carry, batch, STEPS),
        "nnx.jit": NnxStepper(lambda batch: whole(model, optimizer, batch), batch),
        "nnx.cached_partial": NnxStepper(nnx.cached_partial(cached, *held), batch),
    }
    yield timed("NNX MLP, 8 layers", contenders, effort, tell, per=STEPS, bounds={OURS: 1.05})
