/* Grand Central Dispatch's threads: macOS has them, and no OpenMP.  They are the whole process's,
 * and as many as there are cores. */
#include <dispatch/dispatch.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "threads.h"

static struct {
    atomic_bool lost;
    pid_t home; /* the process that this state belongs to */
} state;

/* A forked process must not use dispatch's threads, whoever used them in its parent. */
static void after_fork_in_child(void)
{
    atomic_store(&state.lost, true);
    bnf_forget_threads();
    state.home = getpid();
}

void bnf_threads_setup(void)
{
    if (state.home)
        return;
    state.home = getpid();
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

bool bnf_threads_lost(void)
{
    return atomic_load(&state.lost) || state.home != getpid(); /* forked without handlers */
}

typedef struct {
    bnf_task *member;
    void *team;
} job;

static void run_one(void *context, size_t index)
{
    const job *j = context;
    j->member(j->team, (ptrdiff_t)index);
}

void bnf_run_team(int members, bnf_task *member, void *team)
{
    job j = {member, team};
    dispatch_apply_f((size_t)members, dispatch_get_global_queue(QOS_CLASS_USER_INITIATED, 0), &j,
                     run_one);
}

/* Where there are fewer, a thread runs several members. */
int bnf_threads_granted(int wanted) { return wanted; }

int bnf_threads_lowered(void) { return 0; }

int bnf_openmp_version(void) { return 0; }

const char *bnf_threads_name(void) { return "Grand Central Dispatch"; }
