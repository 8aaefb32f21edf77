/* Binding to wasmtime, entries into instances, and an instance's life. wasmtime_bridge.h has the contract. */
#include "wasmtime_internal.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- binding ---- */

struct wt_api wt_api;

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
#define X(name, symbol, result, parameters) wt_api.name = (result(*) parameters) * addresses++;
    WT_SYMBOLS(X)
#undef X
}

size_t ms_wt_layout(size_t *layout, size_t capacity)
{
    /* In the order of _layout() in hosts/wasmtime/bridge.py. */
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

wt_error *wt_out_of_memory(void) { return wt_api.error_new("memslot: out of memory"); }

/* ---- lists that finalizers push on ---- */

void wt_push(struct wt_node **list, struct wt_node *node)
{
    /* Release: the thread that drains must see the node's name. No lock: a finalizer may run inside a garbage collection of a
     * thread that is draining this very list. */
    node->next = __atomic_load_n(list, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(list, &node->next, node, 1, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        continue;
}

size_t wt_drain(struct wt_node **list, uint64_t *names, size_t capacity)
{
    size_t count = 0;
    /* Take the whole list at once: popping single nodes would meet the ABA problem. */
    struct wt_node *node = __atomic_exchange_n(list, NULL, __ATOMIC_ACQUIRE);
    while (node) {
        struct wt_node *next = node->next;
        if (count < capacity) {
            names[count++] = node->name;
            free(node);
        } else {
            wt_push(list, node);
        }
        node = next;
    }
    return count;
}

/* ---- what this thread is inside of ---- */

_Thread_local struct wt_frame wt_frame;

/* The address of a thread-local variable differs from that of any other living thread. */
static uintptr_t this_thread(void) { return (uintptr_t)&wt_frame; }

unsigned ms_wt_depth(void) { return wt_frame.depth; }

int64_t ms_wt_raise(int64_t exception)
{
    int64_t before = wt_frame.raised;
    wt_frame.raised = exception;
    return before;
}

int ms_wt_first_deferred(void) { return wt_frame.depth && !wt_frame.deferred; }

/* ---- outcomes ---- */

static uintptr_t outcome_of(unsigned flags, wt_trap *trap, wt_error *error, int64_t raised, int64_t deferred)
{
    static ms_wt_outcome lost = {.flags = MS_WT_LOST};
    ms_wt_outcome *outcome = malloc(sizeof *outcome);
    if (!outcome)
        return (uintptr_t)&lost;
    *outcome = (ms_wt_outcome){flags, (uintptr_t)trap, (uintptr_t)error, raised, deferred};
    return (uintptr_t)outcome;
}

uintptr_t wt_refuse(unsigned flags) { return outcome_of(flags, NULL, NULL, 0, 0); }

void ms_wt_outcome_free(uintptr_t outcome)
{
    if (!(((ms_wt_outcome *)outcome)->flags & MS_WT_LOST))
        free((ms_wt_outcome *)outcome);
}

/* ---- owning a cell ----
 *
 * A copy and the owner agree without a lock, each by writing its own word before it reads the other's: a copy raises `pins`, then
 * reads `exclusive`; the owner sets `exclusive`, then reads `pins`; so one of them yields. This needs sequential consistency:
 * with acquire and release alone both could read the old value. */

static uintptr_t owner_of(ms_wt_cell *cell) { return __atomic_load_n(&cell->owner, __ATOMIC_SEQ_CST); }

static int is_owner(ms_wt_cell *cell) { return owner_of(cell) == this_thread(); }

int ms_wt_elsewhere(ms_wt_cell *cell)
{
    uintptr_t owner = owner_of(cell);
    return owner != 0 && owner != this_thread();
}

/* Makes this thread the owner if the cell has none. */
static int own_free(ms_wt_cell *cell)
{
    uintptr_t none = 0;
    return __atomic_compare_exchange_n(&cell->owner, &none, this_thread(), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Makes this thread the owner, or counts one more entry of it. False if another thread is inside, or `exclusive` is set. */
static int own(ms_wt_cell *cell)
{
    if (!own_free(cell) && (!is_owner(cell) || cell->exclusive))
        return 0;
    cell->depth++;
    return 1;
}

/* Ends one entry of the owner. The cell may be another thread's afterwards. */
static void disown(ms_wt_cell *cell)
{
    if (!--cell->depth)
        __atomic_store_n(&cell->owner, 0, __ATOMIC_SEQ_CST);
}

ms_wt_cell *wt_keep_open(ms_wt_cell *cell)
{
    return cell && cell != wt_frame.cell && own(cell) ? cell : NULL;
}

void wt_let_close(ms_wt_cell *cell)
{
    if (cell)
        disown(cell);
}

/* ---- entries ---- */

static int lease_over(ms_wt_cell *cell, uint64_t generation)
{
    return generation && __atomic_load_n(&cell->generation, __ATOMIC_SEQ_CST) != generation;
}

static int ended(ms_wt_cell *cell, uint64_t generation)
{
    return !__atomic_load_n(&cell->context, __ATOMIC_SEQ_CST) || lease_over(cell, generation);
}

/* Returns the flag for an entry that did not get in. A handle whose lease has ended is told so, also
 * while the next lease runs. */
static unsigned busy(ms_wt_cell *cell, uint64_t generation)
{
    return ended(cell, generation) ? MS_WT_CLOSED : MS_WT_BUSY;
}

uintptr_t ms_wt_enter(ms_wt_cell *cell, uint64_t generation, ms_wt_entry *entry)
{
    if (!own(cell))
        return wt_refuse(busy(cell, generation));
    /* Check the lease as the owner: it ends only while another thread, or an outer frame of this one, is that. Checked
     * before, it could end in between, and this call would run in the next tenant's instance. */
    if (ended(cell, generation)) {
        disown(cell);
        return wt_refuse(MS_WT_CLOSED);
    }
    *entry = (ms_wt_entry){wt_frame.cell, wt_frame.raised, wt_frame.deferred, 1};
    wt_frame.raised = wt_frame.deferred = 0;
    wt_frame.cell = cell;
    wt_frame.depth++;
    return 0;
}

uintptr_t wt_leave(ms_wt_cell *cell, ms_wt_entry *entry, unsigned flags, wt_trap *trap, wt_error *error)
{
    int64_t raised = wt_frame.raised, deferred = wt_frame.deferred;
    wt_frame.depth--;
    wt_frame.raised = entry->raised;
    wt_frame.deferred = entry->deferred;
    wt_frame.cell = entry->outer;
    entry->inside = 0;
    flags |= (trap ? MS_WT_TRAPPED : 0) | (error ? MS_WT_FAILED : 0) | (raised ? MS_WT_RAISED : 0) |
             (deferred ? MS_WT_DEFERRED : 0);
    disown(cell); /* last: the cell and the entry in it may be another thread's from here on */
    return flags ? outcome_of(flags, trap, error, raised, deferred) : 0;
}

uintptr_t ms_wt_leave(ms_wt_cell *cell, ms_wt_entry *entry)
{
    return entry->inside && is_owner(cell) ? wt_leave(cell, entry, 0, NULL, NULL) : 0;
}

/* Keeps new copies out, and waits for those under way. A copy runs no Python and takes no lock, so its end is near. */
static void begin_exclusive(ms_wt_cell *cell)
{
    __atomic_store_n(&cell->exclusive, 1, __ATOMIC_SEQ_CST);
    for (unsigned turns = 0; __atomic_load_n(&cell->pins, __ATOMIC_SEQ_CST); turns++) {
        struct timespec moment = {0, turns < 100 ? 0 : 50000};
        nanosleep(&moment, NULL);
    }
}

void wt_end_exclusive(ms_wt_cell *cell) { __atomic_store_n(&cell->exclusive, 0, __ATOMIC_SEQ_CST); }

uintptr_t ms_wt_acquire(ms_wt_cell *cell, uint64_t generation, uint64_t key, int exclusive)
{
    if (is_owner(cell))
        return wt_refuse(busy(cell, generation));
    uintptr_t refused = ms_wt_enter(cell, generation, &cell->acquired);
    if (refused)
        return refused;
    cell->key = key;
    if (exclusive)
        begin_exclusive(cell);
    return 0;
}

int wt_take_acquired(ms_wt_cell *cell, ms_wt_entry *entry)
{
    if (!is_owner(cell) || !cell->acquired.inside)
        return 0;
    *entry = cell->acquired;
    cell->acquired.inside = 0;
    return 1;
}

int ms_wt_release(ms_wt_cell *cell, uint64_t key, uintptr_t *outcome)
{
    ms_wt_entry entry;
    if (!is_owner(cell) || cell->key != key || !wt_take_acquired(cell, &entry))
        return 0;
    wt_end_exclusive(cell);
    *outcome = wt_leave(cell, &entry, 0, NULL, NULL);
    return 1;
}

unsigned ms_wt_copy(ms_wt_cell *cell, uint64_t generation, uintptr_t to, const char *from, size_t length)
{
    unsigned refused = 0;
    __atomic_add_fetch(&cell->pins, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&cell->exclusive, __ATOMIC_SEQ_CST))
        refused = busy(cell, generation);
    else if (ended(cell, generation))
        refused = MS_WT_CLOSED;
    else
        memmove((void *)to, from, length);
    __atomic_sub_fetch(&cell->pins, 1, __ATOMIC_SEQ_CST);
    return refused;
}

/* ---- an instance's life ---- */

void ms_wt_open(ms_wt_cell *cell, const ms_wt_guest *guest)
{
    struct wt_store_data *data = calloc(1, sizeof *data);
    if (data)
        data->cell = cell;
    wt_store *store = wt_api.store_new((wt_engine *)guest->engine, data, free);
    wt_api.store_limiter(store, guest->most_bytes, guest->most_elements, -1, guest->most_tables, guest->most_memories);
    cell->store = (uintptr_t)store;
    cell->context = (uintptr_t)wt_api.store_context(store);
}

/* Has wasmtime make the heap of its garbage collector now. Otherwise it may make it after the instance's memories, or before
 * them, where new_memory cannot tell an empty heap from an empty first memory. */
static void make_heap(wt_context *context)
{
    wt_ref ref;
    if (wt_api.externref_new(context, NULL, NULL, &ref))
        wt_api.externref_unroot(&ref);
}

uintptr_t ms_wt_instantiate(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases)
{
    ms_wt_entry entry;
    uintptr_t refused = ms_wt_enter(cell, 0, &entry);
    if (refused)
        return refused;
    cell->generation = 1;
    wt_context *context = (wt_context *)cell->context;
    struct wt_group *group = NULL;
    if (guest->count && !(group = wt_group_new(guest->creator, cell->store ? cell : NULL, token)))
        return wt_leave(cell, &entry, 0, NULL, wt_out_of_memory());
    cell->group = (uintptr_t)group;
    if (guest->heap_first)
        make_heap(context);

    /* Restore the outer offer afterwards: a start function may call a host function that instantiates another guest. */
    struct wt_offer outer = wt_frame.offer;
    wt_frame.offer = (struct wt_offer){guest, bases, 0, group};
    wt_trap *trap = NULL;
    wt_error *error =
        wt_api.instantiate((wt_instance_pre *)guest->prepared, context, (wt_instance *)cell->instance, &trap);
    /* A memory that did not come from the creator is not in its slot: its bytes would never be reset. */
    unsigned flags = !error && !trap && wt_frame.offer.next < guest->count ? MS_WT_UNASKED : 0;
    wt_frame.offer = outer;
    return wt_leave(cell, &entry, flags, trap, error);
}

uintptr_t ms_wt_start(ms_wt_cell *cell, const ms_wt_guest *guest, uint64_t token, const uintptr_t *bases)
{
    ms_wt_open(cell, guest);
    return ms_wt_instantiate(cell, guest, token, bases);
}

enum { UNUSED, LINGERING, INSIDE, ENDED_BEFORE }; /* answers of ms_wt_close */

int ms_wt_close(ms_wt_cell *cell, uint64_t generation)
{
    if (!own_free(cell)) /* the thread inside may be closing it */
        return ended(cell, generation) ? ENDED_BEFORE : INSIDE;
    /* A lease that has begun meanwhile goes on. A close of that lease may have found this thread as the owner and returned
     * LATER: Creator.drain completes it. */
    if (lease_over(cell, generation)) {
        __atomic_store_n(&cell->owner, 0, __ATOMIC_SEQ_CST);
        return ENDED_BEFORE;
    }
    wt_store *store = (wt_store *)cell->store;
    struct wt_group *group = (struct wt_group *)cell->group;
    /* Wait for copies before the store goes: they read addresses that it unmaps. */
    begin_exclusive(cell);
    cell->store = cell->group = 0;
    __atomic_store_n(&cell->context, 0, __ATOMIC_SEQ_CST);
    /* Deleting a store drops externrefs, which may run Python on this thread. `exclusive` keeps that Python's entries out. */
    if (store)
        wt_api.store_delete(store);
    if (group) {
        if (wt_group_drop(group))
            free(group);
        else
            cell->lingering = 1; /* a memory's finalizer has not run, so the slot must not be handed on */
    }
    /* Read before the cell has no owner: another thread may close it again from then on. */
    int answer = cell->lingering ? LINGERING : UNUSED;
    wt_end_exclusive(cell);
    __atomic_store_n(&cell->owner, 0, __ATOMIC_SEQ_CST);
    return answer;
}
