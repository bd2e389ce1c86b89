#include <dlfcn.h>
#include <string.h>

#include "aten_api.h"

torch_functions torch;

const char *torch_find(const char *library)
{
    torch_functions found;
    void *loaded = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    if (!loaded)
        return library;
#define TORCH_FIND(type, name, symbol, arguments)      \
    {                                                  \
        void *address = dlsym(loaded, symbol);         \
        if (!address)                                  \
            return symbol;                             \
        memcpy(&found.name, &address, sizeof address); \
    }
    TORCH_FUNCTIONS(TORCH_FIND)
    torch = found;
    return NULL;
}
