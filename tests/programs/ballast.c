// Much memory, and a writer that times every write as it sees it: for long capture windows, and for the benchmarks.
// SIGUSR1: exec itself anew; SIGUSR2: exit with status 3. `check` verifies the content, `hammer N` writes N times to
// random pages, `fork` times fork(), `forked N` does the hammering under fork's copy-on-write, `copy` times memcpy.
#include "target.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { LATENCIES = 4 << 20, MARK = 7, SERIES = 30000 };

static struct {
    uint64_t *words;
    uint64_t pages;
    uint64_t random;
    uint64_t written; // so many writes of the present number have been made
    char **argv;
    _Atomic uint64_t stop; // ends a hammer that runs "until"
    float *latencies_us;
    uint64_t n_latencies;
    pthread_t thread;
    uint64_t elapsed_ns;
    uint64_t limit;
    uint64_t begin_ns;
    uint32_t each_ms[SERIES]; // writes in each millisecond of the last hammering
} ballast;

static const double FAULT_US = 2.0; // a write that takes longer met a fault (or was preempted, which counts too)

// The content of a page: a word that never changes, and a counter that the hammer raises together with its shadow.
static void content_make(void) {
    for (uint64_t page = 0; page < ballast.pages; page++) {
        uint64_t *words = ballast.words + page * PAGE / 8;
        for (uint64_t i = 0; i < PAGE / 8; i += 8) {
            words[i] = scramble(page * 512 + i);
        }
        words[MARK] = 0;
    }
}

static void content_check(void) {
    uint64_t sum = 0;
    for (uint64_t page = 0; page < ballast.pages; page++) {
        const uint64_t *words = ballast.words + page * PAGE / 8;
        for (uint64_t i = 0; i < PAGE / 8; i += 8) {
            if (words[i] != scramble(page * 512 + i)) {
                problem("page %lu word %lu is %lx", page, i, words[i]);
                return;
            }
        }
        sum += words[MARK];
    }
    if (sum != ballast.written) {
        problem("%lu writes are in the pages, %lu were made", sum, ballast.written);
    }
}

static void hammer(uint64_t n) {
    ballast.n_latencies = 0;
    uint64_t begin = now_ns(CLOCK_MONOTONIC);
    uint64_t last = begin;
    ballast.begin_ns = begin;
    memset(ballast.each_ms, 0, sizeof ballast.each_ms);
    for (uint64_t i = 0; i < n && !atomic_load_explicit(&ballast.stop, memory_order_relaxed); i++) {
        uint64_t page = draw(&ballast.random) % ballast.pages;
        volatile uint64_t *mark = &ballast.words[page * PAGE / 8 + MARK];
        uint64_t before = now_ns(CLOCK_MONOTONIC);
        *mark = *mark + 1;
        last = now_ns(CLOCK_MONOTONIC);
        ballast.written++;
        uint64_t ms = (last - begin) / 1000000;
        ballast.each_ms[ms < SERIES ? ms : SERIES - 1]++;
        double us = (double)(last - before) / 1000;
        if (us >= FAULT_US && ballast.n_latencies < LATENCIES) {
            ballast.latencies_us[ballast.n_latencies++] = (float)us;
        }
    }
    ballast.elapsed_ns = last - begin;
}

static void *hammer_thread(void *unused) {
    (void)unused;
    hammer(ballast.limit);
    return NULL;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a;
    float y = *(const float *)b;
    return (x > y) - (x < y);
}

static double at(double part) {
    return ballast.n_latencies ? (double)ballast.latencies_us[(uint64_t)(part * (double)(ballast.n_latencies - 1))] : 0;
}

static void report(char *out, size_t size) {
    qsort(ballast.latencies_us, ballast.n_latencies, sizeof(float), ascending);
    int n = snprintf(out, size,
                     "{\"writes\": %lu, \"faults\": %lu, \"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f, "
                     "\"elapsed_us\": %lu, \"begin_ns\": %lu, \"each_ms\": [",
                     ballast.written, ballast.n_latencies, at(0.5), at(0.99), at(1.0), ballast.elapsed_ns / 1000,
                     ballast.begin_ns);
    for (uint64_t ms = 0; ms < SERIES - 1 && ms <= ballast.elapsed_ns / 1000000; ms++) {
        n += snprintf(out + n, size - (size_t)n, "%s%u", ms ? "," : "", ballast.each_ms[ms]);
    }
    snprintf(out + n, size - (size_t)n, "]}");
}

// memcpy of all of it, in pieces as a sweep makes them, into memory that is there already or into fresh memory.
static void copy_all(int populate, char *out, size_t size) {
    enum { PIECE = 2 << 20 };
    char *to = mmap(NULL, ballast.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | populate, -1, 0);
    if (to == MAP_FAILED) {
        snprintf(out, size, "{\"error\": \"mmap: errno %d\"}", errno);
        return;
    }
    uint64_t begin = now_ns(CLOCK_MONOTONIC);
    for (uint64_t at_byte = 0; at_byte < ballast.pages * PAGE; at_byte += PIECE) {
        uint64_t left = ballast.pages * PAGE - at_byte;
        memcpy(to + at_byte, (char *)ballast.words + at_byte, left < PIECE ? left : PIECE);
    }
    uint64_t us = (now_ns(CLOCK_MONOTONIC) - begin) / 1000;
    munmap(to, ballast.pages * PAGE);
    snprintf(out, size, "{\"copy_us\": %lu}", us);
}

static pid_t fork_timed(uint64_t *us) {
    uint64_t begin = now_ns(CLOCK_MONOTONIC);
    pid_t child = fork();
    if (child == 0) {
        for (;;) {
            pause();
        }
    }
    *us = (now_ns(CLOCK_MONOTONIC) - begin) / 1000;
    return child;
}

static void end_child(pid_t child) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

static void answer(const char *command, char *out, size_t size) {
    uint64_t n = 0;
    uint64_t us = 0;
    if (sscanf(command, "hammer %lu", &n) == 1) {
        hammer(n);
        report(out, size);
    } else if (sscanf(command, "begin %lu", &n) == 1) { // hammer in a thread, until "end" or n writes
        atomic_store(&ballast.stop, 0);
        ballast.limit = n;
        pthread_create(&ballast.thread, NULL, hammer_thread, NULL);
        snprintf(out, size, "{}");
    } else if (strcmp(command, "end") == 0) {
        atomic_store(&ballast.stop, 1);
        pthread_join(ballast.thread, NULL);
        atomic_store(&ballast.stop, 0);
        report(out, size);
    } else if (sscanf(command, "forked %lu", &n) == 1) {
        pid_t child = fork_timed(&us);
        hammer(n);
        end_child(child);
        report(out, size);
    } else if (strcmp(command, "copy") == 0) {
        copy_all(MAP_POPULATE, out, size);
    } else if (strcmp(command, "copy fresh") == 0) {
        copy_all(0, out, size);
    } else if (strcmp(command, "fork") == 0) {
        end_child(fork_timed(&us));
        snprintf(out, size, "{\"fork_us\": %lu}", us);
    } else {
        if (strcmp(command, "check") == 0) {
            content_check();
        }
        snprintf(out, size, "{\"problems\": %lu, \"first\": \"%s\", \"pid\": %d, \"reborn\": %d}",
                 atomic_load(&problems.count), problems.first, getpid(), getenv("REBORN") != NULL);
    }
}

static void on_exec(int number) {
    (void)number;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execv("/proc/self/exe", ballast.argv);
    _exit(5);
}

static void on_exit_wanted(int number) {
    (void)number;
    _exit(3);
}

int main(int argc, char **argv) {
    const char *control = option(argc, argv, "--control", "/tmp/ballast.control");
    unsetenv("REBORN");
    if (!getenv("READY_FD")) {
        setenv("REBORN", "1", 1); // exec clears the handshake
    }
    ballast.argv = argv;
    ballast.pages = number(argc, argv, "--mb", 64) * 256;
    ballast.random = 99;
    int listener = control_open(control);
    void *base = mmap(NULL, ballast.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *room = mmap(NULL, LATENCIES * sizeof(float), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || room == MAP_FAILED) {
        return 72;
    }
    madvise(base, ballast.pages * PAGE, number(argc, argv, "--huge", 0) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    ballast.words = base;
    ballast.latencies_us = room;
    content_make();
    signal(SIGUSR1, on_exec);
    signal(SIGUSR2, on_exit_wanted);
    ready();
    unsetenv("READY_FD");
    control_serve(listener, answer);
}
