"""What is known of a value in a step: the inputs that it depends on, is, or adds to; and how operations hand it on."""

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Value(NamedTuple):
    """What is known of one value.

    Attributes:
        reads: the inputs that it depends on.
        live: the same, but for those that it depends on through a zero.
        same: the input that it is.
        zero: whether it is zero whatever the inputs are.
        nil: whether a zero of its own shape went into it.
        base: the input that it is the sum of, with something else.
        added: the inputs that the something else depends on, as `live`.
        number: equal for equal keys.
        was: the dtype that it was cast from.
    """

    reads: int = 0
    live: int = 0
    same: int | None = None
    zero: bool = False
    nil: bool = False
    base: int | None = None
    added: int = 0
    number: Any = None
    was: Any = None


_MOVED = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "copy", "sharding_constraint", "slice", "rev"}
KEPT = {"convert_element_type", "copy", "copy_p", "reshape", "sharding_constraint", "reshard", "optimization_barrier"}
_ALL_ZERO = {
    *("add", "sub", "add_any", "max", "min", "neg", "abs", "sign", "sqrt", "square", "real", "reduce_sum", "transpose"),
    *("broadcast_in_dim", "squeeze", "slice", "rev", "concatenate", "pad", "cumsum", "psum", "expand_dims", *KEPT),
}


def result_of(name: str, eqn: Any, ins: list[Value], var: Any, number: Any) -> Value:
    """What is known of what one operation makes of its operands."""
    if name in KEPT and len(ins) == 1 and alike_avals(eqn.invars[0].aval, var.aval):
        return ins[0]
    if name == "select_n" and ins[1].same is not None and len({each.same for each in ins[1:]}) == 1:
        return ins[1]  # the old one or the old one
    reads, live = union(each.reads for each in ins), union(each.live for each in ins if not each.zero)
    zero, shape = _makes_zero(name, ins), _shape(var)
    nil = any((each.zero or each.nil) and _shape(atom) == shape for atom, each in zip(eqn.invars, ins, strict=True))
    value = Value(reads, 0 if zero else live, zero=zero, nil=zero or nil, number=number, was=_cast_from(name, eqn, ins))
    return _sum(name, eqn, ins, value)


def _cast_from(name: str, eqn: Any, ins: list[Value]) -> Any:
    if name == "convert_element_type":
        before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        floating = jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.floating)
        return before if floating and before != after else None
    return ins[0].was if name in _MOVED and ins else None


def _sum(name: str, eqn: Any, ins: list[Value], value: Value) -> Value:
    """Whether a result is an input with something added, as a param after its update."""
    if name == "convert_element_type" and ins[0].base is not None:
        return value._replace(base=ins[0].base, added=ins[0].added, nil=ins[0].nil)
    if name == "select_n":
        return _chosen(ins[1:], value)
    if name not in ("add", "sub", "add_any"):
        return value
    for i in (0, 1) if name != "sub" else (0,):
        old, more = ins[i], ins[1 - i]
        origin = old.same if old.same is not None else old.base
        if origin is not None and _shape(eqn.invars[i]) == _shape(eqn.outvars[0]):
            return value._replace(base=origin, added=old.added | (0 if more.zero else more.live), nil=more.nil)
    return value


def _chosen(cases: list[Value], value: Value) -> Value:
    """An update that is not always taken is one."""
    origins = {case.same if case.same is not None else case.base for case in cases}
    if len(origins) != 1 or None in origins:
        return value
    added, nil = union(case.added for case in cases), any(case.nil for case in cases)
    return value._replace(base=origins.pop(), added=added, nil=nil)


def either(one: Value, other: Value) -> Value:
    """What is known of a value that is one or the other."""
    if one == other:
        return one
    joined = Value(
        one.reads | other.reads,
        one.live | other.live,
        same=one.same if one.same == other.same else None,
        zero=one.zero and other.zero,
        nil=one.nil or other.nil,
    )
    return _chosen([one, other], joined)


def under(asked: Value, value: Value) -> Value:
    """What comes out depends on what was asked too, unless it comes out either way."""
    if value.same is not None:
        return value
    return value._replace(reads=value.reads | asked.reads, live=value.live | asked.live)


def _makes_zero(name: str, ins: list[Value]) -> bool:
    if name in ("mul", "dot_general"):
        return any(each.zero for each in ins)
    if name in ("div", "integer_pow"):
        return ins[0].zero
    if name == "select_n":
        return all(each.zero for each in ins[1:])
    return name in _ALL_ZERO and bool(ins) and all(each.zero for each in ins)


def union(bits: Iterable[int]) -> int:
    """The inputs in any of them."""
    return reduce(or_, bits, 0)


def alike_avals(before: Any, after: Any) -> bool:
    """Whether two types are one but for weakness and place."""
    return bool(before.shape == after.shape and before.dtype == after.dtype)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def is_zero(value: Any) -> bool:
    """Tells a literal that is zero; a key is none."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return False
    return np.ndim(value) == 0 and bool(value == 0)
