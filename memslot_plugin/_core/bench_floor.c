/* Measuring for `memslot bench`: a guest's writes and reads without Python's cost, and the least that a reset can do. No
 * system call here passes the gate, which would be part of what is measured. */
#include "internal.h"
#include "pagemap.h"

#include <errno.h>

/* Returns the same place in a page each time, and another one for each page. One place for all pages would make them compete
 * for one set of the processor's caches. */
static size_t place(size_t offset, size_t page)
{
    return (offset / page * 2654435761u) % page & ~(size_t)7;
}

void ms_bench_write(uintptr_t base, const size_t *offsets, size_t count, uint64_t value)
{
    size_t page = ms_page_size();
    for (size_t i = 0; i < count; i++)
        memcpy((uint8_t *)base + offsets[i] + place(offsets[i], page), &value, sizeof value);
}

uint64_t ms_bench_read(uintptr_t base, size_t length)
{
    size_t page = ms_page_size();
    uint64_t sum = 0;
    for (size_t at = 0; at < length; at += page)
        sum += *(volatile const uint8_t *)(base + at + place(at, page));
    return sum;
}

int64_t ms_bench_floor(int pagemap, const ms_memory *memory, const size_t *offsets, size_t count)
{
    size_t page = ms_page_size();
    struct page_region regions[REGIONS];
    struct pm_scan_arg scan = scan_for_private(memory->base, memory->accessible, 1, 0, regions);
    uint64_t started = ms_now();
    for (; scan.start < scan.end; scan.start = scan.walk_end)
        if (ioctl(pagemap, MS_PAGEMAP_SCAN_IOCTL, &scan) < 0)
            return -errno;
    for (size_t i = 0; i < count; i++)
        memcpy((uint8_t *)memory->base + offsets[i], memory->extents->bytes + offsets[i], page);
    return (int64_t)(ms_now() - started);
}

uint64_t ms_bench_spin(int64_t nanoseconds)
{
    uint64_t ends = ms_now() + (uint64_t)nanoseconds;
    uint64_t turns = 0;
    for (volatile uint64_t value = 1; ms_now() < ends; turns++)
        for (unsigned i = 0; i < 10000; i++)
            value = value * 31 + i;
    return turns;
}
