/* What this side knows of wasmtime's C API: the layouts and signatures that the adapter uses, and nothing else of it.
 *
 * wasmtime is not linked: Python passes the address of each symbol once (ms_wt_bind), from the library that wasmtime-py has
 * loaded, and compares the layouts below with those of wasmtime-py's own bindings (ms_wt_layout) before anything is called.
 *
 * Lives and who owns what:
 *   creator   one per engine; the engine and Python each hold a reference, the last one frees it
 *   group     the leased memories of one instance under one token; each memory and the instance's cell hold a reference
 *   memory    what a linear memory is to wasmtime; made by new_memory, freed by its finalizer
 *   cell      one instance: its store, and who is inside it; Python's memory, which no finalizer touches
 *
 * A finalizer may run on any thread, inside a garbage collection, or when the interpreter is gone.  It runs no Python: the last
 * reference to a group puts the group on its creator's list, and Python drains the list when it next has time (ms_wt_drain).
 */
#pragma once

#include "wasmtime_bridge.h"

/* ---- opaque things of wasmtime's ---- */

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

/* ---- layouts (wasmtime 50: wasmtime/extern.h, val.h, config.h) ---- */

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

/* ---- signatures: name, result, parameters; the name of the symbol is "wasmtime_" and the name, or as given ---- */

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
