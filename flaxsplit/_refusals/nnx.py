"""Refusals of `from_nnx`."""

from flaxsplit._errors import Refusal, SignatureError

from .options import form

METHOD = form(
    "from_nnx(method=...)", "method must be a function of the module", "from_nnx(module, method=Model.decode)"
)
WITHOUT_VALUE = Refusal(
    SignatureError,
    "from_nnx(module)",
    "every variable must have a value",
    "the module was made by nnx.eval_shape and not filled",
    "from_nnx(Model(..., rngs=nnx.Rngs(0))), or nnx.update(module, state) before",
)
