"""This process' memory, and a limit to it, on Linux: for examples that need little of it."""

import resource
from pathlib import Path


def status(field):
    """Return one of this process' numbers in /proc, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def limit_memory(allowed):
    """Allow this process `allowed` more bytes than it has now; return what it has in memory."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + allowed, resource.RLIM_INFINITY))
    return status("VmRSS")


def peak_memory():
    """The most memory that this process had since the limit was set."""
    return status("VmHWM")
