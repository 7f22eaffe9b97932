// One thread in each kind of blocking system call. None may return before it is told to: not by EINTR, not early.
// `check` tells which returned; `release` makes every one return the proper way and says with what.
#include "target.h"

#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/syscall.h>

struct waiter {
    const char *name;
    long (*wait)(struct waiter *);
    void (*release)(struct waiter *);
    long expected;
    pthread_t thread;
    _Atomic int tid;
    _Atomic int returned;
    long result;
    int error;
    int fds[2];
    int id;
    uint64_t due_ns;
    _Atomic uint32_t word;
};

static void fail_if(int bad, const char *what) {
    if (bad) {
        problem("%s: errno %d", what, errno);
    }
}

static void poke(struct waiter *w) { fail_if(write(w->fds[1], "12345678", 8) != 8, w->name); }

static long wait_read(struct waiter *w) {
    char text[8];
    return read(w->fds[0], text, 8);
}

static long wait_poll(struct waiter *w) {
    struct pollfd p = {.fd = w->fds[0], .events = POLLIN};
    return poll(&p, 1, 3600 * 1000);
}

static long wait_ppoll(struct waiter *w) {
    struct pollfd p = {.fd = w->fds[0], .events = POLLIN};
    return ppoll(&p, 1, NULL, NULL);
}

static long wait_select(struct waiter *w) {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(w->fds[0], &set);
    struct timeval t = {3600, 0};
    return select(w->fds[0] + 1, &set, NULL, NULL, &t);
}

static long wait_epoll(struct waiter *w) {
    struct epoll_event event;
    return epoll_wait(w->id, &event, 1, 3600 * 1000);
}

static long wait_epoll_for_ever(struct waiter *w) {
    struct epoll_event event;
    return epoll_wait(w->id, &event, 1, -1);
}

static long wait_futex(struct waiter *w) { return syscall(SYS_futex, &w->word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0); }

static long wait_futex_timed(struct waiter *w) {
    struct timespec t = {3600, 0};
    return syscall(SYS_futex, &w->word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
}

static void wake_futex(struct waiter *w) {
    atomic_store(&w->word, 1);
    fail_if(syscall(SYS_futex, &w->word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0) != 1, w->name);
}

static uint64_t nap_s = 6;
static int patient; // as a program has to be with calls that the kernel ends with EINTR at any stop (signal(7))

static long wait_nap(struct waiter *w) { // must last as long as asked, whatever stops it
    struct timespec t = {(time_t)nap_s, 0};
    w->due_ns = now_ns(CLOCK_MONOTONIC) + nap_s * 1000000000U;
    long result = syscall(SYS_nanosleep, &t, &t);
    if (now_ns(CLOCK_MONOTONIC) < w->due_ns) {
        problem("%s: woke %lu us early", w->name, (w->due_ns - now_ns(CLOCK_MONOTONIC)) / 1000);
    }
    return result;
}

static long wait_nap_until(struct waiter *w) {
    w->due_ns = now_ns(CLOCK_MONOTONIC) + nap_s * 1000000000U;
    struct timespec t = {(time_t)(w->due_ns / 1000000000U), (long)(w->due_ns % 1000000000U)};
    long result = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    if (now_ns(CLOCK_MONOTONIC) < w->due_ns) {
        problem("%s: woke early", w->name);
    }
    return result;
}

static long wait_sem(struct waiter *w) {
    struct sembuf op = {.sem_num = 0, .sem_op = -1, .sem_flg = 0};
    return semop(w->id, &op, 1);
}

static void post_sem(struct waiter *w) {
    struct sembuf op = {.sem_num = 0, .sem_op = 1, .sem_flg = 0};
    fail_if(semop(w->id, &op, 1) != 0, w->name);
}

static long wait_signal(struct waiter *w) {
    (void)w;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 3);
    int got = sigwaitinfo(&set, NULL);
    return got == SIGRTMIN + 3 ? 1 : -1;
}

static long wait_signal_timed(struct waiter *w) {
    (void)w;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 4);
    struct timespec t = {3600, 0};
    return sigtimedwait(&set, NULL, &t) == SIGRTMIN + 4 ? 1 : -1;
}

static void send_first(struct waiter *w) { pthread_kill(w->thread, SIGRTMIN + 3); }
static void send_second(struct waiter *w) { pthread_kill(w->thread, SIGRTMIN + 4); }

static void on_signal(int number) { (void)number; }

static long wait_pause(struct waiter *w) { // pause ends with EINTR once a handler has run, and only then
    (void)w;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    return pause() == -1 && errno == EINTR ? 1 : 0;
}

static void end_pause(struct waiter *w) { pthread_kill(w->thread, SIGUSR2); }

static long wait_accept(struct waiter *w) {
    int fd = accept(w->fds[0], NULL, NULL);
    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0 ? 1 : -1;
}

static void knock(struct waiter *w) {
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    fail_if(getsockname(w->fds[0], (struct sockaddr *)&address, &size) != 0, "getsockname");
    fail_if(connect(fd, (struct sockaddr *)&address, size) != 0, "connect");
    close(fd);
}

static long wait_recv(struct waiter *w) {
    char text[8];
    return recv(w->fds[0], text, 8, 0);
}

static struct waiter waiters[] = {
    {.name = "read", .wait = wait_read, .release = poke, .expected = 8},
    {.name = "poll", .wait = wait_poll, .release = poke, .expected = 1},
    {.name = "ppoll", .wait = wait_ppoll, .release = poke, .expected = 1},
    {.name = "select", .wait = wait_select, .release = poke, .expected = 1},
    {.name = "epoll_wait", .wait = wait_epoll, .release = poke, .expected = 1},
    {.name = "epoll_wait for ever", .wait = wait_epoll_for_ever, .release = poke, .expected = 1},
    {.name = "futex", .wait = wait_futex, .release = wake_futex, .expected = 0},
    {.name = "futex timed", .wait = wait_futex_timed, .release = wake_futex, .expected = 0},
    {.name = "sigwaitinfo", .wait = wait_signal, .release = send_first, .expected = 1},
    {.name = "sigtimedwait", .wait = wait_signal_timed, .release = send_second, .expected = 1},
    {.name = "pause", .wait = wait_pause, .release = end_pause, .expected = 1},
    {.name = "accept", .wait = wait_accept, .release = knock, .expected = 1},
    {.name = "recv", .wait = wait_recv, .release = poke, .expected = 8},
    {.name = "nanosleep", .wait = wait_nap, .release = NULL, .expected = 0},
    {.name = "clock_nanosleep", .wait = wait_nap_until, .release = NULL, .expected = 0},
    {.name = "semop", .wait = wait_sem, .release = post_sem, .expected = 0},
};
enum { WAITERS = sizeof waiters / sizeof *waiters };

static void *run(void *argument) {
    struct waiter *w = argument;
    atomic_store(&w->tid, (int)syscall(SYS_gettid));
    int ends_at_a_stop = w->wait == wait_epoll || w->wait == wait_epoll_for_ever || w->wait == wait_signal ||
                         w->wait == wait_signal_timed || w->wait == wait_sem;
    do w->result = w->wait(w);
    while (patient && ends_at_a_stop && w->result == -1 && errno == EINTR);
    w->error = errno;
    atomic_store(&w->returned, 1);
    return NULL;
}

// A thread counts as blocked when the kernel says that it sleeps in a call.
static int blocked(struct waiter *w) {
    char path[64];
    char text[256] = "";
    snprintf(path, sizeof path, "/proc/self/task/%d/syscall", atomic_load(&w->tid));
    FILE *file = fopen(path, "re");
    if (!file) {
        return 0;
    }
    char *line = fgets(text, sizeof text, file);
    fclose(file);
    return line && strncmp(text, "running", 7) != 0 && text[0] != '-';
}

static void answer(const char *command, char *out, size_t size) {
    for (int i = 0; i < WAITERS; i++) { // who was woken for a moment is back in its call, or has returned
        struct waiter *w = &waiters[i];
        while (atomic_load(&w->tid) && !atomic_load(&w->returned) && !blocked(w)) {
            pause_us(500);
        }
    }
    if (strcmp(command, "release") == 0) {
        for (int i = 0; i < WAITERS; i++) {
            struct waiter *w = &waiters[i];
            if (w->release && !atomic_load(&w->returned) && atomic_load(&w->tid)) {
                w->release(w);
            }
        }
        for (int i = 0; i < WAITERS; i++) {
            struct waiter *w = &waiters[i];
            if (!atomic_load(&w->tid)) {
                continue;
            }
            if (!w->release && !atomic_load(&w->returned) && w->due_ns > now_ns(CLOCK_MONOTONIC) + 10000000000U) {
                continue; // a long nap: that it goes on is all that is asked
            }
            pthread_join(w->thread, NULL);
            if (w->wait == wait_sem) {
                semctl(w->id, 0, IPC_RMID);
            }
            if (w->result != w->expected) {
                problem("%s returned %ld, errno %d", w->name, w->result, w->error);
            }
        }
    }
    int n = snprintf(out, size, "{\"pid\": %d, \"returned\": {", getpid());
    int first = 1;
    for (int i = 0; i < WAITERS; i++) {
        struct waiter *w = &waiters[i];
        if (atomic_load(&w->returned)) {
            n += snprintf(out + n, size - (size_t)n, "%s\"%s\": [%ld, %d]", first ? "" : ", ", w->name, w->result,
                          w->error);
            first = 0;
        }
    }
    snprintf(out + n, size - (size_t)n, "}, \"problems\": %lu, \"first\": \"%s\"}", atomic_load(&problems.count),
             problems.first);
}

int main(int argc, char **argv) {
    const char *control = option(argc, argv, "--control", "/tmp/blocked.control");
    int listener = control_open(control);
    const char *only = option(argc, argv, "--only", "");
    int with_semaphore = (int)number(argc, argv, "--semaphore", 0);
    patient = (int)number(argc, argv, "--patient", 0);
    nap_s = number(argc, argv, "--nap", nap_s); // seconds
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR2, &action, NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGRTMIN + 3);
    sigaddset(&set, SIGRTMIN + 4);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    for (int i = 0; i < WAITERS; i++) {
        struct waiter *w = &waiters[i];
        if (*only && strcmp(only, w->name) != 0) {
            continue;
        }
        if (w->wait == wait_sem) {
            if (!with_semaphore) {
                continue; // System V semaphores outlive us: only where the test removes them
            }
            w->id = semget(IPC_PRIVATE, 1, 0600);
            MUST(w->id);
        } else if (w->wait == wait_accept) {
            w->fds[0] = socket(AF_UNIX, SOCK_STREAM, 0);
            struct sockaddr_un address = {.sun_family = AF_UNIX};
            snprintf(address.sun_path, sizeof address.sun_path, "%s.accept", control);
            MUST(bind(w->fds[0], (struct sockaddr *)&address, sizeof address));
            MUST(listen(w->fds[0], 1));
        } else if (w->wait == wait_recv) {
            MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, w->fds));
        } else {
            MUST(pipe(w->fds));
        }
        if (w->wait == wait_epoll || w->wait == wait_epoll_for_ever) {
            w->id = epoll_create1(0);
            struct epoll_event event = {.events = EPOLLIN};
            MUST(epoll_ctl(w->id, EPOLL_CTL_ADD, w->fds[0], &event));
        }
        if (pthread_create(&w->thread, NULL, run, w) != 0) {
            return 73;
        }
    }
    for (int i = 0; i < WAITERS; i++) {
        while (waiters[i].thread && !blocked(&waiters[i])) {
            pause_us(500);
        }
    }
    ready();
    control_serve(listener, answer);
}
