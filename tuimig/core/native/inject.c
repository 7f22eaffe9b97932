// System calls made by a thread of the target on our behalf, so that our death at any moment does no harm.
// Below the thread's red zone lies a complete signal frame with its saved state, and rsp points to it: the instruction pair
// `syscall; ret` returns into sigreturn code. If we are gone, the call returns, sigreturn restores the thread, and it goes on
// with what it did. On the normal path the registers are set back by ptrace, at an event stop.
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "inject_internal.h"

#ifndef PTRACE_O_SUSPEND_SECCOMP
#define PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#endif

#define SPIN_NS 200000u
#define SCRATCH_SIZE (64ull << 10)
#define BLOCK_AT_TOP (64ull << 10) // a thread's own block lies so near to the end of its stack
enum { RED_ZONE = 128, FP_MAGIC_SIZE = 4, SYSCALL_SIZE = 2, CODE_64_BIT = 0x33 };
#define FP_MAGIC1 0x46505853u
#define FP_MAGIC2 0x46505845u
#define FP_SOFTWARE_OFFSET 464 // of the xsave image: struct _fpx_sw_bytes in a signal frame

struct fp_software {
    uint32_t magic1, extended_size;
    uint64_t xfeatures;
    uint32_t xstate_size;
};

#define XSAVE_HEADER 512
#define XSAVE_LEAST 576
enum { XSAVE_LEAF = 0xd, XFD = 4, EXTENDED_FIRST = 2, EXTENDED_END = 63 };

enum { UC_SIGCONTEXT_SS = 2, UC_STRICT_RESTORE_SS = 4 };
enum { STACK_FLAGS_INVALID = 4 }; // sigreturn squashes the error and leaves the alternate stack as it is

// Memory below rsp is dead only on a real stack: the main one, or a mapping above a guard that ends with the thread's own
// block. On a stack that a runtime has cut out of a larger block it belongs to somebody else.
static bool stack_has_room(const struct tm_source *source, const struct user_regs_struct *regs, size_t need) {
    uint32_t index = region_index(source, regs->rsp);
    if (index == source->n_regions) return false;
    const struct tm_region_state *face = &source->regions[index].face;
    if (face->start > regs->rsp || memcmp(face->perms, "rw", 2) || face->perms[3] != 'p') return false;
    bool real = face->kind == TM_STACK;
    if (face->kind == TM_ANON && index > 0) {
        const struct tm_region_state *below = &source->regions[index - 1].face;
        bool guard = below->end == face->start && memcmp(below->perms, "---", 3) == 0;
        real = guard && regs->fs_base > regs->rsp && regs->fs_base < face->end &&
               face->end - regs->fs_base <= BLOCK_AT_TOP;
    }
    return real && regs->rsp > need && regs->rsp - need >= face->start;
}

// Without it a strict filter would end the process for our calls. It holds for the thread while we trace it, so it is taken
// back with the registers: the program's own calls stay under the filter.
int options_suspend(struct injection *in, struct tm_error *error) {
    struct tm_source *source = in->source;
    pid_t tid = in->thread->tid;
    if (!source->no_suspend) {
        unsigned long options = source->trace_options | PTRACE_O_SUSPEND_SECCOMP;
        if (ptrace(PTRACE_SETOPTIONS, tid, NULL, (void *)options) == 0) return TM_OK;
        source->no_suspend = errno == EPERM || errno == EINVAL;
    }
    if (ptrace(PTRACE_SETOPTIONS, tid, NULL, (void *)source->trace_options))
        return tm_error_errno(error, "PTRACE_SETOPTIONS", "cannot prepare thread %d for an injected call", tid);
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/task/%d/status", source->pid, tid);
    FILE *file = fopen(path, "re");
    int mode = -1;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "Seccomp: %d", &mode) == 1) break;
    if (file) fclose(file);
    if (mode == 0) return TM_OK;
    tm_error_set(error, TM_PRIVILEGE, EPERM, "PTRACE_O_SUSPEND_SECCOMP",
                 "thread %d has a seccomp filter that may not be suspended for an injected call", tid);
    if (error) error->tid = tid;
    return TM_PRIVILEGE;
}

static void options_restore(const struct injection *in) {
    ptrace(PTRACE_SETOPTIONS, in->thread->tid, NULL, (void *)in->source->trace_options);
}

enum { RESTART_WITH_BLOCK = 516 }; // ERESTART_RESTARTBLOCK

// At its end, or made ready by the kernel to go on by restart_syscall and stopped again before that.
bool call_is_timed(const struct tm_source *source, const struct user_regs_struct *regs) {
    if ((int64_t)regs->orig_rax < 0) return false;
    if ((int64_t)regs->rax == -RESTART_WITH_BLOCK) return true;
    uint8_t code[SYSCALL_SIZE]; // else it is a call's result
    return regs->rax == SYS_restart_syscall && target_read(source, regs->rip, code, sizeof code) == 0 &&
           memcmp(code, (const uint8_t[]){0x0f, 0x05}, sizeof code) == 0;
}

// What a call was that had been restarted before: as compilers write it, the number is set right before `syscall`.
static uint64_t number_of_restarted(const struct tm_source *source, uint64_t call_at) {
    enum { LONG = 7, SHORT = 5 };
    uint8_t code[LONG];
    uint32_t number = SYS_restart_syscall;
    if (target_read(source, call_at - LONG, code, sizeof code)) return number;
    bool whole = code[LONG - SHORT] == 0xb8 || memcmp(code, (const uint8_t[]){0x48, 0xc7, 0xc0}, 3) == 0;
    if (whole) memcpy(&number, code + LONG - sizeof number, sizeof number);
    return number;
}

void frame_fill(struct kernel_sigframe *frame, const struct tm_source *source, const struct user_regs_struct *regs,
                uint64_t mask, uint64_t fpstate) {
    *frame = (struct kernel_sigframe){
        .pretcode = source->gadgets.sigreturn,
        .uc_flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
        .stack_flags = STACK_FLAGS_INVALID,
        .sigmask = mask,
        .context = {regs->r8, regs->r9, regs->r10, regs->r11, regs->r12, regs->r13, regs->r14, regs->r15, regs->rdi,
                    regs->rsi, regs->rbp, regs->rbx, regs->rdx, regs->rax, regs->rcx, regs->rsp, regs->rip,
                    regs->eflags},
    };
    frame->context.cs = (uint16_t)regs->cs;
    frame->context.ss = (uint16_t)regs->ss;
    frame->context.fpstate = fpstate;
    // An interrupted call is made anew. One with a time-out too: a sigreturn forgets what is left of its time.
    long result = (long)regs->rax;
    bool timed = call_is_timed(source, regs);
    if ((long)regs->orig_rax < 0 || !(result == -512 || result == -513 || result == -514 || timed)) return; // ERESTART*
    if (result < 0) frame->context.ip -= SYSCALL_SIZE;
    frame->context.ax = regs->orig_rax;
    if (timed && regs->orig_rax == SYS_restart_syscall)
        frame->context.ax = number_of_restarted(source, frame->context.ip);
}

struct component { // of an xsave image in the standard format; read once, as a virtual machine takes long to tell
    uint32_t end;
    bool asked_for; // a process has it only when it has asked for it
};
static struct component components[EXTENDED_END];
static pthread_once_t components_read = PTHREAD_ONCE_INIT;

static void read_components(void) {
    for (uint32_t i = EXTENDED_FIRST; i < EXTENDED_END; i++) {
        uint32_t bytes = 0, offset = 0, flags = 0, unused = 0;
        if (!__get_cpuid_count(XSAVE_LEAF, i, &bytes, &offset, &flags, &unused)) return;
        components[i] = (struct component){bytes ? offset + bytes : 0, flags & XFD};
    }
}

// An image that is larger than what the thread has room for is restored without its vector registers, silently. ptrace gives
// all that the processor has; what a process gets only when it asks for it (AMX tiles) is left out where it is not in use.
static size_t frame_image(uint8_t *image, size_t size) {
    pthread_once(&components_read, read_components);
    uint64_t features, in_use;
    memcpy(&features, image + FP_SOFTWARE_OFFSET, sizeof features); // ptrace puts the feature mask there
    memcpy(&in_use, image + XSAVE_HEADER, sizeof in_use);
    size_t end = XSAVE_LEAST;
    for (uint32_t i = EXTENDED_FIRST; i < EXTENDED_END; i++) {
        uint64_t bit = UINT64_C(1) << i;
        if (components[i].asked_for && !(in_use & bit)) features &= ~bit;
        if (features & bit && components[i].end > end) end = components[i].end;
    }
    end = end < size ? end : size;
    const struct fp_software software = {FP_MAGIC1, (uint32_t)end + FP_MAGIC_SIZE, features, (uint32_t)end};
    memcpy(image + FP_SOFTWARE_OFFSET, &software, sizeof software);
    const uint32_t magic2 = FP_MAGIC2;
    memcpy(image + end, &magic2, sizeof magic2);
    return end;
}

int inject_begin(struct injection *in, struct tm_source *source, struct thread *thread, struct tm_error *error) {
    return inject_begin_with(in, source, thread, 0, error);
}

int inject_begin_with(struct injection *in, struct tm_source *source, struct thread *thread, uint64_t room,
                      struct tm_error *error) {
    *in = (struct injection){.source = source, .thread = thread};
    if (thread->regs.cs != CODE_64_BIT)
        return tm_error_set(error, TM_UNSUPPORTED, 0, "inject", "thread %d executes 32-bit code", thread->tid);
    uint8_t image[TM_XSTATE_MOST + 64 + sizeof(struct kernel_sigframe)];
    struct iovec area = {image, TM_XSTATE_MOST};
    if (ptrace(PTRACE_GETREGSET, thread->tid, (void *)0x202 /* NT_X86_XSTATE */, &area))
        return tm_error_errno(error, "PTRACE_GETREGSET", "cannot read the extended state");
    if (ptrace(PTRACE_GETSIGMASK, thread->tid, (void *)8, &in->mask))
        return tm_error_errno(error, "PTRACE_GETSIGMASK", "cannot read the signal mask");
    size_t xsize = frame_image(image, area.iov_len);
    size_t need = RED_ZONE + xsize + FP_MAGIC_SIZE + 256 + 2 * sizeof(struct kernel_sigframe) + TM_CALL_BUFFER +
                  HELPER_ROOM + room;
    uint64_t top = thread->regs.rsp - RED_ZONE;
    if (!stack_has_room(source, &thread->regs, need))
        top = source->scratch && !room ? source->scratch + SCRATCH_SIZE : 0;
    if (!top) {
        tm_error_set(error, TM_DEADLINE, 0, "inject", "thread %d is on a stack without room for a safe injected call",
                     thread->tid);
        if (error) error->tid = thread->tid;
        return TM_DEADLINE;
    }
    uint64_t fp = (top - xsize - FP_MAGIC_SIZE) & ~63ull;
    uint64_t frame_at = (fp - sizeof(struct kernel_sigframe)) & ~15ull;
    in->buffer = frame_at - TM_CALL_BUFFER - 16;
    in->fpstate = fp;

    struct kernel_sigframe frame;
    frame_fill(&frame, source, &thread->regs, in->mask, fp);
    struct iovec local[2] = {{&frame, sizeof frame}, {image, xsize + FP_MAGIC_SIZE}};
    struct iovec remote[2] = {{(void *)(uintptr_t)frame_at, sizeof frame},
                              {(void *)(uintptr_t)fp, xsize + FP_MAGIC_SIZE}};
    ssize_t wrote = process_vm_writev(source->pid, local, 2, remote, 2, 0);
    if (wrote != (ssize_t)(local[0].iov_len + local[1].iov_len))
        return tm_error_errno(error, "process_vm_writev", "cannot write below the stack of thread %d", thread->tid);
    in->work = thread->regs;
    in->work.rsp = frame_at;
    int code = options_suspend(in, error);
    in->begun = !code;
    return code;
}

int inject_prime(struct injection *in, long nr, const uint64_t args[6], struct tm_error *error) {
    in->work.rip = in->source->gadgets.syscall_ret;
    in->work.orig_rax = (unsigned long long)-1; // nothing to restart
    in->work.rax = (unsigned long long)nr;
    in->work.rdi = args[0];
    in->work.rsi = args[1];
    in->work.rdx = args[2];
    in->work.r10 = args[3];
    in->work.r8 = args[4];
    in->work.r9 = args[5];
    in->work.eflags &= ~(1ull << 10); // direction flag: the ABI wants it clear
    if (ptrace(PTRACE_SETREGS, in->thread->tid, NULL, &in->work))
        return tm_error_errno(error, "PTRACE_SETREGS", "cannot set registers for an injected call");
    if (!in->at_call) { // from now on no signal gets between; the frame holds the true mask
        uint64_t all = ~0ull;
        if (ptrace(PTRACE_SETSIGMASK, in->thread->tid, (void *)8, &all))
            return tm_error_errno(error, "PTRACE_SETSIGMASK", "cannot block signals for an injected call");
    }
    in->at_call = true;
    return TM_OK;
}

// A call takes a few microseconds: spinning for it saves the tracer's own wake-up each time.
int stop_wait_soon(pid_t tid, struct stop *stop) {
    for (uint64_t until = tm_now_ns() + SPIN_NS; tm_now_ns() < until;) {
        int got = stop_wait(tid, true, stop);
        if (got != 0 && got != -2) return got;
        __builtin_ia32_pause();
    }
    int got;
    do got = stop_wait(tid, false, stop);
    while (got == -2);
    return got;
}

int call_run_on(struct injection *in, bool entered, int64_t *ret, struct tm_error *error) {
    pid_t tid = in->thread->tid;
    int signal = 0;
    for (;;) {
        if (ptrace(PTRACE_SYSCALL, tid, NULL, (void *)(long)signal))
            return tm_error_errno(error, "PTRACE_SYSCALL", "an injected call could not be run");
        signal = 0;
        struct stop stop;
        int got = stop_wait_soon(tid, &stop);
        if (got != 1 || stop.kind == STOP_DEAD || stop.kind == STOP_EXIT)
            return tm_error_set(error, TM_GONE, 0, "waitid", "the thread ended during an injected call");
        if (stop.kind == STOP_SIGNAL) {
            if (stop.signal == SIGSEGV || stop.signal == SIGBUS || stop.signal == SIGILL)
                return tm_error_set(error, TM_SYS, 0, "inject", "an injected call met signal %d", stop.signal);
            signal = stop.signal;
        } else if (stop.kind == STOP_CALL) {
            struct __ptrace_syscall_info info;
            if (ptrace(PTRACE_GET_SYSCALL_INFO, tid, (void *)sizeof info, &info) <= 0)
                return tm_error_errno(error, "PTRACE_GET_SYSCALL_INFO", "an injected call could not be followed");
            if (info.op == PTRACE_SYSCALL_INFO_ENTRY) entered = true;
            if (info.op == PTRACE_SYSCALL_INFO_EXIT && entered) {
                *ret = info.exit.rval;
                return TM_OK;
            }
        }
    }
}

static int call_run(struct injection *in, int64_t *ret, struct tm_error *error) {
    return call_run_on(in, false, ret, error);
}

int inject_call(struct injection *in, long nr, const uint64_t args[6], int64_t *ret, struct tm_error *error) {
    int code = inject_prime(in, nr, args, error);
    if (!code) code = call_run(in, ret, error);
    if (code && error) error->tid = in->thread->tid;
    return code;
}

int inject_launch(struct injection *in, const struct user_regs_struct *regs, struct tm_error *error) {
    struct user_regs_struct set = *regs;
    uint64_t all = ~0ull;
    pid_t tid = in->thread->tid;
    if (ptrace(PTRACE_SETREGS, tid, NULL, &set) || ptrace(PTRACE_SETSIGMASK, tid, (void *)8, &all))
        return tm_error_errno(error, "PTRACE_SETREGS", "cannot set registers for injected calls");
    in->at_call = true;
    if (ptrace(PTRACE_CONT, tid, NULL, NULL))
        return tm_error_errno(error, "PTRACE_CONT", "injected calls could not be run");
    return TM_OK;
}

// To an event stop, the only one at which registers may be set: set at a system call stop, an interrupted call of the program
// would not be restarted. `stopped`: it is at another stop now.
static int event_stop(struct injection *in, bool stopped, struct tm_error *error) {
    pid_t tid = in->thread->tid;
    uint64_t give_up = tm_now_ns() + 1000000000u;
    for (int signal = 0;;) {
        ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
        if ((stopped && ptrace(PTRACE_CONT, tid, NULL, (void *)(long)signal)) || tm_now_ns() > give_up)
            return tm_error_errno(error, "PTRACE_CONT", "thread %d did not come back from an injected call", tid);
        stopped = true;
        struct stop stop;
        int got = stop_wait_soon(tid, &stop);
        if (got != 1 || stop.kind == STOP_DEAD)
            return tm_error_set(error, TM_GONE, 0, "waitid", "the thread ended during an injected call");
        in->thread->group = stop.kind == STOP_GROUP;
        if (stop.kind == STOP_TRAP || stop.kind == STOP_GROUP) return TM_OK;
        signal = stop.kind == STOP_SIGNAL ? stop.signal : 0;
    }
}

static int own_registers(struct injection *in, struct tm_error *error) {
    pid_t tid = in->thread->tid;
    if (ptrace(PTRACE_SETSIGMASK, tid, (void *)8, &in->mask) || ptrace(PTRACE_SETREGS, tid, NULL, &in->thread->regs))
        return tm_error_errno(error, "PTRACE_SETREGS", "cannot give thread %d its registers back", tid);
    in->at_call = false;
    return TM_OK;
}

int inject_fetch(struct injection *in, uint64_t base, struct tm_error *error) {
    pid_t tid = in->thread->tid;
    int code = event_stop(in, false, error);
    if (code) return code;
    struct user_regs_struct now;
    if (ptrace(PTRACE_GETREGS, tid, NULL, &now))
        return tm_error_errno(error, "PTRACE_GETREGS", "cannot read the registers");
    if (now.rsp < base || now.rsp > in->work.rsp + sizeof(uint64_t)) { // it has gone on with its own work
        in->at_call = false;
        in->thread->regs = now;
        thread_mend_call(tid, &in->thread->regs);
        return tm_error_set(error, TM_DEADLINE, 0, "inject", "thread %d was not fetched back in time", tid);
    }
    return own_registers(in, error);
}

static int registers_back(struct injection *in, struct tm_error *error) {
    if (!in->at_call) return TM_OK;
    int code = event_stop(in, true, error);
    return code ? code : own_registers(in, error);
}

int inject_end(struct injection *in, struct tm_error *error) {
    if (!in->begun) return TM_OK;
    int code = registers_back(in, error);
    options_restore(in);
    in->begun = false;
    return code;
}

int scratch_make(struct tm_source *source, struct tm_error *error) {
    int code = TM_DEADLINE;
    for (uint32_t i = 0; code == TM_DEADLINE && i < source->threads.n; i++) {
        struct thread *thread = &source->threads.at[i];
        struct injection in;
        code = inject_begin(&in, source, thread, error);
        if (code) continue;
        const uint64_t args[6] = {0, SCRATCH_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, UINT64_MAX, 0};
        int64_t ret = 0;
        code = inject_call(&in, SYS_mmap, args, &ret, error);
        if (!code && ret < 0 && ret > -4096)
            code = tm_error_set(error, TM_SYS, (int)-ret, "mmap", "the process has no room for an injected call");
        int end = inject_end(&in, code ? NULL : error);
        if (!code) code = end;
        if (code) break;
        source->scratch = (uint64_t)ret;
        source->scratch_maker = thread->tid;
    }
    return code;
}

void scratch_drop(struct tm_source *source) {
    struct thread *thread = source->scratch ? threads_find(&source->threads, source->scratch_maker) : NULL;
    struct injection in;
    if (thread && inject_begin(&in, source, thread, NULL) == TM_OK) {
        int64_t ret;
        inject_call(&in, SYS_munmap, (uint64_t[6]){source->scratch, SCRATCH_SIZE}, &ret, NULL);
        inject_end(&in, NULL);
    }
    source->scratch = 0;
}
