/* The extension memslot_plugin._core._fast: the paths of a request that hold Python objects, in C.
 *
 * A module of its own, because cffi's takes no Python objects. It makes no system call itself: Python passes it the addresses of
 * the core's functions, so that the gate that counts system calls exists once in the process. */
#pragma once

#include <Python.h>
#include <structmember.h>

#include "wasmtime_bridge.h"

/* The core's functions. Set by `install`, once per process. */
struct fast_core {
    int (*reset_fast)(ms_slot *slot);
    unsigned (*copy)(ms_wt_cell *cell, uint64_t generation, uintptr_t to, const char *from, size_t length);
    uintptr_t (*acquire)(ms_wt_cell *cell, uint64_t generation, uint64_t key, int exclusive);
    int (*release)(ms_wt_cell *cell, uint64_t key, uintptr_t *outcome);
    uintptr_t (*restore)(ms_wt_cell *cell, uint64_t generation, ms_wt_global *globals, size_t count);
    uintptr_t (*call)(ms_wt_callee *callee, uint64_t generation);
};
extern struct fast_core fast_core;

/* Adds the types of function.c to the module. Returns 0, or -1 with an exception. */
int fast_add_functions(PyObject *module);
