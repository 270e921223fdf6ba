"""Small NNX modules that several tests train, each with a batch, and the loop that NNX's guide trains by."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

NEW = hasattr(nnx, "List")  # flax 0.11: containers of modules are nnx.List, and streams are forked per layer
OFF_MESH: Any = {"eager_sharding": False} if NEW else {}  # from then on a name alone wants a mesh at once
X = jax.random.normal(jax.random.key(0), (8, 6), jnp.float32)
IMAGES = jax.random.normal(jax.random.key(1), (8, 6, 6, 1), jnp.float32)
SERIES = jax.random.normal(jax.random.key(2), (8, 5, 6), jnp.float32)
WORDS = jax.random.randint(jax.random.key(3), (8, 5), 0, 11)


def rngs(seed: int = 0) -> nnx.Rngs:
    """Streams for params, for dropout and for whatever else."""
    return nnx.Rngs(seed, dropout=seed + 1)


class Calls(nnx.Variable[Any]):
    """A type of variable that NNX does not know."""


class MLP(nnx.Module):
    """Batch statistics, dropout, a variable of a type of its own, and modules in modules."""

    def __init__(self, *, rngs: nnx.Rngs, axis_name: str | None = None) -> None:
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, axis_name=axis_name, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(16, 2, rngs=rngs)
        self.calls = Calls(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
        if NEW:
            self.calls[...] += 1
        else:
            self.calls.value += 1
        return self.head(self.drop(nnx.relu(self.norm(self.first(x))))) * scale

    def hidden(self, x: jax.Array, width: int) -> tuple[jax.Array, int]:
        return self.first(x)[..., :width], width


class Dropping(nnx.Module):
    """Only dropout, and a param so that there is one."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones(()))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(x) * (self.scale[...] if NEW else self.scale.value)


class Tied(nnx.Module):
    """One embedding for words that come in and words that go out."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.mix = nnx.Linear(8, 8, rngs=rngs)
        self.out = self.embed

    def __call__(self, words: jax.Array) -> jax.Array:
        return self.out.attend(nnx.relu(self.mix(self.embed(words))))


class Containers(nnx.Module):
    """Modules in lists and dicts, a list in a dict, more than ten in one so that their order as strings is another."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        many = [nnx.Linear(6, 6, rngs=rngs) for _ in range(11)]
        few = [nnx.Linear(6, 6, rngs=rngs) for _ in range(2)]
        self.many: Any = nnx.List(many) if NEW else many
        self.ends: Any = nnx.Dict(norm=nnx.LayerNorm(6, rngs=rngs), few=nnx.List(few) if NEW else few)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.many, *self.ends["few"]):
            x = x + jnp.tanh(layer(x))
        out: jax.Array = self.ends["norm"](x)
        return out


class Layer(nnx.Module):
    """One of a stack."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs) if NEW else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.norm(self.linear(x)))
        return self.drop(x) if self.drop is not None else x


class Stacked(nnx.Module):
    """Three layers made by `nnx.vmap` and run by `nnx.scan`, or at once by `nnx.vmap`."""

    def __init__(self, *, rngs: nnx.Rngs, scan: bool = True) -> None:
        make: Any = nnx.vmap(lambda rngs: Layer(rngs=rngs), in_axes=0, out_axes=0)
        self.layers: Any = nnx.split_rngs(splits=3)(make)(rngs)
        self.scan = scan

    def __call__(self, x: jax.Array) -> Any:
        if self.scan:
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return nnx.vmap(lambda x, layer: layer(x), in_axes=(None, 0))(x, self.layers).mean(0)


class Remat(nnx.Module):
    """Its inside is computed again for the gradient."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.inner = MLP(rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        return nnx.remat(lambda inner, x: inner(x))(self.inner, x)


class CNN(nnx.Module):
    """A small network for images."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(4 * 9, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        return self.head(self.drop(x.reshape(len(x), -1)))


class Block(nnx.Module):
    """A transformer block."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.place = nnx.Param(nnx.initializers.normal()(rngs.params(), (1, 5, 6)))
        self.before = nnx.LayerNorm(6, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 6, dropout_rate=0.1, deterministic=False, decode=False, rngs=rngs)
        self.after = nnx.RMSNorm(6, rngs=rngs)
        self.wide = nnx.Linear(6, 12, rngs=rngs)
        self.narrow = nnx.Linear(12, 6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + (self.place.value if not NEW else self.place[...])
        x = x + self.attend(self.before(x))
        return x + self.narrow(nnx.gelu(self.wide(self.after(x))))


class Placed(nnx.Module):
    """Variables that say how they are to be sharded."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"), **OFF_MESH)
        self.linear = nnx.Linear(6, 8, kernel_init=init, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.linear(x)))


class Adapted(nnx.Module):
    """A network that only low-rank additions of are trained."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.body = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
        self.head = nnx.LoRA(8, 2, 3, base_module=nnx.Linear(8, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        return self.head(nnx.relu(self.body(x)))


class Linen(nn.Module):
    """A Linen module with batch statistics and dropout, for the bridge."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dropout(0.2, deterministic=not train)(nn.Dense(2)(x))


class Bridged(nnx.Module):
    """A Linen module in an NNX module."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.inner = nnx.bridge.ToNNX(Linen(), rngs=rngs)
        nnx.bridge.lazy_init(self.inner, X)
        self.head = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.inner(x, mutable=["batch_stats"]))


def sequential(*, rngs: nnx.Rngs) -> nnx.Sequential:
    """Layers in a row, of which one is a function."""
    return nnx.Sequential(
        nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Dropout(0.2, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
    )


def recurrent(*, rngs: nnx.Rngs) -> nnx.RNN:
    """A recurrent network."""
    return nnx.RNN(nnx.LSTMCell(6, 4, rngs=rngs), rngs=rngs)


MODELS: dict[str, tuple[Any, jax.Array, Any]] = {
    "MLP": (MLP, X, nnx.Param),
    "Tied": (Tied, WORDS, nnx.Param),
    "Containers": (Containers, X, nnx.Param),
    "Sequential": (sequential, X, nnx.Param),
    "scan": (Stacked, X, nnx.Param),
    "vmap": (lambda rngs: Stacked(rngs=rngs, scan=False), X, nnx.Param),
    "remat": (Remat, X, nnx.Param),
    "CNN": (CNN, IMAGES, nnx.Param),
    "Block": (Block, SERIES, nnx.Param),
    "RNN": (recurrent, SERIES, nnx.Param),
    "sharding": (Placed, X, nnx.Param),
    "LoRA": (Adapted, X, nnx.LoRAParam),
    "head": (MLP, X, nnx.All(nnx.Param, nnx.PathContains("head"))),
    "bridge": (Bridged, X, nnx.Param),
}


def loss_of(out: jax.Array) -> jax.Array:
    """Something to make small, of any output."""
    return jnp.mean((out - jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)) ** 2)


def gradient(model: Any, x: jax.Array, wrt: Any) -> Any:
    """The gradients as NNX gives them."""
    diff = nnx.DiffState(0, wrt)
    return nnx.jit(lambda model, x: nnx.grad(lambda model: loss_of(model(x)), argnums=diff)(model))(model, x)


def train(model: Any, x: jax.Array, tx: optax.GradientTransformation, wrt: Any, steps: int) -> list[Any]:
    """Trains as NNX's own guide does; gives the losses."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    takes_model = "model" in inspect.signature(optimizer.update).parameters  # flax 0.11

    @nnx.jit
    def train_step(model: Any, optimizer: Any, x: jax.Array) -> Any:
        diff = nnx.DiffState(0, wrt)
        loss, grads = nnx.value_and_grad(lambda model: loss_of(model(x)), argnums=diff)(model)
        optimizer.update(model, grads) if takes_model else optimizer.update(grads)
        return loss

    return [train_step(model, optimizer, x) for _ in range(steps)]
