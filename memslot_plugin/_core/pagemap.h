/* PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst), which lists the pages of a range by what they are. */
#ifndef MEMSLOT_PAGEMAP_H
#define MEMSLOT_PAGEMAP_H

#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* linux/fs.h of Linux 6.7; written out because the headers of the build machine may be older than its kernel. */
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

/* Runs that one call lists; further ones are fetched by further calls.  The kernel allocates as many, and for twice this
 * many that alone costs a third of a scan that finds nothing. */
enum { REGIONS = 256 };

/* A scan of [base, base + length) for private pages, into `regions`: in memory or swapped out, and not the file's own page.
 * `file`: true if a file is mapped in there; to tell its pages from private ones takes the kernel twice as long again as to list a
 * page.  `zeros`: the shared page of zeros is listed too, in regions of its own. */
static inline struct pm_scan_arg scan_for_private(uintptr_t base, size_t length, int file, int zeros,
                                                  struct page_region *regions)
{
    uint64_t others = (zeros ? 0 : MS_PAGE_IS_PFNZERO) | (file ? MS_PAGE_IS_FILE : 0);
    return (struct pm_scan_arg){
        .size = sizeof(struct pm_scan_arg),
        .start = base,
        .end = base + length,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        .category_inverted = others,
        .category_mask = others,
        .category_anyof_mask = MS_PAGE_IS_PRESENT | MS_PAGE_IS_SWAPPED,
        .return_mask = MS_PAGE_IS_PRESENT | (zeros ? MS_PAGE_IS_PFNZERO : 0),
    };
}

#endif
