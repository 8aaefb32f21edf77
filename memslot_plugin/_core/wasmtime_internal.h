/* Shared by the files of the wasmtime bridge: wasmtime's C API as far as the bridge uses it, entries, and groups. */
#pragma once

#include "wasmtime_bridge.h"

#pragma GCC visibility push(hidden)

/* ---- opaque types of wasmtime ---- */

typedef struct wt_engine wt_engine;
typedef struct wt_config wt_config;
typedef struct wt_store wt_store;
typedef struct wt_context wt_context;
typedef struct wt_instance_pre wt_instance_pre;
typedef struct wt_linker wt_linker;
typedef struct wt_functype wt_functype;
typedef struct wt_caller wt_caller;
typedef struct wt_error wt_error;
typedef struct wt_trap wt_trap;
typedef struct wt_sharedmemory wt_sharedmemory;
typedef struct wt_wasi_config wt_wasi_config;
typedef struct wt_module wt_module;

/* ---- layouts, of wasmtime 50 (wasmtime/extern.h, val.h, config.h); ms_wt_layout has them compared ---- */

typedef struct {
    uint64_t store_id;
    size_t index;
} wt_instance;

typedef struct {
    size_t size;
    char *bytes;
} wt_bytes;

typedef struct {
    uint64_t store_id;
    void *address;
} wt_func;

typedef struct {
    uint64_t store_id;
    uint32_t a, b, c;
} wt_global;

typedef struct {
    struct {
        uint64_t store_id;
        uint32_t a;
    } first;
    uint32_t b;
} wt_memory;

typedef struct {
    uint64_t store_id;
    uint32_t a, b;
    void *c;
} wt_ref;

enum { WT_EXTERN_FUNC = 0, WT_EXTERN_GLOBAL = 1, WT_EXTERN_MEMORY = 3, WT_EXTERN_SHAREDMEMORY = 4 };

typedef struct {
    uint8_t kind;
    union {
        wt_func func;
        wt_global global;
        wt_memory memory;
        wt_sharedmemory *sharedmemory;
    } of;
} wt_extern;

/* Arguments and results of an unchecked call: 16 bytes each, little-endian, v128 included. */
typedef union {
    int32_t i32;
    int64_t i64;
    uint8_t v128[16];
} wt_raw;

typedef struct {
    uint8_t kind;
    union {
        int32_t i32;
        int64_t i64;
        float f32;
        double f64;
        wt_ref ref;
        uint8_t v128[16];
    } of;
} wt_val;

typedef struct {
    void *env;
    uint8_t *(*get_memory)(void *env, size_t *byte_size, size_t *byte_capacity);
    wt_error *(*grow_memory)(void *env, size_t new_size);
    void (*finalizer)(void *env);
} wt_linear_memory;

typedef struct {
    void *env;
    wt_error *(*new_memory)(void *env, const void *type, size_t minimum, size_t maximum, size_t reserved, size_t guard,
                            wt_linear_memory *out);
    void (*finalizer)(void *env);
} wt_memory_creator;

/* ---- functions: name here, symbol, result, parameters ---- */

#define WT_SYMBOLS(X)                                                                                                  \
    X(store_new, "wasmtime_store_new", wt_store *, (wt_engine *, void *, void (*)(void *)))                           \
    X(store_context, "wasmtime_store_context", wt_context *, (wt_store *))                                            \
    X(store_limiter, "wasmtime_store_limiter", void, (wt_store *, int64_t, int64_t, int64_t, int64_t, int64_t))        \
    X(store_delete, "wasmtime_store_delete", void, (wt_store *))                                                       \
    X(instantiate, "wasmtime_instance_pre_instantiate", wt_error *,                                                   \
      (const wt_instance_pre *, wt_context *, wt_instance *, wt_trap **))                                             \
    X(export_get, "wasmtime_instance_export_get", _Bool,                                                              \
      (wt_context *, const wt_instance *, const char *, size_t, wt_extern *))                                         \
    X(extern_delete, "wasmtime_extern_delete", void, (wt_extern *))                                                   \
    X(call, "wasmtime_func_call_unchecked", wt_error *, (wt_context *, const wt_func *, wt_raw *, size_t, wt_trap **)) \
    X(global_get, "wasmtime_global_get", void, (wt_context *, const wt_global *, wt_val *))                           \
    X(global_set, "wasmtime_global_set", wt_error *, (wt_context *, const wt_global *, const wt_val *))               \
    X(val_unroot, "wasmtime_val_unroot", void, (wt_val *))                                                            \
    X(memory_data, "wasmtime_memory_data", uint8_t *, (const wt_context *, const wt_memory *))                        \
    X(memory_size, "wasmtime_memory_data_size", size_t, (const wt_context *, const wt_memory *))                      \
    X(memory_grow, "wasmtime_memory_grow", wt_error *, (wt_context *, const wt_memory *, uint64_t, uint64_t *))       \
    X(shared_data, "wasmtime_sharedmemory_data", uint8_t *, (const wt_sharedmemory *))                                \
    X(shared_size, "wasmtime_sharedmemory_data_size", size_t, (const wt_sharedmemory *))                              \
    X(shared_grow, "wasmtime_sharedmemory_grow", wt_error *, (const wt_sharedmemory *, uint64_t, uint64_t *))         \
    X(externref_new, "wasmtime_externref_new", _Bool, (wt_context *, void *, void (*)(void *), wt_ref *))             \
    X(externref_unroot, "wasmtime_externref_unroot", void, (wt_ref *))                                                \
    X(context_set_wasi, "wasmtime_context_set_wasi", wt_error *, (wt_context *, wt_wasi_config *))                    \
    X(wasi_new, "wasi_config_new", wt_wasi_config *, (void))                                                          \
    X(wasi_delete, "wasi_config_delete", void, (wt_wasi_config *))                                                    \
    X(wasi_argv, "wasi_config_set_argv", _Bool, (wt_wasi_config *, size_t, const char *const *))                      \
    X(wasi_env, "wasi_config_set_env", _Bool,                                                                         \
      (wt_wasi_config *, size_t, const char *const *, const char *const *))                                           \
    X(wasi_stdout, "wasi_config_inherit_stdout", void, (wt_wasi_config *))                                            \
    X(wasi_stderr, "wasi_config_inherit_stderr", void, (wt_wasi_config *))                                            \
    X(wasi_folder, "wasi_config_preopen_dir", _Bool, (wt_wasi_config *, const char *, const char *, _Bool))           \
    X(error_new, "wasmtime_error_new", wt_error *, (const char *))                                                    \
    X(error_message, "wasmtime_error_message", void, (const wt_error *, wt_bytes *))                                  \
    X(error_delete, "wasmtime_error_delete", void, (wt_error *))                                                      \
    X(bytes_delete, "wasm_byte_vec_delete", void, (wt_bytes *))                                                       \
    X(caller_context, "wasmtime_caller_context", wt_context *, (wt_caller *))                                         \
    X(caller_export, "wasmtime_caller_export_get", _Bool, (wt_caller *, const char *, size_t, wt_extern *))           \
    X(context_data, "wasmtime_context_get_data", void *, (const wt_context *))                                        \
    X(fuel_get, "wasmtime_context_get_fuel", wt_error *, (const wt_context *, uint64_t *))                            \
    X(fuel_set, "wasmtime_context_set_fuel", wt_error *, (wt_context *, uint64_t))                                    \
    X(linker_get, "wasmtime_linker_get", _Bool,                                                                       \
      (const wt_linker *, wt_context *, const char *, size_t, const char *, size_t, wt_extern *))                     \
    X(instance_new, "wasmtime_instance_new", wt_error *,                                                              \
      (wt_context *, const wt_module *, const wt_extern *, size_t, wt_instance *, wt_trap **))                        \
    X(trap_new, "wasmtime_trap_new", wt_trap *, (const char *, size_t))                                               \
    X(creator_set, "wasmtime_config_host_memory_creator_set", void, (wt_config *, wt_memory_creator *))               \
    X(define_func, "wasmtime_linker_define_func_unchecked", wt_error *,                                               \
      (wt_linker *, const char *, size_t, const char *, size_t, const wt_functype *,                                  \
       wt_trap *(*)(void *, wt_caller *, wt_raw *, size_t), void *, void (*)(void *)))                                \
    X(stdout_custom, "wasi_config_set_stdout_custom", void,                                                           \
      (wt_wasi_config *, ptrdiff_t (*)(void *, const unsigned char *, size_t), void *, void (*)(void *)))             \
    X(stderr_custom, "wasi_config_set_stderr_custom", void,                                                           \
      (wt_wasi_config *, ptrdiff_t (*)(void *, const unsigned char *, size_t), void *, void (*)(void *)))

extern struct wt_api {
#define X(name, symbol, result, parameters) result(*name) parameters;
    WT_SYMBOLS(X)
#undef X
} wt_api;

/* ---- lists that finalizers push on: any thread pushes, one drain takes all ---- */

struct wt_node {
    struct wt_node *next;
    uint64_t name;
};

void wt_push(struct wt_node **list, struct wt_node *node);
/* Takes at most `capacity` names and frees their nodes, which must begin their allocations. Returns how many. */
size_t wt_drain(struct wt_node **list, uint64_t *names, size_t capacity);

/* ---- groups (wasmtime_memory.c) ---- */

struct wt_group {
    struct wt_node node; /* first: wt_drain frees a group by its node */
    ms_wt_creator *creator;
    ms_wt_cell *cell;    /* NULL if the store is the embedder's, which may outlive the cell */
    unsigned references; /* atomic */
};

struct wt_group *wt_group_new(ms_wt_creator *creator, ms_wt_cell *cell, uint64_t token);
/* Drops a reference. True for the last one: then the group is the caller's to free. */
int wt_group_drop(struct wt_group *group);

/* ---- entries (wasmtime_bridge.c) ---- */

/* The memories that new_memory hands out during an instantiation. */
struct wt_offer {
    const ms_wt_guest *guest; /* NULL if there is no offer */
    const uintptr_t *bases;
    size_t next;
    struct wt_group *group;
};

/* The innermost entry of this thread. new_memory is not told which module asks: the thread tells, because wasmtime calls it
 * on the thread that instantiates. */
extern _Thread_local struct wt_frame {
    unsigned depth;
    int64_t raised;   /* by a host function */
    int64_t deferred; /* by Python in a growth */
    ms_wt_cell *cell; /* NULL outside of all entries */
    struct wt_offer offer;
} wt_frame;

/* Leaves an entry and returns its outcome: 0 if there is nothing to tell. */
uintptr_t wt_leave(ms_wt_cell *cell, ms_wt_entry *entry, unsigned flags, wt_trap *trap, wt_error *error);
/* Returns an outcome with these flags alone. */
uintptr_t wt_refuse(unsigned flags);
/* Ends the entry of this thread's ms_wt_acquire without leaving: the caller leaves `entry`. False if it has none. */
int wt_take_acquired(ms_wt_cell *cell, ms_wt_entry *entry);
/* Lets copies in again after an exclusive ms_wt_acquire. */
void wt_end_exclusive(ms_wt_cell *cell);

/* Keeps a cell from being closed while Python runs for its guest, until wt_let_close. wasmtime-py may have made the call, and
 * that is no entry. Returns NULL if nothing needs to be done, because an entry keeps the cell open. */
ms_wt_cell *wt_keep_open(ms_wt_cell *cell);
void wt_let_close(ms_wt_cell *cell);

wt_error *wt_out_of_memory(void);

/* ---- stores and WASI ---- */

/* The data of a store that ms_wt_open made, and the shim's instance in a store. The first call that needs the shim makes the
 * instance. It holds no state of the guest's. */
struct wt_store_data {
    ms_wt_cell *cell;     /* NULL for a store of the embedder's */
    wt_instance instance; /* of store 0 before it is made */
    wt_memory memory;     /* the guest's memory, which the shim imports; zeros for a shared one */
    const uint8_t *shared;
};

/* Defines a function whose environment is a malloc'd wt_node, or begins with one. wt_drain_functions gets its name. */
uintptr_t wt_define(uintptr_t linker, const char *module, size_t module_length, const char *name, size_t name_length,
                    uintptr_t type, wt_trap *(*function)(void *, wt_caller *, wt_raw *, size_t), struct wt_node *node);
/* Notes that wasmtime may have started a worker thread in this process (ms_wt_workers_lost). */
void wt_note_workers(void);

#pragma GCC visibility pop
