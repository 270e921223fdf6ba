"""What a traced step does with its inputs: which of them each output reads, is, or adds to; what is drawn from keys.

One walk over the jaxpr, forward. A value is known by the inputs that it depends on, as the bits of a number.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

from ._upstream import bare, scan_sizes
from ._values import KEPT, Value, alike_avals, either, is_zero, result_of, under, union


class Draw(NamedTuple):
    """Random bits made of a key, or the splitting of one."""

    reads: int
    number: Any
    shape: tuple[int, ...] | None


_KEYS = {"random_split", "random_fold_in", "random_wrap", "random_unwrap", "slice", "squeeze", "dynamic_slice"}
_REMAT = {"checkpoint", "remat", "remat2"}


def inner_of(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(bare(each), "eqns"):
                yield bare(each)


class Flow:
    """Follows every value through a jaxpr.

    Attributes:
        outs: what is known of each output.
        touched: the inputs that any operation reads, also one whose result goes nowhere.
        remade: those of which one made another value of the same type.
        draws: what was drawn from keys.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.touched, self.remade, self.draws = 0, 0, set[Draw]()
        self._fresh, self._quiet = itertools.count(), 0
        inputs = [Value(1 << i, 1 << i, same=i, number=("in", i)) for i in range(len(jaxpr.invars))]
        self.outs = self._through(jaxpr, inputs)

    def _through(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: Value(number=("const", next(self._fresh))) for var in jaxpr.constvars}

        def of(atom: Any) -> Value:
            return Value(zero=is_zero(atom.val)) if hasattr(atom, "val") else known.get(atom, Value())

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
        self._note(name, eqn, ins)
        return [result_of(name, eqn, ins, var, self._number(name, eqn, ins)) for var in eqn.outvars]

    def _called(self, body: Any, ins: list[Value], again: bool) -> list[Value]:
        self._quiet += again  # what is computed again draws the same bits again, as it should
        outs = self._through(body, ins)
        self._quiet -= again
        return outs

    def _scan(self, body: Any, ins: list[Value], consts: int, carried: int) -> list[Value]:
        fixed, moving, xs = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
        rows = [value._replace(same=None, base=None, number=("row", next(self._fresh))) for value in xs]
        moving = self._settled(body, fixed, moving, rows)
        outs = self._through(body, [*fixed, *map(self._unnumbered, moving), *rows])
        stacked = [each._replace(same=None, base=None) for each in outs[carried:]]
        return [*map(either, moving, outs[:carried]), *stacked]

    def _settled(self, body: Any, fixed: list[Value], moving: list[Value], rows: list[Value]) -> list[Value]:
        """What is known of a carry at any turn of a loop: that of the first, and of whatever a turn makes of it."""
        self._quiet += 1
        for _ in range(len(moving) + 2):
            outs = self._through(body, [*fixed, *moving, *rows])
            merged = [either(old, new) for old, new in zip(moving, outs, strict=False)]
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
        return [under(asked, value) for value in moving]

    def _cond(self, bodies: list[Any], ins: list[Value]) -> list[Value]:
        which, *rest = ins
        self.touched |= which.reads
        branches = [self._through(body, rest) for body in bodies]
        return [under(which, reduce(either, each)) for each in zip(*branches, strict=True)]

    def _unnumbered(self, value: Value) -> Value:
        return value if value.same is not None else value._replace(number=("turn", next(self._fresh)))

    def _note(self, name: str, eqn: Any, ins: list[Value]) -> None:
        self.touched |= union(value.reads for value in ins)
        for atom, value in zip(eqn.invars, ins, strict=True):
            if (
                value.same is not None
                and name not in KEPT
                and any(alike_avals(atom.aval, out.aval) for out in eqn.outvars)
            ):
                self.remade |= 1 << value.same
        if name in ("random_bits", "random_split") and not self._quiet and ins[0].number is not None:
            shape = tuple(eqn.outvars[0].aval.shape) if name == "random_bits" else None
            self.draws.add(Draw(ins[0].reads, ins[0].number, shape))

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


def _calls(body: Any, eqn: Any) -> bool:
    return len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
