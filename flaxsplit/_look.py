"""A step looked at and not run: traced once, compiled once, each leaf beside its value in the jaxpr."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from ._checks import is_function, two_of
from ._describe import is_array, is_numeric, kind_of, name_of
from ._flow import Flow
from ._paths import entry_name
from ._refusals.explain import CARRY, STEP, TWO_OF_STEP
from ._types import Carry
from ._upstream import bare


class Leaf(NamedTuple):
    """One leaf that goes in or comes out.

    Attributes:
        path: its key path, from `carry`, `batch`, `args[0]`, `out` on.
        names: the bare names on that path.
        given: the argument; of a leaf that comes out, its type.
        aval: its type in the jaxpr, None of what is no array.
        place: the sharding that the executable has for it.
        donated: whether its buffer is given away.
        index: its number among all that go in, or come out.
    """

    path: str
    names: tuple[Any, ...]
    given: Any
    aval: Any
    place: Any
    donated: bool
    index: int

    @property
    def bytes(self) -> int:
        """Its size, whole."""
        size, itemsize = getattr(self.aval, "size", 0), getattr(getattr(self.aval, "dtype", None), "itemsize", 0)
        return int(size) * int(itemsize)


@dataclass(frozen=True)
class Look:
    """What is known of a step without running it."""

    name: str
    ours: bool
    jitted: bool
    carry: Any
    new_carry: Any
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    jaxpr: Any
    compiled: Any
    seconds: tuple[float, float]
    consts: tuple[Any, ...] = field(repr=False)

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
    def text(self) -> str:
        """The optimized HLO; what reads it says what would replace it."""
        return str(self.compiled.as_text() or "")

    @property
    def devices(self) -> int:
        """How many devices it is compiled for."""
        return max((len(leaf.place.device_set) for leaf in self.inputs if leaf.place is not None), default=1)


class _Traced(NamedTuple):
    """What tracing gave: the jaxpr, how to lower it, and the trees of what goes in and comes out."""

    jaxpr: Any
    lower: Callable[[], Any]
    donated: tuple[bool, ...]
    named: dict[str, Any]
    result: Any
    jitted: bool
    is_leaf: Callable[[Any], bool]


def look_at(step: Any, carry: Any, batch: Any, args: Any, kwargs: Any) -> Look:
    """Traces and compiles a step for these arguments."""
    STEP.unless(is_function(step) or hasattr(step, "lower"), step=step)
    is_jit = hasattr(step, "trace") and hasattr(step, "lower")
    _check_carry(carry, is_jit)
    begin = time.perf_counter()
    traced = (_of_jit if is_jit else _of_any)(step, (carry, batch, *args), kwargs)
    new_carry, out = two_of(traced.result, TWO_OF_STEP, "(carry, out)")
    between = time.perf_counter()
    compiled = _compiled(traced.lower)
    seconds = between - begin, time.perf_counter() - between
    jaxpr, donated = bare(traced.jaxpr), traced.donated
    inputs = _leaves(traced.named, jaxpr.invars, compiled.input_shardings, donated, traced.is_leaf)
    outs = _leaves({"carry": new_carry, "out": out}, jaxpr.outvars, compiled.output_shardings, (), traced.is_leaf)
    ours, consts = isinstance(carry, Carry), tuple(getattr(traced.jaxpr, "consts", ()))
    return Look(name_of(step), ours, traced.jitted, carry, new_carry, inputs, outs, jaxpr, compiled, seconds, consts)


def _compiled(lower: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers that cannot be reused: that is a finding
        return lower().compile()


def _check_carry(carry: Any, is_jit: bool) -> None:
    leaves = jax.tree.leaves(carry)
    CARRY.unless(any(map(_is_input, leaves)), "no array in the carry", *(f"carry: {kind_of(leaf)}" for leaf in leaves))
    CARRY.unless_all(lambda leaf: _is_input(leaf) or (callable(leaf) and not is_jit), carry, "carry")


def _is_input(leaf: Any) -> bool:
    """Tells what `jax.jit` traces."""
    return is_numeric(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_shaped(leaf: Any) -> bool:
    """Tells what `equinox.filter_jit` traces: it takes Python's numbers for constants."""
    return is_array(leaf) and not isinstance(leaf, np.generic)


def _of_jit(step: Any, args: Any, kwargs: Any) -> _Traced:
    traced = step.trace(*args, **kwargs)
    donated = tuple(info.donated for info in jax.tree.leaves(traced.args_info, is_leaf=_is_info))
    named = _named(_without_static(args, traced.args_info[0]), {name: kwargs[name] for name in traced.args_info[1]})
    return _Traced(traced.jaxpr, traced.lower, donated, named, traced.out_info, True, _is_any)


def _without_static(args: Any, infos: Any) -> list[Any]:
    """Static arguments are none to JAX; of which there are fewer, those that are no arrays must be they."""
    spare, kept = len(args) - len(infos), list(args)
    for each in reversed(args[2:]):
        if spare and not jax.tree.leaves(each, is_leaf=is_array) or spare and not is_array(each):
            kept = [other for other in kept if other is not each]
            spare -= 1
    return kept


def _named(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    first = dict(zip(("carry", "batch"), args, strict=False))
    return {**first, **{f"args[{i}]": each for i, each in enumerate(args[2:])}, **kwargs}


def _is_info(node: Any) -> bool:
    return hasattr(node, "donated")


def _is_any(leaf: Any) -> bool:
    return leaf is not None


def _of_any(step: Any, args: Any, kwargs: Any) -> _Traced:
    """A step that is no `jax.jit`: what is no array is closed over, as `equinox.filter_jit` does it."""
    is_leaf = _is_shaped if _is_equinox(step, args[0]) else _is_input
    leaves, treedef = jax.tree.flatten((args, kwargs))
    given = [leaf for leaf in leaves if is_leaf(leaf)]
    own = tuple(range(sum(map(is_leaf, jax.tree.leaves(args[0])))))
    result: list[Any] = []

    def flat(*dynamic: Any) -> list[Any]:
        rest = iter(dynamic)
        _args, _kwargs = jax.tree.unflatten(treedef, [next(rest) if is_leaf(leaf) else leaf for leaf in leaves])
        outs, out_treedef = jax.tree.flatten(step(*_args, **_kwargs))
        result[:] = [out_treedef, outs]
        return [out for out in outs if is_leaf(out)]

    traced = jax.jit(flat, donate_argnums=own).trace(*given)
    out_treedef, outs = result
    types = iter(traced.out_info)
    returned = jax.tree.unflatten(out_treedef, [next(types) if is_leaf(out) else out for out in outs])
    donated, jitted = _inner_donation(bare(traced.jaxpr), own)
    lower = traced.lower
    if donated != own:  # the step was jitted in its own way; JAX takes no other donation than that of the outermost
        lower = jax.jit(jaxpr_as_fun(traced.jaxpr), donate_argnums=donated).trace(*given).lower
    flags = tuple(i in donated for i in range(len(given)))
    return _Traced(traced.jaxpr, lower, flags, _named(args, kwargs), returned, jitted, is_leaf)


def _is_equinox(step: Any, carry: Any) -> bool:
    kinds = {type(step)}
    jax.tree.leaves(carry, is_leaf=lambda node: bool(kinds.add(type(node))))
    return any(kind.__module__.startswith("equinox") for kind in kinds)


def _inner_donation(jaxpr: Any, own: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """What a step donates that was jitted in its own way; else all of the carry, as `jit_step` does."""
    if len(jaxpr.eqns) != 1 or jaxpr.eqns[0].primitive.name not in ("jit", "pjit"):
        return own, False
    (eqn,) = jaxpr.eqns
    gone = eqn.params.get("donated_invars", ())
    atoms = {atom for atom, given in zip(eqn.invars, gone, strict=False) if given and not hasattr(atom, "val")}
    return tuple(i for i, var in enumerate(jaxpr.invars) if var in atoms), True


def _leaves(
    named: dict[str, Any], atoms: Sequence[Any], shardings: Any, donated: Sequence[bool], is_leaf: Any
) -> tuple[Leaf, ...]:
    places = jax.tree.leaves(shardings, is_leaf=lambda node: node is None)
    places = places if len(places) == len(atoms) else [None] * len(atoms)
    rows = [
        (name + jax.tree_util.keystr(key), (name, *map(entry_name, key)), leaf)
        for name, tree in named.items()
        for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if is_leaf(leaf)
    ]
    donated = donated or [False] * len(atoms)
    return tuple(
        Leaf(*row, atom.aval, place, gone, i)
        for i, (row, atom, place, gone) in enumerate(zip(rows, atoms, places, donated, strict=True))
    )
