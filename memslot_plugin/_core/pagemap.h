/* PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst): lists the pages of a range by category. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* From linux/fs.h of Linux 6.7. Written out because the build machine's headers may be older than its kernel. */
struct page_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct pm_scan_arg {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};

#define MS_PAGEMAP_SCAN_IOCTL _IOWR('f', 16, struct pm_scan_arg)
#define MS_PAGE_IS_FILE (1u << 2)
#define MS_PAGE_IS_PRESENT (1u << 3)
#define MS_PAGE_IS_SWAPPED (1u << 4)
#define MS_PAGE_IS_PFNZERO (1u << 5)

/* Runs that one scan lists; the next scan lists the next ones. The kernel allocates as many: with twice this number the
 * allocation alone costs a third of a scan that finds nothing. */
enum { REGIONS = 256 };

/* Prepares a scan of [base, base + length) for private pages, into `regions`. `file` is true if a file is mapped in the
 * range. `zeros` is true if the shared zero page is listed too, in regions of its own. */
static inline struct pm_scan_arg scan_for_private(uintptr_t base, size_t length, int file, int zeros,
                                                  struct page_region *regions)
{
    /* Ask for the FILE category only where a file is mapped: it costs about twice as much as listing the page does. */
    uint64_t others = (zeros ? 0 : MS_PAGE_IS_PFNZERO) | (file ? MS_PAGE_IS_FILE : 0);
    return (struct pm_scan_arg){
        .size = sizeof(struct pm_scan_arg),
        .start = base,
        .end = base + length,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        /* A page counts as private if it is none of these: inverted, so that the mask asks for their absence. */
        .category_inverted = others,
        .category_mask = others,
        /* SWAPPED as well as PRESENT: a private page that was swapped out holds a tenant's bytes like any other. */
        .category_anyof_mask = MS_PAGE_IS_PRESENT | MS_PAGE_IS_SWAPPED,
        /* No other category here: the kernel ends a region wherever a returned category changes. */
        .return_mask = MS_PAGE_IS_PRESENT | (zeros ? MS_PAGE_IS_PFNZERO : 0),
    };
}
