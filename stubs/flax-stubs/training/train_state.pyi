from collections.abc import Callable
from typing import Any, Self

import jax
import optax
from flax import struct

class TrainState(struct.PyTreeNode):
    step: int | jax.Array
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    # Flax says FrozenDict, which `init` has not returned since 0.7; any tree will do.
    params: Any = struct.field(pytree_node=True)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    opt_state: optax.OptState = struct.field(pytree_node=True)
    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self: ...
    @classmethod
    def create(
        cls, *, apply_fn: Callable[..., Any], params: Any, tx: optax.GradientTransformation, **kwargs: Any
    ) -> Self: ...
