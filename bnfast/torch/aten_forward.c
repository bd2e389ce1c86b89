#include "aten_kernels.h"
#include "aten_stack.h"
#include "aten_vectors.h"
#include "float_env.h"

typedef struct {
    const aten_forward_arguments *arguments;
    aten_view x, residual; /* residual.tensor is NULL if there is none */
    aten_layout layout;
    vector_kind vectors;
    const void *weight, *bias, *running_mean, *running_var;
    const char *error; /* our own error, not PyTorch's */
} forward;

static aten_outcome look_at_residual(forward *f, torch_tensor residual)
{
    const aten_outcome data = aten_look_at_data(residual, &f->residual);
    if (!aten_runs_here(data))
        return data;
    if (f->residual.type != f->x.type)
        return LEFT_TYPE;
    return aten_same_shape(&f->residual, &f->x) ? data : LEFT_SHAPE;
}

static aten_outcome look_at_forward(forward *f)
{
    const aten_forward_arguments *a = f->arguments;
    if (!a->rest.fused && !aten_is_wanted())
        return LEFT_OFF;
    if (!aten_has_activation(&a->rest))
        return LEFT_ACTIVATION;
    aten_outcome data = aten_look_at_data(to_tensor(a->x), &f->x);
    if (aten_runs_here(data) && to_optional(a->residual))
        data = look_at_residual(f, to_optional(a->residual));
    if (!aten_runs_here(data))
        return data;
    const torch_tensor vectors[] = {to_optional(a->weight), to_optional(a->bias),
                                    to_optional(a->running_mean), to_optional(a->running_var)};
    f->layout = aten_result_layout(&f->x);
    f->vectors = (vector_kind){aten_vector_type(f->x.type, vectors, 4), f->x.sizes[1]};
    const bool allowed = f->vectors.type == f->x.type || is_half(f->x.type);
    if (!allowed || !aten_fits(vectors[0], f->vectors, &f->weight) ||
        !aten_fits(vectors[1], f->vectors, &f->bias) ||
        !aten_fits(vectors[2], f->vectors, &f->running_mean) ||
        !aten_fits(vectors[3], f->vectors, &f->running_var))
        return LEFT_PARAMETERS;
    if (!f->running_mean != !f->running_var || (!a->training && !f->running_mean))
        return LEFT_PARAMETERS;
    return a->training ? RAN_TRAINING : RAN_EVALUATION;
}

/* Evaluation has no batch statistics to keep. It keeps only the mark: a backward looks for it even
 * if bnfast is no longer enabled. */
static vector_kind kept_vectors(const forward *f)
{
    return (vector_kind){f->vectors.type, f->arguments->training ? f->vectors.length : 0};
}

static bool make_forward_results(forward *f, torch_tensor *results)
{
    const int32_t dtype = aten_dtype(f->vectors.type);
    if (!aten_new(&f->x, &f->layout, &results[0]))
        return false;
    const bool needs_mark = torch.grad_mode() && !aten_is_on();
    if (!f->arguments->training && !needs_mark)
        return aten_new_vector(0, dtype, &results[1]) && aten_new_vector(0, dtype, &results[2]);
    const vector_kind kept = kept_vectors(f);
    return aten_new_save_mean(kept, &results[1]) &&
           aten_new_vector(kept.length, dtype, &results[2]);
}

static void fill_forward(const forward *f, bnf_call *call)
{
    double *weight = f->arguments->training ? call->weight : call->scale;
    aten_fill(weight, f->weight, f->vectors, 1);
    aten_fill(call->shift, f->bias, f->vectors, 0);
    if (!f->arguments->training) {
        aten_fill(call->mean, f->running_mean, f->vectors, 0);
        aten_fill(call->var, f->running_var, f->vectors, 1);
    }
}

/* Half-type running statistics are updated in float64 and rounded once. The float64 values go
 * into vectors of the call that are no longer needed. */
static void move_running(const forward *f, bnf_call *call, void *mean, void *var)
{
    const vector_kind kind = f->vectors;
    const bool half = is_half(kind.type), wide = half || kind.type == BNF_F64;
    const bnf_running running = {half ? call->weight : mean, half ? call->shift : var, wide, wide};
    if (half) {
        aten_widen(mean, kind.type, kind.length, running.mean);
        aten_widen(var, kind.type, kind.length, running.var);
    }
    aten_driver->move_running(call, running, f->arguments->momentum, 1);
    if (half) {
        aten_narrow(running.mean, kind.type, kind.length, mean);
        aten_narrow(running.var, kind.type, kind.length, var);
    }
}

typedef struct {
    void *save_mean, *save_invstd, *running_mean, *running_var;
} forward_outputs;

static APART void compute_forward(const forward *f, bnf_call *call, forward_outputs out)
{
    const bnf_float_env found = bnf_enter_float_env();
    fill_forward(f, call);
    aten_driver->run(call);
    if (f->arguments->training) {
        aten_narrow(call->mean, f->vectors.type, f->vectors.length, out.save_mean);
        aten_narrow(call->inv_std, f->vectors.type, f->vectors.length, out.save_invstd);
        aten_keep(out.save_mean, f->vectors, call->mean, call->inv_std);
        if (out.running_mean)
            move_running(f, call, out.running_mean, out.running_var);
    }
    bnf_leave_float_env(found);
}

static bool find_outputs(const forward *f, const torch_tensor *results, forward_outputs *out)
{
    const aten_forward_arguments *a = f->arguments;
    if (!a->training)
        return true;
    if (f->running_mean && (torch.get_data(to_optional(a->running_mean), &out->running_mean) ||
                            torch.get_data(to_optional(a->running_var), &out->running_var)))
        return false;
    return !torch.get_data(results[1], &out->save_mean) &&
           !torch.get_data(results[2], &out->save_invstd);
}

/* `room` holds a copy of a residual whose memory order is not the result's. */
static bool run_forward_in(forward *f, torch_tensor *results, torch_tensor *room)
{
    const aten_forward_arguments *a = f->arguments;
    bnf_call call = {
        .direction = a->training ? BNF_FORWARD : BNF_INFERENCE,
        .type = f->x.type,
        .shape = f->layout.shape,
        .activation = a->rest.activation,
        .slope = a->rest.slope,
        .eps = a->eps,
        .has_var = !a->training,
    };
    forward_outputs out = {0};
    /* An x in another memory order is copied to the result's memory and normalized in place. */
    if (!make_forward_results(f, results) || !find_outputs(f, results, &out) ||
        !aten_in_order(&f->x, &f->layout, &results[0], &call.x) ||
        (f->residual.tensor && !aten_in_order(&f->residual, &f->layout, room, &call.residual)) ||
        torch.get_data(results[0], &call.y))
        return false;
    aten_driver->plan(&call, aten_threads());
    if (!aten_driver->reserve(&call)) {
        f->error = ATEN_NO_MEMORY;
        return false;
    }
    compute_forward(f, &call, out);
    aten_driver->release(&call);
    return true;
}

static bool run_forward(forward *f, torch_tensor *results)
{
    torch_tensor room = NULL;
    const bool done = run_forward_in(f, results, &room);
    delete_tensor(&room);
    return done;
}

static void free_forward(aten_forward_arguments *a)
{
    delete_optional(a->residual);
    torch.delete_tensor(to_tensor(a->x));
    delete_optional(a->weight);
    delete_optional(a->bias);
    delete_optional(a->running_mean);
    delete_optional(a->running_var);
}

/* ---- Forward, left to PyTorch: by other operators, with the kernels that ours replace */

/* Training needs running statistics. If there are none, make some and ignore their update. PyTorch
 * refuses one without the other, which therefore stays undefined. */
static bool make_running(const aten_forward_arguments *a, torch_tensor *mean, torch_tensor *var)
{
    int32_t dtype;
    bnf_type type;
    int64_t length;
    const torch_tensor vectors[] = {to_optional(a->weight), to_optional(a->bias),
                                    to_optional(a->running_mean), to_optional(a->running_var)};
    if (vectors[2] || vectors[3])
        return (vectors[2] || !torch.undefined(mean)) && (vectors[3] || !torch.undefined(var));
    return aten_type_for_pytorch(a->x, vectors, 4, &dtype, &type, &length) &&
           aten_new_vector(length, dtype, mean) && aten_new_vector(length, dtype, var);
}

static bool leave_training(aten_forward_arguments *a, torch_value *stack)
{
    torch_tensor mean = NULL, var = NULL;
    if (!make_running(a, &mean, &var)) {
        delete_tensor(&mean);
        delete_tensor(&var);
        free_forward(a);
        return false;
    }
    stack[0] = a->x;
    stack[1] = a->weight;
    stack[2] = a->bias;
    stack[3] = either(mean, a->running_mean);
    stack[4] = either(var, a->running_var);
    stack[5] = from_double(a->momentum);
    stack[6] = from_double(a->eps);
    return !torch.call("aten::_batch_norm_with_update", "", stack, TORCH_ABI);
}

static bool leave_evaluation(aten_forward_arguments *a, torch_value *stack)
{
    stack[0] = a->x;
    stack[1] = a->weight;
    stack[2] = a->bias;
    stack[3] = a->running_mean;
    stack[4] = a->running_var;
    stack[5] = from_double(a->momentum);
    stack[6] = from_double(a->eps);
    return !torch.call("aten::_batch_norm_no_update", "", stack, TORCH_ABI);
}

static bool leave_forward(aten_forward_arguments *a, torch_tensor *results)
{
    torch_value stack[7];
    if (!(a->training ? leave_training(a, stack) : leave_evaluation(a, stack)))
        return false;
    for (int i = 0; i < 3; i++)
        results[i] = to_tensor(stack[i]);
    torch.delete_tensor(to_tensor(stack[3])); /* the reserve, for cuDNN */
    return true;
}

void aten_forward(aten_forward_arguments a, torch_value *stack)
{
    torch_tensor results[3] = {NULL};
    forward f = {.arguments = &a};
    const aten_outcome outcome = look_at_forward(&f);
    bool done = false;
    if (aten_runs_here(outcome))
        done = run_forward(&f, results);
    else if (a.rest.fused)
        f.error = aten_refusal(outcome);
    if (aten_runs_here(outcome) || a.rest.fused)
        free_forward(&a);
    else
        done = leave_forward(&a, results);
    aten_finish(done ? NULL : f.error ? f.error : torch.what(), outcome, results, 3, stack);
}

aten_forward_arguments aten_read_forward(const torch_value *stack)
{
    return (aten_forward_arguments){.x = stack[0],
                                    .weight = stack[1],
                                    .bias = stack[2],
                                    .running_mean = stack[3],
                                    .running_var = stack[4],
                                    .training = to_bool(stack[5]),
                                    .momentum = to_double(stack[6]),
                                    .eps = to_double(stack[7])};
}

void aten_batch_norm(torch_value *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    aten_forward(aten_read_forward(stack), stack);
}

/* In this operator the running statistics are not optional. */
void aten_batch_norm_legit(torch_value *stack, uint64_t arguments, uint64_t results)
{
    torch_value mean = 0, var = 0;
    if (!make_optional(stack[3], &mean) || !make_optional(stack[4], &var)) {
        aten_throw(torch.what());
        return;
    }
    stack[3] = mean;
    stack[4] = var;
    aten_batch_norm(stack, arguments, results);
}

void aten_batch_norm_no_stats(torch_value *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    const aten_forward_arguments a = {.x = stack[0],
                                      .weight = stack[1],
                                      .bias = stack[2],
                                      .training = to_bool(stack[3]),
                                      .momentum = to_double(stack[4]),
                                      .eps = to_double(stack[5])};
    aten_forward(a, stack);
}
