#include <stdatomic.h>

#include "aten_kernels.h"
#include "aten_stack.h"

const bnf_driver *aten_driver;
static atomic_bool enabled;
static atomic_llong counts[OUTCOMES];

void aten_setup(const bnf_driver *driver)
{
    aten_driver = driver;
    aten_tensors_setup();
}

bool aten_switch(bool on) { return atomic_exchange(&enabled, on); }

bool aten_is_on(void) { return atomic_load_explicit(&enabled, memory_order_relaxed); }

long long aten_count(aten_outcome outcome) { return atomic_load(&counts[outcome]); }

void aten_forget_counts(void)
{
    for (int i = 0; i < OUTCOMES; i++)
        atomic_store(&counts[i], 0);
}

bool aten_runs_here(aten_outcome outcome) { return outcome < LEFT_OFF; }

aten_outcome aten_look_at_data(torch_tensor tensor, aten_view *view)
{
    if (!aten_look(tensor, view) || view->type == BNF_TYPES)
        return LEFT_TYPE;
    if (view->dim < 2 || view->dim > MOST_AXES)
        return LEFT_SHAPE;
    for (int64_t axis = 0; axis < view->dim; axis++)
        if (view->sizes[axis] == 0)
            return LEFT_SHAPE;
    const void *values;
    return aten_has_memory(view) && !torch.get_const_data(tensor, &values) ? RAN_TRAINING
                                                                           : LEFT_MEMORY;
}

int aten_threads(void)
{
    enum { MOST = 1024 };
    uint32_t threads = 1;
    torch.get_num_threads(&threads);
    return threads < MOST ? (int)threads : MOST;
}

void aten_throw(const char *message) { torch.check(false, "batch_norm", "bnfast", 0, message); }

void aten_finish(const char *error, aten_outcome outcome, torch_tensor *results, torch_value *stack)
{
    if (error) {
        for (int i = 0; i < 3; i++)
            delete_tensor(&results[i]);
        aten_throw(error);
        return;
    }
    atomic_fetch_add_explicit(&counts[outcome], 1, memory_order_relaxed);
    for (int i = 0; i < 3; i++)
        stack[i] = from_tensor(results[i]);
}
