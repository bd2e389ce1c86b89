"""Run a program on real processes, one per rank, and collect the results.

A program is a module with a function for every scenario, which takes a `Rank`. All of a program's
scenarios run in one launch, since a process takes seconds to import PyTorch. Run as a script,
this file is one rank: it calls the scenarios in order and pickles what they return or raise.
"""

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
LAUNCHES = [("torch", 2), ("torch", 3), ("mpi", 3)]
SECONDS = 120  # after that it hangs; a normal launch takes ten


class Rank(NamedTuple):
    """The rank that runs a scenario."""

    rank: int
    size: int
    group: Any
    # Collective: makes a group of these ranks only; None on the others.
    group_of: Any
    # A folder where all ranks can leave files for each other.
    directory: Path


class Raised(NamedTuple):
    """An exception that a scenario's call raised."""

    kind: str
    text: str


def attempt(call, *args, **options):
    """Return what a call returns, or what it raised."""
    try:
        return call(*args, **options)
    except Exception as error:  # noqa: BLE001  # the tests compare it
        return Raised(type(error).__name__, str(error))


@contextmanager
def interrupted_soon(this, bad, name):
    """Make a signal handler raise TimeoutError on one rank while it waits for the others.

    Yields a function: on the failing rank it starts the interrupt, on the others it waits until the
    interrupt was sent. Python runs the handler when the rank's wait is over.
    """
    done = this.directory / f"{name}-{bad}"

    def time_is_up(*_):
        raise TimeoutError("time is up")

    def interrupt():
        time.sleep(0.2)  # time for the rank to start waiting
        os.kill(os.getpid(), signal.SIGALRM)
        done.touch()

    thread = threading.Thread(target=interrupt)

    def start():
        if this.rank == bad:
            thread.start()
            return
        end = time.monotonic() + SECONDS / 2
        while not done.exists():
            assert time.monotonic() < end, "nobody was interrupted"
            time.sleep(0.01)

    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        yield start
    finally:
        if this.rank == bad:
            thread.join()
        signal.signal(signal.SIGALRM, before)


# ---- The parent


def missing(transport):
    """Why a launch is not possible, or None."""
    module = {"torch": "torch", "mpi": "mpi4py"}[transport]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if transport == "mpi" and which("mpiexec") is None:
        return "there is no mpiexec (Debian: openmpi-bin libopenmpi-dev)"
    return None


def launch(program, transport, size, directory):
    """Run a program's scenarios on `size` ranks; return {scenario: result} for each rank."""
    reason = missing(transport)
    if reason:
        pytest.skip(reason)
    one = [sys.executable, str(HERE / "launch.py"), program, transport, str(size), str(directory)]
    if transport == "mpi":
        options = ["-n", str(size), "--allow-run-as-root", "--oversubscribe"]
        commands = [["mpiexec", *options, *one]]
    else:
        commands = [[*one, str(rank)] for rank in range(size)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", BNFAST_NUM_THREADS="1")
    with _killed_at_the_end() as processes:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                )
            )
        _wait(processes)
    return [pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(size)]


@contextmanager
def _killed_at_the_end():
    processes = []
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def _wait(processes):
    end = time.monotonic() + SECONDS
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {SECONDS} s: {' '.join(process.args)}")
        assert process.returncode == 0, output


# ---- One rank


def main(program, transport, size, directory, rank=None):
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    with _joined(transport, int(size), directory, rank) as this:
        module = __import__(program)
        results = {scenario.__name__: attempt(scenario, this) for scenario in module.SCENARIOS}
        Path(directory, f"{this.rank}.pickle").write_bytes(pickle.dumps(results))


@contextmanager
def _joined(transport, size, directory, rank):
    if transport == "mpi":
        from mpi4py import MPI

        world = MPI.COMM_WORLD

        def group_of(ranks):
            comm = world.Split(0 if world.rank in ranks else MPI.UNDEFINED)
            return None if comm == MPI.COMM_NULL else comm

        yield Rank(world.rank, world.size, world, group_of, Path(directory))
        return

    from datetime import timedelta

    import torch.distributed as dist

    meeting = f"file://{directory}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, world_size=size, rank=int(rank), timeout=timedelta(seconds=60)
    )

    def group_of(ranks):
        group = dist.new_group(ranks)
        return group if int(rank) in ranks else None

    yield Rank(int(rank), size, None, group_of, Path(directory))
    dist.barrier()
    os._exit(0)  # PyTorch sometimes aborts when its threads end


if __name__ == "__main__":
    # The programs pickle objects of this module by its own name.
    sys.path.insert(0, str(HERE))
    import launch as this_module

    this_module.main(*sys.argv[1:])
