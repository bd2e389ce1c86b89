"""How many threads a call may use: who asked for what, and what the machine grants.

The number is, in this order: one in a child forked after threads had started (`src/threads.c`);
what `num_threads` or `set_num_threads` asked for in this thread; what `set_num_threads` asked for
in the main thread; `BNFAST_NUM_THREADS`; `OMP_NUM_THREADS`; the cores this process may use by its
affinity and its cgroup's quota; and no more than somebody lowered OpenMP's own number to in this
thread, as threadpoolctl and `torch.set_num_threads` do. It is a ceiling: small work runs on fewer,
and results are the same to the bit for any number.
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

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]

# A number that is a typing slip must not make thousands of threads.
MAX_THREADS = 1024

# Free-threaded Python 3.14 lets new threads inherit context variables, and then they inherit this.
_asked_here: ContextVar[int | None] = ContextVar("bnfast_num_threads", default=None)


def set_num_threads(n: SupportsIndex) -> None:
    """Set how many threads bnfast may use, from now on, in the calling thread.

    In the main thread this is also the process's default: what threads use that have not asked
    for a number themselves.

    Parameters
    ----------
    n : int
        From 1 to 1024. More than the cores this process may use is allowed, and slower.

    Raises
    ------
    TypeError
        If `n` is not an integer (a bool is not).
    ValueError
        If `n` is out of range.

    Notes
    -----
    A process forked after its parent had started OpenMP's threads, for bnfast or for anybody else,
    stays on one, whatever is set here: they do not survive a fork, and waiting for them would never
    end.

    Where the system grants no more threads, as under a tight ``ulimit -u``, a container's limit of
    processes or a full address space, calls run on those that there are.

    A call needs 128 KiB of stack at most, in the calling thread and in each of OpenMP's. Where
    stacks are made smaller than the system's default (`threading.stack_size`, ``OMP_STACKSIZE``),
    leave them at least 256 KiB.
    """
    global _default, _default_source
    n = _checked(n)
    if threading.get_ident() == threading.main_thread().ident:
        _default, _default_source = n, "set_num_threads"
        _asked_here.set(None)
    else:
        _asked_here.set(n)


def get_num_threads() -> int:
    """Return how many threads a call from this thread may use.

    Returns
    -------
    int
        At least 1; exactly 1 in a process forked after its parent had started threads.
    """
    return limit()


def num_threads(n: SupportsIndex) -> _Asking:
    """Set how many threads bnfast may use inside a ``with`` block, in the calling thread.

    Blocks nest, and blocks in different threads do not disturb one another.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Returns
    -------
    context manager
        Restores the former number on the way out. It also decorates a function, but none whose
        body runs after its call has returned (``async def``, a generator); in a generator, a
        block must not contain a ``yield``.

    Raises
    ------
    TypeError
        If `n` is not an integer (a bool is not).
    ValueError
        If `n` is out of range.
    """
    return _Asking(_checked(n))


def limit() -> int:
    """Return how many threads this call may use: `get_num_threads`, for the extension."""
    return describe()[0]


def describe() -> tuple[int, str]:
    """Return the number of threads and where it comes from, for people to read."""
    if threads_lost():
        return 1, "forked after threads had started"
    number, source = _asked_here.get(), "asked for in this thread"
    if number is None:
        number, source = _process_default(), _default_source
    lowered = openmp_limit()
    if 0 < lowered < number:
        return lowered, "limited by way of OpenMP, as by threadpoolctl"
    return number, source


def openmp_limit() -> int:
    """Return what OpenMP's own number was lowered to; `_core` has its own, which knows."""
    return 0


def threads_lost() -> bool:
    """Return whether a fork lost OpenMP's threads; `_core` has its own, which knows."""
    return False


class _Asking:
    """The number of threads in a block, or while a function runs: what `num_threads` returns."""

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
        """Decorate a function, whose calls may then run at the same time."""
        _check_runs_when_called(function)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with _Asking(self._n):
                return function(*args, **kwargs)

        return run


def _check_runs_when_called(function: Any) -> None:
    """Refuse what runs once its call has returned, where the number would not hold any more.

    A generator's body runs in turns with whoever iterates, in one context: what it asked for would
    hold for both.
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
    """Return the number the environment asks for, and which variable did.

    A bad `BNFAST_NUM_THREADS` is an error, since nobody but us would report it. A bad
    `OMP_NUM_THREADS` is passed over, as OpenMP runtimes do; its list form, one number a nesting
    level, counts by its first.
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
    """Return the cores that the cgroup quotas of this process amount to, rounded up.

    Parameters
    ----------
    root : str
        Where ``proc`` and ``sys`` are; a test's fake tree.

    Returns
    -------
    int or None
        The smallest quota of the process's cgroup and the groups around it, cgroup version 1 or
        2; None where there is none.
    """
    quotas = [_quota(group) for group in _cgroup.folders("cpu", root)]
    limits = [quota for quota in quotas if quota is not None]
    return min(limits) if limits else None


def _quota(group: str) -> int | None:
    """Return the cores one cgroup folder grants, None where it sets no limit."""
    fields = _cgroup.read(group, "cpu.max").split()
    if not fields:
        fields = [
            _cgroup.read(group, name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        ]
    if len(fields) != 2 or not all(field.isdecimal() for field in fields):
        return None  # "max", -1, or no such files
    quota, period = map(int, fields)
    return max(1, -(-quota // period)) if period else None


# The environment is read at import, where a mistake in it can be reported; the machine is asked
# at the first call that needs to know, which keeps the import short.
_default, _default_source = _from_environment(os.environ) or (0, "")


def _process_default() -> int:
    global _default, _default_source
    if not _default:
        _default, _default_source = _from_machine()
    return _default
