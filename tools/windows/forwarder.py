"""Complex functions of C, which wine's ucrtbase.dll does not have, and NumPy for Windows imports.

NumPy's files import them from api-ms-win-crt-math-l1-1-0.dll, which any Windows forwards to
ucrtbase.dll. Here they are made to import a DLL of our own that exports the same names: the complex
functions that NumPy needs are its own, by their plain formulas, and all others are forwarded as
they were. Nothing of bnfast is changed.
"""

from dll import definition, exports
from steps import run

SYSTEM = "api-ms-win-crt-math-l1-1-0.dll"
OURS = "bnf" + SYSTEM[3:]  # as long, to take its place in a file
# Of z = a + bi and w = c + di: a real result, or the two parts of a complex one.
REAL = {"cabs": "hypot(a, b)", "carg": "atan2(b, a)", "cimag": "b", "creal": "a"}
COMPLEX = {
    "cexp": ("exp(a) * cos(b)", "exp(a) * sin(b)"),
    "ccos": ("cos(a) * cosh(b)", "-sin(a) * sinh(b)"),
    "csin": ("sin(a) * cosh(b)", "cos(a) * sinh(b)"),
    "ccosh": ("cosh(a) * cos(b)", "sinh(a) * sin(b)"),
    "csinh": ("sinh(a) * cos(b)", "cosh(a) * sin(b)"),
    "ctan": (
        "sin(2 * a) / (cos(2 * a) + cosh(2 * b))",
        "sinh(2 * b) / (cos(2 * a) + cosh(2 * b))",
    ),
    "ctanh": (
        "sinh(2 * a) / (cosh(2 * a) + cos(2 * b))",
        "sin(2 * b) / (cosh(2 * a) + cos(2 * b))",
    ),
    "cpow": (
        "exp(c * log(hypot(a, b)) - d * atan2(b, a)) * cos(d * log(hypot(a, b)) + c * atan2(b, a))",
        "exp(c * log(hypot(a, b)) - d * atan2(b, a)) * sin(d * log(hypot(a, b)) + c * atan2(b, a))",
    ),
}
# By C's suffix. Windows' long double is a double.
TYPES = {"": "double", "f": "float", "l": "double"}


def function(name, suffix):
    """One in C, under a name that the C library does not have."""
    number = TYPES[suffix]
    letters = {"z": "ab", "w": "cd"} if name == "cpow" else {"z": "ab"}
    takes = ", ".join(f"{number} _Complex {z}" for z in letters)
    parts = "".join(
        f"    const double {re} = __real__ {z}, {im} = __imag__ {z};\n"
        for z, (re, im) in letters.items()
    )
    if name in REAL:
        gives, result = number, REAL[name]
    else:
        gives = f"{number} _Complex"
        result = "__builtin_complex({})".format(
            ", ".join(f"({number})({part})" for part in COMPLEX[name])
        )
    unused = "    (void)a, (void)b;\n"
    return f"{gives} own_{name}{suffix}({takes})\n{{\n{parts}{unused}    return {result};\n}}\n"


def make_dll(folder, real, compiler):
    """Make it in a folder; `real` is Windows's own, for its list of names."""
    own = [(name, suffix) for name in (*REAL, *COMPLEX) for suffix in TYPES]
    code = "\n".join(["#include <math.h>\n", *(function(*one) for one in own)])
    ours = {name + suffix for name, suffix in own}
    names = sorted(exports(real))
    entries = [f"{n} = own_{n}" if n in ours else f"{n} = ucrtbase.{n}" for n in names]
    (folder / "complex.c").write_text(code, "ascii")
    (folder / "complex.def").write_text(definition(OURS, entries), "ascii")
    sources = [folder / "complex.c", folder / "complex.def"]
    run(*compiler, "-O2", "-shared", "-s", *sources, "-o", folder / OURS)


def redirect(folder):
    """Make every extension module and DLL under a folder import from ours."""
    for file in (f for f in folder.rglob("*") if f.suffix in (".pyd", ".dll")):
        old = file.read_bytes()
        new = old.replace(SYSTEM.encode("ascii"), OURS.encode("ascii"))
        if new != old:
            file.write_bytes(new)
