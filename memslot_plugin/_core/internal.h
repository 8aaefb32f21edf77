/* Shared by the core's own files: the gate for system calls, and the clock. */
#pragma once

#include "memslot.h"

#include <string.h>
#include <time.h>

/* Counts a system call. True, with errno set, if a test told the call to fail (ms_inject). */
__attribute__((visibility("hidden"))) int ms_refused(enum ms_call call);

/* Makes a system call through the gate: -1 with errno if the call was told to fail, or failed. */
#define GATE(call, expression) (ms_refused(call) ? -1 : (expression))

static inline uint64_t ms_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}
