import enum
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeAlias, TypeVar, dataclass_transform, overload

from flax.core import Scope
from flax.core.meta import AxisMetadata
from flax.core.scope import CollectionFilter, DenyList
from flax.core.scope import Variable as Variable
from flax.typing import PRNGKey, RNGSequences, VariableDict

T = TypeVar("T")
K = TypeVar("K")
M = TypeVar("M", bound=Module)
_R = TypeVar("_R")
_CallableT = TypeVar("_CallableT", bound=Callable[..., Any])

_Rngs: TypeAlias = PRNGKey | RNGSequences
# Any inside: what `optax.apply_updates` returns is no Mapping to a checker, but is a collection all the same.
_Variables: TypeAlias = Mapping[str, Any]
# Plain dicts, as Flax makes them unless `flax_return_frozendict` is switched on.
_Updates: TypeAlias = dict[str, Any]
# Every collection filter but False: with these `apply` returns a pair.
_Mutable: TypeAlias = Literal[True] | Collection[str] | DenyList
# Every way to capture but False: with these, too.
_Capture: TypeAlias = Literal[True] | Callable[[Module, str], bool]

TestScope: type[Scope]

def enable_named_call() -> None: ...
def disable_named_call() -> None: ...
def override_named_call(enable: bool = True) -> AbstractContextManager[None]: ...

@dataclass(frozen=True)
class InterceptorContext:
    module: Module
    method_name: str
    orig_method: Callable[..., Any]

class ThreadLocalStack(threading.local):
    def __init__(self) -> None: ...
    def push(self, elem: Any) -> None: ...
    def pop(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...

Args: TypeAlias = tuple[Any]
Kwargs: TypeAlias = dict[str, Any]
NextGetter: TypeAlias = Callable[..., Any]
Interceptor: TypeAlias = Callable[[NextGetter, Args, Kwargs, InterceptorContext], Any]

def intercept_methods(interceptor: Interceptor) -> AbstractContextManager[None]: ...
def run_interceptors(orig_method: Callable[..., Any], module: Module, *args: Any, **kwargs: Any) -> Any: ...
def compact(fun: _CallableT) -> _CallableT: ...
def nowrap(fun: _CallableT) -> _CallableT: ...
def compact_name_scope(fun: _CallableT) -> _CallableT: ...
def wrap_method_once(fun: _CallableT) -> _CallableT: ...
def wrap_descriptor_once(descriptor: Descriptor) -> DescriptorWrapper: ...

class SetupState(enum.IntEnum):
    NEW = 0
    TRANSFORMED = 1
    DONE = 2

def tuple_reduce(xs: tuple[T, ...], x: T) -> tuple[T, ...]: ...
def tuple_init() -> tuple[()]: ...
def capture_call_intermediates(_: Module, method_name: str) -> bool: ...

class ParentDescriptor:
    def __get__(self, obj: Any, objtype: Any = None) -> Any: ...
    def __set__(self, obj: Any, value: Any) -> None: ...

class Descriptor(Protocol):
    __isabstractmethod__: bool
    def __get__(self, obj: Any, objtype: Any = None) -> Any: ...
    def __set__(self, obj: Any, value: Any) -> None: ...
    def __delete__(self, obj: Any) -> None: ...
    def __set_name__(self, owner: Any, name: Any) -> None: ...

class DescriptorWrapper: ...

def create_descriptor_wrapper(descriptor: Descriptor) -> DescriptorWrapper: ...
def module_field(*, kw_only: bool = False, default: Any = ...) -> Any: ...

class _Sentinel:
    def __copy__(self) -> Self: ...
    def __deepcopy__(self, memo: Any) -> Self: ...

_ParentType: TypeAlias = Module | Scope | _Sentinel | None

# Not `frozen_default`: pyright would then reject `self.dense = nn.Dense(3)` in `setup`.
@dataclass_transform(field_specifiers=(module_field,))
class ModuleBase:
    scope: Scope | None
    _parent_ref: Module | weakref.ReferenceType[Module] | None

class Module(ModuleBase):
    name: str | None = module_field(kw_only=True, default=None)
    parent: Module | _Sentinel | None = module_field(kw_only=True, default=None)
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __init_subclass__(cls, kw_only: bool = False, **kwargs: Any) -> None: ...
    def __setattr__(self, name: str, val: Any) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __dir__(self) -> list[str]: ...
    def __post_init__(self) -> None: ...
    def __hash__(self) -> int: ...
    def setup(self) -> None: ...
    @property
    def path(self) -> tuple[str, ...]: ...
    @property
    def variables(self) -> VariableDict: ...
    def clone(
        self,
        *,
        parent: _ParentType = None,
        _deep_clone: bool | weakref.WeakValueDictionary[Any, Any] = False,
        _reset_names: bool = False,
        **updates: Any,
    ) -> Self: ...
    def copy(self, *, parent: _ParentType = ..., name: str | None = None, **updates: Any) -> Self: ...
    @overload
    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., T] | None = None,
        *init_args: Any,
        unbox: Literal[True] = True,
        **init_kwargs: Any,
    ) -> Variable[T]: ...
    @overload
    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., T] | None = None,
        *init_args: Any,
        unbox: Literal[False],
        **init_kwargs: Any,
    ) -> Variable[AxisMetadata[T]]: ...
    @overload
    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., T] | None = None,
        *init_args: Any,
        unbox: bool,
        **init_kwargs: Any,
    ) -> Variable[T] | Variable[AxisMetadata[T]]: ...
    @overload
    def param(
        self,
        name: str,
        init_fn: Callable[..., AxisMetadata[T]],
        *init_args: Any,
        unbox: Literal[True] = True,
        **init_kwargs: Any,
    ) -> T: ...
    @overload
    def param(
        self,
        name: str,
        init_fn: Callable[..., T],
        *init_args: Any,
        unbox: bool = True,
        **init_kwargs: Any,
    ) -> T: ...
    def has_variable(self, col: str, name: str) -> bool: ...
    def get_variable(self, col: str, name: str, default: Any = None) -> Any: ...
    def put_variable(self, col: str, name: str, value: Any) -> None: ...
    def is_mutable_collection(self, col: str) -> bool: ...
    def is_initializing(self) -> bool: ...
    def has_rng(self, name: str) -> bool: ...
    def make_rng(self, name: str = "params") -> PRNGKey: ...
    @overload
    def sow(self, col: str, name: str, value: Any) -> bool: ...
    @overload
    def sow(
        self,
        col: str,
        name: str,
        value: T,
        reduce_fn: Callable[[K, T], K] = ...,
        init_fn: Callable[[], K] = ...,
    ) -> bool: ...
    def perturb(self, name: str, value: T, collection: str = "perturbations") -> T: ...
    def bind(
        self,
        variables: _Variables,
        *args: Any,
        rngs: RNGSequences | None = None,
        mutable: CollectionFilter = False,
    ) -> Self: ...
    def unbind(self) -> tuple[Self, VariableDict]: ...

    # `apply` returns what its method returns, and with it the collections wherever `mutable` or
    # `capture_intermediates` asks for them. Three methods (`__call__`, a function, a name) by three
    # forms; then what cannot be told apart before it runs.
    @overload
    def apply(
        self: Callable[..., _R],
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: None = None,
        mutable: Literal[False] = False,
        capture_intermediates: Literal[False] = False,
        **kwargs: Any,
    ) -> _R: ...
    @overload
    def apply(
        self: Callable[..., _R],
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: None = None,
        mutable: _Mutable,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> tuple[_R, _Updates]: ...
    @overload
    def apply(
        self: Callable[..., _R],
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: None = None,
        mutable: CollectionFilter = False,
        capture_intermediates: _Capture,
        **kwargs: Any,
    ) -> tuple[_R, _Updates]: ...
    @overload
    def apply(
        self,
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: Callable[..., _R],
        mutable: Literal[False] = False,
        capture_intermediates: Literal[False] = False,
        **kwargs: Any,
    ) -> _R: ...
    @overload
    def apply(
        self,
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: Callable[..., _R],
        mutable: _Mutable,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> tuple[_R, _Updates]: ...
    @overload
    def apply(
        self,
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: Callable[..., _R],
        mutable: CollectionFilter = False,
        capture_intermediates: _Capture,
        **kwargs: Any,
    ) -> tuple[_R, _Updates]: ...
    @overload
    def apply(
        self,
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: str,
        mutable: _Mutable,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> tuple[Any, _Updates]: ...
    @overload
    def apply(
        self,
        variables: _Variables,
        *args: Any,
        rngs: _Rngs | None = None,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = False,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> Any: ...
    @overload
    def init_with_output(
        self: Callable[..., _R],
        rngs: _Rngs,
        *args: Any,
        method: None = None,
        mutable: CollectionFilter = ...,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> tuple[_R, _Updates]: ...
    @overload
    def init_with_output(
        self,
        rngs: _Rngs,
        *args: Any,
        method: Callable[..., _R],
        mutable: CollectionFilter = ...,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> tuple[_R, _Updates]: ...
    @overload
    def init_with_output(
        self,
        rngs: _Rngs,
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = ...,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> tuple[Any, _Updates]: ...
    def init(
        self,
        rngs: _Rngs,
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = ...,
        capture_intermediates: bool | _Capture = False,
        **kwargs: Any,
    ) -> _Updates: ...
    def lazy_init(
        self,
        rngs: _Rngs,
        *args: Any,
        method: Callable[..., Any] | None = None,
        mutable: CollectionFilter = ...,
        **kwargs: Any,
    ) -> _Updates: ...
    def tabulate(
        self,
        rngs: _Rngs,
        *args: Any,
        depth: int | None = None,
        show_repeated: bool = False,
        mutable: CollectionFilter = ...,
        console_kwargs: Mapping[str, Any] | None = None,
        table_kwargs: Mapping[str, Any] = ...,
        column_kwargs: Mapping[str, Any] = ...,
        compute_flops: bool = False,
        compute_vjp_flops: bool = False,
        **kwargs: Any,
    ) -> str: ...
    def module_paths(
        self,
        rngs: _Rngs,
        *args: Any,
        show_repeated: bool = False,
        mutable: CollectionFilter = ...,
        **kwargs: Any,
    ) -> dict[str, Module]: ...

def merge_param(name: str, a: T | None, b: T | None) -> T: ...
@overload
def apply(
    fn: Callable[..., _R],
    module: Module,
    mutable: Literal[False] = False,
    capture_intermediates: Literal[False] = False,
) -> Callable[..., _R]: ...
@overload
def apply(
    fn: Callable[..., _R],
    module: Module,
    mutable: _Mutable,
    capture_intermediates: bool | _Capture = False,
) -> Callable[..., tuple[_R, _Updates]]: ...
@overload
def apply(
    fn: Callable[..., _R],
    module: Module,
    mutable: CollectionFilter = False,
    *,
    capture_intermediates: _Capture,
) -> Callable[..., tuple[_R, _Updates]]: ...
@overload
def apply(
    fn: Callable[..., Any],
    module: Module,
    mutable: CollectionFilter = False,
    capture_intermediates: bool | _Capture = False,
) -> Callable[..., Any]: ...
def init_with_output(
    fn: Callable[..., _R],
    module: Module,
    mutable: CollectionFilter = ...,
    capture_intermediates: bool | _Capture = False,
) -> Callable[..., tuple[_R, _Updates]]: ...
def init(
    fn: Callable[..., Any],
    module: Module,
    mutable: CollectionFilter = ...,
    capture_intermediates: bool | _Capture = False,
) -> Callable[..., _Updates]: ...

class CompactNameScope(Module):
    fn: Callable[..., Any]
    module_fn: Callable[[], Module]

def share_scope(module: Module, other: Module, /) -> None: ...
