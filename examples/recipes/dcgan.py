"""A GAN of convolutions.

Both networks have BatchNorm, and both losses run both networks, so each loss writes the statistics of both. The state
of a loss is a mapping; here it has two entries, the state of the generator and that of the discriminator. The new state
is split again: each player gets its own part, and no loss drops the statistics of the other network.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

LATENT, SIZE, BATCH, STEPS = 4, 8, 64, 300


class Generator(nn.Module):
    @nn.compact
    def __call__(self, z: Array, train: bool = True) -> Array:
        x = nn.Dense(4 * 4 * 16)(z).reshape(-1, 4, 4, 16)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.tanh(nn.ConvTranspose(1, (4, 4), (2, 2))(x))


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = nn.Conv(16, (4, 4), (2, 2))(x)
        x = nn.leaky_relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x), 0.2)
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


class Players(NamedTuple):
    generator: fs.Carry
    discriminator: fs.Carry


generator, discriminator, tx = Generator(), Discriminator(), optax.adam(1e-2, b1=0.5)
generate, judge = fs.with_mutable(generator), fs.with_mutable(discriminator)
show = fs.with_mutable(generator, mutable=False)
States = dict[str, Any]


def discriminator_loss(params: Any, states: States, real: Array, rival: Any, z: Array) -> tuple[Array, States]:
    fake, g_state = generate(rival, states["generator"], z)
    on_real, d_state = judge(params, states["discriminator"], real)  # each in a batch of its own, as in the paper
    on_fake, d_state = judge(params, d_state, fake)
    loss = nn.softplus(-on_real).mean() + nn.softplus(on_fake).mean()
    return loss, {"generator": g_state, "discriminator": d_state}


def generator_loss(params: Any, states: States, z: Array, rival: Any) -> tuple[Array, States]:
    fake, g_state = generate(params, states["generator"], z)
    on_fake, d_state = judge(rival, states["discriminator"], fake)
    return nn.softplus(-on_fake).mean(), {"generator": g_state, "discriminator": d_state}


def play(players: Players, batch: tuple[Array, Array]) -> tuple[Players, dict[str, Array]]:
    """One turn of each: the states go from loss to loss, each player's gradients to that player alone."""
    real, z = batch
    g, d = players
    states = {"generator": g.state, "discriminator": d.state}
    (d_loss, grads), states = fs.value_and_grad(discriminator_loss)(d.params, states, real, g.params, z)
    d = fs.apply_gradients(tx, d, grads, states["discriminator"])

    states = {"generator": states["generator"], "discriminator": d.state}
    (g_loss, grads), states = fs.value_and_grad(generator_loss)(g.params, states, z, d.params)
    g = fs.apply_gradients(tx, g, grads, states["generator"])
    return Players(g, d._replace(state=states["discriminator"])), {"generator": g_loss, "discriminator": d_loss}


def squares(key: Array, count: int) -> Array:
    """Images of one bright square on dark ground, in one of the four corners."""
    corners = jax.random.randint(key, (2, count, 1), 0, 2)
    row, column = (jnp.arange(SIZE) // (SIZE // 2) == corner for corner in corners)
    bright: Array = row[:, :, None] & column[:, None, :]
    return 2.0 * bright[..., None] - 1.0


def distance(images: Array, others: Array) -> float:
    """How far each image is from the nearest of the others, per pixel, on average."""
    apart = jnp.abs(images[:, None] - others[None]).mean((2, 3, 4))
    return float(apart.min(1).mean())


def main() -> None:
    key = jax.random.key(0)
    real, z = squares(key, BATCH), jax.random.normal(key, (256, LATENT))
    variables: Any = jax.jit(generator.init)(key, z), jax.jit(discriminator.init)(key, real)
    players = Players(*(fs.init_carry(*fs.split_params(each), tx) for each in variables))

    def shown(carry: fs.Carry) -> Array:
        return show(carry.params, carry.state, z, train=False)[0]

    before = distance(shown(players.generator), real)
    step = fs.jit_step(fs.assert_max_traces(play))
    with fs.compile_log() as log:
        for i in range(STEPS):
            image_key, z_key = jax.random.split(jax.random.fold_in(key, i))
            players, _ = step(players, (squares(image_key, BATCH), jax.random.normal(z_key, (BATCH, LATENT))))
    assert log.compiles["play"] == 1

    images = shown(players.generator)
    missed, lost = distance(images, real), distance(real, images)
    assert missed < before / 4
    assert lost < 0.01  # each real image has a generated one near to it: no corner was forgotten
    print(
        f"a generated image is {before:.2f} -> {missed:.2f} from a real one, a real one {lost:.4f} from a generated one"
    )


if __name__ == "__main__":
    main()
