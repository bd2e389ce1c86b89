/* Memory for large results: blocks of pages, reused instead of returned to the
 * system.
 *
 * A page that is new to the process costs more than writing it (3.6 us for 4 KiB
 * on a virtual machine), so a freed block waits for the next result of its size.
 * The bytes that wait never exceed a limit; blocks that have waited longest are
 * unmapped first.  All functions may be called from any thread, at any time, also
 * while the process ends. */
#ifndef BNF_PAGES_H
#define BNF_PAGES_H

#include <stddef.h>

/* For smaller results malloc does not ask the system for new pages either. */
#define BNF_PAGES_LEAST (128 * 1024)

void *bnf_pages_acquire(size_t bytes); /* page-aligned, contents arbitrary; NULL: no memory */
void *bnf_pages_resize(void *data, size_t bytes); /* like realloc */
void bnf_pages_release(void *data);

void bnf_pages_set_bound(size_t bytes); /* the most that may wait; 0, the default: nothing */
size_t bnf_pages_bound(void);
size_t bnf_pages_held(void);           /* bytes that wait */
size_t bnf_pages_trim(size_t at_most); /* unmap until at most so many wait; bytes unmapped */

size_t bnf_physical_memory(void); /* the machine's; 0: unknown */

#endif
