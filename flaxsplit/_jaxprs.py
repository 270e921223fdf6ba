"""Reading what was traced: where a result comes from, and which arguments a result needs."""

from collections.abc import Iterable
from typing import Any

from jax.extend.core import Literal

from ._upstream import bare


def source(jaxpr: Any, var: Any) -> Any:
    """Follows a result back through calls that only hand it on; gives the input that it is, if it is one."""
    made = {each: eqn for eqn in jaxpr.eqns for each in eqn.outvars}
    while not isinstance(var, Literal) and var in made:
        eqn = made[var]
        if (inner := _called(eqn)) is None:
            return None
        found = source(inner, inner.outvars[eqn.outvars.index(var)])
        if found not in inner.invars:
            return None
        var = eqn.invars[inner.invars.index(found)]
    return None if isinstance(var, Literal) else var


def needed(jaxpr: Any, results: Iterable[Any]) -> set[Any]:
    """The variables that some results are computed from. What a call or a loop takes and does not use is none."""
    live = {var for var in results if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not live.isdisjoint(eqn.outvars):
            live.update(var for var in _used_by(eqn) if not isinstance(var, Literal))
    return live


def _used_by(eqn: Any) -> list[Any]:
    inner = _called(eqn)
    if inner is None or len(inner.invars) != len(eqn.invars):
        return list(eqn.invars)
    used = needed(inner, inner.outvars)
    return [var for var, own in zip(eqn.invars, inner.invars, strict=True) if own in used]


def _called(eqn: Any) -> Any:
    """What an equation runs with its own arguments: closed in `nnx.jit`, open in `nnx.remat` and `nnx.custom_vjp`."""
    called = next((eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params), None)
    return bare(called)
