/* Sharing a call's tiles out among threads, and what must be known for that: calls at the same
 * time, limits, forks. */
#ifndef BNFAST_THREADS_H
#define BNFAST_THREADS_H

#include <stdbool.h>
#include <stddef.h>

typedef void bnf_task(void *context, ptrdiff_t index);
/* Which thread gets which task: each the same number in a row, or the next one when it is free. */
typedef enum { BNF_STATIC, BNF_DYNAMIC } bnf_schedule;

/* Call it once, before anything else here: at import. */
void bnf_threads_setup(void);

/* Run all tasks on at most so many threads, each in the environment of float_env.h.  Returns when
 * all are done. */
void bnf_share_out(ptrdiff_t tasks, int threads, bnf_schedule schedule, bnf_task *task,
                   void *context);

/* Whether tasks have been shared out in this process. */
bool bnf_threads_started(void);
/* Whether this is a forked process whose runtime may wait for threads that it lost in the fork:
 * all its calls run on one thread. */
bool bnf_threads_lost(void);
/* OpenMP's own number of threads in this thread, if it was lowered as threadpoolctl does; 0 if not.
 * Teams here ask for an explicit number, to which OpenMP's own does not apply. */
int bnf_threads_lowered(void);
/* _OPENMP, the version of the OpenMP standard. */
int bnf_openmp_version(void);

/* Calls at the same time share the threads that one call alone may use: `most`. */
int bnf_share_of(int most);               /* how many a call could have now */
int bnf_begin_work(int wanted, int most); /* how many it has, until bnf_end_work */
void bnf_end_work(int threads);
void bnf_at_work(int *calls, int *threads);

#endif
