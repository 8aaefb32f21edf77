/* The memory creator: linear memories as wasmtime asks for them, from slots that Python leased. wasmtime_bridge.h has the
 * contract and the owners. */
#include "wasmtime_internal.h"

#include <stdlib.h>

struct ms_wt_creator {
    uint64_t identity;
    size_t heap_limit;
    size_t heap_kept;
    size_t most_heaps;
    size_t heaps; /* mapped now; atomic */
    unsigned references; /* atomic */
    struct wt_node *finished; /* groups, by token; atomic */
};

struct memory {
    ms_wt_creator *creator;
    struct wt_group *group; /* NULL for a heap of the garbage collector */
    size_t index;
    uintptr_t base;
    size_t byte_size;
    size_t capacity;
    size_t mapped; /* bytes of a heap to unmap */
    size_t limit;
};

static unsigned leaked_heaps;

unsigned ms_wt_leaked_heaps(void) { return __atomic_exchange_n(&leaked_heaps, 0, __ATOMIC_RELAXED); }

/* ---- creators and groups ---- */

ms_wt_creator *ms_wt_creator_new(uint64_t identity, size_t heap_limit, size_t heap_kept, size_t most_heaps)
{
    ms_wt_creator *creator = calloc(1, sizeof *creator);
    if (creator)
        *creator = (ms_wt_creator){.identity = identity,
                                   .heap_limit = heap_limit,
                                   .heap_kept = heap_kept,
                                   .most_heaps = most_heaps,
                                   .references = 1};
    return creator;
}

void ms_wt_creator_release(ms_wt_creator *creator)
{
    if (__atomic_sub_fetch(&creator->references, 1, __ATOMIC_ACQ_REL) == 0) {
        uint64_t ignored;
        while (wt_drain(&creator->finished, &ignored, 1))
            continue;
        free(creator);
    }
}

size_t ms_wt_drain(ms_wt_creator *creator, uint64_t *tokens, size_t capacity)
{
    return wt_drain(&creator->finished, tokens, capacity);
}

struct wt_group *wt_group_new(ms_wt_creator *creator, ms_wt_cell *cell, uint64_t token)
{
    struct wt_group *group = malloc(sizeof *group);
    if (group)
        *group = (struct wt_group){{NULL, token}, creator, cell, 1};
    return group;
}

int wt_group_drop(struct wt_group *group)
{
    return __atomic_sub_fetch(&group->references, 1, __ATOMIC_ACQ_REL) == 0;
}

/* ---- memories ---- */

static size_t round_up(size_t byte_size)
{
    size_t page = ms_page_size();
    return (byte_size + page - 1) / page * page;
}

static uint8_t *get_memory(void *env, size_t *byte_size, size_t *byte_capacity)
{
    const struct memory *memory = env;
    *byte_size = memory->byte_size;
    *byte_capacity = memory->capacity;
    return (uint8_t *)memory->base;
}

static wt_error *grow_slot(const struct memory *memory, size_t byte_size)
{
    struct wt_group *group = memory->group;
    ms_wt_cell *kept = wt_keep_open(group->cell);
    /* Set before asking: a slot that has grown stays so if a plugin or a signal's handler refuses afterwards, and a reset in
     * place would take the new pages back while Python goes on with the new size. */
    if (group->cell)
        group->cell->changed = 1;
    int64_t answer = ms_wt_python_grow(group->creator->identity, group->node.name, memory->index, byte_size);
    wt_let_close(kept);
    /* Keep the first exception: the guest sees -1, may go on, and may grow again. */
    if (answer < 0 && !wt_frame.deferred)
        wt_frame.deferred = -answer;
    return answer == 1 ? NULL : wt_api.error_new("memslot: the growth was refused");
}

static wt_error *grow_heap(const struct memory *memory, size_t byte_size)
{
    size_t from = round_up(memory->byte_size), to = round_up(byte_size);
    if (to > from && ms_allow(memory->base + from, to - from) < 0)
        return wt_api.error_new("memslot: the kernel refused to grow the heap of the garbage collector");
    if (wt_frame.cell && byte_size > memory->creator->heap_kept)
        wt_frame.cell->changed = 1;
    return NULL;
}

/* Runs inside of guest code, on the thread that entered, without the GIL. */
static wt_error *grow_memory(void *env, size_t byte_size)
{
    struct memory *memory = env;
    /* wasmtime also asks for growth by 0 pages: it reads get_memory again then, which is how a memory shrinks in place. */
    if (byte_size <= memory->byte_size)
        return NULL;
    if (byte_size > memory->limit)
        return wt_api.error_new("memslot: the memory is at its limit");
    wt_error *error = memory->group ? grow_slot(memory, byte_size) : grow_heap(memory, byte_size);
    if (!error)
        memory->byte_size = byte_size;
    return error;
}

/* Runs on any thread, inside a garbage collection, or after the interpreter has ended: no Python, no lock. */
static void finalize_memory(void *env)
{
    struct memory *memory = env;
    struct wt_group *group = memory->group;
    if (group) {
        /* Read the creator before dropping: the group may be freed by another thread afterwards. */
        ms_wt_creator *creator = group->creator;
        if (wt_group_drop(group))
            wt_push(&creator->finished, &group->node);
    } else {
        __atomic_sub_fetch(&memory->creator->heaps, 1, __ATOMIC_RELAXED);
        /* Leak what the kernel refuses to unmap: nothing here could report it, and a second attempt fails likewise. */
        if (ms_unmap(memory->base, memory->mapped) < 0)
            __atomic_add_fetch(&leaked_heaps, 1, __ATOMIC_RELAXED);
    }
    free(memory);
}

/* Reserves a heap of wasmtime's garbage collector, which asks with minimum 0 and no maximum. A memory that begins empty and
 * has no maximum, of an instance that bare wasmtime-py makes, looks the same and gets the same limits. */
static wt_error *reserve_heap(struct memory *memory, size_t reserved, size_t guard)
{
    ms_wt_creator *creator = memory->creator;
    memory->capacity = round_up(reserved);
    memory->mapped = memory->capacity + round_up(guard);
    memory->limit = creator->heap_limit < memory->capacity ? creator->heap_limit : memory->capacity;
    const char *refused = NULL;
    /* Count before reserving: two threads that make heaps at once must not both fit below the limit. */
    if (__atomic_add_fetch(&creator->heaps, 1, __ATOMIC_RELAXED) > creator->most_heaps)
        refused = "memslot: as many heaps of the garbage collector live as the settings allow (slots)";
    else if (ms_reserve(memory->mapped, &memory->base) < 0)
        refused = "memslot: the kernel refused address space for the heap of the garbage collector";
    if (!refused)
        return NULL;
    __atomic_sub_fetch(&creator->heaps, 1, __ATOMIC_RELAXED);
    return wt_api.error_new(refused);
}

/* Takes the next memory of the offer, which Python leased before the instantiation. */
static void take_offered(struct memory *memory, struct wt_offer *offer)
{
    memory->group = offer->group;
    memory->base = offer->bases[offer->next];
    memory->capacity = memory->limit = offer->guest->capacities[offer->next];
    memory->index = offer->next++;
    __atomic_add_fetch(&offer->group->references, 1, __ATOMIC_RELAXED);
}

/* Leases a memory for an instance that bare wasmtime-py makes. */
static wt_error *lease_one(struct memory *memory, size_t minimum, size_t maximum)
{
    char message[512] = "";
    struct wt_group *group = wt_group_new(memory->creator, NULL, 0);
    if (!group)
        return wt_out_of_memory();
    int64_t leased = ms_wt_python_lease(memory->creator->identity, minimum, maximum, &group->node.name, &memory->base,
                                        &memory->capacity, message, sizeof message);
    if (leased != 1) {
        free(group);
        message[sizeof message - 1] = 0;
        return wt_api.error_new(*message ? message : "memslot: no memory could be leased");
    }
    memory->group = group;
    memory->limit = memory->capacity;
    return NULL;
}

static wt_error *new_memory(void *env, const void *type, size_t minimum, size_t maximum, size_t reserved, size_t guard,
                            wt_linear_memory *out)
{
    (void)type;
    ms_wt_creator *creator = env;
    struct wt_offer *offer = &wt_frame.offer;
    wt_error *error = NULL;
    struct memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return wt_out_of_memory();
    memory->creator = creator;
    memory->byte_size = minimum;
    int offered = offer->guest && offer->guest->creator == creator && offer->next < offer->guest->count;
    /* Match the size exactly: a garbage collector's heap asks in between, and in the slot of a memory it would be written over
     * by the next reset. */
    if (offered && minimum == offer->guest->byte_sizes[offer->next] && reserved <= offer->guest->capacities[offer->next])
        take_offered(memory, offer);
    else if (minimum == 0 && maximum >= (size_t)UINT32_MAX)
        error = reserve_heap(memory, reserved, guard);
    else if (offered)
        error = wt_api.error_new("memslot: the memory that was asked for is not the one that was leased");
    else
        error = lease_one(memory, minimum, maximum);
    if (error) {
        free(memory);
        return error;
    }
    *out = (wt_linear_memory){memory, get_memory, grow_memory, finalize_memory};
    return NULL;
}

static void finalize_creator(void *env) { ms_wt_creator_release(env); }

void ms_wt_creator_install(ms_wt_creator *creator, uintptr_t config)
{
    wt_memory_creator ours = {creator, new_memory, finalize_creator};
    __atomic_add_fetch(&creator->references, 1, __ATOMIC_RELAXED);
    wt_api.creator_set((wt_config *)config, &ours);
}
