from collections.abc import Sequence

import jax
from flax.linen.module import Module
from flax.typing import Array, PRNGKey

class Dropout(Module):
    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    def __call__(
        self, inputs: Array, deterministic: bool | None = None, rng: PRNGKey | None = None
    ) -> jax.Array: ...
