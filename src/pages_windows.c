/* Pages by VirtualAlloc, which aligns them to 64 KiB.  Large pages would need a privilege. */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include "pages.h"
#include "system_pages.h"

char *bnf_map_pages(size_t size)
{
    return VirtualAlloc(NULL, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void bnf_unmap_pages(char *base, size_t size)
{
    (void)size;
    VirtualFree(base, 0, MEM_RELEASE);
}

static SRWLOCK mutex = SRWLOCK_INIT;

void bnf_lock_pages(void) { AcquireSRWLockExclusive(&mutex); }
void bnf_unlock_pages(void) { ReleaseSRWLockExclusive(&mutex); }

void bnf_watch_forks(void (*after_fork_in_child)(void)) { (void)after_fork_in_child; }

size_t bnf_physical_memory(void)
{
    MEMORYSTATUSEX memory = {.dwLength = sizeof memory};
    return GlobalMemoryStatusEx(&memory) ? (size_t)memory.ullTotalPhys : 0;
}
