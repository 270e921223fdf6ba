"""Run it many times at once: a stateful function per example becomes one over the batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
from jax.custom_batching import custom_vmap

from ._axes import check_axis_name, is_bound
from ._checks import check_count, check_form, check_function, checked, two_of
from ._describe import describe, differences, keyed_leaves, shorten, wraps
from ._errors import CollectionError, SignatureError, StateDriftError, UnsyncedStateError
from ._rngs import draw, split_key
from ._split import check_halves
from ._types import Axes, State, StatefulT, Tree


@checked
def vmap_stateful(
    fn: StatefulT,
    *,
    in_axes: Axes = 0,
    out_axes: Any = 0,
    axis_name: str | None = "batch",
    params_axes: Any = None,
    state_axes: Mapping[str, Any] | None = None,
    split_rngs: bool | Mapping[str, bool] = True,
    axis_size: int | None = None,
    spmd_axis_name: str | tuple[str, ...] | None = None,
) -> StatefulT:
    """Maps a stateful function over its `*args`; state that no axis is given for goes in and comes out unbatched.

    Law: with a model that syncs over `axis_name`, equals the same model, without it, on the whole batch.
    Equals `jax.vmap(fn, in_axes=(None, None, 0, ...), out_axes=(0, None), axis_name="batch")` where there are no rngs.

    >>> import jax, flax.linen as nn, flaxsplit as fs
    >>> model = nn.BatchNorm(use_running_average=False, axis_name="batch")
    >>> x = jax.numpy.ones((8, 3))
    >>> params, state = fs.split_params(model.init(jax.random.key(0), x[0]))
    >>> out, state = fs.vmap_stateful(fs.with_mutable(model))(params, state, x)
    >>> out.shape, state["batch_stats"]["mean"].shape
    ((8, 3), (3,))

    Args:
        fn: a stateful function over one example.
        in_axes: as in `jax.vmap`, for `*args` alone. Keyword arguments are not mapped.
        out_axes: as in `jax.vmap`, for `out` alone.
        axis_name: what collectives such as `nn.BatchNorm(axis_name=...)` call the mapped axis.
        params_axes: axes of the params, for ensembles; shared by default.
        state_axes: `{collection: axes}`, as `variable_axes` of `nn.vmap`; what is not named is shared.
        split_rngs: whether lanes draw different keys, for all streams or by stream.
        axis_size: the number of lanes, where no argument tells.
        spmd_axis_name: as in `jax.vmap`.

    Returns:
        A stateful function over the batch.

    Raises:
        UnsyncedStateError: a shared leaf came out different per lane; names it.
        SignatureError: batch sizes differ, nothing is mapped, or `axis_name` is bound already.
        CollectionError: `state_axes` or `split_rngs` names a collection or stream that is not there.

    As `jax.vmap`, but it knows params, state and rngs apart.
    """
    check_function("vmap_stateful(fn)", "fn", fn, "vmap_stateful(with_mutable(model))")
    _check_options(axis_name, state_axes, split_rngs, axis_size, spmd_axis_name)

    @wraps(fn)
    def mapped(params: Tree, state: Tree, /, *args: Any, rngs: Any = None, **kwargs: Any) -> tuple[Any, State]:
        check_halves("vmap_stateful(fn)", params, state)
        _check_unbound(axis_name)
        axes, arg_axes = _axes_of(state, state_axes), _per_argument(in_axes, args)
        size = axis_size or _lanes(params, params_axes, state, axes, args, arg_axes)
        # with_rngs may also be inside: then the lanes must not share the keys that the state holds
        held = {name: state[name] for name in ("rngs",) if name in state and axes[name] is None}
        rest = {name: tree for name, tree in state.items() if name not in held}
        rest_axes = {name: axes[name] for name in rest}
        advanced, drawn = draw(held.get("rngs", {}))
        keys, key_axes = _lane_keys((rngs or {}, drawn), split_rngs, size)
        untouched = True

        def lane(_params: Tree, _rest: Tree, _keys: Any, *_args: Any) -> tuple[Any, State]:
            nonlocal untouched
            _state = {**_rest, "rngs": _keys[1]} if held else _rest
            _given = {} if rngs is None else {"rngs": _keys[0]}
            _result = fn(_params, _state, *_args, **_given, **kwargs)
            _out, _new_state = two_of(_result, "vmap_stateful(fn)", "fn(params, state, ...) -> (out, new_state)")
            _check_collections(_state, _new_state)
            untouched = not held or _same_leaves(_keys[1], _new_state["rngs"])
            return _out, {name: _new_state[name] for name in _rest}

        def run(function: Any, out: Any) -> Any:
            each = jax.vmap(
                function,
                in_axes=(params_axes, rest_axes, key_axes, *arg_axes),
                out_axes=out,
                axis_name=axis_name,
                axis_size=size,
                spmd_axis_name=spmd_axis_name,
            )
            return each(params, rest, keys, *args)

        try:
            out, new_rest = run(lane, (out_axes, rest_axes))
        except ValueError as error:
            if "out_axes" in str(error):  # its words depend on axis_name
                _raise_unsynced(lane, run, rest_axes, axis_name, params_axes is not None, error)
            raise
        return out, new_rest | (held if untouched else {"rngs": advanced})

    return cast(StatefulT, mapped)


def _check_options(axis_name: Any, state_axes: Any, split_rngs: Any, axis_size: Any, spmd_axis_name: Any) -> None:
    for option, name in (("axis_name", axis_name), ("spmd_axis_name", spmd_axis_name)):
        if name is not None:
            check_axis_name(f"vmap_stateful({option}=...)", option, name)
    if axis_size is not None:
        check_count("vmap_stateful(axis_size=...)", axis_size)
    fits, fix = isinstance(state_axes, Mapping | None), "vmap_stateful(fn, state_axes={'batch_stats': 0})"
    check_form("vmap_stateful(state_axes=...)", "state_axes", state_axes, fits, "{collection: axes}", fix)
    fits, fix = isinstance(split_rngs, bool | Mapping), "vmap_stateful(fn, split_rngs={'dropout': True})"
    check_form("vmap_stateful(split_rngs=...)", "split_rngs", split_rngs, fits, "a bool, or {stream: bool}", fix)


def _same_leaves(before: Any, after: Any) -> bool:
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def _lane_keys(rngs: tuple[Any, ...], split: bool | Mapping[str, bool], size: int) -> tuple[Any, Any]:
    """Gives each lane its own key of every stream that is to be split, and says which have a lane axis."""

    def wanted(name: str) -> bool:
        return split if isinstance(split, bool) else split.get(name, True)

    unknown = [] if isinstance(split, bool) else [name for name in split if not any(name in each for each in rngs)]
    if unknown:
        streams = sorted({name for each in rngs for name in each})
        raise CollectionError(
            "vmap_stateful(split_rngs=...)",
            "every stream that is named must be among the rngs",
            [f"{name!r} is not one of {streams}" for name in unknown],
            "a misspelt stream, or one that the state does not have",
            "vmap_stateful(fn, split_rngs={'dropout': True})",
        )
    keys = [{name: split_key(key, size) if wanted(name) else key for name, key in each.items()} for each in rngs]
    return tuple(keys), tuple({name: 0 if wanted(name) else None for name in each} for each in rngs)


def _axes_of(state: Tree, state_axes: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = [name for name in state_axes or {} if name not in state]
    if unknown:
        raise CollectionError(
            "vmap_stateful(state_axes=...)",
            "every collection that an axis is given for must be in the state",
            [f"{name!r} is not one of {sorted(map(str, state))}" for name in unknown],
            "a misspelt collection, or it was not split off with the state",
            "vmap_stateful(fn, state_axes={'batch_stats': 0})",
        )
    return {name: (state_axes or {}).get(name) for name in state}


def _per_argument(in_axes: Axes, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(in_axes, Sequence):
        return (in_axes,) * len(args)
    if len(in_axes) != len(args):
        raise SignatureError(
            "vmap_stateful(in_axes=...)",
            "in_axes must have one entry per positional argument after params and state",
            [f"in_axes: {len(in_axes)} entries, for {len(args)} arguments"],
            "params and state were counted too, or keyword arguments were",
            "vmap_stateful(fn, in_axes=0)",
        )
    return tuple(in_axes)


def _lanes(
    params: Tree, params_axes: Any, state: Tree, axes: Tree, args: tuple[Any, ...], arg_axes: tuple[Any, ...]
) -> int:
    """Finds the one size of all mapped axes; names every leaf where there is none or more than one."""
    roots = {"params": (params, params_axes), "state": (dict(state), axes)}
    roots |= {f"args[{i}]": (arg, arg_axes[i]) for i, arg in enumerate(args)}
    sizes = {}
    for name, (tree, prefix) in roots.items():
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
        for (keys, leaf), axis in zip(leaves, _spread(name, prefix, tree), strict=True):
            if axis is not None and leaf is not None:
                path = name + jax.tree_util.keystr(keys)
                shape = getattr(leaf, "shape", ())
                sizes[path] = (shape[axis] if -len(shape) <= axis < len(shape) else None, describe(leaf), axis)
    often = Counter(size for size, _, _ in sizes.values())
    found = set(often)
    if len(found) == 1 and None not in found:
        return int(found.pop() or 0)
    odd_first = sorted(sizes.items(), key=lambda item: often[item[1][0]])
    raise SignatureError(
        "vmap_stateful(in_axes=...)",
        "all mapped axes must have one size",
        [f"{path}: {words}, axis {axis}" for path, (_, words, axis) in odd_first] or ["no axis is mapped"],
        "the arguments are not of one batch, or one of them has no batch axis"
        if sizes
        else "every argument was passed by keyword, or in_axes is None",
        "in_axes=(0, None) for an argument that all lanes share"
        if sizes
        else "fn(params, state, x): arguments to map come by position; or axis_size=",
    )


def _is_none(node: Any) -> bool:
    return node is None


def _spread(name: str, prefix: Any, tree: Any) -> list[Any]:
    """Gives each leaf of a tree the axis that a prefix of the tree says for it."""
    try:
        axes = jax.tree.leaves(jax.tree.broadcast(prefix, tree, is_leaf=_is_none), is_leaf=_is_none)
    except ValueError:
        axes = [prefix]
    strange = [axis for axis in axes if not (axis is None or (isinstance(axis, int) and not isinstance(axis, bool)))]
    if strange:
        option = {"params": "params_axes", "state": "state_axes"}.get(name, "in_axes")
        raise SignatureError(
            f"vmap_stateful({option}=...)",
            "axes must be whole numbers or None, or a tree of these that begins as the argument does",
            [f"for {name}: {describe(strange[0])}"],
            "the axes were made for another argument, or something else was passed",
            f"{option}={{'batch_stats': 0}}" if name == "state" else f"{option}=0",
        )
    return axes


def _check_unbound(axis_name: str | None) -> None:
    if axis_name is not None and is_bound(axis_name):
        inner = f"inner_{axis_name}"
        raise SignatureError(
            "vmap_stateful(axis_name=...)",
            "the name must be free",
            [f"axis_name: {axis_name!r} is bound by an enclosing vmap, pmap or shard_map"],
            "vmap_stateful was applied twice with the same name",
            f"vmap_stateful(fn, axis_name={inner!r}), and axis_name=({axis_name!r}, {inner!r}) in the layers",
        )


def _check_collections(before: Tree, after: Tree) -> None:
    if before.keys() != after.keys():
        changed = differences(dict(before), dict(after), "state")
        raise StateDriftError(
            "vmap_stateful(fn)",
            "fn must return the collections that it was given",
            [str(each) for each in changed],
            "a collection was dropped or added",
            "return out, {**state, 'batch_stats': new_batch_stats}",
        )


def _raise_unsynced(lane: Any, run: Any, axes: Tree, axis_name: str | None, ensemble: bool, error: ValueError) -> None:
    """Runs the lanes once more, abstractly, to ask each shared leaf whether it is mapped. Returns if none is."""
    mapped: list[str] = []

    def probed(*args: Any) -> Any:
        _, new_state = lane(*args)
        leaves = keyed_leaves({name: tree for name, tree in new_state.items() if axes[name] is None}, "state")
        return _probe(mapped, list(leaves))(*leaves.values())

    jax.eval_shape(lambda: run(probed, 0))
    if not mapped:
        return
    cause, fix = _cause_and_fix(mapped, axis_name, ensemble)
    raise UnsyncedStateError(
        "vmap_stateful(fn)",
        "state without an axis must come out the same in every lane",
        [f"{path}: differs per lane" for path in mapped],
        cause,
        fix,
    ) from error


def _cause_and_fix(mapped: list[str], axis_name: str | None, ensemble: bool) -> tuple[str, str]:
    places = [path.removeprefix("state['").removesuffix("']").split("']['") for path in mapped]
    collections = list(dict.fromkeys(collection for collection, *_ in places))
    axes = f"state_axes={{{', '.join(f'{name!r}: 0' for name in collections)}}}"
    layers = shorten(list(dict.fromkeys("/".join(layers[:-1]) or "the model" for _, *layers in places)), 3)
    who = ", ".join(layers)
    if ensemble:
        cause = "params_axes makes an ensemble, and every member has its own state"
        return cause, f"vmap_stateful(fn, params_axes=..., {axes}), the state stacked like the params"
    if collections != ["batch_stats"]:
        cause = f"what is kept is computed per lane and not averaged over the axis, in {who}"
        return cause, f"jax.lax.pmean(value, {axis_name or 'batch'!r}) there, or {axes} and a state with that axis"
    if axis_name is None:
        cause = f"the statistics of {who} are computed per lane: axis_name=None leaves nothing to average them over"
        return cause, f"vmap_stateful(fn, axis_name='batch') and nn.BatchNorm(..., axis_name='batch') in {who}"
    cause = f"{who} {'lacks' if len(layers) == 1 else 'lack'} axis_name={axis_name!r}: the statistics are per lane"
    return cause, f"nn.BatchNorm(..., axis_name={axis_name!r}) in {who}, or {axes} and a state with that axis"


def _probe(mapped: list[str], paths: list[str]) -> Any:
    """An identity whose batching rule is told which of its arguments differ per lane."""

    @custom_vmap
    def probe(*leaves: Any) -> Any:
        return leaves

    @probe.def_vmap
    def _rule(axis_size: int, in_batched: list[bool], *leaves: Any) -> Any:
        mapped.extend(path for path, batched in zip(paths, in_batched, strict=True) if batched)
        return leaves, tuple(in_batched)

    return probe
