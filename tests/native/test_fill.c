// The filler, with real userfaultfds: whatever a lazily filled process does, it finds the content it should.
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "harness.h"
#include "lazy.h"
#include "util.h"

#define MIB 256ul // pages

static void check_pages(uint64_t from, uint64_t to) {
    for (uint64_t page = from; page < to; page++) {
        CHECK(lazy_page_is(BASE + page * PAGE, page), "page %lu", page);
    }
}

static void check_zero(const char *at, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        CHECK(lazy_page_is_zero(at + i * PAGE), "page %lu from %p", i, (const void *)at);
    }
}

static void expect(lazy_body *body, uint64_t n_pages, uint32_t options, int growsdown) {
    struct lazy lazy;
    lazy_make(&lazy, n_pages, growsdown, body);
    lazy_fill(&lazy, options);
    lazy_run(&lazy);
    int status = lazy_wait(&lazy);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the copy ended with %#x", (unsigned)status);
    CHECK(tm_fill_wait(lazy.fill, 10000), "the filler has not ended");
    struct tm_error error;
    int code = tm_fill_result(lazy.fill, &error);
    CHECK(code == TM_OK || code == TM_GONE, "%d: %s", code, error.what);
    lazy_free(&lazy);
}

static void expect_both(lazy_body *body, uint64_t n_pages) {
    expect(body, n_pages, 0, 0);
    expect(body, n_pages, TM_FILL_ON_DEMAND, 0);
}

// ---- touching

static void touch_random(uint64_t n) {
    uint64_t x = 88172645463325252u;
    for (uint64_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint64_t page = x % n;
        CHECK(lazy_page_is(BASE + page * PAGE, page), "page %lu", page);
    }
    check_pages(0, n);
}

static void touch_backwards(uint64_t n) {
    for (uint64_t page = n; page-- > 0;) {
        CHECK(lazy_page_is(BASE + page * PAGE, page), "page %lu", page);
    }
}

static void random_64_mib(void) { expect_both(touch_random, 64 * MIB); }
static void forwards_and_backwards(void) { expect_both(touch_backwards, 8 * MIB); }

static void touch_by_kernel(uint64_t n) {
    int file[2];
    static char got[PAGE];
    CHECK(pipe(file) == 0, "pipe");
    for (uint64_t page = 0; page < n; page += 5) {
        CHECK(write(file[1], BASE + page * PAGE, PAGE) == (ssize_t)PAGE, "write");
        CHECK(read(file[0], got, PAGE) == (ssize_t)PAGE && lazy_page_is(got, page), "page %lu", page);
        CHECK(write(file[1], "new", 3) == 3 && read(file[0], BASE + page * PAGE + 8, 3) == 3, "read");
        CHECK(memcmp(BASE + page * PAGE + 8, "new", 3) == 0, "page %lu", page);
    }
}
static void kernel_access(void) { expect_both(touch_by_kernel, 2 * MIB); }

static void write_first(uint64_t n) {
    for (uint64_t page = 0; page < n; page++) {
        uint64_t *words = (uint64_t *)(void *)(BASE + page * PAGE);
        words[7] = 1;
        for (uint64_t i = 0; i < 512; i++) {
            CHECK(words[i] == (i == 7 ? 1 : lazy_word(page, i)), "page %lu word %lu", page, i);
        }
    }
}
static void writes(void) { expect_both(write_first, 4 * MIB); }

// It outgrows what the filler knows, to and fro over the fill's end: it must stay one mapping all the time.
static void grow_and_move(uint64_t n) {
    char *at = BASE, *other = BASE + 4 * n * PAGE;
    for (unsigned i = 0; i < 6000; i++) {
        uint64_t is = (n + (i % 2 ? 8 : 0)) * PAGE, wanted = (n + (i % 2 ? 0 : 8)) * PAGE;
        CHECK(mremap(at, is, wanted, MREMAP_MAYMOVE | MREMAP_FIXED, other) == other, "move %u", i);
        char *here = other;
        other = at;
        at = here;
    }
    CHECK(at == BASE, "it moved elsewhere");
    check_pages(0, n);
}
static void growth_over_the_end(void) {
    for (int i = 0; i < 9 / SLOWER; i++) expect_both(grow_and_move, MIB / 4);
}

static void *touch_slice(void *slice) {
    uint64_t from = (uint64_t)(uintptr_t)slice * MIB;
    check_pages(from, from + MIB);
    return NULL;
}

static void touch_in_threads(uint64_t n) {
    pthread_t threads[16];
    for (uint64_t i = 0; i < n / MIB; i++) {
        CHECK(pthread_create(&threads[i], NULL, touch_slice, (void *)(uintptr_t)i) == 0, "thread"); // NOLINT
    }
    for (uint64_t i = 0; i < n / MIB; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0, "join");
    }
}
static void threads(void) { expect_both(touch_in_threads, 16 * MIB); }

// ---- events

static void fork_and_grandchild(uint64_t n) {
    check_pages(0, 100);
    pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        check_pages(50, n / 3);
        pid_t grandchild = fork();
        if (grandchild == 0) {
            check_pages(0, n);
            _exit(0);
        }
        ((volatile char *)BASE)[5 * PAGE] = 1; // its own from now on
        check_pages(n / 3, n);
        int status;
        CHECK(waitpid(grandchild, &status, 0) == grandchild && status == 0, "grandchild: %#x", (unsigned)status);
        _exit(0);
    }
    check_pages(n / 2, n);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "child: %#x", (unsigned)status);
    check_pages(0, n);
}
static void forks(void) { expect_both(fork_and_grandchild, 16 * MIB); }

// The parent ends first; the child is filled all the same.
static void orphan(uint64_t n) {
    int alive[2];
    CHECK(pipe(alive) == 0, "pipe");
    pid_t child = fork();
    if (child == 0) {
        close(alive[1]);
        char byte;
        CHECK(read(alive[0], &byte, 1) == 0, "the parent lives");
        check_pages(0, n);
        int report = open("/tmp", O_TMPFILE | O_RDWR, 0600);
        _exit(report >= 0 ? 0 : 97);
    }
}
static void orphans(void) {
    struct lazy lazy;
    lazy_make(&lazy, 16 * MIB, 0, orphan);
    lazy_fill(&lazy, 0);
    CHECK(syscall(SYS_prctl, 36 /* PR_SET_CHILD_SUBREAPER */, 1, 0, 0, 0) == 0, "subreaper");
    lazy_run(&lazy);
    CHECK(lazy_wait(&lazy) == 0, "the copy");
    int status = -1;
    CHECK(waitpid(-1, &status, 0) > 0 && status == 0, "the orphan ended with %#x", (unsigned)status);
    CHECK(tm_fill_wait(lazy.fill, 10000), "the filler has not ended");
    lazy_free(&lazy);
}

static void free_some(uint64_t n) {
    uint64_t quarter = n / 4;
    CHECK(madvise(BASE + quarter * PAGE, quarter * PAGE, MADV_DONTNEED) == 0, "madvise");
    check_zero(BASE + quarter * PAGE, quarter);
    check_pages(0, quarter);
    CHECK(madvise(BASE, 10 * PAGE, MADV_DONTNEED) == 0, "madvise");
    check_zero(BASE, 10);
    check_pages(10, quarter);
    check_pages(2 * quarter, n);
}
static void madvise_dontneed(void) { expect_both(free_some, 8 * MIB); }

static void unmap_some(uint64_t n) {
    uint64_t quarter = n / 4;
    char *hole = BASE + quarter * PAGE;
    CHECK(munmap(hole, quarter * PAGE) == 0, "munmap");
    CHECK(mmap(hole, quarter * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == hole,
          "mmap");
    check_zero(hole, quarter);
    CHECK(mmap(BASE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == BASE, "mmap");
    check_zero(BASE, 8);
    check_pages(8, quarter);
    check_pages(2 * quarter, n);
}
static void unmaps(void) { expect_both(unmap_some, 8 * MIB); }

static void move_some(uint64_t n) {
    uint64_t part = n / 8;
    char *to = BASE + 4 * n * PAGE;
    // Moved and grown: the tail is new.
    char *moved = mremap(BASE, part * PAGE, 2 * part * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    CHECK(moved == to, "mremap");
    for (uint64_t i = 0; i < part; i++) {
        CHECK(lazy_page_is(to + i * PAGE, i), "page %lu", i);
    }
    check_zero(to + part * PAGE, part);
    // Left mapped where it was: reads as zero there.
    char *from = BASE + part * PAGE;
    to += 4 * n * PAGE;
    CHECK(mremap(from, part * PAGE, part * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == to, "mremap");
    check_zero(from, part);
    for (uint64_t i = 0; i < part; i++) {
        CHECK(lazy_page_is(to + i * PAGE, part + i), "page %lu", part + i);
    }
    // Moved, shrunk, moved back over another part that was not filled.
    from = BASE + 2 * part * PAGE;
    char *over = BASE + 4 * part * PAGE;
    CHECK(mremap(from, part * PAGE, part / 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, over) == over, "mremap");
    for (uint64_t i = 0; i < part / 2; i++) {
        CHECK(lazy_page_is(over + i * PAGE, 2 * part + i), "page %lu", 2 * part + i);
    }
    check_pages(4 * part + part / 2, n);
    // Grown in place at the end.
    char *end = BASE + n * PAGE;
    char *grown = mremap(end - part * PAGE, part * PAGE, 2 * part * PAGE, 0);
    CHECK(grown == end - part * PAGE, "mremap");
    check_zero(end, part);
    check_pages(7 * part, n);
}
static void moves(void) { expect_both(move_some, 8 * MIB); }

static void grow_down(uint64_t n) {
    char *volatile base = BASE; // the compiler takes a constant address for an object's start
    for (uint64_t i = 1; i <= 64; i++) {
        char *below = base - i * PAGE;
        CHECK(lazy_page_is_zero(below), "page %lu below", i);
        *below = 1;
    }
    check_pages(0, n);
}
static void stack_growth(void) {
    expect(grow_down, MIB, 0, 1);
    expect(grow_down, MIB, TM_FILL_ON_DEMAND, 1);
}

// Pages to fill at once may lie in several mappings: runs that cross them must not be lost.
static void split_mappings(uint64_t n) {
    for (uint64_t page = 1; page < n; page += 3) {
        CHECK(mprotect(BASE + page * PAGE, PAGE, PROT_READ) == 0, "mprotect");
    }
    check_pages(0, n);
}
static void splits(void) { expect_both(split_mappings, 2 * MIB); }

// A call that discards without an event: once filled, gone means zero.
static void install_guards(uint64_t n) {
    check_pages(0, n);
    if (madvise(BASE, 16 * PAGE, 102 /* MADV_GUARD_INSTALL, Linux 6.13 */)) {
        CHECK(errno == EINVAL, "madvise");
        return;
    }
    CHECK(madvise(BASE, 16 * PAGE, 103 /* MADV_GUARD_REMOVE */) == 0, "madvise");
    check_zero(BASE, 16);
    check_pages(16, n);
}
static void guard_pages(void) { expect(install_guards, MIB, TM_FILL_ON_DEMAND, 0); }

static void execute(uint64_t n) {
    check_pages(0, n / 16);
    execl("/bin/true", "true", (char *)NULL);
    _exit(97);
}
static void exec_while_filling(void) { expect_both(execute, 64 * MIB); }

static void leave(uint64_t n) { check_pages(n / 2, n / 2 + 10); }
static void exit_while_filling(void) { expect_both(leave, 64 * MIB); }

// ---- many threads that free, move and fork at once, each with a model of what its slice must hold

enum { SLICES = 4, SLICE = 512, ROUNDS = 60 };

struct slice {
    unsigned seed;
    uint64_t first;     // spool page
    char *at;           // where the slice lies now
    char *spare;        // a place of the same size to move to
    char zero[SLICE];   // page was freed
    char broken[SLICE]; // page was written
};

static void check_slice(const struct slice *slice) {
    for (uint64_t i = 0; i < SLICE; i++) {
        const char *at = slice->at + i * PAGE;
        if (slice->broken[i]) {
            CHECK(*(const volatile char *)at == slice->broken[i], "page %lu was written", i);
        } else if (slice->zero[i]) {
            CHECK(lazy_page_is_zero(at), "page %lu was freed", i);
        } else {
            CHECK(lazy_page_is(at, slice->first + i), "page %lu of slice at %lu", i, slice->first);
        }
    }
}

static void *churn_slice(void *argument) {
    struct slice *slice = argument;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t from = (uint64_t)rand_r(&slice->seed) % SLICE;
        uint64_t n = (uint64_t)rand_r(&slice->seed) % 24 + 1;
        n = n < SLICE - from ? n : SLICE - from;
        char *part = slice->at + from * PAGE;
        switch (rand_r(&slice->seed) % 6) {
            case 0:
                CHECK(madvise(part, n * PAGE, MADV_DONTNEED) == 0, "madvise");
                memset(slice->zero + from, 1, n);
                memset(slice->broken + from, 0, n);
                break;
            case 1:
                CHECK(munmap(part, n * PAGE) == 0, "munmap");
                CHECK(mmap(part, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
                           -1, 0) == part,
                      "mmap");
                memset(slice->zero + from, 1, n);
                memset(slice->broken + from, 0, n);
                break;
            case 2: {
                // In pieces: a moved mapping must be one.
                for (uint64_t i = 0; i < SLICE; i++) {
                    char *to = slice->spare + i * PAGE;
                    CHECK(mremap(slice->at + i * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap");
                }
                char *old = slice->at;
                slice->at = slice->spare;
                slice->spare = old;
                break;
            }
            case 3: {
                pid_t child = fork();
                CHECK(child >= 0, "fork");
                if (child == 0) {
                    check_slice(slice);
                    _exit(0);
                }
                int status;
                CHECK(waitpid(child, &status, 0) == child && status == 0, "child: %#x", (unsigned)status);
                break;
            }
            case 4:
                for (uint64_t i = 0; i < n; i++) {
                    slice->broken[from + i] = (char)(round + 1);
                    *(volatile char *)(part + i * PAGE) = (char)(round + 1);
                }
                break;
            default:
                for (uint64_t i = 0; i < n; i++) {
                    uint64_t page = from + i;
                    if (!slice->broken[page] && !slice->zero[page]) {
                        CHECK(lazy_page_is(part + i * PAGE, slice->first + page), "page %lu", page);
                    }
                }
        }
    }
    check_slice(slice);
    return NULL;
}

static void churn(uint64_t n) {
    static struct slice slices[SLICES];
    pthread_t workers[SLICES];
    CHECK(n == SLICES * SLICE, "size");
    for (unsigned i = 0; i < SLICES; i++) {
        slices[i] = (struct slice){.seed = i + (unsigned)getpid(), .first = i * SLICE};
        slices[i].at = BASE + slices[i].first * PAGE;
        slices[i].spare = BASE + (4 * n + slices[i].first) * PAGE;
        CHECK(pthread_create(&workers[i], NULL, churn_slice, &slices[i]) == 0, "thread");
    }
    for (unsigned i = 0; i < SLICES; i++) {
        CHECK(pthread_join(workers[i], NULL) == 0, "join");
    }
}
static void churn_of_events(void) {
    for (int i = 0; i < 3 / SLOWER; i++) {
        expect_both(churn, SLICES * SLICE);
    }
}

// ---- the filler's own promises

static void nothing(uint64_t n) { (void)n; }

static void check_resident(uint64_t n) {
    static unsigned char there[64 * MIB];
    CHECK(mincore(BASE, n * PAGE, there) == 0, "mincore");
    for (uint64_t page = 0; page < n; page++) {
        CHECK((there[page] & 1) == (page == 2 || page == 9) || page % 7 == 3 || page < 4 || (page > 7 && page < 12),
              "page %lu", page);
    }
    CHECK(there[2] & 1 && there[9] & 1, "the pages asked for are not there");
}

static void some_pages_first(void) {
    struct lazy lazy;
    lazy_make(&lazy, MIB, 0, check_resident);
    lazy_fill(&lazy, TM_FILL_ON_DEMAND);
    uint64_t at = (uint64_t)(uintptr_t)BASE;
    uint64_t asked[] = {at + 2 * PAGE + 8, at + 9 * PAGE, at - 100 * PAGE};
    CHECK_OK(tm_fill_now(lazy.fill, asked, 3, why));
    lazy_run(&lazy);
    CHECK(lazy_wait(&lazy) == 0, "the copy");
    CHECK(tm_fill_wait(lazy.fill, 10000), "the filler has not ended");
    CHECK(tm_fill_result(lazy.fill, NULL) == TM_GONE, "it left with pages missing");
    lazy_free(&lazy);
}

static void all_pages_first(void) {
    struct lazy lazy;
    lazy_make(&lazy, 32 * MIB, 0, touch_backwards);
    lazy_fill(&lazy, 0);
    CHECK_OK(tm_fill_all(lazy.fill, why));
    lazy_run(&lazy);
    CHECK(tm_fill_wait(lazy.fill, 0), "it has ended");
    CHECK(lazy_wait(&lazy) == 0, "the copy");
    struct tm_fill_progress progress;
    tm_fill_progress(lazy.fill, &progress);
    CHECK(progress.filled == progress.pages && progress.demand_faults == 0 && progress.code == TM_OK, "counts");
    lazy_free(&lazy);
}

static void wait_long(uint64_t n) {
    (void)n;
    pause();
}

static void counters_and_records(void) {
    struct lazy lazy;
    lazy_make(&lazy, 4 * MIB, 0, touch_backwards);
    lazy_fill(&lazy, TM_FILL_ON_DEMAND);
    lazy_run(&lazy);
    CHECK(lazy_wait(&lazy) == 0, "the copy");
    CHECK(tm_fill_wait(lazy.fill, 10000), "the filler has not ended");
    CHECK(tm_fill_result(lazy.fill, NULL) == TM_OK, "all was touched");
    struct tm_fill_progress progress;
    tm_fill_progress(lazy.fill, &progress);
    CHECK(progress.filled == progress.pages && progress.demand_pages == progress.pages, "counts");
    CHECK(progress.end_ns > progress.start_ns && progress.background_pages == 0, "counts");
    static struct tm_fault faults[4096];
    uint32_t n = tm_ring_drain(tm_fill_ring(lazy.fill), faults, 4096);
    CHECK(n > 100 && n + tm_ring_dropped(tm_fill_ring(lazy.fill)) == progress.demand_faults, "%u records", n);
    CHECK(faults[0].tid == lazy.pid && faults[0].region == 6 && faults[0].kind == TM_FAULT_MISSING, "record");
    CHECK(faults[0].address == (uint64_t)(uintptr_t)BASE + (4 * MIB - 1) * PAGE && faults[0].latency_ns > 0, "record");
    lazy_free(&lazy);
}

static void background_alone(void) {
    struct lazy lazy;
    lazy_make(&lazy, 64 * MIB, 0, wait_long);
    lazy_fill(&lazy, 0);
    lazy_run(&lazy);
    CHECK(tm_fill_wait(lazy.fill, 30000), "not filled in time");
    struct tm_fill_progress progress;
    tm_fill_progress(lazy.fill, &progress);
    CHECK(progress.background_pages == progress.pages && progress.code == TM_OK, "counts");
    CHECK(kill(lazy.pid, SIGKILL) == 0, "the copy had ended");
    lazy_wait(&lazy);
    lazy_free(&lazy);
}

static void cancelled(void) {
    struct lazy lazy;
    lazy_make(&lazy, MIB, 0, wait_long);
    lazy_fill(&lazy, TM_FILL_ON_DEMAND);
    lazy_run(&lazy);
    tm_fill_cancel(lazy.fill);
    CHECK(tm_fill_wait(lazy.fill, 10000), "the filler has not ended");
    CHECK(tm_fill_result(lazy.fill, NULL) == TM_CANCELLED, "result");
    int status = lazy_wait(&lazy);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the copy ended with %#x", (unsigned)status);
    lazy_free(&lazy);
}

static void damage(struct lazy *lazy, uint64_t page) {
    char byte;
    CHECK(pread(lazy->pages_fd, &byte, 1, (off_t)(page * PAGE + 77)) == 1, "pread");
    byte ^= 4;
    CHECK(pwrite(lazy->pages_fd, &byte, 1, (off_t)(page * PAGE + 77)) == 1, "pwrite");
}

static void damaged_page_kills(void) {
    struct lazy lazy;
    lazy_make(&lazy, MIB, 0, touch_random);
    lazy_fill(&lazy, 0);
    damage(&lazy, 100);
    lazy_run(&lazy);
    int status = lazy_wait(&lazy);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the copy ended with %#x", (unsigned)status);
    CHECK(tm_fill_wait(lazy.fill, 10000), "the filler has not ended");
    struct tm_error error;
    CHECK(tm_fill_result(lazy.fill, &error) == TM_DAMAGED, "result");
    CHECK(error.address == (uint64_t)(uintptr_t)BASE + 100 * PAGE, "address %#lx", error.address);
    lazy_free(&lazy);
}

static void touch_all_but_one(uint64_t n) {
    check_pages(0, 100);
    check_pages(101, n);
    signal(SIGBUS, SIG_DFL); // sanitizers have handlers of their own
    CHECK(*(volatile char *)(BASE + 100 * PAGE) == 0, "the damaged page was seen");
}

static void damaged_page_poisons(void) {
    for (int demand = 0; demand < 2; demand++) {
        struct lazy lazy;
        lazy_make(&lazy, MIB, 0, touch_all_but_one);
        lazy_fill(&lazy, TM_FILL_POISON | (demand ? TM_FILL_ON_DEMAND : 0));
        damage(&lazy, 100);
        lazy_run(&lazy);
        int status = lazy_wait(&lazy);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS, "the copy ended with %#x", (unsigned)status);
        CHECK(tm_fill_wait(lazy.fill, 10000), "the filler has not ended");
        struct tm_fill_progress progress;
        tm_fill_progress(lazy.fill, &progress);
        CHECK(progress.damaged == 1, "%lu damaged", progress.damaged);
        lazy_free(&lazy);
    }
}

static void damage_found_before(void) {
    struct lazy lazy;
    lazy_make(&lazy, MIB, 0, nothing);
    lazy_fill(&lazy, 0);
    damage(&lazy, 100);
    struct tm_error error;
    CHECK(tm_fill_all(lazy.fill, &error) == TM_DAMAGED, "result");
    kill(lazy.pid, SIGKILL);
    lazy_wait(&lazy);
    lazy_free(&lazy);
}

static void bad_regions(void) {
    struct lazy lazy;
    lazy_make(&lazy, MIB, 0, nothing);
    struct tm_fill_region outside = {
        .start = (uint64_t)(uintptr_t)BASE, .end = (uint64_t)(uintptr_t)BASE + 10 * PAGE, .first_page = MIB - 5};
    struct tm_error error;
    CHECK(tm_fill_create(lazy.uffd, lazy.pidfd, lazy.spool, &outside, 1, 0, &lazy.fill, &error) == TM_SYS, "result");
    CHECK(error.address == outside.start && error.err == EINVAL, "error");
    CHECK(fcntl(lazy.uffd, F_GETFD) < 0, "the descriptor is still open");
    kill(lazy.pid, SIGKILL);
    lazy_wait(&lazy);
    lazy_free(&lazy);
}

int main(int argc, char **argv) {
    (void)argc;
    only = argv[1];
    RUN(random_64_mib, 60);
    RUN(forwards_and_backwards, 60);
    RUN(kernel_access, 60);
    RUN(growth_over_the_end, 60);
    RUN(writes, 60);
    RUN(threads, 60);
    RUN(forks, 120);
    RUN(orphans, 60);
    RUN(madvise_dontneed, 60);
    RUN(unmaps, 60);
    RUN(moves, 60);
    RUN(stack_growth, 60);
    RUN(splits, 60);
    RUN(guard_pages, 60);
    RUN(exec_while_filling, 60);
    RUN(exit_while_filling, 60);
    RUN(churn_of_events, 240);
    RUN(some_pages_first, 60);
    RUN(all_pages_first, 60);
    RUN(counters_and_records, 60);
    RUN(background_alone, 60);
    RUN(cancelled, 60);
    RUN(damaged_page_kills, 60);
    RUN(damaged_page_poisons, 60);
    RUN(damage_found_before, 60);
    RUN(bad_regions, 60);
    return failures != 0;
}
