"""Two encoders, contrasted.

Two models encode images and texts into one space. Params and state are trees, so one dict holds those of both models
and a learned temperature, and one optimizer updates all. `vmap_stateful` maps the encoder of one image over the batch,
with batch statistics of the whole batch.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs


class ImageEncoder(nn.Module):
    size: int

    @nn.compact
    def __call__(self, image: Array, train: bool) -> Array:
        x = nn.Conv(4, (3, 3), padding="SAME")(image)
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
        return nn.Dense(self.size)(nn.relu(x).mean(axis=(-3, -2)))


class TextEncoder(nn.Module):
    size: int
    vocabulary: int = 13

    @nn.compact
    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        x = nn.Embed(self.vocabulary, self.size)(tokens)
        weight = jnp.ones(tokens.shape) if mask is None else mask
        return nn.Dense(self.size)((x * weight[..., None]).sum(-2) / weight.sum(-1, keepdims=True))


images, texts = ImageEncoder(size=16), TextEncoder(size=16)
encode_image = fs.vmap_stateful(fs.with_mutable(images), axis_name="batch")
look_at_image = fs.vmap_stateful(fs.with_mutable(images, mutable=False), axis_name="batch")
encode_text = fs.with_mutable(texts)
tx = optax.adamw(optax.cosine_decay_schedule(1e-2, 500))


def normalized(x: Array) -> Array:
    length: Array = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / length


def loss_fn(params: dict[str, Any], state: dict[str, Any], batch: tuple[Array, Array]) -> tuple[Array, dict[str, Any]]:
    image, tokens = batch
    image_code, image_state = encode_image(params["image"], state["image"], image, train=True)
    text_code, text_state = encode_text(params["text"], state["text"], tokens, mask=(tokens > 0).astype(jnp.float32))
    similarity = normalized(image_code) @ normalized(text_code).T * jnp.exp(params["temperature"])
    labels = jnp.arange(len(similarity))
    cross_entropy = functools.partial(optax.softmax_cross_entropy_with_integer_labels, labels=labels)
    loss = 0.5 * (cross_entropy(similarity) + cross_entropy(similarity.T)).mean()
    return loss, state | {"image": image_state, "text": text_state}


def init(key: Array, image: Array, tokens: Array) -> fs.Carry:
    image_key, text_key = jax.random.split(key)
    image_params, image_state = fs.split_params(images.init(image_key, image[0], train=False))
    text_params, text_state = fs.split_params(texts.init(text_key, tokens))
    params = {"image": image_params, "text": text_params, "temperature": jnp.zeros(())}
    return fs.init_carry(params, {"image": image_state, "text": text_state}, tx)


def recall(carry: fs.Carry, image: Array, tokens: Array) -> float:
    params, state = carry.params, carry.state
    image_code, _ = look_at_image(params["image"], state["image"], image, train=False)
    text_code, _ = encode_text(params["text"], state["text"], tokens)
    nearest = (normalized(image_code) @ normalized(text_code).T).argmax(axis=-1)
    return float((nearest == jnp.arange(len(nearest))).mean())


def main() -> None:
    key = jax.random.key(0)
    image, tokens = jax.random.normal(key, (16, 5, 5, 1)), jax.random.randint(key, (16, 4), 1, 13)
    carry = init(key, image, tokens)
    before = recall(carry, image, tokens)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    for _ in range(500):
        carry, _ = step(carry, (image, tokens))
    after = recall(carry, image, tokens)
    assert after > 0.9 > before
    print(f"the text nearest to an image is its own: {before:.2f} -> {after:.2f} of the time")


if __name__ == "__main__":
    main()
