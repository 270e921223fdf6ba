"""Networks in Equinox: of one example, its channels first. Imported only where Equinox is there."""

from typing import Any

import equinox
import jax
import jax.numpy as jnp

from . import _nets as nets
from ._nets import Layers, channels_after, fixed

eqx: Any = equinox  # its types are narrower than what its documentation does
KEYS = ("query", "key", "value", "output")


class Drifting(equinox.Module):
    """The layer of Flax's guide whose state has another shape after the first update."""

    mean: Any
    bias: Any

    def __call__(self, x: Any, state: Any) -> Any:
        """Adds the mean, and a bias."""
        mean = 0.9 * state.get(self.mean) + 0.1 * jax.lax.pmean(x, "batch")[None]
        return mean + x + self.bias, state.set(self.mean, mean)


class Network(equinox.Module):
    """A network, to be made by `eqx.nn.make_with_state`."""

    parts: list[Any]
    layers: Layers = eqx.field(static=True)

    def __init__(self, layers: Layers, channels: int, dtype: Any = None) -> None:
        """Makes each layer."""
        self.layers, self.parts = layers, []
        for layer in layers:
            self.parts.append(made(layer, channels, dtype))
            channels = channels_after(layer, channels)

    def __call__(self, x: Any, state: Any, inference: bool = False, key: Any = None) -> Any:
        """Layer by layer."""
        for layer, part in zip(self.layers, self.parts, strict=True):
            key, used = jax.random.split(key) if key is not None else (None, None)
            x, state = through(layer, part, x, state, inference, used)
        return x, state


def made(layer: Any, channels: int, dtype: Any) -> Any:
    """One layer, its weights fixed by their shape."""
    key = jax.random.key(0)
    match layer:
        case nets.Dense():
            return weighed(eqx.nn.Linear(channels, layer.features, key=key))
        case nets.Conv():
            size, out = layer.size, layer.features
            conv = eqx.nn.Conv2d(channels, out, size, layer.stride, "SAME", use_bias=False, key=key)
            kernel = fixed((size, size, channels, out)).transpose(3, 2, 0, 1)
            return eqx.tree_at(lambda each: each.weight, conv, kernel)
        case nets.Norm():
            given = {"dtype": dtype} if dtype else {}
            return eqx.nn.BatchNorm(channels, axis_name="batch", mode="batch", **given)
        case nets.LayerNorm():
            return eqx.nn.LayerNorm(channels, eps=1e-6)
        case nets.MaxPool():
            return eqx.nn.MaxPool2d(3, 2, ((0, 1), (0, 1)))
        case nets.Attention():
            biases = {f"use_{name}_bias": True for name in KEYS}
            attention = eqx.nn.MultiheadAttention(layer.heads, channels, **biases, key=key)
            parts = [f"{name}_proj" for name in KEYS]
            new = [weighed(getattr(attention, part)) for part in parts]
            return eqx.tree_at(lambda each: [getattr(each, part) for part in parts], attention, new)
        case nets.Dropout():
            return eqx.nn.Dropout(layer.rate)
        case nets.Residual():
            return [Network(way, channels, dtype) for way in (layer.main, layer.shortcut)]
        case nets.Drift():
            return Drifting(eqx.nn.StateIndex(jnp.zeros(channels)), jnp.zeros(channels))
        case nets.Weak():
            return jnp.asarray(1.0)
        case _:
            return None


def weighed(linear: Any) -> Any:
    """A linear layer with the weights of all the others, its bias zero."""
    weight, bias = fixed(linear.weight.shape[::-1]).T, jnp.zeros_like(linear.bias)
    return eqx.tree_at(lambda each: [each.weight, each.bias], linear, [weight, bias])


def through(layer: Any, part: Any, x: Any, state: Any, inference: bool, key: Any) -> Any:
    """One layer: what comes out, and the state."""
    match layer:
        case nets.Dense():
            return part(x) if x.ndim == 1 else jax.vmap(part)(x), state
        case nets.LayerNorm():
            return jax.vmap(part)(x), state
        case nets.Norm():
            return part(x, state, inference=inference)
        case nets.Drift():
            return part(x, state)
        case nets.Act():
            return getattr(jax.nn, layer.name)(x), state
        case nets.Mean():
            return x.mean((1, 2)) if x.ndim == 3 else x.mean(0), state
        case nets.Attention():
            return part(x, x, x), state
        case nets.Dropout():
            return part(x, key=key, inference=inference), state
        case nets.Residual():
            main, shortcut = part
            y, state = main(x, state, inference, key)
            x, state = shortcut(x, state, inference)
            return y + x, state
        case nets.Weak():
            return x * part, state
        case _:
            return part(x), state
