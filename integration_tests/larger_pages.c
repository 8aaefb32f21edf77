/* Preloaded: the C library as it would be on a kernel with pages of PAGE bytes, for the program that it is preloaded into.  Addresses and offsets that are
 * no multiples are refused (mmap(2), munmap(2), mprotect(2), madvise(2)), lengths are rounded up, and new mappings begin and
 * end at such a page.  There is no PAGEMAP_SCAN, because the real kernel below would list its own pages. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static size_t up(size_t length) { return (length + PAGE - 1) / PAGE * PAGE; }

static int refuse(void)
{
    errno = EINVAL;
    return -1;
}

long sysconf(int name)
{
    if (name == _SC_PAGESIZE)
        return PAGE;
    static long (*next)(int);
    if (!next)
        next = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
    return next(name);
}

int getpagesize(void) { return PAGE; }

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    uintptr_t at = (uintptr_t)address;
    length = up(length);
    if ((flags & MAP_FIXED && at % PAGE) || offset % PAGE || length == 0) {
        refuse();
        return MAP_FAILED;
    }
    if (flags & MAP_FIXED)
        return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
    /* More than is needed, and the edges given back, so that it begins where such a page does. */
    uint8_t *got = (uint8_t *)syscall(SYS_mmap, NULL, length + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return MAP_FAILED;
    uint8_t *start = (uint8_t *)up((uintptr_t)got);
    if (start > got)
        syscall(SYS_munmap, got, start - got);
    if (got + PAGE > start)
        syscall(SYS_munmap, start + length, got + PAGE - start);
    void *mapped = (void *)syscall(SYS_mmap, start, length, protection, flags | MAP_FIXED, fd, offset);
    if (mapped == MAP_FAILED) {
        int error = errno;
        syscall(SYS_munmap, start, length);
        errno = error;
    }
    return mapped;
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return mmap(address, length, protection, flags, fd, offset);
}

int munmap(void *address, size_t length)
{
    return (uintptr_t)address % PAGE ? refuse() : (int)syscall(SYS_munmap, address, up(length));
}

int mprotect(void *address, size_t length, int protection)
{
    return (uintptr_t)address % PAGE ? refuse() : (int)syscall(SYS_mprotect, address, up(length), protection);
}

int madvise(void *address, size_t length, int advice)
{
    return (uintptr_t)address % PAGE ? refuse() : (int)syscall(SYS_madvise, address, up(length), advice);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request == 0xc0606610) {
        errno = ENOTTY;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}
