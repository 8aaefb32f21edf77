/* Exported functions of instances on wasmtime: Python's numbers become wasm's, one entry runs the call, and the results come back. */
#include <string.h>

#include "fast.h"

/* Kinds of values, as hosts/wasmtime/values.py numbers them. Functions with references are called by wasmtime-py. */
enum { I32, I64, F32, F64, V128 };

enum { VALUE = 16 }; /* bytes of one */

/* An exported function, as all instances of a guest share it. */
typedef struct {
    PyObject_HEAD
    PyObject *name;       /* bytes, UTF-8 */
    PyObject *parameters; /* bytes: a kind each */
    PyObject *results;
    PyObject *fitted; /* returns a tuple of arguments as a list of plain numbers and bytes, or raises ArgumentError */
    PyObject *kept;   /* exceptions on their way through wasmtime, by number */
} Export;

/* An exported function of one instance. */
typedef struct {
    PyObject_HEAD
    Export *export;
    PyObject *settle; /* raises the exception of an outcome */
    PyObject *owner;  /* of the cell */
    ms_wt_cell *cell;
    int found; /* `function` is known */
    uint64_t function[2];
} Function;

static PyObject *attribute_address, *attribute_cell, *attribute_settle;
static PyTypeObject *function_type;

/* ---- values ---- */

/* After an exception: 0 if it says that the value is of another type or too large, which `fitted` has to judge, else -1. */
static int not_put(void)
{
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return -1;
    PyErr_Clear();
    return 0;
}

static int put_integer(int bits, PyObject *value, uint8_t *at)
{
    int overflow;
    /* Takes an `__index__`, too: `fitted` would take no other float beside it than Python's own. May run Python. */
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (number == -1 && PyErr_Occurred())
        return not_put();
    if (overflow)
        return 0;
    if (bits == 32) {
        if (number < INT32_MIN || number > UINT32_MAX)
            return 0;
        uint32_t low = (uint32_t)number; /* signed or unsigned, as given */
        memcpy(at, &low, sizeof low);
    } else {
        memcpy(at, &number, sizeof number);
    }
    return 1;
}

static int put_float(int bits, PyObject *value, uint8_t *at)
{
    double number = PyFloat_AsDouble(value); /* may run Python */
    if (number == -1.0 && PyErr_Occurred())
        return not_put();
    if (bits == 32) {
        float single = (float)number;
        memcpy(at, &single, sizeof single);
    } else {
        memcpy(at, &number, sizeof number);
    }
    return 1;
}

/* Writes a value of that kind: 1, 0 if `fitted` has to judge it, or -1 with an exception. */
static int put_value(char kind, PyObject *value, uint8_t *at)
{
    memset(at, 0, VALUE);
    switch (kind) {
    case I32:
        return put_integer(32, value, at);
    case I64:
        return put_integer(64, value, at);
    case F32:
        return put_float(32, value, at);
    case F64:
        return put_float(64, value, at);
    default:
        if (!PyBytes_Check(value) || PyBytes_Size(value) != VALUE)
            return 0;
        memcpy(at, PyBytes_AsString(value), VALUE);
        return 1;
    }
}

static PyObject *get_value(char kind, const uint8_t *at)
{
    int32_t i32;
    int64_t i64;
    float f32;
    double f64;
    switch (kind) {
    case I32:
        memcpy(&i32, at, sizeof i32);
        return PyLong_FromLong(i32);
    case I64:
        memcpy(&i64, at, sizeof i64);
        return PyLong_FromLongLong(i64);
    case F32:
        memcpy(&f32, at, sizeof f32);
        return PyFloat_FromDouble(f32);
    case F64:
        memcpy(&f64, at, sizeof f64);
        return PyFloat_FromDouble(f64);
    default:
        return PyBytes_FromStringAndSize((const char *)at, VALUE);
    }
}

/* Writes the arguments after the first: 1, 0 if `fitted` has to judge them, or -1 with an exception. */
static int put_plain(const Export *export, PyObject *arguments, uint8_t *values)
{
    Py_ssize_t count = PyBytes_Size(export->parameters);
    const char *kinds = PyBytes_AsString(export->parameters);
    if (PyTuple_Size(arguments) != count + 1)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        int done = put_value(kinds[i], PyTuple_GetItem(arguments, i + 1), values + VALUE * i);
        if (done != 1)
            return done;
    }
    return 1;
}

/* Writes what `fitted` makes of the arguments: 1, or -1 with an exception. */
static int put_fitted(const Export *export, PyObject *arguments, uint8_t *values)
{
    PyObject *given = PyTuple_GetSlice(arguments, 1, PyTuple_Size(arguments));
    PyObject *fitted = given ? PyObject_CallFunctionObjArgs(export->fitted, given, NULL) : NULL;
    Py_XDECREF(given);
    if (!fitted)
        return -1;
    Py_ssize_t count = PyBytes_Size(export->parameters);
    const char *kinds = PyBytes_AsString(export->parameters);
    int done = PyList_Size(fitted) == count;
    for (Py_ssize_t i = 0; done == 1 && i < count; i++)
        done = put_value(kinds[i], PyList_GetItem(fitted, i), values + VALUE * i);
    Py_DECREF(fitted);
    if (!done)
        PyErr_SetString(PyExc_SystemError, "arguments that were fitted do not fit");
    return done == 1 ? 1 : -1;
}

static PyObject *results_of(const Export *export, const uint8_t *values)
{
    Py_ssize_t count = PyBytes_Size(export->results);
    const char *kinds = PyBytes_AsString(export->results);
    if (count == 0)
        Py_RETURN_NONE;
    if (count == 1)
        return get_value(kinds[0], values);
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *value = get_value(kinds[i], values + VALUE * i);
        if (!value)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, value);
    }
    return list;
}

/* ---- calls ---- */

static void forget(PyObject *kept, int64_t exception)
{
    PyObject *number = exception ? PyLong_FromLongLong(exception) : NULL;
    if (number && PyDict_DelItem(kept, number))
        PyErr_Clear(); /* nearly always: `settle` took it */
    Py_XDECREF(number);
}

/* Has `settle` take over an outcome: 0, or -1 with its exception. */
static int take(const Function *self, uintptr_t outcome)
{
    int64_t raised = ((ms_wt_outcome *)outcome)->raised, deferred = ((ms_wt_outcome *)outcome)->deferred;
    PyObject *number = PyLong_FromVoidPtr((void *)outcome);
    PyObject *settled = number ? PyObject_CallFunctionObjArgs(self->settle, number, NULL) : NULL;
    Py_XDECREF(number);
    if (settled) {
        Py_DECREF(settled);
        return 0;
    }
    /* A signal's handler may have raised before `settle` took them: they would keep the instance, and its slot, for ever. */
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    forget(self->export->kept, raised);
    forget(self->export->kept, deferred);
    PyErr_Restore(type, value, traceback);
    return -1;
}

/* The values are this call's own: a host function may call again, and so may an argument's `__float__`. */
static PyObject *call_with(Function *self, PyObject *arguments, uint64_t generation, ms_wt_callee *callee)
{
    uint8_t *values = callee->values ? callee->values : callee->room;
    int done = put_plain(self->export, arguments, values);
    if (done == 0)
        done = put_fitted(self->export, arguments, values);
    if (done < 0)
        return NULL;
    PyThreadState *thread = PyEval_SaveThread();
    uintptr_t outcome = fast_core.call(callee, generation);
    PyEval_RestoreThread(thread);
    if (callee->found) {
        memcpy(self->function, callee->function, sizeof self->function);
        self->found = 1;
    }
    if (outcome && take(self, outcome))
        return NULL;
    return results_of(self->export, values);
}

static PyObject *call(PyObject *object, PyObject *arguments, PyObject *named)
{
    Function *self = (Function *)object;
    if (PyTuple_Size(arguments) < 1 || (named && PyDict_Size(named)))
        return PyErr_Format(PyExc_TypeError, "an exported function takes the lease and numbers, and no keywords");
    uint64_t generation = PyLong_AsUnsignedLongLong(PyTuple_GetItem(arguments, 0));
    if (generation == (uint64_t)-1 && PyErr_Occurred())
        return NULL;
    Py_ssize_t parameters = PyBytes_Size(self->export->parameters), results = PyBytes_Size(self->export->results);
    ms_wt_callee callee; /* `room` is written as far as it is read */
    callee.cell = self->cell;
    callee.name = PyBytes_AsString(self->export->name);
    callee.length = (size_t)PyBytes_Size(self->export->name);
    callee.values = NULL;
    callee.count = (size_t)(parameters > results ? parameters : results);
    callee.found = self->found;
    memcpy(callee.function, self->function, sizeof callee.function);
    if (callee.count > MS_WT_ROOM && !(callee.values = PyMem_Malloc(VALUE * callee.count)))
        return PyErr_NoMemory();
    PyObject *result = call_with(self, arguments, generation, &callee);
    PyMem_Free(callee.values);
    return result;
}

/* ---- the types ---- */

static PyObject *new_export(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    (void)named;
    PyObject *name, *parameters, *results, *fitted, *kept;
    if (!PyArg_ParseTuple(arguments, "SSSOO!:Export", &name, &parameters, &results, &fitted, &PyDict_Type, &kept))
        return NULL;
    Export *self = (Export *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->name = Py_NewRef(name);
    self->parameters = Py_NewRef(parameters);
    self->results = Py_NewRef(results);
    self->fitted = Py_NewRef(fitted);
    self->kept = Py_NewRef(kept);
    return (PyObject *)self;
}

static PyObject *bind(PyObject *object, PyObject *live)
{
    Function *self = (Function *)PyType_GenericAlloc(function_type, 0);
    if (!self)
        return NULL;
    self->export = (Export *)Py_NewRef(object);
    self->owner = PyObject_GetAttr(live, attribute_cell);
    self->settle = PyObject_GetAttr(live, attribute_settle);
    PyObject *address = PyObject_GetAttr(live, attribute_address);
    if (address)
        self->cell = PyLong_AsVoidPtr(address);
    Py_XDECREF(address);
    if (!self->owner || !self->settle || !self->cell) {
        Py_DECREF(self);
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "an instance without a cell");
    }
    return (PyObject *)self;
}

static int traverse_export(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((Export *)object)->fitted);
    Py_VISIT(((Export *)object)->kept);
    return 0;
}

static int clear_export(PyObject *object)
{
    Export *self = (Export *)object;
    Py_CLEAR(self->fitted);
    return 0;
}

static void dealloc_export(PyObject *object)
{
    Export *self = (Export *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    clear_export(object);
    Py_XDECREF(self->name);
    Py_XDECREF(self->parameters);
    Py_XDECREF(self->results);
    Py_XDECREF(self->kept);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static int traverse_function(PyObject *object, visitproc visit, void *arg)
{
    Function *self = (Function *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->export);
    Py_VISIT(self->settle);
    Py_VISIT(self->owner);
    return 0;
}

/* Leaves `export` and `owner`, which a call uses: neither refers to the function. */
static int clear_function(PyObject *object)
{
    Py_CLEAR(((Function *)object)->settle);
    return 0;
}

static void dealloc_function(PyObject *object)
{
    Function *self = (Function *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    clear_function(object);
    Py_XDECREF(self->export);
    Py_XDECREF(self->owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef export_methods[] = {
    {"bind", bind, METH_O,
     PyDoc_STR("bind($self, live, /)\n--\n\n"
               "Return the function of one live instance, to be called with the generation of a handle and the\n"
               "arguments.  Takes `cell`, its `address` and `settle` from the instance.")},
    {0},
};

static PyType_Slot export_slots[] = {
    {Py_tp_doc, PyDoc_STR("Export(name, parameters, results, fitted, kept, /)\n--\n\n"
                          "A function that a guest on wasmtime exports: its name in UTF-8, and kinds of numbers as bytes.\n\n"
                          "`fitted` takes a tuple of arguments that are not plain numbers, and returns a list of those.\n"
                          "`kept` has the exceptions that pass through wasmtime, by number.")},
    {Py_tp_new, new_export},
    {Py_tp_traverse, traverse_export},
    {Py_tp_clear, clear_export},
    {Py_tp_dealloc, dealloc_export},
    {Py_tp_methods, export_methods},
    {0},
};

static PyType_Spec export_spec = {
    .name = "memslot_plugin._core._fast.Export",
    .basicsize = sizeof(Export),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = export_slots,
};

static PyType_Slot function_slots[] = {
    {Py_tp_doc, PyDoc_STR("An exported function of one instance: takes the generation of a handle, and Python numbers.")},
    {Py_tp_call, call},
    {Py_tp_traverse, traverse_function},
    {Py_tp_clear, clear_function},
    {Py_tp_dealloc, dealloc_function},
    {0},
};

static PyType_Spec function_spec = {
    .name = "memslot_plugin._core._fast.Function",
    .basicsize = sizeof(Function),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, /* `bind` alone makes one */
    .slots = function_slots,
};

int fast_add_functions(PyObject *module)
{
    attribute_address = PyUnicode_InternFromString("address");
    attribute_cell = PyUnicode_InternFromString("cell");
    attribute_settle = PyUnicode_InternFromString("settle");
    function_type = (PyTypeObject *)PyType_FromSpec(&function_spec);
    PyObject *export_type = PyType_FromSpec(&export_spec);
    int failed = !attribute_address || !attribute_cell || !attribute_settle || !function_type || !export_type ||
                 PyModule_AddObjectRef(module, "Export", export_type);
    Py_XDECREF(export_type);
    return failed ? -1 : 0;
}
