// tuimig-init MAIN: the first process of a copy's PID namespace, a program of its own. It holds nothing open, reaps what
// ends there, and when process MAIN ends it exits with that status; the kernel then ends the rest of the namespace.
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { USAGE = 125 }; // unlike any status that a program usually has

// MAIN's status if it was killed: the shell's convention, since a process cannot end itself by a signal as PID 1.
static int status_of(const siginfo_t *ended) {
    return ended->si_code == CLD_EXITED ? ended->si_status : 128 + ended->si_status;
}

int main(int argc, char **argv) {
    char *rest = NULL;
    long main_pid = argc > 1 ? strtol(argv[1], &rest, 10) : 0;
    if (main_pid < 2 || *rest) {
        static const char usage[] = "usage: tuimig-init PID\n";
        return write(2, usage, sizeof usage - 1) < 0 ? USAGE + 1 : USAGE;
    }
    prctl(PR_SET_NAME, "tuimig-init");
    // Another's descriptors kept open here would keep its peers from seeing them closed.
    syscall(SYS_close_range, 0u, ~0u, 0u);
    if (chdir("/")) { // the root may be gone or closed to us; then a file system stays busy, nothing worse
        errno = 0;
    }
    for (;;) {
        siginfo_t ended = {0};
        if (waitid(P_ALL, 0, &ended, WEXITED | __WALL) == 0) {
            if (ended.si_pid == main_pid) {
                return status_of(&ended);
            }
        } else if (errno != EINTR) {
            return 0; // no child left: MAIN was not one, or was reaped before this program began
        }
    }
}
