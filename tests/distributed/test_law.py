"""Law 8 in two real processes that speak over loopback: one pair of them goes through all cases."""

import os
import pathlib
import re

import jax
import pytest

from tests.flags import needs_jit

from .processes import ended_well, free_port, running

CASES = 2 + 11 + 8 + (4 if jax.__version_info__ >= (0, 7) else 3)


@pytest.mark.slow
@needs_jit
@pytest.mark.skipif("FLAXSPLIT_TYPECHECKER" in os.environ, reason="signatures are checked where steps are traced alike")
def test_every_optimizer_and_model_in_two_processes(tmp_path: pathlib.Path) -> None:
    port, worker = str(free_port()), ["-m", "tests.distributed.law_worker"]
    commands = [[*worker, port, "2", str(rank), str(tmp_path)] for rank in range(2)]
    with running(commands, tmp_path, devices=4) as started:
        for said in ended_well(started, timeout=900):
            assert [line for line in said.splitlines() if line.startswith("wrong")] == []
            assert len(re.findall("^ok ", said, re.MULTILINE)) == CASES  # nothing may come before the first
            assert f"all {CASES} cases" in said
