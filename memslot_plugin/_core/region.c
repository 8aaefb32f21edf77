/* The reset of a region, and the reset in place of an instance on wasmtime; the module itself. */
#include <unistd.h>

#include "fast.h"

/* Keep the GIL if this slot's previous reset took less: handing it over takes longer than that.  ms_reset_fast calls
 * `before_long` and so releases it all the same once it has found many pages. */
enum { BRIEF_NANOSECONDS = 5000 };

struct fast_core fast_core;
static PyObject *dirty, *clean, *result_type, *slow_reset, *pagemap, *no_reason;
static size_t page;

typedef struct {
    PyObject_HEAD
    PyObject *state;
    PyObject *strategy;
    Py_ssize_t initial;
    unsigned long long fast_resets;
    ms_slot core;
} Region;

static void put(PyObject **place, PyObject *value)
{
    PyObject *before = *place;
    Py_INCREF(value);
    *place = value; /* before the decrement, which may run a finalizer that looks here */
    Py_XDECREF(before);
}

static _Thread_local PyThreadState *released;

static void release_gil(void)
{
    if (!released) /* another thread that resets this slot, too, may have set `before_long` since */
        released = PyEval_SaveThread();
}

/* Run the core's reset; other threads run meanwhile if it takes long. */
static int run_fast(ms_slot *slot)
{
    if (slot->report.nanoseconds < BRIEF_NANOSECONDS)
        slot->before_long = release_gil;
    else
        release_gil();
    int answer = fast_core.reset_fast(slot);
    slot->before_long = NULL;
    if (released) {
        PyEval_RestoreThread(released);
        released = NULL;
    }
    return answer;
}

/* Reset by the fast path if Python need not be asked, else by Slot._slow_reset, whose result is returned.  Py_None stands for
 * "done on the fast path", which leaves `state` to the caller; NULL for an exception. */
static PyObject *reset_either_way(Region *self, PyObject *strategy)
{
    int answer = MS_NOT_TRIED;
    /* A grown memory must shrink, which is Python's; a reset of what is not dirty is refused there. Compare `strategy` too: a
     * slot whose file has grown has none, and `accessible` does not count that file (extension.py). */
    if (self->state == dirty && self->strategy == strategy && self->core.memory.accessible == (size_t)self->initial)
        answer = run_fast(&self->core);
    if (answer == MS_FAST) {
        self->fast_resets++;
        Py_RETURN_NONE;
    }
    PyObject *number = PyLong_FromLong(answer);
    PyObject *result = number ? PyObject_CallMethodObjArgs((PyObject *)self, slow_reset, strategy, number, NULL) : NULL;
    Py_XDECREF(number);
    return result;
}

static PyObject *reset(PyObject *object, PyObject *strategy)
{
    Region *self = (Region *)object;
    PyObject *result = reset_either_way(self, strategy);
    if (result != Py_None)
        return result;
    Py_DECREF(result);
    put(&self->state, clean);
    /* ResetResult is a tuple of four; its own constructor costs more than the rest of this function. */
    result = PyType_GenericAlloc((PyTypeObject *)result_type, 4);
    PyObject *dirty_bytes = PyLong_FromSize_t(self->core.report.dirty_pages * page);
    PyObject *nanoseconds = PyLong_FromUnsignedLongLong(self->core.report.nanoseconds);
    if (!result || !dirty_bytes || !nanoseconds) {
        Py_XDECREF(result);
        Py_XDECREF(dirty_bytes);
        Py_XDECREF(nanoseconds);
        return NULL;
    }
    Py_INCREF(pagemap);
    Py_INCREF(no_reason);
    PyTuple_SetItem(result, 0, dirty_bytes);
    PyTuple_SetItem(result, 1, nanoseconds);
    PyTuple_SetItem(result, 2, pagemap);
    PyTuple_SetItem(result, 3, no_reason);
    return result;
}

static PyObject *reset_in_lease(PyObject *object, PyObject *strategy)
{
    Region *self = (Region *)object;
    PyObject *result = reset_either_way(self, strategy);
    if (!result || result == Py_None) /* the fast path leaves the state dirty, as the lease goes on */
        return result;
    Py_DECREF(result);
    put(&self->state, dirty);
    Py_RETURN_NONE;
}

static PyObject *install(PyObject *module, PyObject *arguments)
{
    (void)module;
    unsigned long long at[6];
    PyObject *given[3];
    if (!PyArg_ParseTuple(arguments, "KKKKKKOOO:install", &at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &given[0],
                          &given[1], &given[2]))
        return NULL;
    fast_core = (struct fast_core){
        (int (*)(ms_slot *))(uintptr_t)at[0],
        (unsigned (*)(ms_wt_cell *, uint64_t, uintptr_t, const char *, size_t))(uintptr_t)at[1],
        (uintptr_t(*)(ms_wt_cell *, uint64_t, uint64_t, int))(uintptr_t)at[2],
        (int (*)(ms_wt_cell *, uint64_t, uintptr_t *))(uintptr_t)at[3],
        (uintptr_t(*)(ms_wt_cell *, uint64_t, ms_wt_global *, size_t))(uintptr_t)at[4],
        (uintptr_t(*)(ms_wt_callee *, uint64_t))(uintptr_t)at[5],
    };
    put(&dirty, given[0]);
    put(&clean, given[1]);
    put(&result_type, given[2]);
    Py_RETURN_NONE;
}

/* ---- forks ---- */

static const unsigned *forks, *forks_seen;
static PyObject *after_fork;

static PyObject *watch_forks(PyObject *module, PyObject *arguments)
{
    (void)module;
    unsigned long long at[2];
    PyObject *routine;
    if (!PyArg_ParseTuple(arguments, "KKO:watch_forks", &at[0], &at[1], &routine))
        return NULL;
    forks = (const unsigned *)(uintptr_t)at[0];
    forks_seen = (const unsigned *)(uintptr_t)at[1];
    put(&after_fork, routine);
    Py_RETURN_NONE;
}

static PyObject *catch_up(PyObject *module, PyObject *nothing)
{
    (void)module, (void)nothing;
    if (*forks != *forks_seen)
        return PyObject_CallNoArgs(after_fork);
    Py_RETURN_NONE;
}

/* ---- copies ---- */

/* A shorter copy takes less time than handing the GIL over. */
enum { SHORT_COPY = 1 << 16 };

static PyObject *read_bytes(PyObject *module, PyObject *arguments)
{
    (void)module;
    unsigned long long cell, generation, from;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(arguments, "KKKn:read", &cell, &generation, &from, &length))
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, length);
    if (!bytes)
        return NULL;
    uintptr_t to = (uintptr_t)PyBytes_AsString(bytes);
    PyThreadState *thread = length < SHORT_COPY ? NULL : PyEval_SaveThread();
    unsigned refused =
        fast_core.copy((ms_wt_cell *)(uintptr_t)cell, generation, to, (const char *)(uintptr_t)from, (size_t)length);
    if (thread)
        PyEval_RestoreThread(thread);
    if (!refused)
        return bytes;
    Py_DECREF(bytes);
    return PyLong_FromUnsignedLong(refused);
}

static PyObject *address(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromVoidPtr(&((Region *)object)->core);
}

static int traverse(PyObject *object, visitproc visit, void *arg)
{
    Region *self = (Region *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->state);
    Py_VISIT(self->strategy);
    return 0;
}

static int clear(PyObject *object)
{
    Region *self = (Region *)object;
    Py_CLEAR(self->state);
    Py_CLEAR(self->strategy);
    return 0;
}

static void dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    clear(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMemberDef members[] = {
    {"state", T_OBJECT_EX, offsetof(Region, state), 0, PyDoc_STR("The slot's state: all that is known of its bytes.")},
    {"strategy", T_OBJECT, offsetof(Region, strategy), 0,
     PyDoc_STR("The strategy whose limits the core has, so that it may reset this slot alone, or None.")},
    {"base", T_ULONGLONG, offsetof(Region, core.memory.base), 0, PyDoc_STR("The first address.")},
    {"accessible", T_PYSSIZET, offsetof(Region, core.memory.accessible), 0,
     PyDoc_STR("Bytes from base on that are readable and writable.")},
    {"initial", T_PYSSIZET, offsetof(Region, initial), 0, PyDoc_STR("Bytes that are accessible after a reset.")},
    {"fast_resets", T_ULONGLONG, offsetof(Region, fast_resets), 0, PyDoc_STR("Resets on the fast path so far.")},
    {0},
};

static PyGetSetDef properties[] = {
    {"address", address, NULL, PyDoc_STR("The address of the region's ms_slot."), NULL},
    {0},
};

static PyMethodDef methods[] = {
    {"reset", reset, METH_O,
     PyDoc_STR("reset($self, strategy, /)\n--\n\n"
               "Reset a dirty slot to clean, at its initial size; return a ResetResult.\n\n"
               "Only bytes `[0, accessible)` are touched, and mprotect(2) is called only if the memory had grown.\n"
               "Raises SlotError if the slot is not dirty, or if a runtime grew its own mapping, which cannot\n"
               "shrink; SystemCallError, after which the slot is unknown.")},
    {"reset_in_lease", reset_in_lease, METH_O,
     PyDoc_STR("reset_in_lease($self, strategy, /)\n--\n\n"
               "Reset a dirty slot whose lease goes on: it stays dirty, because its guest may write at once.\n\n"
               "Raises what `reset` raises.")},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, PyDoc_STR("The part of a region that is written in C.")},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0},
};

static PyType_Spec spec = {
    .name = "memslot_plugin._core._fast.Region",
    .basicsize = sizeof(Region),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

/* ---- the reset in place of an instance ---- */

typedef struct {
    PyObject_HEAD
    PyObject *keep;   /* what owns the cell and the globals */
    PyObject *resets; /* a tuple of calls without arguments, one for each memory */
    ms_wt_cell *cell;
    ms_wt_global *globals;
    size_t count;
} InstanceReset;

static PyObject *new_instance_reset(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    (void)named;
    unsigned long long cell, globals;
    Py_ssize_t count;
    PyObject *resets, *keep;
    if (!PyArg_ParseTuple(arguments, "KKnO!O:InstanceReset", &cell, &globals, &count, &PyTuple_Type, &resets, &keep))
        return NULL;
    InstanceReset *self = (InstanceReset *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->cell = (ms_wt_cell *)(uintptr_t)cell;
    self->globals = (ms_wt_global *)(uintptr_t)globals;
    self->count = (size_t)count;
    put(&self->resets, resets);
    put(&self->keep, keep);
    return (PyObject *)self;
}

static PyObject *run(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    InstanceReset *self = (InstanceReset *)object;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "run takes 3 arguments, not %zd", count);
    uint64_t generation = PyLong_AsUnsignedLongLong(arguments[0]), next = PyLong_AsUnsignedLongLong(arguments[1]);
    uint64_t key = PyLong_AsUnsignedLongLong(arguments[2]);
    if (PyErr_Occurred())
        return NULL;
    uintptr_t outcome = fast_core.acquire(self->cell, generation, key, 1);
    if (outcome)
        return PyLong_FromLongLong(-(long long)outcome);
    /* Read `changed` only after `acquire`: until then a call on another thread may set it. */
    int changed = self->cell->changed;
    Py_ssize_t memories = changed ? 0 : PyTuple_Size(self->resets);
    for (Py_ssize_t i = 0; i < memories; i++) {
        PyObject *done = PyObject_CallNoArgs(PyTuple_GetItem(self->resets, i));
        if (!done)
            return NULL; /* still acquired: the caller ends the instance */
        Py_DECREF(done);
    }
    if (changed)
        fast_core.release(self->cell, key, &outcome);
    else
        outcome = fast_core.restore(self->cell, next, self->globals, self->count);
    return outcome ? PyLong_FromVoidPtr((void *)outcome) : PyBool_FromLong(!changed);
}

static int traverse_instance_reset(PyObject *object, visitproc visit, void *arg)
{
    InstanceReset *self = (InstanceReset *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->keep);
    Py_VISIT(self->resets);
    return 0;
}

static int clear_instance_reset(PyObject *object)
{
    InstanceReset *self = (InstanceReset *)object;
    Py_CLEAR(self->keep);
    Py_CLEAR(self->resets);
    return 0;
}

static void dealloc_instance_reset(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    clear_instance_reset(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef instance_reset_methods[] = {
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL,
     PyDoc_STR("run($self, generation, next_generation, key, /)\n--\n\n"
               "Acquire the instance, reset its memories and restore its globals: True.\n\n"
               "False, and nothing happened, if the instance's cell says that only a new instance is pristine.\n"
               "A positive integer is the outcome of the restore or the release, a negative one, negated, that of a\n"
               "refusal.\n"
               "After an exception the instance is still acquired with `key`.")},
    {0},
};

static PyType_Slot instance_reset_slots[] = {
    {Py_tp_doc, PyDoc_STR("InstanceReset(cell, globals, count, resets, keep, /)\n--\n\n"
                          "The reset in place of one instance on wasmtime, as one call.")},
    {Py_tp_new, new_instance_reset},
    {Py_tp_traverse, traverse_instance_reset},
    {Py_tp_clear, clear_instance_reset},
    {Py_tp_dealloc, dealloc_instance_reset},
    {Py_tp_methods, instance_reset_methods},
    {0},
};

static PyType_Spec instance_reset_spec = {
    .name = "memslot_plugin._core._fast.InstanceReset",
    .basicsize = sizeof(InstanceReset),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = instance_reset_slots,
};

static PyMethodDef functions[] = {
    {"install", install, METH_VARARGS,
     PyDoc_STR("install($module, reset_fast, copy, acquire, release, restore, call, dirty, clean, result_type, /)\n--\n\n"
               "Set the addresses of ms_reset_fast and of five functions of the bridge, two states of a slot, and\n"
               "ResetResult.")},
    {"watch_forks", watch_forks, METH_VARARGS,
     PyDoc_STR("watch_forks($module, forks, forks_seen, routine, /)\n--\n\n"
               "Set the addresses of ms_forks and ms_forks_seen, and what `catch_up` calls.")},
    {"catch_up", catch_up, METH_NOARGS,
     PyDoc_STR("catch_up($module, /)\n--\n\n"
               "Run the routines of `after_fork` in a child that has not run them: a C library's fork(3) tells the\n"
               "core alone.  Call this before a lock is taken, or a mapping used, that may be the parent's.")},
    {"read", read_bytes, METH_VARARGS,
     PyDoc_STR("read($module, cell, generation, address, length, /)\n--\n\n"
               "Copy bytes of an instance's memory, or return the flag with which ms_wt_copy refused.")},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "memslot_plugin._core._fast",
    .m_doc = PyDoc_STR("The fast paths of requests."),
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__fast(void)
{
    page = (size_t)sysconf(_SC_PAGESIZE);
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = PyType_FromSpec(&spec);
    PyObject *instance_type = PyType_FromSpec(&instance_reset_spec);
    slow_reset = PyUnicode_InternFromString("_slow_reset");
    pagemap = PyUnicode_InternFromString("pagemap");
    no_reason = PyUnicode_InternFromString("");
    if (!module || !type || !instance_type || !slow_reset || !pagemap || !no_reason ||
        PyModule_AddObjectRef(module, "Region", type) || PyModule_AddObjectRef(module, "InstanceReset", instance_type) ||
        fast_add_functions(module))
        Py_CLEAR(module);
    Py_XDECREF(type);
    Py_XDECREF(instance_type);
    return module;
}
