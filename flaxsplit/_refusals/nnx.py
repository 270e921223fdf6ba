"""Refusals of `from_nnx`."""

import contextlib
import difflib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

from flaxsplit._describe import ABSENT, Difference, describe
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError, StateDriftError, said
from flaxsplit._paths import Path, joined, keyed

from .options import form

# ---- the module


@Guess
def MODULE(where: str, module: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """What is no module, or one of Flax's other API."""
    came, cause = describe(module), "what nnx.split returns was passed, or another object"
    fix = "from_nnx(nnx.merge(graphdef, state))"
    if isinstance(module, type):
        came, cause, fix = f"the class {module.__name__}", "the module was not constructed", f"{module.__name__}(...)"
    elif isinstance(module, nn.Module):
        came, cause = f"{type(module).__name__}, a Linen module", "it belongs to Flax's other API"
        fix = "with_mutable(module), or nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=rngs), x)"
    return SignatureError(where, "module must be an instance of nnx.Module", [f"module: {came}"], cause, fix)


_METHOD = form(
    "from_nnx(method=...)", "method must be a function of the module", "from_nnx(module, method=Model.decode)"
)


@Guess
def METHOD(method: Any, module: Any) -> Explained:  # noqa: N802
    """What is no function; the name of one is said as it was written."""
    if not isinstance(method, str):
        return _METHOD(f"method: {said(method)}")
    kind = type(module)
    names = [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]
    near = difflib.get_close_matches(method, names, n=1, cutoff=0.7)
    row = _METHOD.but(cause="a name was passed, and not the function", fix=f"from_nnx(module, method={kind.__name__}.")
    if hasattr(kind, method):
        return row.but(fix=f"{row.fix}{method})")(f"method: {method!r}")
    fix = f"{row.fix}{near[0]})" if near else _METHOD.fix
    return row.but(fix=fix)(f"method: {method!r}, which {kind.__name__} does not have")


WITHOUT_VALUE = Refusal(
    SignatureError,
    "from_nnx(module)",
    "every variable must have a value",
    "the module was made by nnx.eval_shape and not filled",
    "from_nnx(Model(..., rngs=nnx.Rngs(0))), or nnx.update(module, state) before",
)
REFERENCES = Refusal(
    SignatureError,
    "$where",
    "every variable must hold a value: an array, or a number",
    "the module was made with ref=True or hijax=True, and a call would write into what the caller holds",
    "with nnx.var_defaults(ref=False, hijax=False): module = Model(..., rngs=nnx.Rngs(0))",
)
UNFIT = Refusal(
    CollectionError,
    "$where",
    "params and state must hold each variable of the module and no other (module -> given)",
    "they are of another architecture, or a part was lost",
    "fn, params, state = from_nnx(module), and to_nnx with this module",
)

# ---- a call


@Guess
def OTHER_VARIABLES(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Explained:  # noqa: N802
    """Variables that a call added or removed, each slot with its array."""
    come = [slot for slot in after if slot not in before]
    gone = [slot for slot in before if slot not in after]
    lines = [Difference(keyed(slot.place, "state"), ABSENT, describe(after[slot])) for slot in come]
    lines += [Difference(keyed(slot.place, "state"), describe(before[slot]), ABSENT) for slot in gone]
    kind = _kind_named(min((slot.collection for slot in come), default="intermediates"))
    return StateDriftError(
        "from_nnx(module)",
        "a call must leave the module with the variables that it had",
        [*map(str, lines)],
        "self.sow, or a variable made in __call__",
        f"make it in __init__, or hand it out: from_nnx(m, method=lambda m, x: (m(x), nnx.pop(m, {kind})))",
    )


def _kind_named(collection: str) -> str:
    """The type of variable that a collection is of, as its user writes it."""
    try:
        kind = nnx.variable_type_from_name(collection)
    except (ValueError, AttributeError):  # named by its class; or an older flax, which knows no way back
        return collection
    return f"nnx.{kind.__name__}" if hasattr(nnx, kind.__name__) else kind.__name__


@Guess
def OTHER_ATTRIBUTES(before: tuple[Any, Any], after: Any) -> Explained:  # noqa: N802
    """Python attributes that a call changed. NNX would compile again for each of their values."""
    old, new = dict(_attributes(nnx.merge(*before))), dict(_attributes(after))
    paths = [path for path in old | new if old.get(path, ABSENT) != new.get(path, ABSENT)]
    return StateDriftError(
        "from_nnx(module)",
        "a call must leave the module's attributes as they were",
        [f"{path}: {old.get(path, ABSENT)} -> {new.get(path, ABSENT)}" for path in paths] or ["the graph of modules"],
        "a counter or a mode kept in a Python attribute",
        "keep it in a variable, nnx.Variable(jnp.zeros((), jnp.int32)); change modes before from_nnx",
    )


def _attributes(module: Any) -> Iterator[tuple[str, str]]:
    for path, node in nnx.iter_graph(module):
        for name, value in vars(node).items() if isinstance(node, nnx.Module) else ():
            if isinstance(value, int | float | str | None):
                yield ".".join(map(str, ("module", *path, name))), repr(value)


_WRITTEN = Refusal(
    CollectionError,
    "from_nnx(trainable=...)",
    "params are the optimizer's to change",
    "the module keeps in a param what it computes: a normalized kernel, which is to be trained, or an average, which "
    "is state",
    "for a kernel, from_nnx(module, method=call), with def call(m, x): before = jax.tree.map(lambda leaf: leaf, "
    "nnx.state(m, nnx.Param)); out = m(x); nnx.update(m, before); return out. For an average, trainable=nnx.All("
    "nnx.Param, lambda path, _: '/'.join(map(str, path)) not in $paths)",
)


@Guess
def WRITTEN(paths: Sequence[Path]) -> Explained:  # noqa: N802
    """Params that a call wrote. What is to be done differs by what they are, which only the caller knows."""
    lines = [f"{keyed(path, 'params')}: written in the call" for path in paths]
    return _WRITTEN(*lines, paths=[joined(path) for path in paths])


# ---- trainable

_TRAINABLE = "from_nnx(trainable=...)"


@contextlib.contextmanager
def said_of_a_module() -> Generator[None]:
    """Says of a module's params what `split_params` says of variables."""
    try:
        yield
    except (CollectionError, SignatureError) as error:
        fix = error.fix.replace("variables['params']", "params").replace("split_params(variables)", "from_nnx(module)")
        raise type(error)(_TRAINABLE, error.required, error.leaves, error.cause, fix) from None


NO_FILTER = Refusal(
    SignatureError,
    _TRAINABLE,
    "one of NNX's filters, a glob, a tree of bools, or a list of these",
    "something else was passed",
    "from_nnx(module, trainable=nnx.Param)",
)
RIGID = Refusal(
    CollectionError,
    _TRAINABLE,
    "every param must be differentiable: of a floating or complex dtype",
    "the filter chooses more than params",
    "trainable=nnx.All(nnx.Param, ...) with the filter for ...",
)
_NOTHING = Refusal(
    CollectionError,
    _TRAINABLE,
    "the filter must choose at least one variable",
    "another type, or a path that the module does not have",
    "from_nnx(module, trainable=nnx.Param)",
)


@Guess
def NOTHING_CHOSEN(trainable: Any, held: set[str], count: int, bridged: bool) -> Explained:  # noqa: N802
    """A filter of NNX's that chooses nothing; of a module without params the default takes all as state."""
    shown = trainable.__name__ if isinstance(trainable, type) else describe(trainable)
    if held:
        return _NOTHING(f"{shown} matches none of {count} arrays, which are of {', '.join(sorted(map(repr, held)))}")
    if bridged:
        row = _NOTHING.but(
            cause="a bridged module that was not initialized",
            fix="from_nnx(nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), x))",
        )
    else:
        row = _NOTHING.but(cause="nothing of this module can be trained", fix="from_nnx(module)")
    return row("the module has no variables")
