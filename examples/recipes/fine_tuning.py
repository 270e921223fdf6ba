"""Fine-tuning.

The pretrained body is frozen; a new head and the scales of the body's norm are trained. `trainable` chooses them by a
glob on the path and by a predicate. All other params are state: they have no gradient and no optimizer state.
`merge_state` puts them back into the variables.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs


class Body(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Dense(self.width)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.gelu(x)


class Classifier(nn.Module):
    classes: int

    def setup(self) -> None:
        self.body = Body()
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(self.classes)

    def __call__(self, x: Array, train: bool = False) -> Array:
        features: Array = self.norm(self.body(x, train=train))
        logits: Array = self.head(features)
        return logits


def pretrained(key: Array, x: Array) -> dict[str, Any]:
    body = Body()
    return {name: dict(tree) for name, tree in body.init(key, x).items()}


def with_pretrained_body(variables: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    params = variables["params"] | {"body": body["params"]}
    return variables | {"params": params, "batch_stats": {"body": body["batch_stats"]}}


def is_trained(path: str, leaf: Array) -> bool:
    return path.startswith("norm/") and leaf.ndim == 1


model = Classifier(classes=3)
apply = fs.with_mutable(model, mutable=False)
tx = optax.adamw(1e-2, weight_decay=1e-4)


def loss_fn(params: dict[str, Any], state: dict[str, Any], batch: tuple[Array, Array]) -> tuple[Array, dict[str, Any]]:
    x, y = batch
    logits, state = apply(params, state, x, train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


def main() -> None:
    body_key, head_key, data_key = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(data_key, (64, 5))
    y = x[:, :3].argmax(axis=-1)
    variables = with_pretrained_body(model.init(head_key, x), pretrained(body_key, x))

    params, state = fs.split_params(variables, trainable=["head/*", is_trained])
    carry = fs.init_carry(params, {**state, "ema": params}, tx)
    average = fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=optax.linear_schedule(0.5, 0.9, 10))
    step = fs.jit_step(fs.assert_max_traces(average))
    losses: list[float] = []
    for _ in range(200):
        carry, loss = step(carry, (x, y))
        losses.append(float(loss))

    averaged, _ = loss_fn(carry.state["ema"], carry.state, (x, y))
    tuned = fs.merge_state(carry.params, {name: tree for name, tree in carry.state.items() if name != "ema"})
    same = jax.tree.map(jnp.array_equal, tuned["params"]["body"], variables["params"]["body"])
    assert len(jax.tree.leaves(tuned)) == len(jax.tree.leaves(variables))
    assert jax.tree.all(same)
    assert averaged < losses[0] / 2
    frozen, trained = (len(jax.tree.leaves(tree)) for tree in (carry.state["params"], carry.params))
    print(f"{trained} leaves trained, {frozen} frozen: loss {losses[0]:.3f} -> {averaged:.3f} by averaged weights")


if __name__ == "__main__":
    main()
