"""What Flax says of variables and keys, in terms of params and state."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import errors

from flaxsplit._describe import describe, keyed_leaves
from flaxsplit._errors import CollectionError, Explained, Guess, SignatureError
from flaxsplit._paths import flatten, keyed
from flaxsplit._upstream import (
    collection_in,
    first_sentence,
    is_about_rngs,
    is_about_shape,
    param_in,
    place_in,
    stream_in,
    unbound_axis_in,
)

FN = "with_mutable(fn)"
OWNERS = {"rngs": "with_rngs", "ema": "with_ema", "extra": "the caller"}
RENAMED = "another name for the model's own collection: self.variable('averages', ...)"
_CALL = "params, state = split_params(module.init(key, x))"
WHICH = "with_mutable(mutable=...)"


@Guess
def RNGS(where: str, rngs: Any) -> Explained:  # noqa: N802
    """Keys by hand that are not one key per stream."""
    required = "rngs must be a dict of one key per stream"
    if isinstance(rngs, dict):
        came = [f"rngs[{name!r}]: {describe(key)}" for name, key in rngs.items()]
        cause = "a seed, or a stack of keys, is there, where one key is due"
        return CollectionError(where, required, came, cause, f"rngs={{{next(iter(rngs))!r}: jax.random.key(0)}}")
    cause = "keys without the names of their streams, or another mapping than a dict"
    return CollectionError(where, required, [f"rngs: {describe(rngs)}"], cause, "rngs={'dropout': key}")


@Guess
def FLAX(error: Exception, names: Sequence[str], variables: Any, state: Any, rngs: Any) -> Explained:  # noqa: N802
    """An error of Flax about variables or keys, in terms of params and state; any other one stays as it is."""
    match error:
        case errors.ApplyScopeInvalidVariablesTypeError():
            return _misformed(variables)
        case errors.InvalidRngError():
            stream = stream_in(error)
            return _no_rngs(stream, state.get("rngs", {}), rngs) if stream else RNGS(FN, rngs)
        case errors.ModifyScopeVariableError():
            return _not_mutable(error, names, variables, state)
        case errors.ScopeParamNotFoundError() | errors.ScopeCollectionNotFound() | errors.ScopeVariableNotFoundError():
            return _not_found(error, variables, state)
        case errors.ScopeParamShapeError():
            return _misshapen(error)
        case NameError() if axis := unbound_axis_in(error):
            return _no_axis(axis)
        case ValueError() if is_about_rngs(error):
            return RNGS(FN, rngs)
        case ValueError() if came := perturbed(error, state):
            return misperturbed(error, came)
        case _:
            raise error


def perturbed(error: Exception, state: Any) -> list[str]:
    """Perturbations of a shape that JAX could not add."""
    leaves = keyed_leaves(state.get("perturbations", {}), "state['perturbations']").items()
    return [f"{path}: {describe(leaf)}" for path, leaf in leaves if is_about_shape(error, jnp.shape(leaf))]


def misperturbed(error: Exception, came: list[str]) -> Explained:
    return CollectionError(
        FN,
        "a perturbation must have the shape of what it is added to",
        [*came, str(error).splitlines()[0]],
        "x has another batch size than at module.init, which made the perturbations",
        "state | {'perturbations': module.init(key, x)['perturbations']} with the x of the call; or a state without "
        "'perturbations', where nothing is perturbed",
    )


def _no_axis(name: str) -> Explained:
    return SignatureError(
        FN,
        "each axis that a layer averages over must be bound around the call",
        [f"axis_name={name!r}: not bound here"],
        "the model is one of a single example, and was called with a batch; or it is to run under shard_map or pmap",
        f"vmap_stateful(with_mutable(model), axis_name={name!r}); or axis_name=None in the layer, for a batch at once",
    )


def _no_rngs(stream: str, held: Any, given: Any) -> Explained:
    streams = ", ".join(f"{name}=key" for name in sorted({*held, *_streams(given), stream}))
    cause, fix = f"there is no key for {stream!r}", f"with_rngs(with_mutable(model)), with state | rng_state({streams})"
    if stream in _streams(given):
        cause = f"{stream!r} is given, but a lifted transform or an apply around the layer does not pass it on"
        fix = f"split_rngs={{{stream!r}: True}} in nn.scan, nn.vmap or nn.while_loop; rngs= in an inner apply"
    elif given is not None and not isinstance(given, Mapping):
        cause, fix = "rngs is no mapping of streams to keys", f"rngs={{{stream!r}: key}}"
    elif stream in held and given is None:
        cause, fix = "state['rngs'] is there, but nothing draws from it", "with_rngs(with_mutable(model))"
    came = [f"rngs: {sorted(given) if isinstance(given, Mapping) else describe(given)}"]
    if given is None or (isinstance(given, Mapping) and not given):
        came = ["rngs: none", f"state['rngs']: {sorted(held) or 'none'}"]
    return CollectionError(FN, f"the model draws from the PRNG stream {stream!r}", came, cause, fix)


def _streams(given: Any) -> Any:
    return given if isinstance(given, Mapping) else ()


def _not_mutable(error: Exception, names: Sequence[str], variables: Any, state: Any) -> Explained:
    name = collection_in(error)
    where, cause, fix = _why_not_mutable(name, place_in(error), names, variables, state)
    came = [first_sentence(error), f"mutable: {sorted(names)}"]
    return CollectionError(where, f"the model writes to the collection {name!r}", came, cause, fix)


def _why_not_mutable(name: str, place: str, names: Sequence[str], variables: Any, state: Any) -> tuple[str, str, str]:
    if name == "params":
        return (
            FN,
            "params are the optimizer's to change",
            "self.variable('counts', ...) for what the model itself writes",
        )
    if name in names:
        cause = f"{name!r} is mutable, but a lifted transform or an apply around the layer does not pass it on"
        fix = (
            f"carry_variables={name!r} in nn.while_loop, variable_carry={name!r} in nn.scan; mutable= in an inner apply"
        )
        return FN, cause, fix
    if name in variables:
        cause = f"{name!r} is not among the mutable collections, and the layer {place} is in a mode that writes to it"
        mode = ": use_running_average=True, train=False" if name == "batch_stats" else ""
        fix = f"with_mutable(fn, mutable={sorted([*names, name])}); or, where it is to stay as it is, {place} in the "
        return WHICH, cause, f"{fix}mode that only reads{mode}"
    if name in state and name in OWNERS:
        return FN, owned(name), RENAMED
    return FN, f"the state has no {name!r}", f"state | {{{name!r}: ...}}, from module.init"


def owned(name: str) -> str:
    return f"{name!r} in the state belongs to {OWNERS[name]}, and no model sees it"


def _not_found(error: Exception, variables: Any, state: Any) -> Explained:
    name = collection_in(error)
    held = (f"{name}: {sorted(map(str, tree))}" for name, tree in variables.items() if isinstance(tree, Mapping))
    cause, fix = "params and state belong to another model, or a part was lost", f"{_CALL}; fn(params, state, x)"
    if name not in variables:
        cause = f"the state has no {name!r}"
        if name in state and name in OWNERS:
            cause, fix = owned(name), RENAMED
        elif not {*variables.get("params", ())}.isdisjoint(state):
            cause = f"state[{name!r}] was passed, and not the state"
            fix = f"fn(params, {{{name!r}: ...}}, x), or the whole state"
    required = "params and state must hold every variable that the model reads"
    return CollectionError(FN, required, [first_sentence(error), *held], cause, fix)


def _misformed(variables: Any) -> Explained:
    leaves = [f"{name!r}: {describe(tree)}" for name, tree in variables.items() if not isinstance(tree, Mapping)]
    keys = [keyed(path, "variables") for path, _ in flatten(variables) if not all(isinstance(key, str) for key in path)]
    return CollectionError(
        FN,
        "every collection must be a mapping, its keys strings",
        leaves + keys,
        "the state holds what is no model's: a counter, a queue, the tree of another library",
        "state | {'extra': ...}, any tree, which no model sees",
    )


def _misshapen(error: Exception) -> Explained:
    found = param_in(error)
    return CollectionError(
        FN,
        "every param must have the shape that the model declares for it",
        [f"parameter {found[0]!r} in {found[1]!r}: another shape" if found else first_sentence(error)],
        "x has another size than at module.init, or the params belong to another model",
        f"{_CALL}, with the x and the module of the call",
    )
