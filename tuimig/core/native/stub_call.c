// Makes system calls in the stub. A single call runs from the scratch's code under PTRACE_SYSCALL and ends at its exit stop.
// A batch runs by a loop in the scratch without any stop but the last: a breakpoint, whose SIGTRAP must neither be blocked
// nor ignored meanwhile, or the kernel would reset its disposition for good.
#include <errno.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "stub_internal.h"
#include "util.h"

enum {
    STOP_SYSCALL = SIGTRAP | 0x80,
    STOP_CLONE = SIGTRAP | (PTRACE_EVENT_CLONE << 8),
    ALIGN = 16,
    ACTION_SIZE = 32, // struct kernel_sigaction
    BATCH_LEAST = 3,  // shorter ones are as fast one by one
};

// One call as the loop in stub_child.c reads it.
struct batch_call {
    int64_t nr;
    uint64_t args[6];
    int64_t ret;
};

static uint64_t data_address(const struct tm_stub *stub) { return stub->scratch + TM_SCRATCH_DATA; }

// Two signal actions at the end of the data area: the default one (never written, so zero) and SIGTRAP's own.
static uint64_t default_action(const struct tm_stub *stub) {
    return stub->scratch + TM_SCRATCH_STACK - 2 * ACTION_SIZE;
}

static uint64_t saved_action(const struct tm_stub *stub) { return stub->scratch + TM_SCRATCH_STACK - ACTION_SIZE; }

int tm_stub_inject(struct tm_stub *stub, struct tm_stub_thread *thread, struct tm_call *call, int32_t *child,
                   struct tm_error *error) {
    struct user_regs_struct regs = stub->base;
    uint64_t *const arguments[] = {(uint64_t *)&regs.rdi, (uint64_t *)&regs.rsi, (uint64_t *)&regs.rdx,
                                   (uint64_t *)&regs.r10, (uint64_t *)&regs.r8,  (uint64_t *)&regs.r9};
    if (call->size > TM_STUB_DATA) {
        return tm_error_set(error, TM_SYS, E2BIG, "inject", "%u bytes of data for one call", call->size);
    }
    if (call->size && pwrite(stub->mem_fd, call->data, call->size, (off_t)data_address(stub)) != (ssize_t)call->size) {
        return tm_error_errno(error, "pwrite", "cannot write to the scratch pages");
    }
    for (unsigned i = 0; i < 6; i++) {
        *arguments[i] = call->args[i] + (call->pointers & (1u << i) ? data_address(stub) : 0);
    }
    regs.rax = (unsigned long long)call->nr;
    regs.orig_rax = ~0ull;
    regs.rip = stub->scratch + TM_CODE_SINGLE;
    regs.rsp = stub->scratch + TM_STUB_SCRATCH - 64;
    if (ptrace(PTRACE_SETREGS, thread->tid, 0, &regs)) {
        return tm_stub_trace_failed(error, thread->tid, "set registers of");
    }
    thread->parked = 0;
    for (int syscall_stops = 0; syscall_stops < 2;) {
        int stop;
        if (ptrace(PTRACE_SYSCALL, thread->tid, 0, 0)) {
            return tm_stub_trace_failed(error, thread->tid, "run");
        }
        int code = tm_stub_wait(stub, thread->tid, &stop, error);
        if (code) {
            return code;
        }
        if (stop == STOP_SYSCALL) {
            syscall_stops++;
        } else if (stop == STOP_CLONE && child) {
            unsigned long tid;
            ptrace(PTRACE_GETEVENTMSG, thread->tid, 0, &tid);
            *child = (int32_t)tid;
        } else if (stop == SIGSEGV || stop == SIGILL || stop == SIGBUS) {
            return tm_error_set(error, TM_SYS, 0, "inject", "signal %d in the stub at call %lld", stop,
                                (long long)call->nr);
        }
    }
    if (ptrace(PTRACE_GETREGS, thread->tid, 0, &regs)) {
        return tm_stub_trace_failed(error, thread->tid, "read registers of");
    }
    call->ret = (int64_t)regs.rax;
    return 0;
}

static uint32_t aligned(uint32_t size) { return (size + ALIGN - 1) & ~(uint32_t)(ALIGN - 1); }

// Lays out calls of one thread, as many as there is room for: entries first, then their data. Returns how many.
static uint32_t lay_out(const struct tm_stub *stub, const struct tm_call *calls, uint32_t n_calls, uint8_t *area,
                        uint32_t *used) {
    const uint32_t room = TM_SCRATCH_STACK - TM_SCRATCH_DATA - 2 * ACTION_SIZE;
    uint32_t n = 0;
    uint32_t size = sizeof(struct batch_call);
    while (n < n_calls && calls[n].tid == calls[0].tid &&
           size + sizeof(struct batch_call) + aligned(calls[n].size) <= room) {
        size += (uint32_t)sizeof(struct batch_call) + aligned(calls[n].size);
        n++;
    }
    struct batch_call *entry = (struct batch_call *)(void *)area;
    uint32_t data = (uint32_t)sizeof *entry * (n + 1);
    *entry++ = (struct batch_call){.nr = SYS_rt_sigaction,
                                   .args = {SIGTRAP, default_action(stub), saved_action(stub), sizeof(uint64_t)}};
    for (uint32_t i = 0; i < n; i++, entry++) {
        *entry = (struct batch_call){.nr = calls[i].nr};
        for (unsigned arg = 0; arg < 6; arg++) {
            entry->args[arg] = calls[i].args[arg] + (calls[i].pointers & (1u << arg) ? data_address(stub) + data : 0);
        }
        if (calls[i].size) {
            memcpy(area + data, calls[i].data, calls[i].size);
        }
        data += aligned(calls[i].size);
    }
    *used = data;
    return n;
}

static int set_mask(int32_t tid, uint64_t mask, struct tm_error *error) {
    if (ptrace(PTRACE_SETSIGMASK, tid, sizeof mask, &mask)) {
        return tm_stub_trace_failed(error, tid, "set the signal mask of");
    }
    return 0;
}

// Runs the loop over n + 1 entries. *done: how many of the n calls were made; the last may have failed.
static int run_loop(struct tm_stub *stub, struct tm_stub_thread *thread, uint32_t n, uint32_t *done,
                    struct tm_error *error) {
    struct user_regs_struct regs = stub->base;
    int stop = 0;
    regs.rbx = data_address(stub);
    regs.r12 = data_address(stub) + (n + 1) * sizeof(struct batch_call);
    regs.orig_rax = ~0ull;
    regs.rip = stub->scratch + TM_CODE_BATCH;
    regs.rsp = stub->scratch + TM_STUB_SCRATCH - 64;
    if (ptrace(PTRACE_SETREGS, thread->tid, 0, &regs)) {
        return tm_stub_trace_failed(error, thread->tid, "set the registers of");
    }
    thread->parked = 0;
    while (stop != SIGTRAP) {
        if (ptrace(PTRACE_CONT, thread->tid, 0, 0)) {
            return tm_stub_trace_failed(error, thread->tid, "run");
        }
        int code = tm_stub_wait(stub, thread->tid, &stop, error);
        if (code) {
            return code;
        }
        if (stop == SIGSEGV || stop == SIGILL || stop == SIGBUS) {
            return tm_error_set(error, TM_SYS, 0, "inject", "signal %d in the stub in a batch of %u calls", stop, n);
        }
    }
    if (ptrace(PTRACE_GETREGS, thread->tid, 0, &regs)) {
        return tm_stub_trace_failed(error, thread->tid, "read the registers of");
    }
    uint64_t made = (regs.rbx - data_address(stub)) / sizeof(struct batch_call);
    *done = made ? (uint32_t)made - 1 : 0;
    return 0;
}

// Makes calls of one thread until one fails or there is no room for more. *done: how many were made.
static int batch(struct tm_stub *stub, struct tm_stub_thread *thread, struct tm_call *calls, uint32_t n_calls,
                 uint32_t *done, struct tm_error *error) {
    uint8_t *area = malloc(TM_STUB_SCRATCH);
    uint32_t used;
    if (!area) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "malloc", "no memory for a batch of calls");
    }
    uint32_t n = lay_out(stub, calls, n_calls, area, &used);
    const off_t place = (off_t)data_address(stub);
    const ssize_t entries = (ssize_t)((n + 1) * sizeof(struct batch_call));
    int code = 0;
    if (pwrite(stub->mem_fd, area, used, place) != (ssize_t)used) {
        code = tm_error_errno(error, "pwrite", "cannot write to the scratch pages");
    }
    code = code ? code : set_mask(thread->tid, ~(1ull << (SIGTRAP - 1)), error);
    code = code ? code : run_loop(stub, thread, n, done, error);
    code = code ? code : set_mask(thread->tid, ~0ull, error);
    if (!code && pread(stub->mem_fd, area, (size_t)entries, place) != entries) {
        code = tm_error_errno(error, "pread", "cannot read from the scratch pages");
    }
    if (!code) {
        const struct batch_call *entry = (const struct batch_call *)(const void *)area + 1;
        for (uint32_t i = 0; i < *done; i++) {
            calls[i].ret = entry[i].ret;
        }
        struct tm_call restore = {.nr = SYS_rt_sigaction, .args = {SIGTRAP, saved_action(stub), 0, sizeof(uint64_t)}};
        code = tm_stub_inject(stub, thread, &restore, NULL, error);
    }
    free(area);
    return code;
}

int tm_stub_calls(struct tm_stub *stub, struct tm_call *calls, uint32_t n_calls, uint32_t *failed,
                  struct tm_error *error) {
    for (uint32_t i = 0; i < n_calls;) {
        *failed = i;
        struct tm_stub_thread *thread = tm_stub_thread_of(stub, calls[i].tid);
        if (!thread) {
            return tm_error_set(error, TM_SYS, ESRCH, "inject", "the stub has no thread %d", calls[i].tid);
        }
        uint32_t done = 1;
        uint32_t same = 1;
        while (same < BATCH_LEAST && i + same < n_calls && calls[i + same].tid == calls[i].tid) {
            same++;
        }
        int code = same < BATCH_LEAST ? tm_stub_inject(stub, thread, &calls[i], NULL, error)
                                      : batch(stub, thread, &calls[i], n_calls - i, &done, error);
        if (!code && !done) {
            code = tm_error_set(error, TM_SYS, 0, "inject", "a batch of calls did not begin");
        }
        if (code) {
            return code;
        }
        i += done;
        if (tm_call_failed(&calls[i - 1])) {
            *failed = i - 1;
            return tm_error_set(error, TM_SYS, (int)-calls[i - 1].ret, "inject", "injected call %u failed", i - 1);
        }
    }
    return 0;
}

int tm_stub_thread(struct tm_stub *stub, int32_t tid, int32_t *host_tid, struct tm_error *error) {
    struct {
        struct clone_args args;
        int32_t id;
    } data = {
        .args = {.flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM,
                 .set_tid = data_address(stub) + sizeof data.args,
                 .set_tid_size = 1},
        .id = tid,
    };
    struct tm_call call = {
        .nr = SYS_clone3, .args = {0, sizeof data.args}, .pointers = 1, .data = &data, .size = sizeof data};
    int32_t child = 0;
    int stop;
    int code = tm_stub_inject(stub, stub->threads, &call, &child, error);
    if (code) {
        return code;
    }
    if (call.ret < 0) {
        int err = (int)-call.ret;
        return tm_error_set(error, TM_SYS, err, "clone3",
                            err == EEXIST ? "thread id %d is taken" : "cannot make thread %d", tid);
    }
    if (!child) {
        return tm_error_set(error, TM_SYS, 0, "clone3", "thread %d was made but not reported", tid);
    }
    code = tm_stub_add_thread(stub, child, error);
    *host_tid = child;
    return code ? code : tm_stub_wait(stub, child, &stop, error);
}
