/* The sizes of this machine's caches, where the system tells them. */
#include "bnfast.h"

bnf_caches bnf_read_caches(void)
{
    ptrdiff_t found[BNF_CACHE_LEVELS] = {0};
    bnf_find_caches(found);
    const ptrdiff_t l1d = found[0], l2 = found[1], l3 = found[2];
    if (l1d == 0 && l2 == 0 && l3 == 0)
        return (bnf_caches){32 * 1024, 512 * 1024, 8 * 1024 * 1024, false}; /* a small machine's */
    if (l1d == 0)
        return (bnf_caches){l2 ? l2 : l3, l2 ? l2 : l3, l3, true};
    return (bnf_caches){l1d, l2 ? l2 : l1d, l3, true};
}
