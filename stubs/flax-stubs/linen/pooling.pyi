from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

_Array: TypeAlias = jax.Array | np.ndarray[Any, Any]
_Padding: TypeAlias = str | Sequence[Sequence[int]]

# Window and strides must be tuples: they are added to tuples.
def pool(
    inputs: _Array,
    init: Any,
    reduce_fn: Callable[[Any, Any], Any],
    window_shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    padding: _Padding,
) -> jax.Array: ...
def avg_pool(
    inputs: _Array,
    window_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    padding: _Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array: ...
def max_pool(
    inputs: _Array,
    window_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    padding: _Padding = "VALID",
) -> jax.Array: ...
def min_pool(
    inputs: _Array,
    window_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    padding: _Padding = "VALID",
) -> jax.Array: ...
