"""Trains a convolutional network on 1,797 handwritten digits, then fine-tunes its head, with flaxsplit.

The network is written for one image. `vmap_stateful` maps it over a batch, with BatchNorm averaged over the batch and a
dropout mask per image. The same loop written by hand runs beside it, for the comparison at the end.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flaxsplit as fs

BATCH, EPOCHS, FINE_TUNE_EPOCHS, TIMED_STEPS = 64, 25, 3, 150
GOAL = 0.97

Batch = tuple[Any, Any]
console = Console()


class Digits(nn.Module):
    """Maps one image `[8, 8, 1]` to ten logits."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Runs two blocks of convolution, BatchNorm and pooling, then the head."""
        x = image
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name="batch")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.4, deterministic=not train)(x.reshape(-1))
        return nn.Dense(10, name="head")(x)


model = Digits()
apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(model), axis_name="batch"))
evaluate = jax.jit(fs.assert_max_traces(fs.vmap_stateful(fs.with_mutable(model, mutable=False))))


def loss_of(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy, and the share of right answers."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()


def pretrain(params: dict[str, Any], state: dict[str, Any], batch: Batch) -> tuple[Any, dict[str, Any]]:
    """The loss function: everything flaxsplit needs to know about this task."""
    images, labels = batch
    logits, state = apply(params, state, images, train=True)
    return loss_of(logits, labels), state


def fine_tune(params: dict[str, Any], state: dict[str, Any], batch: Batch) -> tuple[Any, dict[str, Any]]:
    """The same with frozen statistics: what is not trained must not drift either."""
    images, labels = batch
    logits, _ = read_only(params, state, images)
    return loss_of(logits, labels), state


read_only = fs.vmap_stateful(fs.with_mutable(model, mutable=False))


def by_hand(tx: optax.GradientTransformation) -> Any:
    """The pretraining step without flaxsplit, donated and jitted, over the same carry."""

    def step(carry: Any, batch: Batch) -> tuple[Any, Any]:
        count, params, state, opt_state = carry
        images, labels = batch
        key, drawn = jax.random.split(state["rngs"]["dropout"])

        def objective(params: Any) -> Any:
            def one(key: Any, image: Any) -> Any:
                variables = {"params": params, "batch_stats": state["batch_stats"]}
                return model.apply(variables, image, train=True, mutable=["batch_stats"], rngs={"dropout": key})

            keys = jax.random.split(drawn, len(images))
            logits, updated = jax.vmap(one, out_axes=(0, None), axis_name="batch")(keys, images)
            loss, accuracy = loss_of(logits, labels)
            return loss, (accuracy, updated)

        (loss, (accuracy, updated)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (count + 1, params, {**updated, "rngs": {"dropout": key}}, opt_state), (loss, accuracy)

    return jax.jit(step, donate_argnums=0)


def digits() -> tuple[Batch, Batch]:
    """The images in [0, 1] with their labels, four fifths for training."""
    data: Any = load_digits()
    images = (data.images[..., None] / 16.0).astype(np.float32)
    labels = data.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return (train_x, train_y), (test_x, test_y)


def batches(data: Batch, epochs: int, seed: int) -> Iterator[Batch]:
    """Shuffled batches of one size: a ragged last one would compile again."""
    images, labels = data
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield images[chosen], labels[chosen]


def train(title: str, step: Any, carry: fs.Carry, data: Batch, epochs: int, seed: int) -> fs.Carry:
    """Runs a step over the epochs, with loss and accuracy beside the bar."""
    total = epochs * (len(data[0]) // BATCH)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[now]}"), console=console) as progress:
        task = progress.add_task(title, total=total, now="")
        for i, batch in enumerate(batches(data, epochs, seed)):
            carry, (loss, accuracy) = step(carry, batch)
            if i % 20 == 0 or i == total - 1:  # reading a value waits for the device: not at every step
                progress.update(task, now=f"loss {float(loss):.3f}  accuracy {float(accuracy):5.1%}")
            progress.advance(task)
    return carry


def accuracy_of(params: Any, state: Any, data: Batch) -> float:
    """The share of right answers, from the running statistics."""
    logits, _ = evaluate(params, state, data[0])
    return float((np.asarray(logits).argmax(-1) == data[1]).mean())


def timed(steps: dict[str, Any], start: Any, data: Batch) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Times the steps in turn over the same batches, each from a copy of the same carry; seconds per step."""
    carries = {name: jax.tree.map(jnp.copy, start) for name in steps}
    carries["by hand"] = tuple(carries["by hand"])
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i, batch in enumerate([*batches(data, 9, seed=2)][:TIMED_STEPS]):
        for name, step in list(steps.items())[:: 1 if i % 2 else -1]:  # in turn, neither always first
            began = time.perf_counter()
            carries[name], _ = jax.block_until_ready(step(carries[name], batch))
            times[name].append(time.perf_counter() - began)
    return times, carries


def equal(left: Any, right: Any) -> bool:
    """Whether two trees are the same, bit for bit."""
    same = jax.tree.map(lambda a, b: bool((a == b).all()), left, right)
    return all(jax.tree.leaves(same))


def count(tree: Any) -> int:
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main() -> int:
    """Trains, evaluates, fine-tunes, compares; returns what the shell is told."""
    training, test = digits()
    key, dropout = jax.random.split(jax.random.key(0))
    params, state = fs.split_params(model.init(key, training[0][0]))
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, EPOCHS * (len(training[0]) // BATCH)), weight_decay=1e-4)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(pretrain, tx, has_aux=True)))
    head_tx = optax.adam(1e-4)
    head_step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(fine_tune, head_tx, has_aux=True)))

    with fs.compile_log() as log:
        carry = fs.init_carry(params, state | fs.rng_state(dropout=dropout), tx)
        carry = train("all params ", step, carry, training, EPOCHS, seed=0)
        accuracy = accuracy_of(carry.params, carry.state, test)

        variables = fs.merge_state(carry.params, carry.state)
        head, rest = fs.split_params(variables, trainable="head/*")
        head_carry = fs.init_carry(head, rest, head_tx)
        head_carry = train("head alone ", head_step, head_carry, training, FINE_TUNE_EPOCHS, seed=1)
        tuned = accuracy_of(*fs.split_params(fs.merge_state(head_carry.params, head_carry.state)), test)
    frozen_kept = equal(head_carry.state["params"], rest["params"])
    moved = not equal(head_carry.params, head)

    times, ends = timed({"flaxsplit": step, "by hand": by_hand(tx)}, carry, training)
    medians = {name: float(np.median(each[5:])) for name, each in times.items()}  # the first ones compile
    ratio = float(np.median(np.array(times["flaxsplit"][5:]) / np.array(times["by hand"][5:])))
    same = equal(tuple(ends["flaxsplit"]), ends["by hand"])

    table = Table(title="summary", show_header=False)
    table.add_row("test accuracy, all params trained", f"{accuracy:.2%} of {len(test[0])} images")
    table.add_row("test accuracy, head fine-tuned", f"{tuned:.2%}")
    table.add_row("params fine-tuned / frozen", f"{count(head_carry.params)} / {count(rest['params'])}")
    table.add_row("frozen params unchanged, bit for bit", "yes" if frozen_kept else "NO")
    for name in ("pretrain", "fine_tune"):
        table.add_row(f"traces / compiles of {name}", f"{log.traces[name]} / {log.compiles[name]}")
    table.add_row("time per step, flaxsplit", f"{medians['flaxsplit'] * 1e3:.2f} ms")
    table.add_row("time per step, by hand", f"{medians['by hand'] * 1e3:.2f} ms")
    table.add_row("ratio, step by step (median)", f"{ratio:.3f}")
    table.add_row("same carry as by hand, bit for bit", "yes" if same else "NO")
    console.print(table)

    once = all(counts[name] == 1 for counts in (log.traces, log.compiles) for name in ("pretrain", "fine_tune"))
    checks = {
        f"accuracy of at least {GOAL:.0%}": min(accuracy, tuned) >= GOAL,
        "one trace and one compile per step function": once,
        "frozen params unchanged": frozen_kept and moved,
        "the same as by hand": same,
    }
    failed = [what for what, holds in checks.items() if not holds]
    verdict = f"failed: {'; '.join(failed)}" if failed else f"ok: {'; '.join(checks)}"
    console.print(f"digits: {verdict}", soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
