"""Refusals of what takes variables apart and puts them together: halves, filters, overlaps."""

import difflib
from collections.abc import Mapping
from typing import Any

from flaxsplit._describe import describe
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError
from flaxsplit._paths import Path, joined

_SPLIT = "split_params(variables)"
_TRAINABLE = "split_params(trainable=...)"

# ---- split_params, merge_state

NO_MAPPING = Refusal(
    SignatureError,
    _SPLIT,
    "variables must be a mapping {collection: tree}",
    "something else than what module.init returns was passed",
    "split_params(module.init(key, x))",
)
_NO_PARAMS = Refusal(
    CollectionError,
    _SPLIT,
    "variables must have a 'params' collection",
    "variables['params'] was passed instead of variables, or the model has no params",
    "split_params(module.init(key, x)), or split_params({'params': {}, **variables})",
)
_NO_TREE = _NO_PARAMS.but(
    required="variables['params'] must be a mapping",
    cause="an array, a list or another object is there, which has no names",
    fix="split_params({'params': {'w': variables['params']}}), so that each param has a name",
)


@Guess
def NO_PARAMS(variables: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """No params, or params that are no tree of names."""
    if "params" in variables:
        return _NO_TREE(f"variables['params']: {describe(variables['params'])}")
    return _NO_PARAMS(f"collections: {sorted(map(str, variables))}")


_WRAPPED_TWICE = Refusal(
    CollectionError,
    _SPLIT,
    "'params' must hold the params themselves",
    "variables were wrapped in {'params': ...} once too often",
    "split_params(variables['params'])",
)


@Guess
def WRAPPED_TWICE(tree: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """Variables in variables, or a model that calls its only submodule `params`."""
    return _or_renamed(_WRAPPED_TWICE, tree)(f"variables['params']: {_names(tree)}")


def _names(tree: Any) -> list[str]:
    return sorted(map(str, tree))


def _or_renamed(row: Refusal, tree: Any) -> Refusal:
    """Where `'params'` is alone, its name cannot say whether it is a collection or a submodule."""
    if [*tree] != ["params"]:
        return row
    return row.but(
        cause=f"{row.cause}, or the only submodule of the model is named 'params'",
        fix=f"{row.fix}; or another name for the submodule",
    )


OVERLAP = Refusal(
    CollectionError,
    "merge_state(params, state)",
    "each param must be in params or in state['params'], not in both",
    "params and state come from different calls of split_params, or params were merged before",
    "params, state = split_params(variables, trainable=...); merge_state(params, state)",
)

# ---- the two halves of any call

NO_HALF = Refusal(
    SignatureError,
    "$where",
    "$half must be a mapping",
    "params or state was forgotten, or the arguments are in another order",
    "$call",
)
SWAPPED = Refusal(CollectionError, "$where", "params come first, then state", "params and state were swapped", "$call")
_VARIABLES = Refusal(
    CollectionError,
    "$where",
    "params must be the params themselves",
    "variables were passed where params are wanted",
    "params, state = split_params(variables)",
)


@Guess
def VARIABLES(params: Any, where: str) -> Explained:  # noqa: N802
    """Variables in the place of params."""
    return _or_renamed(_VARIABLES, params)(f"params: {_names(params)}", where=where)


# ---- trainable

NO_FILTER = Refusal(
    SignatureError,
    _TRAINABLE,
    "a glob, a predicate (path, leaf) -> bool, a tree of bools, or a list of these",
    "something else was passed",
    "split_params(variables, trainable='head/*')",
)
MASK = Refusal(
    CollectionError,
    _TRAINABLE,
    "a tree of bools must have the structure of the params, and at least one True",
    "the mask was made for other params",
    "trainable=jax.tree.map(lambda leaf: ..., variables['params'])",
)
NO_BOOL = Refusal(
    SignatureError,
    _TRAINABLE,
    "every leaf of the mask must be one bool",
    "arrays or strings where bools are due, or two answers for one boxed param",
    "trainable=jax.tree.map(lambda leaf: leaf.ndim > 1, variables['params'])",
)
_NOTHING = Refusal(CollectionError, _TRAINABLE, "the filter must match at least one param", "$cause", "$fix")


@Guess
def NOTHING_CHOSEN(trainable: Any, leaves: Mapping[Path, Any]) -> Explained:  # noqa: N802 (a row as the others are)
    """A filter that matches nothing, with the paths that come near to it."""
    if not leaves:
        cause = "there are no params to choose from"
        return _NOTHING("no params", cause=cause, fix="split_params(variables)")
    paths = [joined(path) for path in leaves]
    if isinstance(trainable, str) and trainable.startswith("!"):
        start = trainable.lstrip("!").rstrip("*")
        cause = "a glob has no '!': it chooses what is trained, and nothing takes away from it"
        fix = f"trainable=lambda path, leaf: not path.startswith({start!r})"
        return _NOTHING(f"{trainable!r} matches none of {len(paths)}", cause=cause, fix=fix)
    branches = {joined(path[:end]) + "/*" for path in leaves for end in range(1, len(path))}
    asked = trainable if isinstance(trainable, str) else ""
    near = difflib.get_close_matches(asked, [*sorted(branches), *paths], n=3, cutoff=0.5)
    shown, cause = f"an empty {describe(trainable)}", "the filters were lost on the way"
    if asked:
        shown, cause = repr(trainable), "a misspelt path"
    elif callable(trainable):
        shown, cause = "the predicate", "the predicate takes (path, leaf), the path joined by '/'"
    some = f"{', '.join(map(repr, paths[:3]))}{', ...' if len(paths) > 3 else ''}"
    fix = f"did you mean {' or '.join(map(repr, near))}?" if near else "a glob on the '/'-joined path: 'head/*'"
    return _NOTHING(f"{shown} matches none of {len(paths)}: {some}", cause=cause, fix=fix)
