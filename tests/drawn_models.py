"""Models that hypothesis draws: a description that it can shrink and print, and the one module that builds from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import flaxsplit as fs

from .nnx_models import NEW, Calls

BATCH, TIME, WIDTH, VOCABULARY = 4, 4, 2, 5
LANES = 3  # unlike the sizes above, so that an axis taken for another does not fit


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

    keepdims: bool = False
    """Whether the first update adds an axis, as in Flax's guide."""

    def __call__(self, x: Any, at: At) -> Any:
        """Adds a running mean."""
        mean = at.module.variable("carried", at.name, jnp.zeros, x.shape[-1], jnp.float32)
        if at.train and not at.module.is_initializing():
            new = x.reshape(-1, x.shape[-1]).mean(0, dtype=jnp.float32, keepdims=self.keepdims)
            if at.axis_name is not None:
                new = jax.lax.pmean(new, at.axis_name)
            mean.value = 0.5 * mean.value + 0.5 * new
        return x + jnp.broadcast_to(mean.value.reshape(-1).astype(x.dtype), x.shape)


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
        return jax.random.normal(key, (*shape, WIDTH), jnp.float32)

    def batch(self, seed: int) -> tuple[jax.Array, jax.Array]:
        """What a step takes."""
        y = jax.random.normal(jax.random.key(seed + 1), (BATCH,), jnp.float32)
        return self.inputs(seed, 1 if self.cached else TIME), y

    def variables(self, one: bool = False) -> dict[str, Any]:
        """Where training starts: of a batch, or of one example alone, which only a cache tells apart."""
        key, x = jax.random.key(0), self.inputs(0)
        made: dict[str, Any] = dict(jax.jit(Drawn(self).init)({"params": key, "dropout": key}, x[0] if one else x))
        made.pop("intermediates", None)  # as Flax advises: what is sown is no state
        return made

    def halves(self, one: bool = False) -> tuple[Any, Any]:
        """Params and state, the latter with keys and an average."""
        params, state = fs.split_params(self.variables(one), trainable=self.trainable)
        keys = fs.rng_state(dropout=jax.random.key(1)) if self.has(Dropout) else {}
        return params, state | keys | {"ema": params}

    def updated(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state in the shapes that its first update gives it."""
        drifts = {f"layer{i}" for i, layer in enumerate(self.layers) if layer == Remember(keepdims=True)}
        carried = {name: mean[None] if name in drifts else mean for name, mean in state.get("carried", {}).items()}
        return {**state, **({"carried": carried} if carried else {})}


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
    """Around the step: some of `ema`, `skip`, `traced`; an average lies within what may be skipped."""
    opened: bool = False
    """Whether `value_and_grad` and `apply_gradients` are called by hand."""
    given: str = "none"
    """How the call gives the loss its weight: by its `place`, by its `name`, or not."""
    every: int = 1
    of: str = "params"
    """What is averaged: the `params`, or `all` that the model has."""
    microbatches: int = 1
    like: bool = False
    donate: bool = True


@dataclass(frozen=True)
class Lanes:
    """How a model of one example runs `LANES` times at once: axes of the arguments, of `out`, of params and state."""

    x: int | None = 0
    shift: Any = None
    out: int = 0
    params: Any = None
    state: Mapping[str, int] = field(default_factory=dict[str, int])
    axis_name: str | None = None
    rngs: str = "none"
    """Who gives the keys: `with_rngs` `outside` or `inside` of the map, the caller's `hand`, or nobody."""
    split: bool | Mapping[str, bool] = True
    told: bool = True
    """Whether the number of lanes is said."""

    @property
    def many(self) -> dict[str, Any]:
        """The axes of `out`, which no lane has a part in where there is none."""
        return {"out": 0, "many": self.out, "total": None}

    def axes(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The axis of each collection."""
        return {name: self.state.get(name) for name in state}

    def splits(self, stream: str) -> bool:
        """Whether lanes draw different keys of a stream."""
        return self.split if isinstance(self.split, bool) else self.split.get(stream, True)


class Counter(nnx.Module):
    """Counts its calls in a variable of a type that NNX does not know."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.calls = Calls(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        """Adds the count."""
        if NEW:
            self.calls[...] += 1
            return x + 0.1 * self.calls[...]
        self.calls.value += 1
        return x + 0.1 * self.calls.value


def tied(*, rngs: nnx.Rngs) -> nnx.Sequential:
    """One layer in two places."""
    layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    return nnx.Sequential(layer, jnp.tanh, layer)


NNX_LAYERS: dict[str, Callable[..., Any]] = {
    "BatchNorm": lambda rngs: nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs),
    "Conv": lambda rngs: nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs),
    "Counter": Counter,
    "Dropout": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
    "Linear": lambda rngs: nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), jnp.tanh),
    "LoRA": lambda rngs: nnx.LoRALinear(WIDTH, WIDTH, lora_rank=1, rngs=rngs),
    "tied": tied,
}
"""Layers of NNX by name, each from features to features."""
Row: TypeAlias = tuple["str | Row", ...]


class Rows(nnx.Module):
    """Layers in a list; a row among them is a module with a list of its own."""

    def __init__(self, row: Row, *, rngs: nnx.Rngs) -> None:
        made = [Rows(each, rngs=rngs) if isinstance(each, tuple) else NNX_LAYERS[each](rngs=rngs) for each in row]
        self.layers: Any = nnx.List(made) if NEW else made

    def __call__(self, x: Any) -> Any:
        """Runs one after another."""
        for layer in self.layers:
            x = layer(x)
        return x


class DrawnNnx(nnx.Module):
    """The module of a row, over tokens where it has an embedding."""

    def __init__(self, row: Row, *, rngs: nnx.Rngs, embeds: bool) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs) if embeds else None
        self.body = Rows(row, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Maps a batch to a number for each place."""
        return self.head(self.body(x if self.embed is None else self.embed(x)))


@dataclass(frozen=True)
class NnxModel:
    """Layers by name, rows of them nested."""

    row: Row
    embeds: bool = False

    def make(self, seed: int) -> DrawnNnx:
        """The module, of other numbers for another seed."""
        return DrawnNnx(self.row, rngs=nnx.Rngs(seed, dropout=seed + 1), embeds=self.embeds)

    def inputs(self, seed: int) -> jax.Array:
        """A batch."""
        key = jax.random.key(seed)
        if self.embeds:
            return jax.random.randint(key, (BATCH, TIME), 0, VOCABULARY)
        return jax.random.normal(key, (BATCH, TIME, WIDTH), jnp.float32)
