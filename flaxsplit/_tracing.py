"""One trace of any step: jitted by JAX, by Equinox in its own way, or not at all."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from ._describe import is_array, is_numeric
from ._upstream import bare

_JITTED: Any = type(jax.jit(abs))  # has no public name


class Traced(NamedTuple):
    """What tracing gave.

    Attributes:
        closed: the jaxpr with its constants.
        lower: gives what can be compiled.
        donated: for each leaf that goes in, whether its buffer is given away.
        named: the trees that go in, by name.
        result: what the step returned, its arrays abstract.
        jitted: whether the step came jitted, so that what it donates is its author's choice.
        is_leaf: tells the leaves that are traced from those that are constants.
    """

    closed: Any
    lower: Callable[[], Any]
    donated: tuple[bool, ...]
    named: dict[str, Any]
    result: Any
    jitted: bool
    is_leaf: Callable[[Any], bool]


def trace_of(step: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """Traces a step; `args` begin with the carry and the batch."""
    return _of_jit(step, args, kwargs) if is_jit(step) else _of_any(step, args, kwargs)


def is_jit(step: Any) -> bool:
    """Tells what `jax.jit` returns; `nnx.jit` and Equinox have a `lower` too, of another form."""
    return isinstance(step, _JITTED)


def is_input(leaf: Any) -> bool:
    """Tells what `jax.jit` traces."""
    return is_numeric(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def is_shaped(leaf: Any) -> bool:
    """Tells what `equinox.filter_jit` traces: it takes the numbers of Python for constants."""
    return is_array(leaf) and not isinstance(leaf, np.generic)


def is_equinox(step: Any, carry: Any) -> bool:
    """Tells steps and carries of Equinox by the classes in them; the library is not imported for it."""
    kinds = {type(step)}

    def look_in(node: Any) -> bool:
        kinds.add(type(node))
        return False

    jax.tree.leaves(carry, is_leaf=look_in)
    return any(kind.__module__.startswith("equinox") for kind in kinds)


def _of_jit(step: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    traced = step.trace(*args, **kwargs)
    places, names = traced.args_info
    donated = tuple(info.donated for info in jax.tree.leaves(traced.args_info, is_leaf=_is_info))
    named = _named(_without_static(args, len(places)), {name: kwargs[name] for name in names})
    return Traced(traced.jaxpr, traced.lower, donated, named, traced.out_info, True, _is_any)


def _is_info(node: Any) -> bool:
    return hasattr(node, "donated")


def _is_any(leaf: Any) -> bool:
    return leaf is not None


def _without_static(args: Sequence[Any], count: int) -> list[Any]:
    """JAX does not say which arguments are static: where some are, the last that hold no array."""
    bare_ones = [i for i, each in enumerate(args) if not any(map(is_shaped, jax.tree.leaves(each)))]
    static = bare_ones[len(bare_ones) - (len(args) - count) :]
    return [each for i, each in enumerate(args) if i not in static]


def _named(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    first = dict(zip(("carry", "batch"), args, strict=False))
    return {**first, **{f"args[{i}]": each for i, each in enumerate(args[2:])}, **kwargs}


def _of_any(step: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """A step that is no `jax.jit`: what is no array is closed over."""
    is_leaf = is_shaped if is_equinox(step, args[0]) else is_input
    given = [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_leaf(leaf)]
    own = tuple(range(sum(map(is_leaf, jax.tree.leaves(args[0])))))
    flat, result = _flattened(step, args, kwargs, is_leaf)
    traced = jax.jit(flat, donate_argnums=own).trace(*given)
    closed, lower = traced.jaxpr, traced.lower
    donated = _inner_donation(bare(closed))
    if donated is not None and donated != own:  # JAX hears of it from the outermost alone
        lower = jax.jit(jaxpr_as_fun(closed), donate_argnums=donated).trace(*given).lower
    taken = {*(own if donated is None else donated)}
    flags = tuple(i in taken for i in range(len(given)))
    returned = result([jax.ShapeDtypeStruct(each.shape, each.dtype) for each in traced.out_info])  # jax < 0.7: OutInfo
    return Traced(closed, lower, flags, _named(args, kwargs), returned, donated is not None, is_leaf)


def _flattened(step: Any, args: Any, kwargs: Any, is_leaf: Callable[[Any], bool]) -> tuple[Any, Any]:
    """The step over a flat list of arrays, and what puts together again what came out while it was traced."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    seen: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        _args, _kwargs = jax.tree.unflatten(treedef, _filled(leaves, arrays, is_leaf))
        seen[:] = jax.tree.flatten(step(*_args, **_kwargs))
        return [out for out in seen[0] if is_leaf(out)]

    def result(types: Sequence[Any]) -> Any:
        outs, out_treedef = seen
        return jax.tree.unflatten(out_treedef, _filled(outs, types, is_leaf))

    return flat, result


def _filled(leaves: Sequence[Any], arrays: Sequence[Any], is_leaf: Callable[[Any], bool]) -> list[Any]:
    rest = iter(arrays)
    return [next(rest) if is_leaf(leaf) else leaf for leaf in leaves]


def _inner_donation(jaxpr: Any) -> tuple[int, ...] | None:
    """What a step donates that was jitted as a whole, in a way of its own; None of another."""
    if len(jaxpr.eqns) != 1 or jaxpr.eqns[0].primitive.name not in ("jit", "pjit"):
        return None
    (eqn,) = jaxpr.eqns
    flags = eqn.params.get("donated_invars", ())
    gone = {atom for atom, donated in zip(eqn.invars, flags, strict=False) if donated and not hasattr(atom, "val")}
    return tuple(i for i, var in enumerate(jaxpr.invars) if var in gone)
