"""Runs the training files with `assert_type` made a test of the value: what is said is what comes."""

import types
import typing
from typing import Any

import jax
import jax.numpy as jnp


def assert_value(value: Any, said: Any) -> Any:
    if isinstance(said, types.UnionType) or said is Any:
        return value
    origin = typing.get_origin(said) or said
    holds = issubclass(value, typing.get_args(said)) if origin is type else isinstance(value, origin)
    if not holds:
        raise TypeError(f"said {said}, came {type(value)}")
    return value


def main() -> None:
    setattr(typing, "assert_type", assert_value)  # noqa: B010  (a plain assignment is an error to mypy)
    import batch_stats
    import by_hand
    import classify
    import lifted
    import setup_style
    import several_devices

    key = jax.random.key(0)
    images, labels = jnp.ones((2, 28, 28, 1)), jnp.zeros((2,), int)
    state = classify.fit(key, [(images, labels)])
    classify.evaluate(classify.CNN(), state.params, images, labels)

    resnet = batch_stats.ResNet(classes=10)
    resnet_state = batch_stats.create_state(resnet, key, images.shape)
    batch = {"image": images, "label": labels}
    resnet_state, _ = batch_stats.make_train_step(resnet)(resnet_state, batch)
    batch_stats.predict(resnet, resnet_state, images)

    setup_style.use(key, jnp.ones((2, 784)), jnp.ones((2, 8)))

    lifted.Transformer(vocabulary=32, width=16).init(key, jnp.ones((2, 5), int))
    lifted.ensemble(key, jnp.ones((2, 3)), members=4)
    lifted.encode(key, jnp.ones((2, 5, 3)))
    loop = lifted.Loop()
    loop.apply(loop.init(key, jnp.ones((2, 3))), jnp.ones((2, 3)))

    several_devices.epoch({"w": jnp.ones(())}, [{"x": jnp.ones(8)}], key)

    variables = by_hand.BiasAdder().init(key, jnp.ones((3, 4)))
    by_hand.loop(key, jnp.ones((3, 4)))
    by_hand.frozen(variables)
    by_hand.decayed(lifted.MLP().init(key, jnp.ones((2, 3)))["params"])


if __name__ == "__main__":
    main()
