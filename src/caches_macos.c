/* Caches as macOS names them: of its fastest cores on Apple's processors, which have no L3. */
#include <sys/sysctl.h>

#include "bnfast.h"

static ptrdiff_t read_number(const char *name)
{
    int64_t number = 0;
    size_t size = sizeof number;
    return sysctlbyname(name, &number, &size, NULL, 0) == 0 && number > 0 ? (ptrdiff_t)number : 0;
}

void bnf_find_caches(ptrdiff_t bytes[BNF_CACHE_LEVELS])
{
    static const char *const fastest[] = {"hw.perflevel0.l1dcachesize", "hw.perflevel0.l2cachesize",
                                          "hw.perflevel0.l3cachesize"};
    static const char *const all[] = {"hw.l1dcachesize", "hw.l2cachesize", "hw.l3cachesize"};
    const char *const *names = read_number(fastest[0]) ? fastest : all;
    for (int i = 0; i < BNF_CACHE_LEVELS; i++)
        bytes[i] = read_number(names[i]);
}
