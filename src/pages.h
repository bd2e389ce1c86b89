/* Memory for large results: blocks of pages, recycled instead of returned.
 *
 * A page that is new to the process costs more than writing it (3.6 us for 4 KiB
 * on a virtual machine), so a freed block waits for the next result of its size.
 * What waits never exceeds a bound; the longest idle goes first.  All functions
 * may be called from any thread, at any time, also while the process ends. */
#ifndef BNF_PAGES_H
#define BNF_PAGES_H

#include <stddef.h>

/* Below this, malloc does not ask the system for pages either. */
#define BNF_PAGES_LEAST (128 * 1024)

void *bnf_pages_acquire(size_t bytes); /* page-aligned, contents arbitrary; NULL: none left */
void *bnf_pages_resize(void *data, size_t bytes); /* as realloc, of an acquired block */
void bnf_pages_release(void *data);

void bnf_pages_set_bound(size_t bytes); /* the most that may wait; 0, as at first, keeps nothing */
size_t bnf_pages_bound(void);
size_t bnf_pages_held(void);           /* bytes that wait */
size_t bnf_pages_trim(size_t at_most); /* until no more than that wait; bytes given back */

#endif
