#include "aten_kernels.h"
#include "aten_stack.h"
#include "aten_vectors.h"
#include "float_env.h"

/* Of x, weight, bias and, if the call is fused, residual. */
enum { MOST_GRADIENTS = 4 };

typedef struct {
    const aten_backward_arguments *arguments;
    aten_view dy, x, beside; /* beside.tensor is NULL where there was no residual */
    aten_layout layout;
    vector_kind vectors;
    torch_tensor save_mean;
    const void *weight, *bias, *mean, *second; /* second: 1 / std; in evaluation the variance */
    int gradients;
    bool wanted[MOST_GRADIENTS];
    const char *error;
} backward;

enum { BACKWARD_VECTORS = 5 };

static void backward_vectors(const aten_backward_arguments *a, torch_tensor *vectors)
{
    const torch_value values[BACKWARD_VECTORS] = {a->weight, a->running_mean, a->running_var,
                                                  a->save_mean, a->save_invstd};
    for (int i = 0; i < BACKWARD_VECTORS; i++)
        vectors[i] = to_optional(values[i]);
}

static bool has_type(torch_tensor tensor, bnf_type type)
{
    int32_t dtype;
    return !tensor || (!torch.get_dtype(tensor, &dtype) && dtype == aten_dtype(type));
}

static aten_outcome look_at_vectors(backward *b)
{
    torch_tensor vectors[BACKWARD_VECTORS];
    backward_vectors(b->arguments, vectors);
    b->vectors =
        (vector_kind){aten_vector_type(b->x.type, vectors, BACKWARD_VECTORS), b->x.sizes[1]};
    if (b->vectors.type != b->x.type && !is_half(b->x.type))
        return LEFT_PARAMETERS;
    for (int i = 0; i < BACKWARD_VECTORS; i++)
        if (!has_type(vectors[i], b->vectors.type))
            return LEFT_PARAMETERS;
    const torch_tensor *statistics = vectors + (b->arguments->training ? 3 : 1);
    b->save_mean = vectors[3];
    if (!statistics[0] || !statistics[1] || !aten_fits(vectors[0], b->vectors, &b->weight) ||
        !aten_fits(to_optional(b->arguments->bias), b->vectors, &b->bias) ||
        !aten_fits(statistics[0], b->vectors, &b->mean) ||
        !aten_fits(statistics[1], b->vectors, &b->second))
        return LEFT_PARAMETERS;
    return RAN_BACKWARD;
}

static aten_outcome look_beside_x(const backward *b, torch_tensor tensor, aten_view *view)
{
    const aten_outcome data = aten_look_at_data(tensor, view);
    if (!aten_runs_here(data))
        return data;
    if (view->type != b->x.type)
        return LEFT_TYPE;
    return aten_same_shape(view, &b->x) ? data : LEFT_SHAPE;
}

static bool read_wanted(backward *b)
{
    b->gradients = b->arguments->rest.fused ? 4 : 3;
    for (int i = 0; i < b->gradients; i++) {
        torch_value item;
        if (torch.list_get((torch_list)(uintptr_t)b->arguments->wanted, (size_t)i, &item))
            return false;
        b->wanted[i] = to_bool(item);
    }
    return true;
}

static aten_outcome look_at_backward(backward *b)
{
    const aten_backward_arguments *a = b->arguments;
    if (!a->rest.fused && !aten_is_wanted() && !aten_ran_here(to_optional(a->save_mean)))
        return LEFT_OFF;
    if (!aten_has_activation(&a->rest))
        return LEFT_ACTIVATION;
    aten_outcome data = aten_look_at_data(to_tensor(a->x), &b->x);
    if (aten_runs_here(data))
        data = look_beside_x(b, to_tensor(a->dy), &b->dy);
    if (aten_runs_here(data) && to_optional(a->beside))
        data = look_beside_x(b, to_optional(a->beside), &b->beside);
    if (!aten_runs_here(data))
        return data;
    if (!read_wanted(b))
        return LEFT_PARAMETERS;
    b->layout = aten_gradient_layout(&b->x, &b->dy);
    return look_at_vectors(b);
}

static bool make_backward_results(const backward *b, torch_tensor *results)
{
    const int32_t dtype = aten_dtype(b->vectors.type);
    for (int i = 0; i < b->gradients; i++) {
        bool made;
        if (!b->wanted[i])
            made = !torch.undefined(&results[i]);
        else if (i == 0 || i == 3)
            made = aten_new(&b->x, &b->layout, &results[i]);
        else
            made = aten_new_vector(b->vectors.length, dtype, &results[i]);
        if (!made)
            return false;
    }
    return true;
}

static void fill_backward(const backward *b, bnf_call *call)
{
    aten_fill(call->weight, b->weight, b->vectors, 1);
    aten_fill(call->shift, b->bias, b->vectors, 0);
    aten_fill(call->mean, b->mean, b->vectors, 0);
    aten_fill(call->has_var ? call->var : call->inv_std, b->second, b->vectors, 1);
    if (b->arguments->training)
        aten_recall(b->save_mean, call->mean, call->inv_std);
}

static APART void compute_backward(const backward *b, bnf_call *call, void *dweight, void *dbias)
{
    const bnf_float_env found = bnf_enter_float_env();
    fill_backward(b, call);
    aten_driver->run(call);
    if (dweight)
        aten_narrow(call->dweight, b->vectors.type, b->vectors.length, dweight);
    if (dbias)
        aten_narrow(call->dbias, b->vectors.type, b->vectors.length, dbias);
    bnf_leave_float_env(found);
}

/* `rooms` holds copies of tensors whose memory order is not the result's. */
static bool run_backward_in(backward *b, torch_tensor *results, torch_tensor *rooms)
{
    const bool training = b->arguments->training;
    const bnf_shape shape = b->layout.shape;
    bnf_call call = {
        .direction = BNF_BACKWARD,
        .type = b->x.type,
        .shape = shape,
        .activation = b->arguments->rest.activation,
        .slope = b->arguments->rest.slope,
        .count = training ? (double)(shape.outer * shape.inner) : 0,
        .eps = b->arguments->eps,
        .has_var = !training,
        .gathers = b->wanted[1] || b->wanted[2] || (training && b->wanted[0]),
    };
    const void **beside = bnf_is_from_output(call.activation) ? &call.output : &call.residual;
    void *outputs[MOST_GRADIENTS] = {NULL};
    if (!make_backward_results(b, results) ||
        !aten_in_order(&b->x, &b->layout, &rooms[0], &call.x) ||
        !aten_in_order(&b->dy, &b->layout, &rooms[1], &call.dy) ||
        (b->beside.tensor && !aten_in_order(&b->beside, &b->layout, &rooms[2], beside)))
        return false;
    for (int i = 0; i < b->gradients; i++)
        if (b->wanted[i] && torch.get_data(results[i], &outputs[i]))
            return false;
    call.dx = outputs[0];
    call.dresidual = outputs[3];
    aten_driver->plan(&call, aten_threads());
    if (!aten_driver->reserve(&call)) {
        b->error = ATEN_NO_MEMORY;
        return false;
    }
    compute_backward(b, &call, outputs[1], outputs[2]);
    aten_driver->release(&call);
    return true;
}

static bool run_backward(backward *b, torch_tensor *results)
{
    torch_tensor rooms[3] = {NULL};
    const bool done = run_backward_in(b, results, rooms);
    for (int i = 0; i < 3; i++)
        delete_tensor(&rooms[i]);
    return done;
}

/* A vector of ones, in the type of the other vectors. */
static bool new_ones(const aten_backward_arguments *a, torch_tensor *made)
{
    int32_t dtype;
    bnf_type type;
    int64_t length;
    torch_tensor vectors[BACKWARD_VECTORS];
    void *values;
    const double one = 1;
    backward_vectors(a, vectors);
    if (!aten_type_for_pytorch(a->x, vectors, BACKWARD_VECTORS, &dtype, &type, &length) ||
        !aten_new_vector(length, dtype, made) || torch.get_data(*made, &values))
        return false;
    if (type != BNF_TYPES)
        for (int64_t c = 0; c < length; c++)
            aten_narrow(&one, type, 1, (char *)values + c * (int64_t)aten_itemsize(type));
    return true;
}

static void free_backward(aten_backward_arguments *a)
{
    delete_optional(a->bias);
    delete_optional(a->beside);
    torch.delete_tensor(to_tensor(a->dy));
    torch.delete_tensor(to_tensor(a->x));
    delete_optional(a->weight);
    delete_optional(a->running_mean);
    delete_optional(a->running_var);
    delete_optional(a->save_mean);
    delete_optional(a->save_invstd);
    torch.delete_list((torch_list)(uintptr_t)a->wanted);
}

/* PyTorch's own kernel is under another operator, which needs a weight and a tensor for cuDNN. */
static bool leave_backward(aten_backward_arguments *a, torch_tensor *results)
{
    torch_tensor weight = NULL, reserve = NULL;
    if ((!to_optional(a->weight) && !new_ones(a, &weight)) ||
        !aten_new_vector(0, aten_dtype(BNF_F32), &reserve)) {
        delete_tensor(&weight);
        free_backward(a);
        return false;
    }
    torch_value stack[] = {
        a->dy,
        a->x,
        either(weight, a->weight),
        a->running_mean,
        a->running_var,
        a->save_mean,
        a->save_invstd,
        a->training,
        from_double(a->eps),
        a->wanted,
        from_tensor(reserve),
    };
    if (torch.call("aten::batch_norm_backward", "", stack, TORCH_ABI))
        return false;
    for (int i = 0; i < 3; i++)
        results[i] = to_tensor(stack[i]);
    return true;
}

void aten_backward(aten_backward_arguments a, torch_value *stack)
{
    torch_tensor results[MOST_GRADIENTS] = {NULL};
    backward b = {.arguments = &a};
    const aten_outcome outcome = look_at_backward(&b);
    bool done = false;
    if (aten_runs_here(outcome))
        done = run_backward(&b, results);
    else if (a.rest.fused)
        b.error = aten_refusal(outcome);
    if (aten_runs_here(outcome) || a.rest.fused)
        free_backward(&a);
    else
        done = leave_backward(&a, results);
    aten_finish(done      ? NULL
                : b.error ? b.error
                          : torch.what(),
                outcome, results, a.rest.fused ? 4 : 3, stack);
}

void aten_batch_norm_backward(torch_value *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    const aten_backward_arguments a = {.dy = stack[0],
                                       .x = stack[1],
                                       .weight = stack[2],
                                       .running_mean = stack[3],
                                       .running_var = stack[4],
                                       .save_mean = stack[5],
                                       .save_invstd = stack[6],
                                       .training = to_bool(stack[7]),
                                       .eps = to_double(stack[8]),
                                       .wanted = stack[9]};
    aten_backward(a, stack);
}
