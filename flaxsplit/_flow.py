"""What a traced step does with its inputs: which of them each output reads, is, or adds to; what is drawn from keys.

One walk over the jaxpr, forward. A value is known by the inputs that it depends on, as the bits of a number.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._upstream import scan_sizes


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
    """

    reads: int = 0
    live: int = 0
    same: int | None = None
    zero: bool = False
    nil: bool = False
    base: int | None = None
    added: int = 0
    number: Any = None


class Draw(NamedTuple):
    """Random bits made of a key, or the splitting of one."""

    reads: int
    number: Any
    shape: tuple[int, ...] | None


_KEPT = {"convert_element_type", "copy", "copy_p", "reshape", "sharding_constraint", "reshard", "optimization_barrier"}
_KEYS = {"random_split", "random_fold_in", "random_wrap", "random_unwrap", "slice", "squeeze", "dynamic_slice"}
_ALL_ZERO = {
    *("add", "sub", "add_any", "max", "min", "neg", "abs", "sign", "sqrt", "square", "real", "reduce_sum", "transpose"),
    *("broadcast_in_dim", "squeeze", "slice", "rev", "concatenate", "pad", "cumsum", "psum", "expand_dims", *_KEPT),
}
_REMAT = {"checkpoint", "remat", "remat2"}


def inner_of(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner


class Flow:
    """Follows every value through a jaxpr.

    Attributes:
        outs: what is known of each output.
        touched: the inputs that any operation reads, also one whose result goes nowhere.
        draws: what was drawn from keys.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.touched, self.draws = 0, set[Draw]()
        self._fresh, self._quiet = itertools.count(), 0
        inputs = [Value(1 << i, 1 << i, same=i, number=("in", i)) for i in range(len(jaxpr.invars))]
        self.outs = self._through(jaxpr, inputs)

    def _through(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def of(atom: Any) -> Value:
            return Value(zero=_is_zero(atom.val)) if hasattr(atom, "val") else known.get(atom, Value())

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, list(map(of, eqn.invars))), strict=True))
        return list(map(of, jaxpr.outvars))

    def _equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
        name, bodies = eqn.primitive.name, list(inner_of(eqn.params))
        if name == "scan" and (sizes := scan_sizes(eqn.params)):
            return self._scan(bodies[0], ins, *sizes)
        if name == "while":
            return self._while(eqn.params, ins)
        if name == "cond":
            return self._cond(bodies, ins)
        if len(bodies) == 1 and _calls(bodies[0], eqn):
            return self._called(bodies[0], ins, name in _REMAT)
        self.touched |= _union(value.reads for value in ins)
        self._note(name, eqn, ins)
        return [self._result(name, eqn, ins, var) for var in eqn.outvars]

    def _called(self, body: Any, ins: list[Value], again: bool) -> list[Value]:
        self._quiet += again  # what is computed again draws the same bits again, as it should
        outs = self._through(body, ins)
        self._quiet -= again
        return outs

    def _scan(self, body: Any, ins: list[Value], consts: int, carried: int) -> list[Value]:
        fixed, moving, xs = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
        rows = [value._replace(same=None, base=None, number=None) for value in xs]
        moving = self._settled(body, fixed, moving, rows)
        outs = self._through(body, [*fixed, *map(self._unnumbered, moving), *rows])
        return [*map(_either, moving, outs[:carried]), *(each._replace(same=None, base=None) for each in outs[carried:])]

    def _settled(self, body: Any, fixed: list[Value], moving: list[Value], rows: list[Value]) -> list[Value]:
        """What is known of a carry at any turn of a loop: that of the first, and of whatever a turn makes of it."""
        self._quiet += 1
        for _ in range(len(moving) + 2):
            outs = self._through(body, [*fixed, *moving, *rows])
            merged = [_either(old, new) for old, new in zip(moving, outs, strict=False)]
            if merged == moving:
                break
            moving = merged
        self._quiet -= 1
        return moving

    def _while(self, params: dict[str, Any], ins: list[Value]) -> list[Value]:
        ended, body = (getattr(params[name], "jaxpr", params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        moving = self._settled(body, ins[first:second], ins[second:], [])
        self._through(body, [*ins[first:second], *map(self._unnumbered, moving)])
        (asked,) = self._through(ended, [*ins[:first], *moving])
        return [_under(asked, value) for value in moving]

    def _cond(self, bodies: list[Any], ins: list[Value]) -> list[Value]:
        which, *rest = ins
        self.touched |= which.reads
        branches = [self._through(body, rest) for body in bodies]
        return [_under(which, reduce(_either, each)) for each in zip(*branches, strict=True)]

    def _unnumbered(self, value: Value) -> Value:
        return value if value.same is not None else value._replace(number=("turn", next(self._fresh)))

    def _note(self, name: str, eqn: Any, ins: list[Value]) -> None:
        if name in ("random_bits", "random_split") and not self._quiet:
            shape = tuple(eqn.outvars[0].aval.shape) if name == "random_bits" else None
            self.draws.add(Draw(ins[0].reads, ins[0].number, shape))

    def _result(self, name: str, eqn: Any, ins: list[Value], var: Any) -> Value:
        if name in _KEPT and len(ins) == 1 and _alike(eqn.invars[0].aval, var.aval):
            return ins[0]
        reads, live = _union(each.reads for each in ins), _union(each.live for each in ins if not each.zero)
        zero = _makes_zero(name, ins)
        shape = _shape(var)
        pairs = zip(eqn.invars, ins, strict=True)
        nil = zero or any((each.zero or each.nil) and _shape(atom) == shape for atom, each in pairs)
        value = Value(reads, 0 if zero else live, zero=zero, nil=nil, number=self._number(name, eqn, ins))
        return _sum(name, eqn, ins, value)

    def _number(self, name: str, eqn: Any, ins: list[Value]) -> Any:
        """Equal for equal keys; another one for whatever is not known to be equal."""
        if name not in _KEYS:
            return ("other", next(self._fresh))
        parts = [
            each.number if not hasattr(atom, "val") else str(atom.val)
            for atom, each in zip(eqn.invars, ins, strict=True)
        ]
        known = all(part is not None for part in parts)
        return (name, str(eqn.params), *parts) if known else ("other", next(self._fresh))


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
    added, nil = _union(case.added for case in cases), any(case.nil for case in cases)
    return value._replace(base=origins.pop(), added=added, nil=nil)


def _either(one: Value, other: Value) -> Value:
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


def _under(asked: Value, value: Value) -> Value:
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


def _calls(body: Any, eqn: Any) -> bool:
    return len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)


def _union(bits: Any) -> int:
    return reduce(or_, bits, 0)


def _alike(before: Any, after: Any) -> bool:
    return bool(before.shape == after.shape and before.dtype == after.dtype)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _is_zero(value: Any) -> bool:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return False
    return np.ndim(value) == 0 and bool(value == 0)
