/* Sharing a call's tiles out among threads, and what must be known for that: calls at the same
 * time, limits, forks.  The threads are the operating system's business: one of threads_openmp.c,
 * threads_macos.c and threads_windows.c is built in. */
#ifndef BNFAST_THREADS_H
#define BNFAST_THREADS_H

#include <stdbool.h>
#include <stddef.h>

typedef void bnf_task(void *context, ptrdiff_t index);
/* Which thread gets which task: each the same number in a row, or the next one when it is free. */
typedef enum { BNF_STATIC, BNF_DYNAMIC } bnf_schedule;

/* threads.c */

/* Run all tasks on at most so many threads, each in the environment of float_env.h.  Returns when
 * all are done. */
void bnf_share_out(ptrdiff_t tasks, int threads, bnf_schedule schedule, bnf_task *task,
                   void *context);
/* Whether tasks have been shared out in this process. */
bool bnf_threads_started(void);

/* Calls at the same time share the threads that one call alone may use: `most`. */
int bnf_share_of(int most);               /* how many a call could have now */
int bnf_begin_work(int wanted, int most); /* how many it has, until bnf_end_work */
void bnf_end_work(int threads);
void bnf_at_work(int *calls, int *threads);

/* The child of a fork has no threads and no calls at work. */
void bnf_forget_threads(void);

/* threads_<system>.c */

/* Call it once, before anything else here: at import. */
void bnf_threads_setup(void);
/* Run members 0, 1, ... of a team, each on a thread of its own as far as there are threads; a
 * thread that is free takes the next member.  Returns when all are done. */
void bnf_run_team(int members, bnf_task *member, void *team);
/* Whether this is a forked process whose threads may be lost: all its calls run on one thread. */
bool bnf_threads_lost(void);
/* How many threads the system would give this call now, of so many. */
int bnf_threads_granted(int wanted);
/* OpenMP's own number of threads in this thread, if it was lowered as threadpoolctl does; 0 if not.
 * Teams here ask for an explicit number, to which OpenMP's own does not apply. */
int bnf_threads_lowered(void);
/* _OPENMP, the version of the OpenMP standard; 0 if the threads are not OpenMP's. */
int bnf_openmp_version(void);
const char *bnf_threads_name(void); /* whose they are */

#endif
