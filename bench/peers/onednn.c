// oneDNN's batch normalization through its C API: a plan is made once, and run many times.
// Compiled against oneDNN's headers and called by onednn.py.

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "oneapi/dnnl/dnnl.h"

enum { FORWARD, BACKWARD, INFERENCE };
enum { MAX_ARGS = 12 };

// One array of a call: its DNNL_ARG_ number, and its address.
typedef struct {
    int arg;
    void *data;
} given;

typedef struct {
    dnnl_primitive_t primitive;
    dnnl_exec_arg_t args[MAX_ARGS];
    int count;
    char implementation[64];
} plan;

static dnnl_engine_t engine;
static dnnl_stream_t stream;

static dnnl_format_tag_t tag_of(const char *layout)
{
    if (!strcmp(layout, "nchw"))
        return dnnl_nchw;
    if (!strcmp(layout, "nhwc"))
        return dnnl_nhwc;
    return strcmp(layout, "nChw8c") ? dnnl_nChw16c : dnnl_nChw8c;
}

void set_threads(int n) { omp_set_num_threads(n); }

int start(void)
{
    if (stream)
        return 0;
    return dnnl_engine_create(&engine, dnnl_cpu, 0) ||
           dnnl_stream_create(&stream, engine, dnnl_stream_default_flags);
}

void version(int *major, int *minor, int *patch)
{
    const dnnl_version_t *v = dnnl_version();
    *major = v->major, *minor = v->minor, *patch = v->patch;
}

static int describe(dnnl_primitive_desc_t *made, int step, dnnl_memory_desc_t tensor, float eps,
                    unsigned flags)
{
    dnnl_primitive_desc_t forward;
    if (step == INFERENCE)
        return dnnl_batch_normalization_forward_primitive_desc_create(
            made, engine, dnnl_forward_inference, tensor, tensor, eps,
            flags | dnnl_use_global_stats, NULL);
    int failed = dnnl_batch_normalization_forward_primitive_desc_create(
        &forward, engine, dnnl_forward_training, tensor, tensor, eps, flags, NULL);
    if (failed || step == FORWARD) {
        *made = forward;
        return failed;
    }
    failed = dnnl_batch_normalization_backward_primitive_desc_create(
        made, engine, dnnl_backward, tensor, tensor, tensor, eps, flags, forward, NULL);
    dnnl_primitive_desc_destroy(forward);
    return failed;
}

static const_dnnl_memory_desc_t desc_of(const_dnnl_primitive_desc_t pd, int arg)
{
    return dnnl_primitive_desc_query_md(pd, dnnl_query_exec_arg_md, arg);
}

void destroy_plan(plan *p)
{
    if (p->primitive)
        dnnl_primitive_destroy(p->primitive);
    for (int i = 0; i < p->count; i++)
        dnnl_memory_destroy(p->args[i].memory);
    free(p);
}

static int fill(plan *p, const_dnnl_primitive_desc_t pd, const given *arrays, int count)
{
    const char *name = "";
    dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, &name);
    strncpy(p->implementation, name, sizeof p->implementation - 1);
    for (int i = 0; i < count; i++) {
        dnnl_memory_t *memory = &p->args[i].memory;
        p->args[i].arg = arrays[i].arg;
        if (dnnl_memory_create(memory, desc_of(pd, arrays[i].arg), engine, arrays[i].data))
            return 1;
        p->count = i + 1;
    }
    return dnnl_primitive_create(&p->primitive, pd);
}

// NULL where oneDNN has no implementation.
plan *make_plan(int step, const char *layout, const int64_t *nchw, float eps, int relu,
                const given *arrays, int count)
{
    unsigned flags = dnnl_use_scale | dnnl_use_shift | (relu ? dnnl_fuse_norm_relu : 0);
    dnnl_memory_desc_t tensor;
    dnnl_primitive_desc_t pd;
    if (count > MAX_ARGS ||
        dnnl_memory_desc_create_with_tag(&tensor, 4, nchw, dnnl_f32, tag_of(layout)))
        return NULL;
    int failed = describe(&pd, step, tensor, eps, flags);
    dnnl_memory_desc_destroy(tensor);
    if (failed)
        return NULL;
    plan *p = calloc(1, sizeof *p);
    failed = fill(p, pd, arrays, count);
    dnnl_primitive_desc_destroy(pd);
    if (!failed)
        return p;
    destroy_plan(p);
    return NULL;
}

const char *implementation(const plan *p) { return p->implementation; }

int run_plan(const plan *p)
{
    return dnnl_primitive_execute(p->primitive, stream, p->count, p->args) ||
           dnnl_stream_wait(stream);
}
