"""Which operations a jaxpr holds, however deep: matmuls and convolutions by dtype, and calls back into Python."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ._describe import describe
from ._flow import inner_of
from ._upstream import bare

_CALLBACKS = {"pure_callback", "io_callback", "debug_callback", "debug_print"}


class Product(NamedTuple):
    """A matmul or convolution, with the FLOPs of all its turns on all devices."""

    words: str
    dtype: str
    flops: int


def products(jaxpr: Any) -> list[Product]:
    """Lists matmuls and convolutions."""
    return [
        Product(_words(eqn), _dtype(eqn), _flops(eqn) * times)
        for eqn, times in equations(jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    ]


def callbacks(jaxpr: Any) -> list[str]:
    """Lists calls back into Python by name."""
    return [eqn.primitive.name for eqn, _ in equations(jaxpr) if eqn.primitive.name in _CALLBACKS]


def constants(jaxpr: Any) -> list[Any]:
    """Lists the arrays that a jaxpr closes over, and those within it, each once."""
    held = {id(each): each for each in getattr(jaxpr, "consts", ())}
    for eqn in bare(jaxpr).eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(bare(inner), "eqns"):
                    held |= {id(each): each for each in constants(inner)}
    return [*held.values()]


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation, with how often it runs: a scan repeats what it holds, a `shard_map` runs it on each device."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        for inner in inner_of(eqn.params):
            yield from equations(inner, times * _turns(eqn))


def _turns(eqn: Any) -> int:
    if eqn.primitive.name == "scan":
        return int(eqn.params["length"])
    if eqn.primitive.name == "shard_map":
        mesh, automatic = eqn.params["mesh"], eqn.params.get("auto", ())  # jax < 0.7 names the others
        axes = eqn.params.get("manual_axes", set(mesh.axis_names) - set(automatic))
        return int(math.prod(mesh.shape[name] for name in axes))
    return 1


def _words(eqn: Any) -> str:
    left, right = (describe(atom.aval) for atom in eqn.invars)
    return f"{eqn.primitive.name}: {left}, {right}"


def _dtype(eqn: Any) -> str:
    """The widest of the two operands."""
    return str(max((atom.aval.dtype for atom in eqn.invars), key=lambda dtype: dtype.itemsize))


def _flops(eqn: Any) -> int:
    left, right, (out,) = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars
    if eqn.primitive.name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0][0]
        return 2 * int(math.prod(out.aval.shape)) * int(math.prod(left.shape[i] for i in contracted))
    features = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * int(math.prod(out.aval.shape)) * int(math.prod(right.shape[:features] + right.shape[features + 1 :]))
