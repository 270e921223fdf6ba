"""What depends on the words or the inside of another library, in one place, each with what would replace it."""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from flax import core

reshard: Any = getattr(jax.sharding, "reshard", None) or importlib.import_module("jax.experimental.shard").reshard
"""Of jax < 0.7 in another place."""

_CORES = [importlib.import_module(name) for name in ("jax.extend.core", "jax.core")]
_trace_state: Any = next(each.get_opaque_trace_state for each in _CORES if hasattr(each, "get_opaque_trace_state"))
"""Of jax < 0.7 in another place too."""


def current_trace() -> Any:
    """What tells one trace from another; Flax asks for it too."""
    return _trace_state(convention="flax")


def is_traced_with(value: Any, other: Any) -> bool:
    """Whether one transformation traces both, as `jax.grad` does with all that comes of what it differentiates."""
    return getattr(value, "_trace", None) is getattr(other, "_trace", None)


def is_about_out_axes(error: ValueError) -> bool:
    """Whether `jax.vmap` refuses an output that is mapped. An error class of its own would replace this."""
    return "out_axes" in str(error)


def is_about_explicit(error: Exception) -> bool:
    """Whether JAX was not told where a result lies, axes being Explicit. A public error class would replace this."""
    of_vmap = isinstance(error, ValueError) and "passed to vmap" in str(error) and "shard" in str(error)
    return type(error).__name__ == "ShardingTypeError" or of_vmap or is_about_meshes(error)


def is_about_meshes(error: Exception) -> bool:
    """Whether what an operation takes lies on two meshes of Explicit axes."""
    return isinstance(error, ValueError) and str(error).startswith("Mesh for all inputs should be equal")


def is_about_devices(error: Exception) -> bool:
    """Whether what a program takes was put on other devices than the program, or the rest of it, runs on."""
    return "incompatible devices" in str(error)


def is_about_mask(error: Exception) -> bool:
    """Whether the choice between two arrays lies elsewhere than they do."""
    return str(error).startswith("select ")


def varying_axes(value: Any) -> tuple[Any, ...]:
    """The axes of an enclosing `shard_map` along which a value differs, if checked. JAX names it by version."""
    aval: Any = jax.typeof(value)
    newer = getattr(getattr(aval, "manual_axis_type", None), "varying", ())
    return tuple(sorted(getattr(aval, "vma", None) or newer))


def is_under_pmap() -> bool:
    """Whether `jax.pmap` traces, where it is `jax.jit` of a `shard_map`. A public name would replace this."""
    calls = (frame.f_code for frame, _ in traceback.walk_stack(None))
    return any(code.co_name == "_fun" and code.co_filename.endswith("pmap.py") for code in calls)


# Flax says which variable it means in a sentence alone. Attributes of its errors would replace these five.


def first_sentence(error: Exception) -> str:
    """What Flax says, without the address of its page."""
    return str(error).split(" (http")[0]


def stream_in(error: Exception) -> str | None:
    """The PRNG stream that a model draws from; None where Flax could not read the rngs at all."""
    return _quoted(r'needs PRNG for "([^"]+)"', error)


def is_about_rngs(error: ValueError) -> bool:
    """Whether Flax refuses a dict of rngs, which it does by a plain ValueError."""
    return "``rngs`` argument" in str(error)


def collection_in(error: Exception) -> str:
    """The collection that a model reads or writes."""
    return _quoted(r'collection "([^"]+)"', error) or "params"


def unbound_axis_in(error: Exception) -> str | None:
    """The name of an axis that nothing binds."""
    found = re.search(r"unbound axis name:? ['\"]?(\w+)", str(error))
    return found[1] if found else None


def is_nnx(fn: Any) -> bool:
    """Whether this is a module of NNX, which is not imported to be asked."""
    return any(base.__module__.startswith("flax.nnx") for base in type(fn).__mro__)


def place_in(error: Exception) -> str:
    """The module that reads or writes, by its path."""
    return repr(_quoted(r'" in "([^"]+)"', error) or "/")


def is_about_shape(error: Exception, shape: tuple[int, ...]) -> bool:
    """Whether JAX could not broadcast an array of this shape. Its error says no more than the shapes."""
    return "ncompatible shapes" in str(error) and str(shape) in str(error)


def param_in(error: Exception) -> tuple[str, str] | None:
    """The name of a param and its module; the rest of the sentence differs by version."""
    found = re.search(r'parameter "([^"]+)" in "([^"]+)"', str(error))
    return (found[1], found[2]) if found else None


def _quoted(pattern: str, error: Exception) -> str | None:
    found = re.search(pattern, str(error))
    return found[1] if found else None


_NN_APPLY: Any = getattr(core.apply(lambda scope: scope), "__code__", None)


def is_nn_apply(fn: Any) -> bool:
    """Whether `nn.apply` made this function."""
    return getattr(fn, "__code__", None) is _NN_APPLY


def reopened(fn: Any) -> Callable[..., Any]:
    """Takes what `nn.apply` made out of its closure: it fixed `mutable`, which the state alone decides here.

    An argument `mutable=` of what it makes would replace this.
    """
    inner = dict(zip(fn.__code__.co_freevars, (cell.cell_contents for cell in fn.__closure__), strict=True))

    def apply(variables: Any, *args: Any, mutable: Any, **kwargs: Any) -> Any:
        return core.apply(inner["fn"], mutable=mutable, flags=inner.get("flags"))(variables, *args, **kwargs)

    return apply


# What the jaxprs of JAX say of their own equations differs by version. Documented params would replace these two.


def scan_sizes(params: dict[str, Any]) -> tuple[int, int] | None:
    """How many of the operands of a scan are constants, and how many the carry; None where JAX says it anew."""
    if "num_carry" in params:  # jax < 0.11
        return params["num_consts"], params["num_carry"]
    try:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    except (KeyError, AttributeError, TypeError, ValueError):
        return None


def bare(jaxpr: Any) -> Any:
    """A jaxpr without its constants; JAX has one class for both since 0.11."""
    return getattr(jaxpr, "jaxpr", jaxpr)


_LIBRARIES = ("jax", "flax", "equinox", "haiku", "optax", "flaxsplit")


def lines_of(eqn: Any) -> tuple[Any, ...]:
    """Where in Python an operation was called, the innermost first, libraries left out.

    A public `user_frames(eqn)` would replace this; JAX has a private one, by lines and not by places within them.
    """
    held: Any = getattr(eqn.source_info, "traceback", None)
    codes, places = held.raw_frames() if held is not None else ((), ())
    known = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    theirs = tuple(os.path.dirname(each) + os.sep for each in known if each)
    frames = zip(codes, places, strict=True)
    return tuple((code, place) for code, place in frames if not code.co_filename.startswith(theirs))
