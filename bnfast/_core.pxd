# The C contract (src/bnfast.h) as Cython sees it.

cdef extern from "bnfast.h" nogil:
    ctypedef enum bnf_type:
        BNF_F32, BNF_F64, BNF_F16, BNF_BF16, BNF_TYPES

    ctypedef enum bnf_layout:
        BNF_PLANAR, BNF_INTERLEAVED, BNF_LAYOUTS

    ctypedef enum bnf_activation:
        BNF_LINEAR, BNF_RELU, BNF_RELU6, BNF_LEAKY_RELU, BNF_ACTIVATIONS

    ctypedef enum bnf_mask:
        BNF_UNMASKED, BNF_FROM_X, BNF_FROM_X_RESIDUAL, BNF_FROM_Y

    ctypedef struct bnf_shape:
        Py_ssize_t outer, channels, inner

    ctypedef struct bnf_tile:
        Py_ssize_t outer0, outer1, channel0, channel1, inner0, inner1

    ctypedef struct bnf_forward:
        bnf_shape shape
        const void *x
        const void *residual
        void *y
        const double *mean
        const double *scale
        const double *shift
        bnf_activation activation
        double slope
        bint stream

    ctypedef struct bnf_backward:
        bnf_shape shape
        const void *dy
        const void *x
        const void *residual
        const void *y
        void *dx
        void *dresidual
        const double *mean
        const double *scale
        const double *shift
        const double *dy_factor
        const double *x_factor
        const double *constant
        bnf_activation activation
        double slope
        bnf_mask mask
        bint through_moments
        bint stream

    ctypedef struct bnf_kernels:
        void (*moments)(const void *, bnf_shape, bnf_tile, double *, double *) noexcept nogil
        void (*apply)(const bnf_forward *, bnf_tile) noexcept nogil
        void (*grad_sums)(const bnf_backward *, bnf_tile, double *, double *) noexcept nogil
        void (*grad_input)(const bnf_backward *, bnf_tile) noexcept nogil

    ctypedef struct bnf_table:
        const char *name
        const bnf_kernels **kernels

    int bnf_isa_count()
    const bnf_table *bnf_isa_table(int index)
    const char *bnf_isa_name(int index)

    ctypedef struct bnf_caches:
        Py_ssize_t l1d, l2, l3
        bint measured

    bnf_caches bnf_read_caches()

    ctypedef struct bnf_blocks:
        Py_ssize_t count, outers, segments, length

    ctypedef struct bnf_plan:
        bnf_layout layout
        bnf_blocks blocks, spread
        Py_ssize_t group, groups, width, widths
        bint fused, stream
        int threads

    int bnf_useful_threads(Py_ssize_t bytes)
    bnf_plan bnf_make_plan(bnf_shape shape, Py_ssize_t itemsize, bint gathers, int reads,
                           int writes, bnf_caches caches, int max_threads)
    bnf_tile bnf_block_tile(bnf_shape shape, bnf_blocks blocks, Py_ssize_t block,
                            Py_ssize_t channel0, Py_ssize_t channels)


cdef extern from "moments.h" nogil:
    double bnf_variance(double m2, double count, double ddof)
    void bnf_merge_blocks(bnf_shape shape, bnf_blocks blocks, Py_ssize_t c0, Py_ssize_t c1,
                          double *mean, double *m2)
    void bnf_add_blocks(bnf_shape shape, bnf_blocks blocks, Py_ssize_t c0, Py_ssize_t c1,
                        double *total)
    void bnf_close_forward(double count, double eps, Py_ssize_t c0, Py_ssize_t c1,
                           const double *m2, const double *weight, double *var, double *inv_std,
                           double *scale)
    void bnf_close_sums(Py_ssize_t c0, Py_ssize_t c1, const double *inv_std, const double *dot,
                        double *dweight)
    void bnf_close_backward(const double *scale, double count, Py_ssize_t c0, Py_ssize_t c1,
                            const double *inv_std, const double *dbias, const double *dweight,
                            double *dy_factor, double *x_factor, double *constant)


cdef extern from "pages.h" nogil:
    const size_t BNF_PAGES_LEAST
    void *bnf_pages_acquire(size_t bytes)
    void *bnf_pages_resize(void *data, size_t bytes)
    void bnf_pages_release(void *data)
    void bnf_pages_set_bound(size_t bytes)
    size_t bnf_pages_bound()
    size_t bnf_pages_held()
    size_t bnf_pages_trim(size_t at_most)
