/* Stands in for macOS' Grand Central Dispatch, to run src/threads_macos.c elsewhere: a thread for
 * each index. */
#include <pthread.h>
#include <stdlib.h>

#define QOS_CLASS_USER_INITIATED 0

typedef struct {
    void *context;
    void (*work)(void *, size_t);
    size_t index;
    pthread_t thread;
} dispatch_one;

static inline void *dispatch_run_one(void *one)
{
    const dispatch_one *o = one;
    o->work(o->context, o->index);
    return NULL;
}

static inline const void *dispatch_get_global_queue(long quality, unsigned long flags)
{
    (void)quality, (void)flags;
    return NULL;
}

static inline void dispatch_apply_f(size_t count, const void *queue, void *context,
                                    void (*work)(void *, size_t))
{
    dispatch_one *all = calloc(count, sizeof *all);
    (void)queue;
    for (size_t i = 0; all && i < count; i++) {
        all[i] = (dispatch_one){.context = context, .work = work, .index = i};
        if (pthread_create(&all[i].thread, NULL, dispatch_run_one, &all[i]))
            abort();
    }
    for (size_t i = 0; all && i < count; i++)
        pthread_join(all[i].thread, NULL);
    free(all);
}
