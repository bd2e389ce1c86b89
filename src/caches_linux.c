/* Caches as Linux lists them, for processor 0.  Other systems and some containers have no such
 * files.
 *
 * Not sysconf(_SC_LEVEL3_CACHE_SIZE): that is the sum over the socket (384 MiB
 * on a processor whose cores can each use 32 MiB). */
#include <stdio.h>
#include <string.h>

#include "bnfast.h"

#define CACHE_DIRECTORY "/sys/devices/system/cpu/cpu0/cache/index"

static bool read_word(int index, const char *name, char *word, size_t size)
{
    char path[96];
    snprintf(path, sizeof path, CACHE_DIRECTORY "%d/%s", index, name);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    const bool read = fgets(word, (int)size, file) != NULL;
    fclose(file);
    return read;
}

/* "48K", "1M" or a plain number of bytes. */
static ptrdiff_t parse_size(const char *word)
{
    long number = 0;
    char unit = 0;
    if (sscanf(word, "%ld%c", &number, &unit) < 1 || number < 0)
        return 0;
    return (ptrdiff_t)number * (unit == 'K' ? 1024 : unit == 'M' ? 1024 * 1024 : 1);
}

void bnf_find_caches(ptrdiff_t bytes[BNF_CACHE_LEVELS])
{
    char level[16], type[16], size[16];
    for (int index = 0; read_word(index, "level", level, sizeof level); index++) {
        if (!read_word(index, "type", type, sizeof type) ||
            !read_word(index, "size", size, sizeof size) || !strncmp(type, "Instruction", 11))
            continue;
        const int place = level[0] - '1';
        if (0 <= place && place < BNF_CACHE_LEVELS && parse_size(size))
            bytes[place] = parse_size(size);
    }
}
