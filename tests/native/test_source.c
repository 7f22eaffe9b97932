// The source engine on a process whose threads write all the time: what is captured is one instant, and the process does
// not notice. $TARGET_WRITERS is that process's program.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "harness.h"
#include "source.h"
#include "spool.h"
#include "writers.h"

#define WRITERS_END (WRITERS_BASE + WRITERS * WRITERS_PAGES * WRITERS_PAGE)

struct target {
    pid_t pid;
    int pidfd;
    int input; // closed: it ends
    int pages_fd;
    struct tm_spool *spool;
    struct tm_source *source;
};

static void start(struct target *target, int frees) {
    int input[2], output[2];
    CHECK(pipe2(input, O_CLOEXEC) == 0 && pipe2(output, O_CLOEXEC) == 0, "pipe");
    fflush(NULL);
    target->pid = fork();
    if (target->pid == 0) {
        dup2(input[0], 0);
        dup2(output[1], 1);
        execl(getenv("TARGET_WRITERS"), "writers", frees ? "free" : (char *)NULL, (char *)NULL);
        _exit(96);
    }
    char byte;
    close(input[0]);
    close(output[1]);
    CHECK(read(output[0], &byte, 1) == 1, "the target did not start");
    close(output[0]);
    target->input = input[1];
    target->pidfd = (int)syscall(SYS_pidfd_open, target->pid, 0);
    CHECK_OK(tm_source_create(target->pid, target->pidfd, &target->source, why));
    target->spool = NULL;
    target->pages_fd = -1;
}

// A spool of its own for every attempt, as a snapshot has.
static void new_spool(struct target *target) {
    tm_spool_destroy(target->spool);
    if (target->pages_fd >= 0) {
        close(target->pages_fd);
    }
    target->pages_fd = (int)syscall(SYS_memfd_create, "spool", MFD_CLOEXEC);
    CHECK_OK(tm_spool_create(target->pages_fd, 0, 1, &target->spool, why));
}

enum { IN_THE_FREEZE = 1, IN_THE_WINDOW = 2 }; // where the rounds of pre-copy end

static int rounds_then_freeze(struct target *target, const struct tm_freeze_plan *plan, int ending,
                              struct tm_error *error) {
    for (int i = 0; i < 4; i++) {
        struct tm_round round = {0};
        while (!round.complete) {
            int code = tm_source_round(target->source, plan, 1, &round, error);
            if (code) {
                return code;
            }
        }
        CHECK(round.number == i, "round %d shows as %d", i, round.number);
        CHECK(i > 0 || round.copied >= WRITERS * WRITERS_PAGES, "%lu pages in the first round", round.copied);
    }
    if (ending == IN_THE_WINDOW) {
        uint64_t given_up = 0;
        int code = tm_source_give_up(target->source, 0, &given_up, error);
        if (code) {
            return code;
        }
        CHECK(given_up >= WRITERS * WRITERS_PAGES * WRITERS_PAGE, "%lu bytes are left to the window", given_up);
    }
    return tm_source_freeze(target->source, plan, error);
}

static int freeze(struct target *target, int guarded, int ending, struct tm_error *error) {
    new_spool(target);
    static const struct tm_range range = {.start = WRITERS_BASE, .end = WRITERS_END, .treatment = TM_PROTECTED};
    struct tm_freeze_plan plan = {
        .ranges = &range,
        .n_ranges = 1,
        .eager_below = 1 << 20,
        .class_treatment = {-1, -1, -1},
        .guarded = guarded,
        .verify = 1,
        .deadline_us = 2000000, // sanitizers and busy machines are slow
        .eager_estimate = 1 << 20,
        .spool = target->spool,
    };
    return ending ? rounds_then_freeze(target, &plan, ending, error) : tm_source_freeze(target->source, &plan, error);
}

static int wait_until_captured(struct target *target, struct tm_error *error) {
    for (;;) {
        int failed = tm_source_wait(target->source, 100, error);
        struct tm_source_progress progress;
        tm_source_progress(target->source, &progress);
        if (failed || progress.state == TM_CAPTURED) {
            return failed;
        }
        CHECK(progress.state == TM_CAPTURING, "state %d", progress.state);
    }
}

// The whole attempt. TM_OK: captured and proved.
static int capture(struct target *target, int guarded, int ending, struct tm_error *error) {
    int32_t tracked = TM_TRACK_NONE;
    int failed = tm_source_attach(target->source, -1, ending ? TM_TRACK_ASYNC : TM_TRACK_NONE, &tracked, error);
    CHECK(failed || !ending || tracked == TM_TRACK_ASYNC, "this kernel cannot track writes");
    failed = failed ? failed : freeze(target, guarded, ending, error);
    if (failed) {
        return failed;
    }
    failed = wait_until_captured(target, error);
    int unfinished = tm_source_end(target->source, failed ? NULL : error);
    return failed ? failed : unfinished;
}

static void check_picture(struct target *target) {
    static uint64_t pages[WRITERS_PAGES * 512];
    const struct tm_region_state *regions;
    uint32_t n = tm_source_regions(target->source, &regions);
    for (unsigned writer = 0; writer < WRITERS; writer++) {
        uint64_t start = WRITERS_BASE + writer * WRITERS_PAGES * WRITERS_PAGE;
        uint32_t i = 0;
        while (i < n && !(regions[i].start <= start && start < regions[i].end)) {
            i++;
        }
        CHECK(i < n && regions[i].treatment == TM_PROTECTED, "no such region");
        CHECK(regions[i].end >= start + WRITERS_PAGES * WRITERS_PAGE, "the region is in parts");
        uint64_t first = (regions[i].slot + start - regions[i].start) / WRITERS_PAGE;
        CHECK_OK(tm_spool_get(target->spool, first, pages, WRITERS_PAGES, why));
        uint64_t upto;
        const char *wrong = writers_check(writer, pages, &upto);
        CHECK(!wrong && upto > 0, "writer %u up to %lu: %s", writer, upto, wrong);
    }
}

static void finish(struct target *target) {
    tm_source_destroy(target->source);
    tm_spool_destroy(target->spool);
    close(target->pages_fd);
    close(target->input);
    int status;
    CHECK(waitpid(target->pid, &status, 0) == target->pid && status == 0, "the target ended with %#x",
          (unsigned)status);
    close(target->pidfd);
}

static void captures(int guarded, int frees, int times, int may_lose, int ending) {
    struct target target;
    start(&target, frees);
    int exact = 0;
    for (int i = 0; i < times; i++) {
        struct tm_error error = {0};
        int code = capture(&target, guarded, ending, &error);
        if (code == TM_LOST && may_lose) {
            continue;
        }
        CHECK(code == TM_OK, "%d: %s: %s", code, error.where, error.what);
        CHECK_OK(tm_source_verify(target.source, why));
        check_picture(&target);
        struct tm_source_progress progress;
        tm_source_progress(target.source, &progress);
        if (ending == IN_THE_FREEZE) {
            CHECK(progress.wp_faults == 0 && progress.swept_pages == 0, "there was a window");
            CHECK(progress.precopied_pages + progress.dirty_pages >= WRITERS * WRITERS_PAGES, "%lu valid, %lu dirty",
                  progress.precopied_pages, progress.dirty_pages);
        }
        CHECK(progress.verified_pages >= WRITERS * WRITERS_PAGES, "%lu pages verified", progress.verified_pages);
        exact++;
    }
    CHECK(exact || may_lose, "none");
    finish(&target);
}

static void one_instant(void) { captures(0, 0, 5, 0, 0); }
static void one_instant_guarded(void) { captures(1, 0, 2, 0, 0); }
static void freed_memory_is_lost_loudly(void) { captures(0, 1, 5, 1, 0); }
static void freed_memory_is_kept_by_the_guard(void) { captures(1, 1, 3, 0, 0); }
static void one_instant_after_rounds(void) { captures(0, 0, 5, 0, IN_THE_FREEZE); }
static void nothing_freed_in_the_rounds_is_lost(void) { captures(0, 1, 5, 0, IN_THE_FREEZE); }
static void rounds_that_end_in_the_window(void) { captures(0, 0, 4, 0, IN_THE_WINDOW); }

static void given_up_at_any_moment(void) {
    for (int i = 0; i < 6; i++) {
        struct target target;
        start(&target, i % 2);
        CHECK_OK(tm_source_attach(target.source, -1, TM_TRACK_NONE, &(int32_t){0}, why));
        CHECK_OK(freeze(&target, i > 3, 0, why));
        usleep((useconds_t)i * 300);
        finish(&target); // the capture is under way
    }
}

static void the_target_dies(void) {
    struct target target;
    start(&target, 0);
    CHECK_OK(tm_source_attach(target.source, -1, TM_TRACK_NONE, &(int32_t){0}, why));
    CHECK_OK(freeze(&target, 0, 0, why));
    CHECK(kill(target.pid, SIGKILL) == 0, "kill");
    struct tm_error error = {0};
    int code = wait_until_captured(&target, &error);
    int ended = tm_source_end(target.source, code ? NULL : &error);
    CHECK(code == TM_GONE || (code == TM_OK && (ended == TM_OK || ended == TM_GONE)), "%d, %d: %s", code, ended,
          error.what);
    tm_source_destroy(target.source);
    tm_spool_destroy(target.spool);
    close(target.input);
    // The engine, whose thread is in this process, may have reaped it already: no status then.
    int status = 0;
    pid_t reaped = waitpid(target.pid, &status, 0);
    CHECK(reaped < 0 ? errno == ECHILD : WTERMSIG(status) == SIGKILL, "%#x", (unsigned)status);
    close(target.pidfd);
    close(target.pages_fd);
}

int main(int argc, char **argv) {
    (void)argc;
    only = argv[1];
    if (!getenv("TARGET_WRITERS")) {
        fprintf(stderr, "TARGET_WRITERS is not set: tests/native/run.sh sets it\n");
        return 2;
    }
    RUN(one_instant, 120);
    RUN(one_instant_guarded, 120);
    RUN(freed_memory_is_lost_loudly, 120);
    RUN(freed_memory_is_kept_by_the_guard, 120);
    RUN(one_instant_after_rounds, 120);
    RUN(nothing_freed_in_the_rounds_is_lost, 120);
    RUN(rounds_that_end_in_the_window, 120);
    RUN(given_up_at_any_moment, 120);
    RUN(the_target_dies, 60);
    return failures != 0;
}
