// A thread of its own for descriptors.
// Whatever descriptor the target makes for us must vanish if we die at that moment. So it is made by a helper thread with a
// descriptor table of its own (clone without CLONE_FILES), and its stack holds a signal frame that makes it exit. The caller
// waits in the kernel until then (CLONE_VFORK), so that the two never use the stack at the same time, whatever becomes of us.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "inject_internal.h"

#define O_CLOEXEC_NONBLOCK (O_CLOEXEC | O_NONBLOCK)

#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL
#endif

struct helper {
    struct thread thread;
    struct injection in;
    int pidfd;
};

static int helper_frame(struct injection *in, uint64_t at, struct tm_error *error) {
    struct user_regs_struct exits = in->thread->regs;
    exits.rip = in->source->gadgets.syscall_ret;
    exits.rax = SYS_exit;
    exits.rdi = 0;
    exits.orig_rax = (unsigned long long)-1;
    exits.rsp = at;
    exits.eflags &= ~(1ull << 10);
    struct kernel_sigframe frame;
    frame_fill(&frame, in->source, &exits, ~0ull, 0);
    frame.uc_flags &= ~(uint64_t)UC_FP_XSTATE;
    struct iovec local = {&frame, sizeof frame}, remote = {(void *)(uintptr_t)at, sizeof frame};
    if (process_vm_writev(in->source->pid, &local, 1, &remote, 1, 0) != (ssize_t)sizeof frame)
        return tm_error_errno(error, "process_vm_writev", "cannot write below the stack");
    return TM_OK;
}

// Follows the caller into clone until the helper is born. The caller stays in the stop that tells of it.
static int helper_born(struct injection *in, pid_t *born, struct tm_error *error) {
    pid_t tid = in->thread->tid;
    for (int signal = 0;;) {
        if (ptrace(PTRACE_SYSCALL, tid, NULL, (void *)(long)signal))
            return tm_error_errno(error, "PTRACE_SYSCALL", "an injected call could not be run");
        signal = 0;
        struct stop stop;
        if (stop_wait_soon(tid, &stop) != 1 || stop.kind == STOP_DEAD || stop.kind == STOP_EXIT)
            return tm_error_set(error, TM_GONE, 0, "waitid", "the thread ended during an injected call");
        if (stop.kind == STOP_SIGNAL) signal = stop.signal;
        if (stop.kind == STOP_CLONE) {
            unsigned long message = 0;
            ptrace(PTRACE_GETEVENTMSG, tid, NULL, &message);
            *born = (pid_t)message;
            return TM_OK;
        }
        struct __ptrace_syscall_info info;
        if (stop.kind == STOP_CALL && ptrace(PTRACE_GET_SYSCALL_INFO, tid, (void *)sizeof info, &info) > 0 &&
            info.op == PTRACE_SYSCALL_INFO_EXIT)
            return tm_error_set(error, TM_SYS, (int)-info.exit.rval, "clone",
                                "the process cannot make one more thread");
    }
}

static int helper_begin(struct helper *helper, struct injection *in, struct tm_error *error) {
    *helper = (struct helper){.pidfd = -1};
    uint64_t frame_at = (in->buffer - sizeof(struct kernel_sigframe) - HELPER_ROOM) & ~15ull;
    int code = helper_frame(in, frame_at, error);
    if (code) return code;
    in->source->trace_options |= PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE;
    code = options_suspend(in, error);
    if (code) return code;
    const uint64_t flags = CLONE_VM | CLONE_FS | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_VFORK;
    pid_t tid = 0;
    code = inject_prime(in, SYS_clone, (uint64_t[6]){flags, frame_at}, error);
    if (!code) code = helper_born(in, &tid, error);
    if (code) return code;
    helper->thread = (struct thread){.tid = tid, .seized = true};
    helper->in =
        (struct injection){.source = in->source, .thread = &helper->thread, .buffer = in->buffer, .begun = true};
    struct stop stop; // its first: it is born traced, into a group stop if the process is in one
    if (stop_wait_soon(tid, &stop) != 1 || (stop.kind != STOP_TRAP && stop.kind != STOP_GROUP))
        return tm_error_set(error, TM_GONE, 0, "waitid", "the process has ended");
    code = thread_read_regs(&helper->thread, error);
    helper->in.work = helper->thread.regs;
    helper->in.work.rsp = frame_at;
    helper->pidfd = (int)syscall(SYS_pidfd_open, tid, PIDFD_THREAD);
    if (!code && helper->pidfd < 0) code = tm_error_errno(error, "pidfd_open", "cannot take descriptors of a thread");
    return code;
}

// The helper exits, and with it all it had open; the caller comes back from clone. It is not let go of before: in a process
// that is stopped as a group it would stop too, and the caller would wait for it.
static int helper_end(struct helper *helper, struct injection *in, struct tm_error *error) {
    if (helper->pidfd >= 0) close(helper->pidfd);
    pid_t tid = helper->thread.tid;
    inject_prime(&helper->in, SYS_exit, (uint64_t[6]){0}, NULL);
    struct stop stop;
    do
        if (ptrace(PTRACE_CONT, tid, NULL, NULL)) break;
    while (stop_wait_soon(tid, &stop) == 1 && stop.kind != STOP_DEAD);
    int64_t ret;
    return call_run_on(in, true, &ret, error);
}

static int take_descriptor(const struct helper *helper, int64_t number, int *out, struct tm_error *error) {
    int fd = (int)syscall(SYS_pidfd_getfd, helper->pidfd, (int)number, 0);
    if (fd < 0) return tm_error_errno(error, "pidfd_getfd", "cannot take a descriptor");
    *out = fd;
    return TM_OK;
}

// A target that may not make a userfaultfd that sees kernel faults is lent /dev/userfaultfd over a socket of its own.
static int lend_device(struct helper *helper, int dev_fd, int64_t *device, struct tm_error *error) {
    struct injection *in = &helper->in;
    struct {
        int32_t pair[2];
        uint64_t pad;
        struct msghdr message;
        struct iovec vector;
        uint8_t control[CMSG_SPACE(sizeof(int))];
        uint8_t byte;
    } image = {0};
    int64_t ret;
    int ours = -1;
    int code =
        inject_call(in, SYS_socketpair, (uint64_t[6]){AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, in->buffer}, &ret, error);
    if (code) return code;
    if (ret < 0) return tm_error_set(error, TM_SYS, (int)-ret, "socketpair", "cannot lend /dev/userfaultfd");
    int err = target_read(in->source, in->buffer, image.pair, sizeof image.pair);
    if (err) return tm_error_set(error, TM_GONE, err, "process_vm_readv", "cannot read a call's result");
    code = take_descriptor(helper, image.pair[0], &ours, error);
    if (code) return code;
    code = inject_call(in, SYS_close, (uint64_t[6]){(uint64_t)image.pair[0]}, &ret, error); // the limit may be three
    if (code) {
        close(ours);
        return code;
    }
    struct msghdr message = {0};
    char byte = 0, control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec vector = {&byte, 1};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(head), &dev_fd, sizeof dev_fd);
    if (sendmsg(ours, &message, 0) != 1) code = tm_error_errno(error, "sendmsg", "cannot lend /dev/userfaultfd");
    close(ours);
    if (code) return code;
    uint64_t base = in->buffer;
    image.vector = (struct iovec){(void *)(base + offsetof(__typeof__(image), byte)), 1};
    image.message.msg_iov = (void *)(base + offsetof(__typeof__(image), vector));
    image.message.msg_iovlen = 1;
    image.message.msg_control = (void *)(base + offsetof(__typeof__(image), control));
    image.message.msg_controllen = sizeof image.control;
    struct iovec local = {&image, sizeof image}, remote = {(void *)(uintptr_t)base, sizeof image};
    if (process_vm_writev(in->source->pid, &local, 1, &remote, 1, 0) != sizeof image)
        return tm_error_errno(error, "process_vm_writev", "cannot write below the stack");
    uint64_t message_at = base + offsetof(__typeof__(image), message);
    uint64_t args[6] = {(uint64_t)image.pair[1], message_at, MSG_CMSG_CLOEXEC | MSG_DONTWAIT};
    code = inject_call(in, SYS_recvmsg, args, &ret, error);
    if (code) return code;
    err = target_read(in->source, base + offsetof(__typeof__(image), control), image.control, sizeof image.control);
    if (err) return tm_error_set(error, TM_GONE, err, "process_vm_readv", "cannot read a call's result");
    struct cmsghdr got;
    memcpy(&got, image.control, sizeof got);
    if (ret != 1 || got.cmsg_type != SCM_RIGHTS || got.cmsg_len != CMSG_LEN(sizeof(int)))
        return tm_error_set(error, TM_SYS, ret < 0 ? (int)-ret : EMFILE, "recvmsg", "cannot lend /dev/userfaultfd");
    int32_t number;
    memcpy(&number, image.control + CMSG_LEN(0), sizeof number);
    *device = number;
    return inject_call(in, SYS_close, (uint64_t[6]){(uint64_t)image.pair[1]}, &ret, error);
}

static int helper_userfaultfd(struct helper *helper, int dev_fd, int *out, struct tm_error *error) {
    struct injection *in = &helper->in;
    int64_t ret = -EPERM, device = -1;
    int code = TM_OK;
    // Room for what we make, even where the process has none: the table is the helper's own.
    for (uint64_t number = 0; !code && number < 5; number++)
        code = inject_call(in, SYS_close, (uint64_t[6]){number}, &ret, error);
    if (!code) code = inject_call(in, SYS_userfaultfd, (uint64_t[6]){O_CLOEXEC_NONBLOCK}, &ret, error);
    if (!code && ret == -EPERM && dev_fd >= 0) {
        code = lend_device(helper, dev_fd, &device, error);
        if (!code)
            code = inject_call(in, SYS_ioctl, (uint64_t[6]){(uint64_t)device, USERFAULTFD_IOC_NEW, O_CLOEXEC_NONBLOCK},
                               &ret, error);
    }
    if (code) return code;
    if (ret < 0)
        return tm_error_set(error, TM_PRIVILEGE, (int)-ret, "userfaultfd", "the process may not make a userfaultfd");
    return take_descriptor(helper, ret, out, error);
}

int inject_userfaultfds(struct injection *in, int dev_fd, int *out, uint32_t n, struct tm_error *error) {
    struct helper helper;
    int code = helper_begin(&helper, in, error);
    for (uint32_t i = 0; i < n; i++) out[i] = -1;
    for (uint32_t i = 0; !code && i < n; i++) code = helper_userfaultfd(&helper, dev_fd, &out[i], error);
    int end = helper.thread.tid ? helper_end(&helper, in, code ? NULL : error) : TM_OK;
    for (uint32_t i = 0; (end || code) && i < n; i++) {
        if (out[i] >= 0) close(out[i]);
        out[i] = -1;
    }
    return code ? code : end;
}
