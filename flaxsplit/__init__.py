"""Pure combinators for params and state in Flax: take apart, put together, step."""

import importlib as _importlib
import typing as _typing

from ._adopt import adopt_carry as adopt_carry
from ._carry import init_carry as init_carry
from ._ema import with_ema as with_ema
from ._errors import CollectionError as CollectionError
from ._errors import DroppedStateWarning as DroppedStateWarning
from ._errors import RetraceError as RetraceError
from ._errors import RetraceWarning as RetraceWarning
from ._errors import SignatureError as SignatureError
from ._errors import StateDriftError as StateDriftError
from ._errors import UnsyncedStateError as UnsyncedStateError
from ._errors import UntouchedStateWarning as UntouchedStateWarning
from ._finite import skip_nonfinite as skip_nonfinite
from ._gradient import value_and_grad as value_and_grad
from ._jit import jit_step as jit_step
from ._mutable import with_mutable as with_mutable
from ._rngs import rng_state as rng_state
from ._rngs import with_rngs as with_rngs
from ._scan import scan_steps as scan_steps
from ._scan import stack_batches as stack_batches
from ._settle import settle_state as settle_state
from ._split import merge_state as merge_state
from ._split import split_params as split_params
from ._traces import CompileLog as CompileLog
from ._traces import assert_max_traces as assert_max_traces
from ._traces import compile_log as compile_log
from ._types import Carry as Carry
from ._types import GradFn as GradFn
from ._types import JittedStep as JittedStep
from ._types import LinenModule as LinenModule
from ._types import LossFn as LossFn
from ._types import Params as Params
from ._types import State as State
from ._types import Stateful as Stateful
from ._types import Step as Step
from ._types import Trainable as Trainable
from ._types import Variables as Variables
from ._update import apply_gradients as apply_gradients
from ._update import with_optimizer as with_optimizer
from ._vmap import vmap_stateful as vmap_stateful

__version__ = "0.2.0"

if _typing.TYPE_CHECKING:
    from ._explain import explain_step as explain_step
    from ._nnx import from_nnx as from_nnx
    from ._nnx import to_nnx as to_nnx
    from ._report import Finding as Finding
    from ._report import StepReport as StepReport
else:  # hidden from checkers, which would hold every name for one of ours

    def __getattr__(name):
        """Imports what few programs need when it is asked for: flax.nnx takes longer than all the rest together."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_importlib.import_module(_LATER[name], __name__), name)


_LATER = {
    **dict.fromkeys(("from_nnx", "to_nnx"), "._nnx"),
    **dict.fromkeys(("Finding", "StepReport"), "._report"),
    "explain_step": "._explain",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
