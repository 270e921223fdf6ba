"""What is measured: the model of FACTS, its step written by hand, and the same step out of combinators."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import flaxsplit as fs


class DenseNorm(nn.Module):
    """`layers` times Dense, BatchNorm and relu; 8 layers and Adam make 119 leaves to optimize and thread."""

    layers: int = 8
    width: int = 64
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Maps `[..., width]` to `[..., 1]`."""
        for _ in range(self.layers):
            norm = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)
            x = nn.relu(norm(nn.Dense(self.width)(x)))
        return nn.Dense(1)(x)


def batch_of(size: int = 32, width: int = 64) -> tuple[jax.Array, jax.Array]:
    """A batch of noise and its targets."""
    return jax.random.normal(jax.random.key(0), (size, width)), jax.random.normal(jax.random.key(1), (size, 1))


def loss_of(pred: Any, y: Any) -> Any:
    """Mean squared error."""
    return optax.l2_loss(pred, y).mean()


def by_hand(model: nn.Module, tx: optax.GradientTransformation) -> Any:
    """The update step of Flax's guide over the same carry, to be jitted with the first argument donated."""

    def step(carry: Any, batch: Any) -> Any:
        count, params, state, opt_state = carry
        x, y = batch

        def objective(params: Any) -> Any:
            pred, updated = model.apply({"params": params, **state}, x, mutable=list(state))
            return loss_of(pred, y), updated

        (loss, updated), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return fs.Carry(count + 1, params, updated, opt_state), loss

    return step


def ours(model: nn.Module, tx: optax.GradientTransformation, *, microbatches: int = 1) -> Any:
    """The same step out of combinators."""
    apply = fs.with_mutable(model)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        x, y = batch
        pred, state = apply(params, state, x)
        return loss_of(pred, y), state

    return fs.with_optimizer(loss_fn, tx, microbatches=microbatches)


def ours_vmapped(model: nn.Module, tx: optax.GradientTransformation) -> Any:
    """The step of a model written for one example."""
    apply = fs.vmap_stateful(fs.with_mutable(model), axis_name="batch")

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        x, y = batch
        pred, state = apply(params, state, x)
        return loss_of(pred, y), state

    return fs.with_optimizer(loss_fn, tx)


def start(model: nn.Module, tx: optax.GradientTransformation, x: Any) -> fs.Carry:
    """The carry of a model."""
    return fs.init_carry(*fs.split_params(model.init(jax.random.key(2), x)), tx)


def copy(tree: Any) -> Any:
    """Buffers of one's own, to be donated."""
    return jax.tree.map(jnp.copy, tree)


class Stepper:
    """Runs a jitted step over and over from its own carry; called, it takes `count` steps and returns the last out."""

    def __init__(self, jitted: Any, carry: Any, batch: Any, count: int = 1) -> None:
        self.jitted, self.carry, self.batch, self.count = jitted, carry, batch, count

    def __call__(self) -> Any:
        """Takes the steps."""
        out = None
        for _ in range(self.count):
            self.carry, out = self.jitted(self.carry, self.batch)
        return self.carry, out
