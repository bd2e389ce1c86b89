# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=False
"""The one file that knows both Python and C.

An entry point recognises the common case (C-contiguous arrays of our own types
and the right shapes) in compiled code, takes pointers, plans tiles and runs
them; whatever is less common goes to `_arrays`, which converts it or says what
is wrong with it, and comes back here.  C knows elements, this file knows
threads: every parallel loop of bnfast is in `run_in_threads`.
"""
cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport prange
from libc.math cimport isfinite, sqrt
from libc.stdint cimport SIZE_MAX, int64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strcpy

import os
from itertools import product

import numpy as np

from . import _arrays, _memory, _threads

cnp.import_array()

cdef extern from *:
    """
    #ifndef _OPENMP
    #error "bnfast needs a compiler with OpenMP (gcc, or clang with libomp)"
    #endif
    #define BNF_OPENMP _OPENMP
    #ifdef __clang__
    #define BNF_COMPILER __VERSION__
    #else
    #define BNF_COMPILER "gcc " __VERSION__
    #endif
    """
    const int BNF_OPENMP
    const char *BNF_COMPILER

cdef extern from "omp.h":
    int omp_get_max_threads() noexcept nogil

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef extern from "numpy/arrayobject.h":
    PyObject *PyDataMem_DefaultHandler
    const int NPY_HALF, NPY_USERDEF   # which NumPy's own declarations leave out

cdef extern from "numpy/numpyconfig.h":
    const char *NPY_FEATURE_VERSION_STRING   # the oldest NumPy this build runs with

cdef enum:
    # A call on fewer bytes is over before another thread could have taken the GIL.
    KEEP_GIL_BYTES = 65536
    MOST_ISAS = 8


# --- The instruction set in use, and the counts of what it did -------------------------

cdef const bnf_table *active = NULL
cdef int active_index = 0
cdef bnf_caches caches = bnf_read_caches()
cdef bint threads_started = False

cdef enum Direction:
    MOMENTS, FORWARD, BACKWARD, INFERENCE, DIRECTIONS

DIRECTION_NAMES = ("moments", "forward", "backward", "inference")
TYPE_NAMES = ("float32", "float64", "float16", "bfloat16")   # as in bnf_type
LAYOUT_NAMES = ("planar", "interleaved")
VARIANT_NAMES = ("plain", "relu", "relu6", "leaky_relu")
RESIDUAL_NAMES = ("", "+residual")

# By direction, type, layout, instruction set, activation and whether a residual took part.
cdef long long counts[4][4][2][MOST_ISAS][4][2]


def dispatches():
    """How often each kernel set ran: {(direction, dtype, layout, isa, variant): count}."""
    built = [bnf_isa_name(i).decode() for i in range(bnf_isa_count())]
    names = (DIRECTION_NAMES, TYPE_NAMES, LAYOUT_NAMES, built, VARIANT_NAMES,
             RESIDUAL_NAMES)
    found = {}
    for d, t, y, i, a, r in product(*(range(len(axis)) for axis in names)):
        times = counts[<int>d][<int>t][<int>y][<int>i][<int>a][<int>r]
        if times:
            variant = VARIANT_NAMES[a] + RESIDUAL_NAMES[r]
            found[DIRECTION_NAMES[d], TYPE_NAMES[t], LAYOUT_NAMES[y], built[i],
                  variant.removeprefix("plain+")] = times
    return found


def reset_dispatches():
    """Count from zero again."""
    memset(counts, 0, sizeof(counts))


def isas():
    """Names of the instruction sets that can run here, best last."""
    return tuple(bnf_isa_name(i).decode() for i in range(bnf_isa_count())
                 if bnf_isa_table(i) != NULL)


def isa():
    """Name of the instruction set in use."""
    return active.name.decode()


def set_isa(str name):
    """Use another instruction set from here on, in the whole process: for tests."""
    global active, active_index
    for i in range(bnf_isa_count()):
        if bnf_isa_table(i) != NULL and bnf_isa_name(i).decode() == name:
            active = bnf_isa_table(i)
            active_index = i
            return
    raise ValueError(f"instruction set is {name!r}; expected one of {', '.join(isas())}")


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Plan for caches of other sizes from here on, in the whole process: for tests."""
    caches.l2, caches.l3 = l2, l3


cdef choose_isa():
    pinned = os.environ.get("BNFAST_ISA", "")
    if pinned and pinned not in isas():
        raise ImportError(f"BNFAST_ISA is {pinned!r}; this processor and build have "
                          f"{', '.join(isas())}")
    set_isa(pinned or max(isas(), key=isas().index))


choose_isa()


def config():
    """What was built and what was found, for `show_config`."""
    return {
        "isas_built": tuple(bnf_isa_name(i).decode() for i in range(bnf_isa_count())),
        "isas_runnable": isas(),
        "isa": isa(),
        "openmp": BNF_OPENMP,
        "compiler": BNF_COMPILER.decode(),
        "caches": {"l1d": caches.l1d, "l2": caches.l2, "l3": caches.l3,
                   "source": "read from the system" if caches.measured else "assumed"},
        "numpy_abi": NPY_FEATURE_VERSION_STRING.decode(),
    }


cdef int openmp_default = omp_get_max_threads()


def openmp_limit():
    """What somebody lowered the OpenMP runtime's number of threads to, as threadpoolctl does;
    0 if nobody did.  Our teams name their number and would not notice."""
    cdef int number = omp_get_max_threads()
    return number if number < openmp_default else 0


_threads.openmp_limit = openmp_limit


def pool_started():
    """Whether a parallel region has run in this process: its threads do not survive a fork."""
    return threads_started


# --- One call: gather, settle, spread ---------------------------------------------------

cdef struct Activation:
    bnf_activation code
    double slope


# Sums go into slots, (blocks, channels) arrays; `settle` turns a group's slots into what
# `spread` multiplies with.  A missing step is NULL: moments() spreads nothing, inference
# gathers nothing.
cdef struct Work:
    bnf_shape shape
    bnf_plan plan
    int most_threads        # that this call was granted, were it alone
    const bnf_kernels *kernels
    long long *counter      # of dispatches like this one
    Py_ssize_t bytes
    double count, eps
    double *memory          # of all the arrays below, one value per channel but for the slots
    double *mean
    double *weight
    double *shift
    double *scale
    double *var
    double *inv_std
    double *dweight
    double *dy_factor
    double *x_factor
    double *constant
    double *ones
    double *slot_a          # means, or sums of g; the whole batch's in row 0 once settled
    double *slot_b          # M2s, or sums of g * (x - mean)
    bnf_forward forward
    bnf_backward backward
    void (*gather)(Work *, bnf_tile, Py_ssize_t) noexcept nogil
    void (*settle)(Work *, Py_ssize_t, Py_ssize_t) noexcept nogil
    void (*spread)(Work *, bnf_tile) noexcept nogil


cdef int check_countable(Py_ssize_t channels, Py_ssize_t blocks) except -1:
    """Raise MemoryError for more numbers than can be counted in bytes: an empty array may have
    that many channels."""
    if channels > PY_SSIZE_T_MAX // <Py_ssize_t>sizeof(double) // (12 + 2 * blocks):
        raise MemoryError
    return 0


cdef int reserve(Work *w, Py_ssize_t channels, Py_ssize_t blocks) except -1:
    """Take zeroed memory for all of a call's per-channel numbers, or raise MemoryError."""
    cdef double **vectors[11]
    cdef Py_ssize_t i
    vectors[:] = [&w.mean, &w.weight, &w.shift, &w.scale, &w.var, &w.inv_std, &w.dweight,
                  &w.dy_factor, &w.x_factor, &w.constant, &w.ones]
    check_countable(channels, blocks)
    w.memory = <double *>calloc((11 + 2 * blocks) * channels + 1, sizeof(double))
    if w.memory == NULL:
        raise MemoryError
    for i in range(11):
        vectors[i][0] = w.memory + i * channels
    w.slot_a = w.memory + 11 * channels
    w.slot_b = w.slot_a + blocks * channels
    return 0


cdef void gather_moments(Work *w, bnf_tile tile, Py_ssize_t block) noexcept nogil:
    cdef Py_ssize_t row = block * w.shape.channels
    w.kernels.moments(w.forward.x, w.shape, tile, w.slot_a + row, w.slot_b + row)


cdef void merge_moments(Work *w, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    bnf_merge_blocks(w.shape, w.plan.blocks, c0, c1, w.slot_a, w.slot_b)


cdef void settle_forward(Work *w, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    merge_moments(w, c0, c1)
    bnf_close_forward(w.count, w.eps, c0, c1, w.slot_b, w.weight, w.var, w.inv_std, w.scale)


cdef void spread_forward(Work *w, bnf_tile tile) noexcept nogil:
    w.kernels.apply(&w.forward, tile)


cdef void gather_gradients(Work *w, bnf_tile tile, Py_ssize_t block) noexcept nogil:
    cdef Py_ssize_t row = block * w.shape.channels
    w.kernels.grad_sums(&w.backward, tile, w.slot_a + row, w.slot_b + row)


cdef void settle_backward(Work *w, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    bnf_add_blocks(w.shape, w.plan.blocks, c0, c1, w.slot_a)
    bnf_add_blocks(w.shape, w.plan.blocks, c0, c1, w.slot_b)
    bnf_close_sums(c0, c1, w.inv_std, w.slot_b, w.dweight)
    bnf_close_backward(w.scale, w.count, c0, c1, w.inv_std, w.slot_a, w.dweight, w.dy_factor,
                       w.x_factor, w.constant)


cdef void spread_backward(Work *w, bnf_tile tile) noexcept nogil:
    w.kernels.grad_input(&w.backward, tile)


cdef void gather_tile(Work *w, Py_ssize_t block, Py_ssize_t group) noexcept nogil:
    w.gather(w, bnf_block_tile(w.shape, w.plan.blocks, block, group * w.plan.group,
                               w.plan.group), block)


cdef void settle_group(Work *w, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t c0 = group * w.plan.group
    w.settle(w, c0, min(c0 + w.plan.group, w.shape.channels))


cdef void spread_tile(Work *w, Py_ssize_t block, Py_ssize_t width) noexcept nogil:
    w.spread(w, bnf_block_tile(w.shape, w.plan.spread, block, width * w.plan.width,
                               w.plan.width))


cdef void run_group(Work *w, Py_ssize_t group) noexcept nogil:
    """All steps of one group of channels, while the caches hold it."""
    cdef Py_ssize_t block
    for block in range(w.plan.blocks.count):
        gather_tile(w, block, group)
    settle_group(w, group)
    spread_tile(w, 0, group)


cdef void run_here(Work *w) noexcept nogil:
    """All steps over all tiles, one after the other."""
    cdef Py_ssize_t i, groups = w.plan.groups, widths = w.plan.widths
    if w.plan.fused:
        for i in range(groups):
            run_group(w, i)
        return
    if w.gather != NULL:   # a block's tiles side by side, as they lie in memory
        for i in range(w.plan.blocks.count * groups):
            gather_tile(w, i // groups, i % groups)
        for i in range(groups):
            settle_group(w, i)
    if w.spread != NULL:
        for i in range(w.plan.spread.count * widths):
            spread_tile(w, i // widths, i % widths)


cdef void run_in_threads(Work *w, int threads) noexcept:
    """The same.  Which thread takes a tile may vary; what it computes may not.

    The loops stand in a block that is known to have had the GIL.  In a nogil function Cython asks
    whether there is one to release, and before Python 3.12 the answer is wrong as soon as the
    process has made another interpreter: it would end there.
    """
    global threads_started
    cdef Py_ssize_t i, groups = w.plan.groups, widths = w.plan.widths
    cdef Py_ssize_t blocks = w.plan.blocks.count
    threads_started = True
    with nogil:
        if w.plan.fused:
            for i in prange(groups, schedule="dynamic", num_threads=threads):
                run_group(w, i)
        else:
            if w.gather != NULL:
                for i in prange(blocks * groups, schedule="static", num_threads=threads):
                    gather_tile(w, i // groups, i % groups)
                for i in range(groups):
                    settle_group(w, i)
            if w.spread != NULL:
                for i in prange(w.plan.spread.count * widths, schedule="static",
                                num_threads=threads):
                    spread_tile(w, i // widths, i % widths)


# The calls that are at work without the GIL, and the threads they have between them.  Whoever
# changes these holds the GIL.
cdef int calls_at_work = 0
cdef int threads_at_work = 0


def at_work():
    """How many calls are running without the GIL, and in how many threads: for tests."""
    return calls_at_work, threads_at_work


def forget_calls():
    """In a forked child: the calls that other threads of the parent were in are not here."""
    global calls_at_work, threads_at_work
    calls_at_work = threads_at_work = 0


cdef int share_of(int most) noexcept:
    """How many of so many threads a call may take beside the calls that are at work.

    Each Python thread has a pool of OpenMP's to itself, so that a pool of them would start the
    square of what the machine has.  A call takes an even share, and no more than is left: that is
    one where an outer pool is as large as the machine, and all where a call is alone.
    """
    return max(1, min(most // (calls_at_work + 1), most - threads_at_work))


cdef run_work(Work *w):
    global calls_at_work, threads_at_work
    cdef int threads
    w.counter[0] += 1
    if w.bytes < KEEP_GIL_BYTES:
        run_here(w)
        return
    threads = min(w.plan.threads, share_of(w.most_threads))   # others may have begun since
    calls_at_work += 1
    threads_at_work += threads
    if threads > 1:
        run_in_threads(w, threads)
    else:
        with nogil:
            run_here(w)
    calls_at_work -= 1
    threads_at_work -= threads


cdef int plan_work(Work *w, cnp.ndarray x, bnf_shape shape, bint gathers, int reads, int writes,
                   Direction direction, Activation act, bint residual) except -1:
    """Choose kernels and tiles; takes no memory and writes nothing."""
    cdef int kind = type_of(x)
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    w.shape = shape
    w.count = <double>(shape.outer * shape.inner)
    w.bytes = cnp.PyArray_SIZE(x) * itemsize * (reads + writes)
    w.most_threads = _threads.limit() if bnf_useful_threads(w.bytes) > 1 else 1
    w.plan = bnf_make_plan(shape, itemsize, gathers, reads, writes, caches,
                           share_of(w.most_threads))
    w.kernels = &active.kernels[kind][<int>w.plan.layout]
    w.counter = &counts[<int>direction][kind][<int>w.plan.layout][active_index][<int>act.code][
        residual]
    return 0


# --- Fresh outputs -----------------------------------------------------------------------
# A large one owns pages of pages.c through a data-memory handler of NumPy's, so it is an array
# like any other: it may be resized, seen by tracemalloc, freed anywhere and after everything.

cdef void *data_malloc(void *context, size_t size) noexcept nogil:
    return bnf_pages_acquire(size)


cdef void *data_calloc(void *context, size_t count, size_t size) noexcept nogil:
    cdef void *data = NULL
    if size == 0 or count <= SIZE_MAX // size:
        data = bnf_pages_acquire(count * size)
    if data != NULL:
        memset(data, 0, count * size)
    return data


cdef void *data_realloc(void *context, void *data, size_t size) noexcept nogil:
    return bnf_pages_acquire(size) if data == NULL else bnf_pages_resize(data, size)


cdef void data_free(void *context, void *data, size_t size) noexcept nogil:
    if data != NULL:
        bnf_pages_release(data)


cdef cnp.PyDataMem_Handler pages
cdef object pages_handler = None
strcpy(pages.name, "bnfast_pages")
pages.version = 1
pages.allocator.malloc = data_malloc
pages.allocator.calloc = data_calloc
pages.allocator.realloc = data_realloc
pages.allocator.free = data_free


cdef object handler_of_pages():
    """The handler as NumPy takes it, with the pool's bound set before its first use."""
    global pages_handler
    if pages_handler is None:
        bnf_pages_set_bound(_memory.bound()[0])
        pages_handler = PyCapsule_New(&pages, "mem_handler", NULL)
    return pages_handler


cdef inline cnp.ndarray empty_like(cnp.ndarray x):
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)


cdef cnp.ndarray new_like(cnp.ndarray x):
    """An output of x's shape and type, with whatever is in its memory."""
    if cnp.PyArray_NBYTES(x) < BNF_PAGES_LEAST:
        return empty_like(x)
    current = cnp.PyDataMem_GetHandler()
    if <PyObject *>current != PyDataMem_DefaultHandler:   # the caller has plans of their own
        return empty_like(x)
    cnp.PyDataMem_SetHandler(handler_of_pages())
    try:
        return empty_like(x)
    finally:
        cnp.PyDataMem_SetHandler(current)


def release_memory():
    """Give back the memory that is kept for coming results.

    Outputs of 128 KiB and more, once freed, leave their memory to later ones, since new pages
    cost more than a batch norm. What waits is never more than 1/16 of the memory this process may
    use (the machine's or its cgroup's), and 1 GiB; `BNFAST_CACHE_BYTES` in the environment sets
    another bound, 0 to keep nothing. Arrays in use are not touched.

    Returns
    -------
    int
        Bytes given back to the system.

    Examples
    --------
    >>> import bnfast
    >>> freed = bnfast.release_memory()
    >>> bnfast.release_memory()
    0
    """
    return bnf_pages_trim(0)


def kept_memory():
    """Bytes that wait for coming results, and the most that may."""
    handler_of_pages()
    return bnf_pages_held(), bnf_pages_bound()


# --- Recognising the common case ---------------------------------------------------------

# The number that NumPy gave bfloat16 when ml_dtypes registered it, once an array of it was seen.
cdef int bfloat16_number = -1


cdef int user_type_of(cnp.ndarray x) noexcept:
    """type_of, of an array whose type came to NumPy from elsewhere."""
    global bfloat16_number
    cdef int number = cnp.PyArray_TYPE(x)
    if bfloat16_number < 0 and _arrays.is_bfloat16(x.dtype):
        bfloat16_number = number
    return BNF_BF16 if number == bfloat16_number else BNF_TYPES


cdef inline int type_of(cnp.ndarray x) noexcept:
    """Which bnf_type x has; BNF_TYPES if none."""
    cdef int number = cnp.PyArray_TYPE(x)
    if number == cnp.NPY_FLOAT:
        return BNF_F32
    if number == cnp.NPY_DOUBLE:
        return BNF_F64
    if number == NPY_HALF:
        return BNF_F16
    return user_type_of(x) if number >= NPY_USERDEF else BNF_TYPES


cdef inline bint is_dense(object x) noexcept:
    """A C-contiguous, aligned array in this machine's byte order, and no subclass."""
    return cnp.PyArray_CheckExact(x) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)


cdef inline bint is_plain(object x) noexcept:
    """A dense array of a type that data may have."""
    return is_dense(x) and type_of(<cnp.ndarray>x) != BNF_TYPES


cdef inline bint is_vector(object x) noexcept:
    """A dense array of a type that per-channel numbers are read in as they are."""
    return is_dense(x) and cnp.PyArray_TYPE(<cnp.ndarray>x) in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE)


cdef inline bint is_like(object a, cnp.ndarray x) noexcept:
    return (is_plain(a) and cnp.PyArray_TYPE(<cnp.ndarray>a) == cnp.PyArray_TYPE(x)
            and cnp.PyArray_SAMESHAPE(<cnp.ndarray>a, x))


cdef inline bint is_target(object out, cnp.ndarray x) noexcept:
    return is_like(out, x) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)


cdef inline bint overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Of two contiguous arrays, whether any byte is in both."""
    cdef uintptr_t p = <uintptr_t>cnp.PyArray_DATA(a), q = <uintptr_t>cnp.PyArray_DATA(b)
    return (p < q + <uintptr_t>cnp.PyArray_NBYTES(b)
            and q < p + <uintptr_t>cnp.PyArray_NBYTES(a))


cdef inline bint apart(cnp.ndarray out, object other) noexcept:
    """Whether writing out leaves the plain array other readable: nothing shared, or all of it."""
    return (other is None or cnp.PyArray_DATA(out) == cnp.PyArray_DATA(<cnp.ndarray>other)
            or not overlap(out, <cnp.ndarray>other))


cdef inline bint touches(cnp.ndarray a, cnp.ndarray x, object residual, object out) noexcept:
    return (overlap(a, x) or (residual is not None and overlap(a, <cnp.ndarray>residual))
            or (out is not None and overlap(a, <cnp.ndarray>out)))


cdef inline bint may_touch(cnp.ndarray a, object value) noexcept:
    """Whether a parameter needs a closer look before a is updated."""
    return value is not None and (not is_dense(value) or overlap(a, <cnp.ndarray>value))


cdef bint see(object x, object axis, bnf_shape *shape) noexcept:
    """Fill shape and say yes if x and axis are the common case."""
    cdef cnp.ndarray array
    cdef int rank, i, channel_axis
    cdef Py_ssize_t wanted
    if not is_plain(x) or type(axis) is not int:
        return False
    array = <cnp.ndarray>x
    rank = cnp.PyArray_NDIM(array)
    try:
        wanted = axis
    except OverflowError:
        return False
    if rank < 2 or not -rank <= wanted < rank:
        return False
    channel_axis = <int>(wanted if wanted >= 0 else wanted + rank)
    shape.outer = shape.inner = 1
    for i in range(channel_axis):
        shape.outer *= cnp.PyArray_DIM(array, i)
    for i in range(channel_axis + 1, rank):
        shape.inner *= cnp.PyArray_DIM(array, i)
    shape.channels = cnp.PyArray_DIM(array, channel_axis)
    if shape.channels == 1:   # one run of values, and lanes for all of them
        shape.inner *= shape.outer
        shape.outer = 1
    return True


cdef cnp.ndarray new_vector(Py_ssize_t n):
    cdef cnp.npy_intp size = n
    return cnp.PyArray_EMPTY(1, &size, cnp.NPY_DOUBLE, 0)


def over_memory(uintptr_t address, shape, int type_number):
    """A C-contiguous array over memory that is not NumPy's, whose owner keeps it for as long as
    the array is used.

    For PyTorch's tensors: their own way to an array costs more than a small batch norm, and
    takes from their storage for good that it can be resized.
    """
    cdef cnp.npy_intp sizes[16]
    cdef int i, rank = <int>len(shape)
    if rank > 16:
        raise ValueError(f"shape has {rank} axes; expected 16 at most")
    for i in range(rank):
        sizes[i] = shape[i]
    return cnp.PyArray_SimpleNewFromData(rank, sizes, type_number, <void *>address)


cdef inline double *numbers(object vector) noexcept:
    return <double *>cnp.PyArray_DATA(<cnp.ndarray>vector)


cdef void copy_numbers(object vector, const double *values) noexcept:
    memcpy(numbers(vector), values, cnp.PyArray_NBYTES(<cnp.ndarray>vector))


cdef cnp.ndarray vector_of(const double *values, Py_ssize_t n):
    cdef cnp.ndarray vector = new_vector(n)
    copy_numbers(vector, values)
    return vector


cdef inline bint is_parameter(object value, Py_ssize_t channels) noexcept:
    return (is_vector(value) and cnp.PyArray_NDIM(<cnp.ndarray>value) == 1
            and cnp.PyArray_DIM(<cnp.ndarray>value, 0) == channels)


cdef int read_parameter(str name, object value, Py_ssize_t channels, double missing,
                        double *to, object out) except -1:
    """Copy a per-channel parameter, or what stands for a missing one, as float64."""
    cdef Py_ssize_t i
    cdef const float *single
    cdef const double *twice
    if value is None:
        for i in range(channels):
            to[i] = missing
        return 0
    if not is_parameter(value, channels):
        value = _arrays.parameter(name, value, channels, out)
    elif out is not None and overlap(<cnp.ndarray>value, <cnp.ndarray>out):
        _arrays.refuse_overlap(name)
    if cnp.PyArray_TYPE(<cnp.ndarray>value) == cnp.NPY_FLOAT:
        single = <const float *>cnp.PyArray_DATA(<cnp.ndarray>value)
        for i in range(channels):
            to[i] = single[i]
    else:
        twice = <const double *>cnp.PyArray_DATA(<cnp.ndarray>value)
        for i in range(channels):
            to[i] = twice[i]
    return 0


cdef inline bint is_running(object value, cnp.ndarray x) noexcept:
    """A dense array of a type that running statistics may have beside x."""
    return is_vector(value) and (cnp.PyArray_TYPE(<cnp.ndarray>value) == cnp.NPY_FLOAT
                                 or cnp.PyArray_TYPE(x) == cnp.NPY_DOUBLE)


cdef int check_running(str name, object value, cnp.ndarray x) except -1:
    if not is_running(value, x):
        _arrays.check_running_type(name, value, x.dtype)
    return 0


cdef cnp.ndarray running_statistic(str name, object value, cnp.ndarray x, Py_ssize_t channels):
    """The array to update: value itself, or a plain copy where value is not plain."""
    if (is_parameter(value, channels) and is_running(value, x)
            and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>value)):
        return <cnp.ndarray>value
    return _arrays.running_statistic(name, value, channels, x.dtype)


cdef void move_average(cnp.ndarray running, double momentum, const double *batch) noexcept:
    cdef Py_ssize_t i, n = cnp.PyArray_DIM(running, 0)
    cdef float *single = <float *>cnp.PyArray_DATA(running)
    cdef double *twice = <double *>cnp.PyArray_DATA(running)
    cdef bint is_single = cnp.PyArray_TYPE(running) == cnp.NPY_FLOAT
    for i in range(n):
        if is_single:
            single[i] = <float>((1 - momentum) * single[i] + momentum * batch[i])
        else:
            twice[i] = (1 - momentum) * twice[i] + momentum * batch[i]


cdef Activation read_activation(object activation) except *:
    cdef Activation read
    read.code, read.slope = BNF_LINEAR, 0.0
    if activation is not None:
        code, slope = _arrays.activation(activation)
        read.code = <bnf_activation><int>code
        read.slope = slope
    return read


cdef double read_eps(object eps, bint training) except? -1:
    if type(eps) is float and isfinite(<double>eps) and (<double>eps) > 0:
        return eps
    return _arrays.eps(eps, training)


cdef double read_momentum(object momentum) except? -1:
    if type(momentum) is float and isfinite(<double>momentum):
        return momentum
    return _arrays.real("momentum", momentum)


def plan(shape, itemsize, gathers, reads, writes, l2, l3, threads):
    """What tiling.c decides for a shape (outer, channels, inner) on a machine: for tests.

    A dict of its decisions, and of the tiles, (outer0, outer1, channel0, channel1, inner0,
    inner1), that are summed and that are written.
    """
    cdef bnf_shape planned
    cdef bnf_caches machine
    cdef bnf_plan found
    planned.outer, planned.channels, planned.inner = shape
    machine.l1d, machine.l2, machine.l3, machine.measured = 0, l2, l3, True
    found = bnf_make_plan(planned, itemsize, gathers, reads, writes, machine, threads)
    return {
        "layout": LAYOUT_NAMES[<int>found.layout],
        "threads": found.threads,
        "fused": bool(found.fused),
        "stream": bool(found.stream),
        "sums": [tile_of(planned, found.blocks, block, group * found.group, found.group)
                 for block in range(found.blocks.count) for group in range(found.groups)],
        "writes": [tile_of(planned, found.spread, block, group * found.width, found.width)
                   for block in range(found.spread.count) for group in range(found.widths)],
    }


cdef tuple tile_of(bnf_shape shape, bnf_blocks blocks, Py_ssize_t block, Py_ssize_t channel0,
                   Py_ssize_t channels):
    cdef bnf_tile tile = bnf_block_tile(shape, blocks, block, channel0, channels)
    return (tile.outer0, tile.outer1, tile.channel0, tile.channel1, tile.inner0, tile.inner1)


# --- Moments --------------------------------------------------------------------------------

def moments(x, axis):
    """One pass over x: (count, mean, M2), float64 per channel."""
    cdef Work w
    cdef bnf_shape shape
    cdef Activation none
    if not see(x, axis, &shape):
        seen = _arrays.Canonical(x, axis)
        if not see(seen.x, seen.axis, &shape):
            _arrays.refuse_uncommon()
        return moments(seen.x, seen.axis)
    if cnp.PyArray_SIZE(<cnp.ndarray>x) == 0:
        check_countable(shape.channels, 0)
        return 0, np.zeros(shape.channels), np.zeros(shape.channels)
    memset(&w, 0, sizeof(w))
    none.code, none.slope = BNF_LINEAR, 0.0
    plan_work(&w, <cnp.ndarray>x, shape, True, 1, 0, MOMENTS, none, False)
    reserve(&w, shape.channels, w.plan.blocks.count)
    try:
        w.forward.x = cnp.PyArray_DATA(<cnp.ndarray>x)
        w.gather, w.settle = gather_moments, merge_moments
        run_work(&w)
        return (shape.outer * shape.inner, vector_of(w.slot_a, shape.channels),
                vector_of(w.slot_b, shape.channels))
    finally:
        free(w.memory)


# --- Inference --------------------------------------------------------------------------------

cdef inline bint forward_is_common(object x, object axis, object residual, object out,
                                   bnf_shape *shape) noexcept:
    return (see(x, axis, shape) and (residual is None or is_like(residual, <cnp.ndarray>x))
            and (out is None or (is_target(out, <cnp.ndarray>x) and apart(<cnp.ndarray>out, x)
                                 and apart(<cnp.ndarray>out, residual))))


cdef object canonical_forward(object x, object axis, object residual, object out):
    """The tensors of a forward or an inference, in the form of the common case."""
    cdef bnf_shape shape
    seen = _arrays.Canonical(x, axis, residual=residual, out=out)
    if not forward_is_common(seen.x, seen.axis, seen.residual, seen.out, &shape):
        _arrays.refuse_uncommon()
    return seen


cdef void fill_forward(Work *w, cnp.ndarray x, object residual, cnp.ndarray y,
                       Activation act) noexcept:
    w.forward.shape = w.shape
    w.forward.x = cnp.PyArray_DATA(x)
    w.forward.y = cnp.PyArray_DATA(y)
    w.forward.residual = NULL if residual is None else cnp.PyArray_DATA(<cnp.ndarray>residual)
    w.forward.activation, w.forward.slope = act.code, act.slope
    w.forward.stream = w.plan.stream


cdef object apply_map(cnp.ndarray x, bnf_shape shape, const double *mean, const double *scale,
                      const double *shift, Activation act, object residual, object out):
    """act((x - mean) * scale + shift (+ residual)) of the common case, already checked."""
    cdef Work w
    cdef cnp.ndarray y = new_like(x) if out is None else <cnp.ndarray>out
    if cnp.PyArray_SIZE(x) == 0:
        return y
    memset(&w, 0, sizeof(w))
    plan_work(&w, x, shape, False, 1 + (residual is not None), 1, INFERENCE, act,
              residual is not None)
    fill_forward(&w, x, residual, y, act)
    w.forward.mean, w.forward.scale, w.forward.shift = mean, scale, shift
    w.spread = spread_forward
    run_work(&w)
    return y


def normalize(x, mean, var, weight, bias, eps, axis, residual, activation, out,
              names=("mean", "var", "weight", "bias"), running=False):
    """act((x - mean) / sqrt(var + eps) * weight + bias (+ residual)).

    With var None the scale is weight as it is.  With running, mean and var must be of the
    types that running statistics have.
    """
    cdef Work w
    cdef bnf_shape shape
    cdef Py_ssize_t c
    if not forward_is_common(x, axis, residual, out, &shape):
        seen = canonical_forward(x, axis, residual, out)
        _arrays.check_parameters_apart(
            out, **dict(zip(names, (mean, var, weight, bias), strict=True)))
        return seen.give(normalize(seen.x, mean, var, weight, bias, eps, seen.axis, seen.residual,
                                   activation, seen.out, names, running))
    cdef Activation act = read_activation(activation)
    cdef double epsilon = read_eps(eps, False)
    if running:
        check_running(names[0], mean, <cnp.ndarray>x)
        check_running(names[1], var, <cnp.ndarray>x)
    memset(&w, 0, sizeof(w))
    reserve(&w, shape.channels, 0)
    try:
        read_parameter(names[0], mean, shape.channels, 0.0, w.mean, out)
        read_parameter(names[1], var, shape.channels, 1.0, w.var, out)
        read_parameter(names[2], weight, shape.channels, 1.0, w.scale, out)
        read_parameter(names[3], bias, shape.channels, 0.0, w.shift, out)
        if var is not None:
            for c in range(shape.channels):
                w.scale[c] = w.scale[c] * (1 / sqrt(w.var[c] + epsilon))
        return apply_map(<cnp.ndarray>x, shape, w.mean, w.scale, w.shift, act, residual, out)
    finally:
        free(w.memory)


cdef class FixedMap:
    """act((x - mean) * scale + shift (+ residual)) with its numbers ready: the compiled half of
    `FrozenBatchNorm`."""

    cdef readonly object axis, activation
    cdef object means, scales, shifts   # never handed out: an array can be reshaped by its holder
    cdef Activation act

    def __init__(self, mean, scale, shift, axis, activation):
        if self.means is not None:
            raise RuntimeError("a frozen batch norm is immutable; make another one")
        self.act = read_activation(activation)
        self.axis, self.activation = axis, activation
        means = _arrays.constant("mean", mean)
        self.scales = _arrays.constant("scale", scale, len(means))
        self.shifts = _arrays.constant("shift", shift, len(means))
        self.means = means

    @property
    def mean(self):
        """What is subtracted, float64 per channel, read-only."""
        return self.view_of(self.means)

    @property
    def scale(self):
        """What is multiplied with, float64 per channel, read-only."""
        return self.view_of(self.scales)

    @property
    def shift(self):
        """What is added, float64 per channel, read-only."""
        return self.view_of(self.shifts)

    cdef object view_of(self, numbers):
        self.check_made()
        return numbers.view()

    cdef int check_made(self) except -1:
        if self.means is None:
            raise RuntimeError("this frozen batch norm was never initialised")
        return 0

    def __call__(self, x, residual=None, out=None):
        """Apply the map.

        Parameters
        ----------
        x : array_like
            Rank 2 or more, with as many channels on ``axis`` as the layer has.
        residual : array_like, optional
            Added before the activation; shape and dtype of `x`.
        out : ndarray, optional
            Where to write; `x` or `residual` itself, or apart from both.

        Returns
        -------
        ndarray
            `out`, or a fresh array in the memory order of `x`.
        """
        return self.apply(x, self.axis, residual, out)

    cdef object apply(self, object x, object axis, object residual, object out):
        cdef bnf_shape shape
        self.check_made()
        if not forward_is_common(x, axis, residual, out, &shape):
            seen = canonical_forward(x, axis, residual, out)
            _arrays.check_channels(seen.shape, axis, len(self.means))
            return seen.give(self.apply(seen.x, seen.axis, seen.residual, seen.out))
        if shape.channels != cnp.PyArray_DIM(<cnp.ndarray>self.means, 0):
            raise ValueError(_arrays.wrong_channels(x.shape, axis, len(self.means)))
        return apply_map(<cnp.ndarray>x, shape, numbers(self.means), numbers(self.scales),
                         numbers(self.shifts), self.act, residual, out)


# --- Training -----------------------------------------------------------------------------------

def forward(x, running_mean, running_var, weight, bias, momentum, eps, axis, ddof, residual,
            activation, out, counter=None, seen=None):
    """Normalise with the batch: (y, (count, mean, var, inv_std)).

    The running statistics and the counter of batches, if given, are moved last, when nothing is
    left that could be raised.  With seen, the arrays are its, and the result goes back through it.
    """
    cdef Work w
    cdef bnf_shape shape
    if not forward_is_common(x, axis, residual, out, &shape):
        seen = canonical_forward(x, axis, residual, out)
        _arrays.check_parameters_apart(out, weight=weight, bias=bias)
        if running_mean is not None or running_var is not None:
            _arrays.check_running_apart(running_mean, running_var, out, *seen.given.values())
        _arrays.check_enough_values(seen.shape, axis)
        return forward(seen.x, running_mean, running_var, weight, bias, momentum, eps, seen.axis,
                       ddof, seen.residual, activation, seen.out, counter, seen)
    cdef Activation act = read_activation(activation)
    cdef double moved = read_momentum(momentum), correction = _arrays.check_ddof(ddof)
    cdef cnp.ndarray array = <cnp.ndarray>x, y, means = None, vars = None
    cdef bint empty = cnp.PyArray_SIZE(array) == 0
    memset(&w, 0, sizeof(w))
    w.eps = read_eps(eps, True)
    if running_mean is not None or running_var is not None:
        means = running_statistic("running_mean", running_mean, array, shape.channels)
        vars = running_statistic("running_var", running_var, array, shape.channels)
        if (means is not running_mean or vars is not running_var or overlap(means, vars)
                or touches(means, array, residual, out) or touches(vars, array, residual, out)
                or may_touch(means, weight) or may_touch(vars, weight)
                or may_touch(means, bias) or may_touch(vars, bias)):
            _arrays.check_running_apart(running_mean, running_var, x, residual, out, weight, bias)
    if shape.outer * shape.inner == 1:
        _arrays.check_enough_values(x.shape, axis)
    if not empty:
        plan_work(&w, array, shape, True, 1 + (residual is not None), 1, FORWARD, act,
                  residual is not None)
    reserve(&w, shape.channels, w.plan.blocks.count)
    try:
        read_parameter("weight", weight, shape.channels, 1.0, w.weight, out)
        read_parameter("bias", bias, shape.channels, 0.0, w.shift, out)
        y = new_like(array) if out is None else <cnp.ndarray>out
        if empty:
            stats = (0, *(np.full(shape.channels, np.nan) for _ in range(3)))
        else:
            fill_forward(&w, array, residual, y, act)
            w.forward.mean, w.forward.scale, w.forward.shift = w.slot_a, w.scale, w.shift
            w.gather, w.settle, w.spread = gather_moments, settle_forward, spread_forward
            stats = (shape.outer * shape.inner, new_vector(shape.channels),
                     new_vector(shape.channels), new_vector(shape.channels))
            run_work(&w)
            copy_numbers(stats[1], w.slot_a)
            copy_numbers(stats[2], w.var)
            copy_numbers(stats[3], w.inv_std)
        plain_mean = means if means is running_mean else np.asarray(running_mean)
        plain_var = vars if vars is running_var else np.asarray(running_var)
        found = (y if seen is None else seen.give(y), stats)
        if means is not None and not empty:
            update_running(&w, means, vars, moved, correction)
            if means is not running_mean:
                plain_mean[...] = means
            if vars is not running_var:
                plain_var[...] = vars
        if counter is not None:
            count_batch(<cnp.ndarray>counter)
        return found
    finally:
        free(w.memory)


cdef void update_running(Work *w, cnp.ndarray means, cnp.ndarray vars, double momentum,
                         double ddof) noexcept:
    cdef Py_ssize_t c
    for c in range(w.shape.channels):
        w.var[c] = bnf_variance(w.slot_b[c], w.count, ddof)
    move_average(means, momentum, w.slot_a)
    move_average(vars, momentum, w.var)


cdef void count_batch(cnp.ndarray counter) noexcept:
    """One more, in an int64 that may lie at any address."""
    cdef int64_t number
    memcpy(&number, cnp.PyArray_DATA(counter), sizeof(number))
    number += 1
    memcpy(cnp.PyArray_DATA(counter), &number, sizeof(number))


# --- Backward -----------------------------------------------------------------------------------

SUMS_NAMES = ("sums[0]", "sums[1]")


cdef inline bint backward_is_common(object dy, object x, object axis, object residual, object y,
                                    object out, bnf_shape *shape) noexcept:
    return (see(x, axis, shape) and is_like(dy, <cnp.ndarray>x)
            and (residual is None or is_like(residual, <cnp.ndarray>x))
            and (y is None or is_like(y, <cnp.ndarray>x))
            and (out is None or (is_target(out, <cnp.ndarray>x) and apart(<cnp.ndarray>out, x)
                                 and apart(<cnp.ndarray>out, dy)
                                 and (residual is None or not overlap(out, residual))
                                 and (y is None or not overlap(out, y)))))


cdef void fill_backward(Work *w, cnp.ndarray x, object dy, object residual, object y,
                        Activation act) noexcept:
    w.backward.shape = w.shape
    w.backward.x = cnp.PyArray_DATA(x)
    w.backward.dy = cnp.PyArray_DATA(<cnp.ndarray>dy)
    w.backward.activation, w.backward.slope = act.code, act.slope
    w.backward.mean, w.backward.scale, w.backward.shift = w.mean, w.scale, w.shift
    w.backward.dy_factor, w.backward.x_factor = w.dy_factor, w.x_factor
    w.backward.constant = w.constant
    w.backward.stream = w.plan.stream
    if act.code == BNF_LINEAR:
        w.backward.mask = BNF_UNMASKED
    elif y is not None:
        w.backward.mask = BNF_FROM_Y
        w.backward.y = cnp.PyArray_DATA(<cnp.ndarray>y)
    elif residual is not None:
        w.backward.mask = BNF_FROM_X_RESIDUAL
        w.backward.residual = cnp.PyArray_DATA(<cnp.ndarray>residual)
    else:
        w.backward.mask = BNF_FROM_X


cdef int close_given(Work *w, Py_ssize_t channels, double count, sums, out) except -1:
    """What settle_backward makes of sums gathered here, made of those of a larger batch."""
    read_parameter(SUMS_NAMES[0], sums[0], channels, 0.0, w.dweight, out)
    read_parameter(SUMS_NAMES[1], sums[1], channels, 0.0, w.var, out)
    bnf_close_backward(w.scale, count, 0, channels, w.inv_std, w.var, w.dweight, w.dy_factor,
                       w.x_factor, w.constant)
    return 0


cdef void choose_steps(Work *w, bint gathers, cnp.ndarray dx, cnp.ndarray dresidual) noexcept:
    cdef Py_ssize_t c
    if gathers:
        w.gather, w.settle = gather_gradients, settle_backward
    if dx is not None:
        w.spread = spread_backward
        w.backward.dx = cnp.PyArray_DATA(dx)
        if dresidual is not None:
            w.backward.dresidual = cnp.PyArray_DATA(dresidual)
    elif dresidual is not None:   # g alone, which is dx under constants and a factor of one
        w.spread = spread_backward
        w.backward.dx = cnp.PyArray_DATA(dresidual)
        w.backward.through_moments = False
        w.backward.dy_factor = w.ones
        for c in range(w.shape.channels):
            w.ones[c] = 1.0


def backward(dy, x, mean, inv_std, count, weight, bias, axis, residual, activation, y, out,
             needs, sums=None):
    """(dx, dweight, dbias, dresidual), None where needs, four bools, does not ask.

    With count 0 the statistics are constants: nothing flows through them.  With sums, the
    (dweight, dbias) of a batch of count values that x is a part of, nothing is summed here.
    """
    cdef Work w
    cdef bnf_shape shape
    if dy is None:
        raise TypeError("dy is None; expected the gradient of the output, shaped as x")
    if not backward_is_common(dy, x, axis, residual, y, out, &shape):
        seen = _arrays.Canonical(x, axis, residual=residual, dy=dy, y=y, out=out,
                                 out_may_be=("x", "dy"))
        if not backward_is_common(seen.dy, seen.x, seen.axis, seen.residual, seen.y, seen.out,
                                  &shape):
            _arrays.refuse_uncommon()
        _arrays.check_parameters_apart(
            out, weight=weight, bias=bias, **{"stats.mean": mean, "stats.inv_std": inv_std})
        if sums is not None:
            _arrays.check_parameters_apart(out, **dict(zip(SUMS_NAMES, sums, strict=True)))
        found = backward(seen.dy, seen.x, mean, inv_std, count, weight, bias, seen.axis,
                         seen.residual, activation, seen.y, seen.out, needs, sums)
        return (seen.give(found[0]) if needs[0] else None, found[1], found[2],
                seen.restore(found[3]))
    cdef Activation act = read_activation(activation)
    cdef cnp.ndarray array = <cnp.ndarray>x, dx = None, dresidual = None
    _arrays.check_count(count, shape.outer * shape.inner, sums is not None)
    cdef bint empty = cnp.PyArray_SIZE(array) == 0, has_batch = count != 0
    cdef bint gathers = sums is None and (needs[1] or needs[2] or (needs[0] and has_batch))
    cdef Py_ssize_t c
    memset(&w, 0, sizeof(w))
    if not empty:
        plan_work(&w, array, shape, gathers, 2 + (y is not None or residual is not None),
                  needs[0] + needs[3], BACKWARD, act, residual is not None or needs[3])
    reserve(&w, shape.channels, w.plan.blocks.count if not empty else 1)
    try:
        read_parameter("stats.mean", mean, shape.channels, 0.0, w.mean, out)
        read_parameter("stats.inv_std", inv_std, shape.channels, 1.0, w.inv_std, out)
        read_parameter("weight", weight, shape.channels, 1.0, w.weight, out)
        read_parameter("bias", bias, shape.channels, 0.0, w.shift, out)
        for c in range(shape.channels):
            w.scale[c] = w.dy_factor[c] = w.weight[c] * w.inv_std[c]
        if sums is not None:
            close_given(&w, shape.channels, count, sums, out)
        if needs[0]:
            dx = new_like(array) if out is None else <cnp.ndarray>out
        if needs[3]:
            dresidual = new_like(array)
        if not empty:
            fill_backward(&w, array, dy, residual, y, act)
            w.backward.through_moments = has_batch
            choose_steps(&w, gathers, dx, dresidual)
            run_work(&w)
        return (dx, vector_of(w.dweight, shape.channels) if needs[1] else None,
                vector_of(w.slot_a, shape.channels) if needs[2] else None, dresidual)
    finally:
        free(w.memory)
