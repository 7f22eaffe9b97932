// States of memory: what each kind of region holds, its protections, flags and growth.
#include "states.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#define MIB (1UL << 20)

static uint64_t *map(uint64_t bytes, int flags) {
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (base == MAP_FAILED) {
        wrong("mmap: errno %d", errno);
        return NULL;
    }
    return base;
}

static void fill(uint64_t *words, uint64_t bytes, uint64_t seed) {
    for (uint64_t i = 0; i < bytes / 8; i++) {
        words[i] = scramble(seed + i);
    }
}

static int holds(const uint64_t *words, uint64_t bytes, uint64_t seed) {
    for (uint64_t i = 0; i < bytes / 8; i++) {
        if (words[i] != scramble(seed + i)) {
            wrong("word %lu of %p is %lx", i, (const void *)words, words[i]);
            return 0;
        }
    }
    return 1;
}

// ---- anonymous memory, large and small, every third page never touched

static uint64_t *large, *small_region;

static void anonymous_make(void) {
    large = map(8 * MIB, 0);
    small_region = map(3 * PAGE, 0);
    for (uint64_t page = 0; page < 8 * MIB / PAGE; page++) {
        if (page % 3 != 2) {
            fill(large + page * PAGE / 8, PAGE, page * 1000);
        }
    }
    fill(small_region, 3 * PAGE, 5);
}

static void anonymous_check(void) {
    for (uint64_t page = 0; page < 8 * MIB / PAGE; page++) {
        if (page % 3 != 2) {
            if (!holds(large + page * PAGE / 8, PAGE, page * 1000)) {
                return;
            }
        } else {
            EXPECT(large[page * PAGE / 8 + 7] == 0, "page %lu is not zero", page);
        }
    }
    holds(small_region, 3 * PAGE, 5);
}

// ---- a huge sparse reservation with a few pages in it, as language runtimes make them

static uint64_t *sparse;

static void sparse_make(void) {
    sparse = map(64UL << 30, MAP_NORESERVE);
    for (uint64_t i = 0; sparse && i < 5; i++) {
        fill(sparse + i * (12UL << 30) / 8, PAGE, i);
    }
}

static void sparse_check(void) {
    for (uint64_t i = 0; i < 5; i++) {
        if (!holds(sparse + i * (12UL << 30) / 8, PAGE, i)) {
            return;
        }
        EXPECT(sparse[i * (12UL << 30) / 8 + PAGE / 8] == 0, "the page after %lu is not zero", i);
    }
}

// ---- transparent huge pages

static uint64_t *huge;

static void huge_make(void) {
    char *base = (char *)map(10 * MIB, 0);
    huge = (uint64_t *)(((uintptr_t)base + 2 * MIB - 1) & ~(2 * MIB - 1));
    madvise(huge, 8 * MIB, MADV_HUGEPAGE);
    fill(huge, 8 * MIB, 77);
}

static void huge_check(void) { holds(huge, 8 * MIB, 77); }

// ---- protections: content under PROT_NONE and PROT_READ, guard pages that fault

static uint64_t *hidden, *read_only, *guarded;
static sigjmp_buf landing;
static void *volatile fault_address;

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)context;
    fault_address = info->si_addr;
    siglongjmp(landing, 1);
}

static int faults(volatile uint64_t *address, int write) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    struct sigaction before;
    sigaction(SIGSEGV, &action, &before);
    fault_address = NULL;
    if (sigsetjmp(landing, 1) == 0) {
        if (write) {
            *address = 1;
        } else {
            (void)*address;
        }
    }
    sigaction(SIGSEGV, &before, NULL);
    return fault_address == address;
}

static void protections_make(void) {
    hidden = map(2 * MIB, 0);
    read_only = map(2 * MIB, 0);
    guarded = map(4 * MIB, 0);
    fill(hidden, 2 * MIB, 100);
    fill(read_only, 2 * MIB, 200);
    fill(guarded, 4 * MIB, 300);
    mprotect(hidden, 2 * MIB, PROT_NONE);
    mprotect(read_only, 2 * MIB, PROT_READ);
    mprotect((char *)guarded + 2 * MIB, PAGE, PROT_NONE);
}

static void protections_check(void) {
    EXPECT(faults(hidden, 0), "PROT_NONE memory can be read");
    EXPECT(faults(read_only, 1), "PROT_READ memory can be written");
    EXPECT(faults(guarded + 2 * MIB / 8, 0), "the guard page is gone");
    mprotect(hidden, 2 * MIB, PROT_READ | PROT_WRITE);
    mprotect((char *)guarded + 2 * MIB, PAGE, PROT_READ | PROT_WRITE);
    if (holds(hidden, 2 * MIB, 100) && holds(read_only, 2 * MIB, 200) && holds(guarded, 4 * MIB, 300)) {
        hidden[0] = 1;
        guarded[2 * MIB / 8] = 1;
    }
}

// ---- flags and names of regions, as the kernel lists them

static uint64_t *flagged;
static char flags_before[4096], flags_after[4096];

static void flags_read(char *out) {
    char *text = malloc(4 * MIB);
    slurp("/proc/self/smaps", text, 4 * MIB);
    out[0] = 0;
    char *save = NULL;
    int inside = 0;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && strchr(line, '-') < strchr(line, ' ')) {
            inside = start >= (uintptr_t)flagged && end <= (uintptr_t)flagged + 6 * MIB;
            if (inside) {
                snprintf(out + strlen(out), 4096 - strlen(out), "%s;", line);
            }
        } else if (inside && strncmp(line, "VmFlags:", 8) == 0) {
            char *missing = strstr(line, "um "); // while a copy is being filled
            if (missing) {
                memmove(missing, missing + 3, strlen(missing + 3) + 1);
            }
            snprintf(out + strlen(out), 4096 - strlen(out), "%s;", line);
        }
    }
    free(text);
}

static void flags_make(void) {
    flagged = map(6 * MIB, 0);
    fill(flagged, 6 * MIB, 9);
    char *base = (char *)flagged;
    madvise(base, MIB, MADV_DONTFORK);
    madvise(base + MIB, MIB, MADV_DONTDUMP);
    madvise(base + 2 * MIB, MIB, MADV_NOHUGEPAGE);
    madvise(base + 3 * MIB, MIB, MADV_WIPEONFORK);
    madvise(base + 4 * MIB, MIB, MADV_SEQUENTIAL);
    prctl(0x53564d41 /* PR_SET_VMA */, 0, base + 5 * MIB, MIB, "a name");
    flags_read(flags_before);
    if (strlen(flags_before) < 100) {
        wrong("smaps shows only %s", flags_before);
    }
}

static void flags_check(void) {
    flags_read(flags_after);
    EXPECT(strcmp(flags_before, flags_after) == 0, "now %.130s, was %.130s", flags_after, flags_before);
    holds(flagged, 6 * MIB, 9);
}

// ---- the heap and the break, the stack and its growth

static char *break_before;
static uint64_t *heap_block;

static void break_make(void) {
    heap_block = sbrk(3 * (intptr_t)MIB);
    fill(heap_block, 3 * MIB, 13);
    break_before = sbrk(0);
}

static void break_check(void) {
    EXPECT(sbrk(0) == break_before, "the break moved");
    if (!holds(heap_block, 3 * MIB, 13)) {
        return;
    }
    char *more = sbrk(256 * PAGE);
    EXPECT(more == break_before, "sbrk grew from another place");
    for (uint64_t i = 0; i < 256 * PAGE; i++) {
        EXPECT(more[i] == 0, "new heap is not zero");
    }
    memset(more, 1, 256 * PAGE);
    EXPECT(sbrk(-256 * (intptr_t)PAGE) != (void *)-1 && sbrk(0) == break_before, "the break cannot shrink");
}

static void stack_make(void) {}

static __attribute__((noinline)) uint64_t descend(uint64_t depth) { // 64 KiB a level
    volatile uint64_t block[8192];
    for (uint64_t i = 0; i < 8192; i += 512) {
        block[i] = depth;
    }
    uint64_t below = depth ? descend(depth - 1) : 0;
    return below + block[512];
}

static void stack_check(void) {
    uint64_t sum = descend(80);
    EXPECT(sum == 80 * 81 / 2, "sum over 5 MiB of stack is %lu", sum);
}

// ---- shared anonymous memory and files, private and shared

static uint64_t *shared, *file_private, *file_shared;

static void shared_make(void) {
    shared = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    fill(shared, MIB, 21);
}

static void shared_check(void) {
    if (holds(shared, MIB, 21)) {
        EXPECT(shared[MIB / 8] == 0, "its untouched half is not zero");
        shared[0] = 1;
    }
}

static int sample_file(const char *name) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", states_directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    uint64_t *words = malloc(8 * PAGE);
    fill(words, 8 * PAGE, 31);
    if (fd < 0 || write(fd, words, 8 * PAGE) != (ssize_t)(8 * PAGE)) {
        wrong("cannot write %s", path);
    }
    free(words);
    return fd;
}

static void file_make(void) {
    int fd = sample_file("private");
    file_private = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    close(fd);
    fill(file_private + 1 * PAGE / 8, PAGE, 41);  // changed
    memset(file_private + 2 * PAGE / 8, 0, PAGE); // changed to zero: not what the file has
    file_private[3 * PAGE / 8 + 5] = 99;          // one word changed
    fd = sample_file("shared");
    file_shared = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    file_shared[10] = 1234;
}

static void file_check(void) {
    if (!holds(file_private, PAGE, 31) || !holds(file_private + PAGE / 8, PAGE, 41)) {
        return;
    }
    for (uint64_t i = 0; i < PAGE / 8; i++) {
        EXPECT(file_private[2 * PAGE / 8 + i] == 0, "the page set to zero came back from the file");
    }
    EXPECT(file_private[3 * PAGE / 8 + 5] == 99, "a changed word is lost");
    EXPECT(file_private[3 * PAGE / 8 + 6] == scramble(31 + 3 * PAGE / 8 + 6), "the word beside it is wrong");
    if (holds(file_private + 4 * PAGE / 8, 4 * PAGE, 31 + 4 * PAGE / 8)) {
        EXPECT(file_shared[10] == 1234, "the shared mapping is wrong");
        char path[512];
        uint64_t word = 0;
        snprintf(path, sizeof path, "%s/shared", states_directory);
        file_shared[11] = 4321;
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        EXPECT(pread(fd, &word, 8, 88) == 8 && word == 4321, "a store to the shared mapping does not reach the file");
        close(fd);
    }
}

// ---- memory that the kernel may merge, which drops its protection without a word

static uint64_t *mergeable;

static void mergeable_make(void) {
    mergeable = map(4 * MIB, 0);
    for (uint64_t page = 0; page < 4 * MIB / PAGE; page++) {
        fill(mergeable + page * PAGE / 8, PAGE, page % 3);
    }
    if (madvise(mergeable, 4 * MIB, MADV_MERGEABLE) != 0) {
        exit(77); // a kernel without KSM
    }
}

static void mergeable_check(void) {
    for (uint64_t page = 0; page < 4 * MIB / PAGE; page++) {
        if (!holds(mergeable + page * PAGE / 8, PAGE, page % 3)) {
            return;
        }
    }
}

// ---- enough memory that filling a copy takes a while

static uint64_t *bulk;
enum { BULK = 768 };

static void bulk_make(void) {
    bulk = map(BULK * MIB, 0);
    for (uint64_t i = 0; i < BULK * MIB / 8; i += 64) {
        bulk[i] = scramble(i);
    }
}

static void bulk_check(void) {
    for (uint64_t i = 0; i < BULK * MIB / 8; i += 64) {
        EXPECT(bulk[i] == scramble(i), "word %lu is %lx", i, bulk[i]);
    }
}

struct state memory_states[] = {
    {.name = "anonymous", .make = anonymous_make, .check = anonymous_check},
    {.name = "sparse", .make = sparse_make, .check = sparse_check},
    {.name = "huge", .make = huge_make, .check = huge_check},
    {.name = "protections", .make = protections_make, .check = protections_check},
    {.name = "flags", .make = flags_make, .check = flags_check},
    {.name = "break", .make = break_make, .check = break_check},
    {.name = "stack", .make = stack_make, .check = stack_check},
    {.name = "shared", .make = shared_make, .check = shared_check},
    {.name = "file", .make = file_make, .check = file_check},
    {.name = "mergeable", .make = mergeable_make, .check = mergeable_check, .only_named = 1},
    {.name = "bulk", .make = bulk_make, .check = bulk_check, .only_named = 1},
    {.name = NULL},
};
