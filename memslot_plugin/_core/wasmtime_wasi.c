/* The WASI of a store, and its captured streams. wasmtime_bridge.h has the contract. */
#include "wasmtime_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ms_forks + 1 of the process in which wasmtime's first worker thread was noticed, or 0; atomic. A child of a fork inherits
 * the number, but not the thread. */
static unsigned workers;

void wt_note_workers(void)
{
    if (!__atomic_load_n(&workers, __ATOMIC_RELAXED))
        __atomic_store_n(&workers, ms_forks + 1, __ATOMIC_RELAXED);
}

int ms_wt_workers_lost(void)
{
    unsigned noticed = __atomic_load_n(&workers, __ATOMIC_RELAXED);
    return noticed && noticed != ms_forks + 1;
}

/* ---- captured streams: wasmtime may write from a thread of its own ---- */

struct ms_wt_output {
    unsigned references; /* atomic */
    int busy;            /* a spin lock, because it is held for a copy of bytes and no Python runs meanwhile; atomic */
    uint8_t *bytes;
    size_t length, room, limit;
};

static void lock(ms_wt_output *output)
{
    while (__atomic_exchange_n(&output->busy, 1, __ATOMIC_ACQUIRE))
        continue;
}

static void unlock(ms_wt_output *output) { __atomic_store_n(&output->busy, 0, __ATOMIC_RELEASE); }

ms_wt_output *ms_wt_output_new(size_t limit)
{
    ms_wt_output *output = calloc(1, sizeof *output);
    if (output) {
        output->references = 1;
        output->limit = limit;
    }
    return output;
}

void ms_wt_output_release(ms_wt_output *output)
{
    if (__atomic_sub_fetch(&output->references, 1, __ATOMIC_ACQ_REL) == 0) {
        free(output->bytes);
        free(output);
    }
}

size_t ms_wt_output_read(ms_wt_output *output, uint8_t *bytes, size_t capacity)
{
    lock(output);
    size_t length = output->length;
    if (capacity && length) /* before the first write `bytes` is NULL, which memcpy does not take */
        memcpy(bytes, output->bytes, length < capacity ? length : capacity);
    unlock(output);
    return length;
}

static ptrdiff_t write_output(void *env, const unsigned char *bytes, size_t length)
{
    ms_wt_output *output = env;
    ptrdiff_t written = (ptrdiff_t)length;
    wt_note_workers();
    lock(output);
    /* Drop what passes the limit, and say that it was written: a hostile guest must not fill this process's memory. */
    length = length < output->limit - output->length ? length : output->limit - output->length;
    if (output->room - output->length < length) {
        size_t room = output->length + length < 2 * output->room ? 2 * output->room : output->length + length;
        uint8_t *moved = realloc(output->bytes, room);
        if (moved) {
            output->bytes = moved;
            output->room = room;
        } else {
            written = -ENOMEM;
        }
    }
    if (written >= 0 && length) {
        memcpy(output->bytes + output->length, bytes, length);
        output->length += length;
    }
    unlock(output);
    return written;
}

static void finalize_output(void *env) { ms_wt_output_release(env); }

/* ---- the WASI of a store ---- */

static ms_wt_output *add_reference(ms_wt_output *output)
{
    __atomic_add_fetch(&output->references, 1, __ATOMIC_RELAXED);
    return output;
}

size_t ms_wt_wasi_set(ms_wt_cell *cell, const ms_wt_wasi *wasi, ms_wt_output *out, ms_wt_output *err)
{
    wt_wasi_config *config = wt_api.wasi_new();
    size_t refused = 0;
    if (out)
        wt_api.stdout_custom(config, write_output, add_reference(out), finalize_output);
    else if (wasi->inherit_stdout)
        wt_api.wasi_stdout(config);
    if (err)
        wt_api.stderr_custom(config, write_output, add_reference(err), finalize_output);
    else if (wasi->inherit_stderr)
        wt_api.wasi_stderr(config);
    if (!wt_api.wasi_argv(config, wasi->argument_count, wasi->arguments))
        refused = MS_WT_ARGUMENTS;
    else if (wasi->variable_count && !wt_api.wasi_env(config, wasi->variable_count, wasi->names, wasi->values))
        refused = MS_WT_ENVIRONMENT;
    for (size_t i = 0; i < wasi->folder_count && !refused; i++)
        if (!wt_api.wasi_folder(config, wasi->folders[i], wasi->known_as[i], wasi->writable[i]))
            refused = MS_WT_FOLDER + i;
    /* wasmtime_context_set_wasi takes the configuration also if it fails, so delete it only if it was never passed. */
    if (refused)
        wt_api.wasi_delete(config);
    else if ((cell->error = (uintptr_t)wt_api.context_set_wasi((wt_context *)cell->context, config)))
        refused = MS_WT_SET;
    return refused;
}
