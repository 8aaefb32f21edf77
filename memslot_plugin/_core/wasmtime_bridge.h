/* The C half of the wasmtime adapter: memories for its engines, and calls into its instances. Its Python half is
 * hosts/wasmtime/bridge.py. cffi reads this file as it reads memslot.h.
 *
 * Contract:
 *   - wasmtime is not linked. Python passes the address of each function once (ms_wt_bind), from the library that wasmtime-py
 *     has loaded, and compares the layouts (ms_wt_layout) before it calls anything else.
 *   - A function that returns `uintptr_t`, unless its comment says otherwise, returns 0, or the address of an ms_wt_outcome
 *     that the caller reads and frees (ms_wt_outcome_free).
 *   - A cell is entered by one thread at a time, which may nest. Any thread may call any function on any cell: a thread that
 *     comes second gets MS_WT_BUSY and never waits, except in ms_wt_close and ms_wt_acquire, for copies of bytes.
 *   - Python calls these functions without the GIL (cffi releases it). wasmtime calls back on the thread that entered it.
 *   - A finalizer may run on any thread, inside a garbage collection, or after the interpreter has ended. So it runs no Python
 *     and takes no lock: it pushes a name on an atomic list, which Python drains later (ms_wt_drain, ms_wt_drain_functions).
 *
 * Owners:
 *   creator   one per engine. The engine and Python hold a reference each; the last one frees it.
 *   group     the leased memories of one instance, under one token. Each memory and the instance's cell hold a reference.
 *   memory    a linear memory as wasmtime sees it. Made by new_memory, freed by its finalizer.
 *   cell      one instance: its store, and the thread inside. Owned by Python; no finalizer touches it. */
#pragma once

#include "memslot.h"

/* The outcome of an entry into wasmtime, if it did not just return. */
enum ms_wt_flag {
    MS_WT_TRAPPED = 1,     /* `trap` is set; the caller deletes it */
    MS_WT_FAILED = 2,      /* `error` is set; the caller deletes it */
    MS_WT_RAISED = 4,      /* a host function raised the exception numbered `raised` */
    MS_WT_DEFERRED = 8,    /* a growth was refused because Python raised the exception numbered `deferred` */
    MS_WT_BUSY = 16,       /* nothing happened: another thread is inside, or the cell is exclusively acquired */
    MS_WT_CLOSED = 32,     /* nothing happened: the instance was closed, or the caller's lease of it has ended */
    MS_WT_MISSING = 64,    /* nothing happened: there is no such export of that kind */
    MS_WT_UNASKED = 128,   /* the runtime made a memory without asking the creator */
    MS_WT_LOST = 256,      /* malloc failed: the rest of the outcome is unknown */
};

typedef struct {
    unsigned flags;
    uintptr_t trap;
    uintptr_t error;
    int64_t raised;
    int64_t deferred;
} ms_wt_outcome;

/* Frees an outcome, but not its trap and its error. */
void ms_wt_outcome_free(uintptr_t outcome);

/* ---- binding ---- */

/* Returns the name of the index-th function that ms_wt_bind takes; NULL after the last one. */
const char *ms_wt_symbol(size_t index);
/* Takes the addresses of those functions, in the same order. */
void ms_wt_bind(const uintptr_t *addresses);
/* Fills at most `capacity` sizes and offsets of the structures shared with wasmtime. Returns how many there are. */
size_t ms_wt_layout(size_t *layout, size_t capacity);

/* ---- exceptions of Python on their way through wasmtime, by number ---- */

/* Returns the number of entries that this thread is inside of. */
unsigned ms_wt_depth(void);
/* Notes that a host function raised within the innermost entry. Returns what one raised before, which the guest survived, or 0. */
int64_t ms_wt_raise(int64_t exception);
/* True if an exception in a growth would be the first one within the innermost entry. The first one alone is raised. */
int ms_wt_first_deferred(void);

/* ---- functions that Python defines: none may let an exception escape into wasmtime, which would abort ---- */

#define PYTHON_DEFINES /* for cffi: extern "Python+C" (CMakeLists.txt) */

/* Returns 1 if the index-th memory of the group `token` may have `byte_size` bytes, 0 if not, or a negated exception. */
PYTHON_DEFINES int64_t ms_wt_python_grow(uint64_t creator, uint64_t token, size_t index, size_t byte_size);
/* Leases a memory for an instance that bare wasmtime-py makes on our engine. Returns 1 with token, base and capacity, or 0
 * with a message. */
PYTHON_DEFINES int64_t ms_wt_python_lease(uint64_t creator, size_t minimum, size_t maximum, uint64_t *token,
                                          uintptr_t *base, size_t *capacity, char *message, size_t room);
/* Runs a host function over `count` values of 16 bytes. Returns 0, or an exception. */
PYTHON_DEFINES int64_t ms_wt_python_call(uint64_t identity, uint8_t *values, size_t count);

/* ---- creators (wasmtime_memory.c) ---- */

typedef struct ms_wt_creator ms_wt_creator;

/* `identity` is Python's name for the creator. A heap of wasmtime's garbage collector has at most `heap_limit` bytes, one
 * above `heap_kept` sets `changed` of its cell, and at most `most_heaps` live at once. */
ms_wt_creator *ms_wt_creator_new(uint64_t identity, size_t heap_limit, size_t heap_kept, size_t most_heaps);
/* Makes the engines of this configuration ask the creator for memory. */
void ms_wt_creator_install(ms_wt_creator *creator, uintptr_t config);
void ms_wt_creator_release(ms_wt_creator *creator);
/* Takes at most `capacity` tokens of groups that wasmtime no longer uses. Returns how many. */
size_t ms_wt_drain(ms_wt_creator *creator, uint64_t *tokens, size_t capacity);
/* Takes the number of heaps that could not be unmapped since the latest call. Their address space is lost. */
unsigned ms_wt_leaked_heaps(void);

/* ---- instances (wasmtime_bridge.c) ---- */

/* A guest, as all of its instances share it. */
typedef struct {
    ms_wt_creator *creator;
    uintptr_t engine;
    uintptr_t prepared;
    size_t count;       /* memories that the module defines */
    size_t *byte_sizes; /* of each: its initial bytes */
    size_t *capacities; /* of each: the most that its slot can hold */
    int heap_first;     /* make the garbage collector's heap first: it could be mistaken for the first memory */
    /* Limits of a store, below 0 for none: bytes of each memory and heap, elements of each table, and how many of both. */
    int64_t most_bytes;
    int64_t most_elements;
    int64_t most_tables;
    int64_t most_memories;
} ms_wt_guest;

typedef struct ms_wt_cell ms_wt_cell;

/* One entry of a thread: what it found and puts back when it leaves. Zeros before ms_wt_enter. */
typedef struct {
    ms_wt_cell *outer; /* the cell of the entry around this one, or NULL */
    int64_t raised;
    int64_t deferred;
    int inside; /* true between enter and leave */
} ms_wt_entry;

/* One instance. A call is inside as the owner; a copy of a memory's bytes is inside as a pin, also beside a call. Both name the
 * lease that they belong to and are refused once `generation` is another. `generation` changes only while the cell is
 * exclusively acquired, when neither is inside; so no bytes of the next lease reach a handle of the one before. */
struct ms_wt_cell {
    uintptr_t store;   /* 0 if the embedder owns it */
    uintptr_t context; /* 0 once closed; atomic */
    uint64_t instance[2];
    uintptr_t group;
    uintptr_t owner;       /* the thread inside, or 0; atomic */
    unsigned depth;        /* entries of the owner, which alone writes it */
    ms_wt_entry acquired;  /* the entry of ms_wt_acquire, which the owner alone writes */
    uint64_t key;          /* whose `acquired` is */
    unsigned pins;         /* copies under way; atomic */
    int exclusive;         /* no other entry is let in, not even of the owner's thread; atomic */
    uint64_t generation;   /* the lease whose handles may enter, from 1; atomic */
    int lingering;         /* closed, and wasmtime goes on using the memories */
    uintptr_t error;       /* wasmtime's error after MS_WT_SET */
    int changed;           /* only a new instance is pristine: a memory grew, a heap past `heap_kept`, or Python says so */
};

/* From empty to open: makes a store within the limits of the guest. */
void ms_wt_open(ms_wt_cell *cell, const ms_wt_guest *guest);
/* From open to live. `bases` are the addresses of the memories, which Python has leased under `token`. Close the cell also if
 * this fails. */
uintptr_t ms_wt_instantiate(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases);
/* From empty to live, in one call. */
uintptr_t ms_wt_start(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases);
/* Ends the store and the cell's part in its group, after the copies of other threads. `generation` is the lease to end, or 0
 * for any lease. Returns
 *   0: wasmtime no longer uses the memories
 *   1: wasmtime goes on using them, and ms_wt_drain will tell
 *   2: nothing happened, because a thread is inside
 *   3: nothing happened, because that lease has ended, or another thread closes the cell */
int ms_wt_close(ms_wt_cell *cell, uint64_t generation);
/* True if a thread other than this one is inside. */
int ms_wt_elsewhere(ms_wt_cell *cell);

/* Enters the cell for calls that wasmtime-py makes. `generation` is the caller's lease, or 0 for the host itself. */
uintptr_t ms_wt_enter(ms_wt_cell *cell, uint64_t generation, ms_wt_entry *entry);
/* Leaves the cell. Does nothing if the entry is not inside, or not of this thread. */
uintptr_t ms_wt_leave(ms_wt_cell *cell, ms_wt_entry *entry);
/* Enters the cell for a caller that wants it to itself: MS_WT_BUSY also if this thread is inside already. `exclusive` keeps
 * out this thread's own entries as well, and waits for copies, until ms_wt_release or ms_wt_restore. */
uintptr_t ms_wt_acquire(ms_wt_cell *cell, uint64_t generation, uint64_t key, int exclusive);
/* Leaves what was acquired under `key`: 1, with the outcome. Returns 0 if this thread has acquired nothing under it. */
int ms_wt_release(ms_wt_cell *cell, uint64_t key, uintptr_t *outcome);
/* Copies bytes from or to a memory of the instance. Returns 0, MS_WT_BUSY or MS_WT_CLOSED. */
unsigned ms_wt_copy(ms_wt_cell *cell, uint64_t generation, uintptr_t to, const char *from, size_t length);

/* ---- calls, globals and memories by name (wasmtime_calls.c) ---- */

enum { MS_WT_ROOM = 16 }; /* values that a callee has room for */

/* An exported function, and the arguments or results of one call of it, 16 bytes each. Calls that overlap need a callee each.
 * What it points to stays where it is for as long as the callee lives. */
typedef struct {
    ms_wt_cell *cell;
    const char *name;
    size_t length;
    uint8_t *values; /* for more than MS_WT_ROOM values; else NULL */
    size_t count;
    int found; /* `function` is known: the first call looks it up, and a cell is opened once */
    uint64_t function[2];
    uint8_t room[256]; /* 16 * MS_WT_ROOM */
} ms_wt_callee;

uintptr_t ms_wt_call(ms_wt_callee *callee, uint64_t generation);

/* An exported global: the kind and the 16 bytes of its value. A reference that is not null has a byte that is not zero. */
typedef struct {
    const char *name;
    size_t length;
    uint8_t kind;
    uint8_t value[16];
    int found; /* `place` is known: the first use looks it up, and a cell is opened once */
    uint64_t place[3];
} ms_wt_global;

/* Reads the values and kinds of the globals. */
uintptr_t ms_wt_globals_read(ms_wt_cell *cell, uint64_t generation, ms_wt_global *globals, size_t count);
/* Gives the globals their values. */
uintptr_t ms_wt_globals_write(ms_wt_cell *cell, uint64_t generation, ms_wt_global *globals, size_t count);
/* Gives the globals their values within ms_wt_acquire, begins the lease `generation`, and leaves. */
uintptr_t ms_wt_restore(ms_wt_cell *cell, uint64_t generation, ms_wt_global *globals, size_t count);
/* Returns where an exported memory is, and its size. */
uintptr_t ms_wt_memory_locate(ms_wt_cell *cell, const char *name, size_t length, uintptr_t *base, size_t *byte_size);
/* Grows an exported memory by `pages`. `before` becomes its pages before. */
uintptr_t ms_wt_memory_grow(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, uint64_t pages,
                            uint64_t *before);

/* ---- host functions (wasmtime_calls.c) ---- */

/* Defines a function that runs ms_wt_python_call with `identity`. `foreign` is true if the linker is for a store of the
 * embedder's. Returns 0, or the address of wasmtime's error. */
uintptr_t ms_wt_define(uintptr_t linker, const char *module, size_t module_length, const char *name, size_t name_length,
                       uintptr_t type, uint64_t identity, int foreign);
/* Keeps the instance of a store of ours open while a function of wasmtime-py's runs for it. `kept` is 0 before. */
void ms_wt_keep_open(uintptr_t context, uintptr_t *kept);
/* Ends that, and sets `kept` to 0. Does nothing for 0. */
void ms_wt_let_close(uintptr_t *kept);
/* Takes at most `capacity` identities of functions that no linker and no store needs any more. Returns how many. */
size_t ms_wt_drain_functions(uint64_t *identities, size_t capacity);

/* ---- WASI (wasmtime_wasi.c, wasmtime_wait.c) ---- */

typedef struct ms_wt_output ms_wt_output;

/* Captures a stream: keeps the first `limit` bytes and drops the rest. */
ms_wt_output *ms_wt_output_new(size_t limit);
void ms_wt_output_release(ms_wt_output *output);
/* Copies at most `capacity` bytes and returns how many there are. */
size_t ms_wt_output_read(ms_wt_output *output, uint8_t *bytes, size_t capacity);

/* The WASI of a store. Texts end with a zero byte. */
typedef struct {
    size_t argument_count;
    const char **arguments;
    size_t variable_count;
    const char **names;
    const char **values;
    size_t folder_count;
    const char **folders;    /* paths on this machine */
    const char **known_as;   /* paths in the guest */
    const uint8_t *writable; /* 1 for a folder that the guest may change */
    int inherit_stdout;
    int inherit_stderr;
} ms_wt_wasi;

/* The part of a WASI that was refused. The index of a refused folder is added to MS_WT_FOLDER. */
enum ms_wt_refused { MS_WT_ARGUMENTS = 1, MS_WT_ENVIRONMENT, MS_WT_SET, MS_WT_FOLDER };

/* Gives the cell's store a new WASI state; its old state is gone. `out` and `err` capture their streams unless NULL. Returns 0,
 * or what was refused. With MS_WT_SET the caller deletes the cell's `error`. */
size_t ms_wt_wasi_set(ms_wt_cell *cell, const ms_wt_wasi *wasi, ms_wt_output *out, ms_wt_output *err);
/* True in a child of a fork whose parent opened a path or captured output. wasmtime does both on worker threads, which are not
 * in the child, so a guest of the child could wait for ever. */
int ms_wt_workers_lost(void);

/* The shim module (hosts/wasmtime/wasi.py has its text), and a linker with WASI alone. Both outlive every use. */
typedef struct {
    uintptr_t module;
    uintptr_t linker;
} ms_wt_shim;

/* Defines WASI's poll_oneoff (`opens` false) or path_open (true) such that no call waits past a deadline, in a linker that
 * allows shadowing. Other parameters and the result as for ms_wt_define. */
uintptr_t ms_wt_define_wait(uintptr_t linker, uintptr_t type, uint64_t identity, const ms_wt_shim *shim, int opens,
                            int foreign);
