from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

def replicate(tree: _T, devices: Sequence[Any] | None = None) -> _T: ...
def unreplicate(tree: _T) -> _T: ...
def pmean(xs: _T, axis_name: str) -> _T: ...
def partial_eval_by_shape(fn: Callable[..., Any], input_spec: Any, *args: Any, **kwargs: Any) -> Any: ...
def prefetch_to_device(
    iterator: Iterable[_T], size: int, devices: Sequence[Any] | None = None
) -> Iterator[_T]: ...
def scan_in_dim(
    body_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    axis: int | Sequence[int] = (0,),
    unroll: int | Sequence[int] = (1,),
    keepdims: bool = False,
) -> tuple[Any, Any]: ...
def pad_shard_unpad(
    wrapped: Callable[..., Any],
    static_argnums: Sequence[int] = (0,),
    static_argnames: Sequence[str] = (),
    static_return: bool = False,
) -> Callable[..., Any]: ...
