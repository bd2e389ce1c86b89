"""Find the cgroups of this process, versions 1 and 2. Their limits apply to it."""

from __future__ import annotations

import os


def folders(controller: str, root: str = "/") -> list[str]:
    """Return the folders of the process's cgroup and of the groups around it.

    Parameters
    ----------
    controller : str
        The resource, by its name in version 1: ``"cpu"``, ``"memory"``.
    root : str
        The folder that contains ``proc`` and ``sys``; tests use a fake one.

    Returns
    -------
    list of str
        Some of them may not exist.
    """
    mounted = os.path.join(root, "sys/fs/cgroup")
    found = []
    for line in read(root, "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":  # version 2, alone or beside version 1
            bases = [mounted, os.path.join(mounted, "unified")]
        elif controller in controllers.split(","):
            bases = [os.path.join(mounted, controllers), os.path.join(mounted, controller)]
        else:
            continue
        found += [group for base in bases for group in _groups_around(base, path)]
    return found


def read(folder: str, name: str) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read()
    except TimeoutError:  # raised by a signal handler, and an OSError, too
        raise
    except OSError:
        return ""


def _groups_around(base: str, path: str) -> list[str]:
    """Return the folders of the group `path` and of all groups around it, under `base`.

    In a container `base` is often the container's own group, while `path` exists only outside. Then
    only the last folder, `base` itself, exists, and it is the right one.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return [os.path.join(base, *parts[:depth]) for depth in range(len(parts), -1, -1)]
