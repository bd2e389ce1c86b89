// libxsmm's fused batch normalization: a plan is made once, and run many times.
// Compiled against libxsmm's headers and called by libxsmm.py.

#include <omp.h>
#include <stdlib.h>

#include <libxsmm.h>

enum { FORWARD, BACKWARD, INFERENCE };

// The arrays of a call by what libxsmm calls them; NULL where a step does not take one.
typedef struct {
    void *x, *y, *residual, *dy, *dx, *dresidual;                 // in libxsmm's layout
    void *weight, *bias, *mean, *inv_std, *var, *dweight, *dbias; // a value per channel
} arrays;

enum { ARRAYS = sizeof(arrays) / sizeof(void *) };

// In the order of `arrays`.
static const libxsmm_dnn_tensor_type TYPES[ARRAYS] = {
    LIBXSMM_DNN_REGULAR_INPUT,         LIBXSMM_DNN_REGULAR_OUTPUT,
    LIBXSMM_DNN_REGULAR_INPUT_ADD,     LIBXSMM_DNN_GRADIENT_OUTPUT,
    LIBXSMM_DNN_GRADIENT_INPUT,        LIBXSMM_DNN_GRADIENT_INPUT_ADD,
    LIBXSMM_DNN_REGULAR_CHANNEL_GAMMA, LIBXSMM_DNN_REGULAR_CHANNEL_BETA,
    LIBXSMM_DNN_CHANNEL_EXPECTVAL,     LIBXSMM_DNN_CHANNEL_RCPSTDDEV,
    LIBXSMM_DNN_CHANNEL_VARIANCE,      LIBXSMM_DNN_GRADIENT_CHANNEL_GAMMA,
    LIBXSMM_DNN_GRADIENT_CHANNEL_BETA,
};

typedef struct {
    libxsmm_dnn_fusedbatchnorm *handle;
    libxsmm_dnn_tensor *tensors[ARRAYS];
    void *scratch;
    libxsmm_dnn_compute_kind kind;
    int threads;
} plan;

const char *version(void) { return LIBXSMM_VERSION; }

const char *target(void)
{
    libxsmm_init();
    return libxsmm_get_target_arch();
}

void destroy_plan(plan *p)
{
    for (int i = 0; i < ARRAYS; i++)
        if (p->tensors[i])
            libxsmm_dnn_destroy_tensor(p->tensors[i]);
    if (p->handle)
        libxsmm_dnn_destroy_fusedbatchnorm(p->handle);
    free(p->scratch);
    free(p);
}

// NULL where libxsmm refuses.
plan *make_plan(int step, int relu, int add, const int *nchw, int threads)
{
    libxsmm_dnn_fusedbatchnorm_desc desc = {
        .partN = nchw[0],
        .fullN = nchw[0],
        .C = nchw[1],
        .H = nchw[2],
        .W = nchw[3],
        .u = 1,
        .v = 1,
        .threads = threads,
        .datatype_in = LIBXSMM_DNN_DATATYPE_F32,
        .datatype_out = LIBXSMM_DNN_DATATYPE_F32,
        .datatype_stats = LIBXSMM_DNN_DATATYPE_F32,
        .buffer_format = LIBXSMM_DNN_TENSOR_FORMAT_LIBXSMM,
        .fuse_order = LIBXSMM_DNN_FUSEDBN_ORDER_BN_ELTWISE_RELU,
        .fuse_ops =
            (step == INFERENCE ? LIBXSMM_DNN_FUSEDBN_OPS_BNSCALE : LIBXSMM_DNN_FUSEDBN_OPS_BN) |
            (relu ? LIBXSMM_DNN_FUSEDBN_OPS_RELU : 0) | (add ? LIBXSMM_DNN_FUSEDBN_OPS_ELTWISE : 0),
    };
    libxsmm_dnn_err_t failed = 0;
    plan *p = calloc(1, sizeof *p);
    p->threads = threads;
    p->kind = step == BACKWARD ? LIBXSMM_DNN_COMPUTE_KIND_BWD : LIBXSMM_DNN_COMPUTE_KIND_FWD;
    p->handle = libxsmm_dnn_create_fusedbatchnorm(desc, &failed);
    if (!failed) {
        size_t size = libxsmm_dnn_fusedbatchnorm_get_scratch_size(p->handle, &failed);
        p->scratch = aligned_alloc(64, (size + 63) / 64 * 64);
    }
    if (!failed && !libxsmm_dnn_fusedbatchnorm_bind_scratch(p->handle, p->scratch))
        return p;
    destroy_plan(p);
    return NULL;
}

static libxsmm_dnn_tensor_datalayout *layout_of(const plan *p, libxsmm_dnn_tensor_type type)
{
    libxsmm_dnn_err_t failed = 0;
    return libxsmm_dnn_fusedbatchnorm_create_tensor_datalayout(p->handle, type, &failed);
}

// How many channels lie side by side in its layout: b of nChw<b>c.
int block(const plan *p)
{
    libxsmm_dnn_tensor_datalayout *layout = layout_of(p, LIBXSMM_DNN_REGULAR_INPUT);
    int found = layout ? (int)layout->dim_size[0] : 0;
    if (layout)
        libxsmm_dnn_destroy_tensor_datalayout(layout);
    return found;
}

int bind_arrays(plan *p, const arrays *a)
{
    libxsmm_dnn_err_t failed = 0;
    for (int i = 0; i < ARRAYS && !failed; i++) {
        void *data = ((void *const *)a)[i];
        if (!data)
            continue;
        libxsmm_dnn_tensor_datalayout *layout = layout_of(p, TYPES[i]);
        p->tensors[i] = libxsmm_dnn_link_tensor(layout, data, &failed);
        libxsmm_dnn_destroy_tensor_datalayout(layout);
        if (!failed)
            failed = libxsmm_dnn_fusedbatchnorm_bind_tensor(p->handle, p->tensors[i], TYPES[i]);
    }
    return failed != 0;
}

// libxsmm's own barriers wait for all of a plan's threads, so with fewer it must not begin.
int run_plan(const plan *p)
{
    int failed = 0;
#pragma omp parallel num_threads(p->threads) reduction(| : failed)
    failed = omp_get_num_threads() != p->threads ||
             libxsmm_dnn_fusedbatchnorm_execute_st(p->handle, p->kind, 0, omp_get_thread_num());
    return failed;
}
