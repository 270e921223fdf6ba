"""Models that hypothesis draws: a description that it can shrink and print, and the one module that builds from it."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

import flaxsplit as fs

BATCH, TIME, WIDTH, VOCABULARY = 4, 4, 2, 5


class At(NamedTuple):
    """Where in which call a layer stands."""

    module: nn.Module
    name: str
    train: bool
    axis_name: str | None


@dataclass(frozen=True)
class Dense:
    """With boxed params, and in any precision."""

    boxed: bool = False
    dtype: str | None = None
    param_dtype: str = "float32"

    def __call__(self, x: Any, at: At) -> Any:
        """Maps features."""
        init = nn.initializers.lecun_normal()
        kernel = nn.with_partitioning(init, ("in", None)) if self.boxed else init
        # No bias: before BatchNorm its gradient is rounding alone, which Adam would scale up
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.tanh(nn.Dense(WIDTH, use_bias=False, kernel_init=kernel, name=at.name, **dtypes)(x))


@dataclass(frozen=True)
class Conv:
    """Over time."""

    def __call__(self, x: Any, at: At) -> Any:
        """Maps features with their neighbours'."""
        return nn.tanh(nn.Conv(WIDTH, (3,), use_bias=False, name=at.name)(x))


@dataclass(frozen=True)
class BatchNorm:
    """Keeps running statistics."""

    def __call__(self, x: Any, at: At) -> Any:
        """Normalizes."""
        return nn.BatchNorm(not at.train, momentum=0.9, axis_name=at.axis_name, name=at.name)(x)


@dataclass(frozen=True)
class Dropout:
    """Wants a key."""

    def __call__(self, x: Any, at: At) -> Any:
        """Drops a half."""
        return nn.Dropout(0.5, deterministic=not at.train, name=at.name)(x)


@dataclass(frozen=True)
class Embed:
    """The first layer of a model of tokens."""

    def __call__(self, x: Any, at: At) -> Any:
        """Maps tokens to features."""
        return nn.Embed(VOCABULARY, WIDTH, name=at.name)(x)


@dataclass(frozen=True)
class RNN:
    """A recurrent layer, whose own carry does not outlive the call."""

    cell: str = "GRUCell"

    def __call__(self, x: Any, at: At) -> Any:
        """Maps features with those before."""
        cell = getattr(nn, self.cell)(WIDTH, parent=None)
        return nn.RNN(cell, name=at.name)(x)


@dataclass(frozen=True)
class Attention:
    """Self-attention, with a cache that each call adds one place to."""

    cached: bool = False

    def __call__(self, x: Any, at: At) -> Any:
        """Maps features with all others'."""
        return nn.MultiHeadDotProductAttention(1, use_bias=False, decode=self.cached, name=at.name)(x)


@dataclass(frozen=True)
class Sow:
    """Sows what comes by."""

    def __call__(self, x: Any, at: At) -> Any:
        """Returns `x`."""
        at.module.sow("intermediates", at.name, x)
        return x


@dataclass(frozen=True)
class Remember:
    """A collection of the model's own, carried from call to call."""

    def __call__(self, x: Any, at: At) -> Any:
        """Adds a running mean."""
        mean = at.module.variable("carried", at.name, jnp.zeros, x.shape[-1], jnp.float32)
        if at.train and not at.module.is_initializing():
            new = x.reshape(-1, x.shape[-1]).mean(0, dtype=jnp.float32)
            if at.axis_name is not None:
                new = jax.lax.pmean(new, at.axis_name)
            mean.value = 0.5 * mean.value + 0.5 * new
        return x + mean.value.astype(x.dtype)


Layer: TypeAlias = Dense | Conv | BatchNorm | Dropout | Embed | RNN | Attention | Sow | Remember
WITH_PARAMS = (Dense, Conv, BatchNorm, Embed, RNN, Attention)


@dataclass(frozen=True)
class Model:
    """Layers in order and which of them are frozen; `timeless` ones map vectors, not sequences."""

    layers: tuple[Layer, ...]
    frozen: frozenset[int] = frozenset()
    timeless: bool = False

    def has(self, kind: type) -> bool:
        """Whether a layer of that kind is there."""
        return any(isinstance(layer, kind) for layer in self.layers)

    @property
    def cached(self) -> bool:
        """Whether each call takes one place of the sequence."""
        return any(layer == Attention(cached=True) for layer in self.layers)

    @property
    def trainable(self) -> list[str]:
        """Globs for all that is not frozen."""
        with_params = [i for i, layer in enumerate(self.layers) if isinstance(layer, WITH_PARAMS)]
        return ["head/*", *(f"layer{i}/*" for i in with_params if i not in self.frozen)]

    def inputs(self, seed: int, time: int = TIME) -> jax.Array:
        """A batch."""
        shape = (BATCH,) if self.timeless else (BATCH, time)
        key = jax.random.key(seed)
        if self.has(Embed):
            return jax.random.randint(key, shape, 0, VOCABULARY)
        return jax.random.normal(key, (*shape, WIDTH))

    def batch(self, seed: int) -> tuple[jax.Array, jax.Array]:
        """What a step takes."""
        return self.inputs(seed, 1 if self.cached else TIME), jax.random.normal(jax.random.key(seed + 1), (BATCH,))

    def variables(self) -> dict[str, Any]:
        """Where training starts."""
        key = jax.random.key(0)
        made: dict[str, Any] = dict(jax.jit(Drawn(self).init)({"params": key, "dropout": key}, self.inputs(0)))
        made.pop("intermediates", None)  # as Flax advises: what is sown is no state
        return made

    def halves(self) -> tuple[Any, Any]:
        """Params and state, the latter with keys and an average."""
        params, state = fs.split_params(self.variables(), trainable=self.trainable)
        keys = fs.rng_state(dropout=jax.random.key(1)) if self.has(Dropout) else {}
        return params, state | keys | {"ema": params}


class Drawn(nn.Module):
    """The module of a description."""

    model: Model
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Maps a batch, or one example, to a number each."""
        for i, layer in enumerate(self.model.layers):
            x = layer(x, At(self, f"layer{i}", train, self.axis_name))
        out = nn.Dense(1, name="head")(x).astype(jnp.float32)[..., 0]
        return out if self.model.timeless else out.mean(-1)


@dataclass(frozen=True)
class Stack:
    """Combinators in the order in which they are applied, the innermost first."""

    functions: tuple[str, ...] = ()
    """Around `with_mutable`: some of `rngs`, `vmap`, in this order."""
    steps: tuple[str, ...] = ()
    """Around `with_optimizer`: some of `ema`, `traced`, in this order."""
    microbatches: int = 1
    like: bool = False
    donate: bool = True
