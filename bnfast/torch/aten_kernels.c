#include <stdatomic.h>

#include "aten_kernels.h"
#include "aten_stack.h"

const bnf_driver *aten_driver;
static atomic_bool enabled;
static _Thread_local bool wanted_here;
static atomic_llong counts[OUTCOMES];

void aten_setup(const bnf_driver *driver)
{
    aten_driver = driver;
    aten_tensors_setup();
}

bool aten_switch(bool on) { return atomic_exchange(&enabled, on); }

bool aten_switch_here(bool on)
{
    const bool before = wanted_here;
    wanted_here = on;
    return before;
}

bool aten_is_wanted(void) { return wanted_here || aten_is_on(); }

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

const char *aten_refusal(aten_outcome outcome)
{
#define ATEN_REFUSAL(name, text) [name] = "bnfast does not take this call: " text,
    static const char *const TEXTS[OUTCOMES] = {ATEN_OUTCOMES(ATEN_REFUSAL)};
    return TEXTS[outcome];
}

bool aten_has_activation(const aten_rest *rest)
{
    if (rest->activation >= BNF_ACTIVATIONS)
        return false;
    return !bnf_default_slope(rest->activation) || (rest->slope > 0 && rest->slope <= 1);
}

void aten_finish(const char *error, aten_outcome outcome, torch_tensor *results, int number,
                 torch_value *stack)
{
    if (error) {
        for (int i = 0; i < number; i++)
            delete_tensor(&results[i]);
        aten_throw(error);
        return;
    }
    atomic_fetch_add_explicit(&counts[outcome], 1, memory_order_relaxed);
    for (int i = 0; i < number; i++)
        stack[i] = from_tensor(results[i]);
}
