"""A variational autoencoder.

One module gives three stateful functions: the whole model, with noise drawn by `with_rngs`; `method=VAE.encode`, with
captured sown values; `method=VAE.decode`, to generate. Each has the signature of the method that it wraps.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

import flaxsplit as fs


class Terms(NamedTuple):
    reconstruction: Float[Array, ""]
    divergence: Float[Array, ""]


class VAE(nn.Module):
    features: int
    latents: int = 2

    def setup(self) -> None:
        self.hidden = nn.Dense(16)
        self.mean = nn.Dense(self.latents)
        self.log_variance = nn.Dense(self.latents)
        self.decoder = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(self.features)])

    def encode(self, x: Float[Array, "batch features"]) -> tuple[Array, Array]:
        h = nn.relu(self.hidden(x))
        self.sow("intermediates", "activation", h)
        return self.mean(h), self.log_variance(h)

    def decode(self, z: Float[Array, "batch latents"], *, squash: bool = False) -> Array:
        logits: Array = self.decoder(z)
        return nn.sigmoid(logits) if squash else logits

    def __call__(self, x: Float[Array, "batch features"]) -> tuple[Array, Array, Array]:
        mean, log_variance = self.encode(x)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape)
        z = mean + noise * jnp.exp(0.5 * log_variance)
        return self.decode(z), mean, log_variance


model = VAE(features=6)
apply = fs.with_rngs(fs.with_mutable(model))
encode = fs.with_mutable(model, method=VAE.encode, capture="intermediates")
decode = fs.with_mutable(model, method=VAE.decode)
tx = optax.adam(1e-2)


def loss_fn(params: dict[str, Any], state: dict[str, Any], x: Array) -> tuple[tuple[Array, Terms], dict[str, Any]]:
    (logits, mean, log_variance), state = apply(params, state, x)
    terms = Terms(
        (nn.softplus(logits) - x * logits).sum(-1).mean(),
        -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1).mean(),
    )
    return (terms.reconstruction + terms.divergence, terms), state


def main() -> None:
    params_key, noise_key, data_key = jax.random.split(jax.random.key(0), 3)
    x = jnp.repeat(jax.random.bernoulli(data_key, 0.5, (64, 2)), 3, axis=1).astype(jnp.float32)  # three times two bits
    params, state = fs.split_params(model.init({"params": params_key, "noise": noise_key}, x))
    state.pop("intermediates", None)
    carry = fs.init_carry(params, state | fs.rng_state(noise=noise_key), tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx, has_aux=True)))
    for i in range(400):
        carry, (loss, terms) = step(carry, x)
        if i % 133 == 0:
            print(f"loss {loss:.2f} = reconstruction {terms.reconstruction:.2f} + divergence {terms.divergence:.2f}")

    ((mean, _), seen), _ = encode(carry.params, carry.state, x)
    images, _ = decode(carry.params, carry.state, mean, squash=True)
    right = float((images.round() == x).mean())
    assert seen["intermediates"]["activation"][0].shape == (64, 16)
    assert right > 0.9
    print(f"reconstructed from its code, {right:.2f} of each image is right")


if __name__ == "__main__":
    main()
