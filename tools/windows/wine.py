"""Programs for Windows, run here by wine."""

import os
import shutil
import subprocess
import sys

from steps import BUILD

# build/windows is drive W, and no other drive has this system's files: what looks for /proc must
# not find it.
DRIVE = "w:"
PREFIX = BUILD / "prefix"
QUIET = {"WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml,winedbg.exe=d"}
# Wine promises any memory that is asked for, and a test asks for 52 TB: the system then ends any
# process. With a limit the program is told that there is none.
MOST_MEMORY = 64 * 2**30
PASSED_ON = ("BNFAST_ISA", "BNFAST_NUM_THREADS", "HYPOTHESIS_PROFILE")


def environment(**more):
    others = ("PYTHON", "BNFAST", "WINE", "OMP")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(others) or k in PASSED_ON}
    return {**kept, **QUIET, "WINEPREFIX": str(PREFIX), "WINEARCH": "win64", **more}


def make_prefix(folder):
    """A step: an empty Windows."""
    subprocess.run(["wineboot", "--init"], env=environment(), capture_output=True, check=True)
    subprocess.run(["wineserver", "--wait"], env=environment(), check=True)
    drives = folder / "dosdevices"
    for drive in drives.iterdir():
        if drive.name != "c:":
            drive.unlink()
    (drives / DRIVE).symlink_to("../..")


def path(file):
    """Windows's name of a file in build/windows."""
    return "\\".join([DRIVE.upper(), *file.relative_to(BUILD).parts])


def start_services():
    """Start what wine runs beside any program, or find that it runs.

    A server that stays for a minute saves seconds of the next start. Its services have the streams
    of the program that they were started with, which then end a minute after it.
    """
    subprocess.run(["wineserver", "--persistent=60"], env=environment(), check=False)
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.run(["wine", "cmd", "/c", "exit"], env=environment(), check=True, **nowhere)


def start(*command, cwd, **more):
    """Start a program. Its streams are pipes: Python takes no other file of this system's there."""
    start_services()
    process = subprocess.Popen(
        ["prlimit", f"--as={MOST_MEMORY}", shutil.which("wine"), *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=environment(**more),
    )
    process.stdin.close()
    return process


def run(*command, cwd=BUILD, **more):
    """Run a program, its output being ours; return its exit status."""
    process = start(*command, cwd=cwd, **more)
    while some := process.stdout.read1():
        sys.stdout.buffer.write(some.replace(b"\r\n", b"\n"))
        sys.stdout.buffer.flush()
    return process.wait()


def output_of(*command, cwd=BUILD, **more):
    """Run a program; return its output, or exit with it if the program fails."""
    process = start(*command, cwd=cwd, **more)
    output = process.stdout.read().decode("utf-8", "replace").replace("\r\n", "\n")
    if process.wait():
        sys.exit(f"{command}: {process.returncode}\n{output}")
    return output
