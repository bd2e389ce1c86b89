/* Sums are gathered block by block into slots.  Finishing turns the slots of a group into the
 * numbers that the output is written with.  moments() writes nothing, inference gathers nothing. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"
#include "float_env.h"
#include "moments.h"
#include "threads.h"

/* Functions that compute in the environment of float_env.h are never inlined: the compiler could
 * move their arithmetic out of it. */
#define APART __attribute__((noinline))

static struct {
    int isa;
    const bnf_table *table;
    bnf_caches caches;
} in_use;

static atomic_llong dispatches[BNF_DIRECTIONS][BNF_TYPES][BNF_LAYOUTS][BNF_MOST_ISAS]
                              [BNF_ACTIVATIONS][2];

/* ---- Forward, inference, moments */

static void prepare_forward(bnf_call *call)
{
    call->operands = (bnf_operands){
        .shape = call->shape,
        .x = call->x,
        .residual = call->residual,
        .weights = call->weights,
        .y = call->y,
        .mean = call->mean,
        .scale = call->scale,
        .shift = call->shift,
        .activation = call->activation,
        .slope = call->slope,
        .stream = call->plan.stream,
        .ahead = call->plan.ahead,
    };
}

static void prepare_inference(bnf_call *call)
{
    if (call->has_var)
        for (ptrdiff_t c = 0; c < call->shape.channels; c++)
            call->scale[c] *= bnf_inv_std(call->var[c], call->eps);
    prepare_forward(call);
}

static void gather_with(bnf_call *call, bnf_sum_kernel *moments, bnf_tile tile, ptrdiff_t block)
{
    double *mean = call->slot_a + block * call->shape.channels;
    double *m2 = call->slot_b + block * call->shape.channels;
    if (call->weights)
        call->kernels->masked_moments(&call->operands, tile, call->block_counts[block], mean, m2);
    else
        moments(&call->operands, tile, mean, m2);
}

static void gather_moments(bnf_call *call, bnf_tile tile, ptrdiff_t block)
{
    gather_with(call, call->kernels->moments, tile, block);
}

static void gather_batch_moments(bnf_call *call, bnf_tile tile, ptrdiff_t block)
{
    gather_with(call, call->kernels->batch_moments, tile, block);
}

static void finish_moments(bnf_call *call, ptrdiff_t c0, ptrdiff_t c1)
{
    bnf_merge_blocks(call->shape, call->plan.blocks, call->block_counts, c0, c1, call->slot_a,
                     call->slot_b);
}

static void set_forward_numbers(bnf_call *call, ptrdiff_t c0, ptrdiff_t c1)
{
    bnf_forward_numbers(call->count, call->eps, c0, c1, call->m2, call->weight, call->var,
                        call->inv_std, call->scale);
}

static void prepare_training(bnf_call *call)
{
    if (call->has_moments)
        set_forward_numbers(call, 0, call->shape.channels);
    prepare_forward(call);
}

static void finish_forward(bnf_call *call, ptrdiff_t c0, ptrdiff_t c1)
{
    finish_moments(call, c0, c1);
    set_forward_numbers(call, c0, c1);
}

static void write_forward(bnf_call *call, bnf_tile tile)
{
    call->kernels->apply(&call->operands, tile);
}

/* ---- Backward */

static bnf_z_source z_source_of(const bnf_call *call)
{
    if (call->activation == BNF_LINEAR)
        return BNF_NO_Z;
    if (call->output && bnf_is_from_output(call->activation))
        return BNF_Z_FROM_Y;
    return call->residual ? BNF_Z_FROM_X_RESIDUAL : BNF_Z_FROM_X;
}

static void set_backward_numbers(bnf_call *call, ptrdiff_t c0, ptrdiff_t c1)
{
    bnf_backward_numbers(call->scale, call->count, c0, c1, call->inv_std, call->dbias,
                         call->dweight, call->dy_factor, call->x_factor, call->constant);
}

static void prepare_backward(bnf_call *call)
{
    if (call->has_var)
        for (ptrdiff_t c = 0; c < call->shape.channels; c++)
            call->inv_std[c] = bnf_inv_std(call->var[c], call->eps);
    for (ptrdiff_t c = 0; c < call->shape.channels; c++) {
        call->scale[c] = call->dy_factor[c] = call->weight[c] * call->inv_std[c];
        call->ones[c] = 1.0;
    }
    if (call->has_sums)
        set_backward_numbers(call, 0, call->shape.channels);
    /* The residual's gradient is g.  Alone, it is computed as dx with constant statistics and a
     * factor of one. */
    const bool alone = !call->dx;
    call->operands = (bnf_operands){
        .shape = call->shape,
        .dy = call->dy,
        .x = call->x,
        .weights = call->weights,
        .residual = call->residual,
        .y = (void *)call->output,
        .dx = alone ? call->dresidual : call->dx,
        .dresidual = alone ? NULL : call->dresidual,
        .mean = call->mean,
        .scale = call->scale,
        .shift = call->shift,
        .dy_factor = alone ? call->ones : call->dy_factor,
        .x_factor = call->x_factor,
        .constant = call->constant,
        .activation = call->activation,
        .slope = call->slope,
        .z_source = z_source_of(call),
        .through_moments = !alone && call->count != 0,
        .stream = call->plan.stream,
        .ahead = call->plan.ahead,
    };
}

static void gather_gradients(bnf_call *call, bnf_tile tile, ptrdiff_t block)
{
    const ptrdiff_t row = block * call->shape.channels;
    call->kernels->grad_sums(&call->operands, tile, call->slot_a + row, call->slot_b + row);
}

static void finish_backward(bnf_call *call, ptrdiff_t c0, ptrdiff_t c1)
{
    bnf_add_blocks(call->shape, call->plan.blocks, c0, c1, call->slot_a);
    bnf_add_blocks(call->shape, call->plan.blocks, c0, c1, call->slot_b);
    bnf_weight_gradient(c0, c1, call->inv_std, call->slot_b, call->dweight);
    set_backward_numbers(call, c0, c1);
}

static void write_backward(bnf_call *call, bnf_tile tile)
{
    call->kernels->grad_input(&call->operands, tile);
}

/* ---- Running statistics */

static void move_average(void *running, bool wide, double momentum, const double *batch,
                         ptrdiff_t channels)
{
    float *narrow_values = running;
    double *wide_values = running;
    for (ptrdiff_t c = 0; c < channels; c++) {
        const double old = wide ? wide_values[c] : (double)narrow_values[c];
        const double new = bnf_moved_average(old, batch[c], momentum);
        if (wide)
            wide_values[c] = new;
        else
            narrow_values[c] = (float)new;
    }
}

static APART void move_averages(bnf_call *call, bnf_running running, double momentum, double ddof)
{
    const ptrdiff_t channels = call->shape.channels;
    double *var = call->scale; /* not needed any more */
    for (ptrdiff_t c = 0; c < channels; c++)
        var[c] = bnf_variance(call->m2[c], call->count, ddof);
    move_average(running.mean, running.wide_mean, momentum, call->mean, channels);
    move_average(running.var, running.wide_var, momentum, var, channels);
}

/* ---- All steps over all tiles.  Which thread takes a tile may vary; the result does not. */

static bool gathers(const bnf_call *call)
{
    if (call->direction == BNF_FORWARD)
        return !call->has_moments;
    return call->direction == BNF_MOMENTS || call->gathers;
}

static bool writes(const bnf_call *call) { return call->y || call->dx || call->dresidual; }

/* Whether moments_and_apply has a loop for it. */
static bool writes_in_turn(const bnf_call *call)
{
    return call->direction == BNF_FORWARD && call->type == BNF_F32 && !call->weights &&
           !call->residual && (call->activation == BNF_LINEAR || call->activation == BNF_RELU);
}

static bnf_tile block_of_group(const bnf_call *call, ptrdiff_t block, ptrdiff_t group)
{
    const bnf_plan *plan = &call->plan;
    return bnf_block_tile(call->shape, plan->blocks, block, group * plan->group, plan->group);
}

static void gather_tile(bnf_call *call, ptrdiff_t block, ptrdiff_t group)
{
    call->steps->gather(call, block_of_group(call, block, group), block);
}

static void finish_group(bnf_call *call, ptrdiff_t group)
{
    const ptrdiff_t c0 = group * call->plan.group, c1 = c0 + call->plan.group;
    call->steps->finish(call, c0, c1 < call->shape.channels ? c1 : call->shape.channels);
}

static void write_tile(bnf_call *call, ptrdiff_t block, ptrdiff_t width)
{
    const bnf_plan *plan = &call->plan;
    call->steps->write(call, bnf_block_tile(call->shape, plan->write_blocks, block,
                                            width * plan->width, plan->width));
}

/* Gathers a group's moments while the one before it is written. */
static void gather_and_write_last(bnf_call *call, ptrdiff_t block, ptrdiff_t group)
{
    const ptrdiff_t row = block * call->shape.channels;
    call->kernels->moments_and_apply(&call->operands, block_of_group(call, block, group),
                                     block_of_group(call, block, group - 1), call->slot_a + row,
                                     call->slot_b + row);
}

/* All steps of some groups of channels, each while the caches hold it. */
static void run_chain(void *context, ptrdiff_t chain)
{
    bnf_call *call = context;
    const bnf_plan *plan = &call->plan;
    const ptrdiff_t first = chain * plan->groups / plan->chains;
    const ptrdiff_t end = (chain + 1) * plan->groups / plan->chains;
    for (ptrdiff_t group = first; group < end; group++) {
        for (ptrdiff_t block = 0; block < plan->blocks.count; block++)
            if (group == first)
                gather_tile(call, block, group);
            else
                gather_and_write_last(call, block, group);
        finish_group(call, group);
    }
    write_tile(call, 0, end - 1);
}

/* The tiles of a block follow one another, as they do in memory. */
static void gather_one(void *context, ptrdiff_t i)
{
    bnf_call *call = context;
    gather_tile(call, i / call->plan.groups, i % call->plan.groups);
}

static void write_one(void *context, ptrdiff_t i)
{
    bnf_call *call = context;
    write_tile(call, i / call->plan.widths, i % call->plan.widths);
}

static void run_tiles(bnf_call *call, int threads)
{
    const bnf_plan *plan = &call->plan;
    if (plan->fused) {
        bnf_share_out(plan->chains, threads, BNF_DYNAMIC, run_chain, call);
        return;
    }
    if (gathers(call)) {
        bnf_share_out(plan->blocks.count * plan->groups, threads, BNF_STATIC, gather_one, call);
        for (ptrdiff_t group = 0; group < plan->groups; group++)
            finish_group(call, group);
    }
    if (writes(call))
        bnf_share_out(plan->write_blocks.count * plan->widths, threads, BNF_STATIC, write_one,
                      call);
}

static void count_dispatch(const bnf_call *call)
{
    const bool residual = call->residual || call->dresidual;
    atomic_fetch_add_explicit(&dispatches[call->direction][call->type][call->plan.layout]
                                         [in_use.isa][call->activation][residual],
                              1, memory_order_relaxed);
}

static APART void compute(bnf_call *call)
{
    count_dispatch(call);
    call->steps->prepare(call);
    if (call->bytes < BNF_SMALL_BYTES)
        run_tiles(call, 1);
    else {
        const int threads = bnf_begin_work(call->plan.threads, call->most_threads);
        run_tiles(call, threads);
        bnf_end_work(threads);
    }
}

static double weight_of_tile(const bnf_call *call, bnf_tile tile)
{
    const float *narrow = call->weights;
    const double *wide = call->weights;
    double sum = 0;
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        for (ptrdiff_t i = o * call->shape.inner + tile.inner0;
             i < o * call->shape.inner + tile.inner1; i++)
            sum += call->type == BNF_F64 ? wide[i] : (double)narrow[i];
    return sum;
}

static APART void weigh(bnf_call *call)
{
    for (ptrdiff_t block = 0; block < call->plan.blocks.count; block++)
        call->block_counts[block] =
            weight_of_tile(call, bnf_block_tile(call->shape, call->plan.blocks, block, 0, 1));
    if (call->direction == BNF_FORWARD && !call->has_moments)
        call->count = bnf_call_weight(call);
}

/* One of several calls. */
static void run_whole(void *context, ptrdiff_t i)
{
    bnf_call *call = (bnf_call *)context + i;
    call->steps->prepare(call);
    run_tiles(call, 1);
}

static APART void compute_all(bnf_call *calls, ptrdiff_t count, int most)
{
    const int wanted = count < most ? (int)count : most;
    const int threads = bnf_begin_work(wanted, most);
    count_dispatch(calls);
    bnf_share_out(count, threads, BNF_DYNAMIC, run_whole, calls);
    bnf_end_work(threads);
}

/* ---- What driver.h declares */

static bool has_values(bnf_shape shape)
{
    return shape.outer > 0 && shape.channels > 0 && shape.inner > 0;
}

void bnf_call_plan(bnf_call *call, int threads)
{
    static const bnf_steps steps[BNF_DIRECTIONS] = {
        [BNF_MOMENTS] = {prepare_forward, gather_moments, finish_moments, NULL},
        [BNF_FORWARD] = {prepare_training, gather_batch_moments, finish_forward, write_forward},
        [BNF_BACKWARD] = {prepare_backward, gather_gradients, finish_backward, write_backward},
        [BNF_INFERENCE] = {prepare_inference, NULL, NULL, write_forward},
    };
    const bnf_shape shape = call->shape;
    const ptrdiff_t itemsize = bnf_type_size(call->type);
    const int reads = 1 + (call->dy != NULL) + (call->residual || call->output);
    const int writes = (call->y != NULL) + (call->dx != NULL) + (call->dresidual != NULL);
    call->steps = &steps[call->direction];
    if (!has_values(shape))
        return;
    if (call->direction == BNF_FORWARD && !call->has_moments)
        call->count = (double)(shape.outer * shape.inner);
    call->bytes = shape.outer * shape.channels * shape.inner * itemsize * (reads + writes);
    call->most_threads = threads;
    call->plan = bnf_make_plan(shape, itemsize, gathers(call), reads, writes, in_use.caches,
                               bnf_share_of(threads));
    if (writes_in_turn(call))
        call->plan.chains = bnf_chains_in_turn(shape, call->plan);
    call->kernels = &in_use.table->kernels[call->type][call->plan.layout];
}

enum { VECTORS = 12 };

bool bnf_is_countable(ptrdiff_t channels, ptrdiff_t blocks)
{
    return channels <= PTRDIFF_MAX / (ptrdiff_t)sizeof(double) / (VECTORS + 1 + 2 * blocks);
}

bool bnf_call_reserve(bnf_call *call)
{
    double **vectors[VECTORS] = {
        &call->mean,      &call->weight,   &call->shift,    &call->scale,
        &call->var,       &call->inv_std,  &call->dweight,  &call->dbias,
        &call->dy_factor, &call->x_factor, &call->constant, &call->ones,
    };
    const ptrdiff_t channels = call->shape.channels;
    const ptrdiff_t blocks = gathers(call) ? call->plan.blocks.count : 0;
    const ptrdiff_t counts = call->weights ? call->plan.blocks.count : 0;
    if (!bnf_is_countable(channels, blocks))
        return false;
    const ptrdiff_t numbers = (VECTORS + 2 * blocks) * channels;
    call->memory = calloc((size_t)(numbers + counts + 1), sizeof(double));
    if (!call->memory)
        return false;
    if (call->weights) {
        call->block_counts = call->memory + numbers;
        const bnf_float_env found = bnf_enter_float_env();
        weigh(call);
        bnf_leave_float_env(found);
    }
    for (int i = 0; i < VECTORS; i++)
        *vectors[i] = call->memory + i * channels;
    call->slot_a = call->memory + VECTORS * channels;
    call->slot_b = call->slot_a + blocks * channels;
    /* Once the blocks are merged, the first row has the numbers of the whole batch. */
    if (blocks > 0 && call->direction == BNF_BACKWARD)
        call->dbias = call->slot_a;
    else if (blocks > 0)
        call->mean = call->slot_a, call->m2 = call->slot_b;
    else
        call->m2 = call->dweight; /* only a backward uses dweight */
    return true;
}

void bnf_call_run(bnf_call *call)
{
    const bool empty = !has_values(call->shape);
    if (empty && !call->has_moments)
        return;
    const bnf_float_env found = bnf_enter_float_env();
    if (empty)
        call->steps->prepare(call); /* the statistics follow from the moments that are given */
    else
        compute(call);
    bnf_leave_float_env(found);
}

void bnf_call_release(bnf_call *call) { free(call->memory); }

static APART void add_gradients(bnf_call *calls, ptrdiff_t count)
{
    for (ptrdiff_t i = 1; i < count; i++)
        for (ptrdiff_t c = 0; c < calls->shape.channels; c++) {
            calls->dweight[c] += calls[i].dweight[c];
            calls->dbias[c] += calls[i].dbias[c];
        }
}

void bnf_add_gradients(bnf_call *calls, ptrdiff_t count)
{
    const bnf_float_env found = bnf_enter_float_env();
    add_gradients(calls, count);
    bnf_leave_float_env(found);
}

double bnf_call_weight(const bnf_call *call)
{
    const bnf_blocks blocks = call->plan.blocks;
    if (blocks.count == 0)
        return 0;
    return bnf_values_in(call->shape, blocks, call->block_counts, 0, blocks.count);
}

void bnf_calls_run(bnf_call *calls, ptrdiff_t count, int threads)
{
    if (count == 0 || !has_values(calls->shape))
        return;
    const bnf_float_env found = bnf_enter_float_env();
    compute_all(calls, count, threads);
    bnf_leave_float_env(found);
}

void bnf_move_running(bnf_call *call, bnf_running running, double momentum, double ddof)
{
    const bnf_float_env found = bnf_enter_float_env();
    move_averages(call, running, momentum, ddof);
    bnf_leave_float_env(found);
}

static APART void move_vector(double *running, const double *batch, double momentum,
                              ptrdiff_t channels)
{
    move_average(running, true, momentum, batch, channels);
}

void bnf_move_averages(double *running, const double *batch, double momentum, ptrdiff_t channels)
{
    const bnf_float_env found = bnf_enter_float_env();
    move_vector(running, batch, momentum, channels);
    bnf_leave_float_env(found);
}

static APART void invert_std(double *var, double eps, ptrdiff_t channels)
{
    for (ptrdiff_t c = 0; c < channels; c++)
        var[c] = bnf_inv_std(var[c], eps);
}

void bnf_invert_std(double *var, double eps, ptrdiff_t channels)
{
    const bnf_float_env found = bnf_enter_float_env();
    invert_std(var, eps, channels);
    bnf_leave_float_env(found);
}

void bnf_use_isa(int index)
{
    in_use.isa = index;
    in_use.table = bnf_isa_table(index);
}

int bnf_isa_in_use(void) { return in_use.isa; }

void bnf_use_caches(bnf_caches caches) { in_use.caches = caches; }

bnf_caches bnf_caches_in_use(void) { return in_use.caches; }

long long bnf_dispatches(bnf_dispatch_key kind)
{
    return atomic_load(&dispatches[kind.direction][kind.type][kind.layout][kind.isa]
                                  [kind.activation][kind.residual]);
}

void bnf_forget_dispatches(void)
{
    atomic_llong *first = &dispatches[0][0][0][0][0][0];
    for (size_t i = 0; i < sizeof dispatches / sizeof *first; i++)
        atomic_store(first + i, 0);
}

const bnf_driver bnf_driver_table = {
    sizeof(bnf_call), bnf_call_plan,    bnf_call_reserve,
    bnf_call_run,     bnf_call_release, bnf_move_running,
};
