// Counts every queued signal, by handler in any of several threads and by sigwaitinfo in one. `--send PID` is the other
// end: it sends N of each kind, or until SIGTERM, and prints what it sent. Realtime signals queue, so none may be missing
// and none may come twice.
#include "target.h"

#include <signal.h>

static struct {
    _Atomic uint64_t handled;
    _Atomic uint64_t handled_sum;
    _Atomic uint64_t waited;
    _Atomic uint64_t waited_sum;
    _Atomic uint64_t work;
    _Atomic uint64_t slept;
} storm;

static void on_signal(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)context;
    int saved = errno;
    atomic_fetch_add(&storm.handled, 1);
    atomic_fetch_add(&storm.handled_sum, (uint64_t)info->si_value.sival_int);
    errno = saved;
}

static void *wait_for_ever(void *unused) {
    (void)unused;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 2);
    for (;;) {
        siginfo_t info;
        int number = sigwaitinfo(&set, &info);
        if (number == SIGRTMIN + 2) {
            atomic_fetch_add(&storm.waited, 1);
            atomic_fetch_add(&storm.waited_sum, (uint64_t)info.si_value.sival_int);
        } else if (errno != EINTR) {
            problem("sigwaitinfo: errno %d", errno);
        }
    }
    return NULL;
}

static void *work_for_ever(void *unused) {
    (void)unused;
    for (;;) {
        for (volatile int i = 0; i < 2000; i++) {}
        atomic_fetch_add(&storm.work, 1);
        pause_us(500);
    }
    return NULL;
}

static void *sleep_for_ever(void *unused) { // a handler interrupts it: EINTR is right here; anything else is not
    (void)unused;
    for (;;) {
        struct timespec t = {0, 20000000};
        if (nanosleep(&t, &t) != 0 && errno != EINTR) {
            problem("nanosleep: errno %d", errno);
        }
        atomic_fetch_add(&storm.slept, 1);
    }
    return NULL;
}

static volatile sig_atomic_t enough;

static void on_term(int number) {
    (void)number;
    enough = 1;
}

static int send_all(pid_t target, uint64_t n, uint64_t pace_us) {
    uint64_t sum = 0;
    uint64_t sent = 0;
    signal(SIGTERM, on_term);
    for (uint64_t i = 1; i <= n && !enough; i++) {
        for (int kind = 1; kind <= 2; kind++) {
            union sigval value = {.sival_int = (int)i};
            while (sigqueue(target, SIGRTMIN + kind, value) != 0) {
                if (errno != EAGAIN) { // EAGAIN: its queue is full for now
                    fprintf(stderr, "sigqueue: %s\n", strerror(errno));
                    return 1;
                }
                pause_us(1000);
            }
        }
        sum += i;
        sent++;
        if (pace_us && i % 8 == 0) {
            pause_us(pace_us * 8);
        }
    }
    printf("{\"sent\": %lu, \"sum\": %lu}\n", sent, sum);
    return 0;
}

static void answer(const char *command, char *out, size_t size) {
    (void)command;
    snprintf(out, size,
             "{\"problems\": %lu, \"first\": \"%s\", \"handled\": %lu, \"handled_sum\": %lu, \"waited\": %lu, "
             "\"waited_sum\": %lu, \"work\": %lu, \"slept\": %lu}",
             atomic_load(&problems.count), problems.first, atomic_load(&storm.handled), atomic_load(&storm.handled_sum),
             atomic_load(&storm.waited), atomic_load(&storm.waited_sum), atomic_load(&storm.work),
             atomic_load(&storm.slept));
}

int main(int argc, char **argv) {
    pid_t target = (pid_t)number(argc, argv, "--send", 0);
    if (target) {
        return send_all(target, number(argc, argv, "--count", 1000), number(argc, argv, "--pace", 100));
    }
    int listener = control_open(option(argc, argv, "--control", "/tmp/storm.control"));
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN + 1, &action, NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_t thread;
    if (pthread_create(&thread, NULL, wait_for_ever, NULL) || pthread_create(&thread, NULL, work_for_ever, NULL) ||
        pthread_create(&thread, NULL, work_for_ever, NULL) || pthread_create(&thread, NULL, sleep_for_ever, NULL)) {
        return 73;
    }
    ready();
    control_serve(listener, answer);
}
