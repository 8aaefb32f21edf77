#include "memslot.h"
#include "pagemap.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* ---- the gate ---- */

static _Atomic uint64_t counts_now[MS_CALLS];
static _Atomic uint64_t inject_skip[MS_CALLS];
static _Atomic int inject_error[MS_CALLS];

/* Counts the call; true, with errno set, if it was told to fail. */
static int refused(enum ms_call call)
{
    atomic_fetch_add_explicit(&counts_now[call], 1, memory_order_relaxed);
    if (atomic_load_explicit(&inject_error[call], memory_order_relaxed) == 0)
        return 0;
    uint64_t skip = atomic_load(&inject_skip[call]);
    while (skip > 0)
        if (atomic_compare_exchange_weak(&inject_skip[call], &skip, skip - 1))
            return 0;
    int error = atomic_exchange(&inject_error[call], 0);
    errno = error;
    return error != 0;
}

/* Runs one system call through the gate: -1 with errno if it was told to fail or failed. */
#define GATE(call, expression) (refused(call) ? -1 : (expression))

void ms_counters(uint64_t *counts)
{
    for (int call = 0; call < MS_CALLS; call++)
        counts[call] = atomic_load_explicit(&counts_now[call], memory_order_relaxed);
}

int ms_inject(int call, uint64_t skip, int error)
{
    if (call < 0 || call >= MS_CALLS)
        return -EINVAL;
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

unsigned ms_forks;
static _Atomic int own_pagemap = -1;

/* In a child: the parent's descriptor shows the parent's pages. */
static void begin_child(void)
{
    ms_forks++;
    int parents = atomic_exchange(&own_pagemap, -1);
    if (parents >= 0)
        ms_close(parents);
}

int ms_watch_forks(void)
{
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
    ms_close(opened); /* another thread was faster */
    return known;
}

/* ---- address ranges ---- */

/* mmap(2) through the gate, with the kernel's answer checked: MAP_FIXED must give what was asked for. */
static int map(uintptr_t base, size_t length, int protection, int flags, int fd, size_t offset)
{
    void *got = refused(MS_MMAP) ? MAP_FAILED : mmap((void *)base, length, protection, flags, fd, (off_t)offset);
    return got == MAP_FAILED ? -errno : 0;
}

int ms_reserve(size_t length, uintptr_t *base)
{
    /* PROT_NONE and MAP_NORESERVE: address space alone, so that overcommit_memory=2 has nothing to count. */
    void *got = refused(MS_MMAP) ? MAP_FAILED
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

int ms_unmap_held(uintptr_t *base, size_t length)
{
    uintptr_t held = __atomic_exchange_n(base, 0, __ATOMIC_SEQ_CST);
    int failed = held ? ms_unmap(held, length) : 0;
    if (failed)
        *base = held;
    return failed;
}

int ms_cover(uintptr_t base, size_t length)
{
    return map(base, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

int ms_zero(uintptr_t base, size_t length)
{
    return map(base, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
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
    /* The system call itself and not the C library's wrapper, which some C libraries lack. */
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
        if (done <= 0)
            return done < 0 ? -errno : -EIO;
        bytes += done;
        length -= (size_t)done;
        file_offset += (size_t)done;
    }
    return 0;
}

/* Some 2.4 s of the kernel's own waiting, which is at most 0.15 s a call. */
#define SEAL_TRIES 16

int ms_seal(int fd)
{
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
    /* close(2): the descriptor is gone whatever the answer is, so a failure that was told to happen closes it too. */
    int told = refused(MS_CLOSE) ? errno : 0;
    return close(fd) ? -errno : -told;
}

int ms_close_held(int *fd)
{
    int held = __atomic_exchange_n(fd, -1, __ATOMIC_SEQ_CST);
    return held < 0 ? 0 : ms_close(held);
}

int ms_view(int fd, size_t length, uintptr_t *address)
{
    /* MAP_PRIVATE: before Linux 6.7 a write-sealed memfd could not be mapped shared, not even to read. */
    void *got = refused(MS_MMAP) ? MAP_FAILED : mmap(NULL, length, PROT_READ, MAP_PRIVATE, fd, 0);
    if (got == MAP_FAILED)
        return -errno;
    *address = (uintptr_t)got;
    return 0;
}

/* Whether every byte is zero: the first is, and each equals its neighbour. */
static int all_zero(const uint8_t *bytes, size_t length)
{
    return length == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0);
}

size_t ms_find_extents(const uint8_t *bytes, size_t length, size_t page, size_t min_gap, ms_extent *extents,
                       size_t capacity)
{
    size_t count = 0, end = 0, file_offset = 0;
    ms_extent last = {0};
    for (size_t at = 0; at < length; at += page) {
        size_t here = length - at < page ? length - at : page;
        if (all_zero(bytes + at, here))
            continue;
        if (count > 0 && at - end < min_gap) {
            file_offset += at + page - end;
            last.length = at + page - last.offset;
        } else {
            count++;
            last = (ms_extent){.offset = at, .length = page, .file_offset = file_offset, .fd = -1};
            file_offset += page;
        }
        end = at + page;
        if (count <= capacity)
            extents[count - 1] = last;
    }
    return count;
}

/* ---- slots ---- */

int ms_map_extents(uintptr_t base, const ms_extent *extents, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        int failed = map(base + extents[i].offset, extents[i].length, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, extents[i].fd, extents[i].file_offset);
        if (failed)
            return failed;
    }
    return 0;
}

int ms_zero_extents(uintptr_t base, const ms_extent *extents, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        int failed = ms_zero(base + extents[i].offset, extents[i].length);
        if (failed)
            return failed;
    }
    return 0;
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
    /* MAP_PRIVATE, because a file's bytes are seen by every process forked from here; a truncation takes private pages, too. */
    return map(base, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, fd, 0);
}

/* Walks a memory upwards and says where each byte's pristine value is; used by all that restores or compares. */
typedef struct {
    const ms_memory *memory;
    size_t next; /* the first extent that may still reach into what is asked for next */
} walker;

/* The longest piece at `start`, at most to `end`, that comes from one extent (`source` points to it) or is zeros. */
static size_t piece(walker *walk, size_t start, size_t end, const uint8_t **source)
{
    const ms_extent *extents = walk->memory->extents;
    size_t count = walk->memory->count;
    while (walk->next < count && extents[walk->next].offset + extents[walk->next].length <= start)
        walk->next++;
    *source = NULL;
    if (walk->next == count)
        return end - start;
    const ms_extent *extent = &extents[walk->next];
    if (extent->offset > start)
        return (extent->offset < end ? extent->offset : end) - start;
    *source = extent->bytes + (start - extent->offset);
    size_t extent_end = extent->offset + extent->length;
    return (extent_end < end ? extent_end : end) - start;
}

/* Whether the bytes at `here` are those of `source`, or zeros where that is null. */
static int pristine(const uint8_t *here, const uint8_t *source, size_t length)
{
    return source ? memcmp(here, source, length) == 0 : all_zero(here, length);
}

int64_t ms_first_difference(const ms_memory *memory)
{
    walker walk = {memory, 0};
    const uint8_t *source;
    for (size_t at = 0, length; at < memory->accessible; at += length) {
        length = piece(&walk, at, memory->accessible, &source);
        const uint8_t *here = (const uint8_t *)memory->base + at;
        if (pristine(here, source, length))
            continue;
        for (size_t i = 0; i < length; i++)
            if (here[i] != (source ? source[i] : 0))
                return (int64_t)(at + i);
    }
    return -1;
}

size_t ms_find_changes(const ms_memory *memory, const ms_extent *runs, size_t count, size_t min_gap, ms_extent *changes,
                       size_t capacity)
{
    walker walk = {memory, 0};
    size_t page = ms_page_size(), found = 0, end = 0;
    ms_extent last = {0};
    for (size_t i = 0; i < count; i++)
        for (size_t at = runs[i].offset; at < runs[i].offset + runs[i].length; at += page) {
            const uint8_t *source;
            piece(&walk, at, at + page, &source); /* extents begin and end with pages, so this is all of it */
            if (pristine((const uint8_t *)memory->base + at, source, page))
                continue;
            if (found > 0 && at - end < min_gap)
                last.length = at + page - last.offset;
            else {
                found++;
                last = (ms_extent){.offset = at, .length = page, .fd = -1};
            }
            end = at + page;
            if (found <= capacity)
                changes[found - 1] = last;
        }
    return found;
}

/* ---- resets ---- */

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Bytes that are compared and, if they differ, copied at once. */
enum { CHUNK = 256 };

/* Puts back what differs of one page from `source`, or zeros where that is null; whether anything did. */
static int restore_page(uint8_t *here, const uint8_t *source, size_t page)
{
    static const uint8_t zeros[CHUNK];
    int dirty = 0;
    for (size_t at = 0; at < page; at += CHUNK) {
        const uint8_t *from = source ? source + at : zeros;
        if (memcmp(here + at, from, CHUNK) == 0)
            continue;
        memcpy(here + at, from, CHUNK);
        dirty = 1;
    }
    return dirty;
}

/* Puts back what differs of the pages [start, end), relative to base, or all of them blindly; returns how many pages that were.
 * `next` is where the next call will start. */
static size_t restore(walker *walk, size_t start, size_t end, size_t next, size_t page, int compare)
{
    size_t dirty = 0;
    const uint8_t *source;
    for (size_t length; start < end; start += length) {
        length = piece(walk, start, end, &source);
        uint8_t *here = (uint8_t *)walk->memory->base + start;
        for (size_t done = 0; done < length; done += page) {
            /* One line of each page ahead of its turn: the address translations, not the bytes, are what takes long. */
            size_t ahead = done + (start + done + page < end ? page : next - (start + done));
            /* Integers, because the next run may lie below this one, or outside of this extent. */
            __builtin_prefetch((const void *)((uintptr_t)here + ahead));
            if (source)
                __builtin_prefetch((const void *)((uintptr_t)source + ahead));
            if (compare)
                dirty += (size_t)restore_page(here + done, source ? source + done : NULL, page);
            else if (source)
                memcpy(here + done, source + done, page);
            else
                memset(here + done, 0, page);
        }
        if (!compare)
            dirty += length / page;
    }
    return dirty;
}

int ms_reset_discard(const ms_memory *memory, ms_reset_report *report)
{
    uint64_t started = now();
    *report = (ms_reset_report){0};
    if (memory->accessible == 0)
        return 0;
    int failed = ms_discard(memory->base, memory->accessible);
    if (!failed && memory->copied)
        ms_copy_extents(memory->base, memory->extents, memory->count);
    report->nanoseconds = now() - started;
    return failed;
}

int ms_reset_remap(const ms_memory *memory, ms_reset_report *report)
{
    uint64_t started = now();
    *report = (ms_reset_report){0};
    if (memory->accessible == 0)
        return 0;
    int failed = ms_zero(memory->base, memory->accessible);
    if (!failed && memory->copied)
        ms_copy_extents(memory->base, memory->extents, memory->count);
    else if (!failed)
        failed = ms_map_extents(memory->base, memory->extents, memory->count);
    report->nanoseconds = now() - started;
    return failed;
}

#define MS_MADV_POPULATE_WRITE 23 /* Linux 5.14 */

/* From so many private pages on, those above the mapped extents are worth a scan of their own. */
enum { WORTH_A_SCAN = 40 };

/* More private pages than these are put back in more time than letting another thread in takes. */
enum { A_FEW = 32 };

/* What a scan is for: the pages are put back if it `restores`, and listed if there are `runs`. */
typedef struct {
    int pagemap;
    uintptr_t base;
    size_t plain; /* nothing of a file is mapped from here on, relative to base */
    size_t image; /* no extent lies from here on */
    size_t keep_pages;
    int compare;
    int restores;
    walker walk;
    ms_extent *runs;
    size_t capacity;
    ms_reset_report *report;
    uint64_t before; /* until when time is accounted for */
    void (*before_long)(void);
} search;

/* Gives the pages [start, end), relative to base, back to the kernel; those of a copied extent would not come back by themselves
 * and are put back instead. */
static int drop(search *s, size_t start, size_t end)
{
    const ms_memory *memory = s->walk.memory;
    const uint8_t *source = NULL;
    size_t page = ms_page_size();
    for (size_t length; start < end; start += length) {
        length = memory->copied ? piece(&s->walk, start, end, &source) : end - start;
        if (source) {
            s->report->dirty_pages += restore(&s->walk, start, start + length, start, page, s->compare);
            continue;
        }
        int failed = ms_discard(memory->base + start, length);
        if (failed)
            return failed;
        s->report->dropped_pages += length / page;
    }
    return 0;
}

int ms_reset_copy(const ms_memory *memory, size_t keep_pages, ms_reset_report *report)
{
    uint64_t started = now();
    size_t page = ms_page_size(), pages = memory->accessible / page, kept = (pages < keep_pages ? pages : keep_pages) * page;
    search s = {.compare = 1, .walk = {memory, 0}, .report = report};
    *report = (ms_reset_report){.compared = 1};
    report->dirty_pages = restore(&s.walk, 0, kept, kept, page, 1);
    int failed = kept < memory->accessible ? drop(&s, kept, memory->accessible) : 0;
    report->nanoseconds = now() - started;
    return failed;
}

/* Counts and lists the pages [from, to), relative to base, and puts them back; those beyond the first `keep_pages` are dropped. */
static int found_pages(search *s, size_t from, size_t to, size_t next)
{
    ms_reset_report *report = s->report;
    size_t page = ms_page_size(), pages = (to - from) / page;
    size_t kept = report->private_pages < s->keep_pages ? s->keep_pages - report->private_pages : 0;
    kept = pages < kept ? pages : kept;
    report->private_pages += pages;
    if (to > s->plain)
        report->plain_pages += (to - (from > s->plain ? from : s->plain)) / page;
    if (report->runs < s->capacity)
        s->runs[report->runs] = (ms_extent){.offset = from, .length = to - from, .fd = -1};
    report->runs++;
    if (!s->restores)
        return 0;
    if (s->before_long && report->private_pages > A_FEW) {
        s->before_long();
        s->before_long = NULL;
    }
    report->dirty_pages += restore(&s->walk, from, from + kept * page, next, page, s->compare);
    return kept < pages ? drop(s, from + kept * page, to) : 0;
}

/* The same for those of the pages [from, to) that lie in extents.  All of them are the shared page of zeros: KSM, and splitting a
 * huge page, put it where a guest wrote zeros over the image.  Outside of extents they are pristine. */
static int found_zeros(search *s, size_t from, size_t to)
{
    const uint8_t *source;
    int failed = 0;
    for (size_t length; from < to && !failed; from += length) {
        length = piece(&s->walk, from, to, &source);
        if (source)
            failed = found_pages(s, from, from + length, from + length);
    }
    return failed;
}

/* Searches [start, end), relative to base, by as many scans as it takes. */
static int search_range(search *s, size_t start, size_t end)
{
    struct page_region regions[REGIONS];
    struct pm_scan_arg scan =
        scan_for_private(s->base + start, end - start, start < s->plain, start < s->image, regions);
    ms_reset_report *report = s->report;
    while (scan.start < scan.end) {
        long found = GATE(MS_PAGEMAP_SCAN, ioctl(s->pagemap, MS_PAGEMAP_SCAN_IOCTL, &scan));
        if (found < 0 && errno == EINTR)
            continue;
        if (found < 0)
            return -errno;
        uint64_t after = now();
        report->scans++;
        report->scan_nanoseconds += after - s->before;
        for (long i = 0; i < found; i++) {
            size_t from = regions[i].start - s->base, to = regions[i].end - s->base;
            size_t next = i + 1 < found ? regions[i + 1].start - s->base : from;
            int zeros = (regions[i].categories & MS_PAGE_IS_PFNZERO) != 0;
            int failed = zeros ? found_zeros(s, from, to) : found_pages(s, from, to, next);
            if (failed)
                return failed;
        }
        if (scan.walk_end <= scan.start)
            return -EIO; /* a kernel that makes no progress must not make us spin */
        scan.start = scan.walk_end;
        s->before = found > 0 && s->restores ? now() : after;
    }
    return 0;
}

/* Searches [base, base + length), in two parts where `apart` says that it pays. */
static int search_all(search *s, size_t length, int apart)
{
    uint64_t started = s->before = now();
    *s->report = (ms_reset_report){.apart = apart || !s->plain, .compared = s->compare};
    size_t first = s->report->apart && s->plain < length ? s->plain : length;
    int failed = first ? search_range(s, 0, first) : 0;
    if (!failed && first < length)
        failed = search_range(s, first, length);
    s->report->nanoseconds = s->before - started;
    return failed;
}

static size_t image_end(const ms_memory *memory)
{
    if (memory->count == 0)
        return 0;
    const ms_extent *last = &memory->extents[memory->count - 1];
    return last->offset + last->length;
}

static int64_t reset_pagemap(int pagemap, const ms_memory *memory, size_t keep_pages, int compare, int apart,
                             ms_reset_report *report, void (*before_long)(void))
{
    search s = {.pagemap = pagemap, .base = memory->base, .image = image_end(memory), .keep_pages = keep_pages,
                .compare = compare, .restores = 1, .walk = {memory, 0}, .report = report, .before_long = before_long};
    s.plain = memory->copied ? 0 : s.image;
    int failed = search_all(&s, memory->accessible, apart);
    return failed ? failed : (int64_t)(report->dirty_pages + report->dropped_pages);
}

int64_t ms_reset_pagemap(int pagemap, const ms_memory *memory, size_t keep_pages, ms_reset_report *report)
{
    return reset_pagemap(pagemap, memory, keep_pages, 1, 0, report, NULL);
}

int64_t ms_spare_nanoseconds(const ms_reset_report *report, const ms_reset_limits *limits)
{
    size_t plain = report->apart ? report->plain_pages : 0;
    uint64_t explained = report->scans * limits->scan_price + plain * limits->plain_page_price +
                         (report->private_pages - plain) * limits->file_page_price;
    return (int64_t)report->scan_nanoseconds - (int64_t)(explained / 1000);
}

int64_t ms_reset_watched(ms_slot *slot)
{
    const ms_reset_limits *limits = slot->limits;
    ms_reset_report *report = &slot->report;
    int pagemap = ms_pagemap();
    if (pagemap < 0)
        return MS_NOTABLE - pagemap;
    int apart = report->plain_pages >= WORTH_A_SCAN; /* as the last reset found it */
    int compare = limits->compare_every && slot->blind + 1 >= limits->compare_every;
    int64_t pages = reset_pagemap(pagemap, &slot->memory, limits->keep_pages, compare, apart, report, slot->before_long);
    slot->blind = compare ? 0 : slot->blind + 1;
    if (pages < 0)
        return MS_NOTABLE - pages;
    uint64_t ticks = report->nanoseconds / 32;
    int ordinary = report->private_pages - report->dirty_pages < limits->idle_pages && report->dropped_pages == 0 &&
                   ms_spare_nanoseconds(report, limits) < limits->spare_nanoseconds && ticks <= UINT32_MAX &&
                   pages < 1 << 30;
    return ordinary ? pages << 32 | (int64_t)ticks : MS_NOTABLE;
}

int ms_list_private(int pagemap, const ms_memory *memory, ms_extent *runs, size_t capacity, ms_reset_report *report)
{
    search s = {.pagemap = pagemap, .base = memory->base, .plain = SIZE_MAX, .image = image_end(memory),
                .walk = {memory, 0}, .runs = runs, .capacity = capacity, .report = report};
    return search_all(&s, memory->accessible, 0);
}

int ms_populate(uintptr_t base, const ms_extent *runs, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (GATE(MS_MADVISE, madvise((void *)(base + runs[i].offset), runs[i].length, MS_MADV_POPULATE_WRITE)))
            return -errno;
    return 0;
}

int ms_count_private(int pagemap, uintptr_t base, size_t length, ms_reset_report *report)
{
    ms_memory memory = {.base = base, .accessible = length};
    return ms_list_private(pagemap, &memory, NULL, 0, report);
}
