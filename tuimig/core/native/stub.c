// Makes the stub: the processes, their namespaces, and what they report back. See stub_child.c for the other side.
#include "stub.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "stub_internal.h"
#include "util.h"

static const char *const STEP_CALL[] = {
    [TM_STEP_NONE] = "stub",        [TM_STEP_CLONE] = "clone3",    [TM_STEP_MOUNT] = "mount",
    [TM_STEP_INIT] = "execveat",    [TM_STEP_LIMIT] = "prlimit64", [TM_STEP_PLACE] = "dup3",
    [TM_STEP_UFFD] = "userfaultfd", [TM_STEP_SCRATCH] = "mmap",    [TM_STEP_SETUP] = "setup",
};

static int child_failure(struct tm_stub *stub, const struct tm_stub_spec *spec, struct tm_error *error) {
    const struct tm_stub_shared *shared = stub->shared;
    int err = shared->err;
    const char *call = STEP_CALL[shared->step];
    switch (shared->step) {
        case TM_STEP_CLONE:
            if (err == EEXIST) {
                return tm_error_set(error, TM_SYS, err, call, "process id %d is taken", spec->pid);
            }
            return tm_error_set(error, tm_error_code(err), err, call, "cannot make a process with id %d", spec->pid);
        case TM_STEP_MOUNT:
            return tm_error_set(error, tm_error_code(err), err, call, "cannot mount /proc for the new PID namespace");
        case TM_STEP_INIT:
            return tm_error_set(error, TM_SYS, err, call, "cannot execute tuimig-init");
        case TM_STEP_LIMIT:
            return tm_error_set(error, TM_SYS, err, call, "cannot set the limit of open files");
        case TM_STEP_PLACE:
            return tm_error_set(error, TM_SYS, err, call,
                                "cannot place descriptor %d (is the limit of open files too low?)",
                                spec->places[shared->index].number);
        case TM_STEP_UFFD:
            return tm_error_set(error, TM_PRIVILEGE, err, call, "cannot make a userfaultfd for the copy");
        case TM_STEP_SCRATCH:
            return tm_error_set(error, TM_SYS, err, call, "no room for the scratch pages");
        case TM_STEP_SETUP:
            stub->info.failed_setup = shared->index;
            return tm_error_set(error, TM_SYS, err, call, "setup call %u failed", shared->index);
        default:
            return tm_error_set(error, TM_SYS, err, call, "the new process ended while it was made");
    }
}

static int is_dead(int pidfd) {
    struct pollfd poll_pid = {.fd = pidfd, .events = POLLIN};
    return poll(&poll_pid, 1, 0) > 0;
}

// Waits until *word is no longer `value`, a failure is published, or the process that should change it is dead.
static int wait_child(struct tm_stub *stub, _Atomic uint32_t *word, uint32_t value, int pidfd) {
    struct timespec slice = {.tv_nsec = 20 * 1000 * 1000};
    while (atomic_load(word) == value) {
        if (atomic_load(&stub->shared->state) == TM_STUB_FAILED) {
            return -1;
        }
        if (is_dead(pidfd)) {
            return atomic_load(word) == value ? -1 : 0;
        }
        syscall(SYS_futex, word, FUTEX_WAIT, value, &slice, 0, 0);
    }
    return atomic_load(&stub->shared->state) == TM_STUB_FAILED ? -1 : 0;
}

// The id, in our namespace, of the process that a pidfd stands for.
static int pid_of(int pidfd) {
    char path[64];
    char line[128];
    int pid = -1;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
    FILE *file = fopen(path, "re");
    if (!file) {
        return -1;
    }
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "Pid:\t%d", &pid) == 1) {
            break;
        }
    }
    fclose(file);
    return pid;
}

static int take_stub(struct tm_stub *stub, int maker_pidfd, int by_init, struct tm_error *error) {
    struct tm_stub_shared *shared = stub->shared;
    if (by_init) {
        stub->info.pidfd = (int)syscall(SYS_pidfd_getfd, maker_pidfd, shared->main_fd, 0);
        if (stub->info.pidfd < 0) {
            return tm_error_errno(error, "pidfd_getfd", "cannot take the new process from its namespace's init");
        }
        stub->info.pid = pid_of(stub->info.pidfd);
    } else {
        stub->info.pid = shared->pid;
        stub->info.pidfd = (int)syscall(SYS_pidfd_open, shared->pid, 0);
    }
    if (stub->info.pidfd < 0 || stub->info.pid <= 0) {
        return tm_error_errno(error, "pidfd_open", "cannot hold the new process");
    }
    return 0;
}

static int take_userfaultfd(struct tm_stub *stub, const struct tm_stub_spec *spec, struct tm_error *error) {
    if (!spec->uffd_features) {
        return 0;
    }
    stub->info.uffd = (int)syscall(SYS_pidfd_getfd, stub->info.pidfd, spec->uffd_number, 0);
    if (stub->info.uffd < 0) {
        return tm_error_errno(error, "pidfd_getfd", "cannot take the copy's userfaultfd");
    }
    return 0;
}

static int spawn(struct tm_stub *stub, const struct tm_stub_spec *spec, struct tm_error *error) {
    int maker_pidfd = -1;
    int by_init = spec->new_namespace && spec->pid != 1;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); // the children start with everything blocked
    struct clone_args args = {
        .flags = CLONE_PIDFD | (by_init ? CLONE_NEWPID | CLONE_NEWNS : 0),
        .pidfd = (uint64_t)(uintptr_t)&maker_pidfd,
        .exit_signal = SIGCHLD,
    };
    long maker = TM_RAW(SYS_clone3, &args, sizeof args, 0, 0, 0, 0);
    if (maker == 0) {
        tm_stub_maker(spec, stub->shared);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (maker < 0) {
        return tm_error_set(error, tm_error_code((int)-maker), (int)-maker, "clone3",
                            by_init ? "cannot make a PID namespace" : "cannot make a process");
    }
    int failed = wait_child(stub, &stub->shared->made, TM_MADE_NOT, maker_pidfd);
    int code = failed ? child_failure(stub, spec, error) : take_stub(stub, maker_pidfd, by_init, error);
    if (by_init) {
        stub->info.init_pid = (int32_t)maker;
        stub->info.init_pidfd = maker_pidfd;
    } else {
        if (code) {
            kill((pid_t)maker, SIGKILL);
        }
        waitid(P_PID, (id_t)maker, &(siginfo_t){0}, WEXITED | __WALL);
        close(maker_pidfd);
        stub->info.pid = stub->shared->pid; // our child even where it failed before we could take it
    }
    if (code) {
        return code;
    }
    if (wait_child(stub, &stub->shared->state, TM_STUB_WAIT, stub->info.pidfd)) {
        return child_failure(stub, spec, error);
    }
    stub->info.time_errno = stub->shared->time_err;
    code = take_userfaultfd(stub, spec, error);
    code = code ? code : tm_stub_attach(stub, error);
    // only now: until ptrace holds the stub, init's end with ours is what ends the stub with us
    atomic_store(&stub->shared->made, TM_MADE_TAKEN);
    syscall(SYS_futex, &stub->shared->made, FUTEX_WAKE, INT_MAX, 0, 0, 0);
    return code;
}

int tm_stub_spawn(const struct tm_stub_spec *spec, struct tm_stub **out, struct tm_stub_info *info,
                  struct tm_error *error) {
    struct tm_stub *stub = calloc(1, sizeof *stub);
    if (!stub) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "calloc", "no memory for the stub");
    }
    stub->info.pidfd = stub->info.init_pidfd = stub->info.uffd = stub->mem_fd = -1;
    stub->scratch = spec->scratch;
    stub->shared = mmap(NULL, sizeof *stub->shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int code;
    if (stub->shared == MAP_FAILED) {
        stub->shared = NULL;
        code = tm_error_errno(error, "mmap", "no memory to share with the stub");
    } else {
        code = spawn(stub, spec, error);
    }
    *info = stub->info;
    if (code) {
        tm_stub_destroy(stub);
        return code;
    }
    *out = stub;
    return 0;
}

void tm_stub_info(const struct tm_stub *stub, struct tm_stub_info *info) { *info = stub->info; }

int tm_stub_take_uffd(struct tm_stub *stub) {
    int uffd = stub->info.uffd;
    stub->info.uffd = -1;
    return uffd;
}

static void close_fd(int fd) {
    if (fd >= 0) {
        close(fd);
    }
}

void tm_stub_destroy(struct tm_stub *stub) {
    tm_stub_pin(stub, 0);
    if (!stub->released) {
        tm_stub_kill(stub);
    }
    close_fd(stub->info.pidfd);
    close_fd(stub->info.init_pidfd);
    close_fd(stub->info.uffd);
    close_fd(stub->mem_fd);
    if (stub->shared) {
        munmap(stub->shared, sizeof *stub->shared);
    }
    free(stub->threads);
    free(stub);
}
