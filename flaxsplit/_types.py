"""The contract: what a combinator takes and what it gives back. Nothing here has logic.

Trees have plain aliases (a static checker cannot see into `PyTree[...]`); array leaves are said with jaxtyping.
`Params` and `State` are aliases and not `NewType`s, so that `state | {...}` and what optax returns stay free of errors.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar

import jax
import optax
from flax.core import DenyList, FrozenDict
from jaxtyping import Array, Int, Key, UInt32

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
C = TypeVar("C")
OutT = TypeVar("OutT")
BatchT = TypeVar("BatchT")

OVERWRITTEN = "_overwrite_with_gradient"
"""The collection whose gradient is its next value, as Flax and others name it: scales and amax histories of fp8."""

Tree: TypeAlias = Mapping[str, Any]
"""A nested mapping of leaves. `Params` and `State`, which flaxsplit makes, are plain dicts."""
if TYPE_CHECKING:
    AnyParams: TypeAlias = Mapping[str, Any] | optax.Params
else:  # at run time all of optax's trees would let a number pass as params
    AnyParams = Mapping[str, Any] | FrozenDict
"""Params as users have them: `optax.apply_updates` is typed as giving any tree at all."""
Params: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]
Variables: TypeAlias = dict[str, Any]

PRNGKey: TypeAlias = Key[Array, "..."] | UInt32[Array, "... key"]
"""A typed key, or a legacy uint32 one. Both work everywhere."""

Trainable: TypeAlias = str | Callable[[str, Any], bool] | Mapping[str, Any] | Sequence[Any]
"""Which params to optimize: a glob, a predicate `(path, leaf) -> bool`, a tree of bools, or a sequence of these."""
Mutable: TypeAlias = bool | str | Collection[str] | DenyList | EllipsisType
Axes: TypeAlias = int | Sequence[Any] | Mapping[str, Any] | None
AxisName: TypeAlias = str | tuple[str, ...]


class Carry(NamedTuple):
    """What a step threads: `carry = step(carry, batch)[0]`.

    A named tuple, because JAX takes one apart in C++ at every dispatch. `carry._replace(state=...)` gives another.

    Attributes:
        step: how many optimizer updates have been done; a scalar int32.
        params: the tree that the optimizer updates, and nothing else.
        state: everything else that is carried, `{collection: tree}`.
        opt_state: what `tx.init(params)` gave.
    """

    step: Int[Array, ""]
    params: Any  # nested dicts; Any, since what `optax.apply_updates` returns is typed as any tree at all
    state: State
    opt_state: Any  # as params: optax types it as any tree, in which no optimizer's own fields are to be seen


class LinenModule(Protocol[P, R_co]):
    """A Linen module, seen through the signature of its own `__call__`."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...

    def is_initializing(self) -> bool: ...  # keeps module classes out: there it lacks an argument


class Stateful(Protocol[P, R_co]):
    """A stateful function: `new_state` has exactly `state`'s structure, shapes and dtypes."""

    def __call__(self, params: AnyParams, state: Tree, /, *args: P.args, **kwargs: P.kwargs) -> tuple[R_co, State]: ...


class ApplyFn(Protocol):
    """`module.apply` or a function of its form: `fn(variables, *args, mutable=..., **kwargs)`."""

    def __call__(self, variables: Variables, /, *args: Any, **kwargs: Any) -> Any: ...


StatefulT = TypeVar("StatefulT", bound=Callable[Concatenate[Any, Any, ...], tuple[Any, Any]])
"""Bounds what combinators take and give back unchanged, so that a model's own signature survives a stack of them."""

StepT = TypeVar("StepT", bound=Callable[Concatenate[Any, Any, ...], tuple[Any, Any]])
"""Bounds the steps that a combinator takes and gives back unchanged."""

LossFn: TypeAlias = Callable[Concatenate[Params, State, BatchT, P], tuple[OutT, Tree]]
"""A stateful function whose `out` is a loss, or `(loss, aux)`."""
GradFn: TypeAlias = Callable[Concatenate[Any, Tree, BatchT, P], tuple[tuple[OutT, Params], State]]
"""A stateful function whose `out` is `(value, grads)`."""
Step: TypeAlias = Callable[Concatenate[C, BatchT, P], tuple[C, OutT]]
"""A step: `(carry, batch, *args, **kwargs) -> (carry, out)`."""


class JittedStep(Protocol[P, R_co]):
    """A compiled step: the object that `jax.jit` returns, with the step's own types."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered: ...

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Traced: ...

    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...

    def clear_cache(self) -> None: ...
