/* The C half of the wasmtime adapter: memory for its engines, and calls into its instances; wasmtime.h says who owns what. */
#include "wasmtime.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- wasmtime's functions ---- */

static struct {
#define X(name, symbol, result, parameters) result(*name) parameters;
    WT_SYMBOLS(X)
#undef X
} api;

const char *ms_wt_symbol(size_t index)
{
    static const char *const symbols[] = {
#define X(name, symbol, result, parameters) symbol,
        WT_SYMBOLS(X)
#undef X
    };
    return index < sizeof symbols / sizeof *symbols ? symbols[index] : NULL;
}

void ms_wt_bind(const uintptr_t *addresses)
{
    /* Function pointers and addresses convert as they do for dlsym(3). */
#define X(name, symbol, result, parameters) api.name = (result(*) parameters) * addresses++;
    WT_SYMBOLS(X)
#undef X
}

size_t ms_wt_layout(size_t *layout, size_t capacity)
{
    static const size_t known[] = {
        sizeof(wt_instance),      sizeof(wt_func),
        sizeof(wt_global),        sizeof(wt_memory),
        sizeof(wt_extern),        offsetof(wt_extern, of),
        sizeof(wt_raw),           sizeof(wt_val),
        offsetof(wt_val, of),     sizeof(wt_ref),
        sizeof(wt_linear_memory), offsetof(wt_linear_memory, get_memory),
        offsetof(wt_linear_memory, grow_memory), offsetof(wt_linear_memory, finalizer),
        sizeof(wt_memory_creator), offsetof(wt_memory_creator, new_memory),
        offsetof(wt_memory_creator, finalizer),
    };
    const size_t count = sizeof known / sizeof *known;
    memcpy(layout, known, (count < capacity ? count : capacity) * sizeof *known);
    return count;
}

/* ---- what this thread is in the middle of ---- */

static _Thread_local struct {
    unsigned depth;
    int64_t raised;   /* by a host function, within the innermost entry */
    int64_t deferred; /* by Python in a growth, within the innermost entry */
    ms_wt_cell *cell; /* of the innermost entry; NULL outside of all */
    const ms_wt_guest *guest; /* whose memories are offered; NULL for none */
    const uintptr_t *bases;
    size_t next;
    struct group *group;
} frame;

/* Our address differs from any other thread's. */
static uintptr_t this_thread(void) { return (uintptr_t)&frame; }

unsigned ms_wt_depth(void) { return frame.depth; }

int64_t ms_wt_raised(void) { return frame.raised; }

int ms_wt_first_deferred(void) { return frame.depth && !frame.deferred; }

void ms_wt_raise(int64_t exception) { frame.raised = exception; }

static uintptr_t outcome_of(unsigned flags, wt_trap *trap, wt_error *error, int64_t raised, int64_t deferred)
{
    static ms_wt_outcome lost = {.flags = MS_WT_LOST};
    ms_wt_outcome *outcome = malloc(sizeof *outcome);
    if (!outcome)
        return (uintptr_t)&lost;
    *outcome = (ms_wt_outcome){flags, (uintptr_t)trap, (uintptr_t)error, raised, deferred};
    return (uintptr_t)outcome;
}

void ms_wt_outcome_free(uintptr_t outcome)
{
    if (!(((ms_wt_outcome *)outcome)->flags & MS_WT_LOST))
        free((ms_wt_outcome *)outcome);
}

/* ---- lists that finalizers push on: many may push, one takes all ---- */

struct node {
    struct node *next;
    uint64_t name;
};

static void push(struct node **list, struct node *node)
{
    node->next = __atomic_load_n(list, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(list, &node->next, node, 1, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        continue;
}

static size_t drain(struct node **list, uint64_t *names, size_t capacity)
{
    size_t count = 0;
    struct node *node = __atomic_exchange_n(list, NULL, __ATOMIC_ACQUIRE);
    while (node) {
        struct node *next = node->next;
        if (count < capacity) {
            names[count++] = node->name;
            free(node);
        } else {
            push(list, node);
        }
        node = next;
    }
    return count;
}

/* ---- creators and groups ---- */

struct ms_wt_creator {
    uint64_t identity;
    size_t heap_limit;
    size_t heap_kept;
    size_t most_heaps;
    size_t heaps; /* that are mapped now; atomic */
    unsigned references;
    struct node *finished; /* groups, by token */
};

struct group {
    struct node node; /* first: the list frees a group as its node */
    ms_wt_creator *creator;
    ms_wt_cell *cell; /* NULL where the store is the embedder's, which may outlive it */
    unsigned references;
};

struct memory {
    ms_wt_creator *creator;
    struct group *group; /* NULL for a heap of the garbage collector */
    size_t index;
    uintptr_t base;
    size_t byte_size;
    size_t capacity;
    size_t mapped; /* what is ours to unmap */
    size_t limit;
    struct memory *next; /* in the list of those that could not be unmapped */
};

static struct memory *still_mapped;

static void keep_mapped(struct memory *memory)
{
    memory->next = __atomic_load_n(&still_mapped, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&still_mapped, &memory->next, memory, 1, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        continue;
}

/* Tries again to unmap what a finalizer, which nobody can be told from, could not. */
static void unmap_again(void)
{
    struct memory *memory = __atomic_exchange_n(&still_mapped, NULL, __ATOMIC_ACQUIRE);
    while (memory) {
        struct memory *next = memory->next;
        if (ms_unmap(memory->base, memory->mapped) < 0)
            keep_mapped(memory);
        else
            free(memory);
        memory = next;
    }
}

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
    unmap_again();
    if (__atomic_sub_fetch(&creator->references, 1, __ATOMIC_ACQ_REL) == 0) {
        uint64_t ignored;
        while (drain(&creator->finished, &ignored, 1))
            continue;
        free(creator);
    }
}

size_t ms_wt_drain(ms_wt_creator *creator, uint64_t *tokens, size_t capacity)
{
    unmap_again();
    return drain(&creator->finished, tokens, capacity);
}

static struct group *group_new(ms_wt_creator *creator, ms_wt_cell *cell, uint64_t token)
{
    struct group *group = malloc(sizeof *group);
    if (group)
        *group = (struct group){{NULL, token}, creator, cell, 1};
    return group;
}

/* Drops a reference; true for the last one, whose group is then the caller's. */
static int group_drop(struct group *group)
{
    return __atomic_sub_fetch(&group->references, 1, __ATOMIC_ACQ_REL) == 0;
}

/* ---- being inside an instance: one thread at a time, which may nest ---- */

static unsigned take(ms_wt_cell *cell)
{
    uintptr_t expected = 0, me = this_thread();
    if (!__atomic_compare_exchange_n(&cell->owner, &expected, me, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) &&
        (expected != me || cell->held))
        return MS_WT_BUSY;
    cell->depth++;
    return 0;
}

static unsigned give(ms_wt_cell *cell)
{
    if (--cell->depth)
        return 0;
    __atomic_store_n(&cell->owner, 0, __ATOMIC_SEQ_CST);
    uint64_t closing = __atomic_load_n(&cell->closing, __ATOMIC_SEQ_CST);
    return closing && closing >= __atomic_load_n(&cell->generation, __ATOMIC_SEQ_CST) ? MS_WT_CLOSING : 0;
}

/* Keeps a cell from being closed while Python runs for its guest, until `give`: wasmtime-py may have called the guest, which is no
 * entry.  NULL where an entry does so already. */
static ms_wt_cell *stay(ms_wt_cell *cell)
{
    return cell && cell != frame.cell && !take(cell) ? cell : NULL;
}

/* ---- linear memories, as wasmtime asks for them ---- */

static uint8_t *get_memory(void *env, size_t *byte_size, size_t *byte_capacity)
{
    const struct memory *memory = env;
    *byte_size = memory->byte_size;
    *byte_capacity = memory->capacity;
    return (uint8_t *)memory->base;
}

static wt_error *grow_memory(void *env, size_t byte_size)
{
    struct memory *memory = env;
    if (byte_size <= memory->byte_size)
        return NULL;
    if (byte_size > memory->limit)
        return api.error_new("memslot: the memory is at its limit");
    if (memory->group) {
        struct group *group = memory->group;
        ms_wt_cell *cell = stay(group->cell);
        int64_t answer = ms_wt_python_grow(group->creator->identity, group->node.name, memory->index, byte_size);
        if (cell)
            give(cell);
        if (answer < 0 && !frame.deferred)
            frame.deferred = -answer;
        if (answer != 1)
            return api.error_new("memslot: the growth was refused");
    } else {
        size_t page = ms_page_size();
        size_t from = (memory->byte_size + page - 1) / page * page, to = (byte_size + page - 1) / page * page;
        if (to > from && ms_allow(memory->base + from, to - from) < 0)
            return api.error_new("memslot: the kernel refused to grow the heap of the garbage collector");
        if (frame.cell && byte_size > memory->creator->heap_kept)
            frame.cell->outgrown = 1;
    }
    memory->byte_size = byte_size;
    return NULL;
}

static void finalize_memory(void *env)
{
    struct memory *memory = env;
    struct group *group = memory->group;
    if (group) {
        ms_wt_creator *creator = group->creator;
        if (group_drop(group))
            push(&creator->finished, &group->node);
    } else {
        __atomic_sub_fetch(&memory->creator->heaps, 1, __ATOMIC_RELAXED);
        if (ms_unmap(memory->base, memory->mapped) < 0) {
            keep_mapped(memory);
            return;
        }
    }
    free(memory);
}

static wt_error *out_of_memory(void) { return api.error_new("memslot: out of memory"); }

/* A memory of bare wasmtime-py's that begins empty and has no maximum looks the same, and is within the same limits. */
static wt_error *new_heap(struct memory *memory, size_t reserved, size_t guard)
{
    ms_wt_creator *creator = memory->creator;
    size_t page = ms_page_size();
    memory->capacity = (reserved + page - 1) / page * page;
    memory->mapped = memory->capacity + (guard + page - 1) / page * page;
    memory->limit = creator->heap_limit < memory->capacity ? creator->heap_limit : memory->capacity;
    const char *refused = NULL;
    if (__atomic_add_fetch(&creator->heaps, 1, __ATOMIC_RELAXED) > creator->most_heaps)
        refused = "memslot: as many heaps of the garbage collector live as the settings allow (slots)";
    else if (ms_reserve(memory->mapped, &memory->base) < 0)
        refused = "memslot: the kernel refused address space for the heap of the garbage collector";
    if (!refused)
        return NULL;
    __atomic_sub_fetch(&creator->heaps, 1, __ATOMIC_RELAXED);
    return api.error_new(refused);
}

static wt_error *lease(struct memory *memory, ms_wt_creator *creator, size_t minimum, size_t maximum)
{
    char message[512] = "";
    struct group *group = group_new(creator, NULL, 0);
    if (!group)
        return out_of_memory();
    int64_t leased = ms_wt_python_lease(creator->identity, minimum, maximum, &group->node.name, &memory->base,
                                        &memory->capacity, message, sizeof message);
    if (leased != 1) {
        free(group);
        message[sizeof message - 1] = 0;
        return api.error_new(*message ? message : "memslot: no memory could be leased");
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
    const ms_wt_guest *guest = frame.guest;
    wt_error *error = NULL;
    struct memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return out_of_memory();
    memory->creator = creator;
    memory->byte_size = minimum;
    int offered = guest && guest->creator == creator && frame.next < guest->count;
    if (offered && minimum == guest->byte_sizes[frame.next] && reserved <= guest->capacities[frame.next]) {
        memory->group = frame.group;
        memory->base = frame.bases[frame.next];
        memory->capacity = memory->limit = guest->capacities[frame.next];
        memory->index = frame.next++;
        __atomic_add_fetch(&frame.group->references, 1, __ATOMIC_RELAXED);
    } else if (minimum == 0 && maximum >= (size_t)UINT32_MAX) {
        error = new_heap(memory, reserved, guard);
    } else if (offered) {
        error = api.error_new("memslot: the memory that was asked for is not the one that was leased");
    } else {
        error = lease(memory, creator, minimum, maximum);
    }
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
    api.creator_set((wt_config *)config, &ours);
}

/* ---- entries ---- */

struct entry {
    int64_t raised, deferred;
    ms_wt_cell *cell; /* of the entry around this one */
};

int ms_wt_elsewhere(ms_wt_cell *cell)
{
    uintptr_t owner = __atomic_load_n(&cell->owner, __ATOMIC_SEQ_CST);
    return owner != 0 && owner != this_thread();
}

static int lease_over(ms_wt_cell *cell, uint64_t generation)
{
    return generation && __atomic_load_n(&cell->generation, __ATOMIC_SEQ_CST) != generation;
}

static int ended(ms_wt_cell *cell, uint64_t generation)
{
    return !__atomic_load_n(&cell->context, __ATOMIC_SEQ_CST) || lease_over(cell, generation);
}

/* A handle whose lease has ended is told so, whatever the next lease, or a second end, does now. */
static unsigned busy(ms_wt_cell *cell, uint64_t generation) { return ended(cell, generation) ? MS_WT_CLOSED : MS_WT_BUSY; }

/* `generation` is 0 for an entry of the host itself, which comes within one that was checked or before there are handles. */
static unsigned enter(ms_wt_cell *cell, uint64_t generation, struct entry *entry)
{
    *entry = (struct entry){frame.raised, frame.deferred, frame.cell};
    if (take(cell))
        return busy(cell, generation);
    /* Looked at as the owner: a lease ends only while another thread or an outer frame is that. */
    if (ended(cell, generation))
        return MS_WT_CLOSED | give(cell);
    frame.raised = frame.deferred = 0;
    frame.cell = cell;
    frame.depth++;
    return 0;
}

static uintptr_t leave(ms_wt_cell *cell, const struct entry *entry, unsigned flags, wt_trap *trap, wt_error *error)
{
    int64_t raised = frame.raised, deferred = frame.deferred;
    frame.depth--;
    frame.raised = entry->raised;
    frame.deferred = entry->deferred;
    frame.cell = entry->cell;
    flags |= cell->outgrown ? MS_WT_OUTGROWN : 0;
    cell->outgrown = 0;
    flags |= give(cell) | (trap ? MS_WT_TRAPPED : 0) | (error ? MS_WT_FAILED : 0) | (raised ? MS_WT_RAISED : 0) |
             (deferred ? MS_WT_DEFERRED : 0);
    return flags ? outcome_of(flags, trap, error, raised, deferred) : 0;
}

static struct entry entry_of(const int64_t *saved)
{
    return (struct entry){saved[0], saved[1], (ms_wt_cell *)((uintptr_t)saved[2] & ~(uintptr_t)1)};
}

static uintptr_t refuse(unsigned flags) { return outcome_of(flags, NULL, NULL, 0, 0); }

uintptr_t ms_wt_enter(ms_wt_cell *cell, uint64_t generation, int64_t *saved)
{
    struct entry entry;
    unsigned refused = enter(cell, generation, &entry);
    if (refused)
        return refuse(refused);
    saved[0] = entry.raised;
    saved[1] = entry.deferred;
    saved[2] = (int64_t)((uintptr_t)entry.cell | 1); /* a cell is aligned, and nothing has the address 0 */
    return 0;
}

/* A copy looks at `held` after it has counted itself in, and the owner at the count after it has set `held`: at least one of the two
 * sees the other.  A copy runs no Python and takes no lock, so its end is near. */
static void keep_copies_out(ms_wt_cell *cell)
{
    __atomic_store_n(&cell->held, 1, __ATOMIC_SEQ_CST);
    for (unsigned turns = 0; __atomic_load_n(&cell->pins, __ATOMIC_SEQ_CST); turns++) {
        struct timespec moment = {0, turns < 100 ? 0 : 50000};
        nanosleep(&moment, NULL);
    }
}

uintptr_t ms_wt_hold(ms_wt_cell *cell, uint64_t generation, uint64_t key, int alone)
{
    if (__atomic_load_n(&cell->owner, __ATOMIC_SEQ_CST) == this_thread())
        return refuse(busy(cell, generation));
    uintptr_t refused = ms_wt_enter(cell, generation, cell->hold);
    if (refused)
        return refused;
    cell->key = key;
    if (alone)
        keep_copies_out(cell);
    return 0;
}

static void let_copies_in(ms_wt_cell *cell) { __atomic_store_n(&cell->held, 0, __ATOMIC_SEQ_CST); }

unsigned ms_wt_copy(ms_wt_cell *cell, uint64_t generation, uintptr_t to, const char *from, size_t length)
{
    unsigned refused = 0;
    __atomic_add_fetch(&cell->pins, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&cell->held, __ATOMIC_SEQ_CST))
        refused = busy(cell, generation);
    else if (ended(cell, generation))
        refused = MS_WT_CLOSED;
    else
        memmove((void *)to, from, length);
    __atomic_sub_fetch(&cell->pins, 1, __ATOMIC_SEQ_CST);
    return refused;
}

uintptr_t ms_wt_leave(ms_wt_cell *cell, int64_t *saved)
{
    struct entry entry = entry_of(saved);
    if (!saved[2] || __atomic_load_n(&cell->owner, __ATOMIC_SEQ_CST) != this_thread())
        return 0;
    saved[2] = 0;
    return leave(cell, &entry, 0, NULL, NULL);
}

static int holds(ms_wt_cell *cell)
{
    return __atomic_load_n(&cell->owner, __ATOMIC_SEQ_CST) == this_thread() && cell->hold[2];
}

int ms_wt_let_go(ms_wt_cell *cell, uint64_t key, uintptr_t *outcome)
{
    if (!holds(cell) || cell->key != key)
        return 0;
    let_copies_in(cell);
    *outcome = ms_wt_leave(cell, cell->hold);
    return 1;
}

/* ---- an instance's life ---- */

/* What a store of ours is told of itself, and the shim's instance in a store, made by the first call that needs it; that holds no state
 * of a guest's. */
struct shimmed {
    ms_wt_cell *cell;     /* of the store; NULL for the embedder's */
    wt_instance instance; /* of store 0 before it is made */
    wt_memory memory;     /* the guest's, which it imports; zeros for a shared one */
    const uint8_t *shared;
};

void ms_wt_open(ms_wt_cell *cell, const ms_wt_guest *guest)
{
    struct shimmed *shimmed = calloc(1, sizeof *shimmed);
    if (shimmed)
        shimmed->cell = cell;
    wt_store *store = api.store_new((wt_engine *)guest->engine, shimmed, free);
    api.store_limiter(store, guest->most_bytes, guest->most_elements, -1, guest->most_tables, guest->most_memories);
    cell->store = (uintptr_t)store;
    cell->context = (uintptr_t)api.store_context(store);
}

/* wasmtime makes the heap of its garbage collector before or after an instance's memories.  Where it looks like the first of
 * them, it is made here. */
static void make_heap(wt_context *context)
{
    wt_ref ref;
    if (api.externref_new(context, NULL, NULL, &ref))
        api.externref_unroot(&ref);
}

uintptr_t ms_wt_instantiate(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases)
{
    struct entry entry;
    unsigned flags = enter(cell, 0, &entry);
    if (flags)
        return refuse(flags);
    cell->generation = 1;
    wt_context *context = (wt_context *)cell->context;
    struct group *group = NULL;
    if (guest->count && !(group = group_new(guest->creator, cell->store ? cell : NULL, token)))
        return leave(cell, &entry, 0, NULL, out_of_memory());
    cell->group = (uintptr_t)group;
    if (guest->heap_first)
        make_heap(context);

    const ms_wt_guest *outer_guest = frame.guest;
    const uintptr_t *outer_bases = frame.bases;
    size_t outer_next = frame.next;
    struct group *outer_group = frame.group;
    frame.guest = guest;
    frame.bases = bases;
    frame.next = 0;
    frame.group = group;
    wt_trap *trap = NULL;
    wt_error *error =
        api.instantiate((wt_instance_pre *)guest->prepared, context, (wt_instance *)cell->instance, &trap);
    if (!error && !trap && frame.next < guest->count)
        flags |= MS_WT_UNASKED;
    frame.guest = outer_guest;
    frame.bases = outer_bases;
    frame.next = outer_next;
    frame.group = outer_group;
    return leave(cell, &entry, flags, trap, error);
}

uintptr_t ms_wt_start(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases)
{
    ms_wt_open(cell, guest);
    return ms_wt_instantiate(cell, guest, token, bases);
}

static int take_alone(ms_wt_cell *cell)
{
    uintptr_t nobody = 0;
    return __atomic_compare_exchange_n(&cell->owner, &nobody, this_thread(), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

int ms_wt_close(ms_wt_cell *cell, uint64_t generation)
{
    if (!take_alone(cell)) {
        if (lease_over(cell, generation))
            return 3;
        /* The thread inside looks at `closing` after it has left, and where it ends a lease also after that: one of us two gets in
         * now, and a lease that has begun meanwhile goes on. */
        uint64_t known = 0, wanted = generation ? generation : UINT64_MAX;
        while (!__atomic_compare_exchange_n(&cell->closing, &known, wanted, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) &&
               known < wanted)
            continue;
        if (!take_alone(cell))
            return lease_over(cell, generation) ? 3 : 2;
    }
    if (lease_over(cell, generation)) {
        __atomic_store_n(&cell->owner, 0, __ATOMIC_SEQ_CST);
        return 3;
    }
    wt_store *store = (wt_store *)cell->store;
    struct group *group = (struct group *)cell->group;
    keep_copies_out(cell);
    cell->store = cell->group = 0;
    __atomic_store_n(&cell->context, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&cell->closing, 0, __ATOMIC_SEQ_CST);
    if (store)
        api.store_delete(store); /* which may run Python, on this thread; `held` keeps its entries out */
    if (group) {
        if (group_drop(group))
            free(group);
        else
            cell->lingering = 1;
    }
    int lingering = cell->lingering; /* which each later close answers, too */
    let_copies_in(cell);
    __atomic_store_n(&cell->owner, 0, __ATOMIC_SEQ_CST);
    return lingering;
}

/* ---- calls ---- */

static int get_export(ms_wt_cell *cell, const char *name, size_t length, wt_extern *found)
{
    return api.export_get((wt_context *)cell->context, (wt_instance *)cell->instance, name, length, found);
}

_Static_assert(sizeof(wt_func) <= sizeof ((ms_wt_callee *)0)->function, "a function has room");

static int find_function(ms_wt_callee *callee)
{
    wt_extern found;
    if (!get_export(callee->cell, callee->name, callee->length, &found))
        return 0;
    callee->found = found.kind == WT_EXTERN_FUNC;
    if (callee->found)
        memcpy(callee->function, &found.of.func, sizeof found.of.func);
    else
        api.extern_delete(&found);
    return callee->found;
}

_Static_assert(sizeof((ms_wt_callee *)0)->room == 16 * MS_WT_ROOM, "the room holds what it says");

uintptr_t ms_wt_call(ms_wt_callee *callee, uint64_t generation)
{
    struct entry entry;
    ms_wt_cell *cell = callee->cell;
    unsigned refused = enter(cell, generation, &entry);
    if (refused)
        return refuse(refused);
    if (!callee->found && !find_function(callee))
        return leave(cell, &entry, MS_WT_MISSING, NULL, NULL);
    wt_trap *trap = NULL;
    wt_error *error = api.call((wt_context *)cell->context, (const wt_func *)callee->function,
                               (wt_raw *)(callee->values ? callee->values : callee->room), callee->count, &trap);
    return leave(cell, &entry, 0, trap, error);
}

/* ---- globals and memories by name ---- */

static uintptr_t enter_export(ms_wt_cell *cell, uint64_t generation, struct entry *entry, const char *name, size_t length, wt_extern *found)
{
    unsigned refused = enter(cell, generation, entry);
    if (refused)
        return refuse(refused);
    if (!get_export(cell, name, length, found))
        return leave(cell, entry, MS_WT_MISSING, NULL, NULL);
    return 0;
}

static uintptr_t leave_wrong_kind(ms_wt_cell *cell, struct entry *entry, wt_extern *found)
{
    api.extern_delete(found);
    return leave(cell, entry, MS_WT_MISSING, NULL, NULL);
}

uintptr_t ms_wt_global_get(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, uint8_t *value, uint8_t *kind)
{
    struct entry entry;
    wt_extern found;
    uintptr_t refused = enter_export(cell, generation, &entry, name, length, &found);
    if (refused)
        return refused;
    if (found.kind != WT_EXTERN_GLOBAL)
        return leave_wrong_kind(cell, &entry, &found);
    wt_val val;
    memset(&val, 0, sizeof val);
    api.global_get((wt_context *)cell->context, &found.of.global, &val);
    memcpy(value, &val.of, 16);
    *kind = val.kind;
    api.val_unroot(&val);
    return leave(cell, &entry, 0, NULL, NULL);
}

uintptr_t ms_wt_global_set(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, const uint8_t *value, uint8_t kind)
{
    struct entry entry;
    wt_extern found;
    uintptr_t refused = enter_export(cell, generation, &entry, name, length, &found);
    if (refused)
        return refused;
    if (found.kind != WT_EXTERN_GLOBAL)
        return leave_wrong_kind(cell, &entry, &found);
    wt_val val;
    memset(&val, 0, sizeof val);
    val.kind = kind;
    memcpy(&val.of, value, 16);
    wt_error *error = api.global_set((wt_context *)cell->context, &found.of.global, &val);
    return leave(cell, &entry, 0, NULL, error);
}

_Static_assert(sizeof(wt_global) <= sizeof ((ms_wt_saved *)0)->place, "a global's place has room");

uintptr_t ms_wt_globals_find(ms_wt_cell *cell, ms_wt_saved *saved, size_t count)
{
    struct entry entry;
    unsigned refused = enter(cell, 0, &entry);
    if (refused)
        return refuse(refused);
    for (size_t i = 0; i < count; i++) {
        wt_extern found;
        if (!get_export(cell, saved[i].name, saved[i].length, &found))
            return leave(cell, &entry, MS_WT_MISSING, NULL, NULL);
        if (found.kind != WT_EXTERN_GLOBAL)
            return leave_wrong_kind(cell, &entry, &found);
        memcpy(saved[i].place, &found.of.global, sizeof found.of.global);
    }
    return leave(cell, &entry, 0, NULL, NULL);
}

uintptr_t ms_wt_globals_read(ms_wt_cell *cell, ms_wt_saved *saved, size_t count)
{
    struct entry entry;
    unsigned refused = enter(cell, 0, &entry);
    if (refused)
        return refuse(refused);
    for (size_t i = 0; i < count; i++) {
        wt_val val;
        memset(&val, 0, sizeof val);
        api.global_get((wt_context *)cell->context, (const wt_global *)saved[i].place, &val);
        saved[i].kind = val.kind;
        memcpy(saved[i].value, &val.of, sizeof saved[i].value);
        api.val_unroot(&val);
    }
    return leave(cell, &entry, 0, NULL, NULL);
}

uintptr_t ms_wt_restore(ms_wt_cell *cell, uint64_t generation, const ms_wt_saved *saved, size_t count)
{
    struct entry entry = entry_of(cell->hold);
    wt_error *error = NULL;
    if (!holds(cell))
        return refuse(MS_WT_BUSY);
    cell->hold[2] = 0;
    for (size_t i = 0; i < count && !error; i++) {
        wt_val val;
        memset(&val, 0, sizeof val);
        val.kind = saved[i].kind;
        memcpy(&val.of, saved[i].value, sizeof saved[i].value);
        error = api.global_set((wt_context *)cell->context, (const wt_global *)saved[i].place, &val);
    }
    uint64_t ended = cell->generation, closing;
    __atomic_store_n(&cell->generation, generation, __ATOMIC_SEQ_CST);
    closing = __atomic_load_n(&cell->closing, __ATOMIC_SEQ_CST);
    let_copies_in(cell);
    return leave(cell, &entry, closing && closing >= ended ? MS_WT_CLOSING : 0, NULL, error);
}

uintptr_t ms_wt_memory_locate(ms_wt_cell *cell, const char *name, size_t length, uintptr_t *base, size_t *byte_size)
{
    struct entry entry;
    wt_extern found;
    uintptr_t refused = enter_export(cell, 0, &entry, name, length, &found);
    if (refused)
        return refused;
    if (found.kind == WT_EXTERN_MEMORY) {
        *base = (uintptr_t)api.memory_data((wt_context *)cell->context, &found.of.memory);
        *byte_size = api.memory_size((wt_context *)cell->context, &found.of.memory);
    } else if (found.kind == WT_EXTERN_SHAREDMEMORY) {
        /* The store holds the memory too, so it stays after this handle goes. */
        *base = (uintptr_t)api.shared_data(found.of.sharedmemory);
        *byte_size = api.shared_size(found.of.sharedmemory);
        api.extern_delete(&found);
    } else {
        return leave_wrong_kind(cell, &entry, &found);
    }
    return leave(cell, &entry, 0, NULL, NULL);
}

uintptr_t ms_wt_memory_grow(ms_wt_cell *cell, uint64_t generation, const char *name, size_t length, uint64_t pages, uint64_t *before)
{
    struct entry entry;
    wt_extern found;
    wt_error *error;
    uintptr_t refused = enter_export(cell, generation, &entry, name, length, &found);
    if (refused)
        return refused;
    if (found.kind == WT_EXTERN_MEMORY) {
        error = api.memory_grow((wt_context *)cell->context, &found.of.memory, pages, before);
    } else if (found.kind == WT_EXTERN_SHAREDMEMORY) {
        error = api.shared_grow(found.of.sharedmemory, pages, before);
        api.extern_delete(&found);
    } else {
        return leave_wrong_kind(cell, &entry, &found);
    }
    return leave(cell, &entry, 0, NULL, error);
}

/* ---- host functions ---- */

static struct node *dropped_functions;

void ms_wt_stay(uintptr_t context, uintptr_t *kept)
{
    const struct shimmed *shimmed = api.context_data((wt_context *)context);
    *kept = shimmed ? (uintptr_t)stay(shimmed->cell) : 0;
}

void ms_wt_go(uintptr_t *kept)
{
    ms_wt_cell *cell = (ms_wt_cell *)*kept;
    *kept = 0;
    if (cell)
        give(cell);
}

struct function {
    struct node node; /* first: it is freed as one */
    int foreign;
};

static wt_trap *call_python(void *env, wt_caller *caller, wt_raw *values, size_t count)
{
    static const char message[] = "a host function raised";
    const struct function *function = env;
    uintptr_t kept = 0;
    if (!function->foreign)
        ms_wt_stay((uintptr_t)api.caller_context(caller), &kept);
    int64_t exception = ms_wt_python_call(function->node.name, (uint8_t *)values, count);
    ms_wt_go(&kept);
    if (!exception)
        return NULL;
    frame.raised = exception;
    return api.trap_new(message, sizeof message - 1);
}

static void finalize_function(void *env) { push(&dropped_functions, env); }

uintptr_t ms_wt_define(uintptr_t linker, const char *module, size_t module_length, const char *name, size_t name_length,
                       uintptr_t type, uint64_t identity, int foreign)
{
    struct function *function = malloc(sizeof *function);
    if (!function)
        return (uintptr_t)out_of_memory();
    *function = (struct function){{NULL, identity}, foreign};
    return (uintptr_t)api.define_func((wt_linker *)linker, module, module_length, name, name_length,
                                      (const wt_functype *)type, call_python, function, finalize_function);
}

size_t ms_wt_drain_functions(uint64_t *identities, size_t capacity)
{
    return drain(&dropped_functions, identities, capacity);
}

/* ---- WASI calls that could wait past a deadline ----
 *
 * wasmtime looks at epochs in code alone.  So poll_oneoff sleeps here, a slice at a time, and enters code after each: the shim's
 * `tick`, which traps once the deadline has passed.  path_open opens what is a file or a folder: opening a FIFO waits, and so does
 * reading it.  wasmtime's own functions look for the memory among their caller's exports; the shim is that caller.
 */

enum { WAIT_SLICE = 5000000 /* ns */, WASI_PAGE = 65536, SUBSCRIPTION = 48, EVENT = 32, FILESTAT = 64, LONGEST_PATH = 4096 };
enum { WASI_NAMETOOLONG = 37, WASI_NOTSUP = 58 };
enum { WASI_DIRECTORY = 3, WASI_REGULAR_FILE = 4, WASI_SYMBOLIC_LINK = 7 };

/* ms_forks + 1 when wasmtime's first worker thread was noticed in this process or one before it, or 0; atomic. */
static unsigned workers;

static void note_workers(void)
{
    if (!__atomic_load_n(&workers, __ATOMIC_RELAXED))
        __atomic_store_n(&workers, ms_forks + 1, __ATOMIC_RELAXED);
}

int ms_wt_workers_lost(void)
{
    unsigned noticed = __atomic_load_n(&workers, __ATOMIC_RELAXED);
    return noticed && noticed != ms_forks + 1;
}

static const char wasi_module[] = "wasi_snapshot_preview1";

struct wait {
    struct node node; /* first: it is freed as one */
    const ms_wt_shim *shim;
    int foreign;
    struct shimmed own; /* where the store is foreign */
};

/* A call that is under way: its store, the guest's memory, and the shim's instance. */
struct visit {
    wt_context *context;
    struct shimmed *shimmed;
    uint8_t *memory;
    uint64_t size;
};

static wt_trap *trap_of(const char *message) { return api.trap_new(message, strlen(message)); }

static wt_trap *trap_of_error(wt_error *error)
{
    wt_bytes message;
    api.error_message(error, &message);
    wt_trap *trap = api.trap_new(message.bytes, message.size);
    api.bytes_delete(&message);
    api.error_delete(error);
    return trap;
}

static wt_trap *make_shim(const struct wait *wait, wt_context *context, struct shimmed *shimmed, const wt_extern *memory)
{
    static const char *const names[] = {"poll_oneoff", "path_open", "path_filestat_get", "clock_time_get"};
    enum { COUNT = sizeof names / sizeof *names };
    wt_extern imports[COUNT + 1];
    for (size_t i = 0; i < COUNT; i++)
        if (!api.linker_get((const wt_linker *)wait->shim->linker, context, wasi_module, sizeof wasi_module - 1, names[i],
                            strlen(names[i]), &imports[i]))
            return trap_of("memslot: wasmtime has no WASI");
    imports[COUNT] = *memory;
    wt_trap *trap = NULL;
    const wt_module *module = (const wt_module *)wait->shim->module;
    wt_error *error = api.instance_new(context, module, imports, COUNT + 1, &shimmed->instance, &trap);
    if (error || trap)
        shimmed->instance.store_id = 0;
    return error ? trap_of_error(error) : trap;
}

/* Fills in a visit; NULL, or why there is none. */
static wt_trap *visit_begin(struct visit *visit, struct wait *wait, wt_caller *caller)
{
    wt_extern memory;
    wt_trap *trap = NULL;
    wt_context *context = api.caller_context(caller);
    struct shimmed *shimmed = wait->foreign ? &wait->own : api.context_data(context);
    if (!shimmed)
        return trap_of("memslot: out of memory");
    if (!api.caller_export(caller, "memory", 6, &memory))
        return trap_of("missing required memory export");
    if (memory.kind != WT_EXTERN_MEMORY && memory.kind != WT_EXTERN_SHAREDMEMORY) {
        api.extern_delete(&memory);
        return trap_of("missing required memory export");
    }
    wt_memory plain;
    memset(&plain, 0, sizeof plain);
    *visit = (struct visit){.context = context, .shimmed = shimmed};
    if (memory.kind == WT_EXTERN_SHAREDMEMORY) {
        visit->memory = api.shared_data(memory.of.sharedmemory);
        visit->size = api.shared_size(memory.of.sharedmemory);
    } else {
        plain = memory.of.memory;
        visit->memory = api.memory_data(context, &plain);
        visit->size = api.memory_size(context, &plain);
    }
    const uint8_t *shared = memory.kind == WT_EXTERN_SHAREDMEMORY ? visit->memory : NULL;
    int known = shimmed->shared == shared && shimmed->memory.first.store_id == plain.first.store_id &&
                shimmed->memory.first.a == plain.first.a && shimmed->memory.b == plain.b;
    if (!shimmed->instance.store_id || !known) {
        trap = make_shim(wait, context, shimmed, &memory);
        shimmed->memory = plain;
        shimmed->shared = shared;
    }
    api.extern_delete(&memory); /* the shim's instance holds it */
    return trap;
}

/* Calls a function of the shim, which forwards to WASI's of that name; NULL, or what the guest traps with. */
static wt_trap *forward(const struct visit *visit, const char *name, wt_raw *values, size_t count)
{
    wt_extern found;
    wt_trap *trap = NULL;
    if (!api.export_get(visit->context, &visit->shimmed->instance, name, strlen(name), &found))
        return trap_of("memslot: the shim is not as it was built");
    wt_error *error = api.call(visit->context, &found.of.func, values, count, &trap);
    return error ? trap_of_error(error) : trap;
}

/* Traps if the deadline has passed.  Waiting costs no fuel. */
static wt_trap *tick(const struct visit *visit)
{
    uint64_t fuel;
    wt_raw none = {0};
    wt_error *unfuelled = api.fuel_get(visit->context, &fuel);
    wt_trap *trap = forward(visit, "tick", &none, 1);
    if (!unfuelled)
        unfuelled = api.fuel_set(visit->context, fuel);
    if (unfuelled)
        api.error_delete(unfuelled);
    return trap;
}

static uint64_t word(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static int is_inside(const struct visit *visit, uint64_t address, uint64_t length, uint64_t alignment)
{
    return address % alignment == 0 && address + length <= visit->size;
}

static uint64_t monotonic(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static wt_trap *sleep_until(const struct visit *visit, uint64_t until)
{
    wt_trap *trap = NULL;
    for (uint64_t now = monotonic(); now < until && !trap; now = monotonic()) {
        uint64_t slice = until - now < WAIT_SLICE ? until - now : WAIT_SLICE;
        nanosleep(&(struct timespec){0, (long)slice}, NULL);
        trap = tick(visit);
    }
    return trap;
}

/* The moments at which a wait began: ours, and those of WASI's clocks that were asked for. */
struct moments {
    uint64_t ours;
    int known[2];
    uint64_t of_clock[2]; /* real time, monotonic */
};

/* Copies the i-th subscription, which another thread may change if the memory is shared. */
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
    return timeout < UINT64_MAX - began->ours ? began->ours + timeout : UINT64_MAX;
}

/* Reads a clock of WASI's, whose monotonic one counts from the store's beginning, into 8 bytes of the guest's that are put back. */
static wt_trap *read_clock(const struct visit *visit, uint32_t clock, uint64_t borrowed, uint64_t *now)
{
    wt_raw values[3] = {{.i64 = clock}, {.i64 = 0}, {.i64 = (int64_t)borrowed}};
    uint64_t kept = word(visit->memory + borrowed);
    wt_trap *trap = forward(visit, "clock_time_get", values, 3);
    *now = word(visit->memory + borrowed);
    memcpy(visit->memory + borrowed, &kept, sizeof kept);
    return trap;
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
    struct moments began = {.ours = monotonic()};
    uint64_t until = UINT64_MAX;
    int clocks_alone = subscribed && is_inside(&visit, in, (uint64_t)subscribed * SUBSCRIPTION, 8);
    for (uint32_t i = 0; i < subscribed && clocks_alone; i++) {
        uint8_t subscription[SUBSCRIPTION];
        read_subscription(&visit, in, i, subscription);
        clocks_alone = is_to_clock(subscription);
        if (clocks_alone && subscription[40] && !began.known[subscription[16]]) {
            trap = read_clock(&visit, subscription[16], in, &began.of_clock[subscription[16]]);
            if (trap)
                return trap;
            began.known[subscription[16]] = 1;
        }
        uint64_t due = clocks_alone ? due_at(subscription, &began) : 0;
        until = due < until ? due : until;
    }
    /* WASI answers anything else at once: each descriptor that it can subscribe to is ready, or an error. */
    if (!clocks_alone)
        return forward(&visit, "poll_oneoff", values, 4);
    if ((trap = sleep_until(&visit, until)))
        return trap;
    uint32_t ready = 0;
    uint64_t now = monotonic();
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

/* True if what the path leads to is neither a folder, a file nor a link; `borrowed` are bytes of the guest's that are put back. */
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
    *special = !trap && !values[0].i32 && type != WASI_DIRECTORY && type != WASI_REGULAR_FILE && type != WASI_SYMBOLIC_LINK;
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
    note_workers();
    if (visit.size >= WASI_PAGE && path + length <= visit.size) {
        /* Beside the path, which ends before the second of these places if it begins within the first. */
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

uintptr_t ms_wt_define_wait(uintptr_t linker, uintptr_t type, uint64_t identity, const ms_wt_shim *shim, int opens, int foreign)
{
    struct wait *wait = malloc(sizeof *wait);
    if (!wait)
        return (uintptr_t)out_of_memory();
    const char *name = opens ? "path_open" : "poll_oneoff";
    *wait = (struct wait){.node = {NULL, identity}, .shim = shim, .foreign = foreign};
    return (uintptr_t)api.define_func((wt_linker *)linker, wasi_module, sizeof wasi_module - 1, name, strlen(name),
                                      (const wt_functype *)type, opens ? path_open : poll_oneoff, wait, finalize_function);
}

/* ---- captured streams: wasmtime may write from a thread of its own ---- */

struct ms_wt_output {
    unsigned references;
    int busy;
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

static ptrdiff_t write_output(void *env, const unsigned char *bytes, size_t length)
{
    ms_wt_output *output = env;
    ptrdiff_t written = (ptrdiff_t)length;
    note_workers();
    lock(output);
    /* What passes the limit is taken from the guest and dropped: a hostile one may not fill this process. */
    length = length < output->limit - output->length ? length : output->limit - output->length;
    if (output->room - output->length < length) {
        size_t room = output->length + length < 2 * output->room ? 2 * output->room : output->length + length;
        uint8_t *moved = realloc(output->bytes, room);
        if (moved) {
            output->bytes = moved;
            output->room = room;
        } else {
            written = -12; /* ENOMEM */
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

static ms_wt_output *share(ms_wt_output *output)
{
    __atomic_add_fetch(&output->references, 1, __ATOMIC_RELAXED);
    return output;
}

size_t ms_wt_wasi_give(ms_wt_cell *cell, const ms_wt_wasi *wasi, ms_wt_output *out, ms_wt_output *err)
{
    wt_wasi_config *config = api.wasi_new();
    size_t refused = 0;
    if (out)
        api.stdout_custom(config, write_output, share(out), finalize_output);
    else if (wasi->inherit_stdout)
        api.wasi_stdout(config);
    if (err)
        api.stderr_custom(config, write_output, share(err), finalize_output);
    else if (wasi->inherit_stderr)
        api.wasi_stderr(config);
    if (!api.wasi_argv(config, wasi->argument_count, wasi->arguments))
        refused = MS_WT_ARGUMENTS;
    else if (wasi->variable_count && !api.wasi_env(config, wasi->variable_count, wasi->names, wasi->values))
        refused = MS_WT_ENVIRONMENT;
    for (size_t i = 0; i < wasi->folder_count && !refused; i++)
        if (!api.wasi_folder(config, wasi->folders[i], wasi->known_as[i], wasi->writable[i]))
            refused = MS_WT_FOLDER + i;
    if (refused)
        api.wasi_delete(config);
    else if ((cell->error = (uintptr_t)api.context_set_wasi((wt_context *)cell->context, config)))
        refused = MS_WT_SET;
    return refused;
}

size_t ms_wt_output_read(ms_wt_output *output, uint8_t *bytes, size_t capacity)
{
    lock(output);
    size_t length = output->length;
    if (capacity && length) /* before anything was written there are no bytes to copy from */
        memcpy(bytes, output->bytes, length < capacity ? length : capacity);
    unlock(output);
    return length;
}
