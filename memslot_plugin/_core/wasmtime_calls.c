/* Calls of exported functions, globals and memories by name, and host functions. wasmtime_bridge.h has the contract. */
#include "wasmtime_internal.h"

#include <stdlib.h>
#include <string.h>

/* wasmtime's structures live in fields of our own, whose declarations cffi can read. */
_Static_assert(sizeof(wt_func) <= sizeof((ms_wt_callee *)0)->function, "a callee has room for a function");
_Static_assert(sizeof(wt_global) <= sizeof((ms_wt_global *)0)->place, "a global has room for its place");
_Static_assert(sizeof((ms_wt_callee *)0)->room == sizeof(wt_raw) * MS_WT_ROOM, "the room holds what it says");

static wt_context *context_of(ms_wt_cell *cell) { return (wt_context *)cell->context; }

static int get_export(ms_wt_cell *cell, const char *name, size_t length, wt_extern *found)
{
    return wt_api.export_get(context_of(cell), (wt_instance *)cell->instance, name, length, found);
}

/* Looks up an export of this kind and copies what wasmtime calls it by to `place`. False if there is none. */
static int find(ms_wt_cell *cell, const char *name, size_t length, int kind, void *place, size_t size)
{
    wt_extern found;
    if (!get_export(cell, name, length, &found))
        return 0;
    if (found.kind == kind)
        memcpy(place, &found.of, size);
    else
        wt_api.extern_delete(&found);
    return found.kind == kind;
}

/* ---- calls ---- */

uintptr_t ms_wt_call(ms_wt_callee *callee, uint64_t generation)
{
    ms_wt_entry entry;
    ms_wt_cell *cell = callee->cell;
    uintptr_t refused = ms_wt_enter(cell, generation, &entry);
    if (refused)
        return refused;
    if (!callee->found && !(callee->found = find(cell, callee->name, callee->length, WT_EXTERN_FUNC, callee->function,
                                                 sizeof(wt_func))))
        return wt_leave(cell, &entry, MS_WT_MISSING, NULL, NULL);
    wt_trap *trap = NULL;
    /* Unchecked: wasmtime reads the values by the function's own type. Python has packed them by that type. */
    wt_error *error = wt_api.call(context_of(cell), (const wt_func *)callee->function,
                                  (wt_raw *)(callee->values ? callee->values : callee->room), callee->count, &trap);
    return wt_leave(cell, &entry, 0, trap, error);
}

/* ---- globals ---- */

static int find_global(ms_wt_cell *cell, ms_wt_global *global)
{
    if (!global->found)
        global->found = find(cell, global->name, global->length, WT_EXTERN_GLOBAL, global->place, sizeof(wt_global));
    return global->found;
}

uintptr_t ms_wt_globals_read(ms_wt_cell *cell, uint64_t generation, ms_wt_global *globals, size_t count)
{
    ms_wt_entry entry;
    uintptr_t refused = ms_wt_enter(cell, generation, &entry);
    if (refused)
        return refused;
    for (ms_wt_global *each = globals; count-- > 0; each++) {
        if (!find_global(cell, each))
            return wt_leave(cell, &entry, MS_WT_MISSING, NULL, NULL);
        wt_val val;
        memset(&val, 0, sizeof val);
        wt_api.global_get(context_of(cell), (const wt_global *)each->place, &val);
        each->kind = val.kind;
        memcpy(each->value, &val.of, sizeof each->value);
        wt_api.val_unroot(&val); /* a reference would keep its object alive for as long as the store */
    }
    return wt_leave(cell, &entry, 0, NULL, NULL);
}

/* Writes globals until one is missing, or wasmtime refuses. Returns the flag, and sets the error. */
static unsigned write_globals(ms_wt_cell *cell, ms_wt_global *globals, size_t count, wt_error **error)
{
    for (ms_wt_global *each = globals; count-- > 0 && !*error; each++) {
        if (!find_global(cell, each))
            return MS_WT_MISSING;
        wt_val val;
        memset(&val, 0, sizeof val);
        val.kind = each->kind;
        memcpy(&val.of, each->value, sizeof each->value);
        *error = wt_api.global_set(context_of(cell), (const wt_global *)each->place, &val);
    }
    return 0;
}

uintptr_t ms_wt_globals_write(ms_wt_cell *cell, uint64_t generation, ms_wt_global *globals, size_t count)
{
    ms_wt_entry entry;
    wt_error *error = NULL;
    uintptr_t refused = ms_wt_enter(cell, generation, &entry);
    if (refused)
        return refused;
    unsigned flags = write_globals(cell, globals, count, &error);
    return wt_leave(cell, &entry, flags, NULL, error);
}

uintptr_t ms_wt_restore(ms_wt_cell *cell, uint64_t generation, ms_wt_global *globals, size_t count)
{
    ms_wt_entry entry;
    wt_error *error = NULL;
    if (!wt_take_acquired(cell, &entry))
        return wt_refuse(MS_WT_BUSY);
    unsigned flags = write_globals(cell, globals, count, &error);
    __atomic_store_n(&cell->generation, generation, __ATOMIC_SEQ_CST);
    wt_end_exclusive(cell); /* after the generation: copies of the old lease must not get in */
    return wt_leave(cell, &entry, flags, NULL, error);
}

/* ---- memories ---- */

/* Enters the cell and finds an exported memory, shared or not. Leaves again if there is none. */
static uintptr_t enter_memory(ms_wt_cell *cell, uint64_t generation, ms_wt_entry *entry, const char *name, size_t length,
                              wt_extern *found)
{
    uintptr_t refused = ms_wt_enter(cell, generation, entry);
    if (refused)
        return refused;
    if (get_export(cell, name, length, found)) {
        if (found->kind == WT_EXTERN_MEMORY || found->kind == WT_EXTERN_SHAREDMEMORY)
            return 0;
        wt_api.extern_delete(found);
    }
    return wt_leave(cell, entry, MS_WT_MISSING, NULL, NULL);
}

uintptr_t ms_wt_memory_locate(ms_wt_cell *cell, const char *name, size_t length, uintptr_t *base, size_t *byte_size)
{
    ms_wt_entry entry;
    wt_extern found;
    uintptr_t refused = enter_memory(cell, 0, &entry, name, length, &found);
    if (refused)
        return refused;
    if (found.kind == WT_EXTERN_MEMORY) {
        *base = (uintptr_t)wt_api.memory_data(context_of(cell), &found.of.memory);
        *byte_size = wt_api.memory_size(context_of(cell), &found.of.memory);
    } else {
        *base = (uintptr_t)wt_api.shared_data(found.of.sharedmemory);
        *byte_size = wt_api.shared_size(found.of.sharedmemory);
        wt_api.extern_delete(&found); /* the memory stays mapped: the store holds it, too */
    }
    return wt_leave(cell, &entry, 0, NULL, NULL);
}

uintptr_t ms_wt_memory_grow(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, uint64_t pages,
                            uint64_t *before)
{
    ms_wt_entry entry;
    wt_extern found;
    wt_error *error;
    uintptr_t refused = enter_memory(cell, generation, &entry, name, length, &found);
    if (refused)
        return refused;
    if (found.kind == WT_EXTERN_MEMORY) {
        error = wt_api.memory_grow(context_of(cell), &found.of.memory, pages, before);
    } else {
        error = wt_api.shared_grow(found.of.sharedmemory, pages, before);
        wt_api.extern_delete(&found);
    }
    return wt_leave(cell, &entry, 0, NULL, error);
}

/* ---- host functions ---- */

static struct wt_node *dropped_functions;

static void finalize_function(void *env) { wt_push(&dropped_functions, env); }

size_t ms_wt_drain_functions(uint64_t *identities, size_t capacity)
{
    return wt_drain(&dropped_functions, identities, capacity);
}

void ms_wt_keep_open(uintptr_t context, uintptr_t *kept)
{
    const struct wt_store_data *data = wt_api.context_data((wt_context *)context);
    *kept = data ? (uintptr_t)wt_keep_open(data->cell) : 0;
}

void ms_wt_let_close(uintptr_t *kept)
{
    ms_wt_cell *cell = (ms_wt_cell *)*kept;
    *kept = 0;
    wt_let_close(cell);
}

uintptr_t wt_define(uintptr_t linker, const char *module, size_t module_length, const char *name, size_t name_length,
                    uintptr_t type, wt_trap *(*function)(void *, wt_caller *, wt_raw *, size_t), struct wt_node *node)
{
    if (!node)
        return (uintptr_t)wt_out_of_memory();
    return (uintptr_t)wt_api.define_func((wt_linker *)linker, module, module_length, name, name_length,
                                         (const wt_functype *)type, function, node, finalize_function);
}

struct function {
    struct wt_node node; /* first: it is freed as one */
    int foreign;
};

/* Runs inside of guest code, without the GIL; cffi takes it for ms_wt_python_call. */
static wt_trap *call_python(void *env, wt_caller *caller, wt_raw *values, size_t count)
{
    static const char message[] = "a host function raised";
    const struct function *function = env;
    uintptr_t kept = 0;
    /* Do not read the data of a foreign store: its type is the embedder's. */
    if (!function->foreign)
        ms_wt_keep_open((uintptr_t)wt_api.caller_context(caller), &kept);
    int64_t exception = ms_wt_python_call(function->node.name, (uint8_t *)values, count);
    ms_wt_let_close(&kept);
    if (!exception)
        return NULL;
    wt_frame.raised = exception;
    return wt_api.trap_new(message, sizeof message - 1);
}

uintptr_t ms_wt_define(uintptr_t linker, const char *module, size_t module_length, const char *name, size_t name_length,
                       uintptr_t type, uint64_t identity, int foreign)
{
    struct function *function = malloc(sizeof *function);
    if (function)
        *function = (struct function){{NULL, identity}, foreign};
    return wt_define(linker, module, module_length, name, name_length, type, call_python, (struct wt_node *)function);
}
