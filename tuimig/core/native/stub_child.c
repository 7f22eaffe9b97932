// What runs in the new processes before their memory is replaced: the maker (namespace init, or a helper that goes at once)
// and the stub itself. Their memory is a copy of ours taken at any moment, so nothing but raw system calls is used.
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include "kernel.h"
#include "stub_internal.h"

enum { WAIT_SECONDS = 10 }; // we are gone if nothing comes for so long

static void publish(struct tm_stub_shared *shared, uint32_t state) {
    atomic_store(&shared->state, state);
    TM_RAW(SYS_futex, &shared->state, FUTEX_WAKE, 64, 0, 0, 0);
}

_Noreturn static void give_up(struct tm_stub_shared *shared, uint32_t step, long ret, uint32_t index) {
    shared->step = step;
    shared->err = (int32_t)-ret;
    shared->index = index;
    publish(shared, TM_STUB_FAILED);
    for (;;) {
        TM_RAW(SYS_exit_group, 1, 0, 0, 0, 0, 0);
    }
}

static void wait_word(_Atomic uint32_t *word, uint32_t value) {
    struct timespec wait = {.tv_sec = WAIT_SECONDS};
    while (atomic_load(word) == value) {
        long ret = TM_RAW(SYS_futex, word, FUTEX_WAIT, value, &wait, 0, 0);
        if (ret == -ETIMEDOUT) {
            TM_RAW(SYS_exit_group, 1, 0, 0, 0, 0, 0);
        }
    }
}

static void tell_made(struct tm_stub_shared *shared) {
    atomic_store(&shared->made, TM_MADE_TOLD);
    TM_RAW(SYS_futex, &shared->made, FUTEX_WAKE, 64, 0, 0, 0);
}

static size_t length(const char *text) {
    size_t n = 0;
    while (text[n]) {
        n++;
    }
    return n;
}

// The children made from here on live in a time namespace whose clocks continue the source's. Refusal is told, not fatal.
static void make_time_namespace(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    if (!spec->time_offsets) {
        return;
    }
    long ret = TM_RAW(SYS_unshare, CLONE_NEWTIME, 0, 0, 0, 0, 0);
    if (ret < 0) {
        shared->time_err = (int32_t)-ret;
        return;
    }
    long fd = TM_RAW(SYS_openat, AT_FDCWD, "/proc/self/timens_offsets", O_WRONLY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0) {
        shared->time_err = (int32_t)-fd;
        return;
    }
    ret = TM_RAW(SYS_write, fd, spec->time_offsets, length(spec->time_offsets), 0, 0, 0);
    if (ret < 0) {
        shared->time_err = (int32_t)-ret;
    }
    TM_RAW(SYS_close, fd, 0, 0, 0, 0, 0);
}

// A mount namespace whose /proc shows the new PID namespace.
static void mount_proc(struct tm_stub_shared *shared) {
    long ret = TM_RAW(SYS_mount, 0, "/", 0, MS_REC | MS_PRIVATE, 0, 0);
    if (ret == 0) {
        ret = TM_RAW(SYS_mount, "proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0, 0);
    }
    if (ret < 0) {
        give_up(shared, TM_STEP_MOUNT, ret, 0);
    }
}

static long clone_stub(const struct tm_stub_spec *spec, uint64_t flags, int *pidfd) {
    pid_t id = spec->pid;
    struct clone_args args = {.flags = flags};
    if (pidfd) {
        args.flags |= CLONE_PIDFD;
        args.pidfd = (uint64_t)(uintptr_t)pidfd;
    }
    if (!(flags & CLONE_PARENT)) {
        args.exit_signal = SIGCHLD; // with CLONE_PARENT it is inherited
    }
    if (!(flags & CLONE_NEWPID)) {
        args.set_tid = (uint64_t)(uintptr_t)&id;
        args.set_tid_size = 1;
    }
    return TM_RAW(SYS_clone3, &args, sizeof args, 0, 0, 0, 0);
}

// Until ptrace holds the stub, or init has its program to run, the death of who made us must end us.
static void die_with_parent(int yes) { TM_RAW(SYS_prctl, PR_SET_PDEATHSIG, yes ? SIGKILL : 0, 0, 0, 0, 0); }

_Noreturn static void become_init(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    int pidfd = -1;
    TM_RAW(SYS_setsid, 0, 0, 0, 0, 0, 0); // a signal to our process group is not meant for the copy
    mount_proc(shared);
    make_time_namespace(spec, shared);
    long ret = clone_stub(spec, 0, &pidfd);
    if (ret == 0) {
        tm_stub_child(spec, shared);
    }
    if (ret < 0) {
        give_up(shared, TM_STEP_CLONE, ret, 0);
    }
    shared->pid = (int32_t)ret;
    shared->main_fd = pidfd;
    tell_made(shared);
    wait_word(&shared->made, TM_MADE_TOLD);
    die_with_parent(0);

    char number[16];
    char *digit = number + sizeof number - 1;
    *digit = 0;
    for (uint32_t rest = (uint32_t)spec->pid; rest; rest /= 10) {
        *--digit = (char)('0' + rest % 10);
    }
    const char *argv[] = {"tuimig-init", digit, 0};
    const char *envp[] = {0};
    ret = TM_RAW(SYS_execveat, spec->init_fd, "", argv, envp, AT_EMPTY_PATH, 0);
    give_up(shared, TM_STEP_INIT, ret, 0);
}

_Noreturn void tm_stub_maker(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    die_with_parent(1);
    if (spec->new_namespace && spec->pid != 1) {
        become_init(spec, shared);
    }
    make_time_namespace(spec, shared);
    uint64_t flags = CLONE_PARENT | (spec->new_namespace ? CLONE_NEWPID | CLONE_NEWNS : 0);
    long ret = clone_stub(spec, flags, 0);
    if (ret == 0) {
        if (spec->new_namespace) {
            mount_proc(shared);
        }
        tm_stub_child(spec, shared);
    }
    if (ret < 0) {
        give_up(shared, TM_STEP_CLONE, ret, 0);
    }
    shared->pid = (int32_t)ret;
    tell_made(shared);
    for (;;) {
        TM_RAW(SYS_exit_group, 0, 0, 0, 0, 0, 0);
    }
}

static void default_dispositions(void) {
    struct {
        uint64_t handler, flags, restorer, mask;
    } action = {0, 0, 0, 0};
    for (int signal = 1; signal <= 64; signal++) {
        TM_RAW(SYS_rt_sigaction, signal, &action, 0, 8, 0, 0); // SIGKILL and SIGSTOP refuse, rightly
    }
}

static long dup_to(int32_t from, int32_t to, int32_t cloexec) {
    return TM_RAW(SYS_dup3, from, to, cloexec ? O_CLOEXEC : 0, 0, 0, 0);
}

// First all to numbers that are neither a source's nor a place's, then each to its place: so no order can overwrite a
// source. Whatever lies between the places is closed, which is all else that we had open.
static void place(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    for (uint32_t i = 0; i < spec->n_places; i++) {
        long ret = dup_to(spec->places[i].fd, spec->places[i].staging, 1);
        if (ret < 0) {
            give_up(shared, TM_STEP_PLACE, ret, i);
        }
    }
    int32_t floor = 0;
    for (uint32_t i = 0; i < spec->n_places; i++) {
        const struct tm_stub_place *p = &spec->places[i];
        long ret = dup_to(p->staging, p->number, p->cloexec);
        if (ret < 0) {
            give_up(shared, TM_STEP_PLACE, ret, i);
        }
    }
    for (uint32_t i = 0; i < spec->n_places; i++) {
        if (spec->places[i].number > floor) {
            TM_RAW(SYS_close_range, floor, spec->places[i].number - 1, 0, 0, 0, 0);
        }
        floor = spec->places[i].number + 1;
    }
    TM_RAW(SYS_close_range, floor, ~0u, 0, 0, 0, 0);
}

// Numbers up to the hard limit may be wanted, or more where that is allowed; a place beyond it fails by itself. The limit
// of before is set back ahead of the setup calls.
static void lift_limit(const struct tm_stub_spec *spec, struct tm_stub_shared *shared, struct rlimit *before) {
    long ret = TM_RAW(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, before, 0, 0);
    if (ret < 0) {
        give_up(shared, TM_STEP_LIMIT, ret, 0);
    }
    rlim_t wanted = spec->n_places ? (rlim_t)spec->places[spec->n_places - 1].number + 1 : 0;
    struct rlimit most = {before->rlim_max, before->rlim_max};
    struct rlimit more = {wanted, wanted};
    if (wanted <= before->rlim_max || TM_RAW(SYS_prlimit64, 0, RLIMIT_NOFILE, &more, 0, 0, 0) < 0) {
        ret = TM_RAW(SYS_prlimit64, 0, RLIMIT_NOFILE, &most, 0, 0, 0);
    }
    if (ret < 0) {
        give_up(shared, TM_STEP_LIMIT, ret, 0);
    }
}

// Made here because a userfaultfd belongs to the memory of the process that makes it.
static void make_userfaultfd(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    if (!spec->uffd_features) {
        return;
    }
    long fd = TM_RAW(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0, 0, 0, 0);
    if (fd == -EPERM || fd == -ENOSYS) {
        long device = TM_RAW(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0, 0, 0);
        if (device >= 0) {
            fd = TM_RAW(SYS_ioctl, device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK, 0, 0, 0);
            TM_RAW(SYS_close, device, 0, 0, 0, 0, 0);
        }
    }
    if (fd < 0) {
        give_up(shared, TM_STEP_UFFD, fd, 0);
    }
    struct uffdio_api api = {.api = UFFD_API, .features = spec->uffd_features};
    long ret = TM_RAW(SYS_ioctl, fd, UFFDIO_API, &api, 0, 0, 0);
    if (ret == 0 && fd != spec->uffd_number) {
        ret = TM_RAW(SYS_dup3, fd, spec->uffd_number, O_CLOEXEC, 0, 0, 0);
        TM_RAW(SYS_close, fd, 0, 0, 0, 0, 0);
    }
    if (ret < 0) {
        give_up(shared, TM_STEP_UFFD, ret, 1);
    }
}

// The loop of a batch of calls: 64-byte entries from rbx to r12, each number, arguments, result. It ends after the last
// or after one whose result is an error, at a breakpoint.
__asm__(
    ".pushsection .rodata\n"
    ".hidden tm_stub_loop, tm_stub_loop_end\n"
    ".globl tm_stub_loop, tm_stub_loop_end\n"
    "tm_stub_loop:\n"
    "1:  cmpq %r12, %rbx\n"
    "    jae 2f\n"
    "    movq (%rbx), %rax\n"
    "    movq 8(%rbx), %rdi\n"
    "    movq 16(%rbx), %rsi\n"
    "    movq 24(%rbx), %rdx\n"
    "    movq 32(%rbx), %r10\n"
    "    movq 40(%rbx), %r8\n"
    "    movq 48(%rbx), %r9\n"
    "    syscall\n"
    "    movq %rax, 56(%rbx)\n"
    "    addq $64, %rbx\n"
    "    cmpq $-4095, %rax\n"
    "    jb 1b\n"
    "2:  int3\n"
    "tm_stub_loop_end:\n"
    ".popsection\n");
extern const uint8_t tm_stub_loop[] __attribute__((visibility("hidden")));
extern const uint8_t tm_stub_loop_end[] __attribute__((visibility("hidden")));

static void make_scratch(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    long ret = TM_RAW(SYS_mmap, spec->scratch, TM_STUB_SCRATCH, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (ret != (long)spec->scratch) {
        give_up(shared, TM_STEP_SCRATCH, ret < 0 ? ret : -EEXIST, 0);
    }
    volatile uint8_t *code = (volatile uint8_t *)(uintptr_t)spec->scratch;
    code[0] = 0x0f; // syscall
    code[1] = 0x05;
    code[2] = 0x0f; // ud2: never reached, every call ends at its exit stop
    code[3] = 0x0b;
    for (const uint8_t *byte = tm_stub_loop; byte < tm_stub_loop_end; byte++) {
        code[TM_CODE_BATCH + (byte - tm_stub_loop)] = *byte;
    }
    ret = TM_RAW(SYS_mprotect, spec->scratch, 4096, PROT_READ | PROT_EXEC, 0, 0, 0);
    if (ret < 0) {
        give_up(shared, TM_STEP_SCRATCH, ret, 1);
    }
}

static void run_setup(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    for (uint32_t i = 0; i < spec->n_setup; i++) {
        struct tm_call call = spec->setup[i];
        for (unsigned arg = 0; arg < 6; arg++) {
            if (call.pointers & (1u << arg)) {
                call.args[arg] += (uint64_t)(uintptr_t)call.data;
            }
        }
        call.ret = tm_raw(call.nr, call.args[0], call.args[1], call.args[2], call.args[3], call.args[4], call.args[5]);
        if (tm_call_failed(&call)) {
            give_up(shared, TM_STEP_SETUP, call.ret, i);
        }
    }
}

_Noreturn void tm_stub_child(const struct tm_stub_spec *spec, struct tm_stub_shared *shared) {
    die_with_parent(1);
    default_dispositions();
    struct rlimit limit;
    lift_limit(spec, shared, &limit);
    place(spec, shared);
    make_userfaultfd(spec, shared);
    make_scratch(spec, shared);
    long ret = TM_RAW(SYS_prlimit64, 0, RLIMIT_NOFILE, &limit, 0, 0, 0);
    if (ret < 0) {
        give_up(shared, TM_STEP_LIMIT, ret, 1);
    }
    run_setup(spec, shared);
    publish(shared, TM_STUB_READY);
    wait_word(&shared->state, TM_STUB_READY); // for ptrace, which never gives control back here
    for (;;) {
        TM_RAW(SYS_exit_group, 1, 0, 0, 0, 0, 0);
    }
}
