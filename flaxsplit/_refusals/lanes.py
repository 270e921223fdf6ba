"""Refusals of `vmap_stateful`: options, sizes of lanes, state that differs per lane."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from flaxsplit._describe import describe, differences, shorten
from flaxsplit._errors import (
    CollectionError,
    Explained,
    Guess,
    Refusal,
    SignatureError,
    StateDriftError,
    UnsyncedStateError,
)
from flaxsplit._types import OVERWRITTEN

from .options import form, function

FORM = "fn(params, state, ...) -> (out, new_state)"
VMAP_FN = function("vmap_stateful(fn)", "fn", "vmap_stateful(with_mutable(model))")
STATE_AXES = form(
    "vmap_stateful(state_axes=...)",
    "state_axes must be {collection: axes}",
    "vmap_stateful(fn, state_axes={'batch_stats': 0})",
)
SPLIT_RNGS = form(
    "vmap_stateful(split_rngs=...)",
    "split_rngs must be a bool, or {stream: bool}",
    "vmap_stateful(fn, split_rngs={'dropout': True})",
)
NO_STREAM = Refusal(
    CollectionError,
    "vmap_stateful(split_rngs=...)",
    "every stream that is named must be among the rngs",
    "a misspelt stream, or one that the state does not have",
    "vmap_stateful(fn, split_rngs={'dropout': True})",
)
NO_COLLECTION = Refusal(
    CollectionError,
    "vmap_stateful(state_axes=...)",
    "every collection that an axis is given for must be in the state",
    "a misspelt collection, or it was not split off with the state",
    "vmap_stateful(fn, state_axes={'batch_stats': 0})",
)
_IN_AXES = Refusal(
    SignatureError,
    "vmap_stateful(in_axes=...)",
    "in_axes must have one entry per positional argument after params and state",
    "params and state were counted too, or keyword arguments were",
    "vmap_stateful(fn, in_axes=0)",
)
_COLLECTIONS = Refusal(
    StateDriftError,
    "vmap_stateful(fn)",
    "fn must return the collections that it was given",
    "a collection was dropped or added",
    "return out, {**state, 'batch_stats': new_batch_stats}",
)
_BOUND = Refusal(
    SignatureError,
    "vmap_stateful(axis_name=...)",
    "the name must be free",
    "vmap_stateful was applied twice with the same name",
    "vmap_stateful(fn, axis_name='inner_$name'), and axis_name=('$name', 'inner_$name') in the layers",
)
_SIZES = Refusal(
    SignatureError,
    "vmap_stateful(in_axes=...)",
    "all mapped axes must have one size",
    "the arguments are not of one batch, or one of them has no batch axis",
    "in_axes=(0, None) for an argument that all lanes share",
)
_NO_SIZE = _SIZES.but(
    cause="every argument was passed by keyword, or in_axes is None",
    fix="fn(params, state, x): arguments to map come by position; or axis_size=",
)
_OTHER_SIZE = _SIZES.but(
    required="all mapped axes must have the size that axis_size= says",
    cause="axis_size= is for lanes that no argument has, and here one has lanes of its own",
    fix="leave axis_size= out; or in_axes=None for an argument that all lanes share",
)


@Guess
def IN_AXES(entries: int, arguments: int) -> Explained:  # noqa: N802 (a row as the others are)
    """As many axes as there are no arguments."""
    return _IN_AXES(f"in_axes: {entries} entries, for {arguments} arguments")


@Guess
def COLLECTIONS(before: Any, after: Any) -> Explained:  # noqa: N802
    """Collections that come or go."""
    return _COLLECTIONS(*map(str, differences(dict(before), dict(after), "state")))


@Guess
def BOUND(axis_name: str) -> Explained:  # noqa: N802
    """A name of the axis that is taken."""
    return _BOUND(f"axis_name: {axis_name!r} is bound by an enclosing vmap, pmap or shard_map", name=axis_name)


@Guess
def SIZES(mapped: list[tuple[str, Any, int, int | None]], count: int | None) -> Explained:  # noqa: N802
    """Mapped axes of several sizes, the rarest first, or of another one than is said; or none."""
    often = Counter(size for *_, size in mapped)
    rare_first = sorted((each for each in mapped if not count or each[3] != count), key=lambda each: often[each[3]])
    lines = [f"{path}: {describe(leaf)}, axis {axis}" for path, leaf, axis, _ in rare_first]
    if count:
        return _OTHER_SIZE(*lines, f"axis_size: {count}")
    return _SIZES(*lines) if lines else _NO_SIZE("no axis is mapped")


@Guess
def AXES(name: str, wrong: list[Any]) -> Explained:  # noqa: N802
    """An axis that is no whole number."""
    option = {"params": "params_axes", "state": "state_axes"}.get(name, "in_axes")
    return SignatureError(
        f"vmap_stateful({option}=...)",
        "axes must be whole numbers or None, or a tree of these that begins as the argument does",
        [f"for {name}: {describe(wrong[0])}"],
        "the axes were made for another argument, or something else was passed",
        f"{option}={{'batch_stats': 0}}" if name == "state" else f"{option}=0",
    )


@Guess
def UNSYNCED(error: Exception, paths: list[str], axis_name: str | None, ensemble: bool) -> Explained:  # noqa: N802
    """Shared state that came out different per lane; an error that is about something else stays as it is."""
    if not paths:
        raise error
    return UnsyncedStateError(
        "vmap_stateful(fn)",
        "state without an axis must come out the same in every lane",
        [f"{path}: differs per lane" for path in paths],
        *_cause_and_fix(paths, axis_name, ensemble),
    )


def _cause_and_fix(mapped: Iterable[str], axis_name: str | None, ensemble: bool) -> tuple[str, str]:
    places = [path.removeprefix("state['").removesuffix("']").split("']['") for path in mapped]
    collections = list(dict.fromkeys(collection for collection, *_ in places))
    axes = f"state_axes={{{', '.join(f'{name!r}: 0' for name in collections)}}}"
    layers = shorten(list(dict.fromkeys("/".join(layers[:-1]) or "the model" for _, *layers in places)), 3)
    who = ", ".join(layers)
    if ensemble:
        cause = "params_axes makes an ensemble, and every member has its own state"
        return cause, f"vmap_stateful(fn, params_axes=..., {axes}), the state stacked like the params"
    if collections == [OVERWRITTEN]:
        fix = f"{axes} and a state with that axis; to join them, "
        fix += f"jax.tree.map(lambda leaf: leaf.max(0), new_state[{OVERWRITTEN!r}])"
        return f"each lane has fp8 scales of its own, in {who}", fix
    if collections != ["batch_stats"]:
        cause = f"what is kept is computed per lane and not averaged over the axis, in {who}"
        return cause, f"jax.lax.pmean(value, {axis_name or 'batch'!r}) there, or {axes} and a state with that axis"
    if axis_name is None:
        cause = f"the statistics of {who} are computed per lane: axis_name=None leaves nothing to average them over"
        return cause, f"vmap_stateful(fn, axis_name='batch') and nn.BatchNorm(..., axis_name='batch') in {who}"
    cause = f"{who} {'lacks' if len(layers) == 1 else 'lack'} axis_name={axis_name!r}: the statistics are per lane"
    return cause, f"nn.BatchNorm(..., axis_name={axis_name!r}) in {who}, or {axes} and a state with that axis"
