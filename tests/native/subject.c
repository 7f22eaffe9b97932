// What the tests of the source side hold and freeze: one program with a mode a kind of trouble. `subject MODE N` says `r` when it
// is ready, then obeys single bytes on standard input: `c` asks whether it is well (`.` or `!`), `q` ends it, anything else
// is the mode's own. Built without sanitizers: its memory is what the tests say, no more.
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "subject.h"

static uint64_t count;       // N
static char *base = SUBJECT; // the region under test
static volatile uint64_t *beats;
static _Atomic int trouble;

static void need(int good, const char *what) {
    if (good) return;
    dprintf(2, "subject: %s: %s\n", what, strerror(errno));
    _exit(97);
}

static void *map(void *at, uint64_t size, int prot, int more) {
    void *got = mmap(at, size, prot, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED_NOREPLACE : 0) | more, -1, 0);
    need(got != MAP_FAILED && (!at || got == at), "mmap");
    return got;
}

static uint64_t *word(uint64_t page) { return (uint64_t *)(void *)(base + page * 4096); }

static void fill(uint64_t from, uint64_t to) {
    for (uint64_t page = from; page < to; page++) {
        word(page)[0] = subject_word(page);
        word(page)[511] = ~subject_word(page);
    }
}

static int filled(uint64_t from, uint64_t to) {
    for (uint64_t page = from; page < to; page++)
        if (word(page)[0] != subject_word(page) || word(page)[511] != ~subject_word(page)) return 0;
    return 1;
}

static void thread_with(void *(*run)(void *), void *argument, size_t stack) {
    pthread_t thread;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    if (stack) pthread_attr_setstacksize(&attr, stack);
    errno = pthread_create(&thread, &attr, run, argument);
    need(errno == 0, "pthread_create");
    pthread_attr_destroy(&attr);
}

static int nothing_wrong(void) { return !trouble; }

// Beats must go on.
static int beating(void) {
    uint64_t before = *beats;
    for (int i = 0; i < 4000 && *beats == before; i++) usleep(1000);
    return *beats != before && !trouble;
}

static void nothing(char byte) { (void)byte; }

// ---- stamp: one writer goes through the pages in order, generation by generation

static void *stamper(void *unused) {
    (void)unused;
    for (uint64_t generation = 1;; generation++)
        for (uint64_t page = 1; page < count; page++) {
            word(page)[0] = generation;
            word(page)[511] = generation;
            *beats = (generation << 32) + page;
        }
    return NULL;
}

static void stamp_start(void) {
    map(base, count * 4096, PROT_READ | PROT_WRITE, 0);
    beats = word(0);
    thread_with(stamper, NULL, 0);
    while (*beats < 2ull << 32) usleep(1000);
}

static void plain_start(void) {
    map(base, count * 4096, PROT_READ | PROT_WRITE, 0);
    fill(0, count);
}

static void huge_start(void) {
    map(base, count * 4096, PROT_READ | PROT_WRITE, 0);
    need(madvise(base, count * 4096, MADV_HUGEPAGE) == 0, "madvise");
    fill(0, count);
}

// ---- zeros: of each four pages one is only read, one written with zeros, one written, one untouched

static void zeros_start(void) {
    map(base, count * 4096, PROT_READ | PROT_WRITE, 0);
    for (uint64_t page = 0; page < count; page++) {
        if (page % 4 == 0 && *(volatile char *)word(page)) _exit(96);
        if (page % 4 == 1) *(volatile char *)word(page) = 0;
        if (page % 4 == 2) fill(page, page + 1);
    }
}

static void zeros_poke(char byte) {
    (void)byte;
    for (uint64_t page = 0; page < count; page++) word(page)[7] = 1;
}

static void none_start(void) {
    plain_start();
    need(mprotect(base, count / 2 * 4096, PROT_NONE) == 0, "mprotect");
    need(mprotect(base + count / 2 * 4096, count / 2 * 4096, PROT_READ) == 0, "mprotect");
}

static int none_check(void) {
    need(mprotect(base, count * 4096, PROT_READ) == 0, "mprotect");
    return filled(0, count);
}

// ---- deeds: what a command does to the memory

static void deed(char byte) {
    char *half = base + count / 2 * 4096;
    uint64_t size = count / 2 * 4096;
    switch (byte) {
        case 'u':
            need(munmap(half, size) == 0, "munmap");
            break;
        case 'm':
            need(mremap(half, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, base + 4 * count * 4096) != MAP_FAILED,
                 "mremap");
            break;
        case 'o': // the lower half comes to lie where the upper was
            need(mremap(base, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, half) != MAP_FAILED, "mremap");
            break;
        case 's':
            need(mremap(base, 2 * size, size, 0) != MAP_FAILED, "mremap");
            break;
        case 'd':
            need(madvise(half, size, MADV_DONTNEED) == 0, "madvise");
            break;
        case 'f':
            need(madvise(half, size, MADV_FREE) == 0, "madvise");
            break;
        case 'g':
            need(madvise(half, size, 102 /* MADV_GUARD_INSTALL */) == 0, "madvise");
            break;
        case 'h':
            need(mmap(half, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == half,
                 "mmap");
            break;
        case 'p':
            need(mprotect(base, 2 * size, PROT_NONE) == 0, "mprotect");
            need(mprotect(base, 2 * size, PROT_READ | PROT_WRITE) == 0, "mprotect");
            break;
        case 'k': {
            pid_t pid = fork();
            if (pid == 0) _exit(filled(0, count) ? 3 : 4);
            int status = 0;
            need(pid > 0 && waitpid(pid, &status, 0) == pid, "waitpid");
            if (!WIFEXITED(status) || WEXITSTATUS(status) != 3) trouble = 1;
            break;
        }
        case 'v': {
            pid_t pid = vfork();
            if (pid == 0) {
                execl("/bin/true", "true", NULL);
                _exit(9);
            }
            int status = 0;
            need(pid > 0 && waitpid(pid, &status, 0) == pid, "waitpid");
            if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) trouble = 1;
            break;
        }
        case 'x':
            execl("/proc/self/exe", "subject", "plain", "16", NULL);
            _exit(9);
        case 'e':
            _exit(7);
        case 'l':
            syscall(SYS_exit, 0); // the first thread alone
            break;
        default:
            _exit(95);
    }
}

// ---- join: threads on stacks in the region come and go, each dies holding a robust mutex that lies there too

enum { JOIN_STACK = 64 << 10, JOIN_SLOTS = 4 };

static void *dies_holding(void *mutex) {
    if (pthread_mutex_lock(mutex)) trouble = 1;
    return NULL;
}

static void *joiner(void *slot_) {
    char *slot = slot_;
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_t *mutex = (pthread_mutex_t *)(void *)slot; // on a page of its own
    for (;;) {
        pthread_mutex_init(mutex, &attr);
        pthread_t thread;
        pthread_attr_t how;
        pthread_attr_init(&how);
        pthread_attr_setstack(&how, slot + 4096, JOIN_STACK);
        errno = pthread_create(&thread, &how, dies_holding, mutex);
        need(errno == 0, "pthread_create");
        pthread_join(thread, NULL);
        if (pthread_mutex_lock(mutex) != EOWNERDEAD) trouble = 2;
        pthread_mutex_consistent(mutex);
        pthread_mutex_unlock(mutex);
        pthread_mutex_destroy(mutex);
        pthread_attr_destroy(&how);
        __atomic_fetch_add(beats, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void join_start(void) {
    plain_start();
    beats = word(0);
    *beats = 1;
    for (int i = 0; i < JOIN_SLOTS; i++) thread_with(joiner, base + 4096 + i * 2 * JOIN_STACK, 0);
}

// ---- forks: a thread forks all the time, a child lives for N/1000 ms

static void *forker(void *unused) {
    (void)unused;
    for (;;) {
        pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            usleep(20000);
            _exit(3);
        }
        need(pid > 0, "fork");
        int status;
        while (waitpid(-1, &status, WNOHANG) > 0)
            if (!WIFEXITED(status) || WEXITSTATUS(status) != 3) trouble = 3;
        ++*beats;
    }
    return NULL;
}

static void fork_start(void) {
    plain_start();
    beats = word(0);
    thread_with(forker, NULL, 0);
    while (*beats < subject_word(0) + 3) usleep(1000);
}

// ---- crowd: when told, N threads go over the same huge pages at once

static _Atomic int go;

static void futex_wait(int seen) {
    while (go == seen) syscall(SYS_futex, &go, FUTEX_WAIT_OP, seen, NULL, NULL, 0);
}

static void futex_go(char byte) {
    (void)byte;
    go++;
    syscall(SYS_futex, &go, FUTEX_WAKE_OP_, 1 << 30, NULL, NULL, 0);
}

static void *writer(void *index_) {
    uint64_t index = (uint64_t)(uintptr_t)index_;
    for (int seen = 0;; seen++) {
        futex_wait(seen);
        for (uint64_t page = 1; page < 8192; page += 64) word(page)[1 + index % 500] = (uint64_t)seen;
        __atomic_fetch_add(beats, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void crowd_start(void) {
    static uint64_t beat;
    beats = &beat;
    map(base, 8192 * 4096, PROT_READ | PROT_WRITE, 0);
    madvise(base, 8192 * 4096, MADV_HUGEPAGE);
    fill(0, 8192);
    for (uint64_t i = 0; i < count; i++) thread_with(writer, (void *)(uintptr_t)i, 32768);
}

static int crowd_check(void) {
    for (int i = 0; i < 20000 && *beats < count * (uint64_t)go; i++) usleep(1000);
    return *beats == count * (uint64_t)go;
}

// ---- freers: N threads, each lets go of a piece of the region when told

static void *freer(void *index_) {
    char *at = base + (uint64_t)(uintptr_t)index_ * 16 * 4096;
    futex_wait(0);
    need(munmap(at, 16 * 4096) == 0, "munmap");
    __atomic_fetch_add(beats, 1, __ATOMIC_RELAXED);
    for (;;) pause();
    return NULL;
}

static void free_start(void) {
    static uint64_t beat;
    beats = &beat;
    map(base, (count + 32768) * 16 * 4096, PROT_READ | PROT_WRITE, 0);
    madvise(base, count * 16 * 4096, MADV_NOHUGEPAGE);
    fill(0, count * 16 + 32768);
    for (uint64_t i = 0; i < count; i++) thread_with(freer, (void *)(uintptr_t)i, 32768);
}

static int free_check(void) {
    for (int i = 0; i < 10000 && *beats < count; i++) usleep(1000);
    return *beats == count && !trouble;
}

// ---- threads: N of them, in calls that a careless stop would end with EINTR

static void *sleeper(void *kind) {
    int epoll = epoll_create1(0);
    for (;;) {
        struct epoll_event event;
        if ((uintptr_t)kind % 3 == 0) {
            if (epoll_wait(epoll, &event, 1, -1) < 0) trouble = errno;
        } else if ((uintptr_t)kind % 3 == 1) {
            if (usleep(1000000) < 0) trouble = errno;
        } else {
            futex_wait(0);
        }
    }
    return NULL;
}

static void threads_start(void) {
    struct rlimit limit = {count + 100, count + 100};
    setrlimit(RLIMIT_NOFILE, &limit);
    map(base, 64 * 4096, PROT_READ | PROT_WRITE, 0);
    fill(0, 64);
    for (uint64_t i = 0; i < count; i++) thread_with(sleeper, (void *)(uintptr_t)i, 32768);
}

// ---- regions: N of them

static void regions_start(void) {
    for (uint64_t i = 0; i < count; i++) {
        char *at = base + i * 4 * 4096;
        map(at, 4 * 4096, i % 2 ? PROT_READ | PROT_WRITE : PROT_READ | PROT_WRITE | PROT_EXEC, 0);
        *(uint64_t *)(void *)(at + 4096) = i + 1;
    }
}

// ---- sparse: N GiB of which one page in each is there

static void sparse_start(void) {
    map(base, count << 30, PROT_READ | PROT_WRITE, MAP_NORESERVE);
    for (uint64_t i = 0; i < count; i++) *(uint64_t *)(void *)(base + (i << 30) + i * 4096) = i + 1;
}

// ---- coroutine: a thread whose stack is a small piece of a block that also holds its thread-local block, as a runtime with
// stacks of its own has it; right below lies what belongs to somebody else

enum { CORO_STACK = 2048 };

static int coroutine(void *stop_) {
    (void)stop_;
    struct timespec {
        long s, n;
    } nap = {0, 1000000};
    for (;;) {
        long ret;
        register long number __asm__("rax") = SYS_nanosleep;
        __asm__ volatile("syscall" : "=a"(ret) : "r"(number), "D"(&nap), "S"(0) : "rcx", "r11", "memory");
        (void)ret;
    }
    return 0;
}

static void coroutine_start(void) {
    plain_start();
    char *stack = base + count / 2 * 4096; // below it: pages in use
    static int tid;
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS |
                CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
    need(clone(coroutine, stack + CORO_STACK, flags, NULL, &tid, stack + 3 * 4096, &tid) > 0, "clone");
    memset(stack - 8192, 0x5a, 8192);
    usleep(10000);
}

static int coroutine_check(void) {
    char *stack = base + count / 2 * 4096;
    for (char *at = stack - 8192; at < stack; at++)
        if (*at != 0x5a) return 0;
    return 1;
}

// ---- filter: a second thread alone lives under a strict seccomp filter

static void *filtered(void *unused) {
    (void)unused;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_restart_syscall, 3, 0), // any stop may need it
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clock_nanosleep, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_nanosleep, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    need(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    need(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0, "seccomp");
    for (;;) {
        ++*beats;
        usleep(1000);
    }
    return NULL;
}

static void filter_start(void) {
    plain_start();
    static uint64_t beat;
    beats = &beat;
    thread_with(filtered, NULL, 0);
    while (*beats < 3) usleep(1000);
}

// ---- events: N descriptors that all look alike

static void events_start(void) {
    plain_start();
    struct rlimit limit = {count + 100, count + 100};
    setrlimit(RLIMIT_NOFILE, &limit);
    for (uint64_t i = 0; i < count; i++) need((i % 10 ? eventfd(0, 0) : dup(0)) >= 0, "eventfd");
}

// ---- leader: its first thread can be told to end, another goes on

static void *beater(void *unused) {
    (void)unused;
    for (;;) {
        ++*beats;
        usleep(1000);
    }
    return NULL;
}

static void leader_start(void) {
    plain_start();
    static uint64_t beat;
    beats = &beat;
    thread_with(beater, NULL, 0);
}

// ---- spawn: threads are born and end all the time

static void *brief(void *unused) { return unused; }

static void *spawner(void *unused) {
    (void)unused;
    for (;;) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, brief, NULL) == 0) pthread_join(thread, NULL);
        ++*beats;
    }
    return NULL;
}

static void spawn_start(void) {
    plain_start();
    static uint64_t beat;
    beats = &beat;
    thread_with(spawner, NULL, 0);
    thread_with(spawner, NULL, 0);
}

static void lowly_start(void) {
    plain_start();
    need(setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0, "setresuid");
    prctl(PR_SET_PDEATHSIG, SIGKILL); // the change of user took it away
}

static int plain_check(void) { return filled(0, count) && !trouble; }

static const struct mode {
    const char *name;
    void (*start)(void);
    void (*act)(char);
    int (*check)(void);
} modes[] = {
    {"stamp", stamp_start, nothing, beating},
    {"plain", plain_start, deed, nothing_wrong},
    {"huge", huge_start, nothing, plain_check},
    {"zeros", zeros_start, zeros_poke, nothing_wrong},
    {"none", none_start, nothing, none_check},
    {"join", join_start, nothing, beating},
    {"fork", fork_start, nothing, beating},
    {"crowd", crowd_start, futex_go, crowd_check},
    {"free", free_start, futex_go, free_check},
    {"threads", threads_start, nothing, nothing_wrong},
    {"regions", regions_start, nothing, nothing_wrong},
    {"sparse", sparse_start, nothing, nothing_wrong},
    {"coroutine", coroutine_start, nothing, coroutine_check},
    {"filter", filter_start, nothing, beating},
    {"events", events_start, nothing, nothing_wrong},
    {"leader", leader_start, deed, beating},
    {"spawn", spawn_start, nothing, beating},
    {"lowly", lowly_start, nothing, plain_check},
};

int main(int argc, char **argv) {
    need(argc == 3, "usage: subject MODE N");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_DUMPABLE, 1);
    count = strtoull(argv[2], NULL, 0);
    const struct mode *mode = NULL;
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(modes[i].name, argv[1])) mode = &modes[i];
    need(mode != NULL, "mode");
    mode->start();
    need(write(1, "r", 1) == 1, "write");
    for (char byte; read(0, &byte, 1) == 1;) {
        if (byte == 'q') _exit(0);
        if (byte == 'c')
            need(write(1, mode->check() ? "." : "!", 1) == 1, "write");
        else
            mode->act(byte);
    }
    return 0;
}
