// States of the process as a whole: signals, timers, identity, limits, and what /proc says about it.
#include "states.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>

// ---- signal actions, and signals that wait

struct kernel_action { // as rt_sigaction has it
    uint64_t handler, flags, restorer, mask;
};

static struct kernel_action actions[65];
static _Atomic int handled;

static void handler(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)context;
    atomic_fetch_add(&handled, info->si_value.sival_int);
}

// The flags of a default or ignored signal mean nothing, but for those of SIGCHLD.
static struct kernel_action action_of(int number) {
    const uint64_t child_flags = SA_NOCLDWAIT | SA_NOCLDSTOP;
    struct kernel_action action = {0};
    syscall(SYS_rt_sigaction, number, NULL, &action, 8);
    if (action.handler <= 1) {
        action.flags &= number == SIGCHLD ? child_flags : 0;
        action.restorer = 0;
        action.mask = 0;
    }
    return action;
}

static void actions_make(void) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER};
    sigaddset(&action.sa_mask, SIGHUP);
    sigaddset(&action.sa_mask, SIGRTMAX);
    sigaction(SIGRTMIN + 8, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTTOU, SIG_IGN);
    struct sigaction child = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT | SA_NOCLDSTOP};
    sigaction(SIGCHLD, &child, NULL);
    for (int i = 1; i <= 64; i++) {
        actions[i] = action_of(i);
    }
}

static void actions_check(void) {
    for (int i = 1; i <= 64; i++) {
        struct kernel_action now = action_of(i);
        EXPECT(memcmp(&now, &actions[i], sizeof now) == 0, "action of signal %d", i);
    }
    union sigval value = {.sival_int = 11};
    sigqueue(getpid(), SIGRTMIN + 8, value);
    for (int i = 0; i < 1000 && atomic_load(&handled) != 11; i++) {
        pause_us(1000);
    }
    EXPECT(atomic_load(&handled) == 11, "the handler did not run");
}

static void pending_make(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGRTMIN + 9);
    sigaddset(&set, SIGRTMIN + 10);
    sigprocmask(SIG_BLOCK, &set, NULL);
    for (int i = 1; i <= 3; i++) {
        union sigval value = {.sival_int = i * 100};
        MUST(pthread_sigqueue(pthread_self(), SIGRTMIN + 9, value));
    }
    MUST((int)syscall(SYS_tgkill, getpid(), getpid(), SIGUSR2));
}

static void pending_check(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 9);
    struct timespec none = {0, 0};
    for (int i = 1; i <= 3; i++) {
        siginfo_t info;
        memset(&info, 0, sizeof info);
        EXPECT(sigtimedwait(&set, &info, &none) == SIGRTMIN + 9, "queued signal %d is gone", i);
        EXPECT(info.si_value.sival_int == i * 100 && info.si_code == SI_QUEUE, "queued signal %d carries %d", i,
               info.si_value.sival_int);
    }
    EXPECT(sigtimedwait(&set, NULL, &none) == -1, "a queued signal too many");
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    EXPECT(sigtimedwait(&set, NULL, &none) == SIGUSR2, "the pending signal is gone");
}

// ---- interval timers

static void itimers_make(void) {
    struct itimerval real = {.it_value = {5000, 0}, .it_interval = {11, 500}};
    struct itimerval virtual = {.it_value = {4000, 0}, .it_interval = {3, 0}};
    MUST(setitimer(ITIMER_REAL, &real, NULL));
    MUST(setitimer(ITIMER_VIRTUAL, &virtual, NULL));
}

static void itimers_check(void) {
    struct itimerval t;
    MUST(getitimer(ITIMER_REAL, &t));
    EXPECT(t.it_interval.tv_sec == 11 && t.it_interval.tv_usec == 500, "interval %ld.%06ld", t.it_interval.tv_sec,
           t.it_interval.tv_usec);
    EXPECT(t.it_value.tv_sec > 3000 && t.it_value.tv_sec <= 5000, "%ld s left", t.it_value.tv_sec);
    MUST(getitimer(ITIMER_VIRTUAL, &t));
    EXPECT(t.it_interval.tv_sec == 3 && t.it_value.tv_sec > 3000, "virtual timer: %ld s left", t.it_value.tv_sec);
}

// ---- what /proc says: arguments, environment, auxiliary vector, executable, name, credentials, limits

static const char *const files[] = {
    "/proc/self/cmdline",       "/proc/self/environ",       "/proc/self/auxv",
    "/proc/self/comm",          "/proc/self/limits",        "/proc/self/coredump_filter",
    "/proc/self/oom_score_adj", "/proc/self/timerslack_ns", "/proc/self/personality"};
enum { FILES = sizeof files / sizeof *files };
static char *texts[FILES];
static ssize_t lengths[FILES];
static char exe[512], cwd[512], credentials[2048];

// Lines of status that belong to the process, not to the moment.
static void credentials_read(char *out, size_t size) {
    static const char *const keys[] = {"Umask:",  "Uid:",    "Gid:",    "Groups:",     "CapInh:",  "CapPrm:",
                                       "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:", "Seccomp:", "THP_enabled:"};
    static char text[8192];
    slurp("/proc/thread-self/status", text, sizeof text);
    out[0] = 0;
    char *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
            if (strncmp(line, keys[i], strlen(keys[i])) == 0) {
                snprintf(out + strlen(out), size - strlen(out), "%s; ", line);
            }
        }
    }
}

static void proc_make(void) {
    prctl(PR_SET_NAME, "renamed leader");
    prctl(PR_SET_TIMERSLACK, 70000, 0, 0, 0);
    umask(027);
    if (chdir(states_directory) != 0) {
        wrong("chdir: errno %d", errno);
    }
    struct rlimit files_limit = {900, 1000};
    struct rlimit core = {0, 0};
    setrlimit(RLIMIT_NOFILE, &files_limit);
    setrlimit(RLIMIT_CORE, &core);
    for (int i = 0; i < FILES; i++) {
        texts[i] = malloc(65536);
        lengths[i] = slurp(files[i], texts[i], 65536);
    }
    if (!readlink("/proc/self/exe", exe, sizeof exe - 1) || !getcwd(cwd, sizeof cwd)) {
        wrong("exe or cwd: errno %d", errno);
    }
    credentials_read(credentials, sizeof credentials);
}

static void proc_check(void) {
    char *text = malloc(65536);
    for (int i = 0; i < FILES; i++) {
        ssize_t length = slurp(files[i], text, 65536);
        EXPECT(length == lengths[i] && (length < 0 || memcmp(text, texts[i], (size_t)length) == 0),
               "%s: %zd bytes, were %zd: %.80s, was %.80s", files[i], length, lengths[i], text, texts[i]);
    }
    free(text);
    char now[2048] = "";
    ssize_t n = readlink("/proc/self/exe", now, sizeof now - 1);
    EXPECT(n > 0 && strcmp(now, exe) == 0, "exe is %s", now);
    EXPECT(getcwd(now, sizeof now) && strcmp(now, cwd) == 0, "cwd is %s", now);
    credentials_read(now, sizeof now);
    EXPECT(strcmp(now, credentials) == 0, "%.140s; was %.140s", now, credentials);
    mode_t mask = umask(0);
    umask(mask);
    EXPECT(mask == 027, "umask %o", mask);
}

// ---- scheduling and process control

static cpu_set_t affinity;

static void control_make(void) {
    CPU_ZERO(&affinity);
    CPU_SET(0, &affinity);
    sched_setaffinity(0, sizeof affinity, &affinity);
    MUST(setpriority(PRIO_PROCESS, 0, 3));
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_DUMPABLE, 0);
}

static void control_check(void) {
    cpu_set_t now;
    sched_getaffinity(0, sizeof now, &now);
    EXPECT(CPU_EQUAL(&now, &affinity), "affinity");
    errno = 0;
    EXPECT(getpriority(PRIO_PROCESS, 0) == 3, "nice %d", getpriority(PRIO_PROCESS, 0));
    int value = 0;
    prctl(PR_GET_CHILD_SUBREAPER, &value);
    EXPECT(value == 1, "not a subreaper");
    EXPECT(prctl(PR_GET_DUMPABLE) == 0, "dumpable");
}

static uint64_t monotonic_before, realtime_before;

static void clocks_make(void) {
    monotonic_before = now_ns(CLOCK_MONOTONIC);
    realtime_before = now_ns(CLOCK_REALTIME);
}

static void clocks_check(
    void) { // the copy's monotonic clock goes on from T0: it cannot be ahead of the wall clock's way
    uint64_t monotonic = now_ns(CLOCK_MONOTONIC) - monotonic_before;
    uint64_t real = now_ns(CLOCK_REALTIME) - realtime_before;
    EXPECT((int64_t)monotonic >= 0, "monotonic time went back by %ld us", -(int64_t)monotonic / 1000);
    EXPECT(monotonic < real + 2000000000U, "monotonic %lu ms, real %lu ms", monotonic / 1000000, real / 1000000);
}

struct state process_states[] = {
    {.name = "actions", .make = actions_make, .check = actions_check},
    {.name = "pending", .make = pending_make, .check = pending_check},
    {.name = "itimers", .make = itimers_make, .check = itimers_check},
    {.name = "proc", .make = proc_make, .check = proc_check},
    {.name = "clocks", .make = clocks_make, .check = clocks_check},
    {.name = "control", .make = control_make, .check = control_check},
    {.name = NULL},
};
