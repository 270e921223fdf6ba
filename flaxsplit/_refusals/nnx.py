"""Refusals of `from_nnx`."""

import difflib
from collections.abc import Sequence
from typing import Any

from flaxsplit._describe import describe
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError, said
from flaxsplit._paths import Path, joined, keyed

from .options import form

_METHOD = form(
    "from_nnx(method=...)", "method must be a function of the module", "from_nnx(module, method=Model.decode)"
)


@Guess
def METHOD(method: Any, module: Any) -> Explained:  # noqa: N802 (a row as the others are)
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


_NOTHING = Refusal(
    CollectionError,
    "from_nnx(trainable=...)",
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
            cause="a bridged module that was not initialized", fix="from_nnx(nnx.bridge.lazy_init(module, x))"
        )
    else:
        row = _NOTHING.but(cause="nothing of this module can be trained", fix="from_nnx(module)")
    return row("the module has no variables")
