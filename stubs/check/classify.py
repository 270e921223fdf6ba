"""Image classification: a compact CNN, `TrainState`, a jitted step."""

from collections.abc import Callable, Iterable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import serialization
from flax.training.train_state import TrainState


class CNN(nn.Module):
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(features=32, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=64, kernel_size=(3, 3), padding="SAME")(x)
        x = nn.gelu(x)
        x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="VALID")
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=256)(x)
        return nn.Dense(features=self.classes)(x)


def create_state(key: jax.Array, learning_rate: float) -> TrainState:
    model = CNN(classes=10, name="cnn")
    variables = model.init(key, jnp.ones((1, 28, 28, 1)))
    tx = optax.adamw(learning_rate)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    assert_type(variables, dict[str, Any])
    assert_type(state, TrainState)
    return state


def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), logits

    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    new_state = state.apply_gradients(grads=grads)
    assert_type(new_state, TrainState)
    return new_state, loss


def make_step() -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    return jax.jit(train_step, donate_argnums=0)


def evaluate(model: CNN, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model.apply({"params": params}, images)
    assert_type(logits, jax.Array)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def fit(key: jax.Array, batches: Iterable[tuple[jax.Array, jax.Array]]) -> TrainState:
    state = create_state(key, 1e-3)
    step = make_step()
    for images, labels in batches:
        state, loss = step(state, images, labels)
        if state.step == 1000:
            state = state.replace(step=0)
        print(float(loss))
    assert_type(state.replace(step=0), TrainState)
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    assert_type(restored, TrainState)
    return restored
