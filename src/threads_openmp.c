/* OpenMP's threads, for Linux and every other system but macOS and Windows.  The runtime is shared
 * with all libraries of the process. */
#define _GNU_SOURCE
#include <link.h>
#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "threads.h"

static struct {
    atomic_bool lost;
    bool set_up, forked; /* forked: without exec, before this library was loaded */
    pid_t home;          /* the process that this state belongs to */
    int openmp_default;
} state;

/* ---- Forks
 *
 * libgomp keeps a thread's pool in thread-local memory.  A forked process inherits that memory but
 * none of the pool's threads, and its next parallel region would wait for them forever.  Memory
 * that is all zero means that there never was a pool. */

typedef struct {
    uintptr_t code;      /* an address in the runtime's code */
    size_t module, size; /* of its thread-local memory; 0: not found */
} runtime_memory;

static int look_for_runtime(struct dl_phdr_info *info, size_t size, void *context)
{
    runtime_memory *runtime = context;
    size_t local = 0;
    bool found = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];
        if (part->p_type == PT_TLS)
            local = part->p_memsz;
        if (part->p_type == PT_LOAD &&
            runtime->code - (info->dlpi_addr + part->p_vaddr) < part->p_memsz)
            found = true;
    }
    if (found && size >= offsetof(struct dl_phdr_info, dlpi_tls_data)) {
        runtime->module = info->dlpi_tls_modid;
        runtime->size = local;
    }
    return found;
}

/* Whether this thread may have a pool of OpenMP threads. */
static bool has_pool(void)
{
#if defined(__x86_64__) || defined(__aarch64__)
    extern void *__tls_get_addr(size_t index[2]); /* the loader's; module, offset */
    runtime_memory runtime = {.code = (uintptr_t)omp_get_max_threads};
    dl_iterate_phdr(look_for_runtime, &runtime);
    if (runtime.module == 0 || runtime.size == 0)
        return true;
    const char *bytes = __tls_get_addr((size_t[2]){runtime.module, 0});
    return bytes[0] != 0 || memcmp(bytes, bytes + 1, runtime.size - 1) != 0;
#else
    return true; /* unknown: on other processors the loader may count offsets differently */
#endif
}

/* Linux marks a process that was forked and has not called exec since. */
static bool was_forked(void)
{
    const unsigned forked_no_exec = 0x40; /* PF_FORKNOEXEC */
    char line[1024];
    unsigned flags = 0;
    FILE *file = fopen("/proc/self/stat", "r");
    if (!file)
        return false;
    const char *end = fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
    fclose(file);
    return end && sscanf(end, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 &&
           flags & forked_no_exec;
}

/* Found out in the parent: in the child, a thread that does not exist there may hold the loader's
 * lock. */
static _Thread_local bool loses_pool;

static void before_fork(void) { loses_pool = bnf_threads_started() || has_pool(); }

static void after_fork_in_child(void)
{
    if (loses_pool)
        atomic_store(&state.lost, true);
    bnf_forget_threads();
    state.home = getpid();
}

bool bnf_threads_lost(void)
{
    static _Thread_local bool looked;
    if (state.home != getpid()) /* forked by a system call that runs no handlers */
        atomic_store(&state.lost, true);
    if (state.forked && !looked) {
        looked = true;
        if (has_pool())
            atomic_store(&state.lost, true);
    }
    return atomic_load(&state.lost);
}

void bnf_threads_setup(void)
{
    if (state.set_up)
        return;
    state.set_up = true;
    state.home = getpid();
    state.forked = was_forked();
    bnf_threads_lost(); /* look now: a pool that this thread gets later is a valid one */
    state.openmp_default = omp_get_max_threads();
    pthread_atfork(before_fork, NULL, after_fork_in_child);
}

/* ---- Threads that the system grants
 *
 * libgomp ends the process if it cannot create a thread. */

/* glibc 2.34 gave these symbols a new version, which a build that is linked there would need; the
 * old version is the same function.  Sanitizers replace them by functions without a version. */
#if defined(__GLIBC__) && !defined(BNF_SANITIZED)
#if defined(__x86_64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.17");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.17");
#endif
#endif

static void *wait_for_release(void *gate)
{
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* How many of so many more threads the system grants, found out by creating them. */
static int created_of(int wanted)
{
    enum { MOST = 1024 };
    pthread_t threads[MOST];
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    int created = 0;
    pthread_mutex_lock(&gate);
    while (created < wanted && created < MOST &&
           !pthread_create(&threads[created], NULL, wait_for_release, &gate))
        created++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < created; i++)
        pthread_join(threads[i], NULL);
    return created;
}

/* Once a thread has had a team, its pool keeps the threads. */
int bnf_threads_granted(int wanted)
{
    static _Thread_local int largest = 1;
    if (wanted <= largest || omp_in_parallel())
        return wanted;
    const int found = 1 + created_of(wanted - 1);
    if (found > largest)
        largest = found;
    return largest;
}

/* ---- What threads.h declares */

void bnf_run_team(int members, bnf_task *member, void *team)
{
#pragma omp parallel for schedule(static, 1) num_threads(members)
    for (int i = 0; i < members; i++)
        member(team, i);
}

int bnf_threads_lowered(void)
{
    const int number = omp_get_max_threads();
    return number < state.openmp_default ? number : 0;
}

int bnf_openmp_version(void) { return _OPENMP; }

const char *bnf_threads_name(void) { return "OpenMP"; }
