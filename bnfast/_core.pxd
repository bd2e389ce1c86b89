# The C contract (src/bnfast.h) as Cython sees it.

cdef extern from "bnfast.h" nogil:
    ctypedef enum bnf_type:
        BNF_F32, BNF_F64, BNF_F16, BNF_BF16   # those that NumPy knows by a number
        BNF_TYPES

    ctypedef enum bnf_layout:
        BNF_PLANAR, BNF_INTERLEAVED, BNF_LAYOUTS

    ctypedef enum bnf_activation:
        BNF_LINEAR, BNF_ACTIVATIONS

    const char *bnf_type_name(bnf_type type)
    Py_ssize_t bnf_type_size(bnf_type type)
    const char *bnf_activation_name(bnf_activation activation)
    bint bnf_is_from_output(bnf_activation activation)
    double bnf_default_slope(bnf_activation activation)

    ctypedef struct bnf_shape:
        Py_ssize_t outer, channels, inner

    ctypedef struct bnf_tile:
        Py_ssize_t outer0, outer1, channel0, channel1, inner0, inner1

    ctypedef struct bnf_table:
        const char *name

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
        bnf_blocks blocks, write_blocks
        Py_ssize_t group, groups, width, widths
        bint fused, stream
        int threads

    int bnf_useful_threads(Py_ssize_t bytes)
    bnf_plan bnf_make_plan(bnf_shape shape, Py_ssize_t itemsize, bint gathers, int reads,
                           int writes, bnf_caches caches, int max_threads)
    Py_ssize_t bnf_chains_in_turn(bnf_shape shape, bnf_plan plan)
    bnf_tile bnf_block_tile(bnf_shape shape, bnf_blocks blocks, Py_ssize_t block,
                            Py_ssize_t channel0, Py_ssize_t channels)


cdef extern from "driver.h" nogil:
    ctypedef enum bnf_direction:
        BNF_MOMENTS, BNF_FORWARD, BNF_BACKWARD, BNF_INFERENCE, BNF_DIRECTIONS

    const Py_ssize_t BNF_SMALL_BYTES

    ctypedef struct bnf_call:
        bnf_direction direction
        bnf_type type
        bnf_shape shape
        bnf_activation activation
        double slope, eps, count
        bint has_moments, has_var, has_sums, gathers
        const void *x
        const void *residual
        const void *weights
        const void *dy
        const void *output
        void *y
        void *dx
        void *dresidual
        double *mean
        double *m2
        double *var
        double *inv_std
        double *weight
        double *scale
        double *shift
        double *dweight
        double *dbias
        Py_ssize_t bytes

    void bnf_call_plan(bnf_call *call, int threads)
    bint bnf_call_reserve(bnf_call *call)
    void bnf_call_run(bnf_call *call)
    void bnf_call_release(bnf_call *call)
    double bnf_call_weight(const bnf_call *call)
    void bnf_calls_run(bnf_call *calls, Py_ssize_t count, int threads)
    void bnf_add_gradients(bnf_call *calls, Py_ssize_t count)

    ctypedef struct bnf_running:
        void *mean
        void *var
        bint wide_mean, wide_var

    void bnf_move_running(bnf_call *call, bnf_running running, double momentum, double ddof)
    void bnf_move_averages(double *running, const double *batch, double momentum,
                           Py_ssize_t channels)
    void bnf_invert_std(double *var, double eps, Py_ssize_t channels)
    bint bnf_is_countable(Py_ssize_t channels, Py_ssize_t blocks)
    void bnf_use_isa(int index)
    int bnf_isa_in_use()
    void bnf_use_caches(bnf_caches caches)
    bnf_caches bnf_caches_in_use()

    ctypedef struct bnf_dispatch_key:
        bnf_direction direction
        bnf_type type
        bnf_layout layout
        int isa
        bnf_activation activation
        bint residual

    long long bnf_dispatches(bnf_dispatch_key kind)
    void bnf_forget_dispatches()

    ctypedef struct bnf_driver:
        pass
    const bnf_driver bnf_driver_table


cdef extern from "threads.h" nogil:
    void bnf_threads_setup()
    bint bnf_threads_started()
    bint bnf_threads_lost()
    int bnf_threads_lowered()
    int bnf_openmp_version()
    const char *bnf_threads_name()
    void bnf_at_work(int *calls, int *threads)


cdef extern from "shared.h" nogil:
    ctypedef struct bnf_shared_int:
        pass

    int bnf_shared_get(bnf_shared_int *number)
    void bnf_shared_set(bnf_shared_int *number, int value)


cdef extern from "pages.h" nogil:
    const size_t BNF_PAGES_LEAST
    void *bnf_pages_acquire(size_t bytes)
    void *bnf_pages_resize(void *data, size_t bytes)
    void bnf_pages_release(void *data)
    void bnf_pages_set_bound(size_t bytes)
    size_t bnf_pages_bound()
    size_t bnf_pages_held()
    size_t bnf_pages_trim(size_t at_most)
    size_t bnf_physical_memory()
