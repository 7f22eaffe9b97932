// Under a seccomp filter that kills the process for anything but a short list of calls: what is injected must not hit it.
#include "target.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static const int allowed[] = {SYS_read,  SYS_write,      SYS_close, SYS_accept4,      SYS_clock_nanosleep,
                              SYS_futex, SYS_exit_group, SYS_exit,  SYS_rt_sigreturn, SYS_restart_syscall};
enum { ALLOWED = sizeof allowed / sizeof *allowed };

static uint64_t *words;
static uint64_t rounds;

static void answer(const char *command, char *out, size_t size) {
    (void)command;
    for (uint64_t i = 0; i < (8 << 20) / 8; i += 512) {
        if (words[i] != rounds) {
            problem("word %lu is %lu, not %lu", i, words[i], rounds);
        }
    }
    rounds++;
    for (uint64_t i = 0; i < (8 << 20) / 8; i += 512) {
        words[i] = rounds;
    }
    snprintf(out, size, "{\"problems\": %lu, \"first\": \"%s\", \"rounds\": %lu}", atomic_load(&problems.count),
             problems.first, rounds);
}

int main(int argc, char **argv) {
    int listener = control_open(option(argc, argv, "--control", "/tmp/strict.control"));
    words = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ready();
    struct sock_filter program[ALLOWED + 3];
    program[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < ALLOWED; i++) {
        program[i + 1] =
            (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)allowed[i], (uint8_t)(ALLOWED - i), 0);
    }
    program[ALLOWED + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    program[ALLOWED + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog filter = {.len = ALLOWED + 3, .filter = program};
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter));
    control_serve(listener, answer);
}
