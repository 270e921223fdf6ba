"""A VAE whose submodules are made in `setup`: `method=`, `bind`, captured intermediates."""

from collections.abc import Mapping
from typing import Any, Protocol, assert_type

import jax
import jax.numpy as jnp
from flax import linen as nn


class Encoder(nn.Module):
    latents: int

    def setup(self) -> None:
        self.hidden = nn.Dense(500)
        self.mean = nn.Dense(self.latents)
        self.logvar = nn.Dense(self.latents)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(self.hidden(x))
        self.sow("intermediates", "activation", x)
        return self.mean(x), self.logvar(x)


class Decoder(nn.Module):
    features: int = 784

    def setup(self) -> None:
        self.layers = [nn.Dense(500), nn.Dense(self.features)]
        self.scale = self.param("scale", nn.initializers.ones, (1,))
        self.calls = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))

    def __call__(self, z: jax.Array) -> jax.Array:
        if self.is_mutable_collection("counters") and not self.is_initializing():
            self.calls.value += 1
        for layer in self.layers:
            z = nn.relu(layer(z))
        return z * self.scale


class VAE(nn.Module):
    latents: int = 20

    def setup(self) -> None:
        self.encoder = Encoder(self.latents)
        self.decoder = Decoder()

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, logvar = self.encoder(x)
        noise = jax.random.normal(self.make_rng("noise"), logvar.shape)
        return self.decoder(mean + noise * jnp.exp(0.5 * logvar)), mean, logvar

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encoder(x)

    def generate(self, z: jax.Array) -> jax.Array:
        return nn.sigmoid(self.decoder(z))


class ApplyFn(Protocol):
    def __call__(self, variables: Mapping[str, Any], /, *args: Any, **kwargs: Any) -> Any: ...


def forward(apply_fn: ApplyFn, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    return apply_fn(variables, *args, **kwargs)


def use(key: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    model = VAE(latents=8)
    rngs = {"params": key, "noise": key}
    (recon, _, _), variables = model.init_with_output(rngs, x)
    assert_type(recon, jax.Array)
    assert_type(variables, dict[str, Any])

    images = model.apply(variables, z, method=model.generate)
    assert_type(images, jax.Array)
    mean, _ = model.apply(variables, x, method=VAE.encode)
    assert_type(mean, jax.Array)
    images, counters = model.apply(variables, z, method=VAE.generate, mutable="counters")
    assert_type(images, jax.Array)
    assert_type(counters, dict[str, Any])

    outs, captured = model.apply(variables, x, rngs={"noise": key}, capture_intermediates=True)
    assert_type(outs, tuple[jax.Array, jax.Array, jax.Array])
    assert_type(captured["intermediates"], Any)

    bound = model.bind(variables, rngs={"noise": key})
    assert_type(bound, VAE)
    hidden = bound.encode(x)
    assert_type(hidden, tuple[jax.Array, jax.Array])
    encoder, encoder_variables = bound.encoder.unbind()
    logvar = encoder.apply(encoder_variables, x)[1]
    assert_type(logvar, jax.Array)

    jax.eval_shape(model.init, rngs, x)
    assert_type(model.clone(latents=4), VAE)
    print(model.tabulate(rngs, x))
    out = forward(model.apply, variables, x, rngs={"noise": key})
    print(out)
    return images


def by_name(model: nn.Module, variables: Mapping[str, Any], x: jax.Array, train: bool) -> Any:
    encoded = model.apply(variables, x, method="encode")
    mutable = ["batch_stats"] if train else False
    either = model.apply(variables, x, mutable=mutable)
    anything = model.apply(variables, x)
    out, _ = model.apply(variables, x, method="encode", mutable=True)
    print(encoded, out)
    return anything if train else either
