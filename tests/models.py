"""Small networks that several tests train, and the batch that they train on."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

structure: Any = jax.tree.structure  # typed as a class that mypy cannot resolve, so that `==` would be an error


class BiasAdder(nn.Module):
    """The model of Flax's guide on managing params and state, as it stands there: `keepdims=True` included."""

    decay: float = 0.99

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Subtracts a running mean and adds a bias."""
        is_initialized = self.has_variable("batch_stats", "mean")
        ra_mean = self.variable("batch_stats", "mean", lambda s: jnp.zeros(s), x.shape[1:])
        bias = self.param("bias", lambda rng, shape: jnp.zeros(shape), x.shape[1:])
        if is_initialized:
            ra_mean.value = self.decay * ra_mean.value + (1.0 - self.decay) * jnp.mean(x, axis=0, keepdims=True)
        return x - ra_mean.value + bias


class MLP(nn.Module):
    """The per-example MLP of the guide: BatchNorm synced over the axis that `vmap` names."""

    hidden_size: int = 16
    out_size: int = 1
    axis_name: str | tuple[str, ...] | None = "batch"

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Maps `[features]` to `[out_size]`."""
        norm = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)
        x = nn.Dense(self.hidden_size)(x)
        x = nn.relu(norm(x))
        return nn.Dense(self.out_size)(x)


class Dropping(nn.Module):
    """BatchNorm and Dropout: every kind of state at once."""

    axis_name: str | tuple[str, ...] | None = "batch"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Maps `[features]` to `[2]`."""
        x = nn.Dense(16, use_bias=self.use_bias)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2, name="head")(x)


UNBIASED = Dropping(use_bias=False)
"""BatchNorm cancels the bias before it: optimizers that divide by the gradient's size would blow up the rounding."""


class Coder(nn.Module):
    """Two methods besides `__call__`, one of them written as setup."""

    def setup(self) -> None:
        self.encoder = nn.Dense(3)
        self.norm = nn.BatchNorm(use_running_average=False)
        self.decoder = nn.Dense(10)

    def encode(self, x: Any, scale: float = 1.0) -> Any:
        """Maps to the code."""
        return self.norm(self.encoder(x)) * scale

    def __call__(self, x: jax.Array) -> Any:
        """Maps there and back."""
        return self.decoder(self.encode(x))


class Block(nn.Module):
    """A layer of carried `x`, for `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[Any, Any]:
        """Maps `x` to `x`."""
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(10)(x))
        return x, None


class Two(nn.Module):
    """Writes two collections."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        """Counts calls and examples."""
        calls = self.variable("calls", "n", lambda: jnp.zeros((), jnp.int32))
        examples = self.variable("examples", "n", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            if self.is_mutable_collection("calls"):
                calls.value += 1
            if self.is_mutable_collection("examples"):
                examples.value += len(x)
        return nn.Dense(1)(x)


class Sowing(nn.Module):
    """Sows an intermediate value and a loss."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        """Maps `[features]` to `[3]`."""
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
        self.sow("intermediates", "hidden", x)
        self.sow("losses", "l2", (x**2).sum())
        return x


X = jax.random.normal(jax.random.key(7), (32, 10), jnp.float32)
Y = jax.random.normal(jax.random.key(8), (32, 1), jnp.float32)


def numbers(leaf: Any) -> Any:
    """A leaf on the host, of keys their data: to compare there compiles nothing."""
    typed = jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf)
