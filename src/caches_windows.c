/* Caches as Windows lists them, for all processors: the first of each level counts. */
#include <stdlib.h>

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include "bnfast.h"

static void take(const CACHE_RELATIONSHIP *cache, ptrdiff_t bytes[BNF_CACHE_LEVELS])
{
    const int place = cache->Level - 1;
    if (cache->Type != CacheInstruction && place < BNF_CACHE_LEVELS && place >= 0 && !bytes[place])
        bytes[place] = (ptrdiff_t)cache->CacheSize;
}

void bnf_find_caches(ptrdiff_t bytes[BNF_CACHE_LEVELS])
{
    DWORD size = 0;
    GetLogicalProcessorInformationEx(RelationCache, NULL, &size);
    char *list = size ? malloc(size) : NULL;
    if (list && GetLogicalProcessorInformationEx(RelationCache, (void *)list, &size))
        for (DWORD at = 0; at < size;) {
            const SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX *entry = (void *)(list + at);
            take(&entry->Cache, bytes);
            at += entry->Size;
        }
    free(list);
}
