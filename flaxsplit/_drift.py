"""What a step returns has the form of what it took, or it would compile twice."""

from typing import Any

import jax

from ._axes import put_back
from ._checks import survives
from ._describe import alike, strong
from ._refusals.carry import DRIFT, TOO_WIDE, wide


def check_drift(where: str, name: str, before: Any, after: Any) -> Any:
    """Gives `after` without weak types, if it has the structure, shapes and dtypes of `before`; else names each leaf.

    Where the mesh is part of the types, each leaf comes back to where it lay. Costs
    a comparison per leaf while tracing. The words are looked for only once something differs.
    """
    TOO_WIDE.unless_all(survives, after, name, say=wide, where=where)
    after = jax.tree.map(strong, after)
    DRIFT.unless(alike(before, after), where, name, before, after)
    return jax.tree.map(put_back, before, after)
