/* Memory that ends where a page without access begins, or begins where one ends: reading or
 * writing past that edge kills the program. */
#ifndef BNFAST_TESTS_PAGES_H
#define BNFAST_TESTS_PAGES_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define POISON 0xa5 /* in every byte that was not written */

static inline void fail(const char *what)
{
    perror(what);
    exit(2);
}

static inline size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

static inline size_t room_between_guards(size_t bytes)
{
    return (bytes / page_size() + 1) * page_size();
}

/* Whole pages for so many bytes, between two pages without access. */
static inline char *map_between_guards(size_t bytes)
{
    const size_t page = page_size(), room = room_between_guards(bytes);
    char *base = mmap(NULL, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base + page, room, PROT_READ | PROT_WRITE))
        fail("memory");
    return memset(base + page, POISON, room);
}

static inline void unmap_between_guards(char *pages, size_t bytes)
{
    munmap(pages - page_size(), room_between_guards(bytes) + 2 * page_size());
}

#endif
