/* The gate, address ranges, images and the mappings of slots. memslot.h has the contract. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

/* ---- the gate ---- */

static _Atomic uint64_t counts_now[MS_CALLS];
static _Atomic uint64_t inject_skip[MS_CALLS];
static _Atomic int inject_error[MS_CALLS];

int ms_refused(enum ms_call call)
{
    /* Relaxed: a counter orders nothing, and a full barrier would be felt in every reset. */
    atomic_fetch_add_explicit(&counts_now[call], 1, memory_order_relaxed);
    if (atomic_load_explicit(&inject_error[call], memory_order_relaxed) == 0)
        return 0;
    uint64_t skip = atomic_load(&inject_skip[call]);
    while (skip > 0)
        if (atomic_compare_exchange_weak(&inject_skip[call], &skip, skip - 1))
            return 0;
    /* Exchange, so that one call alone fails, also if two threads make it at once. */
    int error = atomic_exchange(&inject_error[call], 0);
    errno = error;
    return error != 0;
}

void ms_counters(uint64_t *counts)
{
    for (int call = 0; call < MS_CALLS; call++)
        counts[call] = atomic_load_explicit(&counts_now[call], memory_order_relaxed);
}

int ms_inject(int call, uint64_t skip, int error)
{
    if (call < 0 || call >= MS_CALLS)
        return -EINVAL;
    /* Disarm first and arm last: another thread must not meet the new error with the old skip. */
    atomic_store(&inject_error[call], 0);
    atomic_store(&inject_skip[call], skip);
    atomic_store(&inject_error[call], error);
    return 0;
}

size_t ms_page_size(void)
{
    static _Atomic size_t known; /* sysconf(3) is a function call too many for every reset */
    size_t page = atomic_load_explicit(&known, memory_order_relaxed);
    if (page == 0) {
        page = (size_t)sysconf(_SC_PAGESIZE);
        atomic_store_explicit(&known, page, memory_order_relaxed);
    }
    return page;
}

/* ---- this process ---- */

unsigned ms_forks, ms_forks_seen;
static _Atomic int own_pagemap = -1;

/* Runs in the child of every fork(3), with one thread and possibly with locks of the parent's other threads taken: call
 * nothing here that is not async-signal-safe. */
static void begin_child(void)
{
    ms_forks++;
    /* Forget the parent's descriptor: it goes on showing the parent's pages, and a reset by it would miss every page that
     * the child wrote. */
    int parents = atomic_exchange(&own_pagemap, -1);
    if (parents >= 0)
        ms_close(parents);
}

int ms_watch_forks(void)
{
    /* pthread_atfork and not os.register_at_fork: a C library's own fork(3) does not tell Python. */
    return -pthread_atfork(NULL, NULL, begin_child);
}

int ms_pagemap(void)
{
    int known = atomic_load_explicit(&own_pagemap, memory_order_relaxed);
    if (known >= 0)
        return known;
    int opened = GATE(MS_OPEN, open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    if (opened < 0)
        return -errno;
    if (atomic_compare_exchange_strong(&own_pagemap, &known, opened))
        return opened;
    ms_close(opened); /* another thread was faster, and `known` is its descriptor */
    return known;
}

/* ---- address ranges ---- */

/* Maps over [base, base + length). MAP_FIXED is in the flags of every caller: without it the kernel could map elsewhere and
 * the old bytes would stay. So is MAP_PRIVATE: without a sharing type mmap(2) fails with EINVAL, and a cover that fails
 * unnoticed leaves one tenant's bytes to the next. MAP_NORESERVE keeps the mapping out of the overcommit heuristic. */
static int map_over(uintptr_t base, size_t length, int protection, int flags, int fd, size_t offset)
{
    void *got = ms_refused(MS_MMAP) ? MAP_FAILED : mmap((void *)base, length, protection, flags, fd, (off_t)offset);
    return got == MAP_FAILED ? -errno : 0;
}

enum {
    OVER_ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
    OVER_FILE = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED,
};

int ms_reserve(size_t length, uintptr_t *base)
{
    /* PROT_NONE and MAP_NORESERVE: address space alone, so that vm.overcommit_memory=2 has nothing to count. */
    void *got = ms_refused(MS_MMAP)
                    ? MAP_FAILED
                    : mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return -errno;
    *base = (uintptr_t)got;
    return 0;
}

int ms_unmap(uintptr_t base, size_t length)
{
    return GATE(MS_MUNMAP, munmap((void *)base, length)) ? -errno : 0;
}

int ms_unmap_once(ms_range *range)
{
    /* Exchange, so that of two threads one alone unmaps. */
    size_t length = __atomic_exchange_n(&range->length, 0, __ATOMIC_ACQ_REL);
    return length && range->base ? ms_unmap(range->base, length) : 0;
}

int ms_cover(uintptr_t base, size_t length)
{
    return map_over(base, length, PROT_NONE, OVER_ANONYMOUS, -1, 0);
}

int ms_zero(uintptr_t base, size_t length)
{
    return map_over(base, length, PROT_READ | PROT_WRITE, OVER_ANONYMOUS, -1, 0);
}

int ms_allow(uintptr_t base, size_t length)
{
    return GATE(MS_MPROTECT, mprotect((void *)base, length, PROT_READ | PROT_WRITE)) ? -errno : 0;
}

int ms_forbid(uintptr_t base, size_t length)
{
    return GATE(MS_MPROTECT, mprotect((void *)base, length, PROT_NONE)) ? -errno : 0;
}

int ms_discard(uintptr_t base, size_t length)
{
    /* MADV_DONTNEED and not MADV_FREE: the latter keeps the old bytes until the kernel needs the memory. */
    return GATE(MS_MADVISE, madvise((void *)base, length, MADV_DONTNEED)) ? -errno : 0;
}

#define MS_MADV_PAGEOUT 21

int ms_page_out(uintptr_t base, size_t length)
{
    return GATE(MS_MADVISE, madvise((void *)base, length, MS_MADV_PAGEOUT)) ? -errno : 0;
}

/* ---- images ---- */

int ms_memfd(const char *name, unsigned flags, size_t length, int *fd)
{
    /* The system call itself: some C libraries have no wrapper. */
    int got = (int)GATE(MS_MEMFD_CREATE, syscall(SYS_memfd_create, name, flags));
    if (got < 0)
        return -errno;
    int failed = ms_resize(got, length);
    if (failed) {
        ms_close(got);
        return failed;
    }
    *fd = got;
    return 0;
}

int ms_write(int fd, const uint8_t *bytes, size_t length, size_t file_offset)
{
    while (length > 0) {
        ssize_t done = GATE(MS_PWRITE, pwrite(fd, bytes, length, (off_t)file_offset));
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) /* a write of 0 bytes would go on for ever */
            return done < 0 ? -errno : -EIO;
        bytes += done;
        length -= (size_t)done;
        file_offset += (size_t)done;
    }
    return 0;
}

/* The kernel waits up to 0.15 s in each call, so this is 2.4 s in all. */
#define SEAL_TRIES 16

int ms_seal(int fd)
{
    /* F_SEAL_WRITE keeps every later guest's image as it is; F_SEAL_SHRINK keeps an access within the file, where it would
     * raise SIGBUS. Retry EBUSY: the kernel answers it while a page has another reference (memfd_wait_for_pins() in
     * mm/memfd.c), which the kernel itself takes for a moment when it moves the page. */
    int seals = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE | F_SEAL_SEAL;
    int failed = -EBUSY;
    for (int tries = 0; failed == -EBUSY && tries < SEAL_TRIES; tries++)
        failed = GATE(MS_FCNTL, fcntl(fd, F_ADD_SEALS, seals)) ? -errno : 0;
    return failed;
}

int ms_seals(int fd, int *seals)
{
    int got = GATE(MS_FCNTL, fcntl(fd, F_GET_SEALS));
    if (got < 0)
        return -errno;
    *seals = got;
    return 0;
}

int ms_resize(int fd, size_t length)
{
    return GATE(MS_FTRUNCATE, ftruncate(fd, (off_t)length)) ? -errno : 0;
}

int ms_close(int fd)
{
    /* Close even if a test told the call to fail, and never twice: after an error of close(2) the number is free, and a
     * second close would hit another thread's file. */
    int told = ms_refused(MS_CLOSE) ? errno : 0;
    return close(fd) ? -errno : -told;
}

int ms_close_once(int *fd)
{
    int taken = __atomic_exchange_n(fd, -1, __ATOMIC_ACQ_REL);
    return taken < 0 ? 0 : ms_close(taken);
}

int ms_view(int fd, size_t length, uintptr_t *address)
{
    /* MAP_PRIVATE: before Linux 6.7 a write-sealed memfd could not be mapped shared, not even to read. */
    void *got = ms_refused(MS_MMAP) ? MAP_FAILED : mmap(NULL, length, PROT_READ, MAP_PRIVATE, fd, 0);
    if (got == MAP_FAILED)
        return -errno;
    *address = (uintptr_t)got;
    return 0;
}

/* ---- slots ---- */

int ms_map_extents(uintptr_t base, const ms_extent *extents, size_t count)
{
    /* MAP_PRIVATE makes this copy-on-write: a guest's writes must never reach the file that every other slot maps. */
    int failed = 0;
    for (size_t i = 0; i < count && !failed; i++)
        failed = map_over(base + extents[i].offset, extents[i].length, PROT_READ | PROT_WRITE, OVER_FILE, extents[i].fd,
                          extents[i].file_offset);
    return failed;
}

int ms_zero_extents(uintptr_t base, const ms_extent *extents, size_t count)
{
    int failed = 0;
    for (size_t i = 0; i < count && !failed; i++)
        failed = ms_zero(base + extents[i].offset, extents[i].length);
    return failed;
}

void ms_copy_extents(uintptr_t base, const ms_extent *extents, size_t count)
{
    for (size_t i = 0; i < count; i++)
        memcpy((uint8_t *)base + extents[i].offset, extents[i].bytes, extents[i].length);
}

void ms_fill_bytes(uintptr_t base, size_t length, const ms_extent *extents, size_t count)
{
    memset((void *)base, 0, length);
    ms_copy_extents(base, extents, count);
}

int ms_map_extension(uintptr_t base, size_t length, int fd)
{
    /* MAP_PRIVATE: bytes in the file itself would be seen by every process forked from here. Shrinking the file takes
     * private pages away as well, so a reset by ftruncate loses nothing by it. */
    return map_over(base, length, PROT_READ | PROT_WRITE, OVER_FILE, fd, 0);
}
