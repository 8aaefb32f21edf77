/* A fuzz target for the walk over code: every read is inside, every count is bounded by what was read, every answer holds.
 *
 * With clang, for as long as it should run:
 *   clang -g -O1 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -I memslot_plugin/_core \
 *     integration_tests/fuzz_decoder.c memslot_plugin/_core/analyse.c -o fuzz && ./fuzz CORPUS
 * With any compiler, -DALONE=1 adds a main that mutates the files it is given: ./fuzz SEED ROUNDS FILE ...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memslot.h"

static void require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "does not hold: %s\n", what);
        abort();
    }
}

#define REQUIRE(condition) require(condition, #condition)

static void walk(const uint8_t *code, size_t start, size_t end, size_t things, ms_code_marks *marks, ms_code_report *report)
{
    ms_code_space *spaces[] = {&marks->globals, &marks->tables, &marks->memories, &marks->data, &marks->elements};
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
        spaces[i]->count = things;
        spaces[i]->marks = calloc(things, 1); /* of their own, so that the sanitizer sees a mark beside them */
    }
    ms_analyse_code(code, start, end, marks, report);
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
        for (size_t each = 0; each < things; each++)
            REQUIRE(spaces[i]->marks[each] <= (MS_CODE_USED | MS_CODE_CHANGED));
        free(spaces[i]->marks);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    size_t things = data[0] % 8, length = size - 1;
    uint8_t *code = malloc(length ? length : 1); /* as long as the input: one byte further is not ours */
    memcpy(code, data + 1, length);
    ms_code_marks marks = {.first_function = 7};
    ms_code_report report, again;
    walk(code, 0, length, things, &marks, &report);

    REQUIRE(report.fault >= MS_CODE_UNDERSTOOD && report.fault <= MS_CODE_BODY);
    REQUIRE(report.instructions <= length && report.bodies <= length && report.offset <= length);
    REQUIRE(report.function - 7 <= length);
    size_t counted = 0;
    for (int kind = 0; kind < MS_CODE_KINDS; kind++) {
        const ms_code_found *found = &report.found[kind];
        counted += found->count;
        REQUIRE(found->functions <= found->count);
        REQUIRE(!found->count || (found->first_offset < length && found->first_function <= found->last_function));
    }
    REQUIRE(counted <= report.instructions);

    /* The same bytes elsewhere in a file give the same answer. */
    uint8_t *file = malloc(length + 3);
    memset(file, 0x40, 3);
    memcpy(file + 3, code, length);
    walk(file, 3, length + 3, things, &marks, &again);
    REQUIRE(again.fault == report.fault && again.offset == report.offset + 3);
    REQUIRE(again.instructions == report.instructions && again.bodies == report.bodies);
    for (int kind = 0; kind < MS_CODE_KINDS; kind++)
        REQUIRE(again.found[kind].count == report.found[kind].count);
    /* Understood code that is cut is not understood. */
    if (report.fault == MS_CODE_UNDERSTOOD && length) {
        uint8_t *cut = malloc(length - 1 ? length - 1 : 1);
        memcpy(cut, code, length - 1);
        walk(cut, 0, length - 1, things, &marks, &again);
        REQUIRE(again.fault != MS_CODE_UNDERSTOOD);
        free(cut);
    }
    free(file);
    free(code);
    return 0;
}

#ifdef ALONE
static uint64_t state;

static uint64_t draw(uint64_t below) /* xorshift */
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below ? state % below : 0;
}

static size_t mutate(uint8_t *bytes, size_t size, size_t room)
{
    static const uint8_t odd[] = {0x00, 0x01, 0x0b, 0x40, 0x7f, 0x80, 0xfb, 0xfc, 0xfd, 0xfe, 0xff, 0x1f, 0x0e, 0x24};
    size_t at = draw(size + 1), other = draw(size + 1), length = draw(12);
    switch (draw(6)) {
    case 0: /* another byte */
        if (at < size)
            bytes[at] = draw(2) ? odd[draw(sizeof odd)] : (uint8_t)draw(256);
        return size;
    case 1: /* a bit */
        if (at < size)
            bytes[at] ^= (uint8_t)(1u << draw(8));
        return size;
    case 2: /* one more */
        if (size == room)
            return size;
        memmove(bytes + at + 1, bytes + at, size - at);
        bytes[at] = odd[draw(sizeof odd)];
        return size + 1;
    case 3: /* fewer */
        if (length > size - at)
            length = size - at;
        memmove(bytes + at, bytes + at + length, size - at - length);
        return size - length;
    case 4: /* a piece of it once more */
        if (length > size - other)
            length = size - other;
        if (length > room - size)
            return size;
        uint8_t piece[16];
        memcpy(piece, bytes + other, length);
        memmove(bytes + at + length, bytes + at, size - at);
        memcpy(bytes + at, piece, length);
        return size + length;
    default: /* cut */
        return draw(8) ? size : at;
    }
}

int main(int count, char **arguments)
{
    enum { ROOM = 1 << 16 };
    uint8_t *bytes = malloc(ROOM + 64);
    state = strtoull(arguments[1], NULL, 10) * 2654435761u + 1;
    for (long long round = 0, rounds = atoll(arguments[2]); round < rounds; round++) {
        FILE *file = fopen(arguments[3 + draw((uint64_t)count - 3)], "rb");
        if (!file)
            return 2;
        size_t size = fread(bytes, 1, ROOM, file);
        fclose(file);
        for (int one_file = 0; one_file < 64; one_file++) {
            size = mutate(bytes, size, ROOM);
            LLVMFuzzerTestOneInput(bytes, size);
        }
    }
    printf("%s rounds of 64 executions\n", arguments[2]);
    free(bytes);
    return 0;
}
#endif
