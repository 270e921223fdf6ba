"""Parameters and state by hand: `pop`, `freeze`, `struct`, a plain optax loop."""

from collections.abc import Mapping
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from flax import core, struct
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict


class BiasAdder(nn.Module):
    decay: float = 0.99

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(x.shape[1:]))
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:])
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            mean.value = self.decay * mean.value + (1.0 - self.decay) * jnp.mean(x, axis=0)
        return x - mean.value + bias


@struct.dataclass
class Metrics:
    loss: jax.Array
    count: int = struct.field(pytree_node=False, default=0)


class Carry(struct.PyTreeNode):
    params: Any
    state: Any
    opt_state: optax.OptState
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    step: int = 0

    @classmethod
    def create(cls, params: Any, state: Any, tx: optax.GradientTransformation) -> "Carry":
        return cls(params=params, state=state, opt_state=tx.init(params), tx=tx)


def update(model: BiasAdder, carry: Carry, x: jax.Array) -> tuple[Carry, Metrics]:
    def loss_fn(params: Any) -> tuple[jax.Array, dict[str, Any]]:
        y, state = model.apply({"params": params, **carry.state}, x, mutable=list(carry.state.keys()))
        return jnp.sum(optax.l2_loss(x, y)), state

    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(carry.params)
    updates, opt_state = carry.tx.update(grads, carry.opt_state, carry.params)
    params = optax.apply_updates(carry.params, updates)
    carry = carry.replace(params=params, state=state, opt_state=opt_state, step=carry.step + 1)
    assert_type(carry, Carry)
    out = model.apply({"params": params, **state}, x)
    assert_type(out, jax.Array)
    return carry, Metrics(loss=loss, count=1)


def loop(key: jax.Array, x: jax.Array) -> jax.Array:
    model = BiasAdder()
    variables = model.init(key, x)
    state, params = core.pop(variables, "params")
    assert_type(state, dict[str, Any])
    carry = Carry.create(params, state, optax.sgd(0.1))
    total = jnp.zeros(())
    for _ in range(10):
        carry, metrics = update(model, carry, x)
        total = total + metrics.loss * metrics.count
    del variables["params"]
    return total


def frozen(variables: Mapping[str, Any]) -> dict[str, Any]:
    cold = freeze(variables)
    assert_type(cold, FrozenDict[str, Any])
    rest, params = cold.pop("params")
    assert_type(rest, FrozenDict[str, Any])
    colder = rest.copy({"params": params})
    for name, collection in colder.items():
        print(name, collection)
    warm = unfreeze(colder)
    assert_type(warm, dict[str, Any])
    warm["params"] = params
    rest, _ = core.pop(colder, "params")
    assert_type(rest, FrozenDict[str, Any])
    counts = FrozenDict({"a": 1})
    assert_type(counts["a"], int)
    return core.copy(warm, {"cache": {}})


def decayed(params: dict[str, Any]) -> Any:
    def is_kernel(path: tuple[str, ...], leaf: jax.Array) -> bool:
        return path[-1] == "kernel" and leaf.ndim > 1

    named = flatten_dict(params, sep="/")
    assert_type(named, dict[str, Any])
    for path, leaf in flatten_dict(params).items():
        print("/".join(path), leaf.shape)
    return path_aware_map(is_kernel, unflatten_dict(named, sep="/"))
