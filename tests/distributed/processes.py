"""Starts several Python processes on this machine that are to be one JAX program, and ends them whatever happens."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator

ROOT = pathlib.Path(__file__).parent.parent.parent


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


class Running:
    """A process whose output goes to a file: a pipe that nobody reads would stop it."""

    def __init__(self, arguments: list[str], log: pathlib.Path, devices: int) -> None:
        flags = re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        self.log = log
        with log.open("w") as file:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own: what it starts is killed with it
            )

    @property
    def said(self) -> str:
        """All that it printed so far."""
        return self.log.read_text()

    def until(self, text: str, timeout: float) -> None:
        """Waits until it printed a text."""
        ends = time.monotonic() + timeout
        while text not in self.said:
            assert self.popen.poll() is None, f"ended before it said {text!r}:\n{self.said}"
            assert time.monotonic() < ends, f"did not say {text!r} in {timeout} s:\n{self.said}"
            time.sleep(0.02)

    def end(self, timeout: float) -> int:
        """Waits until it ends; its exit status."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.said}") from None


@contextlib.contextmanager
def running(commands: list[list[str]], folder: pathlib.Path, devices: int) -> Generator[list[Running]]:
    """One process for each command; killed in the end, also when stopped by SIGSTOP."""
    folder.mkdir(parents=True, exist_ok=True)
    started: list[Running] = []
    try:
        for rank, command in enumerate(commands):
            started.append(Running(command, folder / f"{rank}.log", devices))
        yield started
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()


def ended_well(started: list[Running], timeout: float) -> list[str]:
    """What each printed, once all of them ended well."""
    ends = time.monotonic() + timeout
    for process in started:
        status = process.end(max(0.0, ends - time.monotonic()))
        assert status == 0, "\n".join(each.said for each in started)
    return [process.said for process in started]
