// Many injected calls with one stop: the thread returns from each call into sigreturn, whose frame holds the registers of the
// next call, and the last frame is the one that gives the thread its own registers back. So our death does as little harm as
// with single calls (inject.c): what is left of the chain runs, and the thread goes on. It ends in a wait with a time-out,
// out of which the tracer fetches it. What each call writes lies below the frames. Its return value is kept where the target's
// code has the end of a function that stores rax (gadgets.c); else only calls take part whose answer is what they write.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "inject_internal.h"

enum { UNTOUCHED = 0xa5, NAP_US = 10, MARK_SIZE = sizeof(struct timespec) };
#define FRAME_SIZE ((offsetof(struct kernel_sigframe, siginfo) + 15) & ~15ul)
// Above each call's frame two words for the code that stores its value: its address, and what it takes from the stack for rbx.
struct step {
    uint64_t store, rbx;
    uint8_t frame[FRAME_SIZE];
};
#define WAIT_NS 200000000 // how long it waits at its end for a tracer that has gone
#define GIVE_UP_NS 100000000u
#define SPIN_NS 100000u

// Not where a sigreturn does harm, nor where a signal has stopped the thread: that one does not run on by itself.
bool chain_fits(const struct tm_source *source, const struct thread *thread) {
    return !call_is_timed(source, &thread->regs) && !thread->group;
}

static bool keeps_value(const struct tm_source *source) { return source->gadgets.store_ret != 0; }

bool chain_suits(const struct tm_source *source, const struct tm_probe *probe) {
    if (probe->kind != TM_PROBE_CALL && probe->kind != TM_PROBE_CALL_EACH) return false;
    if ((!probe->out_size && !keeps_value(source)) || probe->out_size > TM_CALL_BUFFER || probe->data_size)
        return false;
    switch (probe->nr) {
        case SYS_rt_sigaction:
        case SYS_getitimer:
        case SYS_sigaltstack:
        case SYS_prctl:
        case SYS_ioctl:
        case SYS_timer_gettime:
        case SYS_timerfd_gettime:
        case SYS_clock_gettime:
        case SYS_getcwd:
            return true;
        case SYS_brk:
            return probe->args[0] == 0;
        default:
            return false;
    }
}

static uint32_t out_room(const struct tm_probe *probe) { return (probe->out_size + 15u) & ~15u; }

bool chain_add(struct chain *chain, const struct tm_probe *probe, struct tm_answer *answer) {
    if (chain->n == CHAIN_MOST) return false;
    chain->out_at[chain->n] = chain->out_size;
    chain->out_size += out_room(probe);
    chain->probes[chain->n] = probe;
    chain->answers[chain->n++] = answer;
    return true;
}

// From the chain's base: what calls write, the mark that all are done, their values, the time-out of the wait; the steps.
static uint64_t values_at(const struct chain *chain) { return chain->out_size + MARK_SIZE; }
static uint64_t wait_at(const struct chain *chain) { return values_at(chain) + (chain->n + 1ull) * sizeof(uint64_t); }
static uint64_t steps_at(const struct chain *chain) { return (wait_at(chain) + sizeof(struct timespec) + 15) & ~15ull; }
static uint64_t chain_size(const struct chain *chain) {
    return steps_at(chain) + (chain->n + 1ull) * sizeof(struct step);
}
uint64_t chain_room(const struct chain *chain) { return chain_size(chain) + 64; }

static struct user_regs_struct call_regs(const struct chain *chain, long nr, const uint64_t args[6], uint64_t rsp) {
    struct user_regs_struct regs = chain->in.work;
    regs.rip = chain->in.source->gadgets.syscall_ret;
    regs.orig_rax = (unsigned long long)-1;
    regs.eflags &= ~(1ull << 10);
    regs.rsp = rsp;
    regs.rax = (unsigned long long)nr;
    regs.rdi = args[0];
    regs.rsi = args[1];
    regs.rdx = args[2];
    regs.r10 = args[3];
    regs.r8 = args[4];
    regs.r9 = args[5];
    return regs;
}

// Step i: the i-th call; after the last one the mark, then the wait, whose frame is the one that inject_begin made.
static struct user_regs_struct step_regs(const struct chain *chain, uint32_t i) {
    uint64_t base = chain->base, args[6] = {0};
    if (i > chain->n) {
        args[2] = base + wait_at(chain);
        return call_regs(chain, SYS_ppoll, args, chain->in.work.rsp);
    }
    bool stores = keeps_value(chain->in.source);
    uint64_t step = base + steps_at(chain) + i * sizeof(struct step);
    uint64_t rsp = step + (stores ? 0 : offsetof(struct step, frame));
    struct user_regs_struct regs;
    if (i == chain->n) {
        args[0] = CLOCK_MONOTONIC;
        args[1] = base + chain->out_size;
        regs = call_regs(chain, SYS_clock_gettime, args, rsp);
    } else {
        const struct tm_probe *probe = chain->probes[i];
        for (int k = 0; k < 6; k++) args[k] = probe->args[k] == UINT64_MAX ? base + chain->out_at[i] : probe->args[k];
        regs = call_regs(chain, probe->nr, args, rsp);
    }
    if (stores) regs.rbx = base + values_at(chain) + i * sizeof(uint64_t);
    return regs;
}

int chain_launch(struct chain *chain, struct tm_error *error) {
    struct injection *in = &chain->in;
    struct tm_source *source = in->source;
    uint64_t size = chain_size(chain);
    uint8_t *image = calloc(1, size);
    if (!image) return tm_error_set(error, TM_NOMEM, ENOMEM, "calloc", "no memory");
    chain->base = (in->buffer - size) & ~63ull;
    memset(image, UNTOUCHED, wait_at(chain));
    const struct timespec wait = {0, WAIT_NS};
    memcpy(image + wait_at(chain), &wait, sizeof wait);
    struct step *steps = (void *)(image + steps_at(chain));
    for (uint32_t i = 0; i <= chain->n; i++) { // each frame leads to the next step
        struct kernel_sigframe frame;
        struct user_regs_struct next = step_regs(chain, i + 1);
        frame_fill(&frame, source, &next, ~0ull, in->fpstate); // sigreturn would clear the extended state otherwise
        memcpy(steps[i].frame, &frame, FRAME_SIZE);
        steps[i].store = source->gadgets.store_ret;
    }
    struct iovec local = {image, size}, remote = {(void *)(uintptr_t)chain->base, size};
    ssize_t wrote = process_vm_writev(source->pid, &local, 1, &remote, 1, 0);
    free(image);
    if (wrote != (ssize_t)size)
        return tm_error_errno(error, "process_vm_writev", "cannot write below the stack of thread %d", in->thread->tid);
    struct user_regs_struct first = step_regs(chain, 0);
    return inject_launch(in, &first, error);
}

static bool mark_set(const struct chain *chain) {
    uint64_t mark[2], untouched;
    if (target_read(chain->in.source, chain->base + chain->out_size, mark, sizeof mark)) return false;
    memset(&untouched, UNTOUCHED, sizeof untouched);
    return mark[0] != untouched && mark[1] != untouched;
}

// What a call did not answer is asked again, for the error.
static void answers_take(struct chain *chain, const uint8_t *data) {
    bool stores = keeps_value(chain->in.source);
    for (uint32_t i = 0; i < chain->n; i++) {
        const uint8_t *out = data + chain->out_at[i];
        uint32_t size = chain->probes[i]->out_size;
        int64_t value = 0;
        bool touched = size == 0;
        for (uint32_t k = 0; k < size; k++) touched |= out[k] != UNTOUCHED;
        if (stores) memcpy(&value, data + values_at(chain) + i * sizeof value, sizeof value);
        if (touched) *chain->answers[i] = (struct tm_answer){value, size ? out : NULL, size, 1};
    }
}

int chain_finish(struct chain *chain, struct tm_error *error) {
    struct injection *in = &chain->in;
    for (uint64_t until = tm_now_ns() + GIVE_UP_NS; !mark_set(chain);) {
        if (tm_now_ns() > until) { // it runs on by itself, to its own registers
            in->at_call = in->thread->stopped = false;
            tm_error_set(error, TM_DEADLINE, 0, "inject", "thread %d did not come through injected calls in time",
                         in->thread->tid);
            return TM_DEADLINE;
        }
        if (until - tm_now_ns() < GIVE_UP_NS - SPIN_NS) // it may be waiting for this very CPU
            usleep(NAP_US);
        else
            __builtin_ia32_pause();
    }
    int code = inject_fetch(in, chain->base, error);
    if (code) return code;
    uint8_t *data = arena_take(&in->source->arena, wait_at(chain));
    if (!data) return tm_error_set(error, TM_NOMEM, 0, "malloc", "no memory");
    int err = target_read(in->source, chain->base, data, wait_at(chain));
    if (err) return tm_error_set(error, TM_GONE, err, "process_vm_readv", "cannot read the results of injected calls");
    answers_take(chain, data);
    return TM_OK;
}
