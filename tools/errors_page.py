"""`tests/test_bad_input.py`: the page `docs/errors.md`; `--write` writes it.

The classes with what each is for, the table of wrong calls that `tests/test_bad_input.py` makes, and the messages that
the tests have whole, so that the site's search finds an error by its text.
"""

import collections
import inspect
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
sys.path[:0] = [str(ROOT)]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import flaxsplit as fs  # noqa: E402 (JAX reads the variables above when it is imported)
from tests import wrong_calls as wrong  # noqa: E402
from tools.written import written  # noqa: E402 (found beside this folder)

CLASSES = (
    fs.CollectionError,
    fs.SignatureError,
    fs.StateDriftError,
    fs.UnsyncedStateError,
    fs.RetraceError,
    fs.RetraceWarning,
    fs.UntouchedStateWarning,
    fs.DroppedStateWarning,
)


def page() -> str:
    """The page, from the classes and from what each wrong call ends in now."""
    right = wrong.fixed()
    outcomes = {call: {kind: wrong.outcome(call, kind, right) for kind in wrong.KINDS} for call in wrong.CALLS}
    classes = [
        f"| `{each.__name__}` | `{each.__mro__[2].__name__}` | {inspect.getdoc(each)} |".replace("\n", " ")
        for each in CLASSES
    ]
    rows = [f"| `{call}` | {said(by_kind)} |" for call, by_kind in outcomes.items()]
    refused = collections.Counter(name for by_kind in outcomes.values() for name in by_kind.values())
    accepted = refused.pop("accepted")
    foreign = sum(count for name, count in refused.items() if "." in name)
    ours = refused.total() - foreign
    return "\n".join([
        "# Errors",
        "",
        "Every message says which function and argument failed, what was required, what came (by key path, never by",
        "value), the likely cause, and the corrected call. Each is an attribute of the error too: `where`, `required`,",
        "`leaves`, `cause`, `fix`.",
        "",
        "| class | is a | when |",
        "|---|---|---|",
        *classes,
        "",
        "## Wrong calls",
        "",
        f"Every argument of every function, given {len(wrong.KINDS)} kinds of value: {', '.join(wrong.KINDS)}.",
        f"Of {refused.total() + accepted} calls {accepted} are right for that argument, {refused.total()} are refused:",
        f"{ours} by an error of ours, {foreign} by one of JAX's or Python's own, which",
        "says it better. None changes or deletes what it was given. `tests/test_bad_input.py` makes them all,",
        "`tools/errors_page.py --write` writes this page.",
        "",
        "| wrong argument | refused with |",
        "|---|---|",
        *rows,
        "",
        "## Messages",
        "",
        "By function, without the leaves. `tests/test_fixes.py` types each fix as printed, or has a reason why not.",
        *messages("".join(path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py")))),
        "",
    ])  # fmt: skip


WHOLE = re.compile(r"whole\(\s*\"{3}\n(.+?)\n *\"{3}", re.DOTALL)
MESSAGE = re.compile(r"(.+?)\n +got:\n.*?\n +likely cause: (.+?)\n +fix: (.+)", re.DOTALL)


def messages(tests: str) -> Iterator[str]:
    """What was required as a heading, with each likely cause and its fix."""
    found: dict[str, list[str]] = {}
    text = tests.replace("\\\n", "").replace("HEAD", "apply_gradients(tx, carry, grads, new_state)")
    for each in filter(None, map(MESSAGE.fullmatch, WHOLE.findall(text))):
        head, cause, fix = each.groups()
        found.setdefault(head.strip(), []).append(f"likely cause: {cause}\nfix: {fix}")
    for head in sorted(found):
        yield f"\n### `{head}`\n\n```text"
        yield "\n\n".join(dict.fromkeys(found[head]))
        yield "```"


def said(by_kind: dict[str, str]) -> str:
    """One call's outcomes: each error with how many kinds end in it, the rare ones by kind."""
    kinds = collections.defaultdict(list)
    for kind, name in by_kind.items():
        kinds[name].append(kind)
    kinds.pop("accepted", None)
    return "; ".join(
        f"`{name.removeprefix('builtins.')}`: {', '.join(each) if len(each) < 4 else f'{len(each)} kinds'}"
        for name, each in sorted(kinds.items())
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", fs.UntouchedStateWarning)
    sys.exit(written(__doc__, lambda: {PAGE: page()}))
