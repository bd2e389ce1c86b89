"""Real processes for the tests: a program on every rank, and what each of them found.

A program is a module with a function for every scenario, taking a `Rank`. All of a program's
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
SECONDS = 120  # after which something hangs; an unhindered launch takes ten


class Rank(NamedTuple):
    """Who a scenario is run by."""

    rank: int
    size: int
    group: Any
    # Collective: a group of these ranks only; None on the others.
    group_of: Any
    # Where all ranks can leave files for each other.
    directory: Path


class Raised(NamedTuple):
    """What a scenario's call raised."""

    kind: str
    text: str


def attempt(call, *args, **options):
    """What a call returns or raises."""
    try:
        return call(*args, **options)
    except Exception as error:  # noqa: BLE001  # which one is what the tests look at
        return Raised(type(error).__name__, str(error))


@contextmanager
def interrupted_soon(this, bad, name):
    """A signal handler raises TimeoutError on one rank, while it waits for the others.

    What is yielded starts that on the rank at fault, and on the others waits until it was done.
    Python runs the handler once the rank has got what it was waiting for.
    """
    done = this.directory / f"{name}-{bad}"

    def time_is_up(*_):
        raise TimeoutError("time is up")

    def interrupt():
        time.sleep(0.2)  # in which the rank gets where it waits
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
    """Why there can be no launch, or None."""
    module = {"torch": "torch", "mpi": "mpi4py"}[transport]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if transport == "mpi" and which("mpiexec") is None:
        return "there is no mpiexec (Debian: openmpi-bin libopenmpi-dev)"
    return None


def launch(program, transport, size, directory):
    """Run a program's scenarios on `size` ranks: a list of {scenario: result}, by rank."""
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
    os._exit(0)  # PyTorch aborts now and then where its threads are taken down


if __name__ == "__main__":
    # The programs unpickle and pickle what this module defines under its own name.
    sys.path.insert(0, str(HERE))
    import launch as this_module

    this_module.main(*sys.argv[1:])
