/* Memory that ends where a page without access begins, or begins where one ends: reading or
 * writing past that edge kills the program. */
#ifndef BNFAST_TESTS_PAGES_H
#define BNFAST_TESTS_PAGES_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POISON 0xa5 /* in every byte that was not written */

static inline void fail(const char *what)
{
    perror(what);
    exit(2);
}

#ifdef _WIN32
#include <windows.h>

static inline size_t page_size(void)
{
    SYSTEM_INFO system;
    GetSystemInfo(&system);
    return system.dwPageSize;
}

/* So many bytes without access; NULL if there is no memory. */
static inline char *map_pages(size_t bytes)
{
    return VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_NOACCESS);
}

static inline int allow(char *pages, size_t bytes)
{
    DWORD before;
    return VirtualProtect(pages, bytes, PAGE_READWRITE, &before);
}

static inline void unmap_pages(char *pages, size_t bytes)
{
    (void)bytes; /* a mapping ends as a whole */
    VirtualFree(pages, 0, MEM_RELEASE);
}
#else
#include <sys/mman.h>
#include <unistd.h>

static inline size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

/* So many bytes without access; NULL if there is no memory. */
static inline char *map_pages(size_t bytes)
{
    char *pages = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
}

static inline int allow(char *pages, size_t bytes)
{
    return mprotect(pages, bytes, PROT_READ | PROT_WRITE) == 0;
}

static inline void unmap_pages(char *pages, size_t bytes) { munmap(pages, bytes); }
#endif

static inline size_t room_between_guards(size_t bytes)
{
    return (bytes / page_size() + 1) * page_size();
}

/* Whole pages for so many bytes, between two pages without access. */
static inline char *map_between_guards(size_t bytes)
{
    const size_t page = page_size(), room = room_between_guards(bytes);
    char *base = map_pages(room + 2 * page);
    if (!base || !allow(base + page, room))
        fail("memory");
    return memset(base + page, POISON, room);
}

static inline void unmap_between_guards(char *pages, size_t bytes)
{
    unmap_pages(pages - page_size(), room_between_guards(bytes) + 2 * page_size());
}

#endif
