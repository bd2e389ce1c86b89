/* The pool of pages.h: a short list of free blocks, oldest first, under a mutex.
 *
 * Sizes of blocks are classes, an eighth of a power of two apart, and a block is
 * reused only for its own class: shapes repeat, and no result holds more than an
 * eighth, or 64 KiB, more than its size. */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "pages.h"
#include "system_pages.h"

/* Tells AddressSanitizer which parts of a block are out of bounds; it takes all of the pool's pages
 * for valid memory otherwise. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
static void hide(char *p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
static void reveal(char *p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
static void hide(char *p, size_t bytes) { (void)p, (void)bytes; }
static void reveal(char *p, size_t bytes) { (void)p, (void)bytes; }
#endif

/* One page in front of the data holds the size of the block and keeps the data page-aligned.  So an
 * output never begins at an offset in its page shortly after that of an input: loads of the input
 * would then wait for stores whose addresses have the same low 12 bits. */
#define PAGE ((size_t)4096)
#define LARGEST_PAGE ((size_t)64 << 10) /* of any system; sizes of blocks are multiples of it */
#define CLASSES_PER_OCTAVE 8
#define MOST_BLOCKS 256

typedef struct {
    char *base;
    size_t size;
} block;

static struct { /* under the lock of system_pages.h */
    size_t bound, held;
    int count;
    block blocks[MOST_BLOCKS]; /* the longest idle first */
} pool;

/* ---- Blocks */

/* The size of the block for so many bytes of data; 0 if they are too many. */
static size_t class_size(size_t bytes)
{
    if (bytes > PTRDIFF_MAX / 2)
        return 0;
    const size_t needed = bytes + PAGE;
    size_t step = LARGEST_PAGE;
    while (step * CLASSES_PER_OCTAVE * 2 <= needed)
        step *= 2;
    return (needed + step - 1) / step * step;
}

/* The data of a block.  So many bytes of it are asked for; the rest is out of bounds. */
static void *data_of(block b, size_t bytes)
{
    char *data = b.base + PAGE;
    reveal(b.base, b.size);
    *(size_t *)b.base = b.size;
    hide(b.base + sizeof(size_t), PAGE - sizeof(size_t));
    hide(data + bytes, b.size - PAGE - bytes);
    return data;
}

static block block_of(void *data)
{
    char *base = (char *)data - PAGE;
    return (block){base, *(size_t *)base};
}

/* ---- The list, with the lock held */

static block take(int i)
{
    const block b = pool.blocks[i];
    pool.count--;
    pool.held -= b.size;
    memmove(&pool.blocks[i], &pool.blocks[i + 1], (size_t)(pool.count - i) * sizeof b);
    return b;
}

/* The block freed last is the most likely to be in the caches. */
static block take_size(size_t size)
{
    for (int i = pool.count - 1; i >= 0; i--)
        if (pool.blocks[i].size == size)
            return take(i);
    return (block){NULL, 0};
}

static void discard(block b)
{
    reveal(b.base, b.size); /* other memory may get these addresses next */
    bnf_unmap_pages(b.base, b.size);
}

static size_t discard_oldest(void)
{
    const block oldest = take(0);
    discard(oldest);
    return oldest.size;
}

static size_t shrink_to(size_t at_most)
{
    size_t given = 0;
    while (pool.held > at_most)
        given += discard_oldest();
    return given;
}

static void keep(block b)
{
    shrink_to(pool.bound - b.size);
    if (pool.count == MOST_BLOCKS)
        discard_oldest();
    hide(b.base, b.size);
    pool.blocks[pool.count++] = b;
    pool.held += b.size;
}

/* ---- Forks */

/* The child unmaps the waiting blocks: writing to a page that two processes share copies it, which
 * costs more than a new page, for the parent too. */
static void after_fork_in_child(void)
{
    shrink_to(0);
    bnf_unlock_pages();
}

/* ---- What pages.h declares */

void *bnf_pages_acquire(size_t bytes)
{
    const size_t size = class_size(bytes);
    if (size == 0)
        return NULL;
    bnf_lock_pages();
    block b = take_size(size);
    bnf_unlock_pages();
    if (b.base)
        return data_of(b, bytes);
    b = (block){bnf_map_pages(size), size};
    if (!b.base && bnf_pages_trim(0) > 0)
        b.base = bnf_map_pages(size);
    return b.base ? data_of(b, bytes) : NULL;
}

void bnf_pages_release(void *data)
{
    const block b = block_of(data);
    bnf_lock_pages();
    const bool kept = b.size <= pool.bound;
    if (kept)
        keep(b);
    bnf_unlock_pages();
    if (!kept)
        discard(b);
}

void *bnf_pages_resize(void *data, size_t bytes)
{
    const block old = block_of(data);
    const size_t wanted = class_size(bytes);
    if (wanted == old.size)
        return data_of(old, bytes);
    char *moved = bnf_pages_acquire(bytes);
    if (!moved)
        return NULL;
    const block new = block_of(moved);
    reveal(old.base, old.size); /* how many of its bytes were asked for is not stored */
    reveal(new.base, new.size);
    memcpy(moved, data, (wanted < old.size ? wanted : old.size) - PAGE);
    bnf_pages_release(data);
    return data_of(new, bytes);
}

void bnf_pages_set_bound(size_t bytes)
{
    bnf_watch_forks(after_fork_in_child);
    bnf_lock_pages();
    pool.bound = bytes;
    shrink_to(bytes);
    bnf_unlock_pages();
}

size_t bnf_pages_bound(void)
{
    bnf_lock_pages();
    const size_t bound = pool.bound;
    bnf_unlock_pages();
    return bound;
}

size_t bnf_pages_held(void)
{
    bnf_lock_pages();
    const size_t held = pool.held;
    bnf_unlock_pages();
    return held;
}

size_t bnf_pages_trim(size_t at_most)
{
    bnf_lock_pages();
    const size_t given = shrink_to(at_most);
    bnf_unlock_pages();
    return given;
}
