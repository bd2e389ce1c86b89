#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#include <string.h>

#include "aten_api.h"

torch_functions torch;

/* A library that the process has loaded, and an address in it; NULL if there is none. */
#ifdef _WIN32
static void *find_library(const char *path) /* by its name, whatever its folder's characters */
{
    const char *folder = strrchr(path, '\\');
    return GetModuleHandleA(folder ? folder + 1 : path);
}
static void *find_symbol(void *library, const char *name)
{
    return (void *)GetProcAddress(library, name);
}
#else
static void *find_library(const char *path) { return dlopen(path, RTLD_NOW | RTLD_NOLOAD); }
static void *find_symbol(void *library, const char *name) { return dlsym(library, name); }
#endif

const char *torch_find(const char *library)
{
    torch_functions found;
    void *loaded = find_library(library);
    if (!loaded)
        return library;
#define TORCH_FIND(type, name, symbol, arguments)      \
    {                                                  \
        void *address = find_symbol(loaded, symbol);   \
        if (!address)                                  \
            return symbol;                             \
        memcpy(&found.name, &address, sizeof address); \
    }
    TORCH_FUNCTIONS(TORCH_FIND)
    torch = found;
    return NULL;
}
