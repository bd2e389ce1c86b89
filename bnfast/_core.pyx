# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=False, freethreading_compatible=True
"""The one file that knows both Python and C.

An entry point does three things in this order:

1. Read options, parameters and other objects that are not arrays yet, and make the results.
   Python code of the caller may run here (`__float__`, `__array__`, finalizers, signal handlers)
   and change any array.
2. Look at the arrays: take shapes, types and pointers, once, after the last such place.
3. Run the driver (`src/driver.c`) on them.

Threads may be in all of this at once, in any Python.  State of the process is set at import, or is
atomic (`src/shared.h`, `src/driver.c`); `set_isa` and `set_caches` are for tests, between calls.

Step 2 takes arrays of a supported type that are dense in some order of their axes.  Others go to
`_arrays`, which converts them or raises, and then through step 2 again.
"""
cimport cython
cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.memoryview cimport PyMemoryView_Check
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport isfinite
from libc.stdint cimport INT64_MAX, SIZE_MAX, int64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strcpy

import os
from itertools import product
from types import MappingProxyType

import numpy as np

from . import _arrays, _masks, _memory, _options, _threads

cnp.import_array()

cdef extern from *:
    """
    #ifdef __clang__
    #define BNF_COMPILER __VERSION__
    #else
    #define BNF_COMPILER "gcc " __VERSION__
    #endif
    """
    const char *BNF_COMPILER

cdef extern from *:
    """
    #ifdef Py_LIMITED_API
    /* The stable ABI has it as an attribute only; the view keeps the reference. */
    static PyObject *bnf_memory_of(PyObject *view)
    {
        PyObject *owner = PyObject_GetAttrString(view, "obj");
        if (owner)
            Py_DECREF(owner);
        else
            PyErr_Clear();
        return owner;
    }
    #else
    static PyObject *bnf_memory_of(PyObject *view) { return PyMemoryView_GET_BASE(view); }
    #endif
    """
    PyObject *bnf_memory_of(object view)   # what a memoryview is a view of

cdef extern from "numpy/arrayobject.h":
    PyObject *PyDataMem_DefaultHandler
    # missing in NumPy's own declarations
    const int NPY_HALF, NPY_USERDEF
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, PyObject *, int)

cdef extern from "numpy/numpyconfig.h":
    const char *NPY_FEATURE_VERSION_STRING   # the oldest NumPy this build runs with


# --- The driver: instruction set, caches, threads, and counts of its calls ------------------------

bnf_threads_setup()
bnf_use_caches(bnf_read_caches())
driver = PyCapsule_New(<void *>&bnf_driver_table, "bnfast._core.driver", NULL)

DIRECTION_NAMES = ("moments", "forward", "backward", "inference")   # as in bnf_direction
LAYOUT_NAMES = ("planar", "interleaved")   # as in bnf_layout
RESIDUAL_NAMES = ("", "+residual")
assert (len(DIRECTION_NAMES), len(LAYOUT_NAMES)) == (BNF_DIRECTIONS, BNF_LAYOUTS)
TYPE_NAMES = tuple(bnf_type_name(<bnf_type><int>i).decode() for i in range(BNF_TYPES))


cdef tuple facts_of(bnf_activation code):
    return (bnf_activation_name(code).decode(),
            _options.ActivationFacts(<int>code, bnf_is_from_output(code), bnf_default_slope(code)))


ACTIVATIONS = MappingProxyType(
    dict(facts_of(<bnf_activation><int>i) for i in range(BNF_LINEAR + 1, BNF_ACTIVATIONS)))
VARIANT_NAMES = ("plain", *ACTIVATIONS)   # by bnf_activation
cdef dict CODES_AND_SLOPES = {name: (facts.code, facts.slope)
                              for name, facts in ACTIVATIONS.items()}


def dispatches():
    """How often each kernel set ran: {(direction, dtype, layout, isa, variant): count}."""
    cdef bnf_dispatch_key kind
    built = [bnf_isa_name(i).decode() for i in range(bnf_isa_count())]
    names = (DIRECTION_NAMES, TYPE_NAMES, LAYOUT_NAMES, built, VARIANT_NAMES, RESIDUAL_NAMES)
    found = {}
    for d, t, y, i, a, r in product(*(range(len(axis)) for axis in names)):
        kind.direction, kind.type = <bnf_direction><int>d, <bnf_type><int>t
        kind.layout, kind.isa = <bnf_layout><int>y, i
        kind.activation, kind.residual = <bnf_activation><int>a, r
        times = bnf_dispatches(kind)
        if times:
            variant = VARIANT_NAMES[a] + RESIDUAL_NAMES[r]
            found[DIRECTION_NAMES[d], TYPE_NAMES[t], LAYOUT_NAMES[y], built[i],
                  variant.removeprefix("plain+")] = times
    return found


def reset_dispatches():
    """Count from zero again."""
    bnf_forget_dispatches()


def isas():
    """Names of the instruction sets that can run here, best last."""
    return tuple(bnf_isa_name(i).decode() for i in range(bnf_isa_count())
                 if bnf_isa_table(i) != NULL)


def isa():
    """Name of the instruction set in use."""
    return bnf_isa_name(bnf_isa_in_use()).decode()


def set_isa(str name):
    """Use another instruction set from here on, in the whole process: for tests."""
    for i in range(bnf_isa_count()):
        if bnf_isa_table(i) != NULL and bnf_isa_name(i).decode() == name:
            bnf_use_isa(i)
            return
    raise ValueError(f"instruction set is {name!r}; expected one of {', '.join(isas())}")


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Plan for caches of other sizes from here on, in the whole process: for tests."""
    cdef bnf_caches caches = bnf_caches_in_use()
    caches.l2, caches.l3 = l2, l3
    bnf_use_caches(caches)


cdef choose_isa():
    pinned = os.environ.get("BNFAST_ISA", "")
    if pinned and pinned not in isas():
        raise ImportError(f"BNFAST_ISA is {pinned!r}; this processor and build have "
                          f"{', '.join(isas())}")
    set_isa(pinned or max(isas(), key=isas().index))


choose_isa()


def config():
    """What was built and what was found, for `show_config`."""
    cdef bnf_caches caches = bnf_caches_in_use()
    return {
        "isas_built": tuple(bnf_isa_name(i).decode() for i in range(bnf_isa_count())),
        "isas_runnable": isas(),
        "isa": isa(),
        "openmp": bnf_openmp_version(),
        "threads_of": bnf_threads_name().decode(),
        "compiler": BNF_COMPILER.decode(),
        "caches": {"l1d": caches.l1d, "l2": caches.l2, "l3": caches.l3,
                   "source": "read from the system" if caches.measured else "assumed"},
        "numpy_abi": NPY_FEATURE_VERSION_STRING.decode(),
    }


def threads():
    """How many threads a call from this thread may use, and what decides it.

    OpenMP's own number is a limit if it was lowered, as threadpoolctl does: our teams ask for an
    explicit number, to which OpenMP does not apply it.
    """
    return _threads.granted(bnf_threads_lost(), bnf_threads_lowered())


def get_num_threads():
    """Return how many threads a call from this thread may use.

    Returns
    -------
    int
        At least 1; exactly 1 in a process forked after its parent had started threads.

    Examples
    --------
    >>> import bnfast
    >>> with bnfast.num_threads(2):
    ...     bnfast.get_num_threads()
    2
    """
    return threads()[0]


def pool_started():
    """Whether a parallel region has run in this process: its threads do not survive a fork."""
    return bnf_threads_started()


def at_work():
    """How many calls are running without the GIL, and in how many threads: for tests."""
    cdef int calls, threads
    bnf_at_work(&calls, &threads)
    return calls, threads


cdef int most_threads(cnp.ndarray x) except -1:
    """How many threads a call on x may use; 1, without asking, if the call is too small for 2."""
    return get_num_threads() if bnf_useful_threads(5 * cnp.PyArray_NBYTES(x)) > 1 else 1


cdef int reserve(bnf_call *call) except -1:
    """Take zeroed memory for all of a call's per-channel numbers, or raise MemoryError."""
    if not bnf_call_reserve(call):
        raise MemoryError
    return 0


cdef void run(bnf_call *call) noexcept:
    """Run a planned call, without the GIL unless it ends before another thread could take it."""
    if call.bytes < BNF_SMALL_BYTES:
        bnf_call_run(call)
    else:
        with nogil:
            bnf_call_run(call)


# --- Fresh outputs -----------------------------------------------------------------------
# A large one owns pages of pages.c through one of NumPy's data-memory handlers, so it is an array
# like any other: it may be resized, traced by tracemalloc, and freed at any place and time.

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
cdef object pages_handler = PyCapsule_New(&pages, "mem_handler", NULL)
cdef bnf_shared_int pages_have_bound
strcpy(pages.name, "bnfast_pages")
pages.version = 1
pages.allocator.malloc = data_malloc
pages.allocator.calloc = data_calloc
pages.allocator.realloc = data_realloc
pages.allocator.free = data_free


cdef object handler_of_pages():
    """The handler as NumPy takes it; at its first use the pool's limit is set."""
    if not bnf_shared_get(&pages_have_bound):   # two threads set the same
        bnf_pages_set_bound(_memory.bound()[0])
        bnf_shared_set(&pages_have_bound, True)
    return pages_handler


cdef inline cnp.ndarray empty_like(cnp.ndarray x):
    if cnp.PyArray_IS_C_CONTIGUOUS(x):
        return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)
    return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)


cdef cnp.ndarray new_like(cnp.ndarray x):
    """An uninitialised output of x's shape, type and memory order."""
    if cnp.PyArray_NBYTES(x) < BNF_PAGES_LEAST:
        return empty_like(x)
    current = cnp.PyDataMem_GetHandler()
    if <PyObject *>current != PyDataMem_DefaultHandler:   # the caller has set another handler
        return empty_like(x)
    cnp.PyDataMem_SetHandler(handler_of_pages())
    try:
        return empty_like(x)
    finally:
        cnp.PyDataMem_SetHandler(current)


def new_output(cnp.ndarray x not None):
    """An uninitialised array like x for a result, in the memory that results take."""
    return new_like(x)


def release_memory():
    """Give back the memory that is kept for later results.

    The memory of outputs of 128 KiB and more, once these are freed, is kept for later outputs,
    since new pages cost more time than a batch norm. At most 1/16 of the memory that this process
    may use (the machine's or its cgroup's) is kept, and at most 1 GiB; `BNFAST_CACHE_BYTES` in the
    environment sets another limit, and 0 keeps nothing. Arrays in use are not touched.

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
    """Bytes that are kept for later results, and the most that may be."""
    handler_of_pages()
    return bnf_pages_held(), bnf_pages_bound()


def physical_memory():
    """Bytes of memory that the machine has; 0 if the system does not say."""
    return bnf_physical_memory()


# --- Reading options and converting to arrays: Python code of the caller may run ------------------

# The number that NumPy gave bfloat16 when ml_dtypes registered it; -1 before the first array of it.
cdef bnf_shared_int bfloat16_number
bnf_shared_set(&bfloat16_number, -1)


cdef object as_array(str name, object value):
    """An argument as a plain array, without a copy if possible; None stays None."""
    if value is not None and not cnp.PyArray_CheckExact(value):
        value = _arrays.array(name, value)
    if value is not None and bnf_shared_get(&bfloat16_number) < 0:
        number = cnp.PyArray_TYPE(<cnp.ndarray>value)
        if number >= NPY_USERDEF and _arrays.is_bfloat16((<cnp.ndarray>value).dtype):
            bnf_shared_set(&bfloat16_number, number)
    return value


cdef object as_target(str name, object value):
    """An array to be written to, as a plain array of the same memory; None stays None."""
    return value if value is None or cnp.PyArray_CheckExact(value) else _arrays.target(name, value)


cdef object as_counter(object value):
    """A counter of batches as a plain array of the same memory; None stays None."""
    if value is not None and not cnp.PyArray_CheckExact(value):
        _arrays.check_counter(value)
    return as_target("num_batches_tracked", value)


cdef object as_vector(str name, object value, object out):
    """A per-channel parameter as an array that `read_parameter` takes; None stays None."""
    if value is None or (cnp.PyArray_CheckExact(value) and is_vector(<cnp.ndarray>value)):
        return value
    return _arrays.vector(name, value, out)


cdef object as_running(str name, object value):
    """A running statistic as the array to update: itself, or a copy to be written back."""
    if (cnp.PyArray_CheckExact(value) and is_vector(<cnp.ndarray>value)
            and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>value)):
        return value
    return _arrays.running_copy(name, value)


cdef object as_axis(object axis):
    """An axis as an int; whether x has such an axis is checked later."""
    return axis if type(axis) is int else _options.integer("axis", axis)


cdef struct Activation:
    bnf_activation code
    double slope


cdef Activation read_activation(object activation) except *:
    cdef Activation read
    cdef object code
    read.code, read.slope = BNF_LINEAR, 0.0
    if activation is None:
        return read
    if type(activation) is str and activation in CODES_AND_SLOPES:
        code, read.slope = CODES_AND_SLOPES[activation]
    else:
        name, read.slope = _options.activation(activation, ACTIVATIONS)
        code = ACTIVATIONS[name].code
    read.code = <bnf_activation><int>code
    return read


cdef double read_eps(object eps, bint training) except? -1:
    if type(eps) is float and isfinite(<double>eps) and (<double>eps) > 0:
        return eps
    return _options.eps(eps, training)


cdef double read_momentum(object momentum) except? -1:
    if type(momentum) is float and isfinite(<double>momentum):
        return momentum
    return _options.real("momentum", momentum)


cdef double read_ddof(object ddof) except? -1:
    if type(ddof) is int and (ddof == 0 or ddof == 1):
        return ddof
    return _options.ddof(ddof)


cdef Py_ssize_t read_run(object size) except -1:
    """How many rows of axis 0 are normalised together; 0 for all."""
    if size is None:
        return 0
    return _options.run_length("virtual_batch_size", size)


cdef object as_mask(object mask):
    """A mask as a plain array of an accepted type; None stays None."""
    return None if mask is None else _masks.read(mask)


cdef double read_count(str name, object count) except? -1:
    """The values per channel of a batch, exact for any that fits in memory; or weights' sum."""
    cdef long long number = -1
    if type(count) is int:
        try:
            number = count
        except OverflowError:
            pass
    return <double>number if number >= 0 else _options.batch_size(name, count)


# --- Looking at arrays: no code of the caller runs ------------------------------------------------

cdef inline int type_of(cnp.ndarray a) noexcept:
    """Which bnf_type an array has; BNF_TYPES if none."""
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return BNF_F32
    if number == cnp.NPY_DOUBLE:
        return BNF_F64
    if number == NPY_HALF:
        return BNF_F16
    if number < 0:   # a new kind of type
        return BNF_TYPES
    return BNF_BF16 if number == bnf_shared_get(&bfloat16_number) else BNF_TYPES


cdef enum:
    MOST_AXES = 64    # of NumPy's arrays
    MOST_BASES = 64   # that are followed: a chain of bases can be made to be a cycle


cdef void reach(cnp.ndarray a, uintptr_t *first, uintptr_t *end) noexcept:
    """The range of addresses of an array's values, gaps included."""
    cdef int i
    cdef uintptr_t far   # unsigned: a product with any stride wraps around
    first[0] = end[0] = <uintptr_t>cnp.PyArray_DATA(a)
    if cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_OWNDATA):   # its strides may have been changed
        end[0] += <uintptr_t>cnp.PyArray_NBYTES(a)
    elif cnp.PyArray_SIZE(a) > 0:
        for i in range(cnp.PyArray_NDIM(a)):
            far = <uintptr_t>(cnp.PyArray_DIM(a, i) - 1) * <uintptr_t>cnp.PyArray_STRIDE(a, i)
            if cnp.PyArray_STRIDE(a, i) < 0:
                first[0] += far
            else:
                end[0] += far
        end[0] += <uintptr_t>cnp.PyArray_ITEMSIZE(a)


cdef inline PyObject *base_of(cnp.ndarray a) noexcept:
    """What an array is a view of, also through a memoryview; NULL if it is not a view."""
    cdef PyObject *base = cnp.PyArray_BASE(a)
    if base != NULL and PyMemoryView_Check(<object>base):
        return bnf_memory_of(<object>base)
    return base


cdef bint is_in_its_owner(cnp.ndarray a) noexcept:
    """Whether a view lies within the array at the end of its bases; `resize` may have given that
    array other memory since."""
    cdef PyObject *owner = <PyObject *>a
    cdef PyObject *base = base_of(a)
    cdef uintptr_t first, end, owned, owned_end
    cdef int left = MOST_BASES
    while base != NULL and cnp.PyArray_Check(<object>base):
        if left == 0:
            return False
        left -= 1
        owner, base = base, base_of(<cnp.ndarray>base)
    if owner == <PyObject *>a or cnp.PyArray_SIZE(a) == 0:
        return True
    reach(a, &first, &end)
    reach(<cnp.ndarray>owner, &owned, &owned_end)
    return owned <= first and end <= owned_end


cdef inline bint is_native(cnp.ndarray a) noexcept:
    return cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_ALIGNED) and cnp.PyArray_ISNOTSWAPPED(a)


cdef inline bint is_vector(cnp.ndarray a) noexcept:
    """Whether per-channel numbers can be read from an array: a contiguous row of float32 or
    float64."""
    return (cnp.PyArray_TYPE(a) in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE) and cnp.PyArray_NDIM(a) == 1
            and cnp.PyArray_IS_C_CONTIGUOUS(a) and is_native(a) and is_in_its_owner(a))


cdef inline bint is_vector_of(cnp.ndarray a, Py_ssize_t channels) noexcept:
    return is_vector(a) and cnp.PyArray_DIM(a, 0) == channels


cdef int sort_axes(cnp.ndarray x, int *order) noexcept:
    """Fill order with the axes of x as they are in memory, longest strides first and without axes
    of length 1, and return how many there are.  Return -1 if x has gaps."""
    cdef int i, j, n = 0
    cdef Py_ssize_t stride = cnp.PyArray_ITEMSIZE(x)
    for i in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_DIM(x, i) == 1:
            continue
        j = n
        while j > 0 and cnp.PyArray_STRIDE(x, order[j - 1]) < cnp.PyArray_STRIDE(x, i):
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
        n += 1
    for j in range(n - 1, -1, -1):
        if cnp.PyArray_STRIDE(x, order[j]) != stride:
            return -1
        stride *= cnp.PyArray_DIM(x, order[j])
    return n


cdef inline bint is_tensor(object x) noexcept:
    """Whether a result can be made for x: the rest is checked later."""
    return cnp.PyArray_CheckExact(x) and type_of(<cnp.ndarray>x) != BNF_TYPES


cdef bint read_shape(object tensor, object axis, bnf_shape *shape) noexcept:
    """Fill shape and return True if a tensor has a supported type and is dense in some order of
    its axes."""
    cdef cnp.ndarray x
    cdef int[MOST_AXES] order
    cdef int rank, i, n, channel_axis
    cdef bint is_before = True
    cdef Py_ssize_t wanted
    if not cnp.PyArray_CheckExact(tensor):
        return False
    x = <cnp.ndarray>tensor
    rank = cnp.PyArray_NDIM(x)
    try:
        wanted = axis
    except OverflowError:
        return False
    if (rank < 2 or rank > MOST_AXES or not -rank <= wanted < rank or type_of(x) == BNF_TYPES
            or not is_native(x) or not is_in_its_owner(x)):
        return False
    channel_axis = <int>(wanted if wanted >= 0 else wanted + rank)
    shape.outer = shape.inner = 1
    shape.channels = cnp.PyArray_DIM(x, channel_axis)
    if cnp.PyArray_IS_C_CONTIGUOUS(x):
        for i in range(channel_axis):
            shape.outer *= cnp.PyArray_DIM(x, i)
        for i in range(channel_axis + 1, rank):
            shape.inner *= cnp.PyArray_DIM(x, i)
    else:
        n = sort_axes(x, order)
        if n < 0:
            return False
        for i in range(n):
            if order[i] == channel_axis:
                is_before = False
            elif is_before:
                shape.outer *= cnp.PyArray_DIM(x, order[i])
            else:
                shape.inner *= cnp.PyArray_DIM(x, order[i])
    if shape.channels == 1:   # one planar run of values, which uses all lanes
        shape.inner *= shape.outer
        shape.outer = 1
    return True


cdef inline bint is_like(object tensor, cnp.ndarray x) noexcept:
    """Whether a tensor has x's type, shape and memory order."""
    cdef cnp.ndarray a
    cdef int i
    if not cnp.PyArray_CheckExact(tensor):
        return False
    a = <cnp.ndarray>tensor
    if not (cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(x) and cnp.PyArray_SAMESHAPE(a, x)
            and is_native(a) and is_in_its_owner(a)):
        return False
    if cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_IS_C_CONTIGUOUS(x):
        return True
    for i in range(cnp.PyArray_NDIM(x)):
        if (cnp.PyArray_DIM(x, i) != 1
                and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(x, i)):
            return False
    return True


cdef inline bint is_target(object out, cnp.ndarray x) noexcept:
    return is_like(out, x) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)


cdef inline bint overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two dense arrays share any byte."""
    cdef uintptr_t p = <uintptr_t>cnp.PyArray_DATA(a), q = <uintptr_t>cnp.PyArray_DATA(b)
    cdef uintptr_t m = <uintptr_t>cnp.PyArray_NBYTES(a), n = <uintptr_t>cnp.PyArray_NBYTES(b)
    return p < q + n and q < p + m and m > 0 and n > 0


cdef inline bint overlaps(cnp.ndarray a, object other) noexcept:
    return other is not None and overlap(a, <cnp.ndarray>other)


cdef inline bint apart(cnp.ndarray out, object other) noexcept:
    """Whether the kernels may write out while they read other: no byte is shared, or all are."""
    return (other is None or cnp.PyArray_DATA(out) == cnp.PyArray_DATA(<cnp.ndarray>other)
            or not overlap(out, <cnp.ndarray>other))


cdef inline void *data_of(object tensor) noexcept:
    """The pointer to a tensor's data; NULL for None."""
    return NULL if tensor is None else cnp.PyArray_DATA(<cnp.ndarray>tensor)


cdef bint look_forward(bnf_call *call, object x, object axis, object residual,
                       object y) noexcept:
    """Take shape, type and pointers of the tensors of a forward or an inference; False if they are
    not the common case."""
    if not (read_shape(x, axis, &call.shape)
            and (residual is None or is_like(residual, <cnp.ndarray>x))
            and is_target(y, <cnp.ndarray>x) and apart(<cnp.ndarray>y, x)
            and apart(<cnp.ndarray>y, residual)):
        return False
    call.type = <bnf_type>type_of(<cnp.ndarray>x)
    call.x, call.residual, call.y = data_of(x), data_of(residual), data_of(y)
    return True


cdef int read_parameter(str name, object vector, Py_ssize_t channels, double missing,
                        double *to, object out) except -1:
    """Copy a per-channel parameter as float64, or the value for a missing one."""
    cdef Py_ssize_t i
    cdef cnp.ndarray a
    cdef const float *narrow
    cdef const double *wide
    if vector is None:
        for i in range(channels):
            to[i] = missing
        return 0
    a = <cnp.ndarray>vector
    if not is_vector_of(a, channels):
        _arrays.refuse_vector(name, a, channels)
    if overlaps(a, out):
        _arrays.refuse_overlap(name)
    if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT:
        narrow = <const float *>cnp.PyArray_DATA(a)
        for i in range(channels):
            to[i] = narrow[i]
    else:
        wide = <const double *>cnp.PyArray_DATA(a)
        for i in range(channels):
            to[i] = wide[i]
    return 0


cdef int check_running(str name, object vector, cnp.ndarray x, Py_ssize_t channels,
                       bint updated) except -1:
    """Refuse a running statistic that does not have one value per channel or a type that goes with
    x, or that must be updated and cannot be written to."""
    cdef cnp.ndarray a = <cnp.ndarray>vector
    if not (is_vector_of(a, channels)
            and (cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT or cnp.PyArray_TYPE(x) == cnp.NPY_DOUBLE)
            and (not updated or cnp.PyArray_ISWRITEABLE(a))):
        _arrays.refuse_running(name, a, channels, x.dtype)
        _arrays.refuse_uncommon()
    return 0


cdef inline bint touches(cnp.ndarray a, object x, object residual, object out, object weight,
                         object bias) noexcept:
    return (overlaps(a, x) or overlaps(a, residual) or overlaps(a, out) or overlaps(a, weight)
            or overlaps(a, bias))


cdef int64_t read_counter(cnp.ndarray counter) except -1:
    """The number in a counter of batches; raise if the next number would not fit."""
    cdef int64_t number = -1
    cdef bint fits = (cnp.PyArray_NDIM(counter) == 0 and cnp.PyArray_ISSIGNED(counter)
                      and cnp.PyArray_ITEMSIZE(counter) == sizeof(number)
                      and cnp.PyArray_ISNOTSWAPPED(counter) and cnp.PyArray_ISWRITEABLE(counter)
                      and is_in_its_owner(counter))
    if fits:   # memcpy: the address may be unaligned
        memcpy(&number, cnp.PyArray_DATA(counter), sizeof(number))
    if number < 0 or number == INT64_MAX:
        _arrays.check_counter(counter)
        _arrays.check_room(counter)
        _arrays.refuse_uncommon()
    return number


cdef void count_batch(cnp.ndarray counter, int64_t before) noexcept:
    before += 1
    memcpy(cnp.PyArray_DATA(counter), &before, sizeof(before))


def copy_into(cnp.ndarray target not None, cnp.ndarray source not None):
    """Write an array's values into another of its shape; both are checked just before."""
    if not (cnp.PyArray_SAMESHAPE(target, source) and is_in_its_owner(target)
            and is_in_its_owner(source)):
        _arrays.refuse_uncommon()
    cnp.PyArray_CopyInto(target, source)


_arrays.copy_into = copy_into


cdef cnp.ndarray new_vector(Py_ssize_t n):
    cdef cnp.npy_intp size = n
    return cnp.PyArray_EMPTY(1, &size, cnp.NPY_DOUBLE, 0)


cdef inline void copy_numbers(cnp.ndarray vector, const double *values) noexcept:
    memcpy(cnp.PyArray_DATA(vector), values, cnp.PyArray_NBYTES(vector))


cdef inline void copy_row(cnp.ndarray rows, const double *values, Py_ssize_t row,
                          Py_ssize_t channels) noexcept:
    memcpy(<double *>cnp.PyArray_DATA(rows) + row * channels, values, channels * sizeof(double))


def over_memory(uintptr_t address, shape, int type_number):
    """A C-contiguous array over memory that is not NumPy's; its owner must keep the memory while
    the array is used.

    For PyTorch's tensors: their own conversion to an array costs more than a small batch norm, and
    makes their storage impossible to resize from then on.
    """
    cdef cnp.npy_intp sizes[16]
    cdef int i, rank = <int>len(shape)
    if rank > 16:
        raise ValueError(f"shape has {rank} axes; expected 16 at most")
    for i in range(rank):
        sizes[i] = shape[i]
    return cnp.PyArray_SimpleNewFromData(rank, sizes, type_number, <void *>address)


def plan(shape, itemsize, gathers, reads, writes, l2, l3, threads):
    """The decisions of tiling.c for a shape (outer, channels, inner) on a machine, as a dict: for
    tests.

    The tiles that are summed and those that are written are (outer0, outer1, channel0, channel1,
    inner0, inner1).
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
        "chains": bnf_chains_in_turn(planned, found),
        "sums": [tile_of(planned, found.blocks, block, group * found.group, found.group)
                 for block in range(found.blocks.count) for group in range(found.groups)],
        "writes": [tile_of(planned, found.write_blocks, block, group * found.width, found.width)
                   for block in range(found.write_blocks.count) for group in range(found.widths)],
    }


cdef tuple tile_of(bnf_shape shape, bnf_blocks blocks, Py_ssize_t block, Py_ssize_t channel0,
                   Py_ssize_t channels):
    cdef bnf_tile tile = bnf_block_tile(shape, blocks, block, channel0, channels)
    return (tile.outer0, tile.outer1, tile.channel0, tile.channel1, tile.inner0, tile.inner1)


# --- Moments --------------------------------------------------------------------------------

def moments(x, axis, mask=None):
    """One pass over x: (count, mean, M2), float64 per channel."""
    x, axis, mask = as_array("x", x), as_axis(axis), as_mask(mask)
    found = sum_up(x, axis, mask)
    if found is None:
        canonical = _arrays.Canonical(x, axis)
        found = sum_up(canonical.x, canonical.axis, mask)
        if found is None:
            _arrays.refuse_uncommon()
    return found


cdef object sum_up(object x, object axis, object mask):
    """`moments` of an array; None if it is not the common case."""
    cdef bnf_call call
    cdef bnf_shape shape
    cdef int threads
    if not read_shape(x, axis, &shape):
        return None
    weights = None if mask is None else _masks.arrange(mask, x, axis)
    if cnp.PyArray_SIZE(<cnp.ndarray>x) == 0:
        if not bnf_is_countable(shape.channels, 0):
            raise MemoryError
        return 0, np.zeros(shape.channels), np.zeros(shape.channels)
    threads = most_threads(<cnp.ndarray>x)
    mean, m2 = new_vector(shape.channels), new_vector(shape.channels)
    memset(&call, 0, sizeof(call))
    if not read_shape(x, axis, &call.shape) or not same_shape(call.shape, shape):
        return None
    call.direction, call.type = BNF_MOMENTS, <bnf_type>type_of(<cnp.ndarray>x)
    call.x = data_of(x)
    if not read_weights(&call, weights):
        return None
    bnf_call_plan(&call, threads)
    reserve(&call)
    call.count = bnf_call_weight(&call)
    run(&call)
    copy_numbers(mean, call.mean)
    copy_numbers(m2, call.m2)
    bnf_call_release(&call)
    return count_of(weights, call.count), mean, m2


cdef object count_of(object weights, double count):
    """A count as callers see it: a float of weights that are not bool."""
    return int(count) if weights is None or weights.is_bool else count


cdef bint read_weights(bnf_call *call, object weights) noexcept:
    """Take the pointer to a mask's weights, if there are any; False if they are not of this x."""
    cdef object row = None if weights is None else weights.row
    cdef cnp.ndarray a
    if row is None:
        return True
    a = <cnp.ndarray>row
    call.weights = cnp.PyArray_DATA(a)
    return (cnp.PyArray_SIZE(a) == call.shape.outer * call.shape.inner
            and cnp.PyArray_TYPE(a) == <int>(cnp.NPY_DOUBLE if call.type == BNF_F64
                                             else cnp.NPY_FLOAT))


cdef inline bint same_shape(bnf_shape a, bnf_shape b) noexcept:
    return a.outer == b.outer and a.channels == b.channels and a.inner == b.inner


# --- Inference --------------------------------------------------------------------------------

def normalize(x, mean, var, weight, bias, eps, axis, residual, activation, out,
              names=("mean", "var", "weight", "bias"), running=False):
    """act((x - mean) / sqrt(var + eps) * weight + bias (+ residual)).

    If var is None, the scale is weight.  With running, mean and var must have the types of running
    statistics.
    """
    cdef Inference options
    options.act, options.eps = read_activation(activation), read_eps(eps, False)
    options.running = running
    axis, x, residual = as_axis(axis), as_array("x", x), as_array("residual", residual)
    target = as_target("out", out)
    means, vars = as_vector(names[0], mean, target), as_vector(names[1], var, target)
    scales, shifts = as_vector(names[2], weight, target), as_vector(names[3], bias, target)
    if running and (means is not mean or vars is not var or mean is None or var is None):
        _arrays.check_running_type(names[0], mean, x.dtype)
        _arrays.check_running_type(names[1], var, x.dtype)
    y = apply_given(x, axis, residual, target, &options, names, means, vars, scales, shifts)
    if y is None:
        canonical = _arrays.Canonical(x, axis, residual=residual, out=target)
        _arrays.check_parameters_apart(
            target, **dict(zip(names, (mean, var, weight, bias), strict=True)))
        y = apply_given(canonical.x, axis, canonical.residual, canonical.out, &options, names,
                        means, vars, scales, shifts)
        if y is None:
            _arrays.refuse_uncommon()
        y = canonical.write_back(y)
    return y if out is None else out


cdef struct Inference:
    Activation act
    double eps
    bint running


cdef object apply_given(object x, object axis, object residual, object out, Inference *options,
                        tuple names, object mean, object var, object scale, object shift):
    """`normalize` of arrays; None if they are not the common case."""
    cdef bnf_call call
    cdef bnf_shape shape
    cdef int threads
    if not is_tensor(x):
        return None
    threads = most_threads(<cnp.ndarray>x)
    y = new_like(<cnp.ndarray>x) if out is None else out
    memset(&call, 0, sizeof(call))
    if not look_forward(&call, x, axis, residual, y):
        return None
    shape = call.shape
    if options.running:
        check_running(names[0], mean, <cnp.ndarray>x, shape.channels, False)
        check_running(names[1], var, <cnp.ndarray>x, shape.channels, False)
    call.direction, call.eps, call.has_var = BNF_INFERENCE, options.eps, var is not None
    call.activation, call.slope = options.act.code, options.act.slope
    bnf_call_plan(&call, threads)
    reserve(&call)
    try:
        read_parameter(names[0], mean, shape.channels, 0.0, call.mean, out)
        read_parameter(names[1], var, shape.channels, 1.0, call.var, out)
        read_parameter(names[2], scale, shape.channels, 1.0, call.scale, out)
        read_parameter(names[3], shift, shape.channels, 0.0, call.shift, out)
        run(&call)
    finally:
        bnf_call_release(&call)
    return y


cdef class FixedMap:
    """act((x - mean) * scale + shift (+ residual)), with stored numbers: the compiled base class of
    `FrozenBatchNorm`."""

    cdef readonly object axis, activation
    cdef double *numbers   # mean, scale and shift; owned by this object, and never changed
    cdef Py_ssize_t channels
    cdef Activation act
    cdef bnf_shared_int is_made   # set last: another thread may call what this one makes

    def __init__(self, mean, scale, shift, axis, activation):
        cdef Activation act = read_activation(activation)
        axis = as_axis(axis)
        means = _arrays.constant("mean", mean)
        scales = _arrays.constant("scale", scale, len(means))
        shifts = _arrays.constant("shift", shift, len(means))
        # Checked last: the caller's Python, which has run above, may call this, too.
        with cython.critical_section(self):
            if bnf_shared_get(&self.is_made):
                raise RuntimeError("a frozen batch norm is immutable; make another one")
            self.take(means, scales, shifts)
            self.act, self.axis, self.activation = act, axis, activation
            bnf_shared_set(&self.is_made, True)

    cdef int take(self, cnp.ndarray means, cnp.ndarray scales, cnp.ndarray shifts) except -1:
        cdef Py_ssize_t channels = cnp.PyArray_DIM(means, 0), row = channels * sizeof(double)
        cdef double *numbers = <double *>malloc(3 * row + 1)
        if numbers == NULL:
            raise MemoryError
        memcpy(numbers, cnp.PyArray_DATA(means), row)
        memcpy(numbers + channels, cnp.PyArray_DATA(scales), row)
        memcpy(numbers + 2 * channels, cnp.PyArray_DATA(shifts), row)
        self.numbers, self.channels = numbers, channels
        return 0

    def __dealloc__(self):
        free(self.numbers)

    @property
    def mean(self):
        """The numbers that are subtracted: a read-only copy, float64, shape (channels,)."""
        return self.copy_of(0)

    @property
    def scale(self):
        """The factors: a read-only copy, float64, shape (channels,)."""
        return self.copy_of(1)

    @property
    def shift(self):
        """The numbers that are added: a read-only copy, float64, shape (channels,)."""
        return self.copy_of(2)

    cdef object copy_of(self, Py_ssize_t row):
        self.check_made()
        cdef char *start = <char *>(self.numbers + row * self.channels)
        # A view of bytes, so that it and its base stay read-only.
        return np.frombuffer(start[:self.channels * sizeof(double)], np.float64).view()

    cdef int check_made(self) except -1:
        if not bnf_shared_get(&self.is_made):
            raise RuntimeError("this frozen batch norm was never initialised")
        return 0

    def __call__(self, x, residual=None, out=None):
        """Apply the map.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            Rank 2 or more, with as many channels on ``axis`` as the layer has.
        residual : array_like, shape and dtype of `x`, optional
            Added before the activation.
        out : ndarray, shape and dtype of `x`, optional
            Where to write: `x` or `residual` itself, or memory apart from both.

        Returns
        -------
        ndarray
            `out`, or a fresh array in the memory order of `x`.
        """
        self.check_made()
        x, residual = as_array("x", x), as_array("residual", residual)
        target = as_target("out", out)
        y = self.apply(x, residual, target)
        if y is None:
            canonical = _arrays.Canonical(x, self.axis, residual=residual, out=target)
            y = self.apply(canonical.x, canonical.residual, canonical.out)
            if y is None:
                _arrays.refuse_uncommon()
            y = canonical.write_back(y)
        return y if out is None else out

    cdef object apply(self, object x, object residual, object out):
        """The map of arrays; None if they are not the common case."""
        cdef bnf_call call
        cdef int threads
        if not is_tensor(x):
            return None
        threads = most_threads(<cnp.ndarray>x)
        y = new_like(<cnp.ndarray>x) if out is None else out
        memset(&call, 0, sizeof(call))
        if not look_forward(&call, x, self.axis, residual, y):
            return None
        if call.shape.channels != self.channels:
            raise ValueError(_arrays.wrong_channels(x.shape, self.axis, self.channels))
        call.direction, call.activation, call.slope = BNF_INFERENCE, self.act.code, self.act.slope
        call.mean = self.numbers
        call.scale = self.numbers + self.channels
        call.shift = self.numbers + 2 * self.channels
        bnf_call_plan(&call, threads)
        run(&call)
        return y


# --- Training -----------------------------------------------------------------------------------

cdef bnf_call *new_calls(bnf_call *one, Py_ssize_t count) except NULL:
    """So many empty calls, in `one` if there is one, which all rows of a tensor then share."""
    cdef bnf_call *calls = one
    memset(one, 0, sizeof(bnf_call))
    if count > 1:
        calls = <bnf_call *>calloc(count, sizeof(bnf_call))
        if calls == NULL:
            raise MemoryError
    return calls


cdef void release_calls(bnf_call *calls, bnf_call *one, Py_ssize_t count) noexcept:
    cdef Py_ssize_t i
    for i in range(count):
        bnf_call_release(&calls[i])
    if calls != one:
        free(calls)


cdef Py_ssize_t runs_of(cnp.ndarray x, Py_ssize_t rows) noexcept:
    """How many runs of so many rows x has; 1 for all rows together."""
    cdef Py_ssize_t n = cnp.PyArray_DIM(x, 0)
    return 1 if rows == 0 else n // rows + (n % rows != 0)


cdef inline const void *behind(const void *p, Py_ssize_t bytes) noexcept:
    return p if p == NULL else <const char *>p + bytes


cdef void take_rows(bnf_call *call, Py_ssize_t rows, Py_ssize_t first, Py_ssize_t n) noexcept:
    """Narrow a call on all rows of axis 0 to n of them."""
    cdef Py_ssize_t size = bnf_type_size(call.type)
    cdef Py_ssize_t positions = call.shape.outer * call.shape.inner // rows * first
    cdef Py_ssize_t bytes = positions * call.shape.channels * size
    call.x, call.dy = behind(call.x, bytes), behind(call.dy, bytes)
    call.residual, call.output = behind(call.residual, bytes), behind(call.output, bytes)
    call.y, call.dx = <void *>behind(call.y, bytes), <void *>behind(call.dx, bytes)
    call.dresidual = <void *>behind(call.dresidual, bytes)
    call.weights = behind(call.weights, positions * max(size, <Py_ssize_t>sizeof(float)))
    if call.shape.channels == 1:
        call.shape.inner = call.shape.inner // rows * n
    else:
        call.shape.outer = call.shape.outer // rows * n


cdef inline bint share_threads(Py_ssize_t count, int threads) noexcept:
    """Whether there are enough calls for the threads, so that each runs on one."""
    return count > 1 and count >= threads


cdef int split(bnf_call *calls, Py_ssize_t count, cnp.ndarray x, Py_ssize_t rows,
               int threads) except -1:
    """Give each call its run of rows, plan it and reserve its memory; the first call has all."""
    cdef Py_ssize_t i, first, n = cnp.PyArray_DIM(x, 0)
    cdef int each = 1 if share_threads(count, threads) else threads
    for i in range(1, count):
        calls[i] = calls[0]
    for i in range(count):
        if rows > 0:
            first = i * rows
            take_rows(&calls[i], n, first, min(rows, n - first))
        bnf_call_plan(&calls[i], each)
        reserve(&calls[i])
    return 0


cdef void run_all(bnf_call *calls, Py_ssize_t count, int threads) noexcept:
    """Run them: in one parallel region if they were planned for it."""
    cdef Py_ssize_t i
    if share_threads(count, threads):
        with nogil:
            bnf_calls_run(calls, count, threads)
    else:
        for i in range(count):
            run(&calls[i])


cdef bint has_rows_first(object x) noexcept:
    """Whether the rows of axis 0 lie in memory one after the other."""
    cdef cnp.ndarray a
    cdef int[MOST_AXES] order
    cdef int n
    if not cnp.PyArray_CheckExact(x):
        return True   # it will be a C-contiguous copy
    a = <cnp.ndarray>x
    if cnp.PyArray_NDIM(a) > MOST_AXES or cnp.PyArray_IS_C_CONTIGUOUS(a):
        return True
    n = sort_axes(a, order)   # with gaps, a copy might have another order
    return n == 0 or (n > 0 and (order[0] == 0 or cnp.PyArray_DIM(a, 0) == 1))


cdef struct Training:
    Activation act
    double eps, momentum, ddof
    bint cumulative   # momentum is 1 / the number of batches
    bint is_part      # x is a part of the batch whose moments are given
    double count      # of that batch
    Py_ssize_t rows   # of a virtual batch; 0: all


cdef object copied_to(str name, object value, object running):
    """The array that an updated running statistic must be copied to; None if it is no copy."""
    return None if running is value else as_target(name, value)


cdef int check_given_back(str name, object value, cnp.ndarray running, cnp.ndarray x) except -1:
    """Refuse an array that an updated running statistic cannot be copied to; None is accepted."""
    cdef cnp.ndarray a
    if value is None:
        return 0
    a = <cnp.ndarray>value
    if not (cnp.PyArray_SAMESHAPE(a, running) and cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(running)
            and cnp.PyArray_ISWRITEABLE(a) and is_in_its_owner(a)):
        _arrays.refuse_running(name, a, cnp.PyArray_DIM(running, 0), x.dtype)
        _arrays.refuse_uncommon()
    return 0


cdef int check_updated(object means, object vars, tuple given_back, cnp.ndarray x,
                       Py_ssize_t channels) except -1:
    """Refuse running statistics that cannot be updated or, if they are copies, copied back."""
    check_running("running_mean", means, x, channels, True)
    check_running("running_var", vars, x, channels, True)
    check_given_back("running_mean", given_back[0], means, x)
    check_given_back("running_var", given_back[1], vars, x)
    return 0


MOMENTS_NAMES = ("moments.mean", "moments.m2")


def forward(x, running_mean, running_var, weight, bias, momentum, eps, axis, ddof, residual,
            activation, out, counter=None, moments=None, mask=None, virtual_batch_size=None):
    """Normalise with the batch: (y, (count, mean, var, inv_std)).

    The running statistics and the counter of batches, if given, are updated last, when nothing can
    raise any more.  With a counter, momentum may be None: the cumulative average.  moments are
    (count, mean, m2) of a batch that x is a part of; nothing is then summed here.  With virtual
    batches, the statistics have a row for each.
    """
    cdef Training options
    cdef object means = None, vars = None, given_back = None
    options.act, options.eps = read_activation(activation), read_eps(eps, True)
    options.cumulative = momentum is None and counter is not None
    options.momentum = 0.0 if options.cumulative else read_momentum(momentum)
    options.ddof, options.is_part = read_ddof(ddof), moments is not None
    options.count = read_count("moments.count", moments[0]) if options.is_part else 0
    options.rows = read_run(virtual_batch_size)
    axis, x, residual, mask = (as_axis(axis), as_array("x", x), as_array("residual", residual),
                               as_mask(mask))
    target, batches = as_target("out", out), as_counter(counter)
    weights, biases = as_vector("weight", weight, target), as_vector("bias", bias, target)
    batch = (0, None, None) if not options.is_part else (
        moments[0] if type(moments[0]) is int
        else options.count if isinstance(moments[0], float) else int(options.count),
        as_vector(MOMENTS_NAMES[0], moments[1], target),
        as_vector(MOMENTS_NAMES[1], moments[2], target))
    given = x
    if options.rows > 0:
        _options.check_runs(x, axis, "moments" if options.is_part else None)
        if not has_rows_first(x):
            x = np.ascontiguousarray(x)
            _arrays.check_running_apart(running_mean, running_var, given)
    if running_mean is not None or running_var is not None:
        means = as_running("running_mean", running_mean)
        vars = as_running("running_var", running_var)
        if (means is not running_mean or vars is not running_var or weights is not weight
                or biases is not bias):
            _arrays.check_running_apart(
                running_mean, running_var, x, residual, target, weight, bias)
        given_back = (copied_to("running_mean", running_mean, means),
                      copied_to("running_var", running_var, vars))
    found = train(x, axis, residual, target, &options, weights, biases, batch, mask, means, vars,
                  given_back, batches, None)
    if found is None:
        canonical = _arrays.Canonical(x, axis, residual=residual, out=target)
        _arrays.check_parameters_apart(target, weight=weight, bias=bias)
        if options.is_part:
            _arrays.check_parameters_apart(target, **dict(zip(MOMENTS_NAMES, moments[1:])))
        if means is not None:
            _arrays.check_running_apart(
                running_mean, running_var, target, *canonical.given.values())
        found = train(canonical.x, axis, canonical.residual, canonical.out, &options, weights,
                      biases, batch, mask, means, vars, given_back, batches, canonical)
        if found is None:
            _arrays.refuse_uncommon()
    if out is None:
        return found if x is given else (_arrays.in_order_of(given, found[0]), found[1])
    return out, found[1]


cdef object train(object x, object axis, object residual, object out, Training *options,
                  object weight, object bias, tuple batch, object mask, object means, object vars,
                  tuple given_back, object counter, object canonical):
    """`forward` of arrays; None if they are not the common case.  canonical, if given, writes the
    result back before any statistic changes.  means and vars are copied to the two arrays of
    given_back, which are None for statistics that are not copies."""
    cdef bnf_call one
    cdef bnf_call *calls
    cdef bnf_call *call
    cdef bnf_shape shape
    cdef int threads
    cdef Py_ssize_t i, runs, channels
    cdef double count = 0
    if not read_shape(x, axis, &shape):
        return None
    channels = shape.channels
    weights = None if mask is None else _masks.arrange(mask, x, axis)
    if options.is_part:
        check_part(batch[0], shape.outer * shape.inner, weights)
    else:
        check_sizes(x, options.rows, shape.outer * shape.inner, weights)
    threads = most_threads(<cnp.ndarray>x)
    y = new_like(<cnp.ndarray>x) if out is None else out
    runs = runs_of(<cnp.ndarray>x, options.rows)
    if runs > 1:
        threads = min(threads, bnf_useful_threads(2 * cnp.PyArray_NBYTES(<cnp.ndarray>x)))
    mean, var, inv_std = new_stats(<cnp.ndarray>x, channels, runs, options)
    calls = call = new_calls(&one, runs)
    try:
        if not (look_forward(call, x, axis, residual, y) and same_shape(call.shape, shape)
                and read_weights(call, weights)):
            return None
        if means is not None:
            check_updated(means, vars, given_back, <cnp.ndarray>x, channels)
            if (overlap(means, vars) or touches(means, x, residual, out, weight, bias)
                    or touches(vars, x, residual, out, weight, bias)):
                _arrays.check_running_apart(means, vars, x, residual, out, weight, bias)
                _arrays.refuse_uncommon()
        if counter is not None and read_counter(counter) > INT64_MAX - runs:
            _arrays.check_room(counter, runs)
        call.direction, call.eps = BNF_FORWARD, options.eps
        call.has_moments, call.count = options.is_part, options.count
        call.activation, call.slope = options.act.code, options.act.slope
        split(calls, runs, <cnp.ndarray>x, options.rows, threads)
        for i in range(runs):
            call = &calls[i]
            if means is not None and weights is not None and 0 < call.count <= options.ddof:
                _masks.refuse_light(call.count, options.ddof)
            read_parameter("weight", weight, channels, 1.0, call.weight, out)
            read_parameter("bias", bias, channels, 0.0, call.shift, out)
            if options.is_part:
                read_parameter(MOMENTS_NAMES[0], batch[1], channels, 0.0, call.mean, out)
                read_parameter(MOMENTS_NAMES[1], batch[2], channels, 0.0, call.m2, out)
            count += call.count
        stats = (batch[0] if options.is_part else count_of(weights, count), mean, var, inv_std)
        run_all(calls, runs, threads)
        for i in range(runs):
            call = &calls[i]
            if call.count > 0:
                copy_row(mean, call.mean, i, channels)
                copy_row(var, call.var, i, channels)
                copy_row(inv_std, call.inv_std, i, channels)
        found = (y if canonical is None else canonical.write_back(y), stats)
        for i in range(runs):
            move_running(&calls[i], <cnp.ndarray>x, means, vars, given_back, counter, options)
        return found
    finally:
        release_calls(calls, &one, runs)


cdef int check_part(object count, Py_ssize_t values, object weights) except -1:
    """Refuse moments of a batch that is smaller than x, or has one value per channel.  A count that
    is a float is a sum of weights."""
    cdef double number = count
    if (type(count) is int and number == 1) or (weights is None and number < values):
        _arrays.refuse_part(number, values)
    if weights is not None and number <= 0 and values > 0:
        _arrays.refuse_part(number, 0)
    return 0


cdef int check_sizes(object x, Py_ssize_t rows, Py_ssize_t values, object weights) except -1:
    """Refuse a batch, or a virtual one, that has one value per channel, or a mask of as few."""
    cdef Py_ssize_t i, n, each, counted, runs = runs_of(<cnp.ndarray>x, rows)
    if values == 0 or (weights is None and rows == 0 and values > 1):
        return 0
    n = cnp.PyArray_DIM(<cnp.ndarray>x, 0)
    if weights is None:   # the last run may be shorter
        if values // n * (n if rows == 0 else n - (runs - 1) * rows) == 1:
            _arrays.refuse_one_value(x.shape, rows)
        return 0
    each = values if rows == 0 else values // n * min(rows, n)
    for i in range(runs):
        counted = weights.counted(i * each, min(i * each + each, values))
        if counted < 2:
            _masks.refuse_few(counted, x.shape)
    return 0


cdef tuple new_stats(cnp.ndarray x, Py_ssize_t channels, Py_ssize_t runs, Training *options):
    """Mean, var and inv_std, to be filled; NaN for an empty batch."""
    cdef cnp.npy_intp[2] sizes
    cdef bint is_empty = cnp.PyArray_SIZE(x) == 0 and not options.is_part
    cdef int axes = 1 if options.rows == 0 else 2
    if is_empty and not bnf_is_countable(channels, 0):
        raise MemoryError
    sizes[0], sizes[1] = runs, channels
    mean = cnp.PyArray_EMPTY(axes, sizes + (2 - axes), cnp.NPY_DOUBLE, 0)
    var = cnp.PyArray_EMPTY(axes, sizes + (2 - axes), cnp.NPY_DOUBLE, 0)
    inv_std = cnp.PyArray_EMPTY(axes, sizes + (2 - axes), cnp.NPY_DOUBLE, 0)
    if is_empty:
        mean.fill(np.nan), var.fill(np.nan), inv_std.fill(np.nan)
    return mean, var, inv_std


def moved_average(old, new, double momentum):
    """(1 - momentum) * old + momentum * new of float64 vectors: the running update."""
    cdef cnp.ndarray moved = np.array(old, np.float64)
    cdef cnp.ndarray batch = np.ascontiguousarray(new, np.float64)
    if cnp.PyArray_NDIM(moved) != 1 or not cnp.PyArray_SAMESHAPE(moved, batch):
        raise ValueError(f"shapes are {np.shape(old)} and {np.shape(new)}; expected one row each")
    bnf_move_averages(<double *>cnp.PyArray_DATA(moved), <const double *>cnp.PyArray_DATA(batch),
                      momentum, cnp.PyArray_DIM(moved, 0))
    return moved


def inv_std(var, double eps):
    """1 / sqrt(var + eps) of a float64 vector, as the driver computes it."""
    cdef cnp.ndarray found = np.array(var, np.float64)
    bnf_invert_std(<double *>cnp.PyArray_DATA(found), eps, cnp.PyArray_SIZE(found))
    return found


cdef int move_running(bnf_call *call, cnp.ndarray x, object means, object vars, tuple given_back,
                      object counter, Training *options) except -1:
    """Update running statistics and counter, if given: all of them or none.  They are checked
    again, since Python code may have run in between."""
    cdef bnf_running running
    cdef int64_t batches = 0
    cdef double momentum = options.momentum
    if means is not None:
        check_updated(means, vars, given_back, x, call.shape.channels)
    if counter is not None:
        batches = read_counter(counter)
        if options.cumulative:
            momentum = 1.0 / (<double>batches + 1.0)
    if means is not None and call.count > 0:
        running.mean, running.var = data_of(means), data_of(vars)
        running.wide_mean = cnp.PyArray_TYPE(<cnp.ndarray>means) == cnp.NPY_DOUBLE
        running.wide_var = cnp.PyArray_TYPE(<cnp.ndarray>vars) == cnp.NPY_DOUBLE
        bnf_move_running(call, running, momentum, options.ddof)
        if given_back[0] is not None:
            cnp.PyArray_CopyInto(given_back[0], means)
        if given_back[1] is not None:
            cnp.PyArray_CopyInto(given_back[1], vars)
    if counter is not None:
        count_batch(counter, batches)
    return 0


# --- Backward -----------------------------------------------------------------------------------

SUMS_NAMES = ("sums[0]", "sums[1]")


cdef struct Backward:
    Activation act
    double count
    bint needs_x, needs_weight, needs_bias, needs_residual
    bint is_part   # x is a part of the batch whose sums are given
    Py_ssize_t rows   # of a virtual batch; 0: all


def backward(dy, x, mean, inv_std, count, weight, bias, axis, residual, activation, y, out,
             needs, sums=None, mask=None, virtual_batch_size=None):
    """(dx, dweight, dbias, dresidual); None for those that needs, four bools, does not ask for.

    With count 0 the statistics are constants: no gradient flows through them.  sums are (dweight,
    dbias) of a batch of count values that x is a part of; nothing is then summed here.
    """
    cdef Backward options
    if dy is None:
        raise TypeError("dy is None; expected the gradient of the output, shaped as x")
    options.act, options.is_part = read_activation(activation), sums is not None
    if y is not None and residual is None and not bnf_is_from_output(options.act.code):
        _arrays.refuse_output(bnf_activation_name(options.act.code).decode())
    options.count = read_count("stats.count", count)
    options.rows = read_run(virtual_batch_size)
    options.needs_x, options.needs_weight, options.needs_bias, options.needs_residual = needs
    axis, dy, x, mask = as_axis(axis), as_array("dy", dy), as_array("x", x), as_mask(mask)
    residual, y, target = as_array("residual", residual), as_array("y", y), as_target("out", out)
    given = x
    if options.rows > 0:
        _options.check_runs(x, axis, "sums" if options.is_part else None)
        if not has_rows_first(x):
            x = np.ascontiguousarray(x)
        runs = runs_of(<cnp.ndarray>x, options.rows) if np.ndim(x) > 0 else 0
        mean = _arrays.rows("stats.mean", mean, target, runs)
        inv_std = _arrays.rows("stats.inv_std", inv_std, target, runs)
    vectors = (as_vector("stats.mean", mean, target), as_vector("stats.inv_std", inv_std, target),
               as_vector("weight", weight, target), as_vector("bias", bias, target),
               None if sums is None else as_vector(SUMS_NAMES[0], sums[0], target),
               None if sums is None else as_vector(SUMS_NAMES[1], sums[1], target))
    found = differentiate(dy, x, axis, residual, y, target, &options, vectors, mask)
    if found is None:
        canonical = _arrays.Canonical(x, axis, residual=residual, dy=dy, y=y, out=target,
                                      out_may_be=("x", "dy"))
        _arrays.check_parameters_apart(
            target, weight=weight, bias=bias, **{"stats.mean": mean, "stats.inv_std": inv_std})
        if sums is not None:
            _arrays.check_parameters_apart(target, **dict(zip(SUMS_NAMES, sums, strict=True)))
        found = differentiate(canonical.dy, canonical.x, axis, canonical.residual, canonical.y,
                              canonical.out, &options, vectors, mask)
        if found is None:
            _arrays.refuse_uncommon()
        if options.needs_x:
            found = (canonical.write_back(found[0]), *found[1:])
    if x is not given:
        found = (_arrays.in_order_of(given, found[0]), found[1], found[2],
                 _arrays.in_order_of(given, found[3]))
    return found if out is None or not options.needs_x else (out, *found[1:])


cdef bint look_backward(bnf_call *call, object dy, object x, object axis, object residual,
                        object y, object out) noexcept:
    """Take shape, type and pointers of a backward's inputs; False if they are not the common case.
    """
    if not (read_shape(x, axis, &call.shape) and is_like(dy, <cnp.ndarray>x)
            and (residual is None or is_like(residual, <cnp.ndarray>x))
            and (y is None or is_like(y, <cnp.ndarray>x))
            and (out is None or (is_target(out, <cnp.ndarray>x) and apart(<cnp.ndarray>out, x)
                                 and apart(<cnp.ndarray>out, dy)
                                 and not overlaps(<cnp.ndarray>out, residual)
                                 and not overlaps(<cnp.ndarray>out, y)))):
        return False
    call.type = <bnf_type>type_of(<cnp.ndarray>x)
    call.dy, call.x, call.residual, call.output = (
        data_of(dy), data_of(x), data_of(residual), data_of(y))
    return True


cdef object differentiate(object dy, object x, object axis, object residual, object y, object out,
                          Backward *options, tuple vectors, object mask):
    """`backward` of arrays; None if they are not the common case."""
    cdef bnf_call one
    cdef bnf_call *calls
    cdef bnf_call *call
    cdef bnf_shape shape
    cdef int threads
    cdef Py_ssize_t i, runs, channels
    if not read_shape(x, axis, &shape):
        return None
    channels = shape.channels
    weights = None if mask is None else _masks.arrange(mask, x, axis)
    threads = most_threads(<cnp.ndarray>x)
    dx = None if not options.needs_x else new_like(<cnp.ndarray>x) if out is None else out
    dresidual = new_like(<cnp.ndarray>x) if options.needs_residual else None
    dweight = new_vector(channels) if options.needs_weight else None
    dbias = new_vector(channels) if options.needs_bias else None
    found = (dx, dweight, dbias, dresidual)
    runs = runs_of(<cnp.ndarray>x, options.rows)
    if runs > 1:
        threads = min(threads, bnf_useful_threads(3 * cnp.PyArray_NBYTES(<cnp.ndarray>x)))
    calls = call = new_calls(&one, runs)
    try:
        if (not look_backward(call, dy, x, axis, residual, y, out)
                or not same_shape(call.shape, shape) or not read_weights(call, weights)
                or not (dx is None or is_like(dx, <cnp.ndarray>x))
                or not (dresidual is None or is_like(dresidual, <cnp.ndarray>x))):
            return None
        call.direction, call.count = BNF_BACKWARD, options.count
        call.activation, call.slope = options.act.code, options.act.slope
        call.dx, call.dresidual = data_of(dx), data_of(dresidual)
        call.has_sums = options.is_part
        call.gathers = not options.is_part and (options.needs_weight or options.needs_bias
                                                or (options.needs_x and options.count != 0))
        split(calls, runs, <cnp.ndarray>x, options.rows, threads)
        check_counts(calls, runs, options)
        for i in range(runs):
            call = &calls[i]
            read_row("stats.mean", vectors[0], i, runs, channels, 0.0, call.mean, out)
            read_row("stats.inv_std", vectors[1], i, runs, channels, 1.0, call.inv_std, out)
            read_parameter("weight", vectors[2], channels, 1.0, call.weight, out)
            read_parameter("bias", vectors[3], channels, 0.0, call.shift, out)
            if options.is_part:
                read_parameter(SUMS_NAMES[0], vectors[4], channels, 0.0, call.dweight, out)
                read_parameter(SUMS_NAMES[1], vectors[5], channels, 0.0, call.dbias, out)
        run_all(calls, runs, threads)
        bnf_add_gradients(calls, runs)
        if dweight is not None:
            copy_sums(dweight, calls.dweight, runs)
        if dbias is not None:
            copy_sums(dbias, calls.dbias, runs)
        return found
    finally:
        release_calls(calls, &one, runs)


cdef inline bint is_near(double a, double b) noexcept:
    """Whether sums of the same weights, perhaps in another order, may differ so."""
    return abs(a - b) <= 1e-9 * b


cdef int check_counts(bnf_call *calls, Py_ssize_t runs, Backward *options) except -1:
    """Refuse statistics of a batch of another size, and give each run its own size."""
    cdef Py_ssize_t i
    cdef bnf_call *call
    cdef double count = 0
    for i in range(runs):
        call = &calls[i]
        if options.count != 0 and not options.is_part:
            call.count = bnf_call_weight(call)
        count += bnf_call_weight(call)
    if not (options.count >= count or calls.weights != NULL if options.is_part
            else options.count == 0 or options.count == count
            or (calls.weights != NULL and is_near(options.count, count))):
        _arrays.refuse_batch_size(options.count, count, options.is_part)
    return 0


cdef void copy_sums(cnp.ndarray vector, const double *values, Py_ssize_t runs) noexcept:
    if runs > 0:
        copy_numbers(vector, values)
    else:
        memset(cnp.PyArray_DATA(vector), 0, cnp.PyArray_NBYTES(vector))


cdef int read_row(str name, object vector, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t channels,
                  double missing, double *to, object out) except -1:
    """`read_parameter` of one of several rows, which are in one vector."""
    cdef cnp.ndarray a
    if rows == 1 or vector is None:
        return read_parameter(name, vector, channels, missing, to, out)
    a = <cnp.ndarray>vector
    if not (is_vector_of(a, rows * channels) and cnp.PyArray_TYPE(a) == cnp.NPY_DOUBLE):
        _arrays.refuse_rows(name, a, rows, channels)
    memcpy(to, <const double *>cnp.PyArray_DATA(a) + row * channels, channels * sizeof(double))
    return 0
