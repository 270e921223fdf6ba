from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Self, TypeAlias, TypeVar, overload

import jax
from flax import struct
from flax.core.scope import CollectionFilter, PRNGSequenceFilter
from flax.linen.module import Module
from flax.typing import InOutAxis, InOutScanAxis

TransformTarget: TypeAlias = type[Module] | Callable[..., Any]
# A transformed class or method keeps the type of the one it was made from.
Target = TypeVar("Target", bound=TransformTarget)
ModuleT = TypeVar("ModuleT", bound=Module)
C = TypeVar("C")
_R = TypeVar("_R")
_A = TypeVar("_A")
_CallableT = TypeVar("_CallableT", bound=Callable[..., Any])

# A mapping is invariant in its keys: a variable of type `dict[str, int]` is no `Mapping[CollectionFilter, int]`.
_By: TypeAlias = Mapping[_R, _A] | Mapping[str, _A]

# By method: how to transform each, where a class has several.
_Methods: TypeAlias = Iterable[str] | Mapping[str, Any] | None

def clean_clone(x: C) -> C: ...

@struct.dataclass
class VariablePlaceholder:
    collection: str = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    unbox: bool = struct.field(pytree_node=False)
    id: int = struct.field(pytree_node=False)
    def replace(self, **updates: Any) -> Self: ...

@struct.dataclass
class InstancePlaceholder:
    cls: type[Any] = struct.field(pytree_node=False)
    attrs: dict[Any, Any] = struct.field(pytree_node=False)
    id: int = struct.field(pytree_node=False)
    def replace(self, **updates: Any) -> Self: ...

def get_module_scopes(module: Module, args: Any = None, kwargs: Any = None) -> Any: ...
def set_module_scopes(module: Module, args: Any, kwargs: Any, scopes: Any) -> Any: ...
def module_class_lift_transform(
    transform: Callable[..., Any],
    module_class: type[ModuleT],
    *trafo_args: Any,
    methods: _Methods = None,
    **trafo_kwargs: Any,
) -> type[ModuleT]: ...
def module_class_lift_transform_cached(
    transform: Callable[..., Any],
    module_class: type[ModuleT],
    methods: _Methods = None,
    **trafo_kwargs: Any,
) -> type[ModuleT]: ...
def decorator_lift_transform(
    transform: Callable[..., Any],
    class_fn: Any,
    *trafo_args: Any,
    multi_scope: bool = True,
    **trafo_kwargs: Any,
) -> Callable[..., Any]: ...
def decorator_lift_transform_cached(
    transform: Callable[..., Any], class_fn: Any, **trafo_kwargs: Any
) -> Callable[..., Any]: ...
def fork_rngs(module: Module) -> AbstractContextManager[None]: ...
def lift_transform(
    transform: Callable[..., Any],
    target: Target,
    *trafo_args: Any,
    methods: _Methods = None,
    **trafo_kwargs: Any,
) -> Target: ...
def lift_transform_cached(
    transform: Callable[..., Any],
    target: Target,
    *trafo_args: Any,
    methods: _Methods = None,
    **trafo_kwargs: Any,
) -> Target: ...
def lift_direct_transform(
    transform: Callable[..., Any],
    targets: tuple[Callable[..., Any], ...],
    mdl: Module,
    *args: Any,
    multi_scope: bool = True,
    **kwargs: Any,
) -> Any: ...
def vmap(
    target: Target,
    variable_axes: _By[CollectionFilter, InOutAxis] = ...,
    split_rngs: _By[PRNGSequenceFilter, bool] = ...,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] = ...,
    methods: _Methods = None,
) -> Target: ...
def jit(
    target: Target,
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    device: Any = None,
    backend: str | None = None,
    methods: _Methods = None,
) -> Target: ...
def checkpoint(
    target: Target,
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
    methods: _Methods = None,
) -> Target: ...

remat = checkpoint

def remat_scan(
    target: Target,
    lengths: Sequence[int] | None = (),
    policy: Callable[..., bool] | None = None,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    variable_axes: _By[CollectionFilter, InOutScanAxis] = ...,
    split_rngs: _By[PRNGSequenceFilter, bool] = ...,
) -> Target: ...
def scan(
    target: Target,
    variable_axes: _By[CollectionFilter, InOutScanAxis] = ...,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    split_rngs: _By[PRNGSequenceFilter, bool] = ...,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] = ...,
    methods: _Methods = None,
    _split_transpose: bool = False,
    check_constancy_invariants: bool = True,
) -> Target: ...
def map_variables(
    target: Target,
    mapped_collections: CollectionFilter = True,
    trans_in_fn: Callable[..., Any] = ...,
    trans_out_fn: Callable[..., Any] = ...,
    init: bool = False,
    mutable: bool = False,
    rngs: PRNGSequenceFilter = True,
    variables: CollectionFilter = True,
    methods: _Methods = None,
) -> Target: ...
@overload
def vjp(
    fn: Callable[..., _R],
    mdl: Module,
    *primals: Any,
    has_aux: Literal[False] = False,
    reduce_axes: tuple[()] = (),
    vjp_variables: CollectionFilter = "params",
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
    multi_scope: bool = False,
) -> tuple[_R, Callable[[_R], Any]]: ...
@overload
def vjp(
    fn: Callable[..., tuple[_R, _A]],
    mdl: Module,
    *primals: Any,
    has_aux: Literal[True],
    reduce_axes: tuple[()] = (),
    vjp_variables: CollectionFilter = "params",
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
    multi_scope: bool = False,
) -> tuple[_R, Callable[[_R], Any], _A]: ...
@overload
def value_and_grad(
    fn: Callable[..., _R],
    mdl: Module,
    *primals: Any,
    has_aux: Literal[False] = False,
    reduce_axes: tuple[()] = (),
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
) -> tuple[_R, Any]: ...
@overload
def value_and_grad(
    fn: Callable[..., tuple[_R, _A]],
    mdl: Module,
    *primals: Any,
    has_aux: Literal[True],
    reduce_axes: tuple[()] = (),
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
) -> tuple[tuple[_R, _A], Any]: ...
@overload
def grad(
    fn: Callable[..., Any],
    mdl: Module,
    *primals: Any,
    has_aux: Literal[False] = False,
    reduce_axes: tuple[()] = (),
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
) -> Any: ...
@overload
def grad(
    fn: Callable[..., tuple[Any, _A]],
    mdl: Module,
    *primals: Any,
    has_aux: Literal[True],
    reduce_axes: tuple[()] = (),
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
) -> tuple[Any, _A]: ...
def jvp(
    fn: Callable[..., _R],
    mdl: Module,
    primals: Any,
    tangents: Any,
    variable_tangents: Any,
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
) -> tuple[_R, _R]: ...

# A condition is an array where it is traced, hence not `bool`.
def while_loop(
    cond_fn: Callable[[ModuleT, C], bool | jax.Array],
    body_fn: Callable[[ModuleT, C], C],
    mdl: ModuleT,
    init: C,
    carry_variables: CollectionFilter = False,
    broadcast_variables: CollectionFilter = True,
    split_rngs: _By[PRNGSequenceFilter, bool] = ...,
) -> C: ...
def cond(
    pred: Any,
    true_fun: Callable[..., C],
    false_fun: Callable[..., C],
    mdl: Module,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
) -> C: ...
def switch(
    index: Any,
    branches: Sequence[Callable[..., C]],
    mdl: Module,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: PRNGSequenceFilter = True,
) -> C: ...
def custom_vjp(
    fn: _CallableT,
    forward_fn: Callable[..., Any],
    backward_fn: Callable[..., Any],
    grad_vars: CollectionFilter = "params",
    nondiff_argnums: int | Sequence[int] = (),
) -> _CallableT: ...
def named_call(class_fn: _CallableT, force: bool = True) -> _CallableT: ...
def add_metadata_axis(
    target: Target,
    variable_axes: _By[CollectionFilter, InOutAxis] = ...,
    metadata_params: dict[Any, Any] = ...,
) -> Target: ...
def fold_rngs(
    target: Target, variables: CollectionFilter = True, rngs: PRNGSequenceFilter = True
) -> Target: ...
