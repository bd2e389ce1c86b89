/* Pages by mmap. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pages.h"
#include "system_pages.h"

#define HUGE_PAGE ((size_t)2 << 20)

static char *round_up(char *p, size_t step) { return p + (step - (uintptr_t)p % step) % step; }

static void unmap(char *from, char *to)
{
    if (from < to)
        munmap(from, (size_t)(to - from));
}

/* A block large enough for huge pages starts at the boundary of one: 200 MB are then 100 faults. */
char *bnf_map_pages(size_t size)
{
    const bool huge = size >= HUGE_PAGE;
    const size_t asked = huge ? size + HUGE_PAGE : size;
    char *p = mmap(NULL, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    if (!huge)
        return p;
    char *base = round_up(p, HUGE_PAGE);
    unmap(p, base);
    unmap(base + size, p + asked);
#ifdef MADV_HUGEPAGE
    madvise(base, size, MADV_HUGEPAGE); /* only a hint: small pages work too */
#endif
    return base;
}

void bnf_unmap_pages(char *base, size_t size) { unmap(base, base + size); }

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void bnf_lock_pages(void) { pthread_mutex_lock(&mutex); }
void bnf_unlock_pages(void) { pthread_mutex_unlock(&mutex); }

/* Once.  Not with pthread_once: glibc 2.34 moved it to another library, and a build that is linked
 * there would need that version. */
void bnf_watch_forks(void (*after_fork_in_child)(void))
{
    static atomic_flag watched = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&watched))
        pthread_atfork(bnf_lock_pages, bnf_unlock_pages, after_fork_in_child);
}

size_t bnf_physical_memory(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
    return pages > 0 && bytes > 0 ? (size_t)pages * (size_t)bytes : 0;
}
