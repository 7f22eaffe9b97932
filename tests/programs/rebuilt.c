// A target for the tests of the rebuild: threads with state of their own, memory of every kind. It answers one line on
// descriptor 1 for each command byte read from descriptor 0, and checks itself instead of trusting who asks.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 4, BIG = 64 << 20, PAGE = 4096 };

struct worker {
    pthread_t thread;
    pid_t tid;
    int index;
    atomic_ulong rounds;
    atomic_int sick;
};

static struct worker workers[THREADS];
static atomic_int quit;
static uint8_t *big, *shared_a, *shared_b, *guarded, *no_access, *read_only;
static pthread_mutex_t robust;
static char written_data[3 * PAGE] = "data";
static volatile sig_atomic_t caught;
static void *alternate;

static void say(const char *format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    line[n++] = '\n';
    if (write(1, line, (size_t)n) != n) {
        _exit(3);
    }
}

// Integer, x87 and vector registers hold values that belong together across any moment of capture.
static void *work(void *argument) {
    struct worker *me = argument;
    me->tid = gettid();
    char name[16];
    snprintf(name, sizeof name, "worker-%d", me->index);
    prctl(PR_SET_NAME, name);
    double sum = 0;
    long double tall = 0;
    uint64_t count = 0;
    while (!atomic_load(&quit)) {
        for (int i = 0; i < 1000; i++) {
            count += 3;
            sum += 3;
            tall += 3;
        }
        if ((uint64_t)sum != count || (uint64_t)tall != count || gettid() != me->tid) {
            atomic_store(&me->sick, 1);
        }
        atomic_fetch_add(&me->rounds, 1);
        usleep(200);
    }
    return (void *)count;
}

static void *die_with_robust(void *argument) {
    (void)argument;
    pthread_mutex_lock(&robust);
    while (!atomic_load(&quit)) {
        usleep(1000);
    }
    return NULL; // owner dead: the next locker is told
}

static void handler(int number, siginfo_t *info, void *context) {
    (void)context;
    char here;
    int on_alternate = (char *)&here >= (char *)alternate && &here < (char *)alternate + 65536;
    caught = number + info->si_value.sival_int * 100 + (on_alternate ? 0 : 100000);
}

static int deep(int levels) {
    volatile char frame[8192];
    memset((char *)frame, levels, sizeof frame);
    return levels ? deep(levels - 1) + frame[100] - (char)levels : 0;
}

static const char *check_memory(void) {
    for (size_t page = 0; page < BIG / PAGE; page++) {
        uint64_t *words = (uint64_t *)(big + page * PAGE);
        uint64_t wanted = page % 3 == 2 ? 0 : page * 0x9e3779b97f4a7c15u + 1;
        if (words[0] != wanted || words[511] != wanted) {
            return "big";
        }
    }
    if (memcmp(shared_a, "shared", 6) || memcmp(shared_b, "shared", 6)) {
        return "shared";
    }
    shared_a[10]++;
    if (shared_a[10] != shared_b[10]) {
        return "shared twice";
    }
    if (memcmp(read_only, "constant", 8) || memcmp(written_data + PAGE, "more", 4) || strcmp(written_data, "data")) {
        return "small";
    }
    if (mprotect(no_access, PAGE, PROT_READ) || memcmp(no_access, "hidden", 6) ||
        mprotect(no_access, PAGE, PROT_NONE)) {
        return "no access";
    }
    return NULL;
}

static void answer(char command) {
    struct timespec now;
    pid_t child;
    int status;
    switch (command) {
        case 'c': {
            const char *bad = check_memory();
            int sick = 0;
            for (int i = 0; i < THREADS; i++) {
                sick += atomic_load(&workers[i].sick);
            }
            say("%s %d %d", bad ? bad : "good", sick, gettid());
            break;
        }
        case 'r':
            say("%lu %lu", atomic_load(&workers[0].rounds), atomic_load(&workers[THREADS - 1].rounds));
            break;
        case 't':
            clock_gettime(CLOCK_MONOTONIC, &now);
            say("%lld", now.tv_sec * 1000000000ll + now.tv_nsec);
            break;
        case 's':
            say("%d", deep(400)); // 3.2 MB, far below the stack of before
            break;
        case 'b': {
            void *before = sbrk(0), *more = sbrk(1 << 20);
            memset(more, 7, 1 << 20);
            say("%d %p", more == before && sbrk(0) == (char *)before + (1 << 20), before);
            break;
        }
        case 'g': // raises SIGUSR1 with a value, caught on the alternate stack
            sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 7});
            say("%d", (int)caught);
            break;
        case 'p': { // the mask and what is pending behind it
            sigset_t pending;
            sigpending(&pending);
            say("%d %d", sigismember(&pending, SIGUSR2), sigismember(&pending, SIGRTMIN + 1));
            break;
        }
        case 'u': {
            caught = 0;
            sigset_t all;
            sigemptyset(&all);
            sigprocmask(SIG_SETMASK, &all, NULL);
            say("%d", (int)caught);
            break;
        }
        case 'f': // a child reads all
            child = fork();
            if (!child) {
                _exit(check_memory() ? 1 : 42);
            }
            waitpid(child, &status, 0);
            say("%d", WEXITSTATUS(status));
            break;
        case 'j': {
            atomic_store(&quit, 1);
            int joined = 0;
            for (int i = 0; i < THREADS; i++) {
                joined += pthread_join(workers[i].thread, NULL) == 0;
            }
            say("%d %d", joined, pthread_mutex_lock(&robust)); // EOWNERDEAD
            break;
        }
        case 'n': { // new threads work
            struct worker extra = {.index = 9};
            atomic_store(&quit, 0);
            pthread_create(&extra.thread, NULL, work, &extra);
            while (atomic_load(&extra.rounds) < 10) {
                usleep(1000);
            }
            atomic_store(&quit, 1);
            pthread_join(extra.thread, NULL);
            say("%d", atomic_load(&extra.sick));
            break;
        }
        default:
            say("?");
    }
}

int main(void) {
    long page = PAGE;
    big = mmap(NULL, BIG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < BIG / PAGE; i++) {
        uint64_t *words = (uint64_t *)(big + i * PAGE);
        if (i % 3 != 2) {
            words[0] = words[511] = i * 0x9e3779b97f4a7c15u + 1;
        }
    }
    shared_a = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared_b = mremap(shared_a, 0, 8 * PAGE, MREMAP_MAYMOVE);
    memcpy(shared_a, "shared", 6);
    no_access = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(no_access, "hidden", 6);
    mprotect(no_access, PAGE, PROT_NONE);
    read_only = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(read_only, "constant", 8);
    mprotect(read_only, 2 * PAGE, PROT_READ);
    madvise(read_only, 2 * PAGE, MADV_DONTDUMP);
    guarded = mmap(NULL, 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memcpy(written_data + PAGE, "more", 4);
    (void)page;

    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &attributes);
    alternate = malloc(65536);
    sigaltstack(&(stack_t){.ss_sp = alternate, .ss_size = 65536}, NULL);
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGUSR2, &action, NULL);
    sigaction(SIGRTMIN + 1, &action, NULL);
    sigset_t held;
    sigemptyset(&held);
    sigaddset(&held, SIGUSR2);
    sigaddset(&held, SIGRTMIN + 1);
    sigprocmask(SIG_SETMASK, &held, NULL);
    for (int i = 0; i < THREADS; i++) {
        workers[i].index = i;
        pthread_create(&workers[i].thread, NULL, i == 1 ? die_with_robust : work, &workers[i]);
    }
    raise(SIGUSR2);
    sigqueue(getpid(), SIGRTMIN + 1, (union sigval){.sival_int = 5});
    usleep(20000);
    say("ready");
    for (char command; read(0, &command, 1) == 1;) {
        answer(command);
    }
    return 0;
}
