"""BatchNorm and Dropout: mutable collections, named keys, a subclass of `TrainState`."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state


class TrainState(train_state.TrainState):
    batch_stats: Any
    key: jax.Array


class Block(nn.Module):
    features: int
    norm: Callable[..., nn.BatchNorm]
    act: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        y = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        y = self.norm()(y)
        y = self.act(y)
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if residual.shape != y.shape:
            residual = nn.Conv(self.features, (1, 1), name="proj")(residual)
        return self.act(residual + y)


class ResNet(nn.Module):
    classes: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def norm(**kwargs: Any) -> nn.BatchNorm:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, **kwargs)

        for features in (64, 128):
            x = Block(features, norm=norm)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.LayerNorm(epsilon=1e-5)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        assert_type(nn.RMSNorm()(x), jax.Array)
        assert_type(nn.GroupNorm(num_groups=4)(x), jax.Array)
        assert_type(nn.Dropout(0.5)(x, deterministic=True), jax.Array)
        return nn.Dense(self.classes, dtype=self.dtype)(x)


def create_state(model: ResNet, key: jax.Array, shape: tuple[int, ...]) -> TrainState:
    params_key, dropout_key = jax.random.split(key)
    variables = model.init({"params": params_key}, jnp.ones(shape), train=False)
    schedule = optax.cosine_decay_schedule(0.1, decay_steps=1000)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(schedule, momentum=0.9))
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        key=dropout_key,
    )
    assert_type(state, TrainState)
    assert_type(state.key, jax.Array)
    return state


def make_train_step(
    model: ResNet,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key, dropout_key = jax.random.split(state.key)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any]]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = model.apply(
                variables,
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            assert_type(logits, jax.Array)
            assert_type(updates, dict[str, Any])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return loss.mean(), (logits, updates)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, updates)), grads = grad_fn(state.params)
        new_state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"], key=key)
        assert_type(new_state, TrainState)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        return new_state, {"loss": loss, "accuracy": accuracy}

    return jax.jit(train_step, donate_argnums=0)


def predict(model: ResNet, state: TrainState, images: jax.Array) -> jax.Array:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = model.apply(variables, images, train=False, mutable=False)
    assert_type(logits, jax.Array)
    return nn.softmax(logits)
