"""Steps that make a folder of build/windows, each again only when what it is made from changes."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent
BUILD = ROOT / "build" / "windows"
MADE_FROM = ".made-from"


def digest(*parts):
    """Of texts and the contents of files and folders."""
    total = hashlib.sha256()
    for part in parts:
        whole = Path(part) if isinstance(part, Path) else None
        files = sorted(whole.rglob("*")) if whole and whole.is_dir() else [whole]
        for file in files:
            if file is None:
                total.update(str(part).encode())
            elif file.is_file():
                total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def made(name, make, *parts):
    """Return the folder of this name; `make` fills it where the parts are not those of last time.

    A folder that was left half made is made anew.
    """
    folder = BUILD / name
    mark, key = folder / MADE_FROM, digest(*parts)
    if not mark.exists() or mark.read_text("ascii") != key:
        print(f"== {name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        mark.write_text(key, "ascii")
    return folder


def run(*command, **options):
    """Run a command; exit with its output if it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
