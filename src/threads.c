/* What is the same for the threads of every system: how tasks are shared out, and how calls at the
 * same time share the threads. */
#include <stdatomic.h>
#include <stdint.h>

#include "float_env.h"
#include "threads.h"

static struct {
    atomic_bool started;
    _Atomic uint64_t at_work; /* calls in the upper half, their threads in the lower */
} state;

static int least(int a, int b) { return a < b ? a : b; }
static int most_of(int a, int b) { return a > b ? a : b; }

/* ---- Sharing out */

typedef struct {
    ptrdiff_t tasks;
    int members;
    bnf_schedule schedule;
    bnf_task *task;
    void *context;
    _Atomic ptrdiff_t next; /* the task that a free member takes */
} team;

static void take_next_tasks(team *t)
{
    ptrdiff_t i;
    while ((i = atomic_fetch_add(&t->next, 1)) < t->tasks)
        t->task(t->context, i);
}

static void take_own_tasks(const team *t, ptrdiff_t member)
{
    const ptrdiff_t each = t->tasks / t->members, more = t->tasks % t->members;
    const ptrdiff_t first = member * each + (member < more ? member : more);
    for (ptrdiff_t i = first; i < first + each + (member < more); i++)
        t->task(t->context, i);
}

static void run_member(void *context, ptrdiff_t member)
{
    team *t = context;
    const bnf_float_env found = bnf_enter_float_env();
    if (t->schedule == BNF_DYNAMIC)
        take_next_tasks(t);
    else
        take_own_tasks(t, member);
    bnf_leave_float_env(found);
}

void bnf_share_out(ptrdiff_t tasks, int threads, bnf_schedule schedule, bnf_task *task,
                   void *context)
{
    if (threads > 1)
        threads = bnf_threads_lost() ? 1 : bnf_threads_granted(threads);
    if (threads < 2) {
        for (ptrdiff_t i = 0; i < tasks; i++)
            task(context, i);
        return;
    }
    atomic_store(&state.started, true);
    team t = {tasks, threads, schedule, task, context, 0};
    bnf_run_team(threads, run_member, &t);
}

bool bnf_threads_started(void) { return atomic_load(&state.started); }

void bnf_forget_threads(void)
{
    atomic_store(&state.started, false);
    atomic_store(&state.at_work, 0);
}

/* ---- Calls at the same time
 *
 * Each calling thread may have a pool of its own (OpenMP's have), so calls from as many threads as
 * there are cores would start the square of that number.  A call takes an even share, and no more
 * than are left: one thread if as many threads call as there are cores, all if it is the only
 * call. */

static int calls_of(uint64_t at_work) { return (int)(at_work >> 32); }
static int threads_of(uint64_t at_work) { return (int)(at_work & UINT32_MAX); }
static uint64_t one_call(int threads) { return ((uint64_t)1 << 32) + (uint64_t)threads; }

static int share_beside(uint64_t at_work, int most)
{
    return most_of(1, least(most / (calls_of(at_work) + 1), most - threads_of(at_work)));
}

int bnf_share_of(int most) { return share_beside(atomic_load(&state.at_work), most); }

int bnf_begin_work(int wanted, int most)
{
    uint64_t found = atomic_load(&state.at_work);
    int threads;
    do
        threads = least(wanted, share_beside(found, most));
    while (!atomic_compare_exchange_weak(&state.at_work, &found, found + one_call(threads)));
    return threads;
}

void bnf_end_work(int threads) { atomic_fetch_sub(&state.at_work, one_call(threads)); }

void bnf_at_work(int *calls, int *threads)
{
    const uint64_t found = atomic_load(&state.at_work);
    *calls = calls_of(found);
    *threads = threads_of(found);
}
