from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar, dataclass_transform, overload

_T = TypeVar("_T")

TNode = TypeVar("TNode", bound=PyTreeNode)

@overload
def field(
    pytree_node: bool = True,
    *,
    metadata: Mapping[Any, Any] | None = None,
    default: _T,
    init: bool = True,
    repr: bool = True,
    hash: bool | None = None,
    compare: bool = True,
    kw_only: bool = ...,
) -> _T: ...
@overload
def field(
    pytree_node: bool = True,
    *,
    metadata: Mapping[Any, Any] | None = None,
    default_factory: Callable[[], _T],
    init: bool = True,
    repr: bool = True,
    hash: bool | None = None,
    compare: bool = True,
    kw_only: bool = ...,
) -> _T: ...
@overload
def field(
    pytree_node: bool = True,
    *,
    metadata: Mapping[Any, Any] | None = None,
    init: bool = True,
    repr: bool = True,
    hash: bool | None = None,
    compare: bool = True,
    kw_only: bool = ...,
) -> Any: ...
@overload
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(clz: type[_T], **kwargs: Any) -> type[_T]: ...
@overload
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(*, clz: None = None, **kwargs: Any) -> Callable[[type[_T]], type[_T]]: ...

@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class PyTreeNode:
    def __init_subclass__(cls, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def replace(self, **overrides: Any) -> Self: ...
