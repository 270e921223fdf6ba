"""A step looked at and not run: traced once, compiled once, each leaf beside its value in the jaxpr."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._checks import is_function, two_of
from ._describe import kind_of
from ._flow import Flow
from ._paths import entry_name
from ._refusals.look import APART, AS_STEP, CALL, CARRY, STEP
from ._refusals.options import unbound
from ._tally import constants
from ._tracing import Traced, is_equinox, is_input, is_jit, is_shaped, trace_of
from ._types import Carry
from ._upstream import bare
from ._wraps import name_of


class Leaf(NamedTuple):
    """One leaf that goes in or comes out.

    Attributes:
        path: its key path, from `carry`, `batch`, `args[0]`, `out` on.
        names: the bare names on that path.
        given: the argument; of a leaf that comes out, its type.
        aval: its type in the jaxpr.
        place: the sharding that the executable has for it.
        donated: whether its buffer is given away.
        at: its number among all that go in, or come out.
    """

    path: str
    names: tuple[Any, ...]
    given: Any
    aval: Any
    place: Any
    donated: bool
    at: int

    @property
    def bytes(self) -> int:
        """Its size, whole."""
        return int(self.aval.size) * int(self.aval.dtype.itemsize)


@dataclass(frozen=True)
class Look:
    """What is known of a step without running it.

    Attributes:
        ours: whether it threads a `Carry`.
        filtered: whether it is Equinox's, whose `filter_jit` donates all arguments or none.
    """

    name: str
    ours: bool
    filtered: bool
    carry: Any
    new_carry: Any
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    jaxpr: Any
    compiled: Any
    seconds: tuple[float, float]
    consts: tuple[Any, ...]

    def part(self, name: str) -> list[Leaf]:
        """The leaves of `carry`, `batch`, or of the other arguments."""
        return [leaf for leaf in self.inputs if leaf.path.startswith(name)]

    @property
    def new_leaves(self) -> list[Leaf]:
        """The leaves of the carry that comes out."""
        return [leaf for leaf in self.outputs if leaf.path.startswith("carry")]

    @cached_property
    def pairs(self) -> list[tuple[Leaf, Leaf]]:
        """Each leaf of the carry with the one that takes its place."""
        new = {leaf.path: leaf for leaf in self.new_leaves}
        return [(leaf, new[leaf.path]) for leaf in self.part("carry") if leaf.path in new]

    @cached_property
    def flow(self) -> Flow:
        """What each output does with the inputs."""
        return Flow(self.jaxpr)

    @cached_property
    def trains(self) -> bool:
        """Whether anything floating changes; a step in which nothing does evaluates."""
        outs = self.flow.outs
        changed = (old for old, new in self.pairs if outs[new.at].same != old.at)
        return any(jnp.issubdtype(old.aval.dtype, jnp.inexact) for old in changed)

    @cached_property
    def text(self) -> str:
        """The optimized HLO; what reads it says what would replace it."""
        return str(self.compiled.as_text() or "")

    @cached_property
    def devices(self) -> int:
        """How many devices it is compiled for."""
        return max((len(leaf.place.device_set) for leaf in self.inputs if leaf.place is not None), default=1)


def look_at(step: Any, carry: Any, batch: Any, args: Any, kwargs: Any) -> Look:
    """Traces and compiles a step for these arguments."""
    STEP.unless(is_function(step), step=step)
    _check_carry(step, carry)
    why, _ = unbound(step, (carry, batch, *args), kwargs)
    CALL.unless(not why, f"step: {why}")
    begin = time.perf_counter()
    traced = trace_of(step, (carry, batch, *args), kwargs)
    two_of(traced.result, "explain_step(step)", "(carry, out)", AS_STEP)
    between = time.perf_counter()
    compiled = _compiled(traced)
    return _look(step, carry, traced, compiled, (between - begin, time.perf_counter() - between))


def _check_carry(step: Any, carry: Any) -> None:
    leaves = jax.tree.leaves(carry)
    CARRY.unless(any(map(is_input, leaves)), "carry: no array in it", *sorted(set(map(kind_of, leaves))))
    if is_jit(step) or not is_equinox(step, carry):
        CARRY.unless_all(is_input, carry, "carry")


def _compiled(traced: Traced) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers that cannot be reused: that is a finding
        try:
            return traced.lower().compile()
        except ValueError as error:
            APART.instead_of(error, error, traced.named)


def _look(step: Any, carry: Any, traced: Traced, compiled: Any, seconds: tuple[float, float]) -> Look:
    jaxpr, (new_carry, out) = bare(traced.closed), traced.result
    returned, none = {"carry": new_carry, "out": out}, [False] * len(jaxpr.outvars)
    return Look(
        name=name_of(step),
        ours=isinstance(carry, Carry),
        filtered=traced.is_leaf is is_shaped,
        carry=carry,
        new_carry=new_carry,
        inputs=_leaves(traced.named, traced.is_leaf, jaxpr.invars, compiled.input_shardings, traced.donated),
        outputs=_leaves(returned, traced.is_leaf, jaxpr.outvars, compiled.output_shardings, none),
        jaxpr=jaxpr,
        consts=tuple(constants(traced.closed)),
        compiled=compiled,
        seconds=seconds,
    )


def _leaves(
    named: dict[str, Any], is_leaf: Any, atoms: Sequence[Any], shardings: Any, donated: Sequence[bool]
) -> tuple[Leaf, ...]:
    places = jax.tree.leaves(shardings, is_leaf=lambda node: node is None)
    rows = [
        (name + jax.tree_util.keystr(key), (name, *map(entry_name, key)), leaf)
        for name, tree in named.items()
        for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if is_leaf(leaf)
    ]
    places = places if len(places) == len(rows) else [None] * len(rows)
    first = len(atoms) - len(rows)  # some versions of JAX have what is closed over as arguments before the others
    return tuple(
        Leaf(*row, atom.aval, place, gone, i)
        for i, (row, atom, place, gone) in enumerate(zip(rows, atoms[first:], places, donated, strict=True), first)
    )
