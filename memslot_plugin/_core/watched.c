/* The base of memslot_plugin.memory.slot.Slot: the reset of almost every request, without a frame of Python's.
 *
 * A module of its own, because what cffi makes takes no object of Python's.  It makes no system call: the core's function is
 * given to it by its address, so that there is one gate and not two. */
#include <Python.h>
#include <structmember.h>

#include "wasmtime_bridge.h"

/* The interpreter's lock is kept for a reset of a slot whose last one took less, and let go all the same as soon as the core finds
 * more than a few pages to put back: nobody could use a moment as short as the rest takes. */
enum { BRIEF_NANOSECONDS = 5000 };

/* Those of the interpreter that imported this last; slots of another one have Python do all their resets. */
static int64_t (*reset_watched)(ms_slot *slot);
static unsigned (*copy)(ms_wt_cell *cell, uint64_t generation, uintptr_t to, const char *from, size_t length);
static PyObject *dirty, *clean, *unknown, *results, *otherwise, *settle;

typedef struct {
    PyObject_HEAD
    PyObject *state;
    PyObject *watcher;
    unsigned long long address;
} Watched;

static void put(PyObject **place, PyObject *value)
{
    PyObject *before = *place;
    Py_INCREF(value);
    *place = value;
    Py_XDECREF(before);
}

static PyObject *settled(Watched *self, PyObject *strategy, int64_t answer)
{
    put(&self->state, unknown);
    PyObject *number = PyLong_FromLongLong(answer);
    PyObject *result = number ? PyObject_CallMethodObjArgs(strategy, settle, self, number, NULL) : NULL;
    Py_XDECREF(number);
    if (result)
        put(&self->state, clean);
    return result;
}

static _Thread_local PyThreadState *let_go;

static void let_others_in(void)
{
    let_go = PyEval_SaveThread();
}

/* The reset, during which other threads run if it takes long. */
static int64_t reset_in_threads(ms_slot *slot)
{
    if (slot->report.nanoseconds < BRIEF_NANOSECONDS) /* as the last one was */
        slot->before_long = let_others_in;
    else
        let_others_in();
    int64_t answer = reset_watched(slot);
    slot->before_long = NULL;
    if (let_go) {
        PyEval_RestoreThread(let_go);
        let_go = NULL;
    }
    return answer;
}

static PyObject *reset(PyObject *object, PyObject *strategy)
{
    Watched *self = (Watched *)object;
    if (self->state != dirty || self->watcher != strategy || !self->address)
        return PyObject_CallMethodObjArgs(object, otherwise, strategy, NULL);
    int64_t answer = reset_in_threads((ms_slot *)(uintptr_t)self->address);
    if (answer >= MS_SLOW)
        return settled(self, strategy, answer);
    put(&self->state, clean);
    PyObject *number = PyLong_FromLongLong(answer);
    PyObject *result = number ? PyObject_GetItem(results, number) : NULL;
    Py_XDECREF(number);
    return result;
}

static PyObject *install(PyObject *module, PyObject *arguments)
{
    (void)module;
    unsigned long long reset_address, copy_address;
    PyObject *given[4];
    if (!PyArg_ParseTuple(arguments, "KKOOOO:install", &reset_address, &copy_address, &given[0], &given[1], &given[2],
                          &given[3]))
        return NULL;
    reset_watched = (int64_t(*)(ms_slot *))(uintptr_t)reset_address;
    copy = (unsigned (*)(ms_wt_cell *, uint64_t, uintptr_t, const char *, size_t))(uintptr_t)copy_address;
    put(&dirty, given[0]);
    put(&clean, given[1]);
    put(&unknown, given[2]);
    put(&results, given[3]);
    Py_RETURN_NONE;
}

/* Below this a copy takes less than giving up the interpreter's lock and getting it back. */
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
    PyThreadState *let_go = length < SHORT_COPY ? NULL : PyEval_SaveThread();
    unsigned refused =
        copy((ms_wt_cell *)(uintptr_t)cell, generation, to, (const char *)(uintptr_t)from, (size_t)length);
    if (let_go)
        PyEval_RestoreThread(let_go);
    if (!refused)
        return bytes;
    Py_DECREF(bytes);
    return PyLong_FromUnsignedLong(refused);
}

static int traverse(PyObject *object, visitproc visit, void *arg)
{
    Watched *self = (Watched *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->state);
    Py_VISIT(self->watcher);
    return 0;
}

static int clear(PyObject *object)
{
    Watched *self = (Watched *)object;
    Py_CLEAR(self->state);
    Py_CLEAR(self->watcher);
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
    {"state", T_OBJECT_EX, offsetof(Watched, state), 0, PyDoc_STR("What is known about the bytes.")},
    {"watcher", T_OBJECT_EX, offsetof(Watched, watcher), 0,
     PyDoc_STR("The strategy for which the core may reset this slot without asking, or None.")},
    {"address", T_ULONGLONG, offsetof(Watched, address), 0, PyDoc_STR("Where the core's ms_slot is, or 0.")},
    {0},
};

static PyMethodDef methods[] = {
    {"reset", reset, METH_O,
     PyDoc_STR("reset($self, strategy, /)\n--\n\n"
               "From dirty to clean, back at the initial size; touches `[0, accessible)` only.\n\n"
               "mprotect is called only if the memory had grown.  A memory that grew in a runtime's own\n"
               "mapping cannot shrink: it stays dirty, SlotError says so, and the owner has to retire the\n"
               "slot.  Raises SystemCallError: the slot is unknown then, and must not be handed out as it\n"
               "is.")},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, PyDoc_STR("What a slot that the core may reset without asking consists of.")},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {Py_tp_members, members},
    {Py_tp_methods, methods},
    {0},
};

static PyType_Spec spec = {
    .name = "memslot_plugin._core._watched.Watched",
    .basicsize = sizeof(Watched),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

static PyMethodDef functions[] = {
    {"install", install, METH_VARARGS,
     PyDoc_STR("install($module, reset, copy, dirty, clean, unknown, results, /)\n--\n\n"
               "Set what all slots have in common: the addresses of ms_reset_fast and ms_wt_copy, three\n"
               "states, and the results of ordinary resets by the core's answer.")},
    {"read", read_bytes, METH_VARARGS,
     PyDoc_STR("read($module, cell, generation, address, length, /)\n--\n\n"
               "Copy bytes of a memory of an instance, or return the flag that ms_wt_copy refused with.")},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "memslot_plugin._core._watched",
    .m_doc = PyDoc_STR("The reset that the core does without asking."),
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__watched(void)
{
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = PyType_FromSpec(&spec);
    otherwise = PyUnicode_InternFromString("_reset");
    settle = PyUnicode_InternFromString("settle");
    if (!module || !type || !otherwise || !settle || PyModule_AddObjectRef(module, "Watched", type)) {
        Py_XDECREF(type);
        Py_XDECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}
