/* The threads of Windows' own pool, which all libraries of the process share. */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include "threads.h"

typedef struct {
    bnf_task *member;
    void *team;
    int members;
    volatile LONG next; /* the member that a free thread runs */
} job;

static void run_members(job *j)
{
    LONG i;
    while ((i = InterlockedIncrement(&j->next) - 1) < j->members)
        j->member(j->team, i);
}

static void CALLBACK help(PTP_CALLBACK_INSTANCE instance, void *context, PTP_WORK work)
{
    (void)instance, (void)work;
    run_members(context);
}

/* This thread runs members, too, so it never waits for a thread that the pool does not have: when
 * none are left, those that have not begun are called off. */
void bnf_run_team(int members, bnf_task *member, void *team)
{
    job j = {member, team, members, 0};
    PTP_WORK work = CreateThreadpoolWork(help, &j, NULL);
    for (int i = 1; work && i < members; i++)
        SubmitThreadpoolWork(work);
    run_members(&j);
    if (work) {
        WaitForThreadpoolWorkCallbacks(work, TRUE);
        CloseThreadpoolWork(work);
    }
}

void bnf_threads_setup(void) {}

bool bnf_threads_lost(void) { return false; } /* Windows does not fork */

int bnf_threads_granted(int wanted) { return wanted; }

int bnf_threads_lowered(void) { return 0; }

int bnf_openmp_version(void) { return 0; }

const char *bnf_threads_name(void) { return "Windows thread pool"; }
