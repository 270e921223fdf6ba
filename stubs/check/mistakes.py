"""Mistakes that must be reported: on each line, the one error that each checker gives for it."""

from typing import Any

import jax
import optax
from batch_stats import ResNet, TrainState
from classify import CNN
from flax import jax_utils
from flax import linen as nn
from flax.core import FrozenDict
from flax.metrics import tensorboard
from flax.training import common_utils, train_state
from lifted import MLP, Layer
from setup_style import VAE


def calls(vae: VAE, model: CNN, variables: dict[str, Any], x: jax.Array) -> None:
    model.apply(variables, x).logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    model.apply(variables, x, mutable=["cache"]).mean()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    model.apply(variables, x, mutable=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    model.apply(variables, x, rngs=0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    pair: jax.Array = vae.apply(variables, x, mutable=True)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    nothing: None = vae.apply(variables, x, method=VAE.generate)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    model.init(x).params  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    print(pair, nothing)


def modules(x: jax.Array) -> None:
    CNN(classes="10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ResNet()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.BatchNorm(use_running_averages=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.Dropout(0.5)(x, deterministically=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.max_pool(x, [2, 2])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    nn.remat(Layer)(head=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.vmap(MLP, in_axis=0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.scan(MLP(), length=3)(x).logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def states(state: TrainState, model: CNN, params: Any, frozen: FrozenDict[str, Any]) -> None:
    train_state.TrainState.create(apply_fn=model.apply, params=params)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    train_state.TrainState.create(apply_fn=model, params=params, tx=optax.sgd)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    state.apply_gradients(params)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    state.step = 0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    state.replace(step=0).batch_statistics  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    frozen["params"] = params  # type: ignore[index]  # pyright: ignore[reportIndexIssue]


def helpers(writer: tensorboard.SummaryWriter, params: dict[str, Any], x: jax.Array) -> None:
    writer.scaler("loss", x, 1)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    writer.scalar("loss", 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    jax_utils.replicate(params, device=[])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    jax_utils.unreplicate(params).shape  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    common_utils.onehot(x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.combine_masks(None, x).shape  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
    nn.RNN(nn.LSTMCell(4))(x, return_carries=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
