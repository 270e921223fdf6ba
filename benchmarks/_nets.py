"""Networks as data, and how Linen, NNX, Equinox and Haiku each build them: one network is the same function in all.

Weights depend on their shape alone (`fixed`), so no library's way to draw them matters.
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class Dense:
    """A matrix and a bias."""

    features: int


@dataclass(frozen=True)
class Conv:
    """A convolution without bias; a norm comes behind it."""

    features: int
    size: int = 3
    stride: int = 1


@dataclass(frozen=True)
class Norm:
    """Batch normalization."""


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalization."""


@dataclass(frozen=True)
class Act:
    """`jax.nn.relu`, `jax.nn.gelu`."""

    name: str = "relu"


@dataclass(frozen=True)
class MaxPool:
    """The greatest of 3 x 3, every second."""


@dataclass(frozen=True)
class Mean:
    """The mean over space, or over a sequence."""


@dataclass(frozen=True)
class Attention:
    """Multi-head self-attention."""

    heads: int


@dataclass(frozen=True)
class Dropout:
    """Dropout, in training."""

    rate: float


@dataclass(frozen=True)
class Residual:
    """`main(x) + shortcut(x)`."""

    main: tuple[Any, ...]
    shortcut: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Drift:
    """The BiasAdderWithRunningMean of Flax's guide: its state has another shape after the first update."""


@dataclass(frozen=True)
class Weak:
    """A scale that starts as a Python number."""


@dataclass(frozen=True)
class Sow:
    """Sows how active the network is."""


Layers = tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """Layers as one hashable thing, which NNX holds for static."""

    layers: Layers


def mlp(depth: int = 8, width: int = 64) -> Layers:
    """`depth` times Dense, BatchNorm and relu, and a Dense of one."""
    return (*(Dense(width), Norm(), Act()) * depth, Dense(1))


def resnet(depth: int, classes: int = 1000, width: int = 64) -> Layers:
    """ResNet-18 or -50 (He and others, arXiv:1512.03385), the stride of -50 in its 3 x 3 convolution."""
    blocks, wide = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}[depth]
    layers: list[Any] = [Conv(width, 7, 2), Norm(), Act(), MaxPool()]
    channels = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        outer = inner * 4 if wide else inner
        for i in range(count):
            stride = 2 if i == 0 and stage else 1
            main: Layers = (Conv(inner, 3, stride), Norm(), Act(), Conv(outer), Norm())
            if wide:
                main = (Conv(inner, 1), Norm(), Act(), Conv(inner, 3, stride), Norm(), Act(), Conv(outer, 1), Norm())
            same = stride == 1 and channels == outer
            layers += [Residual(main, () if same else (Conv(outer, 1, stride), Norm())), Act()]
            channels = outer
    return (*layers, Mean(), Dense(classes))


def transformer(depth: int, width: int, heads: int, rate: float = 0.1, classes: int = 1000) -> Layers:
    """An encoder, its norms first (Xiong and others, arXiv:2002.04745), over a sequence of vectors."""
    attend = Residual((LayerNorm(), Attention(heads), Dropout(rate)))
    feed = Residual((LayerNorm(), Dense(4 * width), Act("gelu"), Dense(width), Dropout(rate)))
    return (*(attend, feed) * depth, LayerNorm(), Mean(), Dense(classes))


def without_dropout(layers: Layers) -> Layers:
    """The same network with nothing in it that is drawn by chance."""
    return tuple(
        Residual(without_dropout(layer.main), without_dropout(layer.shortcut)) if isinstance(layer, Residual) else layer
        for layer in layers
        if not isinstance(layer, Dropout)
    )


def has(layers: Layers, kind: type) -> bool:
    """Whether a network has a layer of a kind anywhere."""
    return any(isinstance(layer, kind) or (isinstance(layer, Residual) and has(layer.main, kind)) for layer in layers)


def fixed(shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Weights that their shape alone decides, with the variance of He's initialization."""
    size, fan_in = math.prod(shape), math.prod(shape[:-1])
    return (jax.random.normal(jax.random.key(size), (size,)).reshape(shape) * math.sqrt(2 / fan_in)).astype(dtype)


def keyed(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
    """`fixed`, as Flax calls it."""
    return fixed(shape, dtype)


def drifted(mean: Any, x: Any) -> Any:
    """The running mean of the guide."""
    return 0.9 * mean + 0.1 * jnp.mean(x, axis=0, keepdims=True)


def pooled(x: Any) -> Any:
    """The mean over all but the batch and the features."""
    return x.mean(tuple(range(1, x.ndim - 1)))


class Linen(nn.Module):
    """A network in Linen."""

    layers: Layers
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Maps `[batch, ..., features]` to `[batch, out]`."""
        return self.through(self.layers, x, train)

    def through(self, layers: Layers, x: Any, train: bool) -> Any:
        """Layer by layer."""
        for layer in layers:
            x = self.one(layer, x, train)
        return x

    def one(self, layer: Any, x: Any, train: bool) -> Any:
        """One layer."""
        match layer:
            case Dense():
                return nn.Dense(layer.features, dtype=self.dtype, kernel_init=keyed)(x)
            case Conv():
                sizes, strides = (layer.size,) * 2, (layer.stride,) * 2
                conv = nn.Conv(layer.features, sizes, strides, use_bias=False, dtype=self.dtype, kernel_init=keyed)
                return conv(x)
            case Norm():
                return nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype)(x)
            case LayerNorm():
                return nn.LayerNorm(dtype=self.dtype)(x)
            case Act():
                return getattr(jax.nn, layer.name)(x)
            case MaxPool():
                return nn.max_pool(x, (3, 3), (2, 2), "SAME")
            case Mean():
                return pooled(x)
            case Attention():
                return nn.MultiHeadDotProductAttention(layer.heads, dtype=self.dtype, kernel_init=keyed)(x, x)
            case Dropout():
                return nn.Dropout(layer.rate, deterministic=not train)(x)
            case Residual():
                return self.through(layer.main, x, train) + self.through(layer.shortcut, x, train)
            case Drift():
                started = self.has_variable("batch_stats", "mean")
                mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
                if started:
                    mean.value = drifted(mean.value, x)
                return mean.value + x + self.param("bias", nn.initializers.zeros, x.shape[1:])
            case Weak():
                return x * self.param("scale", lambda key: jnp.asarray(1.0))
            case Sow():
                self.sow("losses", "activity", (x**2).mean())
                return x
            case _:
                raise TypeError(layer)


def channels_after(layer: Any, channels: int) -> int:
    """How many features a layer gives."""
    if isinstance(layer, Residual):
        for each in layer.main:
            channels = channels_after(each, channels)
        return channels
    return getattr(layer, "features", channels)


class Sown(nnx.Variable[Any]):
    """What is sown."""


class Nnx(nnx.Module):
    """A network in NNX."""

    def __init__(self, layers: Layers, channels: int, dtype: Any = None, *, rngs: nnx.Rngs) -> None:
        """Makes the layers, each under a name of its own, which every version of NNX takes."""
        self.plan = Plan(layers)
        for i, layer in enumerate(layers):
            setattr(self, f"layer_{i}", self.made(layer, channels, dtype, rngs))
            channels = channels_after(layer, channels)

    @staticmethod
    def made(layer: Any, channels: int, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The module of one layer; none where it has nothing to keep."""
        any_nnx: Any = nnx
        options: Any = {"dtype": dtype, "rngs": rngs}
        match layer:
            case Dense():
                return nnx.Linear(channels, layer.features, kernel_init=keyed, **options)
            case Conv():
                sizes = (layer.size,) * 2
                return any_nnx.Conv(
                    channels, layer.features, sizes, layer.stride, use_bias=False, kernel_init=keyed, **options
                )
            case Norm():
                return nnx.BatchNorm(channels, **options)
            case LayerNorm():
                return nnx.LayerNorm(channels, **options)
            case Attention():
                return any_nnx.MultiHeadAttention(layer.heads, channels, decode=False, kernel_init=keyed, **options)
            case Dropout():
                return nnx.Dropout(layer.rate, rngs=rngs)
            case Residual():
                return Pair(layer, channels, dtype, rngs=rngs)
            case Drift():
                return Drifting(channels)
            case Weak():
                return nnx.Param(jnp.asarray(1.0))
            case _:
                return None

    def __call__(self, x: Any, train: bool = True) -> Any:
        """Maps `[batch, ..., features]` to `[batch, out]`."""
        for i, layer in enumerate(self.plan.layers):
            x = self.one(layer, getattr(self, f"layer_{i}"), x, train)
        return x

    def one(self, layer: Any, module: Any, x: Any, train: bool) -> Any:
        """One layer."""
        match layer:
            case Norm():
                return module(x, use_running_average=not train)
            case Dropout():
                return module(x, deterministic=not train)
            case Residual():
                return module.main(x, train) + module.shortcut(x, train)
            case Act():
                return getattr(jax.nn, layer.name)(x)
            case MaxPool():
                return nnx.max_pool(x, (3, 3), (2, 2), "SAME")
            case Mean():
                return pooled(x)
            case Weak():
                return x * module.value
            case Sow():
                self.sow(Sown, "activity", (x**2).mean())
                return x
            case _:
                return module(x)


class Pair(nnx.Module):
    """Both ways of a residual."""

    def __init__(self, layer: Residual, channels: int, dtype: Any, *, rngs: nnx.Rngs) -> None:
        self.main = Nnx(layer.main, channels, dtype, rngs=rngs)
        self.shortcut = Nnx(layer.shortcut, channels, dtype, rngs=rngs)


class Drifting(nnx.Module):
    """The guide's layer in NNX."""

    def __init__(self, channels: int) -> None:
        self.mean, self.bias = nnx.BatchStat(jnp.zeros(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Any) -> Any:
        """Adds the mean, and a bias."""
        self.mean.value = drifted(self.mean.value, x)
        return self.mean.value + x + self.bias.value


def haiku(layers: Layers) -> Any:
    """A network as a function to be transformed by Haiku."""
    import haiku

    hk: Any = haiku

    def through(layers: Layers, x: Any, train: bool) -> Any:
        for layer in layers:
            x = one(layer, x, train)
        return x

    def one(layer: Any, x: Any, train: bool) -> Any:
        match layer:
            case Dense():
                return hk.Linear(layer.features, w_init=fixed)(x)
            case Conv():
                return hk.Conv2D(layer.features, layer.size, layer.stride, with_bias=False, w_init=fixed)(x)
            case Norm():
                return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.99)(x, train)
            case LayerNorm():
                return hk.LayerNorm(-1, create_scale=True, create_offset=True, eps=1e-6)(x)
            case Act():
                return getattr(jax.nn, layer.name)(x)
            case MaxPool():
                return hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
            case Mean():
                return pooled(x)
            case Attention():
                size = x.shape[-1]
                return hk.MultiHeadAttention(layer.heads, size // layer.heads, w_init=fixed, model_size=size)(x, x, x)
            case Dropout():
                return hk.dropout(hk.next_rng_key(), layer.rate, x) if train else x
            case Residual():
                return through(layer.main, x, train) + through(layer.shortcut, x, train)
            case Drift():
                mean = hk.get_state("mean", x.shape[1:], init=jnp.zeros)
                mean = mean if hk.running_init() else drifted(mean, x)
                hk.set_state("mean", mean)
                return mean + x + hk.get_parameter("bias", x.shape[1:], init=jnp.zeros)
            case Weak():
                return x * hk.get_parameter("scale", [], init=lambda shape, dtype: jnp.asarray(1.0))
            case _:
                raise TypeError(layer)

    return lambda x, train=True: through(layers, x, train)
