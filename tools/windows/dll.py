"""What a DLL exports, as its file says (the "PE" format), and import libraries."""

import struct
from dataclasses import dataclass

from compiler import zig
from steps import run


@dataclass(frozen=True)
class Section:
    address: int
    size: int
    offset: int  # in the file


def sections(file, header):
    count, optional = struct.unpack_from("<6xH12xH", file, header)
    table = header + 24 + optional
    for at in range(table, table + 40 * count, 40):
        _, address, size, offset = struct.unpack_from("<8x4I", file, at)
        yield Section(address, size, offset)


def exports(path):
    """Return the names that a 64-bit DLL exports."""
    file = path.read_bytes()
    (header,) = struct.unpack_from("<I", file, 0x3C)
    if file[header : header + 4] != b"PE\0\0":
        raise ValueError(f"{path} is no DLL")
    found = list(sections(file, header))

    def offset(address):
        (home,) = (s for s in found if s.address <= address < s.address + s.size)
        return address - home.address + home.offset

    (directory,) = struct.unpack_from("<I", file, header + 24 + 112)
    count, _, names = struct.unpack_from("<24x3I", file, offset(directory))
    for (address,) in struct.iter_unpack("<I", file[offset(names) :][: 4 * count]):
        start = offset(address)
        yield file[start : file.index(b"\0", start)].decode("ascii")


def definition(name, entries):
    """The text of a .def file."""
    return "\n".join([f"LIBRARY {name}", "EXPORTS", *entries, ""])


def make_import_library(dll, target):
    text = target.with_suffix(".def")
    text.write_text(definition(dll.name, exports(dll)), "ascii")
    run(zig(), "dlltool", "-m", "i386:x86-64", "-d", text, "-l", target)
