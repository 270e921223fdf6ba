"""See what the compiler does: how often a function is traced and compiled, and what changed."""

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import jax

from ._again import Traced
from ._caller import caller
from ._checks import check_count, checked
from ._describe import abstract
from ._refusals.watch import REMADE, RETRACED, TRACED, UNPLACED
from ._unplaced import plain_name, unplaced_into
from ._wraps import name_of

P = ParamSpec("P")
R = TypeVar("R")

_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_CONFIG: Any = jax.config  # its flags are attributes that no checker sees


@checked
def assert_max_traces(fn: Callable[P, R], max_traces: int = 1) -> Callable[P, R]:
    """Raises an error if `fn` is traced more than `max_traces` times, with a table of what changed.

    Law: `jit_step(assert_max_traces(step))` computes what `jit_step(step)` does, in the same time: it counts while
    tracing, and adds nothing to the compiled step. Under `jax.disable_jit` nothing is traced or counted.
    A step that is made anew for each epoch has a count of its own; it is recognised by its code, and told.

    >>> import jax, jax.numpy as jnp, flaxsplit as fs
    >>> double = jax.jit(fs.assert_max_traces(lambda x: 2 * x))
    >>> double(jnp.ones(3)).shape, double(jnp.zeros(3)).shape
    ((3,), (3,))

    Args:
        fn: the function to jit.
        max_traces: how many traces are allowed: one for each signature that you need.

    Returns:
        `fn`, with its traces counted.

    Raises:
        RetraceError: at one trace more; names each leaf and static value that differs from the nearest earlier trace.

    Warns:
        RetraceWarning: more than `max_traces` functions that this very line made, of the same code over equal values,
            were traced with equal arguments. Other models, hyperparameters or sizes are other values.

    As `chex.assert_max_traces`, but it says why.
    """
    TRACED.unless(callable(fn), fn=fn)
    check_count("assert_max_traces(fn, max_traces=...)", max_traces)
    seen: list[dict[str, Any]] = []
    lock, line = threading.Lock(), caller()
    one = Traced(fn, line)

    @functools.wraps(fn)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        if _CONFIG.jax_disable_jit:
            return fn(*args, **kwargs)
        call = {name: abstract(value) for name, value in _named(fn, args, kwargs).items()}
        with lock:
            RETRACED.unless(len(seen) < max_traces, fn, seen, call, max_traces)
            seen.append(call)
        if one.again(call) > max_traces:
            REMADE.warn(name_of(fn), max_traces, at=line)
        return fn(*args, **kwargs)

    return counted


def _named(fn: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        bound = inspect.signature(fn).bind(*args, **kwargs)
    except (TypeError, ValueError):  # no signature, or a wrong call: then fn itself complains
        return {**{f"args[{i}]": arg for i, arg in enumerate(args)}, **kwargs}
    return dict(bound.arguments)


@dataclass
class CompileLog:
    """What was traced and compiled while the log was open, by function name.

    Attributes:
        traces: traces of each function, functions inside it included.
        compiles: backend compiles of each function.
        trace_seconds: time spent tracing it, in seconds.
        compile_seconds: time spent in the backend compiler, in seconds.
        unplaced: arguments of each function that nobody placed beside others on a mesh, so every device has them whole
            and computes all of them.
    """

    traces: Counter[str] = field(default_factory=Counter)
    compiles: Counter[str] = field(default_factory=Counter)
    trace_seconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    unplaced: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            f"{self.traces[name]:6d} {self.trace_seconds.get(name, 0):9.3f} {self.compiles[name]:8d} "
            f"{self.compile_seconds.get(name, 0):10.3f}  {name}"
            for name in sorted(self.traces | self.compiles)
        ]
        lines = [UNPLACED.format(name, self.unplaced[name]) for name in sorted(self.unplaced)]
        return "\n".join(["traces   seconds compiles    seconds  function", *rows, *lines])


@contextmanager
def compile_log() -> Generator[CompileLog, None, None]:
    """Counts traces and backend compiles, by function, with seconds.

    Law: `log.compiles` counts the compiles between enter and exit, of any thread; logs may be nested.

    >>> import jax, jax.numpy as jnp, flaxsplit as fs
    >>> def double(x):
    ...     return 2 * x
    >>> with fs.compile_log() as log:
    ...     _ = jax.jit(double)(jnp.ones(3))
    >>> log.traces["double"], log.compiles["double"]
    (1, 1)

    Yields:
        A `CompileLog`, filled while open and kept afterwards. `print(log)` shows a table.

    Below the table it says which arguments each device of a mesh has whole because nobody placed them, such as a batch
    from a loader: `jit_step(step, like=carry, batch=sharding)` splits it. It reads `jax.monitoring` and JAX's log of
    compiles: it patches nothing, and does not run at a dispatch that compiles nothing. The names are JAX's: for a
    function under `jax.pmap` the name is `_fun`.
    """
    log, lock, open_ = CompileLog(), threading.Lock(), threading.Event()
    open_.set()

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event not in (_TRACE, _COMPILE) or not open_.is_set():
            return
        name = plain_name(str(details.get("fun_name", "?")))
        counts, times = (log.traces, log.trace_seconds) if event == _TRACE else (log.compiles, log.compile_seconds)
        with lock:
            counts[name] += 1
            times[name] = times.get(name, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with unplaced_into(log.unplaced):
            yield log
    finally:
        open_.clear()
        if hasattr(jax.monitoring, "unregister_event_duration_listener"):  # jax >= 0.8; a closed one stays deaf before
            jax.monitoring.unregister_event_duration_listener(listen)
