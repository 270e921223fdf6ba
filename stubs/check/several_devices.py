"""The helpers of training over several devices: replicas, shards, metrics, and a loop that stacks them."""

from collections.abc import Iterable
from typing import assert_type

import jax
import jax.numpy as jnp
from flax import jax_utils
from flax.training import common_utils

Metrics = dict[str, jax.Array]


def epoch(params: Metrics, batches: Iterable[Metrics], key: jax.Array) -> Metrics:
    def step(params: Metrics, batch: Metrics, key: jax.Array) -> Metrics:
        noise = jax.random.normal(key, batch["x"].shape)
        return {"loss": jax_utils.pmean((params["w"] * batch["x"] + noise).mean(), "batch")}

    replicas = jax_utils.replicate(params)
    assert_type(replicas, Metrics)
    keys = common_utils.shard_prng_key(key)
    mapped = jax.pmap(step, axis_name="batch")
    found: list[Metrics] = []
    for batch in jax_utils.prefetch_to_device(map(common_utils.shard, batches), 2):
        assert_type(batch, Metrics)
        found.append(mapped(replicas, batch, keys))
    assert_type(jax_utils.unreplicate(replicas), Metrics)
    hot = common_utils.onehot(jnp.zeros(3, int), 3)
    assert_type(hot, jax.Array)
    metrics = common_utils.get_metrics(found)
    assert_type(metrics, Metrics)
    return metrics
