/* Python with ThreadSanitizer's runtime in it, for `make tsan`: loaded by
 * LD_PRELOAD, clang 14's is called before it is ready. */
#include <Python.h>

int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }
