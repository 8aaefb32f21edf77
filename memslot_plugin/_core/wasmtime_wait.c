/* WASI calls that could wait past a deadline: poll_oneoff and path_open.
 *
 * wasmtime looks at its epoch in guest code alone, so a guest that sleeps in WASI sleeps past its deadline. Here poll_oneoff
 * sleeps a slice at a time, and enters guest code after each: the shim's `tick`, which traps once the deadline has passed.
 * path_open refuses what is neither a file, a folder nor a link: opening a FIFO waits for the other end, and so does reading it.
 *
 * wasmtime's own WASI functions look for the memory among the exports of their caller. The shim module is that caller: it
 * imports the guest's memory, exports it, and forwards each function of WASI (hosts/wasmtime/wasi.py has its text). */
#include "wasmtime_internal.h"
#include "internal.h"

#include <stdlib.h>

enum { WAIT_SLICE = 5000000 /* ns */, WASI_PAGE = 65536, LONGEST_PATH = 4096 };
/* WASI preview 1 (witx): the sizes of its structures, error numbers, and types of files. */
enum { SUBSCRIPTION = 48, EVENT = 32, FILESTAT = 64 };
enum { WASI_NAMETOOLONG = 37, WASI_NOTSUP = 58 };
enum { WASI_DIRECTORY = 3, WASI_REGULAR_FILE = 4, WASI_SYMBOLIC_LINK = 7 };

static const char wasi_module[] = "wasi_snapshot_preview1";

struct wait {
    struct wt_node node; /* first: it is freed as one */
    const ms_wt_shim *shim;
    int foreign;
    struct wt_store_data own; /* for a foreign store, whose data is the embedder's */
};

/* A call under way: its store, the guest's memory, and the shim's instance. */
struct visit {
    wt_context *context;
    struct wt_store_data *data;
    uint8_t *memory;
    uint64_t size;
};

/* ---- the shim ---- */

static wt_trap *trap_of(const char *message) { return wt_api.trap_new(message, strlen(message)); }

static wt_trap *trap_of_error(wt_error *error)
{
    wt_bytes message;
    wt_api.error_message(error, &message);
    wt_trap *trap = wt_api.trap_new(message.bytes, message.size);
    wt_api.bytes_delete(&message);
    wt_api.error_delete(error);
    return trap;
}

static wt_trap *make_shim(const struct wait *wait, wt_context *context, struct wt_store_data *data, const wt_extern *memory)
{
    static const char *const names[] = {"poll_oneoff", "path_open", "path_filestat_get", "clock_time_get"};
    enum { COUNT = sizeof names / sizeof *names };
    wt_extern imports[COUNT + 1];
    for (size_t i = 0; i < COUNT; i++)
        if (!wt_api.linker_get((const wt_linker *)wait->shim->linker, context, wasi_module, sizeof wasi_module - 1,
                               names[i], strlen(names[i]), &imports[i]))
            return trap_of("memslot: wasmtime has no WASI");
    imports[COUNT] = *memory;
    wt_trap *trap = NULL;
    const wt_module *module = (const wt_module *)wait->shim->module;
    wt_error *error = wt_api.instance_new(context, module, imports, COUNT + 1, &data->instance, &trap);
    if (error || trap)
        data->instance.store_id = 0;
    return error ? trap_of_error(error) : trap;
}

/* True if the shim's instance imports this memory. A store may have several instances, with a memory each. */
static int is_shim_for(const struct wt_store_data *data, const wt_memory *memory, const uint8_t *shared)
{
    return data->instance.store_id && data->shared == shared && data->memory.first.store_id == memory->first.store_id &&
           data->memory.first.a == memory->first.a && data->memory.b == memory->b;
}

/* Fills in a visit. Returns NULL, or a trap that says why there is none. */
static wt_trap *visit_begin(struct visit *visit, struct wait *wait, wt_caller *caller)
{
    wt_extern found;
    wt_trap *trap = NULL;
    wt_context *context = wt_api.caller_context(caller);
    struct wt_store_data *data = wait->foreign ? &wait->own : wt_api.context_data(context);
    if (!data)
        return trap_of("memslot: out of memory");
    if (!wt_api.caller_export(caller, "memory", 6, &found))
        return trap_of("missing required memory export");
    if (found.kind != WT_EXTERN_MEMORY && found.kind != WT_EXTERN_SHAREDMEMORY) {
        wt_api.extern_delete(&found);
        return trap_of("missing required memory export");
    }
    wt_memory memory;
    memset(&memory, 0, sizeof memory); /* also the padding that `memory = found.of.memory` leaves as it is */
    const uint8_t *shared = NULL;
    *visit = (struct visit){.context = context, .data = data};
    if (found.kind == WT_EXTERN_SHAREDMEMORY) {
        shared = visit->memory = wt_api.shared_data(found.of.sharedmemory);
        visit->size = wt_api.shared_size(found.of.sharedmemory);
    } else {
        memory = found.of.memory;
        visit->memory = wt_api.memory_data(context, &memory);
        visit->size = wt_api.memory_size(context, &memory);
    }
    if (!is_shim_for(data, &memory, shared)) {
        trap = make_shim(wait, context, data, &found);
        data->memory = memory;
        data->shared = shared;
    }
    wt_api.extern_delete(&found); /* the shim's instance keeps the memory */
    return trap;
}

/* Calls a function of the shim, which forwards to WASI's of that name. Returns NULL, or the guest's trap. */
static wt_trap *forward(const struct visit *visit, const char *name, wt_raw *values, size_t count)
{
    wt_extern found;
    wt_trap *trap = NULL;
    if (!wt_api.export_get(visit->context, &visit->data->instance, name, strlen(name), &found))
        return trap_of("memslot: the shim is not as it was built");
    wt_error *error = wt_api.call(visit->context, &found.of.func, values, count, &trap);
    return error ? trap_of_error(error) : trap;
}

/* Traps if the deadline has passed. Puts the fuel back: waiting costs none, also if it took many slices. */
static wt_trap *tick(const struct visit *visit)
{
    uint64_t fuel;
    wt_raw none = {0};
    wt_error *unfuelled = wt_api.fuel_get(visit->context, &fuel);
    wt_trap *trap = forward(visit, "tick", &none, 1);
    if (!unfuelled)
        unfuelled = wt_api.fuel_set(visit->context, fuel);
    if (unfuelled)
        wt_api.error_delete(unfuelled);
    return trap;
}

static wt_trap *sleep_until(const struct visit *visit, uint64_t until)
{
    wt_trap *trap = NULL;
    for (uint64_t now = ms_now(); now < until && !trap; now = ms_now()) {
        uint64_t slice = until - now < WAIT_SLICE ? until - now : WAIT_SLICE;
        nanosleep(&(struct timespec){0, (long)slice}, NULL);
        trap = tick(visit);
    }
    return trap;
}

/* ---- poll_oneoff ---- */

static uint64_t word(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static int is_inside(const struct visit *visit, uint64_t address, uint64_t length, uint64_t alignment)
{
    return address % alignment == 0 && address + length <= visit->size; /* of 32-bit addresses: the sum cannot overflow */
}

/* The moments at which a wait began: by ms_now, and by those of WASI's clocks that were asked for. */
struct moments {
    uint64_t here;
    int known[2];
    uint64_t of_clock[2]; /* real time, monotonic */
};

/* Copies the i-th subscription. It is checked and used in the copy, because another thread may change a shared memory. */
static void read_subscription(const struct visit *visit, uint64_t in, uint32_t i, uint8_t *subscription)
{
    memcpy(subscription, visit->memory + in + (uint64_t)i * SUBSCRIPTION, SUBSCRIPTION);
}

/* True if WASI takes the subscription for one to a clock's time. */
static int is_to_clock(const uint8_t *subscription)
{
    uint32_t clock;
    uint16_t flags;
    memcpy(&clock, subscription + 16, sizeof clock);
    memcpy(&flags, subscription + 40, sizeof flags);
    return subscription[8] == 0 && clock < 2 && flags < 2;
}

static uint64_t due_at(const uint8_t *subscription, const struct moments *began)
{
    uint64_t timeout = word(subscription + 24);
    if (subscription[40]) { /* an absolute time */
        uint64_t passed = began->of_clock[subscription[16]];
        timeout = timeout > passed ? timeout - passed : 0;
    }
    return timeout < UINT64_MAX - began->here ? began->here + timeout : UINT64_MAX;
}

/* Reads a clock of WASI's through 8 borrowed bytes of the guest. WASI's monotonic clock counts from the store's beginning, so
 * clock_gettime cannot stand in for it. */
static wt_trap *read_clock(const struct visit *visit, uint32_t clock, uint64_t borrowed, uint64_t *now)
{
    wt_raw values[3] = {{.i64 = clock}, {.i64 = 0}, {.i64 = (int64_t)borrowed}};
    uint64_t kept = word(visit->memory + borrowed);
    wt_trap *trap = forward(visit, "clock_time_get", values, 3);
    *now = word(visit->memory + borrowed);
    memcpy(visit->memory + borrowed, &kept, sizeof kept);
    return trap;
}

/* Computes when the first of the subscriptions is due. False if one of them is not to a clock. */
static int first_due(const struct visit *visit, uint64_t in, uint32_t subscribed, struct moments *began, uint64_t *until,
                     wt_trap **trap)
{
    if (!subscribed || !is_inside(visit, in, (uint64_t)subscribed * SUBSCRIPTION, 8))
        return 0;
    *until = UINT64_MAX;
    for (uint32_t i = 0; i < subscribed; i++) {
        uint8_t subscription[SUBSCRIPTION];
        read_subscription(visit, in, i, subscription);
        if (!is_to_clock(subscription))
            return 0;
        uint8_t clock = subscription[16];
        if (subscription[40] && !began->known[clock]) {
            if ((*trap = read_clock(visit, clock, in, &began->of_clock[clock])))
                return 0;
            began->known[clock] = 1;
        }
        uint64_t due = due_at(subscription, began);
        *until = due < *until ? due : *until;
    }
    return 1;
}

static wt_trap *poll_oneoff(void *env, wt_caller *caller, wt_raw *values, size_t count)
{
    (void)count;
    struct visit visit;
    wt_trap *trap = visit_begin(&visit, env, caller);
    if (trap)
        return trap;
    uint64_t in = (uint32_t)values[0].i32, out = (uint32_t)values[1].i32, of_count = (uint32_t)values[3].i32;
    uint32_t subscribed = (uint32_t)values[2].i32;
    struct moments began = {.here = ms_now()};
    uint64_t until;
    int clocks_alone = first_due(&visit, in, subscribed, &began, &until, &trap);
    if (trap)
        return trap;
    /* WASI answers anything else at once: each descriptor that it can subscribe to is ready, or an error. */
    if (!clocks_alone)
        return forward(&visit, "poll_oneoff", values, 4);
    if ((trap = sleep_until(&visit, until)))
        return trap;
    uint32_t ready = 0;
    uint64_t now = ms_now();
    for (uint32_t i = 0; i < subscribed; i++) {
        uint8_t subscription[SUBSCRIPTION];
        read_subscription(&visit, in, i, subscription);
        if (!is_to_clock(subscription) || due_at(subscription, &began) > now)
            continue;
        uint64_t event[EVENT / 8] = {word(subscription)}; /* no error, of a clock */
        if (!is_inside(&visit, out, EVENT, 8) || !is_inside(&visit, of_count, 4, 4)) {
            values[0].i32 = -1; /* let WASI refuse an address */
            return forward(&visit, "poll_oneoff", values, 4);
        }
        memcpy(visit.memory + out, event, EVENT);
        out += EVENT;
        ready++;
    }
    memcpy(visit.memory + of_count, &ready, sizeof ready);
    values[0].i64 = 0;
    return NULL;
}

/* ---- path_open ---- */

/* Finds out by path_filestat_get if a path leads to neither a folder, a file nor a link. Borrows bytes of the guest. */
static wt_trap *is_special(const struct visit *visit, const wt_raw *opened, uint64_t borrowed, int *special)
{
    uint8_t kept[FILESTAT];
    wt_raw values[5];
    memcpy(values, opened, 4 * sizeof *values);
    values[4] = (wt_raw){.i64 = (int64_t)borrowed};
    memcpy(kept, visit->memory + borrowed, FILESTAT);
    wt_trap *trap = forward(visit, "path_filestat_get", values, 5);
    uint8_t type = visit->memory[borrowed + 16];
    memcpy(visit->memory + borrowed, kept, FILESTAT);
    *special =
        !trap && !values[0].i32 && type != WASI_DIRECTORY && type != WASI_REGULAR_FILE && type != WASI_SYMBOLIC_LINK;
    return trap;
}

static wt_trap *path_open(void *env, wt_caller *caller, wt_raw *values, size_t count)
{
    (void)count;
    struct visit visit;
    wt_trap *trap = visit_begin(&visit, env, caller);
    if (trap)
        return trap;
    uint64_t path = (uint32_t)values[2].i32, length = (uint32_t)values[3].i32;
    int special = 0;
    if (length > LONGEST_PATH) {
        values[0].i64 = WASI_NAMETOOLONG;
        return NULL;
    }
    wt_note_workers();
    if (visit.size >= WASI_PAGE && path + length <= visit.size) {
        /* Borrow bytes beside the path: a path that begins before FILESTAT ends before the second of these places. */
        trap = is_special(&visit, values, path < FILESTAT ? FILESTAT + LONGEST_PATH : 0, &special);
        if (trap)
            return trap;
    }
    if (special) {
        values[0].i64 = WASI_NOTSUP;
        return NULL;
    }
    return forward(&visit, "path_open", values, 9);
}

uintptr_t ms_wt_define_wait(uintptr_t linker, uintptr_t type, uint64_t identity, const ms_wt_shim *shim, int opens,
                            int foreign)
{
    struct wait *wait = malloc(sizeof *wait);
    const char *name = opens ? "path_open" : "poll_oneoff";
    if (wait)
        *wait = (struct wait){.node = {NULL, identity}, .shim = shim, .foreign = foreign};
    return wt_define(linker, wasi_module, sizeof wasi_module - 1, name, strlen(name), type,
                     opens ? path_open : poll_oneoff, (struct wt_node *)wait);
}
