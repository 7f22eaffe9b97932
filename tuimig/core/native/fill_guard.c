// The guardian, process `tuimig-guard`: shares the descriptor table of the process that fills, so that every userfaultfd,
// also of children forked later, outlives a kill of that process. Then it kills the copy, and children of the copy
// get SIGBUS where they touch a missing page, never zeros. It keeps only its code, its stack and one shared page, so
// nothing here may call the C library.
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fill_internal.h"
#include "util.h"

// Its memory is not what sanitizers and the stack protector believe it is.
#if defined(__clang__)
#define BARE __attribute__((no_sanitize("address", "thread", "undefined"), no_stack_protector))
#else
#define BARE                                                                          \
    __attribute__((no_sanitize("address", "thread", "undefined"), no_stack_protector, \
                   optimize("no-tree-loop-distribute-patterns")))
#endif

#define ADDRESS_END 0x7ffffffff000ul
#define STACK_BELOW (64 * 1024ul)
#define STACK_ABOVE (8 * 1024ul)
#define LINK_NAME "anon_inode:[userfaultfd]"

enum { MOST_MEMORIES = 128, MESSAGES = 16, ROUND_MS = 200 };

struct tm_guard_control {
    int dismissed;     // all is in
    int copy_complete; // the copy is filled, children may not be
    int take_over;     // serve although the process that fills is alive
    int parent_pidfd, wake_fd, copy_pidfd;
    int identity_bytes;
    char identity[128]; // line of fdinfo that tells our userfaultfds from others of this process
    uint64_t code_start, code_end;
    int words_bytes;
    char words[200];
};

struct range {
    uint64_t start, end;
};

// ---- inside the guardian

BARE static inline long raw(long nr, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long ret;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

// The kernel writes to the rseq area at will; it must not, once that memory is gone. Length and signature are glibc's.
BARE static int drop_rseq(void) {
    if (__rseq_size == 0) {
        return 1;
    }
    char *area = (char *)__builtin_thread_pointer() + __rseq_offset;
    return raw(SYS_rseq, (long)area, 32, RSEQ_FLAG_UNREGISTER, RSEQ_SIG, 0, 0) == 0;
}

// Unmap everything but three ranges: its copy of the other process's memory would keep that memory's pages alive.
BARE static void shed_memory(const struct tm_guard_control *control, uint64_t stack) {
    struct range keep[3] = {
        {control->code_start, control->code_end},
        {(uint64_t)(uintptr_t)control, (uint64_t)(uintptr_t)control + TM_PAGE_SIZE},
        {tm_page_floor(stack) - STACK_BELOW, tm_page_floor(stack) + STACK_ABOVE},
    };
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2 - i; j++) {
            if (keep[j].start > keep[j + 1].start) {
                struct range swap = keep[j];
                keep[j] = keep[j + 1];
                keep[j + 1] = swap;
            }
        }
    }
    uint64_t from = 0;
    for (int i = 0; i < 3; i++) {
        if (keep[i].start > from) {
            raw(SYS_munmap, (long)from, (long)(keep[i].start - from), 0, 0, 0, 0);
        }
        from = keep[i].end > from ? keep[i].end : from;
    }
    raw(SYS_munmap, (long)from, (long)(ADDRESS_END - from), 0, 0, 0, 0);
}

BARE static int contains(const char *text, long bytes, const char *part, int part_bytes) {
    for (long i = 0; i + part_bytes <= bytes; i++) {
        int same = 0;
        while (same < part_bytes && text[i + same] == part[same]) {
            same++;
        }
        if (same == part_bytes) {
            return 1;
        }
    }
    return 0;
}

BARE static int number_of(const char *name) {
    int number = 0;
    for (; *name; name++) {
        if (*name < '0' || *name > '9') {
            return -1;
        }
        number = number * 10 + (*name - '0');
    }
    return number;
}

BARE static int is_ours(const struct tm_guard_control *control, int fds, int infos, const char *name) {
    char text[512];
    long bytes = raw(SYS_readlinkat, fds, (long)name, (long)text, sizeof text, 0, 0);
    if (bytes <= 0 || !contains(text, bytes, LINK_NAME, (int)sizeof LINK_NAME - 1)) {
        return 0;
    }
    int info = (int)raw(SYS_openat, infos, (long)name, O_RDONLY | O_CLOEXEC, 0, 0, 0);
    if (info < 0) {
        return 1; // better one too many held than one let go
    }
    bytes = raw(SYS_read, info, (long)text, sizeof text, 0, 0, 0);
    raw(SYS_close, info, 0, 0, 0, 0, 0);
    return bytes <= 0 || contains(text, bytes, control->identity, control->identity_bytes);
}

// The userfaultfds of ours in the shared table. `alone`: the other process is gone, so whatever else it had open must not
// stay open through us.
BARE static int find_memories(const struct tm_guard_control *control, struct pollfd *memories, int alone) {
    int fds = (int)raw(SYS_openat, AT_FDCWD, (long)"/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    int infos = (int)raw(SYS_openat, AT_FDCWD, (long)"/proc/self/fdinfo", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    int n = 0;
    _Alignas(8) char entries[2048];
    long bytes;
    while ((bytes = raw(SYS_getdents64, fds, (long)entries, sizeof entries, 0, 0, 0)) > 0) {
        for (long at = 0; at < bytes;) {
            const char *entry = entries + at; // struct linux_dirent64: ino, off, reclen, type, name
            const char *name = entry + 19;
            unsigned char low = (unsigned char)entry[16], high = (unsigned char)entry[17];
            at += low + 256 * high;
            int number = number_of(name);
            if (number < 0 || number == fds || number == infos || number == control->wake_fd ||
                number == control->parent_pidfd || number == control->copy_pidfd) {
                continue;
            }
            if (is_ours(control, fds, infos, name)) {
                if (n < MOST_MEMORIES) { // others wait until there is room: their threads wait too
                    memories[n].fd = number;
                    memories[n].events = POLLIN;
                    memories[n++].revents = 0;
                }
            } else if (alone) {
                raw(SYS_close, number, 0, 0, 0, 0, 0);
            }
        }
    }
    raw(SYS_close, fds, 0, 0, 0, 0, 0);
    raw(SYS_close, infos, 0, 0, 0, 0, 0);
    return n;
}

BARE static void poison_page(int uffd, uint64_t address) {
    struct uffdio_poison poison;
    poison.range.start = tm_page_floor(address);
    poison.range.len = TM_PAGE_SIZE;
    poison.mode = 0;
    poison.updated = 0;
    // On failure (events first, or a kernel without it) the thread waits and is woken next round to ask again.
    raw(SYS_ioctl, uffd, UFFDIO_POISON, (long)&poison, 0, 0, 0);
}

// Returns 0 if this memory is gone, or has been answered for.
BARE static int serve_memory(struct pollfd *memory) {
    // A forked child's descriptor is as its parent's was made, and blocks until its reader has changed that.
    raw(SYS_fcntl, memory->fd, F_SETFL, O_RDWR | O_NONBLOCK, 0, 0, 0);
    // What was read by the process that is gone, and not answered, must be asked again.
    struct uffdio_range all;
    all.start = 1u << 20;
    all.len = ADDRESS_END - (1u << 20);
    raw(SYS_ioctl, memory->fd, UFFDIO_WAKE, (long)&all, 0, 0, 0);
    struct uffd_msg messages[MESSAGES];
    long bytes;
    while ((bytes = raw(SYS_read, memory->fd, (long)messages, sizeof messages, 0, 0, 0)) > 0) {
        for (long i = 0; i < bytes / (long)sizeof messages[0]; i++) {
            if (messages[i].event == UFFD_EVENT_PAGEFAULT) {
                poison_page(memory->fd, messages[i].arg.pagefault.address);
            } // the others only had to be read; a fork's descriptor is in the table now
        }
        if (bytes < (long)sizeof messages) {
            break;
        }
    }
    struct uffdio_copy probe; // from an address that nothing is mapped at: no page is changed
    probe.dst = 1u << 20;
    probe.src = 1u << 20;
    probe.len = TM_PAGE_SIZE;
    probe.mode = 0;
    probe.copy = 0;
    return raw(SYS_ioctl, memory->fd, UFFDIO_COPY, (long)&probe, 0, 0, 0) != -ESRCH;
}

BARE static void serve_the_rest(struct tm_guard_control *control, int alone) {
    if (!__atomic_load_n(&control->copy_complete, __ATOMIC_ACQUIRE)) {
        raw(SYS_pidfd_send_signal, control->copy_pidfd, SIGKILL, 0, 0, 0, 0);
    }
    if (alone) {
        raw(SYS_write, 2, (long)control->words, control->words_bytes, 0, 0, 0);
    }
    struct pollfd memories[MOST_MEMORIES];
    int n;
    while ((n = find_memories(control, memories, alone)) > 0) {
        for (int i = 0; i < n; i++) {
            if (!serve_memory(&memories[i])) {
                raw(SYS_close, memories[i].fd, 0, 0, 0, 0, 0);
            }
        }
        raw(SYS_poll, (long)memories, n, ROUND_MS, 0, 0, 0);
    }
}

BARE static void guard(struct tm_guard_control *control) {
    raw(SYS_setsid, 0, 0, 0, 0, 0, 0); // a kill of the whole process group must not reach it
    raw(SYS_prctl, PR_SET_NAME, (long)"tuimig-guard", 0, 0, 0, 0);
    if (drop_rseq()) {
        shed_memory(control, (uint64_t)(uintptr_t)__builtin_frame_address(0));
    }
    for (;;) {
        struct pollfd wait[2];
        wait[0].fd = control->parent_pidfd;
        wait[1].fd = control->wake_fd;
        wait[0].events = wait[1].events = POLLIN;
        wait[0].revents = wait[1].revents = 0;
        raw(SYS_poll, (long)wait, 2, -1, 0, 0, 0);
        if (__atomic_load_n(&control->dismissed, __ATOMIC_ACQUIRE)) {
            break;
        }
        if (wait[0].revents) {
            serve_the_rest(control, 1);
            break;
        }
        if (__atomic_load_n(&control->take_over, __ATOMIC_ACQUIRE)) {
            serve_the_rest(control, 0);
            break;
        }
    }
    raw(SYS_exit_group, 0, 0, 0, 0, 0, 0);
}

// ---- in the process that fills

static int find_object(struct dl_phdr_info *info, size_t size, void *argument) {
    (void)size;
    struct tm_guard_control *control = argument;
    uint64_t here = (uint64_t)(uintptr_t)&guard, low = UINT64_MAX, high = 0;
    int found = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        if (segment->p_type == PT_LOAD) {
            uint64_t start = info->dlpi_addr + segment->p_vaddr, end = start + segment->p_memsz;
            found |= here >= start && here < end;
            low = start < low ? start : low;
            high = end > high ? end : high;
        }
    }
    if (found) {
        control->code_start = tm_page_floor(low);
        control->code_end = tm_page_ceil(high);
    }
    return found;
}

static int read_identity(int uffd, struct tm_guard_control *control, struct tm_error *error) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", uffd);
    int info = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t bytes = info < 0 ? -1 : read(info, text, sizeof text - 1);
    if (info >= 0) {
        close(info);
    }
    if (bytes <= 0) {
        return tm_error_errno(error, "read fdinfo", "the guardian cannot recognise the copy's userfaultfd");
    }
    text[bytes] = 0;
    char *line = strstr(text, "API:");
    if (!line) {
        return tm_error_set(error, TM_SYS, 0, "read fdinfo", "the copy's userfaultfd shows no API line");
    }
    line[strcspn(line, "\n")] = 0;
    control->identity_bytes =
        snprintf(control->identity, sizeof control->identity, "%s", line); // shorter than the buffer, see the kernel
    return TM_OK;
}

int tm_guardian_create(struct tm_guardian *guardian, int uffd, int copy_pidfd, struct tm_error *error) {
    *guardian = (struct tm_guardian){.pidfd = -1, .parent_pidfd = -1, .wake_fd = -1};
    struct tm_guard_control *control =
        mmap(NULL, TM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (control == MAP_FAILED) {
        return tm_error_set(error, TM_NOMEM, errno, "mmap", "no memory for the guardian");
    }
    guardian->control = control;
    guardian->parent_pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    guardian->wake_fd = guardian->parent_pidfd < 0 ? -1 : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (guardian->wake_fd < 0) {
        return tm_error_errno(error, "pidfd_open", "the guardian cannot watch this process");
    }
    control->parent_pidfd = guardian->parent_pidfd;
    control->wake_fd = guardian->wake_fd;
    control->copy_pidfd = copy_pidfd;
    control->words_bytes = snprintf(control->words, sizeof control->words,
                                    "tuimig: process %d died before it had filled its copy; the copy was killed, since "
                                    "pages of it are missing\n",
                                    (int)getpid());
    dl_iterate_phdr(find_object, control);
    return read_identity(uffd, control, error);
}

int tm_guardian_start(struct tm_guardian *guardian, struct tm_error *error) {
    int pidfd = -1;
    struct clone_args clone = {.flags = CLONE_FILES | CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)&pidfd};
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    // exit_signal 0: our end of it makes no noise in the embedding program, which may wait for children of its own.
    struct tm_guard_control *control = guardian->control;
    long pid = raw(SYS_clone3, (long)&clone, sizeof clone, 0, 0, 0, 0);
    if (pid == 0) {
        guard(control);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pid < 0) {
        errno = (int)-pid;
        return tm_error_errno(error, "clone3", "the guardian cannot be started");
    }
    guardian->pid = (int)pid;
    guardian->pidfd = pidfd;
    return TM_OK;
}

int tm_guardian_reap(struct tm_guardian *guardian) {
    siginfo_t ended = {0};
    if (guardian->pidfd < 0 || waitid(P_PIDFD, (id_t)guardian->pidfd, &ended, WEXITED | WNOHANG | __WALL) ||
        ended.si_pid == 0) {
        return 0;
    }
    close(guardian->pidfd);
    guardian->pidfd = -1;
    return 1;
}

static void wake(struct tm_guardian *guardian, int *flag) {
    __atomic_store_n(flag, 1, __ATOMIC_RELEASE);
    eventfd_write(guardian->wake_fd, 1);
}

void tm_guardian_copy_complete(struct tm_guardian *guardian) {
    __atomic_store_n(&guardian->control->copy_complete, 1, __ATOMIC_RELEASE);
}

void tm_guardian_dismiss(struct tm_guardian *guardian) {
    if (guardian->pidfd < 0) {
        return;
    }
    wake(guardian, &guardian->control->dismissed);
    siginfo_t ended;
    while (waitid(P_PIDFD, (id_t)guardian->pidfd, &ended, WEXITED | __WALL) && errno == EINTR) {}
    close(guardian->pidfd);
    guardian->pidfd = -1;
}

void tm_guardian_take_over(struct tm_guardian *guardian) { wake(guardian, &guardian->control->take_over); }

void tm_guardian_destroy(struct tm_guardian *guardian) {
    if (!guardian->control) {
        return;
    }
    munmap(guardian->control, TM_PAGE_SIZE);
    int *fds[] = {&guardian->pidfd, &guardian->parent_pidfd, &guardian->wake_fd};
    for (int i = 0; i < 3; i++) {
        if (*fds[i] >= 0) {
            close(*fds[i]);
        }
    }
    guardian->control = NULL;
}
