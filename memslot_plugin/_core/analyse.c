/* Finds what the code of a module may do to state outside of its memories, by one walk over every instruction.
 *
 * The walk is pure: it reads bytes [start, end), writes what the caller gave it, and calls nothing. Every round of every loop
 * takes a byte, no count is trusted before its entries were read, and nesting is a number: a hostile module costs as much as
 * an honest one of its size. The runtime decides if code is valid. Valid code is stepped over exactly as a runtime steps over
 * it, or reported as not understood: a step that went wrong could miss the table.set that makes a reset in place unsafe. */
#include "memslot.h"

typedef struct {
    const uint8_t *at;
    const uint8_t *end;
} cursor;

/* ---- integers and types (WebAssembly 3.0, sections 5.2.2 and 5.3) ---- */

/* Steps over a LEB128 integer of at most `most` bytes. */
static inline int skip_integer(cursor *in, int most)
{
    while (most-- > 0) {
        if (in->at == in->end)
            return MS_CODE_CUT;
        if (*in->at++ < 0x80)
            return MS_CODE_UNDERSTOOD;
    }
    return MS_CODE_INTEGER;
}

/* An index, a count or a size. */
static inline int take_u32(cursor *in, uint32_t *value)
{
    uint32_t got = 0;
    for (int shift = 0; shift < 35; shift += 7) {
        if (in->at == in->end)
            return MS_CODE_CUT;
        uint8_t byte = *in->at++;
        if (shift == 28 && byte > 0x0f)
            return MS_CODE_INTEGER;
        got |= (uint32_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            *value = got;
            return MS_CODE_UNDERSTOOD;
        }
    }
    return MS_CODE_INTEGER;
}

static int skip_bytes(cursor *in, size_t length)
{
    if ((size_t)(in->end - in->at) < length)
        return MS_CODE_CUT;
    in->at += length;
    return MS_CODE_UNDERSTOOD;
}

/* True from nocont to cont, in the order of the format. 0x65 (shared) and others announce types that are not known here. */
static int is_abstract(uint8_t byte)
{
    return byte >= 0x68 && byte <= 0x75;
}

/* A type index, which is a signed integer of 33 bits that is not negative. */
static int skip_type_index(cursor *in)
{
    int fault = skip_integer(in, 5);
    if (fault)
        return fault;
    return in->at[-1] & 0x40 ? MS_CODE_TYPE : MS_CODE_UNDERSTOOD;
}

static int skip_heap_type(cursor *in)
{
    if (in->at < in->end && is_abstract(*in->at))
        return skip_bytes(in, 1);
    return skip_type_index(in);
}

static int is_value_type(uint8_t byte)
{
    return (byte >= 0x7b && byte <= 0x7f) || byte == 0x63 || byte == 0x64 || is_abstract(byte);
}

static int skip_value_type(cursor *in)
{
    if (in->at == in->end)
        return MS_CODE_CUT;
    uint8_t byte = *in->at++;
    if (byte == 0x63 || byte == 0x64)
        return skip_heap_type(in);
    return is_value_type(byte) ? MS_CODE_UNDERSTOOD : MS_CODE_TYPE;
}

static int skip_block_type(cursor *in)
{
    if (in->at == in->end)
        return MS_CODE_CUT;
    if (*in->at == 0x40)
        return skip_bytes(in, 1);
    return is_value_type(*in->at) ? skip_value_type(in) : skip_type_index(in);
}

/* Steps over an alignment, the memory's index if bit 6 is set, and an offset. A runtime that knows 64-bit memories takes ten
 * bytes for any offset. No access is wider than 16 bytes, so a larger alignment is a flag of a proposal that is not known here. */
static int skip_memory_argument(cursor *in)
{
    uint32_t flags, memory;
    int fault = take_u32(in, &flags);
    if (fault)
        return fault;
    if ((flags & ~0x40u) > 4)
        return MS_CODE_FLAGS;
    if (flags & 0x40 && (fault = take_u32(in, &memory)))
        return fault;
    return skip_integer(in, 10);
}

/* ---- opcodes (WebAssembly 3.0, section 5.4; legacy exceptions; threads; wide arithmetic) ---- */

/* The immediates that follow an opcode. A small letter is read like its capital, and the instruction is of a kind that is
 * looked for. */
enum shape {
    _,          /* no opcode that is known here */
    N,          /* nothing */
    X, x,       /* an index */
    P, p,       /* two indices */
    M, m,       /* a memory argument */
    K,          /* a memory argument and a lane */
    B,          /* a block type; a block begins */
    Y,          /* a block type and catch clauses; a block begins */
    E,          /* nothing; a block ends */
    D,          /* a label; a block ends */
    T,          /* labels, and one more */
    S,          /* value types */
    R,          /* a heap type */
    C,          /* flags, a label and two heap types */
    V, L,       /* a signed integer of 32 or 64 bits */
    F, H, Z,    /* 4, 8 or 16 bytes */
    O,          /* one byte */
    G,          /* an opcode that goes on */
};

static const uint8_t shapes[256] = {
    /*        0  1  2  3  4  5  6  7  8  9  a  b  c  d  e  f */
    /* 0 */   N, N, B, B, B, N, B, X, X, X, N, E, X, X, T, N,
    /* 1 */   X, P, X, P, X, X, _, _, D, N, N, N, S, _, _, Y,
    /* 2 */   X, X, X, X, x, X, x, _, M, M, M, M, M, M, M, M,
    /* 3 */   M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, X,
    /* 4 */   x, V, L, F, H, N, N, N, N, N, N, N, N, N, N, N,
    /* 5 */   N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 6 */   N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 7 */   N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 8 */   N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 9 */   N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* a */   N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* b */   N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* c */   N, N, N, N, N, _, _, _, _, _, _, _, _, _, _, _,
    /* d */   R, N, X, N, N, X, X, _, _, _, _, _, _, _, _, _,
    /* e */   _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _,
    /* f */   _, _, _, _, _, _, _, _, _, _, _, G, G, G, G, _,
};

/* 0xfb: garbage-collected structures and arrays. */
static const uint8_t gc_shapes[] = {
    /* 0 */   X, X, P, P, P, p, X, X, P, p, p, X, X, X, x, N,
    /* 1 */   x, p, p, p, R, R, R, R, C, C, N, N, N, N, N,
};

/* 0xfc: saturating conversions, bulk operations, tables, wide arithmetic. */
static const uint8_t bulk_shapes[] = {
    /* 0 */   N, N, N, N, N, N, N, N, p, x, P, X, p, x, p, x,
    /* 1 */   X, x, _, N, N, N, N,
};

/* 0xfd: vectors, the relaxed ones from 0x100 on. */
static const uint8_t vector_shapes[] = {
    /* 00 */  M, M, M, M, M, M, M, M, M, M, M, M, Z, Z, N, N,
    /* 01 */  N, N, N, N, N, O, O, O, O, O, O, O, O, O, O, O,
    /* 02 */  O, O, O, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 03 */  N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 04 */  N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 05 */  N, N, N, N, K, K, K, K, K, K, K, K, M, M, N, N,
    /* 06 */  N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 07 */  N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 08 */  N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 09 */  N, N, N, N, N, N, N, N, N, N, _, N, N, N, N, N,
    /* 0a */  N, N, _, N, N, _, _, N, N, N, N, N, N, N, N, _,
    /* 0b */  _, N, _, _, _, N, N, N, N, N, N, _, N, N, N, N,
    /* 0c */  N, N, _, N, N, _, _, N, N, N, N, N, N, N, N, _,
    /* 0d */  _, N, _, _, _, N, N, N, N, N, N, N, N, N, N, N,
    /* 0e */  N, N, _, N, N, N, N, N, N, N, N, N, N, N, _, N,
    /* 0f */  N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 10 */  N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N,
    /* 11 */  N, N, N, N,
};

/* 0xfe: atomic operations. */
static const uint8_t atomic_shapes[] = {
    /* 0 */   m, m, m, O, _, _, _, _, _, _, _, _, _, _, _, _,
    /* 1 */   M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M,
    /* 2 */   M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M,
    /* 3 */   M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M,
    /* 4 */   M, M, M, M, M, M, M, M, M, M, M, M, M, M, M,
};

static const struct {
    const uint8_t *shapes;
    size_t count;
} prefixed[] = {
    {gc_shapes, sizeof gc_shapes},
    {bulk_shapes, sizeof bulk_shapes},
    {vector_shapes, sizeof vector_shapes},
    {atomic_shapes, sizeof atomic_shapes},
};

/* ---- one instruction ---- */

typedef struct {
    ms_code_marks *marks;
    ms_code_report *report; /* function, offset, opcode and sub are those of the instruction being read */
} walk;

static void found(walk *walk, enum ms_code_kind kind)
{
    ms_code_report *report = walk->report;
    ms_code_found *all = &report->found[kind];
    if (all->count == 0) {
        all->first_function = report->function;
        all->first_offset = report->offset;
    }
    if (all->count++ == 0 || all->last_function != report->function)
        all->functions++;
    all->last_function = report->function;
}

static int mark(ms_code_space *space, uint32_t index, uint8_t bit)
{
    if (index >= space->count)
        return MS_CODE_INDEX;
    space->marks[index] |= bit;
    return MS_CODE_UNDERSTOOD;
}

/* Notes an instruction whose shape is a small letter; `first` and `second` are its indices. */
static int note(walk *walk, uint32_t first, uint32_t second)
{
    ms_code_marks *marks = walk->marks;
    switch (walk->report->opcode << 8 | walk->report->sub) {
    case 0x2400: found(walk, MS_CODE_GLOBAL_SET); return mark(&marks->globals, first, MS_CODE_CHANGED);
    case 0x2600: found(walk, MS_CODE_TABLE_SET); return mark(&marks->tables, first, MS_CODE_CHANGED);
    case 0x4000: found(walk, MS_CODE_MEMORY_GROW); return mark(&marks->memories, first, MS_CODE_CHANGED);
    case 0xfb05: found(walk, MS_CODE_STRUCT_SET); break;
    case 0xfb09: return mark(&marks->data, second, MS_CODE_USED);
    case 0xfb0a: return mark(&marks->elements, second, MS_CODE_USED);
    case 0xfb0e: found(walk, MS_CODE_ARRAY_SET); break;
    case 0xfb10: found(walk, MS_CODE_ARRAY_FILL); break;
    case 0xfb11: found(walk, MS_CODE_ARRAY_COPY); break;
    case 0xfb12: found(walk, MS_CODE_ARRAY_INIT_DATA); return mark(&marks->data, second, MS_CODE_USED);
    case 0xfb13: found(walk, MS_CODE_ARRAY_INIT_ELEM); return mark(&marks->elements, second, MS_CODE_USED);
    case 0xfc08: found(walk, MS_CODE_MEMORY_INIT); return mark(&marks->data, first, MS_CODE_USED);
    case 0xfc09: found(walk, MS_CODE_DATA_DROP); return mark(&marks->data, first, MS_CODE_CHANGED);
    case 0xfc0c: {
        found(walk, MS_CODE_TABLE_INIT);
        int fault = mark(&marks->elements, first, MS_CODE_USED);
        return fault ? fault : mark(&marks->tables, second, MS_CODE_CHANGED);
    }
    case 0xfc0d: found(walk, MS_CODE_ELEM_DROP); return mark(&marks->elements, first, MS_CODE_CHANGED);
    case 0xfc0e: found(walk, MS_CODE_TABLE_COPY); return mark(&marks->tables, first, MS_CODE_CHANGED);
    case 0xfc0f: found(walk, MS_CODE_TABLE_GROW); return mark(&marks->tables, first, MS_CODE_CHANGED);
    case 0xfc11: found(walk, MS_CODE_TABLE_FILL); return mark(&marks->tables, first, MS_CODE_CHANGED);
    case 0xfe00: found(walk, MS_CODE_ATOMIC_NOTIFY); break;
    case 0xfe01:
    case 0xfe02: found(walk, MS_CODE_ATOMIC_WAIT); break;
    }
    return MS_CODE_UNDERSTOOD;
}

/* Catch clauses: a kind, a tag for the first two kinds, and a label. */
static int skip_catches(cursor *in)
{
    uint32_t count, unused;
    int fault = take_u32(in, &count);
    while (!fault && count-- > 0) {
        if (in->at == in->end)
            return MS_CODE_CUT;
        uint8_t kind = *in->at++;
        if (kind > 3)
            return MS_CODE_FLAGS;
        if (kind < 2)
            fault = take_u32(in, &unused);
        if (!fault)
            fault = take_u32(in, &unused);
    }
    return fault;
}

/* Steps over everything that follows an opcode of this shape, and notes what is looked for. */
static int step(cursor *in, walk *walk, enum shape shape)
{
    uint32_t first = 0, second = 0, count;
    int fault = MS_CODE_UNDERSTOOD;
    switch (shape) {
    case N:
    case E:
        return MS_CODE_UNDERSTOOD;
    case X:
    case D:
        return take_u32(in, &first);
    case x:
        fault = take_u32(in, &first);
        return fault ? fault : note(walk, first, second);
    case P:
    case p:
        fault = take_u32(in, &first);
        if (!fault)
            fault = take_u32(in, &second);
        return fault || shape == P ? fault : note(walk, first, second);
    case M:
        return skip_memory_argument(in);
    case m:
        fault = skip_memory_argument(in);
        return fault ? fault : note(walk, first, second);
    case K:
        fault = skip_memory_argument(in);
        return fault ? fault : skip_bytes(in, 1);
    case B:
        return skip_block_type(in);
    case Y:
        fault = skip_block_type(in);
        return fault ? fault : skip_catches(in);
    case T:
        fault = take_u32(in, &count);
        if (!fault)
            fault = take_u32(in, &first);
        while (!fault && count-- > 0)
            fault = take_u32(in, &first);
        return fault;
    case S:
        fault = take_u32(in, &count);
        while (!fault && count-- > 0)
            fault = skip_value_type(in);
        return fault;
    case R:
        return skip_heap_type(in);
    case C:
        if (in->at < in->end && *in->at > 3)
            return MS_CODE_FLAGS;
        fault = skip_bytes(in, 1);
        if (!fault)
            fault = take_u32(in, &first);
        if (!fault)
            fault = skip_heap_type(in);
        return fault ? fault : skip_heap_type(in);
    case V:
        return skip_integer(in, 5);
    case L:
        return skip_integer(in, 10);
    case F:
        return skip_bytes(in, 4);
    case H:
        return skip_bytes(in, 8);
    case Z:
        return skip_bytes(in, 16);
    case O:
        return skip_bytes(in, 1);
    case G:
    case _:
        break;
    }
    return MS_CODE_OPCODE;
}

/* ---- bodies (section 5.5.13) ---- */

/* Runs of locals, then instructions up to the `end` that closes the body, which must be its last byte. */
static int walk_body(cursor *in, walk *walk, const uint8_t *bytes)
{
    ms_code_report *report = walk->report;
    uint32_t runs, unused;
    int fault = take_u32(in, &runs);
    while (!fault && runs-- > 0) {
        fault = take_u32(in, &unused);
        if (!fault)
            fault = skip_value_type(in);
    }
    for (size_t depth = 1; !fault && depth > 0;) {
        report->offset = (size_t)(in->at - bytes);
        report->opcode = MS_CODE_NO_OPCODE;
        if (in->at == in->end)
            return MS_CODE_CUT;
        report->instructions++;
        report->opcode = *in->at++;
        report->sub = 0;
        enum shape shape = shapes[report->opcode];
        if (shape == G) {
            fault = take_u32(in, &report->sub);
            if (fault)
                return fault;
            size_t prefix = report->opcode - 0xfb;
            shape = report->sub < prefixed[prefix].count ? prefixed[prefix].shapes[report->sub] : _;
        }
        depth += shape == B || shape == Y;
        depth -= shape == E || shape == D;
        fault = step(in, walk, shape);
    }
    if (!fault && in->at != in->end) {
        report->offset = (size_t)(in->at - bytes);
        report->opcode = MS_CODE_NO_OPCODE;
        return MS_CODE_BODY;
    }
    return fault;
}

void ms_analyse_code(const uint8_t *bytes, size_t start, size_t end, ms_code_marks *marks, ms_code_report *report)
{
    *report = (ms_code_report){.function = marks->first_function, .offset = start, .opcode = MS_CODE_NO_OPCODE};
    walk walk = {marks, report};
    cursor in = {bytes + start, bytes + end};
    uint32_t bodies, size;
    int fault = take_u32(&in, &bodies);
    while (!fault && report->bodies < bodies) {
        report->offset = (size_t)(in.at - bytes);
        report->opcode = MS_CODE_NO_OPCODE;
        fault = take_u32(&in, &size);
        if (fault)
            break;
        if (size > (size_t)(in.end - in.at)) {
            fault = MS_CODE_CUT;
            break;
        }
        cursor body = {in.at, in.at + size};
        report->offset = (size_t)(in.at - bytes);
        in.at += size;
        fault = walk_body(&body, &walk, bytes);
        if (!fault) {
            report->bodies++;
            report->function++;
        }
    }
    if (!fault && in.at != in.end) {
        report->offset = (size_t)(in.at - bytes);
        report->opcode = MS_CODE_NO_OPCODE;
        fault = MS_CODE_BODY;
    }
    report->fault = fault;
}
