"""Lifted transforms: a scanned, rematerialized transformer, an ensemble, a recurrent cell."""

import functools
from typing import Any, assert_type

import jax
import jax.numpy as jnp
from flax import linen as nn


class Layer(nn.Module):
    heads: int
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y, mask=mask)
        x = x + nn.Dropout(0.1)(y, deterministic=self.deterministic)
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class Transformer(nn.Module):
    vocabulary: int
    width: int = 128
    depth: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        mask = nn.make_causal_mask(tokens)
        remat_layer = nn.remat(Layer, prevent_cse=False, static_argnums=())
        layers = nn.scan(
            remat_layer,
            variable_axes={"params": 0},
            variable_broadcast=False,
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        assert_type(remat_layer, type[Layer])
        assert_type(layers, type[Layer])
        x, _ = layers(heads=4, name="layers")(x, mask)
        assert_type(x, jax.Array)
        x = nn.jit(nn.Dense, static_argnums=())(self.width)(x)
        return nn.Dense(self.vocabulary)(x)


class MLP(nn.Module):
    out: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.out)(nn.tanh(nn.Dense(64)(x)))


def ensemble(key: jax.Array, x: jax.Array, members: int) -> jax.Array:
    axes = {"params": 0}
    many = nn.vmap(
        MLP,
        variable_axes=axes,
        split_rngs={"params": True},
        in_axes=None,
        out_axes=0,
        axis_size=members,
        axis_name="members",
    )
    assert_type(many, type[MLP])
    model = many(out=2)
    out = model.apply(model.init(key, x), x)
    assert_type(out, jax.Array)
    return out


class Cell(nn.Module):
    features: int

    @functools.partial(
        nn.scan,
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = nn.tanh(nn.Dense(self.features)(x) + nn.Dense(self.features)(carry))
        return carry, carry


class Encoder(nn.Module):
    features: int

    @nn.jit
    @nn.compact
    def __call__(self, xs: jax.Array) -> jax.Array:
        carry = jnp.zeros((xs.shape[0], self.features))
        carry, ys = Cell(self.features)(carry, xs)
        ys = nn.RNN(nn.GRUCell(self.features))(ys)
        last, _ = nn.RNN(nn.LSTMCell(self.features))(ys, return_carry=True)
        mask = nn.combine_masks(nn.make_causal_mask(ys[..., 0]), None)
        assert_type(mask, jax.Array)
        ys = nn.MultiHeadDotProductAttention(num_heads=2)(ys, inputs_kv=ys, mask=mask)
        assert_type(ys, jax.Array)
        assert_type(nn.GRUCell(self.features)(carry, ys[:, 0])[1], jax.Array | Any)
        ys = ys + last[0][:, None]
        return nn.Dense(1)(jnp.concatenate([carry, ys[:, -1]], axis=-1))


def encode(key: jax.Array, xs: jax.Array) -> jax.Array:
    model = Encoder(features=16)
    out, variables = model.init_with_output(key, xs)
    assert_type(out, jax.Array)
    assert_type(variables, dict[str, Any])
    return out


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(x.shape[-1])

        def body(mdl: nn.Dense, carry: jax.Array) -> jax.Array:
            return mdl(carry)

        def below(mdl: nn.Dense, carry: jax.Array) -> jax.Array:
            return jnp.all(carry < 1.0)

        once = nn.checkpoint(body, policy=jax.checkpoint_policies.dots_saveable)(dense, x)
        assert_type(once, jax.Array)
        if self.is_initializing():
            return once
        grown = nn.while_loop(below, body, dense, once)
        assert_type(grown, jax.Array)
        out, pull = nn.vjp(body, dense, grown)
        assert_type(out, jax.Array)
        print(pull(out))
        return grown
