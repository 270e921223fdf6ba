"""`tests/test_docs.py`: the page `docs/trust.md`, from what is stored in `tests/results`; `--write` writes it.

What is stored in `tests/results` was written by the commands that the page names.
"""

import json
import pathlib
import re
import sys
import tomllib
from collections import Counter
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "trust.md", ROOT / "tests" / "results"
sys.path[:0] = [str(ROOT)]

import flaxsplit  # noqa: E402 (the installed wheel, where that is tested)
from benchmarks._report import where  # noqa: E402 (found beside this folder)
from tools.written import written  # noqa: E402 (found beside this folder)

PACKAGE = pathlib.Path(flaxsplit.__file__).parent
LIBRARIES = ("jax", "flax", "optax", "jaxtyping", "typeguard")

WORDS = {
    "test_law_1_split_and_merge": "1: split and merge lose nothing",
    "test_law_2_apply": "2: a wrapped model is its `apply`",
    "test_law_3_vmap": "3: a mapped example is the whole batch",
    "test_law_3_the_options_of_vmap": "3: each option of a map is `jax.vmap`'s, and each lane the model alone",
    "test_laws_4_and_6_the_loop_of_the_guide": "4 and 6: a step is the loop by hand; its average too",
    "test_law_5_scan": "5: a scan is the loop",
    "test_law_5_microbatches": "5: microbatches are the whole batch, of a loss that is a mean over rows",
    "test_law_8_mesh": "8: a mesh is one device",
    "test_a_settled_state_stays": "a settled state stays as it is, and one that cannot settle is named",
    "test_an_nnx_module_is_trained_as_by_nnx": "an NNX module's step is the loop of NNX",
    "test_training_in_any_order_is_the_plain_loop": (
        "any order of split, merge, step, scan, settle, evaluate, save, restore: the loop"
    ),
}


def page() -> str:
    """The page, from what is stored."""
    fuzz, soak = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("fuzz", "soak"))
    refused = re.search(r"^Of (\d+) calls.*?says it better", (ROOT / "docs" / "errors.md").read_text(), re.M | re.S)
    if not refused:
        raise SystemExit("trust: docs/errors.md does not say how many wrong calls were made")
    calls = f"{' '.join(refused[0].split())}."
    parts = [*laws(fuzz), *long(soak), *mutants(), *matrix(), *flags(), *WRONG, calls, "", REST]
    return "\n".join(["# Trust", "", HEAD, "", *parts])


def laws(found: Any) -> list[str]:
    """Examples tried, law by law."""
    rows = [f"| {WORDS[name]} | {tried} |" for name, tried in found["examples"].items()]
    total = sum(found["examples"].values())
    return [
        "## Laws under fuzz",
        "",
        FUZZ,
        "",
        "| law | examples |",
        "|---|---|",
        *rows,
        f"| all | {total} |",
        "",
        f"`{found['about']['command']}` on {where(found['about'])}.",
        "`make fuzz` tries 10,000 of each, and of each law in `tests/test_laws.py`.",
        "",
    ]


def long(found: Any) -> list[str]:
    """Steps run, and what stayed as it was."""
    seen, threads = found["seen"], found["threads"]
    grown = (max(seen["host"]) - seen["host"][0]) / 2**20
    return [
        "## A long run",
        "",
        f"{found['steps']:,} steps beside the loop by hand, batches of {', '.join(map(str, found['sizes']))} in turn: "
        f"{found['traces']} traces, {found['compiles']} compiles, equal bit for bit. "
        f"At each of {len(seen['arrays'])} looks {max(seen['arrays'])} arrays were alive "
        f"and {max(seen['device']):,} bytes on the device, after up to {max(seen['most on device']) / 1e6:.1f} MB; "
        f"host memory grew by {grown:.1f} MiB.",
        "",
        f"{threads['callers']} threads called one step, {threads['steps']} times each: {threads['compiles']} compiles, "
        "and each result equal to that of a thread alone.",
        "",
        f"`{found['about']['command']}` (`make soak`) on {where(found['about'])}.",
        "",
    ]


def _left(tried: Counter[str]) -> list[str]:
    """Says which modules of the package have not been tried."""
    left = [f"`{path.name}`" for path in sorted(PACKAGE.glob("*.py")) if path.name not in tried]
    return [f"Not tried then: {', '.join(left)}."] if left else []


def mutants() -> list[str]:
    """How many changes of the package a test noticed, and why the others make no difference."""
    found = json.loads((RESULTS / "mutants.json").read_text())
    reasons = tomllib.loads((ROOT / "tests" / "survivors.toml").read_text())["survivors"]
    survived = {name for name, came in found["mutants"].items() if came == "survived"}
    explained = [name for reason in reasons for name in reason["mutants"]]
    if survived != set(explained) or len(survived) != len(explained):
        odd = sorted(survived ^ set(explained)) or sorted(name for name in survived if explained.count(name) > 1)
        raise SystemExit(
            "\n".join(["trust: each survivor needs one reason in tests/survivors.toml, none other:", *odd])
        )
    tried = Counter(name.partition(":")[0] for name in found["mutants"])
    lived = Counter(name.partition(":")[0] for name in survived)
    rows = [f"| `{name}` | {count} | {count - lived[name]} | {lived[name]} |" for name, count in sorted(tried.items())]
    total = len(found["mutants"])
    return [
        *MUTANTS,
        "",
        "| module | changes | noticed by a test | explained |",
        "|---|---|---|---|",
        *rows,
        f"| all | {total} | {total - len(survived)} ({1 - len(survived) / total:.1%}) | {len(survived)} |",
        "",
        "| explained | why the result is equal |",
        "|---|---|",
        *(f"| {len(reason['mutants'])} | {reason['why']} |" for reason in reasons),
        "",
        f"`make mutants` on {where(found['about'])}.",
        *_left(tried),
        "",
    ]


def matrix() -> list[str]:
    """What `make versions` stored: for each Python that the package names, and both ends, or that it has not run."""
    stored = json.loads((RESULTS / "versions.json").read_text())
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    keys = [f"{python}-{end}" for python in pythons for end in ("lowest", "newest")]
    return [*VERSIONS, *(tested(key, stored.get(key)) for key in keys), "", RAN, ""]


def flags() -> list[str]:
    """What `make flags` stored, or that it has not run."""
    stored = json.loads((RESULTS / "flags.json").read_text())
    asked = re.search(r"^FLAGS \?= ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    names = asked[1].replace("\\", "").split() if asked else []
    counts = {name: counted(name, found) for name, found in stored.items()}
    rows = [f"| `{name}` | {counts.get(name, 'not run |')} |" for name in names]
    return [*FLAGS, *rows, "", *(f"`make flags` on {where(found['about'])}." for found in [*stored.values()][:1]), ""]


def counted(key: str, found: Any) -> str:
    """How many tests passed and were skipped, of all: a run of some is none to tell of."""
    if found["chosen"]:
        raise SystemExit(f"trust: {key} ran a part of the tests only: `{found['about']['command']}`")
    return f"{found['passed']} | {found['skipped']}"


def tested(key: str, found: Any) -> str:
    """A row: Python, versions, and how many tests passed and were skipped."""
    python, end = key.split("-")
    if found is None:
        return f"| {python} {end} |{' |' * len(LIBRARIES)} not run | |"
    versions = " | ".join(found["about"]["versions"][name] for name in LIBRARIES)
    return f"| {found['about']['python']} {end} | {versions} | {counted(key, found)} |"


HEAD = "How we tried to break flaxsplit, how often, and the command that repeats each test."
FUZZ = """Hypothesis draws models (Dense, Conv, BatchNorm, Dropout, Embed, recurrent cells, attention with a cache, sown
values, metadata, several dtypes; layers of NNX), optimizers, stacks of combinators and their options, and compares
them with loops written by hand.
Each test of the suite draws for a few seconds. The table shows a longer run."""
VERSIONS = [
    "## Versions",
    "",
    "Each row is the wheel, built from the sdist, in its own environment. The tests run from outside the source tree.",
    "",
    f"| Python | {' | '.join(LIBRARIES)} | passed | skipped |",
    "|---" * (len(LIBRARIES) + 3) + "|",
]
RAN = """`make versions RECORD=tests/results/versions.json` runs all; `ONLY=3.12-newest` runs one. A test is skipped if
that version of a library lacks the feature, or if the test needs the sources of the package."""
MUTANTS = [
    "## Changes of the package",
    "",
    """cosmic-ray changes the package in one place at a time: it inverts a condition, swaps `and` and `or`, adds one
to a number, moves a bound, empties a loop, stops catching an exception, removes a decorator. The type checkers check
annotations. Each change that no test notices has its reason in `tests/survivors.toml`.""",
]
FLAGS = [
    "## JAX's flags",
    "",
    """All tests run under each flag. A test that cannot pass under a flag is skipped with a reason, such as a count of
compiles when nothing is compiled. Benchmarks are skipped if a flag changes what they measure. The tests set
`JAX_PLATFORMS=cpu` unless it is set; if it is empty, JAX chooses.""",
    "",
    "| flag | passed | skipped |",
    "|---|---|---|",
]
WRONG = ["## Wrong calls", ""]
REST = """[Errors](errors.md) lists them, argument by argument. `make test` runs them all.

## The rest

- Every change runs the suite on the built wheel, on Python 3.11 with the oldest versions supported (`make lowest`) and
  on Python 3.12 with the newest of everything (`make newest`), and with every signature checked at run time
  (`make checked`). The wheel holds the package and its licence, file by file, and trains in an empty environment.
- Nothing in the package opens a socket or a file, pickles or evaluates. A test reads its syntax, and an audit hook
  watches it run (`tests/test_trust.py`). Two builds give the same wheel.
- `make audit` looks up known vulnerabilities of the installed packages.
- `tests/api.txt` stores every public signature. A changed one fails the tests until the changelog mentions it.
"""


if __name__ == "__main__":
    sys.exit(written(__doc__, lambda: {PAGE: page()}))
