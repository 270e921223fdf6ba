"""The contract: what a combinator takes and what it returns. Nothing here has logic.

Trees have plain aliases, because a static checker cannot see into `PyTree[...]`; jaxtyping describes array leaves.
`Params` and `State` are aliases, not `NewType`s, so that `state | {...}` and the results of optax stay free of errors.

Public protocols take `params`, `batch` and the like by position only, since a user's function names them. Their type
parameters stand in the order of use, the most often needed first: `Step[Batch, Out]`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np
import optax
from flax.core import DenyList
from jaxtyping import Array, Int, Key, UInt32
from typing_extensions import ParamSpec, TypeVar

# typing itself takes a default from Python 3.13 on. What a lambda leaves open is then Any: to mypy by the default, and
# not Never, which no batch is; in pyright by the bound, and not object, of which nothing can be taken.
P = ParamSpec("P", default=...)
BatchT = TypeVar("BatchT", bound=Any, default=Any)
ParamsT = TypeVar("ParamsT", bound=Any, default=Any)
AuxT = TypeVar("AuxT", default=Any)
OutT = TypeVar("OutT", default=Any)

# Those of the protocols. Where a user leaves one out: any result, no further arguments, params as dicts, a `Carry`.
R_co = TypeVar("R_co", covariant=True, default=Any)
OutT_co = TypeVar("OutT_co", covariant=True, default=Any)
BatchT_contra = TypeVar("BatchT_contra", contravariant=True, default=Any)
RestP = ParamSpec("RestP", default=[])
GradsT = TypeVar("GradsT", default=dict[str, Any])
ParamsT_contra = TypeVar("ParamsT_contra", contravariant=True, default=dict[str, Any])
CarryT = TypeVar("CarryT", default="Carry")

RESERVED = frozenset({"params", "batch_stats", "cache", "intermediates", "rngs", "ema", "extra"})
"""Collections that Flax or flaxsplit name themselves; used to recognise swapped arguments."""

OVERWRITTEN = "_overwrite_with_gradient"
"""The collection whose gradient is its next value, as Flax and others name it: scales and amax histories of fp8."""

Tree: TypeAlias = Mapping[str, Any]
"""A nested mapping of leaves. `Params` and `State`, which flaxsplit makes, are plain dicts."""
if TYPE_CHECKING:
    AnyParams: TypeAlias = Mapping[str, Any] | optax.Params
    Transformation: TypeAlias = optax.GradientTransformation | optax.MultiSteps
    PRNGKey: TypeAlias = Key[Array, "..."] | UInt32[Array, "... key"]
else:  # what runs unchecked
    AnyParams = Mapping[str, Any] | Any
    Transformation = optax.GradientTransformation | Any
    PRNGKey = Key[Array, "..."] | UInt32[Array | np.ndarray, "... key"] | jax.ShapeDtypeStruct
"""Params as users have them: `optax.apply_updates` is typed as giving any tree at all.

What optax calls a transformation, and the one class of optax's that has the two methods and is none. A typed key, or a
legacy uint32 one: both work everywhere.
"""


class HostArray(Protocol):
    """A NumPy array, recognised by a method that no JAX array has: it can be filled."""

    def fill(self, value: Any, /) -> None: ...


class AbstractArray(Protocol):
    """A `jax.ShapeDtypeStruct`, recognised by a method that no array has: it can be copied with another shape."""

    @property
    def shape(self) -> Any: ...

    def update(self, **kwargs: Any) -> Any: ...


Abstract: TypeAlias = AbstractArray | tuple[AbstractArray, ...] | Mapping[str, AbstractArray]
"""What has shapes and no values: it stands for an argument, or for a tree of them, whatever a function says of it."""
HostBatch: TypeAlias = HostArray | tuple[HostArray, ...] | Mapping[str, HostArray]
"""A batch as loaders give it. Not recursive: mypy cannot take such a union apart again, and calls right steps wrong."""
Params: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]
Variables: TypeAlias = dict[str, Any]

Trainable: TypeAlias = str | Callable[[str, Any], bool] | Mapping[str, Any] | Sequence[Any]
"""Which params to optimize: a glob, a predicate `(path, leaf) -> bool`, a tree of bools, or a sequence of these."""
Mutable: TypeAlias = bool | str | Collection[str] | DenyList | EllipsisType
Axes: TypeAlias = int | Sequence[Any] | Mapping[str, Any] | None
AxisName: TypeAlias = str | tuple[str, ...]


class Carry(NamedTuple):
    """Everything that a step changes: `carry = step(carry, batch)[0]`.

    A named tuple, because JAX flattens one in C++ at every dispatch. `carry._replace(state=...)` returns another.

    Attributes:
        step: the number of optimizer updates so far; a scalar int32.
        params: the tree that the optimizer updates, and nothing else.
        state: everything else that is carried, `{collection: tree}`.
        opt_state: the optimizer's state, from `tx.init(params)`.
    """

    step: Int[Array, ""]
    params: Any  # nested dicts; Any, since what `optax.apply_updates` returns is typed as any tree at all
    state: State
    opt_state: Any  # as params: optax types it as any tree, in which no optimizer's own fields are to be seen


# Looked at where signatures are checked at run time: a checkpoint gives the count back as a number.
Carry.__annotations__["step"] = Int[Array | np.ndarray, ""] | np.integer | int

class LinenModule(Protocol[P, R_co]):
    """A Linen module, seen through the signature of its own `__call__`: `LinenModule[[Array], Array]`."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    # What is a mapping is no module: so classes are kept out, whose `apply` takes a module first.
    def apply(self, variables: Mapping[str, Any], /, *args: Any, **kwargs: Any) -> Any: ...


class Stateful(Protocol[P, R_co]):
    """A stateful function: `new_state` has exactly `state`'s structure, shapes and dtypes.

    `Stateful[[Array], Array]` is `fn(params, state, x) -> (out, new_state)`, both an `Array`.
    """

    def __call__(self, params: AnyParams, state: Tree, /, *args: P.args, **kwargs: P.kwargs) -> tuple[R_co, State]: ...


class ApplyFn(Protocol):
    """`module.apply` or a function of its form: `fn(variables, *args, mutable=..., **kwargs)`."""

    def __call__(self, variables: Variables, /, *args: Any, **kwargs: Any) -> Any: ...


class AnyStateful(Protocol):
    """Any stateful function. A bound is a protocol: behind one that is a `Callable`, pyrefly forgets the signature."""

    def __call__(self, params: Any, state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]: ...


class AnyStep(Protocol):
    """Any step, over a carry of any type."""

    def __call__(self, carry: Any, batch: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]: ...


class AnyCarryStep(Protocol):
    """Any step over a `Carry`."""

    def __call__(self, carry: Carry, batch: Any, /, *args: Any, **kwargs: Any) -> tuple[Carry, Any]: ...


StatefulT = TypeVar("StatefulT", bound=AnyStateful)
"""Bounds what combinators take and give back unchanged, so that a model's own signature survives a stack of them."""
StepT = TypeVar("StepT", bound=AnyStep)
"""Bounds the steps that a combinator takes and gives back unchanged."""
CarryStepT = TypeVar("CarryStepT", bound=AnyCarryStep)
"""Likewise, over a `Carry` and no other."""


class LossFn(Protocol[BatchT_contra, OutT_co, RestP, ParamsT_contra]):
    """A stateful function whose `out` is a loss, or `(loss, aux)`: `LossFn[Batch, Array]`."""

    def __call__(
        self, params: ParamsT_contra, state: State, batch: BatchT_contra, /, *args: RestP.args, **kwargs: RestP.kwargs
    ) -> tuple[OutT_co, Tree]: ...


GivenLoss: TypeAlias = Callable[Concatenate[ParamsT, State, BatchT, P], tuple[OutT, Tree]]
"""A `LossFn` where one is taken: mypy finds no `P` of a function through a protocol that names further arguments."""


class GradFn(Protocol[BatchT_contra, OutT_co, RestP, GradsT]):
    """A stateful function whose `out` is `(value, grads)`, `grads` a tree like the params: `GradFn[Batch, Array]`."""

    def __call__(
        self, params: GradsT, state: Tree, batch: BatchT_contra, /, *args: RestP.args, **kwargs: RestP.kwargs
    ) -> tuple[tuple[OutT_co, GradsT], State]: ...


class Step(Protocol[BatchT_contra, OutT_co, RestP, CarryT]):
    """A step: `(carry, batch, *args, **kwargs) -> (carry, out)`.

    `Step[Batch, Array]` is one over a `Carry`; `Step[Batch, Array, [], Mine]` one over a carry of another type.
    """

    def __call__(
        self, carry: CarryT, batch: BatchT_contra, *args: RestP.args, **kwargs: RestP.kwargs
    ) -> tuple[CarryT, OutT_co]: ...


class HostStep(Protocol[BatchT_contra, OutT_co, RestP]):
    """A `Step` over a `Carry` that also takes batches of NumPy arrays, whatever the loss function says of the batch."""

    @property
    def __name__(self) -> str: ...

    def __call__(
        self, carry: Carry, batch: BatchT_contra | HostBatch, *args: RestP.args, **kwargs: RestP.kwargs
    ) -> tuple[Carry, OutT_co]: ...


class JittedStep(Protocol[P, R_co]):
    """A compiled step: the object that `jax.jit` returns, with the step's own types.

    `JittedStep[[Carry, Batch], tuple[Carry, Array]]` is `step(carry, batch) -> (carry, loss)`.
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered: ...

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Traced: ...

    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...

    def clear_cache(self) -> None: ...
