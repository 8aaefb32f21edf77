/* Scans for private pages, and restores. After a reset that succeeded the memory is pristine.
 *
 * A page of a slot is private to this process once it was written. Every other page still is the image's own, or zeros, and
 * needs nothing. PAGEMAP_SCAN lists pages that are present or swapped out, except for these:
 *
 *   from 0 to mapped_end:           a page of the file that is mapped there
 *   from image_end to accessible:   the kernel's shared zero page
 *
 * image_end is the end of the last extent; mapped_end is image_end as well, or 0 for extents that are copied. Below
 * image_end the zero page can stand where the image has other bytes, so it is listed there (found_zero_pages). */
#include "internal.h"
#include "pagemap.h"

#include <errno.h>
#include <sys/mman.h>

/* ---- the pristine contents ---- */

/* The pristine source of a memory's bytes, asked for in ascending order. */
typedef struct {
    const ms_memory *memory;
    size_t next; /* the first extent that may still reach into what is asked for next */
} walker;

/* Returns the length of the longest run from `start`, at most to `end`, that one extent fills, or zeros do. `source` becomes
 * the extent's bytes, or NULL for zeros. */
static size_t run_from(walker *walk, size_t start, size_t end, const uint8_t **source)
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

/* True if every byte is zero: the first is, and each equals its neighbour. */
static int all_zero(const uint8_t *bytes, size_t length)
{
    return length == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0);
}

/* True if the bytes at `here` are those of `source`, or zeros if that is NULL. */
static int is_pristine(const uint8_t *here, const uint8_t *source, size_t length)
{
    return source ? memcmp(here, source, length) == 0 : all_zero(here, length);
}

int64_t ms_first_difference(const ms_memory *memory)
{
    walker walk = {memory, 0};
    const uint8_t *source;
    for (size_t at = 0, length; at < memory->accessible; at += length) {
        length = run_from(&walk, at, memory->accessible, &source);
        const uint8_t *here = (const uint8_t *)memory->base + at;
        if (is_pristine(here, source, length))
            continue;
        for (size_t i = 0; i < length; i++)
            if (here[i] != (source ? source[i] : 0))
                return (int64_t)(at + i);
    }
    return -1;
}

/* Finds the pages of `runs` that are not pristine, and packs their file offsets. The last page may be cut short. */
static size_t find_pages(const ms_memory *memory, const ms_extent *runs, size_t count, size_t page, size_t min_gap,
                         ms_extent *pages, size_t capacity)
{
    walker walk = {memory, 0};
    size_t found = 0, end = 0, file_offset = 0;
    ms_extent last = {0};
    for (size_t i = 0; i < count; i++) {
        size_t run_end = runs[i].offset + runs[i].length;
        for (size_t at = runs[i].offset; at < run_end; at += page) {
            const uint8_t *source;
            size_t length = run_end - at < page ? run_end - at : page;
            run_from(&walk, at, at + length, &source); /* extents begin and end with pages, so this is all of the page */
            if (is_pristine((const uint8_t *)memory->base + at, source, length))
                continue;
            if (found > 0 && at - end < min_gap) {
                file_offset += at - end; /* the gap is in the file, too */
                last.length = at + page - last.offset;
            } else {
                found++;
                last = (ms_extent){.offset = at, .length = page, .file_offset = file_offset, .fd = -1};
            }
            file_offset += page;
            end = at + page;
            if (found <= capacity)
                pages[found - 1] = last;
        }
    }
    return found;
}

size_t ms_find_changes(const ms_memory *memory, const ms_extent *runs, size_t count, size_t min_gap, ms_extent *changes,
                       size_t capacity)
{
    return find_pages(memory, runs, count, ms_page_size(), min_gap, changes, capacity);
}

size_t ms_find_extents(const uint8_t *bytes, size_t length, size_t page, size_t min_gap, ms_extent *extents,
                       size_t capacity)
{
    ms_memory zeros = {.base = (uintptr_t)bytes};
    ms_extent all = {.length = length};
    return find_pages(&zeros, &all, 1, page, min_gap, extents, capacity);
}

/* ---- restoring pages ---- */

/* Bytes that are compared, and copied if they differ, at once. */
enum { CHUNK = 256 };

/* Restores the chunks of one page that differ from `source`, or from zeros if that is NULL. True if one did. */
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

/* Restores the pages [start, end), relative to base: those that differ, or all without comparing. Returns how many were
 * restored. `next` is where the next call will start. */
static size_t restore(walker *walk, size_t start, size_t end, size_t next, size_t page, int compare)
{
    size_t dirty = 0;
    const uint8_t *source;
    for (size_t length; start < end; start += length) {
        length = run_from(walk, start, end, &source);
        uint8_t *here = (uint8_t *)walk->memory->base + start;
        for (size_t done = 0; done < length; done += page) {
            /* Prefetch one line of the next page: address translations take longer here than the bytes do. Compute with
             * integers, because the next page may lie outside of this extent, where a pointer would be undefined. */
            size_t ahead = done + (start + done + page < end ? page : next - (start + done));
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

/* ---- scans ---- */

/* From this many anonymous pages on, a second scan lists them: without the FILE category, it is cheaper (pagemap.h). */
enum { WORTH_A_SCAN = 40 };

/* Restoring more private pages than this takes longer than handing the GIL over. */
enum { A_FEW = 32 };

/* One search for private pages, which are restored if it `restores`, and listed if there are `runs`. */
typedef struct {
    int pagemap;
    uintptr_t base;
    size_t mapped_end; /* nothing of a file is mapped from here on, relative to base */
    size_t image_end;  /* no extent reaches beyond, relative to base */
    size_t keep_pages;
    int compare;
    int restores;
    walker walk;
    ms_extent *runs;
    size_t capacity;
    ms_reset_report *report;
    uint64_t before; /* the moment up to which the report accounts for time */
    void (*before_long)(void);
} search;

/* Gives the pages [start, end), relative to base, back to the kernel. Restores those of copied extents instead: the kernel
 * would return zeros for them. */
static int drop(search *s, size_t start, size_t end)
{
    const ms_memory *memory = s->walk.memory;
    const uint8_t *source = NULL;
    size_t page = ms_page_size();
    for (size_t length; start < end; start += length) {
        length = memory->copied ? run_from(&s->walk, start, end, &source) : end - start;
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

/* Counts, lists and restores the private pages [from, to), relative to base. Drops those beyond `keep_pages`. `next` is
 * where the next such run starts. */
static int found_pages(search *s, size_t from, size_t to, size_t next)
{
    ms_reset_report *report = s->report;
    size_t page = ms_page_size(), pages = (to - from) / page;
    size_t kept = report->private_pages < s->keep_pages ? s->keep_pages - report->private_pages : 0;
    kept = pages < kept ? pages : kept;
    report->private_pages += pages;
    if (to > s->mapped_end)
        report->anonymous_pages += (to - (from > s->mapped_end ? from : s->mapped_end)) / page;
    if (report->runs < s->capacity)
        s->runs[report->runs] = (ms_extent){.offset = from, .length = to - from, .fd = -1};
    report->runs++;
    if (!s->restores)
        return 0;
    if (s->before_long && report->private_pages > A_FEW) {
        s->before_long();
        s->before_long = NULL; /* once: it would release the GIL a second time */
    }
    report->dirty_pages += restore(&s->walk, from, from + kept * page, next, page, s->compare);
    return kept < pages ? drop(s, from + kept * page, to) : 0;
}

/* Treats the pages [from, to), all of them the shared zero page, as private where an extent is. A guest that wrote zeros over
 * the image gets such pages from KSM, and from the splitting of a huge page; taken for pristine they would show the next
 * tenant zeros instead of the image. Outside of extents they are pristine. */
static int found_zero_pages(search *s, size_t from, size_t to)
{
    const uint8_t *source;
    int failed = 0;
    for (size_t length; from < to && !failed; from += length) {
        length = run_from(&s->walk, from, to, &source);
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
        scan_for_private(s->base + start, end - start, start < s->mapped_end, start < s->image_end, regions);
    ms_reset_report *report = s->report;
    /* Go on from walk_end: a scan stops when its regions are full, and what comes after them may be dirty as well. */
    while (scan.start < scan.end) {
        long found = GATE(MS_PAGEMAP_SCAN, ioctl(s->pagemap, MS_PAGEMAP_SCAN_IOCTL, &scan));
        if (found < 0 && errno == EINTR)
            continue;
        if (found < 0)
            return -errno;
        uint64_t after = ms_now();
        report->scans++;
        report->scan_nanoseconds += after - s->before;
        for (long i = 0; i < found; i++) {
            size_t from = regions[i].start - s->base, to = regions[i].end - s->base;
            size_t next = i + 1 < found ? regions[i + 1].start - s->base : from;
            int zeros = (regions[i].categories & MS_PAGE_IS_PFNZERO) != 0;
            int failed = zeros ? found_zero_pages(s, from, to) : found_pages(s, from, to, next);
            if (failed)
                return failed;
        }
        if (scan.walk_end <= scan.start)
            return -EIO; /* a kernel that makes no progress must not make this loop spin */
        scan.start = scan.walk_end;
        s->before = found > 0 && s->restores ? ms_now() : after;
    }
    return 0;
}

/* Searches [base, base + length), with a scan of its own for what lies above the mapped extents if `split`. */
static int search_all(search *s, size_t length, int split)
{
    uint64_t started = s->before = ms_now();
    *s->report = (ms_reset_report){.split_scan = split || !s->mapped_end, .compared = s->compare};
    size_t first = s->report->split_scan && s->mapped_end < length ? s->mapped_end : length;
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

int ms_list_private(int pagemap, const ms_memory *memory, ms_extent *runs, size_t capacity, ms_reset_report *report)
{
    search s = {.pagemap = pagemap, .base = memory->base, .mapped_end = SIZE_MAX, .image_end = image_end(memory),
                .walk = {memory, 0}, .runs = runs, .capacity = capacity, .report = report};
    return search_all(&s, memory->accessible, 0);
}

#define MS_MADV_POPULATE_WRITE 23

int ms_populate(uintptr_t base, const ms_extent *runs, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (GATE(MS_MADVISE, madvise((void *)(base + runs[i].offset), runs[i].length, MS_MADV_POPULATE_WRITE)))
            return -errno;
    return 0;
}

/* ---- resets ---- */

int ms_reset_discard(const ms_memory *memory, ms_reset_report *report)
{
    uint64_t started = ms_now();
    *report = (ms_reset_report){0};
    if (memory->accessible == 0)
        return 0;
    int failed = ms_discard(memory->base, memory->accessible);
    if (!failed && memory->copied)
        ms_copy_extents(memory->base, memory->extents, memory->count);
    report->nanoseconds = ms_now() - started;
    return failed;
}

int ms_reset_remap(const ms_memory *memory, ms_reset_report *report)
{
    uint64_t started = ms_now();
    *report = (ms_reset_report){0};
    if (memory->accessible == 0)
        return 0;
    int failed = ms_zero(memory->base, memory->accessible);
    if (!failed && memory->copied)
        ms_copy_extents(memory->base, memory->extents, memory->count);
    else if (!failed)
        failed = ms_map_extents(memory->base, memory->extents, memory->count);
    report->nanoseconds = ms_now() - started;
    return failed;
}

int ms_reset_copy(const ms_memory *memory, size_t keep_pages, ms_reset_report *report)
{
    uint64_t started = ms_now();
    size_t page = ms_page_size(), pages = memory->accessible / page, kept = (pages < keep_pages ? pages : keep_pages) * page;
    search s = {.compare = 1, .walk = {memory, 0}, .report = report};
    *report = (ms_reset_report){.compared = 1};
    report->dirty_pages = restore(&s.walk, 0, kept, kept, page, 1);
    int failed = kept < memory->accessible ? drop(&s, kept, memory->accessible) : 0;
    report->nanoseconds = ms_now() - started;
    return failed;
}

static int reset_by_scan(int pagemap, const ms_memory *memory, size_t keep_pages, int compare, int split,
                             ms_reset_report *report, void (*before_long)(void))
{
    search s = {.pagemap = pagemap, .base = memory->base, .image_end = image_end(memory), .keep_pages = keep_pages,
                .compare = compare, .restores = 1, .walk = {memory, 0}, .report = report, .before_long = before_long};
    s.mapped_end = memory->copied ? 0 : s.image_end;
    return search_all(&s, memory->accessible, split);
}

int64_t ms_reset_pagemap(int pagemap, const ms_memory *memory, size_t keep_pages, ms_reset_report *report)
{
    int failed = reset_by_scan(pagemap, memory, keep_pages, 1, 0, report, NULL);
    return failed ? failed : (int64_t)(report->dirty_pages + report->dropped_pages);
}

int64_t ms_unexplained_ns(const ms_reset_report *report, const ms_reset_limits *limits)
{
    size_t anonymous = report->split_scan ? report->anonymous_pages : 0;
    uint64_t explained = report->scans * limits->scan_price + anonymous * limits->anonymous_page_price +
                         (report->private_pages - anonymous) * limits->file_page_price;
    return (int64_t)report->scan_nanoseconds - (int64_t)(explained / 1000);
}

int ms_reset_fast(ms_slot *slot)
{
    const ms_reset_limits *limits = slot->limits;
    ms_reset_report *report = &slot->report;
    int pagemap = ms_pagemap();
    if (pagemap < 0)
        return pagemap;
    int split = report->anonymous_pages >= WORTH_A_SCAN; /* as the latest reset found */
    int compare = limits->compare_every && slot->resets_since_compare + 1 >= limits->compare_every;
    int failed = reset_by_scan(pagemap, &slot->memory, limits->keep_pages, compare, split, report, slot->before_long);
    slot->resets_since_compare = compare ? 0 : slot->resets_since_compare + 1;
    if (failed)
        return failed;
    int within = report->private_pages - report->dirty_pages < limits->idle_pages && report->dropped_pages == 0 &&
                 ms_unexplained_ns(report, limits) < limits->unexplained_ns;
    return within ? MS_FAST : MS_SLOW;
}
