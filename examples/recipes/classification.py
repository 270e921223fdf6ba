"""Images from a loader, with metrics.

A convolutional network with batch statistics and dropout. `stack_batches` takes batches from any iterator,
`scan_steps` runs a stack of them in one dispatch, and with `has_aux=True` the loss function also returns metrics. They
come out stacked, one row per step.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs


class Batch(NamedTuple):
    image: Array
    label: Array


class Metrics(NamedTuple):
    accuracy: Array
    logits_norm: Array


class CNN(nn.Module):
    classes: int
    width: int = 4

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        for factor in (1, 2):
            x = nn.Conv(self.width * factor, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.relu(x)
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


def batches(key: Array, count: int) -> Iterator[Batch]:
    for each in jax.random.split(key, count):
        label = jax.random.randint(each, (32,), 0, 2)
        image = jax.random.normal(each, (32, 8, 8, 1)) + label[:, None, None, None]
        yield Batch(image, label)


model = CNN(classes=2)
apply = fs.with_rngs(fs.with_mutable(model))
evaluate = fs.with_mutable(model, mutable=False)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 100)))


def loss_fn(
    params: dict[str, Any], state: dict[str, Any], batch: Batch
) -> tuple[tuple[Array, Metrics], dict[str, Any]]:
    logits, state = apply(params, state, batch.image, train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()
    accuracy = (logits.argmax(axis=-1) == batch.label).mean()
    return (loss, Metrics(accuracy, jnp.linalg.norm(logits))), state


def main() -> None:
    init_key, dropout_key, data_key = jax.random.split(jax.random.key(0), 3)
    variables = model.init(init_key, jnp.ones((1, 8, 8, 1)))
    params, state = fs.split_params(variables)
    carry = fs.init_carry(params, state | fs.rng_state(dropout=dropout_key), tx)
    step = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_optimizer(loss_fn, tx, has_aux=True))))

    losses: list[float] = []
    for stack in fs.stack_batches(batches(data_key, 60), 20):
        carry, (loss, metrics) = step(carry, stack)
        losses.extend(loss.tolist())
        print(f"step {int(carry.step)}: loss {losses[-1]:.3f}, accuracy {float(metrics.accuracy.mean()):.2f}")

    held_out = next(batches(jax.random.key(1), 1))
    logits, _ = evaluate(carry.params, carry.state, held_out.image)
    accuracy = float((logits.argmax(-1) == held_out.label).mean())
    assert len(losses) == 60
    assert accuracy > 0.9
    print(f"held out: accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
