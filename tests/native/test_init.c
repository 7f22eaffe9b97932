// tuimig-init, in a real PID namespace: it ends as its main process ends, holds nothing open, reaps, and takes the rest of
// the namespace with it. $TUIMIG_INIT is the program.
#include <dirent.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "harness.h"

struct stage {
    volatile int ready, go;
};

static struct stage *stage;

typedef void main_body(void);

// The init as a child of ours, in a namespace of its own where `body` is process 2.
static pid_t start(main_body *body) {
    stage = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(stage != MAP_FAILED, "mmap");
    struct clone_args clone = {.flags = CLONE_NEWPID, .exit_signal = SIGCHLD};
    fflush(NULL);
    pid_t init = (pid_t)syscall(SYS_clone3, &clone, sizeof clone);
    CHECK(init >= 0, "clone3");
    if (init == 0) {
        pid_t main_process = fork();
        if (main_process == 0) {
            while (!stage->go) {
                usleep(1000);
            }
            body();
            _exit(0);
        }
        char number[16];
        snprintf(number, sizeof number, "%d", main_process);
        execl(getenv("TUIMIG_INIT"), "tuimig-init", number, (char *)NULL);
        _exit(96);
    }
    char path[64], name[32] = "";
    snprintf(path, sizeof path, "/proc/%d/comm", init);
    while (strcmp(name, "tuimig-init\n")) {
        FILE *file = fopen(path, "r");
        CHECK(file && fgets(name, sizeof name, file), "the init is gone");
        fclose(file);
    }
    return init;
}

static int end_of(pid_t init) {
    int status;
    CHECK(waitpid(init, &status, 0) == init, "waitpid");
    return status;
}

static int run(main_body *body) {
    pid_t init = start(body);
    stage->go = 1;
    int status = end_of(init);
    CHECK(WIFEXITED(status), "the init died: %#x", (unsigned)status);
    return WEXITSTATUS(status);
}

static void exit_with_7(void) { _exit(7); }
static void die_by_term(void) {
    signal(SIGTERM, SIG_DFL);
    kill(getpid(), SIGTERM);
}

static void ends_as_the_main_process(void) {
    CHECK(run(exit_with_7) == 7, "status");
    CHECK(run(die_by_term) == 128 + SIGTERM, "status");
}

// An orphan ends, then the main process: the init must not take the one for the other.
static void leave_orphans(void) {
    for (int i = 0; i < 50; i++) {
        if (fork() == 0) {
            if (fork() == 0) {
                _exit(3);
            }
            _exit(4);
        }
        wait(NULL);
    }
    // All that ended were reaped: the namespace has no zombie, so every id but ours is free.
    for (int tries = 0; kill(-1, 0) == 0; tries++) { // everybody but us and the init
        CHECK(tries < 5000, "an orphan was not reaped");
        usleep(1000);
    }
    CHECK(errno == ESRCH, "kill");
    _exit(9);
}

static void reaps_orphans(void) { CHECK(run(leave_orphans) == 9, "status"); }

// The pipe's other end stays open in a process that only dies with the namespace.
static int survivor_pipe[2];

static void leave_survivor(void) {
    if (fork() == 0) {
        signal(SIGTERM, SIG_IGN);
        for (;;) {
            pause();
        }
    }
    _exit(5);
}

static void takes_the_rest_with_it(void) {
    CHECK(pipe(survivor_pipe) == 0, "pipe");
    CHECK(run(leave_survivor) == 5, "status");
    close(survivor_pipe[1]);
    char byte;
    CHECK(read(survivor_pipe[0], &byte, 1) == 0, "a process of the namespace is left");
}

static void wait_to_go(void) {
    while (stage->go < 2) {
        usleep(1000);
    }
}

static void holds_nothing(void) {
    pid_t init = start(wait_to_go);
    stage->go = 1;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd", init);
    for (int open_ones = 1, tries = 0; open_ones; tries++) { // it takes its name just before it closes them
        open_ones = 0;
        DIR *fds = opendir(path);
        CHECK(fds, "%s", path);
        struct dirent *entry;
        while ((entry = readdir(fds))) {
            open_ones += entry->d_name[0] != '.';
        }
        closedir(fds);
        CHECK(tries < 1000, "%d descriptors are open", open_ones);
        usleep(1000);
    }
    char line[256], where[256];
    snprintf(path, sizeof path, "/proc/%d/status", init);
    FILE *file = fopen(path, "r");
    long kb = -1;
    while (file && fgets(line, sizeof line, file) && sscanf(line, "VmRSS: %ld", &kb) != 1) {}
    CHECK(kb > 0 && kb < 2048, "%ld kB", kb);
    fclose(file);
    snprintf(path, sizeof path, "/proc/%d/cwd", init);
    ssize_t n = readlink(path, where, sizeof where - 1);
    CHECK(n == 1 && where[0] == '/', "it keeps a directory busy");
    stage->go = 2;
    CHECK(end_of(init) == 0, "status");
}

static void bad_arguments(void) {
    const char *arguments[] = {NULL, "", "x", "1", "-3", "12x"};
    for (size_t i = 0; i < sizeof arguments / sizeof *arguments; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            CHECK(close(2) == 0, "close");
            execl(getenv("TUIMIG_INIT"), "tuimig-init", arguments[i], (char *)NULL);
            _exit(96);
        }
        int status = end_of(pid);
        CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 125 || WEXITSTATUS(status) == 126), "argument %zu: %#x", i,
              (unsigned)status);
    }
}

int main(int argc, char **argv) {
    (void)argc;
    only = argv[1];
    if (!getenv("TUIMIG_INIT")) {
        fprintf(stderr, "TUIMIG_INIT is not set: tests/native/run.sh sets it\n");
        return 2;
    }
    RUN(ends_as_the_main_process, 60);
    RUN(reaps_orphans, 60);
    RUN(takes_the_rest_with_it, 60);
    RUN(holds_nothing, 60);
    RUN(bad_arguments, 60);
    return failures != 0;
}
