"""Words of `explain_step`: for each kind of finding what it is, the likely cause and the fix."""

from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of finding. A `$name` in a text stands for a value given with it."""

    group: str
    what: str
    cause: str
    fix: str  # in plain JAX
    ours: str  # with flaxsplit


GROUPS = ("compiles", "state", "memory", "work", "precision", "dispatch")

KINDS = {
    # ---- compiles
    "structure": Kind(
        "compiles",
        "the carry comes out in another structure than it went in",
        "a key that only the step adds or drops, a list for a tuple, or a static field (tx, a function) made anew",
        "return the structure that went in; make static fields once, outside the step",
        "keep in state what init_carry was given; capture= for what a model sows",
    ),
    "shape": Kind(
        "compiles",
        "leaves of the carry come out in another shape: the second call compiles again, and a scan fails",
        "the first value has another shape than what the step makes of it (keepdims=True, a broadcast)",
        "initialize the leaf in the shape that comes out",
        "state = settle_state(loss_fn, params, state, batch) before init_carry",
    ),
    "dtype": Kind(
        "compiles",
        "leaves of the carry come out in another dtype: the second call compiles again, and a scan fails",
        "an operand of another dtype widens the result",
        "leaf.astype(old.dtype) in the step, or initialize the leaf in the dtype that comes out",
        "state = settle_state(loss_fn, params, state, batch) before init_carry; "
        "optax.adam(..., mu_dtype=...) for its moments",
    ),
    "weak type": Kind(
        "compiles",
        "leaves of the carry are weakly typed on one side only: the second call compiles again",
        "a Python number, or jnp.asarray(number) without a dtype, went in",
        "jnp.asarray(value, dtype) for each before the first step",
        "carry = init_carry(params, state, tx)",
    ),
    "static number": Kind(
        "compiles",
        "Python numbers in the carry, constants to filter_jit, come out as arrays: the second call compiles again",
        "a count or a rate that was begun with a Python number",
        "jnp.asarray(value, dtype) for each before the first step",
        "jnp.asarray(value, dtype) for each before the first step",
    ),
    "placement": Kind(
        "compiles",
        "leaves of the carry come out in another place than they went in: the second call compiles again",
        "they were made on one device, or XLA chose where they come out",
        "carry = jax.device_put(carry, shardings), and jax.jit(step, out_shardings=(shardings, None))",
        "carry = init_carry(params, state, tx, sharding=...); jit_step(step, like=carry)",
    ),
    # ---- state
    "state dropped": Kind(
        "state",
        "the step computes a new value from these leaves, drops it, and returns the old one",
        "the new state of a call is not returned",
        "return what module.apply(..., mutable=[...]) gave as the new state, in the carry",
        "pred, state = apply(params, state, x), and return that state from the loss function; in a step of your own "
        "give apply_gradients the state that came with the gradients, and return the carry that it gives",
    ),
    "statistics unchanged": Kind(
        "state",
        "batch statistics are read, come back as they went in, and the params around them are trained",
        "train=True (use_running_average=False, inference=False) was forgotten",
        "call the model in training mode, with its statistics mutable, and return them in the carry",
        "apply(params, state, x, train=True)",
    ),
    "key unchanged": Kind(
        "state",
        "a PRNG key is drawn from and returned as it came: each step draws the same numbers",
        "the key is neither split nor folded with the step's count",
        "key, used = jax.random.split(key) in the step, or jax.random.fold_in(key, step); return the new key",
        "apply = with_rngs(apply), with rng_state(dropout=key) in the state",
    ),
    "key constant": Kind(
        "state",
        "random numbers are drawn from a key that is a constant of the step: each step draws the same",
        "jax.random.key(0) is called within the step, or a key is closed over",
        "carry the key and split it, or jax.random.fold_in(key, step)",
        "apply = with_rngs(apply), with rng_state(dropout=key) in the state",
    ),
    "key drawn twice": Kind(
        "state",
        "one key is used more than once: the numbers are not independent",
        "a key is drawn from for two arrays, or both drawn from and split",
        "one_key, other_key = jax.random.split(key), and each is used once",
        "one_key, other_key = jax.random.split(key), and each is used once",
    ),
    "no gradient": Kind(
        "state",
        "params are updated although their gradient is zero whatever the batch is",
        "the loss does not read them, or a stop_gradient, an integer cast or an argmax is in between",
        "use them in the loss, or keep them out of what is differentiated and of the optimizer",
        "use them in the loss, or split_params(variables, trainable=...) to freeze them",
    ),
    "never read": Kind(
        "state",
        "leaves are carried, and nothing in the step reads or changes them",
        "a layer that is not called, or state of another program",
        "leave them out of the carry",
        "leave them out of the carry, or keep them in state['extra'] if they are yours",
    ),
    # ---- memory
    "not donated": Kind(
        "memory",
        "the carry is not donated: old and new are in memory at once",
        "jax.jit without donate_argnums",
        "jax.jit(step, donate_argnums=0); equinox.filter_jit(step, donate='all')",
        "jit_step(step)",
    ),
    "donated in vain": Kind(
        "memory",
        "buffers are donated that no output can reuse",
        "no output has their shape and dtype: a batch, or a leaf that changes its type",
        "donate the carry only: donate_argnums=0; and keep the types of its leaves",
        "jit_step(step), which donates the carry only; settle_state for leaves that change",
    ),
    "buffer twice": Kind(
        "memory",
        "one buffer is in the donated carry twice, which JAX refuses when the step runs",
        "a copy by name: ema=params",
        "jax.tree.map(jnp.copy, tree) for the second",
        "carry = init_carry(params, state, tx), which copies",
    ),
    # ---- work
    "batch replicated": Kind(
        "work",
        "every device gets the whole batch and computes all of it",
        "the batch came from the host, or from one device",
        "jax.device_put(batch, NamedSharding(mesh, P('data'))), or in_shardings for it",
        "jit_step(step, like=carry, batch=NamedSharding(mesh, P('data')))",
    ),
    "optimizer replicated": Kind(
        "work",
        "leaves are whole on every device, and the params that they belong to are cut",
        "jax.jit(tx.init)(params) does not follow the sharding of params",
        "tx.init(params) outside jit, or with out_shardings like those of params",
        "carry = init_carry(params, state, tx)",
    ),
    "constants": Kind(
        "work",
        "large arrays are constants of the compiled step",
        "the step closes over them: another value compiles again, and they are kept twice",
        "pass them as arguments: step(carry, batch, table)",
        "pass them as arguments: step(carry, batch, table); frozen params belong into the state",
    ),
    # ---- precision
    "f32 work": Kind(
        "precision",
        "most of the work is done in f32, in a step whose params or other matmuls are in half precision",
        "an f32 operand (a batch, a constant, a layer without dtype=) widens the product",
        "cast the operand: x.astype(jnp.bfloat16), or dtype=jnp.bfloat16 for the layer",
        "cast the operand: x.astype(jnp.bfloat16), or dtype=jnp.bfloat16 for the layer",
    ),
    "cast back": Kind(
        "precision",
        "large values are cast to another dtype and, nothing done with them, back",
        "a layer casts what the next one, whose dtype= is another, casts again; or params are cast before such a layer",
        "one dtype= for both layers, or no .astype in between",
        "one dtype= for both layers, or no .astype in between",
    ),
    "half statistics": Kind(
        "precision",
        "running averages are kept in half precision, where a small change is rounded away",
        "the whole of the variables was cast",
        "cast the params only; keep averages in f32",
        "cast the params only; keep averages in f32",
    ),
    "f64": Kind(
        "precision",
        "work is done in f64, in a step whose params are not",
        "a NumPy array or constant of f64 under jax_enable_x64",
        "cast it: x.astype(jnp.float32)",
        "cast it: x.astype(jnp.float32)",
    ),
    # ---- dispatch
    "host carry": Kind(
        "dispatch",
        "NumPy arrays are in the carry: they are copied to the device, and cannot be donated",
        "they came from a checkpoint, or were made by NumPy",
        "carry = jax.tree.map(jnp.asarray, carry) before the first step",
        "carry = adopt_carry(restored, like=carry), or init_carry(params, state, tx)",
    ),
    "host constants": Kind(
        "dispatch",
        "large NumPy arrays are passed beside the batch: each call copies them to the device",
        "a table that never changes is passed as NumPy made it",
        "table = jax.device_put(table) once, before the loop",
        "table = jax.device_put(table) once, before the loop",
    ),
    "callback": Kind(
        "dispatch",
        "the step calls back into Python: the device waits for the host",
        "jax.debug.print, jax.pure_callback or io_callback was left in it",
        "return what is to be seen as out, and print it outside",
        "return what is to be seen as out (has_aux=True), and print it outside",
    ),
}
"""Every kind of finding, in the order in which a report lists them."""

NONE_FOUND = "nothing to mend"
LESS = "... and {} more: report.findings"
