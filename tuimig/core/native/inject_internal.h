// What injected calls (inject.c) and the helper thread (helper.c) share.
#ifndef TM_INJECT_INTERNAL_H
#define TM_INJECT_INTERNAL_H
#include "source_internal.h"

enum { HELPER_ROOM = 512 }; // between the caller's buffer and the helper's frame
enum { UC_FP_XSTATE = 1 };

struct kernel_sigcontext {
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
    uint16_t cs, gs, fs, ss;
    uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
};

struct kernel_sigframe {
    uint64_t pretcode;
    uint64_t uc_flags, uc_link;
    uint64_t stack_sp;
    uint32_t stack_flags, stack_pad;
    uint64_t stack_size;
    struct kernel_sigcontext context;
    uint64_t sigmask;
    uint8_t siginfo[128];
};

// A signal frame that restores these registers; an interrupted call in them is made again.
void frame_fill(struct kernel_sigframe *frame, const struct tm_source *source, const struct user_regs_struct *regs,
                uint64_t mask, uint64_t fpstate);
// Interrupted in a call whose time-out only the kernel knows: a sigreturn would end it with EINTR.
bool call_is_timed(const struct tm_source *source, const struct user_regs_struct *regs);
int options_suspend(struct injection *in, struct tm_error *error); // seccomp filters, for our calls only
int stop_wait_soon(pid_t tid, struct stop *stop);
// Let it run on from these registers, all signals blocked; fetch it back from the area that begins at `base`, and give it its
// own registers. TM_DEADLINE: it was not there any more.
int inject_launch(struct injection *in, const struct user_regs_struct *regs, struct tm_error *error);
int inject_fetch(struct injection *in, uint64_t base, struct tm_error *error);
// Runs the primed call to its exit. `entered`: it is under way.
int call_run_on(struct injection *in, bool entered, int64_t *ret, struct tm_error *error);

#endif
