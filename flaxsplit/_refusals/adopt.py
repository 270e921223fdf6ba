"""Refusals of what a checkpoint gave back, where it is no carry."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flaxsplit._describe import ABSENT, Difference
from flaxsplit._errors import CollectionError, Explained, Guess, Refusal, SignatureError
from flaxsplit._types import Carry

Place = tuple[str, ...]

_ADOPT = "adopt_carry(restored, like)"

LIKE = Refusal(
    SignatureError,
    _ADOPT,
    "every leaf of like must say its shape and dtype",
    "restored and like were swapped, or like is no carry",
    "adopt_carry(restored, init_carry(params, state, tx))",
)
_UNADOPTED = Refusal(
    CollectionError,
    _ADOPT,
    "every leaf must have the shape and dtype that it has in like (like -> restored)",
    "the checkpoint is of another model or optimizer",
    "adopt_carry(restored, init_carry(params, state, tx)) with the model and tx that were saved",
)
_DONATED = _UNADOPTED.but(
    cause="a step was given this carry, and took its buffers",
    fix="adopt what the step returned; or, before the step, keep jax.tree.map(jnp.copy, carry)",
)
_PARTS = _UNADOPTED.but(
    cause="other params are frozen, or an average or a part of tx came or went, since it was saved",
    fix="carry = adopt_carry(restored, like, strict=False)",
)
_NO_STEP = _PARTS.but(cause="variables were saved, without the optimizer's state and the count of steps")
_PARAMS = _PARTS.but(
    cause="params alone were saved, without the state, the optimizer's state and the count of steps",
    fix="carry = adopt_carry({'params': restored}, like, strict=False), where the rest is that of like",
)
_PATH = _UNADOPTED.but(
    cause="a path was passed, and not what a checkpoint library reads there",
    fix="adopt_carry(checkpointer.restore(path), like)",
)
_BESIDE = _UNADOPTED.but(
    cause="the carry was saved with something beside it", fix="adopt_carry(restored[$index], like)"
)
_TUPLE = _UNADOPTED.but(cause="the carry was saved as a tuple without names", fix="adopt_carry(Carry(*restored), like)")
_CAST = _UNADOPTED.but(
    cause="it was saved in another precision",
    fix="restored = jax.tree.map(lambda leaf: leaf.astype('$due') if leaf.dtype == '$saved' else leaf, restored)",
)
_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}
_COUNT = _PARTS.but(
    cause="tx counts its updates, for a schedule, and did not when it was saved",
    fix="carry = adopt_carry(restored, like, strict=False); to go on where the schedule would be, carry = adopt_carry("
    "carry._replace(opt_state=optax.tree_utils.tree_set(carry.opt_state, count=carry.step)), like)",
)
_OPTIMIZER = _UNADOPTED.but(
    cause="an nnx.Optimizer was saved, which holds no params: they are its module's",
    fix="_, params, state = from_nnx(module); saved = nnx.state(optimizer); carry = adopt_carry({'step': "
    "saved['step'], 'params': params, 'state': state, 'opt_state': saved['opt_state']}, like)",
)


@Guess
def UNADOPTED(  # noqa: N802
    wrong: list[Difference], restored: Any, held: Collection[Place], wanted: Collection[Place], kept: Any
) -> Explained:
    """A checkpoint of something else than the carry. `kept()` gives the places that are found where not strict."""
    lines, others = [*map(str, wrong)], restored.values() if isinstance(restored, Mapping) else ()
    parts = restored if type(restored) in (list, tuple) else ()
    carries = [str(i) for i, part in enumerate(parts) if _is_carry(part)]
    if any(each.after.startswith("deleted") for each in wrong):
        return _DONATED(*lines)
    if isinstance(restored, str | os.PathLike):
        return _PATH(*lines)
    if carries:
        return _BESIDE(*lines, index=carries[0])
    if len(parts) == len(Carry._fields):
        return _TUPLE(*lines)
    if cast := _cast(wrong):
        return _CAST(*lines, due=cast[0], saved=cast[1])
    if any(map(_is_optimizer, (restored, *others))):
        row = _OPTIMIZER
    elif {*held} == {("state", *place[1:]) for place in wanted if place[:1] == ("params",)}:  # no part of it is named
        row = _PARAMS
    elif any(ABSENT not in each for each in wrong) or not _keeps_params(held, wanted):
        row = _UNADOPTED
    elif ("step",) not in held:
        row = _NO_STEP
    else:
        new = {place[-1] for place in {*wanted}.difference(kept())}
        row = _COUNT if new == {"count"} else _PARTS
    return row(*lines)


def _is_carry(tree: Any) -> bool:
    names = tree if isinstance(tree, Mapping) else getattr(tree, "_fields", ())
    return {"params", "opt_state"} <= {*names}


def _cast(wrong: Sequence[Difference]) -> tuple[str, str] | None:
    """The two dtypes by name, where floating leaves were saved in one other precision, and nothing else is wrong."""
    sides = [(due.partition("["), saved.partition("[")) for _, due, saved in wrong]
    (due, saved), *more = {(due[0], saved[0]) for due, saved in sides}
    same = all(due[2] == saved[2] for due, saved in sides)
    return (_NAMES[due], _NAMES[saved]) if same and not more and {due, saved} <= {*_NAMES} else None


def _is_optimizer(tree: Any) -> bool:
    names = tree if isinstance(tree, Mapping) else dir(tree)
    return "opt_state" in names and not {"params", "state"} & {*names}


def _keeps_params(held: Collection[Place], wanted: Collection[Place]) -> bool:
    """Whether there are params, and a place for each, trained or frozen."""
    saved, due = _params_in(held), _params_in(wanted)
    return bool(saved) and saved <= due


def _params_in(places: Collection[Place]) -> set[Place]:
    trained = {place[1:] for place in places if place[:1] == ("params",)}
    return trained | {place[2:] for place in places if place[:2] == ("state", "params")}
