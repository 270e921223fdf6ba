from collections.abc import Iterable
from dataclasses import field as field
from typing import Any

import jax
from flax.linen.dtypes import canonicalize_dtype as canonicalize_dtype  # pyright: ignore[reportUnknownVariableType]
from flax.linen.module import Module as Module
from flax.linen.module import compact as compact
from flax.linen.module import merge_param as merge_param
from flax.linen.transforms import map_variables as map_variables
from flax.typing import Array, Axes, Dtype, Initializer
from flax.typing import PRNGKey as PRNGKey
from flax.typing import Shape as Shape

class BatchNorm(Module):
    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = ...
    scale_init: Initializer = ...
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array: ...

class LayerNorm(Module):
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = ...
    scale_init: Initializer = ...
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    def __call__(self, x: Array, *, mask: jax.Array | None = None) -> jax.Array: ...

class RMSNorm(Module):
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    use_scale: bool = True
    scale_init: Initializer = ...
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    def __call__(self, x: Array, *, mask: jax.Array | None = None) -> jax.Array: ...

class GroupNorm(Module):
    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = ...
    scale_init: Initializer = ...
    reduction_axes: Axes | None = None
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    def __call__(self, x: Array, *, mask: jax.Array | None = None) -> jax.Array: ...

class InstanceNorm(Module):
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = ...
    scale_init: Initializer = ...
    feature_axes: Axes = -1
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    def __call__(self, x: Array, *, mask: jax.Array | None = None) -> jax.Array: ...

class SpectralNorm(Module):
    layer_instance: Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any: ...

class WeightNorm(Module):
    layer_instance: Module
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = ...
    use_scale: bool = True
    scale_init: Initializer = ...
    feature_axes: Axes | None = -1
    variable_filter: Iterable[str] | None = ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
