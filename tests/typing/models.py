"""Models whose signatures the type tests follow: read by checkers, not run."""

import flax.linen as nn
from jax import Array
from jaxtyping import Bool, Float


class Classifier(nn.Module):
    """Positional, default and keyword-only arguments."""

    def __call__(self, x: Array, train: bool = False, *, scale: float = 1.0) -> Array:
        return x


class Coder(nn.Module):
    """Two outputs, and a method of another signature."""

    def __call__(self, x: Array, y: Array) -> tuple[Array, Array]:
        return x, y

    def encode(self, x: Array, depth: int) -> Array:
        return x


class Tagger(nn.Module):
    """Shapes said with jaxtyping."""

    def __call__(self, x: Float[Array, "batch dim"], mask: Bool[Array, " batch"]) -> Float[Array, " batch"]:
        return x[:, 0] * mask
