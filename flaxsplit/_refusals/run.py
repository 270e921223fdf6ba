"""Refusals of what runs a function over the parts: apply functions, keys, lanes, settling."""

from flaxsplit._errors import Refusal, SignatureError

# ---- named axes

UNBOUND = Refusal(
    SignatureError,
    "$where",
    "the axis must be bound by an enclosing shard_map, vmap or pmap",
    "the name is misspelt, or the call is in a plain jit, where the mesh needs no name",
    "jax.shard_map(step, mesh=mesh, ...) over a mesh with that axis; or no axis_name",
)
