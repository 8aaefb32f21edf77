/* Everything that C and Python share.  Read twice: by the C compiler through memslot.h, and by cffi, which knows no
 * preprocessor: keep this file free of directives.  The build appends callbacks.cdef (functions that Python defines)
 * for cffi. */

/* `length` bytes at `offset` of a linear memory, found at `file_offset` of its image's file `fd` (-1 for an image that
 * is copied and not mapped) and, readable, at `bytes` of this process; sizes and offsets are multiples of the page. */
typedef struct {
    size_t offset;
    size_t length;
    size_t file_offset;
    const uint8_t *bytes;
    int fd;
} ms_extent;

/* What [base, base + accessible) must hold when it is pristine: the extents, in ascending order, over zeros.  `copied`: they
 * are not mapped, so that what is dropped does not come back by itself. */
typedef struct {
    uintptr_t base;
    size_t accessible;
    const ms_extent *extents;
    size_t count;
    int copied;
} ms_memory;

/* What a reset found and paid: pages private to the slot, in how many runs, and how many of them above the mapped extents; those
 * that were put back, because they differed where they were `compared` and blindly where not; those that were given back to the
 * kernel; in how many scans, and whether the pages above were listed `apart`, by another scan than those that may be the file's;
 * time for the scans alone and for everything. */
typedef struct {
    size_t private_pages;
    size_t runs;
    size_t plain_pages;
    size_t dirty_pages;
    size_t dropped_pages;
    unsigned scans;
    int apart;
    int compared;
    uint64_t scan_nanoseconds;
    uint64_t nanoseconds;
} ms_reset_report;

/* Private pages beyond the first `keep_pages` are given back to the kernel.  A reset that found fewer than `idle_pages` private
 * pages pristine, and scanned for less than `spare_nanoseconds` longer than its private pages explain, is an ordinary one.
 * Each `compare_every`-th reset compares (0: none).  The prices of a scan, in picoseconds: by itself, for a page that may be the
 * file's, and for another one. */
typedef struct {
    size_t keep_pages;
    size_t idle_pages;
    unsigned compare_every;
    int64_t spare_nanoseconds;
    uint64_t scan_price;
    uint64_t file_page_price;
    uint64_t plain_page_price;
} ms_reset_limits;

/* A memory that is reset time and again; `blind` resets since the last one that compared.  `before_long`, if it is set, is called
 * once by a reset that finds more than a few private pages, before it puts them back. */
typedef struct {
    ms_memory memory;
    ms_reset_report report;
    const ms_reset_limits *limits;
    unsigned blind;
    void (*before_long)(void);
} ms_slot;

/* The system calls that the gate counts. */
enum ms_call {
    MS_MMAP,
    MS_MUNMAP,
    MS_MPROTECT,
    MS_MADVISE,
    MS_MEMFD_CREATE,
    MS_FTRUNCATE,
    MS_PWRITE,
    MS_FCNTL,
    MS_CLOSE,
    MS_OPEN,
    MS_PAGEMAP_SCAN,
    MS_CALLS
};

/* ---- the gate ---- */

/* Copies the number of system calls made since the process began, by enum ms_call. */
void ms_counters(uint64_t *counts);
/* Lets the (skip + 1)-th next call of this kind fail once with `error` instead of reaching the kernel; error 0 disarms.
 * -EINVAL for an unknown call. */
int ms_inject(int call, uint64_t skip, int error);
size_t ms_page_size(void);

/* ---- this process ---- */

/* How often this process, or one that it descends from, was forked since the core was loaded, by whatever called fork(3). */
extern unsigned ms_forks;
/* Begins to count forks; -errno. */
int ms_watch_forks(void);
/* A descriptor of /proc/self/pagemap, or -errno; opened once, and again in a child of a fork, for the parent's shows the parent. */
int ms_pagemap(void);

/* ---- address ranges ---- */

/* Reserves address space that faults on access and counts towards no overcommit limit. */
int ms_reserve(size_t length, uintptr_t *base);
int ms_unmap(uintptr_t base, size_t length);
/* The same for what `base` holds, which is 0 from then on, or again the address if the kernel refused; 0 is nothing to do.
 * Nothing can come between the two, so that nobody unmaps twice what may be somebody else's by then. */
int ms_unmap_held(uintptr_t *base, size_t length);
/* Maps faulting anonymous memory over whatever is there: the bytes are gone, the range stays taken. */
int ms_cover(uintptr_t base, size_t length);
/* Maps readable and writable zeros over whatever is there. */
int ms_zero(uintptr_t base, size_t length);
/* Changes protection only: to readable and writable; to faulting. */
int ms_allow(uintptr_t base, size_t length);
int ms_forbid(uintptr_t base, size_t length);
/* Drops private pages: the next access sees the image's bytes, or zeros where no image is mapped. */
int ms_discard(uintptr_t base, size_t length);
/* Asks the kernel to swap the range out (MADV_PAGEOUT, Linux 5.4). */
int ms_page_out(uintptr_t base, size_t length);

/* ---- images ---- */

/* An anonymous file of `length` zero bytes that may be sealed; `flags` as for memfd_create(2).  Closed again if its
 * length cannot be set. */
int ms_memfd(const char *name, unsigned flags, size_t length, int *fd);
/* Writes all of `bytes`; no alignment is needed. */
int ms_write(int fd, const uint8_t *bytes, size_t length, size_t file_offset);
/* Seals against growing, shrinking, writing and further seals.  The kernel answers EBUSY while anyone holds one of its
 * pages (memfd_wait_for_pins() in its mm/memfd.c): also the kernel itself, for the moment in which it moves a page or
 * takes it from a list.  So it is asked again, for some seconds at most. */
int ms_seal(int fd);
int ms_seals(int fd, int *seals);
int ms_resize(int fd, size_t length);
int ms_close(int fd);
/* The same for what `fd` holds, which is -1 from then on; below 0 is nothing to do. */
int ms_close_held(int *fd);
/* Maps the file's first `length` bytes read-only, anywhere. */
int ms_view(int fd, size_t length, uintptr_t *address);
/* Finds the runs of pages that are not all zero, joining runs with fewer than `min_gap` zero bytes between them;
 * `length` need not be a page multiple, the last extent is rounded up.  Fills at most `capacity` extents (offset and
 * length; file_offset packs them one after the other) and returns how many there are in all. */
size_t ms_find_extents(const uint8_t *bytes, size_t length, size_t page, size_t min_gap, ms_extent *extents,
                       size_t capacity);

/* ---- slots: everything below works on [base, base + ...) of a slot ---- */

/* Maps each extent of the file copy-on-write, readable and writable. */
int ms_map_extents(uintptr_t base, const ms_extent *extents, size_t count);
/* Maps readable and writable zeros over each extent. */
int ms_zero_extents(uintptr_t base, const ms_extent *extents, size_t count);
/* Copies each extent; no system call. */
void ms_copy_extents(uintptr_t base, const ms_extent *extents, size_t count);
/* Makes `length` bytes zeros, and copies each extent, which need not be aligned here, over them. */
void ms_fill_bytes(uintptr_t base, size_t length, const ms_extent *extents, size_t count);
/* Maps an empty file, readable and writable, over [base, base + length): as much of it as the file is made long holds private
 * zeros, and an access past the file's end raises SIGBUS. */
int ms_map_extension(uintptr_t base, size_t length, int fd);
/* The offset of the first byte that is not pristine, or -1; no system call. */
int64_t ms_first_difference(const ms_memory *memory);
/* Finds the pages of these runs (offset and length, in ascending order, below accessible) that are not pristine, joining those
 * with fewer than `min_gap` bytes between them.  Fills at most `capacity` and returns how many there are in all; no system
 * call. */
size_t ms_find_changes(const ms_memory *memory, const ms_extent *runs, size_t count, size_t min_gap, ms_extent *changes,
                       size_t capacity);

/* ---- code: what a module's instructions may do to state outside of its memories (analyse.c) ---- */

/* The kinds of instruction that are looked for; memory.atomic.wait32 and wait64 are one kind. */
enum ms_code_kind {
    MS_CODE_TABLE_SET,
    MS_CODE_TABLE_GROW,
    MS_CODE_TABLE_FILL,
    MS_CODE_TABLE_COPY,
    MS_CODE_TABLE_INIT,
    MS_CODE_ELEM_DROP,
    MS_CODE_DATA_DROP,
    MS_CODE_MEMORY_INIT,
    MS_CODE_STRUCT_SET,
    MS_CODE_ARRAY_SET,
    MS_CODE_ARRAY_FILL,
    MS_CODE_ARRAY_COPY,
    MS_CODE_ARRAY_INIT_DATA,
    MS_CODE_ARRAY_INIT_ELEM,
    MS_CODE_MEMORY_GROW,
    MS_CODE_GLOBAL_SET,
    MS_CODE_ATOMIC_WAIT,
    MS_CODE_ATOMIC_NOTIFY,
    MS_CODE_KINDS
};

/* Why a code section is not understood: cut off inside of an entry or instruction; an unknown opcode, type or flag; an
 * integer of too many bytes; an index that does not exist; bytes left after a body or after the last one. */
enum ms_code_fault {
    MS_CODE_UNDERSTOOD,
    MS_CODE_CUT,
    MS_CODE_OPCODE,
    MS_CODE_TYPE,
    MS_CODE_FLAGS,
    MS_CODE_INTEGER,
    MS_CODE_INDEX,
    MS_CODE_BODY
};

/* The bits of a mark: its thing is read by an instruction (a segment), or changed by one (set, grown, dropped). */
enum ms_code_mark { MS_CODE_USED = 1, MS_CODE_CHANGED = 2 };

/* `opcode` of a report where the fault is not in an instruction. */
enum { MS_CODE_NO_OPCODE = 256 };

/* One instruction of a kind; `offset` counts from the module's first byte, `function` is an index. */
typedef struct {
    uint32_t kind;
    uint32_t function;
    size_t offset;
} ms_code_site;

/* All instructions of one kind: how many, in how many functions, and where the first one stands. */
typedef struct {
    uint64_t count;
    uint32_t functions;
    uint32_t first_function;
    uint32_t last_function;
    size_t first_offset;
} ms_code_found;

/* One index space: a byte of mark bits for each of `count` things. */
typedef struct {
    uint8_t *marks;
    size_t count;
} ms_code_space;

/* What the caller gives: the index of the first body's function, the index spaces of the module with marks set to zero, and,
 * for the kinds in `site_kinds` (bit 1 << kind), room for `site_capacity` sites. */
typedef struct {
    uint32_t first_function;
    ms_code_space globals;
    ms_code_space tables;
    ms_code_space memories;
    ms_code_space data;
    ms_code_space elements;
    uint32_t site_kinds;
    ms_code_site *sites;
    size_t site_capacity;
} ms_code_marks;

/* What was found, complete only where `fault` is MS_CODE_UNDERSTOOD: bodies and instructions walked, sites there are in all.
 * With a fault, `function`, `offset`, `opcode` and `sub` (what follows a prefix) say where it is. */
typedef struct {
    int fault;
    uint32_t function;
    size_t offset;
    uint32_t opcode;
    uint32_t sub;
    uint32_t bodies;
    uint64_t instructions;
    size_t sites;
    ms_code_found found[MS_CODE_KINDS];
} ms_code_report;

/* Walks the code section whose contents are bytes [start, end) of a module; reads nothing else. */
void ms_analyse_code(const uint8_t *bytes, size_t start, size_t end, ms_code_marks *marks, ms_code_report *report);

/* ---- resets: afterwards the memory is pristine ---- */

/* Lists the pages that became private (PAGEMAP_SCAN on `pagemap`, an open /proc/self/pagemap; present or swapped, not of the
 * file, and the kernel's zero page in extents only), compares each with its extent or zeros and puts it back if it differs.
 * The first `keep_pages` of them stay resident, and so does what was copied of the image; further ones are dropped.  The result
 * is how many pages were put back or dropped, or -errno. */
int64_t ms_reset_pagemap(int pagemap, const ms_memory *memory, size_t keep_pages, ms_reset_report *report);
/* How much longer than its private pages explain the scans of this report took, in nanoseconds. */
int64_t ms_spare_nanoseconds(const ms_reset_report *report, const ms_reset_limits *limits);
/* What ms_reset_watched answers, plus errno if it failed, where the reset was no ordinary one: 2**62. */
#define MS_NOTABLE 4611686018427387904

/* As ms_reset_pagemap, comparing only now and then, on ms_pagemap().  For an ordinary reset the result says everything at once:
 * the pages put back in bits 32 to 61, and the time it took, in units of 32 ns, below.  Otherwise it is MS_NOTABLE, and the report
 * says what it was. */
int64_t ms_reset_watched(ms_slot *slot);
/* Drops every private page, and copies the extents back if they are not mapped. */
int ms_reset_discard(const ms_memory *memory, ms_reset_report *report);
/* Maps zeros and the extents (or copies them) over everything. */
int ms_reset_remap(const ms_memory *memory, ms_reset_report *report);
/* Compares the first `keep_pages` with their extents or zeros and puts back those that differ; reads all of them, without a
 * system call.  What comes after them is dropped, but for what was copied of the image. */
int ms_reset_copy(const ms_memory *memory, size_t keep_pages, ms_reset_report *report);
/* Lists the runs of pages that ms_reset_pagemap would put back, without touching them: fills at most `capacity`, and the report
 * counts all.  A file may be mapped anywhere. */
int ms_list_private(int pagemap, const ms_memory *memory, ms_extent *runs, size_t capacity, ms_reset_report *report);
/* Makes the runs private and resident without changing a byte (MADV_POPULATE_WRITE, Linux >= 5.14). */
int ms_populate(uintptr_t base, const ms_extent *runs, size_t count);
/* Counts the private pages of the range without touching them. */
int ms_count_private(int pagemap, uintptr_t base, size_t length, ms_reset_report *report);

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


/* ---- measuring: what memslot_plugin/bench compares with (bench_floor.c) ---- */

/* Writes 8 bytes into each of the pages at these offsets. */
void ms_bench_write(uintptr_t base, const size_t *offsets, size_t count, uint64_t value);
/* Reads a byte of each page. */
uint64_t ms_bench_read(uintptr_t base, size_t length);
/* The least that a reset can be, in nanoseconds, or -errno: the scan, and a copy of exactly these pages from the only
 * extent, which begins at 0; or dropping everything. */
int64_t ms_bench_floor_pagemap(int pagemap, const ms_memory *memory, const size_t *offsets, size_t count);
int64_t ms_bench_floor_discard(const ms_memory *memory);
/* A bare comparison of everything with the one extent of the memory, and the copies. */
int64_t ms_bench_floor_copy(const ms_memory *memory, const size_t *offsets, size_t count);
/* Computes until then (nanoseconds from now on), touching no memory; how many turns that were. */
uint64_t ms_bench_spin(int64_t nanoseconds);
