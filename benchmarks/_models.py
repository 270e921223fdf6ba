"""What is measured: a network of Dense, BatchNorm and relu, its step out of combinators, and what runs a step."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import flaxsplit as fs

from . import _nets as nets


def dense_norm(layers: int = 8, width: int = 64, axis_name: str | None = None) -> nets.Linen:
    """The network `nets.mlp` in Linen; 8 layers and Adam make 119 leaves to optimize and thread."""
    return nets.Linen(nets.mlp(layers, width), axis_name=axis_name)


def batch_of(size: int = 32, width: int = 64) -> tuple[jax.Array, jax.Array]:
    """A batch of noise and its targets."""
    return jax.random.normal(jax.random.key(0), (size, width)), jax.random.normal(jax.random.key(1), (size, 1))


def loss_of(pred: Any, y: Any) -> Any:
    """Cross entropy where the targets are classes, else the mean squared error; in float32."""
    pred = pred.astype(jnp.float32)
    if jnp.issubdtype(y.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(pred, y).mean()
    return optax.l2_loss(pred, y).mean()


def ours(model: Any, tx: optax.GradientTransformation, *, microbatches: int = 1, mapped: bool = False) -> Any:
    """The step out of combinators, of a module or its `apply`; `mapped` if it is written for one example."""
    apply: Any = fs.with_mutable(model)
    apply = fs.vmap_stateful(apply, axis_name="batch") if mapped else apply

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        x, y = batch
        pred, state = apply(params, state, x)
        return loss_of(pred, y), state

    return fs.with_optimizer(loss_fn, tx, microbatches=microbatches)


def start(model: nn.Module, tx: optax.GradientTransformation, x: Any) -> fs.Carry:
    """The carry of a model."""
    return fs.init_carry(*fs.split_params(model.init(jax.random.key(2), x)), tx)


def copy(tree: Any) -> Any:
    """Buffers of one's own, to be donated."""
    return jax.tree.map(jnp.copy, tree)


class Stepper:
    """Runs a step over and over from its own carry; called, it takes `count` steps and returns the last result.

    One executable gives a step's results all at once, so who waits for this one waits for the carry too.
    """

    def __init__(self, step: Any, carry: Any, batch: Any, count: int = 1) -> None:
        self.step, self.carry, self.batch, self.count = step, carry, batch, count

    def __call__(self) -> Any:
        """Takes the steps."""
        out = None
        for _ in range(self.count):
            self.carry, out = self.step(self.carry, self.batch)
        return out
