/* The C core of memslot: system calls in loops, without pools, policy or Python.
 *
 * Contract of every function, unless its own comment says otherwise:
 *   - Addresses and lengths are multiples of the host page (ms_page_size()). Addresses are not null.
 *   - The result is 0, or -errno of the system call that failed. Only EINTR is retried. Nothing is printed.
 *   - A function unmaps or closes only what it mapped or opened in the same call.
 *   - A function that fails half-way leaves old and new mappings mixed, but no hole that another thread's mmap(2) could
 *     fall into. The caller may always cover the whole range with ms_cover().
 *
 * Every system call passes one gate (internal.h), which counts it and which a test can tell to fail (ms_inject). So "no
 * system call" and "this failure loses nothing" are facts that a test checks. Not behind the gate: bench_floor.c, which
 * only the benchmark calls, and analyse.c, which makes no system call.
 *
 * cffi reads this file without its preprocessor lines (CMakeLists.txt), so it declares constants as enums or `static const`. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* ---- shapes ---- */

/* `length` bytes at `offset` of a linear memory. They stand at `file_offset` of the image's file `fd`, and, readable, at
 * `bytes` of this process. `fd` is -1 for an image that is copied instead of mapped. Sizes and offsets are multiples of
 * the host page. */
typedef struct {
    size_t offset;
    size_t length;
    size_t file_offset;
    const uint8_t *bytes;
    int fd;
} ms_extent;

/* An address range that was mapped, until ms_unmap_once() has taken its length. */
typedef struct {
    uintptr_t base;
    size_t length;
} ms_range;

/* The pristine contents of [base, base + accessible): the extents, in ascending order, over zeros. */
typedef struct {
    uintptr_t base;
    size_t accessible;
    const ms_extent *extents;
    size_t count;
    int copied; /* the extents are copied, not mapped: MADV_DONTNEED leaves zeros there instead of the image */
} ms_memory;

/* The findings and the price of one reset. */
typedef struct {
    size_t private_pages;   /* pages that belong to this process alone, because they were written or copied */
    size_t runs;            /* runs of private pages */
    size_t anonymous_pages; /* private pages above the mapped extents, where no file is mapped */
    size_t dirty_pages;     /* pages that were restored: those that differed, or all if the reset did not compare */
    size_t dropped_pages;   /* pages that went back to the kernel */
    unsigned scans;         /* PAGEMAP_SCAN calls */
    int split_scan;         /* anonymous pages were listed by a scan of their own */
    int compared;           /* pages were compared before they were restored */
    uint64_t scan_nanoseconds;
    uint64_t nanoseconds; /* the whole reset, scans included */
} ms_reset_report;

/* The limits within which the fast path need not ask Python, and the prices that it compares. */
typedef struct {
    size_t keep_pages;      /* private pages that stay resident; further ones go back to the kernel */
    size_t idle_pages;      /* slow path from this many private pages on that were pristine */
    unsigned compare_every; /* each so-many-th reset compares; 0 for none */
    int64_t unexplained_ns; /* slow path if the scans took this much longer than the private pages explain */
    uint64_t scan_price;    /* picoseconds: one scan by itself, */
    uint64_t file_page_price; /* each private page below the end of the mapped extents, */
    uint64_t anonymous_page_price; /* each private page above it */
} ms_reset_limits;

/* A memory that is reset many times. */
typedef struct {
    ms_memory memory;
    ms_reset_report report; /* of the latest reset */
    const ms_reset_limits *limits;
    unsigned resets_since_compare;
    /* Called once, before pages are restored, by a reset that finds more than a few; or NULL. Python releases the GIL
     * here: a short reset is over before another thread could have used the GIL. */
    void (*before_long)(void);
} ms_slot;

/* The system calls that the gate counts. CALLS in __init__.py lists the same names in the same order. */
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

/* Copies the numbers of system calls made since the process began, in the order of enum ms_call. */
void ms_counters(uint64_t *counts);
/* Lets the (skip + 1)-th next call of this kind fail once with `error` instead of reaching the kernel. Error 0 disarms.
 * Returns -EINVAL for an unknown call. */
int ms_inject(int call, uint64_t skip, int error);
size_t ms_page_size(void);

/* ---- this process ---- */

/* The number of forks between the process that loaded the core and this one, whatever called fork(3), and the number when Python
 * last saw to what a fork needs. */
extern unsigned ms_forks, ms_forks_seen;
/* Begins to count forks. */
int ms_watch_forks(void);
/* Returns a descriptor of /proc/self/pagemap, or -errno. It is opened once per process: a descriptor that was inherited
 * over a fork shows the parent's pages. */
int ms_pagemap(void);

/* ---- address ranges ---- */

/* Reserves address space that faults on access and counts towards no overcommit limit. */
int ms_reserve(size_t length, uintptr_t *base);
int ms_unmap(uintptr_t base, size_t length);
/* Unmaps the range and makes its length 0, or does nothing if that or its base is 0. One call does both, because an
 * exception between two would lose the range, or unmap it twice. */
int ms_unmap_once(ms_range *range);
/* Maps faulting anonymous memory over the range. Its bytes are gone, its addresses stay taken. */
int ms_cover(uintptr_t base, size_t length);
/* Maps readable and writable zeros over the range. */
int ms_zero(uintptr_t base, size_t length);
/* Makes the range readable and writable. */
int ms_allow(uintptr_t base, size_t length);
/* Makes the range fault on access; its bytes stay. */
int ms_forbid(uintptr_t base, size_t length);
/* Drops private pages. The next access sees the image's bytes, or zeros where no image is mapped. */
int ms_discard(uintptr_t base, size_t length);
/* Asks the kernel to swap the range out (MADV_PAGEOUT, Linux 5.4). */
int ms_page_out(uintptr_t base, size_t length);

/* ---- images ---- */

/* Makes an anonymous file of `length` zero bytes that may be sealed; `flags` as for memfd_create(2). */
int ms_memfd(const char *name, unsigned flags, size_t length, int *fd);
/* Writes all of `bytes`. Nothing needs to be aligned. */
int ms_write(int fd, const uint8_t *bytes, size_t length, size_t file_offset);
/* Seals a memfd against growing, shrinking, writing and further seals. Tries again for at most 2.4 s on EBUSY. */
int ms_seal(int fd);
int ms_seals(int fd, int *seals);
int ms_resize(int fd, size_t length);
/* Closes a descriptor, which is closed even if the result is an error. */
int ms_close(int fd);
/* Closes *fd and makes it -1, or does nothing if it is negative; as ms_unmap_once(). */
int ms_close_once(int *fd);
/* Maps the file's first `length` bytes read-only, anywhere. */
int ms_view(int fd, size_t length, uintptr_t *address);
/* Finds the runs of pages that are not all zero. Runs with fewer than `min_gap` zero bytes between them become one.
 * `length` need not be a multiple of the page; the last extent is rounded up. Fills at most `capacity` extents (offset,
 * length, and file offsets that pack them) and returns how many there are. */
size_t ms_find_extents(const uint8_t *bytes, size_t length, size_t page, size_t min_gap, ms_extent *extents,
                       size_t capacity);

/* ---- slots: [base, base + ...) is a slot's own range ---- */

/* Maps each extent of the file copy-on-write, readable and writable. */
int ms_map_extents(uintptr_t base, const ms_extent *extents, size_t count);
/* Maps readable and writable zeros over each extent. */
int ms_zero_extents(uintptr_t base, const ms_extent *extents, size_t count);
/* Copies each extent, without a system call. */
void ms_copy_extents(uintptr_t base, const ms_extent *extents, size_t count);
/* Zeroes `length` bytes and copies each extent over them. Nothing needs to be aligned. */
void ms_fill_bytes(uintptr_t base, size_t length, const ms_extent *extents, size_t count);
/* Maps an empty file, readable and writable, over the range. Growing the file makes that much of the range private zeros;
 * an access past the file's end raises SIGBUS. */
int ms_map_extension(uintptr_t base, size_t length, int fd);
/* Returns the offset of the first byte that is not pristine, or -1. Makes no system call. */
int64_t ms_first_difference(const ms_memory *memory);
/* Finds the pages of `runs` (offset and length, ascending, below `accessible`) that are not pristine. Pages with fewer than
 * `min_gap` bytes between them become one extent. Fills at most `capacity` extents and returns how many there are. Makes no
 * system call. */
size_t ms_find_changes(const ms_memory *memory, const ms_extent *runs, size_t count, size_t min_gap, ms_extent *changes,
                       size_t capacity);

/* ---- resets: after success the memory is pristine (reset.c) ---- */

/* Drops every private page. Copies the extents back if they are not mapped. */
int ms_reset_discard(const ms_memory *memory, ms_reset_report *report);
/* Maps zeros and the extents over everything, or copies the extents. */
int ms_reset_remap(const ms_memory *memory, ms_reset_report *report);
/* Compares the first `keep_pages` pages and restores those that differ; reads all of them. Drops what comes after them,
 * except for copied extents, which are restored. */
int ms_reset_copy(const ms_memory *memory, size_t keep_pages, ms_reset_report *report);
/* Lists private pages by PAGEMAP_SCAN, compares each and restores those that differ. The first `keep_pages` private pages
 * and the pages of copied extents stay resident; further ones are dropped. Returns the number of pages restored or
 * dropped, or -errno. `pagemap` is an open /proc/self/pagemap. */
int64_t ms_reset_pagemap(int pagemap, const ms_memory *memory, size_t keep_pages, ms_reset_report *report);

/* Answers about the fast path; Python passes MS_NOT_TRIED on where there was no reset yet. */
enum ms_reset_answer {
    MS_FAST,      /* reset, and within the limits */
    MS_SLOW,      /* reset, and Python has to look at the report */
    MS_NOT_TRIED,
};

/* Resets as ms_reset_pagemap does, with ms_pagemap() and the slot's limits, comparing only each `compare_every`-th time.
 * Returns MS_FAST, MS_SLOW, or -errno. */
int ms_reset_fast(ms_slot *slot);
/* Returns by how many nanoseconds the scans took longer than the private pages explain. */
int64_t ms_unexplained_ns(const ms_reset_report *report, const ms_reset_limits *limits);

/* Lists the runs of pages that ms_reset_pagemap would look at, without touching them. Fills at most `capacity` runs; the
 * report counts all. A file may be mapped anywhere in the range. */
int ms_list_private(int pagemap, const ms_memory *memory, ms_extent *runs, size_t capacity, ms_reset_report *report);
/* Makes the runs private and resident without changing a byte (MADV_POPULATE_WRITE, Linux 5.14). */
int ms_populate(uintptr_t base, const ms_extent *runs, size_t count);

/* ---- code: the instructions of a module that may change state outside of its memories (analyse.c) ---- */

/* The kinds of instruction that are looked for. memory.atomic.wait32 and wait64 are one kind. */
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

/* The reason why a code section is not understood. */
enum ms_code_fault {
    MS_CODE_UNDERSTOOD,
    MS_CODE_CUT,     /* the bytes end inside of an entry or instruction */
    MS_CODE_OPCODE,  /* unknown opcode */
    MS_CODE_TYPE,    /* unknown type */
    MS_CODE_FLAGS,   /* unknown flag */
    MS_CODE_INTEGER, /* an integer of too many bytes */
    MS_CODE_INDEX,   /* an index that does not exist */
    MS_CODE_BODY     /* bytes left after a body, or after the last one */
};

/* The bits of a mark: an instruction reads the thing (a segment), or changes it (sets, grows, drops). */
enum ms_code_mark { MS_CODE_USED = 1, MS_CODE_CHANGED = 2 };

/* `opcode` of a report whose fault is not in an instruction. */
enum { MS_CODE_NO_OPCODE = 256 };

/* All instructions of one kind. Offsets count from the module's first byte, functions are indices. */
typedef struct {
    uint64_t count;
    uint32_t functions; /* functions that have one */
    uint32_t first_function;
    uint32_t last_function;
    size_t first_offset;
} ms_code_found;

/* One index space: a byte of mark bits for each of `count` things. */
typedef struct {
    uint8_t *marks;
    size_t count;
} ms_code_space;

/* The caller's part: index spaces with marks set to zero. */
typedef struct {
    uint32_t first_function; /* index of the first body's function */
    ms_code_space globals;
    ms_code_space tables;
    ms_code_space memories;
    ms_code_space data;
    ms_code_space elements;
} ms_code_marks;

/* The findings, complete only if `fault` is MS_CODE_UNDERSTOOD. */
typedef struct {
    int fault;
    uint32_t function; /* where the fault is, down to `sub` */
    size_t offset;
    uint32_t opcode;
    uint32_t sub; /* the number after a prefix */
    uint32_t bodies;
    uint64_t instructions;
    ms_code_found found[MS_CODE_KINDS];
} ms_code_report;

/* Walks the code section whose contents are bytes [start, end) of a module. Reads nothing else. */
void ms_analyse_code(const uint8_t *bytes, size_t start, size_t end, ms_code_marks *marks, ms_code_report *report);

/* ---- measuring: the floor that `memslot bench` compares with (bench_floor.c) ---- */

/* Writes 8 bytes into each of the pages at these offsets. */
void ms_bench_write(uintptr_t base, const size_t *offsets, size_t count, uint64_t value);
/* Reads a byte of each page. */
uint64_t ms_bench_read(uintptr_t base, size_t length);
/* The least that a reset can do, in nanoseconds, or -errno. The memory has one extent, at 0; `offsets` are its dirty pages. */
int64_t ms_bench_floor(int pagemap, const ms_memory *memory, const size_t *offsets, size_t count);
/* Computes for so many nanoseconds, touching no memory, and returns the number of turns. */
uint64_t ms_bench_spin(int64_t nanoseconds);
