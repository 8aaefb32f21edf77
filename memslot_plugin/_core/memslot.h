/* The system calls of memslot, in loops, and nothing else: no pools, no policy, no Python.  (Except for analyse.c, which makes
 * none: a pure function over bytes; bench_floor.c, which only the benchmark calls, and no gate counts; and watched.c, a module of
 * Python's beside this one, which is given one of these functions.)
 *
 * The contract of every function, unless its own comment says more:
 *   - addresses and lengths are multiples of the host page (ms_page_size()), addresses are not null;
 *   - the result is 0, or -errno of the system call that failed; nothing is printed, and retried only what a signal cut short;
 *   - nothing is unmapped or closed that the function did not itself map or open in the same call;
 *   - a function that fails half-way leaves a mix of old and new mappings but never a hole that somebody else's mapping
 *     could fall into: the caller may always cover the whole range again with ms_cover().
 *
 * Every system call goes through one gate in memslot.c that counts it and that can be told to fail (ms_inject), so that
 * "this costs no system call" and "this failure loses nothing" are facts that a test can check.
 */
#ifndef MEMSLOT_H
#define MEMSLOT_H

#include <stddef.h>
#include <stdint.h>

#include "cdef.h"

#endif
