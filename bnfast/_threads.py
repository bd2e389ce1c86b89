"""How many threads a call may use: the numbers asked for, and the limits of the machine.

The number is the first of these that applies: one, in a child forked after threads had started
(`src/threads_<system>.c`); the number given to `num_threads` or `set_num_threads` in this thread;
the number given to `set_num_threads` in the main thread; `BNFAST_NUM_THREADS`; `OMP_NUM_THREADS`;
the cores this process may use by its affinity and its cgroup's quota. It is never more than
OpenMP's own number in this thread if that was lowered, as threadpoolctl and `torch.set_num_threads`
do. The number is a maximum: small work runs on fewer threads, and results are the same to the bit
for any number.
"""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, SupportsIndex

from . import _cgroup, _errors, _options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextvars import Token
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["num_threads", "set_num_threads"]

# The limit protects against typing errors that would start thousands of threads.
MAX_THREADS = 1024

# In free-threaded Python 3.14 new threads may inherit context variables, and then also this one.
_asked_here: ContextVar[int | None] = ContextVar("bnfast_num_threads", default=None)


def set_num_threads(n: SupportsIndex) -> None:
    """Set how many threads bnfast may use, from now on, in the calling thread.

    In the main thread this is also the default of the process, for threads that have not set a
    number themselves.

    Parameters
    ----------
    n : int
        From 1 to 1024. More than the cores this process may use is allowed, but slower.

    Raises
    ------
    TypeError
        If `n` is not an integer (a bool is not).
    ValueError
        If `n` is out of range.

    Notes
    -----
    A process forked after its parent had started OpenMP's threads (for bnfast or for another
    library) uses one thread, whatever is set here. Threads do not survive a fork, and waiting for
    them would never end.

    If the system allows no more threads (a low ``ulimit -u``, a container's limit of processes, a
    full address space), calls run on the threads that exist.

    A call needs at most 128 KiB of stack, in the calling thread and in each of OpenMP's. If you
    make stacks smaller than the system's default (`threading.stack_size`, ``OMP_STACKSIZE``), keep
    them at 256 KiB or more.
    """
    global _default
    n = _checked(n)
    if threading.get_ident() == threading.main_thread().ident:
        _default = n, "set_num_threads"
        _asked_here.set(None)
    else:
        _asked_here.set(n)


def num_threads(n: SupportsIndex) -> _Asking:
    """Set how many threads bnfast may use inside a ``with`` block, in the calling thread.

    Blocks may be nested, and blocks in different threads do not affect one another.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Returns
    -------
    context manager
        Restores the former number at the end. It also decorates a function, but not one whose
        body runs after its call has returned (``async def``, a generator). In a generator, a
        block must not contain a ``yield``.

    Raises
    ------
    TypeError
        If `n` is not an integer (a bool is not).
    ValueError
        If `n` is out of range.
    """
    return _Asking(_checked(n))


def granted(lost: bool, lowered: int) -> tuple[int, str]:
    """Return how many threads a call from this thread may use, and what decides the number.

    `lost` says that a fork lost OpenMP's threads; `lowered` is what OpenMP's own number was lowered
    to, 0 if it was not. `_core` knows both.
    """
    if lost:
        return 1, "forked after threads had started"
    number, source = _asked_here.get(), "asked for in this thread"
    if number is None:
        number, source = _process_default()
    if 0 < lowered < number:
        return lowered, "limited by way of OpenMP, as by threadpoolctl"
    return number, source


class _Asking:
    """What `num_threads` returns: sets the number in a block, or while a function runs."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._token: Token[int | None] | None = None

    def __enter__(self) -> None:
        if self._token is not None:
            raise RuntimeError("this num_threads is in use; expected another one inside its block")
        self._token = _asked_here.set(self._n)

    def __exit__(self, *error: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            _asked_here.reset(token)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function. Several calls of it may run at the same time."""
        _check_runs_when_called(function)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with _Asking(self._n):
                return function(*args, **kwargs)

        return run


def _check_runs_when_called(function: Any) -> None:
    """Refuse functions whose body runs after their call has returned, when the number is reset.

    A generator's body and the code that iterates over it share one context and run in turns. A
    number set in the body would apply to both.
    """
    import inspect

    expected = "expected a function that runs when it is called"
    if not callable(function) or isinstance(function, type | staticmethod):
        raise TypeError(f"num_threads decorates {_errors.shown(function)}; {expected}")
    for kind, is_one in (
        ("a generator function", inspect.isgeneratorfunction),
        ("a coroutine function", inspect.iscoroutinefunction),
        ("an asynchronous generator function", inspect.isasyncgenfunction),
    ):
        if is_one(function) or is_one(type(function).__call__):
            raise TypeError(
                f"num_threads decorates {_errors.shown(function)}, {kind}, whose body runs after "
                f"the call has returned; {expected} (in the body, put `with num_threads(n):` "
                "around what neither yields nor awaits)"
            )


def _checked(n: SupportsIndex) -> int:
    expected = f"an integer from 1 to {MAX_THREADS}"
    number = _options.integer("n", n, expected)
    if not 1 <= number <= MAX_THREADS:
        raise ValueError(f"n is {_errors.shown(number)}; expected {expected}")
    return number


# ---- the process default


def _from_environment(environ: Mapping[str, str]) -> tuple[int, str] | None:
    """Return the number in the environment, and the name of its variable.

    A bad `BNFAST_NUM_THREADS` is an error, since only bnfast can report it. A bad
    `OMP_NUM_THREADS` is ignored, as OpenMP runtimes do. If it is a list, one number per nesting
    level, the first number counts.
    """
    own = environ.get("BNFAST_NUM_THREADS", "").strip()
    if own:
        number = _options.decimal(own)
        if number is None or not 1 <= number <= MAX_THREADS:
            raise ImportError(
                f"BNFAST_NUM_THREADS is {own!r:.60}; expected an integer from 1 to {MAX_THREADS}"
            )
        return number, "BNFAST_NUM_THREADS"
    omp = _options.decimal(environ.get("OMP_NUM_THREADS", "").split(",")[0].strip())
    if omp is not None and omp >= 1:
        return min(omp, MAX_THREADS), "OMP_NUM_THREADS"
    return None


def _from_machine(root: str = "/") -> tuple[int, str]:
    """Return the cores this process may use, and what limits them."""
    if hasattr(os, "sched_getaffinity"):
        cores, source = len(os.sched_getaffinity(0)), "cores in this process's affinity"
    else:
        cores, source = os.cpu_count() or 1, "cores"
    quota = cgroup_cores(root)
    if quota is not None and quota < cores:
        cores, source = quota, "cgroup CPU quota"
    return min(cores, MAX_THREADS), source


def cgroup_cores(root: str = "/") -> int | None:
    """Return the number of cores that the process's cgroup quotas allow, rounded up.

    Parameters
    ----------
    root : str
        The folder that contains ``proc`` and ``sys``; tests use a fake one.

    Returns
    -------
    int or None
        The smallest quota of the process's cgroup and the groups around it, cgroup version 1 or
        2; None if there is no quota.
    """
    quotas = [_quota(group) for group in _cgroup.folders("cpu", root)]
    limits = [quota for quota in quotas if quota is not None]
    return min(limits) if limits else None


def _quota(group: str) -> int | None:
    """Return the number of cores that one cgroup folder allows, None if it sets no limit."""
    fields = _cgroup.read(group, "cpu.max").split()
    if not fields:
        fields = [
            _cgroup.read(group, name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        ]
    if len(fields) != 2 or not all(field.isdecimal() for field in fields):
        return None  # "max", -1, or no such files
    quota, period = map(int, fields)
    return max(1, -(-quota // period)) if period else None


# The environment is read at import, where an error in it can be reported. The machine is asked at
# the first call that needs the number, which keeps the import short. Number and source are one
# object, which another thread replaces whole.
_default: tuple[int, str] | None = _from_environment(os.environ)
_machine: tuple[int, str] | None = None


def _process_default() -> tuple[int, str]:
    global _machine
    if _default is not None:
        return _default
    if _machine is None:
        _machine = _from_machine()
    return _machine
