/* The one door through which a call's tiles are shared out among threads, and what has to be
 * known of them: calls at the same time, limits, forks. */
#ifndef BNFAST_THREADS_H
#define BNFAST_THREADS_H

#include <stdbool.h>
#include <stddef.h>

typedef void bnf_task(void *context, ptrdiff_t index);
/* Which thread gets which task: as many in a row for each, or the next one for whoever is free. */
typedef enum { BNF_STATIC, BNF_DYNAMIC } bnf_schedule;

/* Once, before anything else here: at import. */
void bnf_threads_setup(void);

/* Run all tasks on so many threads at most, each in the environment of float_env.h.  Returns when
 * all are done. */
void bnf_share_out(ptrdiff_t tasks, int threads, bnf_schedule schedule, bnf_task *task,
                   void *context);

/* Whether tasks have been shared out in this process. */
bool bnf_threads_started(void);
/* Whether this is a forked process whose runtime may wait for threads that it lost in the fork:
 * all its calls run on one thread. */
bool bnf_threads_lost(void);
/* What somebody lowered OpenMP's own number of threads to in this thread, as threadpoolctl does;
 * 0 if nobody did.  Teams here name their number and would not notice. */
int bnf_threads_lowered(void);
/* _OPENMP, the version of the OpenMP standard. */
int bnf_openmp_version(void);

/* Calls at the same time share the threads that one of them may use.  `most` is that number. */
int bnf_share_of(int most);               /* how many a call could have now */
int bnf_begin_work(int wanted, int most); /* how many it has, up to bnf_end_work */
void bnf_end_work(int threads);
void bnf_at_work(int *calls, int *threads);

#endif
