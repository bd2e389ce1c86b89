"""Where the cgroups of this process are, versions 1 and 2: their limits are its machine."""

from __future__ import annotations

import os


def folders(controller: str, root: str = "/") -> list[str]:
    """Return the folders of the process's cgroup and of the groups around it.

    Parameters
    ----------
    controller : str
        What is to be limited, by its name in version 1: ``"cpu"``, ``"memory"``.
    root : str
        Where ``proc`` and ``sys`` are; a test's fake tree.

    Returns
    -------
    list of str
        Not all of them need exist.
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
    """Return a file's text, empty where it cannot be read."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read()
    except TimeoutError:  # a signal handler's, which is an OSError too
        raise
    except OSError:
        return ""


def _groups_around(base: str, path: str) -> list[str]:
    """Return the folders of the group `path` and of all groups around it, under `base`.

    A container often sees its own group mounted as `base` and a `path` that only exists outside;
    the last folder, `base` itself, is the right one then, and the others are not there.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return [os.path.join(base, *parts[:depth]) for depth in range(len(parts), -1, -1)]
