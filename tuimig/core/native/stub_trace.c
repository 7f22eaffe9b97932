// Holds the stub by ptrace: seize it, wait for its stops, give its threads their final state and let go, or end it.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel.h"
#include "stub_internal.h"
#include "util.h"

enum {
    LOOK_TURNS = 128,
    SPIN_TURNS = 2000,
};

static int killed(struct tm_error *error, int32_t tid) {
    int code = tm_error_set(error, TM_GONE, 0, "waitpid", "the stub was killed while it was built");
    error->tid = tid;
    return code;
}

static int leader_is_dead(const struct tm_stub *stub) {
    char path[32], text[128] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", stub->info.pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return 1;
    }
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    const char *state = size > 0 ? strrchr(text, ')') : NULL; // the name before it may hold anything
    return !state || state[2] == 'Z' || state[2] == 'X';
}

// The kernel reports a leader's end only once its other traced threads have been reaped, also one that was killed as it was
// made. So waiting for the leader alone would hang for ever if something kills the stub: look now and then.
static pid_t wait_leader(const struct tm_stub *stub, int *status) {
    for (uint32_t turn = 1;; turn++) {
        pid_t got = waitpid(stub->info.pid, status, __WALL | WNOHANG);
        if (got) {
            return got;
        }
        if (turn % LOOK_TURNS == 0 && leader_is_dead(stub)) {
            *status = 0;
            return stub->info.pid;
        }
        if (turn < SPIN_TURNS) {
            sched_yield(); // it runs on this processor
        } else {
            usleep(100);
        }
    }
}

// Waits for the next stop of one thread. *stop: signal and event, as in waitpid's status.
int tm_stub_wait(const struct tm_stub *stub, int32_t tid, int *stop, struct tm_error *error) {
    int status;
    pid_t got;
    do {
        got = tid == stub->info.pid ? wait_leader(stub, &status) : waitpid(tid, &status, __WALL);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        return tm_error_errno(error, "waitpid", "lost thread %d of the stub", tid);
    }
    if (!WIFSTOPPED(status)) {
        return killed(error, tid);
    }
    *stop = status >> 8;
    return 0;
}

// A failed ptrace request: a thread that is not there any more was killed.
int tm_stub_trace_failed(struct tm_error *error, int32_t tid, const char *what) {
    if (errno == ESRCH) {
        return killed(error, tid);
    }
    return tm_error_errno(error, "ptrace", "cannot %s thread %d of the stub", what, tid);
}

int tm_stub_add_thread(struct tm_stub *stub, int32_t tid, struct tm_error *error) {
    struct tm_stub_thread *grown = realloc(stub->threads, (stub->n_threads + 1) * sizeof *grown);
    if (!grown) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "realloc", "no memory for the thread table");
    }
    stub->threads = grown;
    stub->threads[stub->n_threads++] = (struct tm_stub_thread){.tid = tid, .parked = 1};
    return 0;
}

struct tm_stub_thread *tm_stub_thread_of(struct tm_stub *stub, int32_t tid) {
    if (!tid) {
        return stub->threads;
    }
    for (uint32_t i = 0; i < stub->n_threads; i++) {
        if (stub->threads[i].tid == tid) {
            return &stub->threads[i];
        }
    }
    return NULL;
}

// Runs the thread from wherever it stands to a stop inside the kernel's signal code, where final registers may be set:
// there the kernel itself restarts an interrupted call, or lets a pending signal's handler interrupt it.
static int park(const struct tm_stub *stub, struct tm_stub_thread *thread, struct tm_error *error) {
    while (!thread->parked) {
        int stop;
        if (ptrace(PTRACE_INTERRUPT, thread->tid, 0, 0) || ptrace(PTRACE_CONT, thread->tid, 0, 0)) {
            return tm_stub_trace_failed(error, thread->tid, "stop");
        }
        int code = tm_stub_wait(stub, thread->tid, &stop, error);
        if (code) {
            return code;
        }
        thread->parked = stop >> 8 == PTRACE_EVENT_STOP;
    }
    return 0;
}

static int xstate_size(int32_t tid, uint32_t *size, struct tm_error *error) {
    static const uint32_t MOST = 1 << 16;
    void *image = malloc(MOST);
    struct iovec vector = {image, MOST};
    int code = 0;
    if (!image) {
        code = tm_error_set(error, TM_NOMEM, ENOMEM, "malloc", "no memory for an xstate image");
    } else if (ptrace(PTRACE_GETREGSET, tid, (void *)0x202, &vector)) { // NT_X86_XSTATE
        code = tm_error_errno(error, "ptrace", "cannot read the stub's xstate");
    } else {
        *size = (uint32_t)vector.iov_len;
    }
    free(image);
    return code;
}

// The kernel would write to the rseq area on the way to user mode, and kill the stub once it is unmapped.
static int drop_rseq(struct tm_stub *stub, struct tm_error *error) {
    struct __ptrace_rseq_configuration rseq;
    if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, stub->info.pid, sizeof rseq, &rseq) < 0 || !rseq.rseq_abi_pointer) {
        return 0;
    }
    struct tm_call call = {.nr = SYS_rseq, .args = {rseq.rseq_abi_pointer, rseq.rseq_abi_size, 1, rseq.signature}};
    int code = tm_stub_inject(stub, stub->threads, &call, NULL, error);
    if (!code && call.ret < 0) {
        code = tm_error_set(error, TM_SYS, (int)-call.ret, "rseq", "cannot unregister the stub's rseq area");
    }
    return code;
}

int tm_stub_attach(struct tm_stub *stub, struct tm_error *error) {
    int32_t pid = stub->info.pid;
    char path[32];
    int stop;
    long options = PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE;
    if (ptrace(PTRACE_SEIZE, pid, 0, options)) {
        return tm_error_errno(error, "ptrace", "cannot seize the stub");
    }
    stub->attached = 1;
    int code = tm_stub_add_thread(stub, pid, error);
    if (code) {
        return code;
    }
    if (ptrace(PTRACE_INTERRUPT, pid, 0, 0)) {
        return tm_error_errno(error, "ptrace", "cannot stop the stub");
    }
    code = tm_stub_wait(stub, pid, &stop, error);
    if (code) {
        return code;
    }
    if (ptrace(PTRACE_GETREGS, pid, 0, &stub->base)) {
        return tm_error_errno(error, "ptrace", "cannot read the stub's registers");
    }
    stub->base.eflags = 0x202;
    stub->base.rbp = 0;
    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    stub->mem_fd = open(path, O_RDWR | O_CLOEXEC);
    if (stub->mem_fd < 0) {
        return tm_error_errno(error, "open", "cannot open the stub's memory");
    }
    code = xstate_size(pid, &stub->info.xstate_size, error);
    if (!code) {
        code = drop_rseq(stub, error);
    }
    struct tm_call outlive = {.nr = SYS_prctl, .args = {PR_SET_PDEATHSIG, 0}}; // from here on EXITKILL does that
    return code ? code : tm_stub_inject(stub, stub->threads, &outlive, NULL, error);
}

static int set_image(const struct tm_stub_image *image, struct tm_error *error) {
    union {
        const void *from;
        void *base;
    } regs = {image->regs}, xstate = {image->xstate}; // iovec has no const
    struct iovec vector = {xstate.base, image->xstate_size};
    if (image->xstate_size && ptrace(PTRACE_SETREGSET, image->tid, (void *)0x202, &vector)) {
        return tm_stub_trace_failed(error, image->tid, "set the xstate of");
    }
    vector = (struct iovec){regs.base, image->regs_size};
    if (ptrace(PTRACE_SETREGSET, image->tid, (void *)1, &vector)) { // NT_PRSTATUS
        return tm_stub_trace_failed(error, image->tid, "set the registers of");
    }
    if (ptrace(PTRACE_SETSIGMASK, image->tid, sizeof image->sigmask, &image->sigmask)) {
        return tm_stub_trace_failed(error, image->tid, "set the signal mask of");
    }
    return 0;
}

int tm_stub_release(struct tm_stub *stub, const struct tm_stub_image *images, uint32_t n_images,
                    struct tm_error *error) {
    struct tm_call unmap = {.nr = SYS_munmap, .args = {stub->scratch, TM_STUB_SCRATCH}};
    uint32_t failed;
    int code = tm_stub_calls(stub, &unmap, 1, &failed, error);
    for (uint32_t i = 0; !code && i < stub->n_threads; i++) {
        code = park(stub, &stub->threads[i], error);
    }
    for (uint32_t i = 0; !code && i < n_images; i++) {
        code = set_image(&images[i], error);
    }
    if (code) {
        return code;
    }
    stub->info.first_ns = tm_now_ns();
    for (uint32_t i = 0; i < stub->n_threads; i++) {
        if (ptrace(PTRACE_DETACH, stub->threads[i].tid, 0, 0)) {
            // killed just now: what is dead and not detached must be reaped, or its namespace could never end
            return tm_stub_trace_failed(error, stub->threads[i].tid, "let run");
        }
    }
    stub->released = 1;
    return 0;
}

void tm_stub_pin(struct tm_stub *stub, int together) {
    // only speed depends on it, so a refusal (a cpuset that changed meanwhile) is no failure
    if (together == stub->pinned || (together && sched_getaffinity(0, sizeof stub->affinity, &stub->affinity))) {
        return;
    }
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((unsigned)sched_getcpu(), &one);
    const cpu_set_t *wanted = together ? &one : &stub->affinity;
    sched_setaffinity(0, sizeof *wanted, wanted);
    for (uint32_t i = 0; !stub->released && i < stub->n_threads; i++) {
        sched_setaffinity(stub->threads[i].tid, sizeof *wanted, wanted);
    }
    stub->pinned = together;
}

static void end_process(int pidfd) {
    if (pidfd >= 0) {
        syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
    }
}

static void reap(int32_t tid) {
    int status;
    pid_t got;
    do {
        got = waitpid(tid, &status, __WALL);
    } while ((got < 0 && errno == EINTR) || (got >= 0 && WIFSTOPPED(status)));
}

// Reaps the dead threads but the leader. The table may lack one that was killed as it was made, so /proc is asked.
static void reap_threads(const struct tm_stub *stub) {
    char path[32];
    int found;
    snprintf(path, sizeof path, "/proc/%d/task", stub->info.pid);
    do {
        DIR *tasks = opendir(path);
        found = 0;
        for (struct dirent *task; tasks && (task = readdir(tasks));) {
            int32_t tid = (int32_t)strtol(task->d_name, NULL, 10);
            if (tid > 0 && tid != stub->info.pid) {
                reap(tid);
                found = 1;
            }
        }
        if (tasks) {
            closedir(tasks);
        }
    } while (found);
}

void tm_stub_kill(struct tm_stub *stub) {
    end_process(stub->info.pidfd);
    end_process(stub->info.init_pidfd);
    if (stub->attached) {
        reap_threads(stub); // a leader is reported only after them
        reap(stub->info.pid);
    } else if (stub->info.pid > 0 && !stub->info.init_pid) { // our own unreaped child: the id is safe
        kill(stub->info.pid, SIGKILL);
        reap(stub->info.pid);
    }
    if (stub->info.init_pid > 0) {
        reap(stub->info.init_pid);
    }
}
