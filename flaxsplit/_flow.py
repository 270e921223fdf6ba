"""What a traced step does with its inputs: which of them each output reads, is, or adds to; what is drawn from keys.

One walk over the jaxpr, forward. A value is known by the inputs that it depends on, as the bits of a number.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax

from ._describe import describe
from ._upstream import bare, lines_of, scan_sizes
from ._values import KEPT, Value, alike_avals, either, is_zero, result_of, under, union


class Draw(NamedTuple):
    """Random bits made of a key, or the splitting of one.

    Attributes:
        lines: the places in Python that it was called from, the innermost first, those of libraries left out.
        branches: the branches that it is in, by the number of their `cond`.
    """

    reads: int
    number: Any
    shape: tuple[int, ...] | None
    lines: tuple[Any, ...]
    branches: tuple[tuple[int, int], ...]


class Cast(NamedTuple):
    """A value cast to another dtype and, nothing done with it, back."""

    words: str
    bytes: int


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
        draws: what was drawn from keys, in the order of the program.
        casts: what was cast back and forth.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.touched, self.remade, self.draws, self.casts = 0, 0, list[Draw](), list[Cast]()
        self._fresh, self._quiet = itertools.count(), 0
        self._branches, self._calls = dict[int, int](), list[Any]()
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
            return self._called(eqn, bodies[0], ins)
        self._note(name, eqn, ins)
        return [result_of(name, eqn, ins, var, self._number(name, eqn, ins)) for var in eqn.outvars]

    def _called(self, eqn: Any, body: Any, ins: list[Value]) -> list[Value]:
        again = eqn.primitive.name in _REMAT
        self._quiet += again  # what is computed again draws the same bits again, as it should
        self._calls.append(eqn)
        outs = self._through(body, ins)
        self._calls.pop()
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
        number, branches = next(self._fresh), list[list[Value]]()
        for i, body in enumerate(bodies):
            self._branches[number] = i
            branches.append(self._through(body, rest))
        del self._branches[number]
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
        if self._quiet:
            return
        if name in ("random_bits", "random_split") and ins[0].number is not None:
            shape = tuple(eqn.outvars[0].aval.shape) if name == "random_bits" else None
            self.draws.append(Draw(ins[0].reads, ins[0].number, shape, self._lines(eqn), (*self._branches.items(),)))
        if name == "convert_element_type" and ins[0].was == eqn.outvars[0].aval.dtype:
            before, after = eqn.invars[0].aval, eqn.outvars[0].aval
            words = f"{describe(after)} -> {before.dtype} -> {after.dtype}"
            self.casts.append(Cast(words, int(before.size * before.dtype.itemsize)))

    def _lines(self, eqn: Any) -> tuple[Any, ...]:
        """From where bits are drawn; functions of `jax.random` are jitted, and what is in them is of the first call."""
        stack = [*self._calls, eqn]
        first = next((i for i, each in enumerate(stack) if _is_sampler(each)), len(self._calls))
        return tuple(line for each in reversed(stack[: first + 1]) for line in lines_of(each))

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


def _is_sampler(eqn: Any) -> bool:
    return hasattr(jax.random, str(eqn.params.get("name")).removeprefix("_"))
