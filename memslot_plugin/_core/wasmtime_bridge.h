#pragma once

#include "memslot.h"

/* ---- wasmtime: the C half of its adapter; wasmtime.h says who owns what ---- */

/* What an entry into wasmtime came to, if not simply to its end. */
enum ms_wt_flag {
    MS_WT_TRAPPED = 1,   /* `trap` is set, and the caller's to delete */
    MS_WT_FAILED = 2,    /* `error` is set, and the caller's to delete */
    MS_WT_RAISED = 4,    /* a host function raised: `raised` names the exception */
    MS_WT_DEFERRED = 8,  /* a growth was refused because Python raised: `deferred` names the exception */
    MS_WT_BUSY = 16,     /* nothing happened: another thread is inside this instance, or it is being reset */
    MS_WT_CLOSED = 32,   /* nothing happened: the instance was closed, or the caller's lease of it has ended */
    MS_WT_CLOSING = 64,  /* somebody closed the instance during the call; the caller closes it now */
    MS_WT_MISSING = 128, /* nothing happened: there is no such export of that kind */
    MS_WT_UNASKED = 256, /* the runtime made a memory without asking for it */
    MS_WT_OUTGROWN = 1024, /* the heap of the garbage collector passed what may be kept */
    MS_WT_LOST = 512     /* there was no memory to say more */
};

typedef struct {
    unsigned flags;
    uintptr_t trap;
    uintptr_t error;
    int64_t raised;
    int64_t deferred;
} ms_wt_outcome;

/* The symbols that ms_wt_bind takes, in order; NULL after the last one. */
const char *ms_wt_symbol(size_t index);
/* Takes their addresses. */
void ms_wt_bind(const uintptr_t *addresses);
/* Sizes and offsets of what is shared with wasmtime; fills at most `capacity` and returns how many there are. */
size_t ms_wt_layout(size_t *layout, size_t capacity);

/* Frees an outcome, without its trap and its error. */
void ms_wt_outcome_free(uintptr_t outcome);
/* How many entries into wasmtime this thread is inside. */
unsigned ms_wt_depth(void);
/* What a host function raised within the innermost entry, or 0. */
int64_t ms_wt_raised(void);
/* Whether an exception in a growth would be the first within the innermost entry, which alone is raised. */
int ms_wt_first_deferred(void);
/* A host function that wasmtime-py calls raised; as if one of ours had. */
void ms_wt_raise(int64_t exception);

/* -- creators -- */

typedef struct ms_wt_creator ms_wt_creator;

/* `identity` is Python's name for it; `heap_limit` is how many bytes a heap of wasmtime's garbage collector may have,
 * `heap_kept` past which size an instance tells (MS_WT_OUTGROWN), and `most_heaps` how many live at once. */
ms_wt_creator *ms_wt_creator_new(uint64_t identity, size_t heap_limit, size_t heap_kept, size_t most_heaps);
/* Makes an engine of this configuration ask the creator for memory. */
void ms_wt_creator_install(ms_wt_creator *creator, uintptr_t config);
void ms_wt_creator_release(ms_wt_creator *creator);
/* Takes the tokens of groups that wasmtime no longer uses; returns how many, at most `capacity`. */
size_t ms_wt_drain(ms_wt_creator *creator, uint64_t *tokens, size_t capacity);

/* -- instances -- */

/* What all instances of a guest have in common: per memory that the module defines, its initial bytes and the most that
 * its slot can hold. */
typedef struct {
    ms_wt_creator *creator;
    uintptr_t engine;
    uintptr_t prepared;
    size_t count;
    size_t *byte_sizes;
    size_t *capacities;
    int heap_first; /* a heap of the garbage collector could be mistaken for the first memory: have it made before */
    /* The limits of a store: bytes of each memory and heap, elements of each table, and how many of both; below 0 for none. */
    int64_t most_bytes;
    int64_t most_elements;
    int64_t most_tables;
    int64_t most_memories;
} ms_wt_guest;

/* Entries: a call is inside as the owner, one thread at a time, which may nest; a copy of a memory's bytes is inside as a pin, also
 * beside a call.  Both name the lease that they belong to, and are refused once `generation` is another: it changes while
 * the cell is held, when neither is inside. */
typedef struct {
    uintptr_t store;   /* 0 if the embedder owns it */
    uintptr_t context; /* 0 once closed */
    uint64_t instance[2];
    uintptr_t group;
    uintptr_t owner;     /* the thread inside, or 0; atomic */
    unsigned depth;      /* entries of the owner */
    int64_t hold[3];     /* the entry of ms_wt_hold, which its owner alone writes; zeros where there is none */
    uint64_t key;        /* whose hold it is */
    unsigned pins;       /* copies that run now; atomic */
    int held;            /* the owner wants no other entry, not even of its own thread; atomic */
    uint64_t generation; /* the lease whose handles may enter, from 1; atomic */
    uint64_t closing;    /* the lease that ends when no thread is inside, or more for any; 0 for none; atomic */
    int lingering; /* closed, and wasmtime goes on using the memories */
    uintptr_t error; /* what ms_wt_wasi_give was refused with */
    int outgrown;    /* an entry let the heap of the garbage collector grow past what may be kept */
} ms_wt_cell;

enum { MS_WT_ROOM = 16 }; /* values that a callee has room for; a function with more brings its own */

/* An exported function of an instance, and the `count` arguments or results, 16 bytes each, of one call of it: a call that begins
 * meanwhile has a callee of its own.  What it points to stays where it is for as long as it does.  `function` is filled in
 * by the first call: a cell is opened once. */
typedef struct {
    ms_wt_cell *cell;
    const char *name;
    size_t length;
    uint8_t *values; /* NULL for `room` */
    size_t count;
    int found;
    uint64_t function[2];
    uint8_t room[256]; /* 16 * MS_WT_ROOM */
} ms_wt_callee;

/* From empty to open: a store of its own, within the limits of the guest. */
void ms_wt_open(ms_wt_cell *cell, const ms_wt_guest *guest);
/* From open to live.  `bases` are the addresses of the memories, which are Python's under `token`.  The result, here and below, is 0
 * or the address of an outcome.  Close the cell also if this fails. */
uintptr_t ms_wt_instantiate(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases);
/* Both. */
uintptr_t ms_wt_start(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases);
/* Ends the store and the cell's part in its group, after waiting for the copies of other threads.  0: wasmtime no longer uses the
 * memories; 1: it does, and ms_wt_drain will tell; 2: a call is running, which closes the cell when it returns; 3: nothing
 * happened, for the lease `generation` has ended (0 for the host itself, which may always). */
int ms_wt_close(ms_wt_cell *cell, uint64_t generation);
/* Whether a thread other than this one is inside. */
int ms_wt_elsewhere(ms_wt_cell *cell);
/* Copies `length` bytes from or to a memory of the instance.  0, MS_WT_BUSY or MS_WT_CLOSED. */
unsigned ms_wt_copy(ms_wt_cell *cell, uint64_t generation, uintptr_t to, const char *from, size_t length);
/* Around calls that wasmtime-py makes.  `saved` is three words, zeros at first; the last one says whether there is something to
 * leave, and leaving does nothing where there is not.  0 or an outcome. */
uintptr_t ms_wt_enter(ms_wt_cell *cell, uint64_t generation, int64_t *saved);
uintptr_t ms_wt_leave(ms_wt_cell *cell, int64_t *saved);
/* An entry for a caller that needs the instance to itself: MS_WT_BUSY also where this thread is inside it already.  With
 * `alone` this thread, too, is kept out until ms_wt_let_go or ms_wt_restore, and copies have ended.  `key` is the caller's. */
uintptr_t ms_wt_hold(ms_wt_cell *cell, uint64_t generation, uint64_t key, int alone);
/* Leaves what was held with this key, if it is: 1, and the outcome; else 0. */
int ms_wt_let_go(ms_wt_cell *cell, uint64_t key, uintptr_t *outcome);
/* Calls it. */
uintptr_t ms_wt_call(ms_wt_callee *callee, uint64_t generation);
/* The 16 bytes of an exported global, and its kind; and back. */
uintptr_t ms_wt_global_get(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, uint8_t *value, uint8_t *kind);
uintptr_t ms_wt_global_set(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, const uint8_t *value, uint8_t kind);
/* A global that is read or put back: the export's name, the kind of its value and its 16 bytes, and where it was found. */
typedef struct {
    const char *name;
    size_t length;
    uint8_t kind;
    uint8_t value[16];
    uint64_t place[3];
} ms_wt_saved;

/* Finds the globals, and reads what they hold now.  A reference that is not null has other bytes than zeros. */
uintptr_t ms_wt_globals_find(ms_wt_cell *cell, ms_wt_saved *saved, size_t count);
uintptr_t ms_wt_globals_read(ms_wt_cell *cell, ms_wt_saved *saved, size_t count);
/* Gives globals that were found their values, and leaves what was held: for the lease `generation`. */
uintptr_t ms_wt_restore(ms_wt_cell *cell, uint64_t generation, const ms_wt_saved *saved, size_t count);
/* Where an exported memory is and how large; growth by `pages`, and the pages before. */
uintptr_t ms_wt_memory_locate(ms_wt_cell *cell, const char *name, size_t length, uintptr_t *base, size_t *byte_size);
uintptr_t ms_wt_memory_grow(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, uint64_t pages, uint64_t *before);

/* -- host functions: `identity` comes back in ms_wt_python_call -- */

/* 0, or the address of wasmtime's error.  `foreign` says that the linker is for a store of the embedder's. */
uintptr_t ms_wt_define(uintptr_t linker, const char *module, size_t module_length, const char *name, size_t name_length,
                       uintptr_t type, uint64_t identity, int foreign);
/* Keeps the instance of a store of ours from being closed while a function of wasmtime-py's runs for it; `kept` is 0 at first. */
void ms_wt_stay(uintptr_t context, uintptr_t *kept);
/* Ends that; nothing happens where `kept` is 0. */
void ms_wt_go(uintptr_t *kept);
/* Takes the identities of functions that no linker and no store needs any more. */
size_t ms_wt_drain_functions(uint64_t *identities, size_t capacity);

/* -- captured streams -- */

typedef struct ms_wt_output ms_wt_output;

/* Keeps the first `limit` bytes and drops the rest. */
ms_wt_output *ms_wt_output_new(size_t limit);
void ms_wt_output_release(ms_wt_output *output);
/* Copies at most `capacity` bytes and returns how many there are. */
size_t ms_wt_output_read(ms_wt_output *output, uint8_t *bytes, size_t capacity);

/* -- WASI: what a store is given of it; texts end with a zero byte -- */

typedef struct {
    size_t argument_count;
    const char **arguments;
    size_t variable_count;
    const char **names;
    const char **values;
    size_t folder_count;
    const char **folders;  /* of this machine */
    const char **known_as; /* by the guest */
    const uint8_t *writable; /* 1 for a folder that the guest may change */
    int inherit_stdout;
    int inherit_stderr;
} ms_wt_wasi;

/* What was refused, where not all was taken; a folder's number is added to the last one. */
enum ms_wt_refused { MS_WT_ARGUMENTS = 1, MS_WT_ENVIRONMENT, MS_WT_SET, MS_WT_FOLDER };

/* True in a child of a fork whose parent opened a path or captured output by WASI: that may wait for ever for wasmtime's worker
 * threads, which are not in the child. */
int ms_wt_workers_lost(void);
/* Gives the cell's store a new state of WASI; whatever it had of it is gone.  An output that is not NULL captures its stream.
 * 0 or what was refused; with MS_WT_SET, the cell's `error` is the caller's to delete. */
size_t ms_wt_wasi_give(ms_wt_cell *cell, const ms_wt_wasi *wasi, ms_wt_output *out, ms_wt_output *err);

/* -- WASI calls that could wait past a deadline -- */

/* The shim, which hosts/wasmtime/wasi.py has the text of, and a linker with WASI alone.  Both outlive every use. */
typedef struct {
    uintptr_t module;
    uintptr_t linker;
} ms_wt_shim;

/* Defines poll_oneoff (`opens` 0) or path_open (1) of WASI in a linker that may shadow them, as ms_wt_define does.  `foreign` says
 * that the linker serves one instance, in a store that ms_wt_open did not make. */
uintptr_t ms_wt_define_wait(uintptr_t linker, uintptr_t type, uint64_t identity, const ms_wt_shim *shim, int opens, int foreign);
/* ---- functions that Python defines: none may let an exception escape ---- */

#define PYTHON_DEFINES /* for cffi: extern "Python+C" (CMakeLists.txt) */

/* May the index-th memory of this group have `byte_size` bytes?  1: yes; 0: no; below 0: no, and the negated name of an exception. */
PYTHON_DEFINES int64_t ms_wt_python_grow(uint64_t creator, uint64_t token, size_t index, size_t byte_size);
/* A memory for somebody who uses the engine without us: 1 with token, base and capacity, or 0 with a message. */
PYTHON_DEFINES int64_t ms_wt_python_lease(uint64_t creator, size_t minimum, size_t maximum, uint64_t *token,
                                             uintptr_t *base, size_t *capacity, char *message, size_t room);
/* Runs a host function over `count` values of 16 bytes: 0, or the name of an exception. */
PYTHON_DEFINES int64_t ms_wt_python_call(uint64_t identity, uint8_t *values, size_t count);
