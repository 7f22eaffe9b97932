// The guardian: kill -9 of the process that fills, at any moment, never lets the copy or a child of it read zeros where
// data belongs.
#include <dirent.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "harness.h"
#include "lazy.h"

#define N_PAGES 4096ul

// Shared by the test, the process that fills, the copy and its child.
struct stage {
    volatile pid_t filler, copy, child;
    volatile int child_may_go, copy_may_go, copy_read_all, guardians;
};

static struct stage *stage;

static void make_stage(void) {
    stage = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(stage != MAP_FAILED, "mmap");
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0, "subreaper");
}

static void pause_briefly(void) { usleep(1000); }

static void check_pages(uint64_t from, uint64_t to) {
    for (uint64_t page = from; page < to; page++) {
        CHECK(lazy_page_is(BASE + page * PAGE, page), "page %lu", page);
    }
}

static pid_t find_guardian(pid_t parent) {
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    pid_t found = 0;
    while (!found && (entry = readdir(proc))) {
        char path[300], text[512];
        snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
        FILE *file = atoi(entry->d_name) ? fopen(path, "r") : NULL;
        if (file && fgets(text, sizeof text, file) && strstr(text, "(tuimig-guard)")) {
            int its_parent;
            if (sscanf(strrchr(text, ')') + 2, "%*c %d", &its_parent) == 1 && its_parent == parent) {
                found = atoi(entry->d_name);
            }
        }
        if (file) {
            fclose(file);
        }
    }
    closedir(proc);
    return found;
}

static pid_t wait_for_guardian(pid_t parent) {
    pid_t found;
    while ((found = find_guardian(parent)) == 0) { // it takes its name soon after it starts
        pause_briefly();
    }
    return found;
}

static int rss_kb_of(pid_t pid) {
    char path[64];
    long kb = -1;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *file = fopen(path, "r");
    char line[256];
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "VmRSS: %ld", &kb) == 1) {
            break;
        }
    }
    if (file) {
        fclose(file);
    }
    return (int)kb;
}

// The process that fills: makes the copy, starts the filler, then does nothing until it is killed.
static pid_t start_filler(uint64_t n_pages, uint32_t options, lazy_body *body) {
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork");
    if (pid == 0) {
        struct lazy lazy;
        lazy_make(&lazy, n_pages, 0, body);
        stage->copy = lazy.pid;
        lazy_fill(&lazy, options);
        lazy_run(&lazy);
        stage->filler = getpid();
        for (;;) {
            struct tm_fill_progress progress;
            tm_fill_progress(lazy.fill, &progress);
            stage->guardians = (int)progress.guardians;
            if (progress.ended) {
                lazy_wait(&lazy);
                lazy_free(&lazy);
                _exit(0);
            }
            pause_briefly();
        }
    }
    return pid;
}

static int wait_for(pid_t pid) {
    int status = -1;
    CHECK(waitpid(pid, &status, 0) == pid, "waitpid %d", pid);
    return status;
}

static void expect_nothing_left(void) {
    for (int i = 0; waitpid(-1, NULL, WNOHANG | __WALL) >= 0; i++) {
        CHECK(i < 10000, "a process is left");
        pause_briefly();
    }
    CHECK(errno == ECHILD, "waitpid");
}

// ---- killed while the copy and a child of it still miss pages

static void fork_and_wait(uint64_t n) {
    check_pages(0, 10);
    signal(SIGBUS, SIG_DFL); // sanitizers have handlers of their own
    pid_t child = fork();
    if (child == 0) {
        check_pages(5, 20);
        stage->child = getpid();
        while (!stage->child_may_go) {
            pause_briefly();
        }
        check_pages(20, n);
        _exit(0);
    }
    for (;;) {
        pause();
    }
}

enum { GUARDIAN_KB = SANITIZED ? 4096 : 1024 }; // with the shadow of its memory

static void killed_at_rest(void) {
    make_stage();
    pid_t filler = start_filler(N_PAGES, TM_FILL_ON_DEMAND, fork_and_wait);
    while (!stage->child || !stage->filler) {
        pause_briefly();
    }
    pid_t guardian = wait_for_guardian(filler);
    CHECK(rss_kb_of(guardian) < GUARDIAN_KB, "the guardian holds %d kB", rss_kb_of(guardian));
    kill(filler, SIGKILL);
    wait_for(filler);
    int status = wait_for(stage->copy);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the copy ended with %#x", (unsigned)status);
    stage->child_may_go = 1;
    status = wait_for(stage->child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS, "its child ended with %#x", (unsigned)status);
    expect_nothing_left();
}

// ---- killed at any moment, while both are busy

static void read_on(uint64_t n) {
    for (int round = 0;; round++) {
        signal(SIGBUS, SIG_DFL);
        pid_t child = fork();
        if (child == 0) {
            check_pages(0, n);
            _exit(0);
        }
        check_pages((uint64_t)round * 64 % n, (uint64_t)round * 64 % n + 64);
        int status;
        CHECK(waitpid(child, &status, 0) == child, "waitpid");
        CHECK(status == 0 || WTERMSIG(status) == SIGBUS, "child: %#x", (unsigned)status);
    }
}

static void killed_at_any_moment(void) {
    make_stage();
    for (int i = 0; i < 30; i++) {
        memset((void *)stage, 0, sizeof *stage);
        pid_t filler = start_filler(N_PAGES, i % 2 ? TM_FILL_ON_DEMAND : 0, read_on);
        while (!stage->filler) {
            pause_briefly();
        }
        usleep((useconds_t)(i * i * 10)); // the fill takes some milliseconds
        kill(filler, SIGKILL);
        wait_for(filler);
        // If it was filled already the copy lives on: then it is ours to end.
        pid_t copy = stage->copy;
        int status = -1;
        for (int j = 0; waitpid(copy, &status, WNOHANG) == 0; j++) {
            pause_briefly();
            if (j == 300) {
                CHECK(find_guardian(getpid()) == 0, "guarded, but neither filled nor killed");
                kill(copy, SIGKILL);
            }
        }
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the copy ended with %#x", (unsigned)status);
        // Its last child: done, or SIGBUS; never a page that is not what it should be.
        int left;
        while ((left = waitpid(-1, &status, __WALL)) > 0) {
            CHECK(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS), "%d ended with %#x", left,
                  (unsigned)status);
        }
        expect_nothing_left();
    }
}

// ---- the copy is complete, a child of it is not

static void complete_but_child(uint64_t n) {
    signal(SIGBUS, SIG_DFL);
    pid_t child = fork();
    if (child == 0) {
        stage->child = getpid();
        while (!stage->child_may_go) {
            pause_briefly();
        }
        check_pages(0, n);
        _exit(0);
    }
    check_pages(0, n);
    stage->copy_read_all = 1;
    while (!stage->copy_may_go) {
        pause_briefly();
    }
    check_pages(0, n);
}

static void complete_copy_lives(void) {
    make_stage();
    pid_t filler = start_filler(N_PAGES, TM_FILL_ON_DEMAND, complete_but_child);
    while (!stage->child || !stage->filler || !stage->copy_read_all) {
        pause_briefly();
    }
    usleep(300000); // the filler looks at complete spaces a few times a second when nothing else happens
    kill(filler, SIGKILL);
    wait_for(filler);
    stage->child_may_go = 1;
    pid_t child = stage->child;
    stage->copy_may_go = 1;
    int status = wait_for(stage->copy);
    CHECK(status == 0, "the copy ended with %#x", (unsigned)status);
    status = wait_for(child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS, "its child ended with %#x", (unsigned)status);
    expect_nothing_left();
}

// ---- the guardian is killed: another takes its place

static void read_when_told(uint64_t n) {
    stage->child = getpid();
    while (!stage->child_may_go) {
        pause_briefly();
    }
    check_pages(0, n);
}

static void killed_guardian_is_replaced(void) {
    make_stage();
    pid_t filler = start_filler(N_PAGES, TM_FILL_ON_DEMAND, read_when_told);
    while (!stage->child || !stage->filler) {
        pause_briefly();
    }
    pid_t first = wait_for_guardian(filler);
    CHECK(kill(first, SIGKILL) == 0, "kill");
    while (stage->guardians < 2) {
        pause_briefly();
    }
    pid_t second;
    while ((second = find_guardian(filler)) == 0 || second == first) { // it takes its name soon after it starts
        pause_briefly();
    }
    stage->child_may_go = 1;
    int status = wait_for(filler);
    CHECK(status == 0, "the process that fills ended with %#x", (unsigned)status);
    expect_nothing_left();
}

int main(int argc, char **argv) {
    (void)argc;
    only = argv[1];
    RUN(killed_at_rest, 60);
    RUN(killed_at_any_moment, 120);
    RUN(complete_copy_lives, 60);
    RUN(killed_guardian_is_replaced, 60);
    return failures != 0;
}
