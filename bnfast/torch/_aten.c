/* bnfast.torch._aten: register the kernels, and switch them on and off. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "aten_kernels.h"

/* Once per process, and by one thread at a time: at import, or with process.py's lock. Kernels are
 * never removed: another thread may be running one. */
static bool installed, replaced;

typedef struct {
    const char *operator;
    torch_kernel *kernel;
} entry;

static const entry OURS[] = {
    {"batch_norm_act", aten_batch_norm_act},
    {"batch_norm_act_backward", aten_batch_norm_act_backward},
    {NULL, NULL},
};

static const entry PYTORCHS[] = {
    {"native_batch_norm", aten_batch_norm},
    {"_native_batch_norm_legit", aten_batch_norm_legit},
    {"_native_batch_norm_legit.no_stats", aten_batch_norm_no_stats},
    {"native_batch_norm_backward", aten_batch_norm_backward},
    {NULL, NULL},
};

static PyObject *find_driver(void)
{
    const bnf_driver *driver = PyCapsule_Import("bnfast._core.driver", 0);
    if (!driver)
        return NULL;
    if (driver->call_size != sizeof(bnf_call)) {
        PyErr_SetString(PyExc_ImportError, "bnfast._core and bnfast.torch._aten are of two builds");
        return NULL;
    }
    aten_setup(driver);
    Py_RETURN_NONE;
}

/* Return true if they are registered, now or before. */
static bool register_kernels(const char *space, const entry *entries, bool *done)
{
    torch_library library;
    if (*done)
        return true;
    if (torch.library_init_impl(space, "CPU", "bnfast", 1, &library))
        return false;
    for (; entries->operator; entries++)
        if (torch.library_impl(library, entries->operator, entries->kernel, TORCH_ABI))
            return false;
    return *done = true;
}

static PyObject *install(PyObject *module, PyObject *args)
{
    (void)module;
    const char *path, *version;
    if (!PyArg_ParseTuple(args, "ss:install", &path, &version))
        return NULL;
    const char *missing = torch_find(path);
    if (missing)
        return PyErr_Format(PyExc_ImportError, "PyTorch %s has no %s, which bnfast's kernels need",
                            version, missing);
    if (installed)
        Py_RETURN_NONE;
    PyObject *found = find_driver();
    if (!found)
        return NULL;
    Py_DECREF(found);
    if (!register_kernels("bnfast", OURS, &installed))
        return PyErr_Format(PyExc_RuntimeError, "PyTorch %s does not take bnfast's kernels: %s",
                            version, torch.what());
    Py_RETURN_NONE;
}

static PyObject *replace(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    if (!register_kernels("aten", PYTORCHS, &replaced))
        return PyErr_Format(PyExc_RuntimeError, "PyTorch does not take bnfast's kernels: %s",
                            torch.what());
    Py_RETURN_NONE;
}

static PyObject *switch_to(PyObject *module, PyObject *on)
{
    (void)module;
    const int truth = PyObject_IsTrue(on);
    return truth < 0 ? NULL : PyBool_FromLong(aten_switch(truth));
}

#if defined(Py_LIMITED_API) && Py_LIMITED_API < 0x030C0000
/* Without PyObject_Vectorcall, which the stable ABI has since Python 3.12. */
static PyObject *call(PyObject *callable, PyObject *const *args, Py_ssize_t number)
{
    PyObject *arguments = PyTuple_New(number);
    for (Py_ssize_t i = 0; arguments && i < number; i++) {
        Py_INCREF(args[i]);
        PyTuple_SetItem(arguments, i, args[i]);
    }
    PyObject *result = arguments ? PyObject_CallObject(callable, arguments) : NULL;
    Py_XDECREF(arguments);
    return result;
}
#else
static PyObject *call(PyObject *callable, PyObject *const *args, Py_ssize_t number)
{
    return PyObject_Vectorcall(callable, args, (size_t)number, NULL);
}
#endif

static PyObject *run_here(PyObject *module, PyObject *const *args, Py_ssize_t number)
{
    (void)module;
    if (number < 1)
        return PyErr_Format(PyExc_TypeError, "run_here() takes a callable and its arguments");
    const bool before = aten_switch_here(true);
    PyObject *result = call(args[0], args + 1, number - 1);
    aten_switch_here(before);
    return result;
}

static PyObject *is_on(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    return PyBool_FromLong(aten_is_on());
}

static bool add_count(PyObject *ran, PyObject *left, aten_outcome outcome, const char *text)
{
    const long long calls = aten_count(outcome);
    PyObject *number = PyLong_FromLongLong(calls);
    const bool added =
        number &&
        (calls == 0 || !PyDict_SetItemString(outcome < LEFT_OFF ? ran : left, text, number));
    Py_XDECREF(number);
    return added;
}

static PyObject *counts(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    PyObject *ran = PyDict_New(), *left = PyDict_New(), *both = NULL;
#define ADD_COUNT(outcome, text) &&add_count(ran, left, outcome, text)
    if (ran && left ATEN_OUTCOMES(ADD_COUNT))
        both = PyTuple_Pack(2, ran, left);
    Py_XDECREF(ran);
    Py_XDECREF(left);
    return both;
}

static PyObject *forget_counts(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    aten_forget_counts();
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"install", install, METH_VARARGS,
     "install(library, version): find PyTorch and register bnfast's own operators, once"},
    {"replace", replace, METH_NOARGS, "Register kernels for PyTorch's operators, once."},
    {"switch_to", switch_to, METH_O, "switch_to(on): whether calls run here; what it was"},
    {"run_here", (PyCFunction)(void (*)(void))run_here, METH_FASTCALL,
     "run_here(call, *args): call it; what it runs in this thread runs here"},
    {"is_on", is_on, METH_NOARGS, "Whether calls run here."},
    {"counts", counts, METH_NOARGS, "({what ran: calls}, {why calls were left: calls})"},
    {"forget_counts", forget_counts, METH_NOARGS, "Count from nothing again."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    "_aten",
    "PyTorch's batch norm operators.",
    -1,
    METHODS,
    NULL,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__aten(void)
{
    PyObject *module = PyModule_Create(&MODULE);
#ifdef Py_GIL_DISABLED
    if (module && PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED))
        Py_CLEAR(module);
#endif
    return module;
}
