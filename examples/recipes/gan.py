"""A GAN: two models, two optimizers.

Each player has its own carry, one with batch statistics, the other with spectral norms. A pair of carries is a pytree,
so the whole game is one step. `with_optimizer` updates each player. The discriminator's batch is the output of the
generator; the generator's loss gets the discriminator as a further argument.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

LATENT = 3


class Generator(nn.Module):
    features: int

    @nn.compact
    def __call__(self, z: Array, train: bool = True) -> Array:
        h = nn.Dense(32)(z)
        h = nn.BatchNorm(use_running_average=not train)(h)
        return nn.Dense(self.features)(nn.relu(h))


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        for width in (32, 32):
            x = nn.leaky_relu(nn.SpectralNorm(nn.Dense(width))(x, update_stats=train), 0.2)
        return nn.Dense(1)(x).squeeze(-1)


class Players(NamedTuple):
    generator: fs.Carry
    discriminator: fs.Carry


generator, discriminator = Generator(features=2), Discriminator()
generate = fs.with_mutable(generator)
judge, peek = fs.with_mutable(discriminator), fs.with_mutable(discriminator, mutable=False)
tx_g, tx_d = optax.adam(2e-3, b1=0.5), optax.adam(2e-3, b1=0.5)


def generator_loss(
    params: dict[str, Any], state: dict[str, Any], z: Array, rival: fs.Carry
) -> tuple[Array, dict[str, Any]]:
    fake, state = generate(params, state, z, train=True)
    logits, _ = peek(rival.params, rival.state, fake, train=False)
    return nn.softplus(-logits).mean(), state


def discriminator_loss(
    params: dict[str, Any], state: dict[str, Any], batch: tuple[Array, Array]
) -> tuple[Array, dict[str, Any]]:
    real, fake = batch
    logits, state = judge(params, state, jnp.concatenate([real, fake]))
    sign = jnp.concatenate([-jnp.ones(len(real)), jnp.ones(len(fake))])
    return nn.softplus(sign * logits).mean(), state


update_generator = fs.with_optimizer(generator_loss, tx_g)
update_discriminator = fs.with_optimizer(discriminator_loss, tx_d)


def play(players: Players, batch: tuple[Array, Array]) -> tuple[Players, dict[str, Array]]:
    real, z = batch
    g, d = players
    fake, _ = generate(g.params, g.state, z)
    d, d_loss = update_discriminator(d, (real, fake))
    g, g_loss = update_generator(g, z, d)
    return Players(g, d), {"generator": g_loss, "discriminator": d_loss}


def main() -> None:
    key = jax.random.key(0)
    variables_g = generator.init(key, jnp.ones((1, LATENT)))
    variables_d = discriminator.init(key, jnp.ones((1, 2)))
    players = Players(
        fs.init_carry(*fs.split_params(variables_g), tx_g), fs.init_carry(*fs.split_params(variables_d), tx_d)
    )
    step = fs.jit_step(fs.assert_max_traces(play))
    center = jnp.array([2.0, -1.0])
    for each in jax.random.split(key, 300):
        real_key, z_key = jax.random.split(each)
        real = center[None] + jax.random.normal(real_key, (64, 2))
        players, _ = step(players, (real, jax.random.normal(z_key, (64, LATENT))))

    fake, _ = generate(players.generator.params, players.generator.state, jax.random.normal(key, (512, LATENT)))
    missed = float(jnp.linalg.norm(fake.mean(axis=0) - center))
    assert missed < 1.0
    print(f"real points lie around {center}, generated ones around {fake.mean(axis=0).round(1)}")


if __name__ == "__main__":
    main()
