#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "aten_kernels.h"
#include "aten_tensors.h"
#include "float_env.h"

/* As in driver.c: no arithmetic is moved out of the environment that it is done in. */
#define APART __attribute__((noinline))

static const bnf_driver *driver;
static atomic_bool enabled;
static atomic_llong counts[OUTCOMES];

void aten_setup(const bnf_driver *found)
{
    driver = found;
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

static void count(aten_outcome outcome)
{
    atomic_fetch_add_explicit(&counts[outcome], 1, memory_order_relaxed);
}

static bool runs_here(aten_outcome outcome) { return outcome < LEFT_OFF; }

/* ---- The stack */

static torch_value from_double(double value)
{
    torch_value bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static double to_double(torch_value bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static bool to_bool(torch_value value) { return (value & 0xff) != 0; }

static torch_value from_tensor(torch_tensor tensor) { return (torch_value)(uintptr_t)tensor; }

static torch_tensor to_tensor(torch_value value) { return (torch_tensor)(uintptr_t)value; }

/* NULL where there is none, or one that is undefined, as autograd passes it. */
static torch_tensor to_optional(torch_value value)
{
    bool defined = false;
    if (!value)
        return NULL;
    const torch_tensor tensor = to_tensor(*(torch_value *)(uintptr_t)value);
    return !torch.is_defined(tensor, &defined) && defined ? tensor : NULL;
}

static bool make_optional(torch_value tensor, torch_value *optional)
{
    torch_value *box;
    if (torch.new_value(&box))
        return false;
    *box = tensor;
    *optional = (torch_value)(uintptr_t)box;
    return true;
}

static void delete_tensor(torch_tensor *tensor)
{
    if (*tensor)
        torch.delete_tensor(*tensor);
    *tensor = NULL;
}

static void delete_optional(torch_value value)
{
    if (!value)
        return;
    torch_value *box = (torch_value *)(uintptr_t)value;
    torch.delete_tensor(to_tensor(*box));
    torch.delete_value(box);
}

/* What went wrong, by PyTorch's own means: an exception is thrown through this frame, so that
 * everything has been freed before. */
static void throw_error(const char *message)
{
    torch.check(false, "batch_norm", "bnfast", 0, message);
}

static const char NO_MEMORY[] = "bnfast: not enough memory for the numbers per channel";

static void leave_results(torch_value *stack, torch_tensor *results)
{
    for (int i = 0; i < 3; i++)
        stack[i] = from_tensor(results[i]);
}

/* ---- Numbers per channel */

/* The type of parameters and statistics: the data's, or float32 beside halves.  PyTorch goes by
 * the first that there is, and refuses others of another type. */
static bnf_type vector_type(bnf_type data, const torch_tensor *vectors, int number)
{
    for (int i = 0; i < number; i++) {
        int32_t dtype;
        if (vectors[i] && !torch.get_dtype(vectors[i], &dtype))
            return data < BNF_TYPES && dtype == aten_dtype(data) ? data : BNF_F32;
    }
    return data;
}

static bool is_half(bnf_type type) { return type == BNF_F16 || type == BNF_BF16; }

typedef struct {
    bnf_type type;
    int64_t length;
} vector_kind;

/* Whether a vector is missing or as it should be. */
static bool fits(torch_tensor tensor, vector_kind kind, const void **values)
{
    return !tensor || aten_vector(tensor, kind.length, aten_dtype(kind.type), values);
}

static void fill(double *to, const void *values, vector_kind kind, double otherwise)
{
    if (values)
        aten_widen(values, kind.type, kind.length, to);
    else
        for (int64_t c = 0; c < kind.length; c++)
            to[c] = otherwise;
}

/* ---- What the forward keeps for the backward
 *
 * save_mean and save_invstd are what PyTorch's own are, rounded.  The float64 numbers lie behind
 * save_mean in its storage after a mark.  They are used where they round to what is visible: not
 * where somebody overwrote, copied or cut save_mean or save_invstd. */

typedef struct {
    uint64_t mark;
    double values[]; /* means, then inverse standard deviations */
} kept_numbers;

static const uint64_t KEPT_MARK = 0x626e666173743031; /* "bnfast01" */

static int64_t kept_offset(vector_kind kind)
{
    const int64_t bytes = kind.length * (int64_t)aten_itemsize(kind.type);
    return (bytes + 7) / 8 * 8;
}

static int64_t kept_end(vector_kind kind)
{
    return kept_offset(kind) + (int64_t)sizeof(kept_numbers) +
           2 * kind.length * (int64_t)sizeof(double);
}

static kept_numbers *kept_behind(void *save_mean, vector_kind kind)
{
    return (kept_numbers *)((char *)save_mean + kept_offset(kind));
}

static bool new_save_mean(vector_kind kind, torch_tensor *made)
{
    const int64_t stride = 1;
    torch_tensor longer = NULL;
    if (kind.type == BNF_F64)
        return aten_new_vector(kind.length, aten_dtype(kind.type), made);
    const bool done = aten_new_vector(kept_end(kind) / (int64_t)aten_itemsize(kind.type),
                                      aten_dtype(kind.type), &longer) &&
                      !torch.reinterpret(longer, 1, &kind.length, &stride, 0, made);
    delete_tensor(&longer);
    return done;
}

static void keep(void *save_mean, vector_kind kind, const double *mean, const double *inv_std)
{
    if (kind.type == BNF_F64)
        return;
    kept_numbers *kept = kept_behind(save_mean, kind);
    const size_t bytes = (size_t)kind.length * sizeof(double);
    memcpy(kept->values, mean, bytes);
    memcpy(kept->values + kind.length, inv_std, bytes);
    kept->mark = KEPT_MARK;
}

static bool round_to(const double *exact, const double *visible, vector_kind kind)
{
    for (int64_t c = 0; c < kind.length; c++) {
        const double rounded = aten_rounded(exact[c], kind.type);
        if (rounded != visible[c] && !(isnan(rounded) && isnan(visible[c])))
            return false;
    }
    return true;
}

/* Replace visible numbers by those that were kept, if there are any. */
static void recall(torch_tensor save_mean, const void *values, vector_kind kind, double *mean,
                   double *inv_std)
{
    int64_t offset, bytes;
    if (kind.type == BNF_F64 || torch.get_storage_offset(save_mean, &offset) || offset != 0 ||
        torch.get_storage_size(save_mean, &bytes) || bytes < kept_end(kind) ||
        (uintptr_t)values % sizeof(double) != 0)
        return;
    const kept_numbers *kept = kept_behind((void *)values, kind);
    if (kept->mark != KEPT_MARK || !round_to(kept->values, mean, kind) ||
        !round_to(kept->values + kind.length, inv_std, kind))
        return;
    const size_t size = (size_t)kind.length * sizeof(double);
    memcpy(mean, kept->values, size);
    memcpy(inv_std, kept->values + kind.length, size);
}

/* ---- Data */

static aten_outcome look_at_data(torch_tensor tensor, aten_view *view)
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

static int threads_of_pytorch(void)
{
    enum { MOST = 1024 };
    uint32_t threads = 1;
    torch.get_num_threads(&threads);
    return threads < MOST ? (int)threads : MOST;
}

/* ---- Forward */

typedef struct {
    torch_value x, weight, bias, running_mean, running_var; /* all but x optional */
    bool training;
    double momentum, eps;
} forward_arguments;

typedef struct {
    const forward_arguments *arguments;
    aten_view x;
    aten_layout layout;
    vector_kind vectors;
    const void *weight, *bias, *running_mean, *running_var;
    const char *error; /* not PyTorch's own */
} forward;

static aten_outcome look_at_forward(forward *f)
{
    const forward_arguments *a = f->arguments;
    if (!aten_is_on())
        return LEFT_OFF;
    const aten_outcome data = look_at_data(to_tensor(a->x), &f->x);
    if (!runs_here(data))
        return data;
    const torch_tensor vectors[] = {to_optional(a->weight), to_optional(a->bias),
                                    to_optional(a->running_mean), to_optional(a->running_var)};
    f->layout = aten_result_layout(&f->x);
    f->vectors = (vector_kind){vector_type(f->x.type, vectors, 4), f->x.sizes[1]};
    const bool allowed = f->vectors.type == f->x.type || is_half(f->x.type);
    if (!allowed || !fits(vectors[0], f->vectors, &f->weight) ||
        !fits(vectors[1], f->vectors, &f->bias) ||
        !fits(vectors[2], f->vectors, &f->running_mean) ||
        !fits(vectors[3], f->vectors, &f->running_var))
        return LEFT_PARAMETERS;
    if (!f->running_mean != !f->running_var || (!a->training && !f->running_mean))
        return LEFT_PARAMETERS;
    return a->training ? RAN_TRAINING : RAN_EVALUATION;
}

static bool make_forward_results(forward *f, torch_tensor *results)
{
    const int32_t dtype = aten_dtype(f->vectors.type);
    if (!aten_new(&f->x, &f->layout, &results[0]))
        return false;
    if (!f->arguments->training)
        return aten_new_vector(0, dtype, &results[1]) && aten_new_vector(0, dtype, &results[2]);
    return new_save_mean(f->vectors, &results[1]) &&
           aten_new_vector(f->vectors.length, dtype, &results[2]);
}

static void fill_forward(const forward *f, bnf_call *call)
{
    double *weight = f->arguments->training ? call->weight : call->scale;
    fill(weight, f->weight, f->vectors, 1);
    fill(call->shift, f->bias, f->vectors, 0);
    if (!f->arguments->training) {
        fill(call->mean, f->running_mean, f->vectors, 0);
        fill(call->var, f->running_var, f->vectors, 1);
    }
}

/* Running halves are moved in float64 and rounded once, in vectors that have done their work. */
static void move_running(const forward *f, bnf_call *call, void *mean, void *var)
{
    const vector_kind kind = f->vectors;
    const bool half = is_half(kind.type), wide = half || kind.type == BNF_F64;
    const bnf_running running = {half ? call->weight : mean, half ? call->shift : var, wide, wide};
    if (half) {
        aten_widen(mean, kind.type, kind.length, running.mean);
        aten_widen(var, kind.type, kind.length, running.var);
    }
    driver->move_running(call, running, f->arguments->momentum, 1);
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
    driver->run(call);
    if (f->arguments->training) {
        aten_narrow(call->mean, f->vectors.type, f->vectors.length, out.save_mean);
        aten_narrow(call->inv_std, f->vectors.type, f->vectors.length, out.save_invstd);
        keep(out.save_mean, f->vectors, call->mean, call->inv_std);
        if (out.running_mean)
            move_running(f, call, out.running_mean, out.running_var);
    }
    bnf_leave_float_env(found);
}

static bool find_outputs(const forward *f, const torch_tensor *results, forward_outputs *out)
{
    const forward_arguments *a = f->arguments;
    if (!a->training)
        return true;
    if (f->running_mean && (torch.get_data(to_optional(a->running_mean), &out->running_mean) ||
                            torch.get_data(to_optional(a->running_var), &out->running_var)))
        return false;
    return !torch.get_data(results[1], &out->save_mean) &&
           !torch.get_data(results[2], &out->save_invstd);
}

static bool run_forward(forward *f, torch_tensor *results)
{
    bnf_call call = {
        .direction = f->arguments->training ? BNF_FORWARD : BNF_INFERENCE,
        .type = f->x.type,
        .shape = f->layout.shape,
        .eps = f->arguments->eps,
        .has_var = !f->arguments->training,
    };
    forward_outputs out = {NULL};
    /* What lies in another order is copied to where the result will be, and computed in place. */
    if (!make_forward_results(f, results) || !find_outputs(f, results, &out) ||
        !aten_in_order(&f->x, &f->layout, &results[0], &call.x) ||
        torch.get_data(results[0], &call.y))
        return false;
    driver->plan(&call, threads_of_pytorch());
    if (!driver->reserve(&call)) {
        f->error = NO_MEMORY;
        return false;
    }
    compute_forward(f, &call, out);
    driver->release(&call);
    return true;
}

static void free_forward(forward_arguments *a)
{
    torch.delete_tensor(to_tensor(a->x));
    delete_optional(a->weight);
    delete_optional(a->bias);
    delete_optional(a->running_mean);
    delete_optional(a->running_var);
}

/* ---- Forward, left to PyTorch: by other operators that have the kernels that ours replace */

/* The vectors' type, also where they or x are nothing that the kernels here take. */
static bool type_for_pytorch(torch_value x, const torch_tensor *vectors, int number, int32_t *dtype,
                             bnf_type *type, int64_t *length)
{
    aten_view view;
    if (!aten_look(to_tensor(x), &view))
        return false;
    *type = vector_type(view.type, vectors, number);
    *dtype = *type == BNF_TYPES ? view.dtype : aten_dtype(*type);
    *length = view.dim > 1 ? view.sizes[1] : 0;
    return true;
}

/* Training wants running statistics: where there are none, some to be moved for nobody. */
static bool make_running(const forward_arguments *a, torch_tensor *mean, torch_tensor *var)
{
    int32_t dtype;
    bnf_type type;
    int64_t length;
    const torch_tensor vectors[] = {to_optional(a->weight), to_optional(a->bias),
                                    to_optional(a->running_mean), to_optional(a->running_var)};
    return type_for_pytorch(a->x, vectors, 4, &dtype, &type, &length) &&
           (vectors[2] || aten_new_vector(length, dtype, mean)) &&
           (vectors[3] || aten_new_vector(length, dtype, var));
}

/* The one that was made, or else the one in an optional argument, which is used up. */
static torch_value either(torch_tensor made, torch_value optional)
{
    if (made) {
        delete_optional(optional);
        return from_tensor(made);
    }
    torch_value *box = (torch_value *)(uintptr_t)optional;
    const torch_value tensor = *box;
    torch.delete_value(box);
    return tensor;
}

static bool leave_training(forward_arguments *a, torch_value *stack)
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

static bool leave_evaluation(forward_arguments *a, torch_value *stack)
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

static bool leave_forward(forward_arguments *a, torch_tensor *results)
{
    torch_value stack[7];
    if (!(a->training ? leave_training(a, stack) : leave_evaluation(a, stack)))
        return false;
    for (int i = 0; i < 3; i++)
        results[i] = to_tensor(stack[i]);
    torch.delete_tensor(to_tensor(stack[3])); /* the reserve, cuDNN's */
    return true;
}

static void batch_norm(forward_arguments a, torch_value *stack)
{
    torch_tensor results[3] = {NULL};
    forward f = {.arguments = &a};
    const aten_outcome outcome = look_at_forward(&f);
    bool done;
    if (runs_here(outcome)) {
        done = run_forward(&f, results);
        free_forward(&a);
    } else
        done = leave_forward(&a, results);
    if (!done) {
        for (int i = 0; i < 3; i++)
            delete_tensor(&results[i]);
        throw_error(f.error ? f.error : torch.what());
        return;
    }
    count(outcome);
    leave_results(stack, results);
}

void aten_batch_norm(torch_value *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    const forward_arguments a = {stack[0],
                                 stack[1],
                                 stack[2],
                                 stack[3],
                                 stack[4],
                                 to_bool(stack[5]),
                                 to_double(stack[6]),
                                 to_double(stack[7])};
    batch_norm(a, stack);
}

/* Its running statistics are not optional. */
void aten_batch_norm_legit(torch_value *stack, uint64_t arguments, uint64_t results)
{
    torch_value mean = 0, var = 0;
    if (!make_optional(stack[3], &mean) || !make_optional(stack[4], &var)) {
        throw_error(torch.what());
        return;
    }
    stack[3] = mean;
    stack[4] = var;
    aten_batch_norm(stack, arguments, results);
}

void aten_batch_norm_no_stats(torch_value *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    const forward_arguments a = {.x = stack[0],
                                 .weight = stack[1],
                                 .bias = stack[2],
                                 .training = to_bool(stack[3]),
                                 .momentum = to_double(stack[4]),
                                 .eps = to_double(stack[5])};
    batch_norm(a, stack);
}

/* ---- Backward */

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
    b->vectors = (vector_kind){vector_type(b->x.type, vectors, BACKWARD_VECTORS), b->x.sizes[1]};
    if (b->vectors.type != b->x.type && !is_half(b->x.type))
        return LEFT_PARAMETERS;
    for (int i = 0; i < BACKWARD_VECTORS; i++)
        if (!has_type(vectors[i], b->vectors.type))
            return LEFT_PARAMETERS;
    const torch_tensor *statistics = vectors + (b->arguments->training ? 3 : 1);
    b->save_mean = vectors[3];
    if (!statistics[0] || !statistics[1] || !fits(vectors[0], b->vectors, &b->weight) ||
        !fits(statistics[0], b->vectors, &b->mean) || !fits(statistics[1], b->vectors, &b->second))
        return LEFT_PARAMETERS;
    return RAN_BACKWARD;
}

static aten_outcome look_at_backward(backward *b)
{
    const backward_arguments *a = b->arguments;
    if (!aten_is_on())
        return LEFT_OFF;
    const aten_outcome x = look_at_data(to_tensor(a->x), &b->x);
    if (!runs_here(x))
        return x;
    const aten_outcome dy = look_at_data(to_tensor(a->dy), &b->dy);
    if (!runs_here(dy))
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
    fill(call->weight, b->weight, b->vectors, 1);
    fill(call->mean, b->mean, b->vectors, 0);
    fill(call->inv_std, b->second, b->vectors, 1);
    if (b->arguments->training)
        recall(b->save_mean, b->mean, b->vectors, call->mean, call->inv_std);
    else
        for (int64_t c = 0; c < b->vectors.length; c++)
            call->inv_std[c] = 1 / sqrt(call->inv_std[c] + b->arguments->eps);
}

static APART void compute_backward(const backward *b, bnf_call *call, void *dweight, void *dbias)
{
    const bnf_float_env found = bnf_enter_float_env();
    fill_backward(b, call);
    driver->run(call);
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
    driver->plan(&call, threads_of_pytorch());
    if (!driver->reserve(&call)) {
        b->error = NO_MEMORY;
        return false;
    }
    compute_backward(b, &call, outputs[1], outputs[2]);
    driver->release(&call);
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
    if (!type_for_pytorch(a->x, vectors, BACKWARD_VECTORS, &dtype, &type, &length) ||
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
    if (runs_here(outcome)) {
        done = run_backward(&b, results);
        free_backward(&a);
    } else
        done = leave_backward(&a, results);
    if (!done) {
        for (int i = 0; i < 3; i++)
            delete_tensor(&results[i]);
        throw_error(b.error ? b.error : torch.what());
        return;
    }
    count(outcome);
    leave_results(stack, results);
}
