#include <math.h>

#include "aten_kernels.h"
#include "aten_stack.h"
#include "aten_vectors.h"
#include "float_env.h"

typedef struct {
    torch_value dy, x, weight, running_mean, running_var, save_mean, save_invstd;
    bool training;
    double eps;
    torch_value wanted; /* a list of three bools */
} backward_arguments;

typedef struct {
    const backward_arguments *arguments;
    aten_view dy, x;
    aten_layout layout;
    vector_kind vectors;
    torch_tensor save_mean;
    const void *weight, *mean, *second; /* second: 1 / std, in evaluation the variance */
    bool wanted[3];                     /* of x, weight, bias */
    const char *error;
} backward;

enum { BACKWARD_VECTORS = 5 };

static void backward_vectors(const backward_arguments *a, torch_tensor *vectors)
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
        !aten_fits(statistics[0], b->vectors, &b->mean) ||
        !aten_fits(statistics[1], b->vectors, &b->second))
        return LEFT_PARAMETERS;
    return RAN_BACKWARD;
}

static aten_outcome look_at_backward(backward *b)
{
    const backward_arguments *a = b->arguments;
    if (!aten_is_on())
        return LEFT_OFF;
    const aten_outcome x = aten_look_at_data(to_tensor(a->x), &b->x);
    if (!aten_runs_here(x))
        return x;
    const aten_outcome dy = aten_look_at_data(to_tensor(a->dy), &b->dy);
    if (!aten_runs_here(dy))
        return dy;
    if (b->dy.type != b->x.type)
        return LEFT_TYPE;
    if (!aten_same_shape(&b->dy, &b->x))
        return LEFT_SHAPE;
    for (size_t i = 0; i < 3; i++) {
        torch_value item;
        if (torch.list_get((torch_list)(uintptr_t)a->wanted, i, &item))
            return LEFT_PARAMETERS;
        b->wanted[i] = to_bool(item);
    }
    b->layout = aten_gradient_layout(&b->x, &b->dy);
    return look_at_vectors(b);
}

static bool make_backward_results(const backward *b, torch_tensor *results)
{
    const int32_t dtype = aten_dtype(b->vectors.type);
    for (int i = 0; i < 3; i++) {
        bool made;
        if (!b->wanted[i])
            made = !torch.undefined(&results[i]);
        else if (i == 0)
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
    aten_fill(call->mean, b->mean, b->vectors, 0);
    aten_fill(call->inv_std, b->second, b->vectors, 1);
    if (b->arguments->training)
        aten_recall(b->save_mean, b->mean, b->vectors, call->mean, call->inv_std);
    else
        for (int64_t c = 0; c < b->vectors.length; c++)
            call->inv_std[c] = 1 / sqrt(call->inv_std[c] + b->arguments->eps);
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

/* `rooms`: for what lies in another order than the result. */
static bool run_backward_in(backward *b, torch_tensor *results, torch_tensor *rooms)
{
    const bool training = b->arguments->training;
    const bnf_shape shape = b->layout.shape;
    bnf_call call = {
        .direction = BNF_BACKWARD,
        .type = b->x.type,
        .shape = shape,
        .count = training ? (double)(shape.outer * shape.inner) : 0,
        .gathers = b->wanted[1] || b->wanted[2] || (training && b->wanted[0]),
    };
    void *outputs[3] = {NULL};
    if (!make_backward_results(b, results) ||
        !aten_in_order(&b->x, &b->layout, &rooms[0], &call.x) ||
        !aten_in_order(&b->dy, &b->layout, &rooms[1], &call.dy))
        return false;
    for (int i = 0; i < 3; i++)
        if (b->wanted[i] && torch.get_data(results[i], &outputs[i]))
            return false;
    call.dx = outputs[0];
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
    torch_tensor rooms[2] = {NULL};
    const bool done = run_backward_in(b, results, rooms);
    delete_tensor(&rooms[0]);
    delete_tensor(&rooms[1]);
    return done;
}

/* A vector of ones, in the type of the other vectors. */
static bool new_ones(const backward_arguments *a, torch_tensor *made)
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

static void free_backward(backward_arguments *a)
{
    torch.delete_tensor(to_tensor(a->dy));
    torch.delete_tensor(to_tensor(a->x));
    delete_optional(a->weight);
    delete_optional(a->running_mean);
    delete_optional(a->running_var);
    delete_optional(a->save_mean);
    delete_optional(a->save_invstd);
    torch.delete_list((torch_list)(uintptr_t)a->wanted);
}

/* PyTorch's own kernel has another operator, which wants a weight, and a tensor of cuDNN's. */
static bool leave_backward(backward_arguments *a, torch_tensor *results)
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

void aten_batch_norm_backward(torch_value *stack, uint64_t arguments, uint64_t results_expected)
{
    (void)arguments, (void)results_expected;
    backward_arguments a = {stack[0], stack[1],          stack[2],
                            stack[3], stack[4],          stack[5],
                            stack[6], to_bool(stack[7]), to_double(stack[8]),
                            stack[9]};
    torch_tensor results[3] = {NULL};
    backward b = {.arguments = &a};
    const aten_outcome outcome = look_at_backward(&b);
    bool done;
    if (aten_runs_here(outcome)) {
        done = run_backward(&b, results);
        free_backward(&a);
    } else
        done = leave_backward(&a, results);
    aten_finish(done ? NULL : b.error ? b.error : torch.what(), outcome, results, stack);
}
