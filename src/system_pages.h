/* What pages.c asks of the operating system: pages_posix.c or pages_windows.c. */
#ifndef BNF_SYSTEM_PAGES_H
#define BNF_SYSTEM_PAGES_H

#include <stddef.h>

char *bnf_map_pages(size_t size); /* at a page's boundary; NULL: no memory */
void bnf_unmap_pages(char *base, size_t size);

void bnf_lock_pages(void);
void bnf_unlock_pages(void);
/* From now on a fork waits for the lock, and its child runs this with the lock held. */
void bnf_watch_forks(void (*after_fork_in_child)(void));

#endif
