// Shared by the files of the stub: the session struct, the page shared with the child, raw system calls.
#ifndef TM_STUB_INTERNAL_H
#define TM_STUB_INTERNAL_H
#include <sched.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <sys/user.h>

#include "stub.h"

enum tm_stub_state { TM_STUB_WAIT = 0, TM_STUB_READY = 1, TM_STUB_FAILED = 2 };
enum tm_stub_made { TM_MADE_NOT = 0, TM_MADE_TOLD = 1, TM_MADE_TAKEN = 2 };

enum tm_stub_step {
    TM_STEP_NONE,
    TM_STEP_CLONE,
    TM_STEP_MOUNT,
    TM_STEP_INIT,
    TM_STEP_LIMIT,
    TM_STEP_PLACE,
    TM_STEP_UFFD,
    TM_STEP_SCRATCH,
    TM_STEP_SETUP,
};

// Memory shared by us, the namespace's init and the stub until the stub's memory is replaced.
struct tm_stub_shared {
    _Atomic uint32_t state; // enum tm_stub_state; a futex
    _Atomic uint32_t made;  // enum tm_stub_made; a futex. Once taken, init may execute its program
    uint32_t step;          // enum tm_stub_step of the failure
    int32_t err;
    uint32_t index;   // of the place or call that failed
    int32_t pid;      // of the stub, as its maker sees it
    int32_t main_fd;  // init's pidfd of the stub
    int32_t time_err; // errno of the time namespace
};

struct tm_stub_thread {
    int32_t tid;
    int32_t parked; // at a stop where final registers may be set
};

struct tm_stub {
    struct tm_stub_shared *shared;
    struct tm_stub_info info;
    uint64_t scratch;
    int mem_fd;   // /proc/PID/mem
    int attached; // ptrace holds it
    int released;
    int pinned;
    cpu_set_t affinity;             // ours before the pin
    struct user_regs_struct base;   // registers that injected calls start from
    struct tm_stub_thread *threads; // the leader first
    uint32_t n_threads;
};

// A raw system call: the child shares no C library state with us that could be trusted.
static inline long tm_raw(long nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
    long ret;
    register uint64_t r10 __asm__("r10") = d;
    register uint64_t r8 __asm__("r8") = e;
    register uint64_t r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

#define TM_RAW(nr, a, b, c, d, e, f) \
    tm_raw((nr), (uint64_t)(a), (uint64_t)(b), (uint64_t)(c), (uint64_t)(d), (uint64_t)(e), (uint64_t)(f))

static inline int tm_call_failed(const struct tm_call *call) {
    if (call->ret >= 0 || call->ret < -4095) {
        return 0;
    }
    for (unsigned i = 0; i < sizeof call->allow / sizeof call->allow[0]; i++) {
        if (call->allow[i] && call->allow[i] == -call->ret) {
            return 0;
        }
    }
    return 1;
}

// stub_child.c: everything that runs in the new processes. Both never return.
_Noreturn void tm_stub_child(const struct tm_stub_spec *spec, struct tm_stub_shared *shared);
_Noreturn void tm_stub_maker(const struct tm_stub_spec *spec, struct tm_stub_shared *shared);

// How the scratch is used.
enum {
    TM_CODE_SINGLE = 0, // one system call
    TM_CODE_BATCH = 64, // the loop over many: rbx first entry, r12 end
    TM_SCRATCH_DATA = 4096,
    TM_SCRATCH_STACK = TM_STUB_SCRATCH - 4096,
};

// stub_call.c: one call. The host id of a thread that it makes goes to *child (null: none is expected).
int tm_stub_inject(struct tm_stub *stub, struct tm_stub_thread *thread, struct tm_call *call, int32_t *child,
                   struct tm_error *error);

// stub_trace.c: waits for the next stop of one thread. *stop: signal and event, as in waitpid's status.
int tm_stub_wait(const struct tm_stub *stub, int32_t tid, int *stop, struct tm_error *error);
// What a failed ptrace request means: a thread that is not there any more was killed.
int tm_stub_trace_failed(struct tm_error *error, int32_t tid, const char *what);
int tm_stub_add_thread(struct tm_stub *stub, int32_t tid, struct tm_error *error);
struct tm_stub_thread *tm_stub_thread_of(struct tm_stub *stub, int32_t tid); // 0: the leader

// stub_trace.c: hold the stub. attach fills mem_fd, base and the leader's thread.
int tm_stub_attach(struct tm_stub *stub, struct tm_error *error);
void tm_stub_kill(struct tm_stub *stub);

#endif
