"""`tests/test_docs.py`: `docs/carry.svg` and `docs/combinators/*.svg`; `--write` draws them.

The first is the README's: the carry goes round. The others show each combinator: what goes in, what is called, what
comes out. Rows of boxes lie below each other. A box is `label / small print`; a function stands in brackets; a `#` and
what follows it tells equal labels apart, and alone keeps room.
"""

import itertools
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tools.written import written  # noqa: E402 (found beside this folder)

FOLDER = ROOT / "docs" / "combinators"
WIDTH, ROW, GAP, MARGIN = 480, 46, 36, 14


class Flow(NamedTuple):
    """Rows of boxes; arrows from each to each of the next row, but where they are named; one that leads back."""

    rows: list[list[str]]
    arrows: list[tuple[str, str]] | None = None
    back: tuple[str, str, str] | None = None


LOOP = ROOT / "docs" / "carry.svg"
ROUND = Flow(
    [
        ["[split_params] / of model.init(...)"],
        ["params / the optimizer's", "state / all the rest", "tx"],
        ["[init_carry]"],
        ["batch", "carry / step, params, state, opt_state"],
        ["[value_and_grad] / of loss_fn, which calls with_mutable(model)"],
        ["loss", "grads", "new_state"],
        ["#", "[apply_gradients] / tx.update"],
        ["#left", "carry#2 / step + 1, all of it new"],
    ],
    [
        ("[split_params]", "params"),
        ("[split_params]", "state"),
        *((name, "[init_carry]") for name in ("params", "state", "tx")),
        ("[init_carry]", "carry"),
        *((name, "[value_and_grad]") for name in ("carry", "batch")),
        *(("[value_and_grad]", name) for name in ("loss", "grads", "new_state")),
        *((name, "[apply_gradients]") for name in ("grads", "new_state")),
        ("[apply_gradients]", "carry#2"),
    ],
    ("carry#2", "carry", "jit_step: compiled once, called for each batch"),
)  # fmt: skip
FLOWS = {
    "split_params": Flow([
        ["variables / {params, batch_stats}"],
        ["[split_params] / trainable='head/*'"],
        ["params / head", "state / batch_stats, frozen params"],
        ["[merge_state]"],
        ["variables#2 / the same, leaf for leaf"],
    ]),
    "with_mutable": Flow(
        [["params", "*args", "state"], ["[module.apply] / what the state holds is mutable"], ["out", "new_state"]],
        back=("new_state", "state", "next call"),
    ),
    "with_rngs": Flow(
        [
            ["params, *args", "state['rngs'] / a key per stream"],
            ["#", "#right", "[jax.random.split]"],
            ["[fn] / rngs= one half of each key"],
            ["out", "new_state / the other half"],
        ],
        [
            ("state['rngs']", "[jax.random.split]"),
            ("params, *args", "[fn]"),
            ("[jax.random.split]", "[fn]"),
            ("[fn]", "out"),
            ("[fn]", "new_state"),
        ],
        ("new_state", "state['rngs']", "next call"),
    ),
    "vmap_stateful": Flow([
        ["params / shared", "state / shared", "batch / [n, ...]"],
        ["[fn] / lane 0", "[fn]#1 / lane 1", "[fn]#2 / lane n - 1"],
        ["out / [n, ...]", "new_state / one for all lanes"],
    ]),
    "settle_state": Flow(
        [
            ["state / mean: f32[5]"],
            ["[jax.eval_shape(fn)] / no FLOP is spent"],
            ["new_state / mean: f32[1,5]"],
            ["settled state / mean: f32[1,5]"],
        ],
        back=("new_state", "state", "until the shapes agree"),
    ),
    "init_carry": Flow([
        ["params", "state", "tx"],
        ["[init_carry] / copied, without weak types, in one place"],
        ["Carry / step, params, state, opt_state"],
    ]),
    "value_and_grad": Flow(
        [
            ["params", "state", "batch, *args"],
            ["[loss_fn]", "#"],
            ["loss", "new_state"],
            ["[jax.grad] / of params alone", "#"],
            ["(loss, grads) / grads like params", "new_state#2"],
        ],
        [
            ("params", "[loss_fn]"),
            ("state", "[loss_fn]"),
            ("batch, *args", "[loss_fn]"),
            ("[loss_fn]", "loss"),
            ("[loss_fn]", "new_state"),
            ("loss", "[jax.grad]"),
            ("[jax.grad]", "(loss, grads)"),
            ("new_state", "new_state#2"),
        ],
    ),
    "apply_gradients": Flow(
        [
            ["grads", "carry", "new_state"],
            ["[tx.update] / params, opt_state", "#"],
            ["[apply_updates]", "#"],
            ["carry#2 / step + 1, new params, opt_state and state"],
        ],
        [
            ("grads", "[tx.update]"),
            ("carry", "[tx.update]"),
            ("[tx.update]", "[apply_updates]"),
            ("[apply_updates]", "carry#2"),
            ("new_state", "carry#2"),
        ],
    ),
    "with_optimizer": Flow(
        [
            ["carry", "batch"],
            ["[loss_fn] / params, state, batch"],
            ["new_state", "gradients", "loss"],
            ["#", "[tx.update] / apply_updates", "#right"],
            ["carry#2 / step + 1", "loss#2"],
        ],
        [
            ("carry", "[loss_fn]"),
            ("batch", "[loss_fn]"),
            ("[loss_fn]", "new_state"),
            ("[loss_fn]", "gradients"),
            ("[loss_fn]", "loss"),
            ("gradients", "[tx.update]"),
            ("[tx.update]", "carry#2"),
            ("new_state", "carry#2"),
            ("loss", "loss#2"),
        ],
    ),
    "skip_nonfinite": Flow(
        [
            ["carry", "batch"],
            ["[step]", "#"],
            ["carry#1 / as step gives it", "out"],
            ["[choose] / all finite?", "#"],
            ["carry#2 / the new one, or the old", "out#2"],
        ],
        [
            ("carry", "[step]"),
            ("batch", "[step]"),
            ("[step]", "carry#1"),
            ("[step]", "out"),
            ("carry#1", "[choose]"),
            ("[choose]", "carry#2"),
            ("out", "out#2"),
        ],
    ),
    "with_ema": Flow([
        ["carry", "batch"],
        ["[step]"],
        ["carry#1 / new params", "out"],
        ["[average] / decay * ema + (1 - decay) * params", "#"],
        ["carry#2 / new params, new state['ema']", "out#2"],
    ], [
        ("carry", "[step]"),
        ("batch", "[step]"),
        ("[step]", "carry#1"),
        ("[step]", "out"),
        ("carry#1", "[average]"),
        ("[average]", "carry#2"),
        ("out", "out#2"),
    ]),
    "scan_steps": Flow(
        [
            ["batches / any iterable"],
            ["[stack_batches] / size=3"],
            ["carry", "stack / [3, ...]"],
            ["[step] / stack[0]", "[step]#1 / stack[1]", "[step]#2 / stack[2]"],
            ["carry#2 / 3 steps on", "outs / [3, ...]"],
        ],
        [
            ("batches", "[stack_batches]"),
            ("[stack_batches]", "stack"),
            ("carry", "[step]"),
            *(("stack", step) for step in ("[step]", "[step]#1", "[step]#2")),
            ("[step]", "[step]#1"),
            ("[step]#1", "[step]#2"),
            ("[step]#2", "carry#2"),
            *((step, "outs") for step in ("[step]", "[step]#1", "[step]#2")),
        ],
    ),
    "jit_step": Flow(
        [["batch", "carry / donated"], ["[step] / compiled once"], ["out", "carry#2 / in the same buffers"]],
        back=("carry#2", "carry", "next step"),
    ),
    "adopt_carry": Flow([
        ["checkpoint / NumPy, lists, dicts", "like / a carry that the step knows"],
        ["[adopt_carry] / every leaf compared, by name"],
        ["carry / structure, dtypes, placement of like"],
        ["[step] / compiled already"],
    ]),
    "from_nnx": Flow([
        ["module"],
        ["[from_nnx]"],
        ["fn", "params", "state"],
        ["[training] / with every combinator"],
        ["params#2", "state#2"],
        ["[to_nnx]"],
        ["module#2 / the same object, trained"],
    ]),
    "explain_step": Flow([
        ["step / anybody's", "carry", "batch"],
        ["[jax.jit(step).trace] / once", "[compile] / once"],
        ["jaxpr / what is read, kept, drawn", "executable / memory, FLOPs"],
        ["[explain_step] / nothing is run"],
        ["StepReport / findings: leaf, cause, fix"],
    ]),
    "assert_max_traces": Flow(
        [
            ["batch / f32[64,5]", "batch#1 / f32[64,5]", "batch#2 / f32[63,5]"],
            ["[step]", "[step]#1", "[step]#2"],
            ["traced / and compiled", "runs / at once", "RetraceError / f32[64,5] -> f32[63,5]"],
        ],
        [
            (above, below)
            for row in (
                ("batch", "[step]", "traced"),
                ("batch#1", "[step]#1", "runs"),
                ("batch#2", "[step]#2", "RetraceError"),
            )
            for above, below in itertools.pairwise(row)
        ],
    ),
}  # fmt: skip


class Box(NamedTuple):
    """Where one lies: the middle of its top, and its width."""

    x: float
    y: float
    width: float


def placed(flow: Flow) -> dict[str, tuple[Box, str]]:
    """Each box by name, with its small print; a row's boxes share its width by what they hold."""
    room = WIDTH - 2 * MARGIN - (34 if flow.back else 0)
    found: dict[str, tuple[Box, str]] = {}
    for i, row in enumerate(flow.rows):
        parts = [text.partition(" / ") for text in row]
        need = [max(9.3 * len(shown(name)), 6.9 * len(small)) + 20 for name, _, small in parts]
        space = (room - sum(need)) / (len(row) + 1)
        if space < 0:
            raise SystemExit(f"pictures: {row} is too wide")
        x = MARGIN + space
        for (name, _, small), width in zip(parts, need, strict=True):
            found[name] = Box(x + width / 2, MARGIN + i * (ROW + GAP), width), small
            x += width + space
    return found


def shown(name: str) -> str:
    """What stands in a box."""
    return name.partition("#")[0].strip("[]") if name.startswith("[") else name.partition("#")[0]


def drawn(flow: Flow, title: str) -> str:
    """The picture, on a card of its own: it looks the same on a dark page."""
    boxes = placed(flow)
    height = 2 * MARGIN + len(flow.rows) * (ROW + GAP) - GAP
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#666"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#fff"/>',
        *lines(flow, boxes),
        *(each for name, (box, small) in boxes.items() for each in node(name, box, small)),
        "</svg>",
        "",
    ])  # fmt: skip


def lines(flow: Flow, boxes: dict[str, tuple[Box, str]]) -> Iterator[str]:
    """The arrows, and the one that leads back along the right side."""
    names = [[text.partition(" / ")[0] for text in row] for row in flow.rows]
    every = [(a, b) for above, below in itertools.pairwise(names) for a in above for b in below]
    style = 'fill="none" stroke="#666" stroke-width="1.5" marker-end="url(#head)"'
    for start, end in flow.arrows or every:
        (a, _), (b, _) = boxes[start], boxes[end]
        if a.y == b.y:
            path = f"M{a.x + a.width / 2:.0f} {a.y + ROW / 2:.0f}H{b.x - b.width / 2:.0f}"
        else:
            path = f"M{a.x:.0f} {a.y + ROW:.0f}L{b.x:.0f} {b.y:.0f}"
        yield f'<path d="{path}" {style}/>'
    if flow.back:
        start, end, words = flow.back
        (a, _), (b, _) = boxes[start], boxes[end]
        side, above, below = WIDTH - 2 * MARGIN, b.y + ROW / 2, a.y + ROW / 2
        path = f"M{a.x + a.width / 2:.0f} {below:.0f}H{side}V{above:.0f}H{b.x + b.width / 2:.0f}"
        yield f'<path d="{path}" stroke-dasharray="5 4" {style}/>'
        place = f'transform="translate({side + 15} {(above + below) / 2:.0f}) rotate(-90)"'
        yield f'<text {place} text-anchor="middle" font-family="sans-serif" font-size="13" fill="#444">{words}</text>'


def node(name: str, box: Box, small: str) -> Iterator[str]:
    """A box: dark for a function, light for a value."""
    if not shown(name):
        return
    called = name.startswith("[")
    fill, ink, faint = ("#3f51b5", "#fff", "#e3e6f7") if called else ("#eef0fb", "#111", "#444")
    place = f'x="{box.x - box.width / 2:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{ROW}"'
    yield f'<rect {place} rx="{5 if called else 16}" fill="{fill}" stroke="#3f51b5"/>'
    for words, size, y, color in ((shown(name), 15, 20 if small else 28, ink), (small, 12, 37, faint)):
        if words:
            where = f'x="{box.x:.0f}" y="{box.y + y:.0f}" text-anchor="middle" font-size="{size}" fill="{color}"'
            yield f'<text {where} font-family="monospace">{escape(words)}</text>'


def pictures() -> dict[pathlib.Path, str]:
    """Every picture, drawn anew."""
    drawings = {FOLDER / f"{name}.svg": drawn(flow, name) for name, flow in FLOWS.items()}
    return drawings | {LOOP: drawn(ROUND, "the carry goes round")}


if __name__ == "__main__":
    sys.exit(written(__doc__, pictures))
