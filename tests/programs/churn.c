// Writers keep an invariant over thousands of pages while others churn the address space, children and threads.
// A picture of it with all threads stopped can be completed and checked: the writers go on, park after the step in
// flight, and sums, generations and checksums must agree. Every churner checks its own content all the time.
#include "target.h"

#include <malloc.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define BODY ((PAGE - 4 * sizeof(uint64_t)) / sizeof(uint64_t))

struct ledger_page {
    uint64_t value;
    uint64_t generation;
    uint64_t owner;
    uint64_t check; // over the fields above and the body
    uint64_t body[BODY];
};

struct writer {
    pthread_t thread;
    struct ledger_page *pages; // this writer's own pages
    uint32_t *generations;     // what each page's generation must be, kept in other pages
    uint64_t n_pages;
    uint64_t id;
    uint64_t random;
    uint64_t pace_us;
    uint64_t steps;
    _Atomic uint64_t parked; // the park request it has answered
};

static struct {
    struct writer writers[16];
    uint64_t n_writers;
    uint64_t pace_us;
    _Atomic uint64_t park; // request number, odd: park, even: run
    _Atomic uint64_t rounds[16];
    uint64_t *fixed; // never changes; children check it
    uint64_t n_fixed;
    uint64_t all_pages; // that "all" writes
} churn;

static const char *const names[] = {"map",  "madvise", "remap", "brk",  "fork",  "vfork", "thread",
                                    "pipe", "guard",   "flip",  "huge", "stack", "all"};

static uint64_t page_check(const struct ledger_page *page) {
    uint64_t sum = page->value * 3 + page->generation * 5 + page->owner * 7;
    for (size_t i = 0; i < BODY; i++) {
        sum = (sum ^ page->body[i]) * 0x100000001b3U;
    }
    return sum;
}

static void page_write(struct ledger_page *page, uint64_t value, uint64_t seed) {
    page->generation++;
    page->value = value;
    for (size_t i = 0; i < BODY; i += 16) {
        page->body[i] = seed ^ (page->generation + i);
    }
    page->check = page_check(page);
}

static void *write_for_ever(void *argument) {
    struct writer *w = argument;
    for (;;) {
        uint64_t request = atomic_load(&churn.park);
        if (request & 1) {
            atomic_store(&w->parked, request);
            while (atomic_load(&churn.park) == request) {
                pause_us(200);
            }
            continue;
        }
        uint64_t from = draw(&w->random) % w->n_pages;
        uint64_t to = draw(&w->random) % w->n_pages;
        if (from == to) {
            continue;
        }
        uint64_t amount = draw(&w->random) & 0xffff;
        uint64_t seed = draw(&w->random);
        w->generations[from]++;
        page_write(&w->pages[from], w->pages[from].value - amount, seed);
        w->generations[to]++;
        page_write(&w->pages[to], w->pages[to].value + amount, seed);
        w->steps++;
        pause_us(w->pace_us);
    }
    return NULL;
}

static void writer_start(struct writer *w, uint64_t id, uint64_t n_pages, uint64_t pace_us) {
    w->id = id;
    w->n_pages = n_pages;
    w->pace_us = pace_us;
    w->random = id * 1000003 + 17;
    w->pages = mmap(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    w->generations = mmap(NULL, n_pages * sizeof(uint32_t), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w->pages == MAP_FAILED || w->generations == MAP_FAILED) {
        exit(72);
    }
    for (uint64_t i = 0; i < n_pages; i++) {
        struct ledger_page *page = &w->pages[i];
        page->value = 1000;
        page->owner = id * n_pages + i;
        for (size_t k = 0; k < BODY; k++) {
            page->body[k] = scramble(page->owner * BODY + k);
        }
        page->check = page_check(page);
    }
    if (pthread_create(&w->thread, NULL, write_for_ever, w) != 0) {
        exit(73);
    }
}

static void writers_check(void) {
    uint64_t request = atomic_load(&churn.park) + 1;
    if (!(request & 1)) {
        request++;
    }
    atomic_store(&churn.park, request);
    for (uint64_t k = 0; k < churn.n_writers; k++) {
        struct writer *w = &churn.writers[k];
        while (atomic_load(&w->parked) != request) {
            pause_us(100);
        }
        uint64_t sum = 0;
        uint64_t generations = 0;
        for (uint64_t i = 0; i < w->n_pages; i++) {
            const struct ledger_page *page = &w->pages[i];
            sum += page->value;
            generations += page->generation;
            if (page->generation != w->generations[i]) {
                problem("writer %lu page %lu: generation %lu, the ledger says %u", k, i, page->generation,
                        w->generations[i]);
            }
            if (page->check != page_check(page) || page->owner != w->id * w->n_pages + i) {
                problem("writer %lu page %lu: torn", k, i);
            }
        }
        if (sum != 1000 * w->n_pages) {
            problem("writer %lu: sum is %lu", k, sum);
        }
        if (generations != 2 * w->steps) {
            problem("writer %lu: %lu page writes for %lu steps", k, generations, w->steps);
        }
    }
    for (uint64_t i = 0; i < churn.n_fixed; i++) {
        if (churn.fixed[i] != scramble(i)) {
            problem("fixed word %lu changed", i);
        }
    }
    atomic_store(&churn.park, request + 1);
}

// ---- churners: fill, check, give back. Patterns depend on address and round, so old content cannot pass for new.

static void pattern_fill(void *base, uint64_t bytes, uint64_t seed) {
    uint64_t *words = base;
    for (uint64_t i = 0; i < bytes / 8; i += 64) {
        words[i] = scramble(seed + i);
    }
}

static void pattern_check(const void *base, uint64_t bytes, uint64_t seed, const char *who) {
    const uint64_t *words = base;
    for (uint64_t i = 0; i < bytes / 8; i += 64) {
        if (words[i] != scramble(seed + i)) {
            problem("%s: %p + %lu is %lx, not %lx", who, base, i * 8, words[i], scramble(seed + i));
            return;
        }
    }
}

static void zero_check(const void *base, uint64_t bytes, const char *who) {
    const uint64_t *words = base;
    for (uint64_t i = 0; i < bytes / 8; i += 64) {
        if (words[i] != 0) {
            problem("%s: %p + %lu is %lx, not zero", who, base, i * 8, words[i]);
            return;
        }
    }
}

static void round_done(unsigned kind) {
    atomic_fetch_add(&churn.rounds[kind], 1);
    pause_us(churn.pace_us);
}

static void *fresh(uint64_t bytes) {
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        problem("mmap of %lu bytes: errno %d", bytes, errno);
        pthread_exit(NULL);
    }
    return base;
}

static void *map_churn(void *unused) {
    (void)unused;
    for (uint64_t round = 1, random = 3;; round++) {
        uint64_t bytes = (1 + draw(&random) % 512) * PAGE;
        char *base = fresh(bytes);
        pattern_fill(base, bytes, round);
        pause_us(churn.pace_us / 2);
        pattern_check(base, bytes, round, "map");
        if (bytes > 8 * PAGE) { // a hole first, then the rest
            uint64_t half = bytes / 2 / PAGE * PAGE;
            munmap(base + half, PAGE);
            pattern_check(base, half, round, "map after a hole");
        }
        munmap(base, bytes);
        round_done(0);
    }
    return NULL;
}

static void *madvise_churn(void *unused) {
    (void)unused;
    uint64_t bytes = 1024 * PAGE;
    char *base = fresh(bytes);
    for (uint64_t round = 1, random = 5;; round++) {
        uint64_t start = draw(&random) % 768 * PAGE;
        uint64_t length = (1 + draw(&random) % 255) * PAGE;
        pattern_fill(base + start, length, round);
        pause_us(churn.pace_us / 2);
        pattern_check(base + start, length, round, "madvise");
        madvise(base + start, length, MADV_DONTNEED);
        zero_check(base + start, length, "madvise, freed");
        round_done(1);
    }
    return NULL;
}

static void *remap_churn(void *unused) {
    (void)unused;
    uint64_t bytes = 300 * PAGE;
    char *base = fresh(bytes);
    pattern_fill(base, bytes, 1);
    for (uint64_t round = 1, random = 7;; round++) {
        uint64_t other = (260 + draw(&random) % 256) * PAGE;
        void *hint = fresh(other);
        char *moved = mremap(base, bytes, other, MREMAP_MAYMOVE | MREMAP_FIXED, hint);
        if (moved == MAP_FAILED) {
            problem("mremap: errno %d", errno);
            return NULL;
        }
        pattern_check(moved, other < bytes ? other : bytes, round, "remap");
        base = moved;
        bytes = other;
        pattern_fill(base, bytes, round + 1);
        pause_us(churn.pace_us / 2);
        pattern_check(base, bytes, round + 1, "remap, filled");
        round_done(2);
    }
    return NULL;
}

static void *brk_churn(void *unused) {
    (void)unused;
    for (uint64_t round = 1, random = 9;; round++) {
        uint64_t bytes = (1 + draw(&random) % 400) * PAGE;
        char *base = sbrk((intptr_t)bytes);
        if (base == (void *)-1) {
            problem("sbrk: errno %d", errno);
            return NULL;
        }
        char *aligned = (char *)(((uintptr_t)base + 7) & ~7UL);
        uint64_t usable = (bytes - 8) & ~7UL;
        pattern_fill(aligned, usable, round);
        pause_us(churn.pace_us / 2);
        pattern_check(aligned, usable, round, "brk");
        if (sbrk(0) == base + bytes) {
            sbrk(-(intptr_t)bytes);
        } else {
            problem("somebody else moved the break");
            return NULL;
        }
        round_done(3);
    }
    return NULL;
}

static void child_wait(pid_t child, const char *who) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0) {
        if (errno == ECHILD) {
            return; // a copy of us has no children: it may find that once for each churner
        }
        if (errno != EINTR) {
            problem("%s: waitpid: errno %d", who, errno);
            return;
        }
    }
    if (status != 0) {
        problem("%s: the child ended with status %x", who, status);
    }
}

static void *fork_churn(void *unused) {
    (void)unused;
    for (;;) {
        pid_t child = fork();
        if (child == 0) {
            for (uint64_t i = 0; i < churn.n_fixed; i += 8) {
                if (churn.fixed[i] != scramble(i)) {
                    _exit(9);
                }
            }
            _exit(0);
        }
        if (child < 0) {
            problem("fork: errno %d", errno);
        } else {
            child_wait(child, "fork");
        }
        round_done(4);
    }
    return NULL;
}

static void *vfork_churn(void *unused) {
    (void)unused;
    for (;;) {
        pid_t child = vfork();
        if (child == 0) {
            execl("/bin/true", "true", (char *)NULL);
            _exit(8);
        }
        if (child < 0) {
            problem("vfork: errno %d", errno);
        } else {
            child_wait(child, "vfork");
        }
        round_done(5);
    }
    return NULL;
}

static void *short_life(void *argument) {
    volatile uint64_t stack[8 * PAGE / 8];
    for (uint64_t i = 0; i < 8 * PAGE / 8; i += 128) {
        stack[i] = (uint64_t)argument + i;
    }
    sched_yield();
    for (uint64_t i = 0; i < 8 * PAGE / 8; i += 128) {
        if (stack[i] != (uint64_t)argument + i) {
            problem("thread: its stack changed");
        }
    }
    return (void *)((uint64_t)argument * 3);
}

static void *thread_churn(void *unused) {
    (void)unused;
    for (uint64_t round = 1;; round++) {
        pthread_t threads[4];
        for (uint64_t i = 0; i < 4; i++) {
            if (pthread_create(&threads[i], NULL, short_life, (void *)(round * 4 + i)) != 0) {
                problem("pthread_create failed");
                return NULL;
            }
        }
        for (uint64_t i = 0; i < 4; i++) {
            void *result = NULL;
            pthread_join(threads[i], &result);
            if ((uint64_t)result != (round * 4 + i) * 3) {
                problem("thread: joined with %p", result);
            }
        }
        round_done(6);
    }
    return NULL;
}

// The kernel writes into protected pages: read(2) from a pipe, whose content is part of the picture too.
static void *pipe_churn(void *unused) {
    (void)unused;
    int ends[2];
    MUST(pipe(ends));
    uint64_t pages = 512;
    uint64_t *area = fresh(pages * PAGE);
    uint64_t *out = fresh(PAGE);
    for (uint64_t round = 1;; round++) {
        uint64_t *place = area + round * 7 % pages * (PAGE / 8);
        pattern_fill(out, PAGE, round);
        if (write(ends[1], out, PAGE) != (ssize_t)PAGE) {
            problem("pipe: write: errno %d", errno);
        }
        pause_us(churn.pace_us / 2);
        ssize_t n = read(ends[0], place, PAGE);
        if (n != (ssize_t)PAGE) {
            problem("pipe: read gave %zd, errno %d", n, errno);
        }
        pattern_check(place, PAGE, round, "pipe");
        round_done(7);
    }
    return NULL;
}

// Pages are thrown away with no event at all: only a scan can notice.
static void *guard_churn(void *unused) {
    (void)unused;
    enum { INSTALL = 102, REMOVE = 103 }; // MADV_GUARD_*, Linux 6.13
    uint64_t bytes = 1024 * PAGE;
    char *base = fresh(bytes);
    pattern_fill(base, bytes, 0);
    for (uint64_t round = 1, random = 11;; round++) {
        uint64_t start = draw(&random) % 960 * PAGE;
        pattern_fill(base + start, 64 * PAGE, round);
        pause_us(churn.pace_us / 2);
        pattern_check(base + start, 64 * PAGE, round, "guard");
        if (madvise(base + start, 64 * PAGE, INSTALL) != 0) {
            problem("MADV_GUARD_INSTALL: errno %d", errno);
            return NULL;
        }
        madvise(base + start, 64 * PAGE, REMOVE);
        zero_check(base + start, 64 * PAGE, "guard, freed");
        round_done(8);
    }
    return NULL;
}

// Memory that nobody may touch for a while, and is changed in between.
static void *flip_churn(void *unused) {
    (void)unused;
    uint64_t bytes = 600 * PAGE;
    char *base = fresh(bytes);
    pattern_fill(base, bytes, 0);
    for (uint64_t round = 1, random = 13;; round++) {
        uint64_t start = draw(&random) % 500 * PAGE;
        mprotect(base + start, 100 * PAGE, PROT_NONE);
        pause_us(churn.pace_us / 2);
        mprotect(base + start, 100 * PAGE, PROT_READ | PROT_WRITE);
        pattern_fill(base + start, 100 * PAGE, round);
        mprotect(base, bytes, PROT_NONE);
        pause_us(churn.pace_us / 4);
        mprotect(base, bytes, PROT_READ);
        pattern_check(base + start, 100 * PAGE, round, "flip");
        mprotect(base, bytes, PROT_READ | PROT_WRITE);
        round_done(9);
    }
    return NULL;
}

// Huge pages, where the kernel gives some: written here and there, thrown away now and then.
static void *huge_churn(void *unused) {
    (void)unused;
    enum { HUGE = 2 << 20, N = 6 };
    char *base = fresh((N + 1) * HUGE);
    base = (char *)(((uintptr_t)base + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(base, N * HUGE, MADV_HUGEPAGE);
    uint64_t seeds[N] = {0};
    for (uint64_t round = 1, random = 15;; round++) {
        uint64_t at = draw(&random) % N;
        if (seeds[at]) {
            pattern_check(base + at * HUGE, HUGE, seeds[at], "huge");
        }
        if (round % 5 == 0) {
            madvise(base + at * HUGE, HUGE, MADV_DONTNEED);
            zero_check(base + at * HUGE, HUGE, "huge, freed");
        }
        seeds[at] = round * 131;
        pattern_fill(base + at * HUGE, HUGE, seeds[at]);
        round_done(10);
    }
    return NULL;
}

static uint64_t deeper(uint64_t depth, uint64_t seed) {
    volatile uint64_t frame[PAGE / 8];
    for (uint64_t i = 0; i < PAGE / 8; i += 64) {
        frame[i] = scramble(seed + depth * 64 + i);
    }
    uint64_t below = depth ? deeper(depth - 1, seed) : (pause_us(churn.pace_us / 2), 0);
    for (uint64_t i = 0; i < PAGE / 8; i += 64) {
        if (frame[i] != scramble(seed + depth * 64 + i)) {
            problem("stack: a frame at depth %lu changed", depth);
        }
    }
    return below + 1;
}

// A stack that grows and is left again, each time to another depth.
static void *stack_churn(void *unused) {
    (void)unused;
    for (uint64_t round = 1, random = 17;; round++) {
        uint64_t depth = 10 + draw(&random) % 1500;
        if (deeper(depth, round) != depth + 1) {
            problem("stack: came back from another depth");
        }
        round_done(11);
    }
    return NULL;
}

// Every page of a region, over and over, in order: at any instant the pages before one place are a round ahead of the rest.
static void *all_churn(void *unused) {
    (void)unused;
    uint64_t pages = churn.all_pages;
    uint64_t *base = fresh(pages * PAGE);
    for (uint64_t round = 1;; round++) {
        for (uint64_t page = 0; page < pages; page++) {
            uint64_t *words = base + page * (PAGE / 8);
            if (words[0] != words[PAGE / 8 - 1] || words[0] + 1 != round) {
                problem("all: page %lu holds %lu and %lu in round %lu", page, words[0], words[PAGE / 8 - 1], round);
                return NULL;
            }
            words[0] = round;
            words[PAGE / 8 - 1] = round;
        }
        atomic_fetch_add(&churn.rounds[12], 1);
    }
    return NULL;
}

static void *(*const churners[])(void *) = {map_churn,   madvise_churn, remap_churn, brk_churn,   fork_churn,
                                            vfork_churn, thread_churn,  pipe_churn,  guard_churn, flip_churn,
                                            huge_churn,  stack_churn,   all_churn};

// ---- commands

static void answer(const char *command, char *out, size_t size) {
    if (strcmp(command, "check") == 0) {
        writers_check();
    }
    uint64_t steps = 0;
    for (uint64_t k = 0; k < churn.n_writers; k++) {
        steps += __atomic_load_n(&churn.writers[k].steps, __ATOMIC_RELAXED);
    }
    int n = snprintf(out, size, "{\"problems\": %lu, \"first\": \"%s\", \"pid\": %d, \"steps\": %lu, \"rounds\": {",
                     atomic_load(&problems.count), problems.first, getpid(), steps);
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        n += snprintf(out + n, size - (size_t)n, "%s\"%s\": %lu", i ? ", " : "", names[i],
                      atomic_load(&churn.rounds[i]));
    }
    snprintf(out + n, size - (size_t)n, "}}");
}

int main(int argc, char **argv) {
    uint64_t pages = number(argc, argv, "--pages", 1024);
    uint64_t writer_pace_us = number(argc, argv, "--writer-pace", 50);
    const char *set = option(argc, argv, "--churn", "map,madvise,remap,brk,fork,vfork,thread,pipe");
    churn.n_writers = number(argc, argv, "--writers", 2);
    churn.pace_us = number(argc, argv, "--pace", 2000);
    churn.all_pages = number(argc, argv, "--all-pages", 4096);
    if (churn.n_writers > 16) {
        return 64;
    }
    int listener = control_open(option(argc, argv, "--control", "/tmp/churn.control"));
    mallopt(M_TOP_PAD, 4 << 20); // so that malloc does not move the break while brk_churn does
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    free(malloc(100));
    churn.n_fixed = 512 * PAGE / 8;
    churn.fixed = fresh(churn.n_fixed * 8);
    for (uint64_t i = 0; i < churn.n_fixed; i++) {
        churn.fixed[i] = scramble(i);
    }
    for (uint64_t k = 0; k < churn.n_writers; k++) {
        writer_start(&churn.writers[k], k, pages, writer_pace_us);
    }
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        const char *found = strstr(set, names[i]);
        while (found && found > set && found[-1] != ',') { // "fork" is inside "vfork"
            found = strstr(found + 1, names[i]);
        }
        pthread_t thread;
        if (found && pthread_create(&thread, NULL, churners[i], NULL) != 0) {
            return 73;
        }
    }
    ready();
    control_serve(listener, answer);
}
