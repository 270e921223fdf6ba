from collections.abc import Callable
from typing import Any, overload

import jax
from flax.linen.module import Module
from flax.typing import Array, DotGeneralT, Dtype, Initializer, PrecisionLike, PRNGKey
from flax.typing import Shape as Shape

def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: PRNGKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    einsum: Callable[..., Array] | None = None,
) -> jax.Array: ...
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: PRNGKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
) -> jax.Array: ...

class MultiHeadDotProductAttention(Module):
    num_heads: int
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: PrecisionLike = None
    kernel_init: Initializer = ...
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = ...
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    attention_fn: Callable[..., Array] = ...
    decode: bool = False
    normalize_qk: bool = False
    force_fp32_for_softmax: bool = False
    qkv_dot_general: DotGeneralT | None = None
    out_dot_general: DotGeneralT | None = None
    qkv_dot_general_cls: Any = None
    out_dot_general_cls: Any = None
    qk_attn_weights_einsum_cls: Callable[..., Callable[..., Array]] | None = None
    attn_weights_value_einsum_cls: Callable[..., Callable[..., Array]] | None = None
    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        inputs_kv: Array | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: PRNGKey | None = None,
        sow_weights: bool = False,
    ) -> jax.Array: ...

class MultiHeadAttention(MultiHeadDotProductAttention): ...

class SelfAttention(MultiHeadDotProductAttention):
    # Takes other arguments than the class it is made from, as it does at run time.
    def __call__(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs_q: Array,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: PRNGKey | None = None,
        sow_weights: bool = False,
    ) -> jax.Array: ...

def make_attention_mask(
    query_input: Array,
    key_input: Array,
    pairwise_fn: Callable[..., Any] = ...,
    extra_batch_dims: int = 0,
    dtype: Dtype = ...,
) -> jax.Array: ...
def make_causal_mask(x: Array, extra_batch_dims: int = 0, dtype: Dtype = ...) -> jax.Array: ...
@overload
def combine_masks(mask: jax.Array, /, *masks: Array | None, dtype: Dtype = ...) -> jax.Array: ...
@overload
def combine_masks(*masks: Array | None, dtype: Dtype = ...) -> jax.Array | None: ...
