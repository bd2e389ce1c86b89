/* A number of _core.pyx that threads may read while another one sets it.  What a thread wrote
 * before it set the number is there for those that read it. */
#ifndef BNFAST_SHARED_H
#define BNFAST_SHARED_H

#include <stdatomic.h>

typedef struct {
    atomic_int value;
} bnf_shared_int;

static inline int bnf_shared_get(bnf_shared_int *number)
{
    return atomic_load_explicit(&number->value, memory_order_acquire);
}

static inline void bnf_shared_set(bnf_shared_int *number, int value)
{
    atomic_store_explicit(&number->value, value, memory_order_release);
}

#endif
