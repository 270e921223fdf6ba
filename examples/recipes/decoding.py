"""Decoding with a cache.

A causal language model is trained on whole sequences, then decodes token by token. The cache of keys and values is
state. `settle_state` gives it the shapes that decoding keeps, `jax.lax.scan` threads it, and `mutable="cache"` keeps
everything else fixed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

VOCABULARY, LENGTH = 11, 6


class LanguageModel(nn.Module):
    decode: bool = False
    width: int = 16

    @nn.compact
    def __call__(self, tokens: Array, position: Array | None = None) -> Array:
        places = jnp.arange(tokens.shape[-1])[None] if position is None else position[None, None]
        x = nn.Embed(VOCABULARY, self.width)(tokens) + nn.Embed(LENGTH, self.width)(places)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, decode=self.decode)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        return nn.Dense(VOCABULARY)(x)


learner, decoder = LanguageModel(), LanguageModel(decode=True)
predict = fs.with_mutable(learner)
decode_one = fs.with_mutable(decoder, mutable="cache")
tx = optax.adam(1e-2)


def loss_fn(params: dict[str, Any], state: dict[str, Any], tokens: Array) -> tuple[Array, dict[str, Any]]:
    logits, state = predict(params, state, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), state


def empty_cache(key: Array, batch: int) -> dict[str, Any]:
    whole = jnp.zeros((batch, LENGTH), jnp.int32)
    _, state = fs.split_params(decoder.init(key, whole))
    return {"cache": jax.tree.map(jnp.zeros_like, state["cache"])}


def sample(params: dict[str, Any], cache: dict[str, Any], prompt: Array, key: Array) -> Array:
    """Decodes token after token: the cache is the state, threaded by a scan."""

    def body(carry: tuple[dict[str, Any], Array], inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        state, token = carry
        position, each = inputs
        logits, state = decode_one(params, state, token[:, None], position)
        token = jax.random.categorical(each, logits[:, -1])
        return (state, token), token

    positions = jnp.arange(LENGTH)
    _, tokens = jax.lax.scan(body, (cache, prompt), (positions, jax.random.split(key, LENGTH)))
    return tokens.T


def main() -> None:
    key = jax.random.key(0)
    tokens = (jnp.arange(4)[:, None] * 2 + jnp.arange(LENGTH)[None]) % VOCABULARY  # each counts on from its first
    params, state = fs.split_params(learner.init(key, tokens))
    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses: list[float] = []
    for _ in range(200):
        carry, loss = step(carry, tokens)
        losses.append(float(loss))

    cache = fs.settle_state(
        decode_one, carry.params, empty_cache(key, 4), tokens[:, :1], position=jnp.zeros((), jnp.int32)
    )
    text = jax.jit(sample)(carry.params, cache, tokens[:, 0], key)
    right = float((text[:, :-1] == tokens[:, 1:]).mean())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; decoded after {tokens[0, 0]}: {text[0, :-1].tolist()}")
    assert right > 0.9


if __name__ == "__main__":
    main()
