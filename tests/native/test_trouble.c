// The source side on processes that make trouble: what is captured is T0 or the attempt fails, and the process is as before.
#include <dirent.h>
#include <fcntl.h>
#include <time.h>

#include "harness.h"
#include "held.h"

enum { HUNDREDS_OF_MB = 65536 / SLOWER }; // pages: the capture of so many takes long enough to do things in its window

static void well_and_free(struct held *held) {
    held_let_go(held);
    CHECK(held_well(held), "it is not well afterwards");
    int status = held_finish(held);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %x", (unsigned)status);
}

static void page_is(struct held *held, uint64_t page, uint64_t first, uint64_t last) {
    uint64_t words[512];
    held_page(held, (uint64_t)SUBJECT + page * PAGE, words);
    CHECK(words[0] == first && words[511] == last, "page %llu: %llx and %llx, not %llx and %llx",
          (unsigned long long)page, (unsigned long long)words[0], (unsigned long long)words[511],
          (unsigned long long)first, (unsigned long long)last);
}

static void all_captured(struct held *held, uint64_t pages) {
    for (uint64_t page = 0; page < pages; page++) page_is(held, page, subject_word(page), ~subject_word(page));
}

#define CAPTURED(held, how)                                                                           \
    do {                                                                                              \
        int captured_ = held_capture(held, how);                                                      \
        CHECK(captured_ == 0, "code %d: %s: %s", captured_, (held)->error.where, (held)->error.what); \
    } while (0)

// ---- what is captured is one instant

// The writer stamps pages in order: at any instant there is one place behind which pages have the generation before.
static void one_instant(int how) {
    enum { PAGES = 2048 };
    struct held held;
    held_start(&held, "stamp", PAGES, PAGES);
    for (int round = 0; round < 10; round++) {
        CAPTURED(&held, how);
        uint64_t words[512];
        held_page(&held, (uint64_t)SUBJECT, words);
        uint64_t generation = words[0] >> 32, last = words[0] & 0xffffffff;
        for (uint64_t page = 1; page < PAGES; page++) {
            held_page(&held, (uint64_t)SUBJECT + page * PAGE, words);
            if (page == last + 1 && words[0] == generation) continue; // in the middle of being stamped
            if (last + 1 == PAGES && page == 1 && words[0] == generation + 1) continue;
            uint64_t expected = page <= last ? generation : generation - 1;
            CHECK(words[0] == expected && words[511] == expected, "round %d: %llu.%llu, page %llu is of %llu and %llu",
                  round, (unsigned long long)generation, (unsigned long long)last, (unsigned long long)page,
                  (unsigned long long)words[0], (unsigned long long)words[511]);
        }
    }
    well_and_free(&held);
}

static void one_instant_optimistic(void) { one_instant(OPTIMISTIC | VERIFY); }
static void one_instant_guarded(void) { one_instant(GUARDED | VERIFY); }

static void huge_pages_stay_whole(void) {
    enum { PAGES = 16384 };
    struct held held;
    held_start(&held, "huge", PAGES, PAGES);
    uint64_t before = held_smaps(&held, (uint64_t)SUBJECT, "AnonHugePages:");
    CHECK(before == PAGES * 4, "%llu kB of huge pages", (unsigned long long)before);
    for (int how = OPTIMISTIC; how <= GUARDED; how++) {
        CAPTURED(&held, how | VERIFY);
        all_captured(&held, PAGES);
    }
    held_let_go(&held);
    uint64_t after = held_smaps(&held, (uint64_t)SUBJECT, "AnonHugePages:");
    CHECK(after == before, "%llu of %llu kB are left", (unsigned long long)after, (unsigned long long)before);
    well_and_free(&held);
}

static void zero_pages(void) {
    enum { PAGES = 4096 };
    struct held held;
    held_start(&held, "zeros", PAGES, PAGES);
    CHECK(held_freeze(&held, VERIFY) == 0, "%s", held.error.what);
    held_do(&held, 'w'); // stores everywhere, at once
    CHECK(held_end(&held, VERIFY) == 0, "%s", held.error.what);
    for (uint64_t page = 0; page < PAGES; page++) {
        uint64_t words[512], expected = page % 4 == 2 ? subject_word(page) : 0;
        held_page(&held, (uint64_t)SUBJECT + page * PAGE, words);
        CHECK(words[0] == expected && words[7] == 0, "page %llu", (unsigned long long)page);
    }
    well_and_free(&held);
}

static void content_without_access(void) {
    enum { PAGES = 1024 };
    struct held held;
    held_start(&held, "none", PAGES, PAGES);
    CAPTURED(&held, VERIFY);
    all_captured(&held, PAGES);
    CAPTURED(&held, VERIFY | GUARDED);
    all_captured(&held, PAGES);
    well_and_free(&held);
}

// ---- what is freed in the window

static void freed(char deed, int how, int expected) {
    struct held held;
    held_start(&held, "plain", HUNDREDS_OF_MB, HUNDREDS_OF_MB);
    int code = held_freeze(&held, how | VERIFY);
    CHECK(code == 0, "%s: %s", held.error.where, held.error.what);
    held_do(&held, deed);
    code = held_end(&held, how | VERIFY);
    CHECK(code == expected, "deed %c: code %d, not %d: %s: %s", deed, code, expected, held.error.where,
          held.error.what);
    if (code == 0) all_captured(&held, HUNDREDS_OF_MB);
    well_and_free(&held);
}

static void freed_is_lost(void) {
    for (const char *deed = "umosdgh"; *deed; deed++) freed(*deed, OPTIMISTIC, TM_LOST);
}

static void freed_is_kept_under_guard(void) {
    for (const char *deed = "umosdfghp"; *deed; deed++) freed(*deed, GUARDED, TM_OK);
}

static void children_harm_nothing(void) {
    for (const char *deed = "kvp"; *deed; deed++) {
        freed(*deed, OPTIMISTIC, TM_OK);
        freed(*deed, GUARDED, TM_OK);
    }
}

// ---- its end in the window

static void ends(char deed, int how, int expected, int status_expected) {
    struct held held;
    held_start(&held, "plain", HUNDREDS_OF_MB, HUNDREDS_OF_MB);
    CHECK(held_freeze(&held, how) == 0, "%s", held.error.what);
    held_do(&held, deed);
    int code = held_end(&held, how);
    CHECK(code == expected, "deed %c: code %d, not %d: %s: %s", deed, code, expected, held.error.where,
          held.error.what);
    if (code == 0) all_captured(&held, HUNDREDS_OF_MB);
    int status = held_finish(&held);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == status_expected, "status %x", (unsigned)status);
}

static void exit_waits_for_the_capture(void) {
    ends('e', OPTIMISTIC, TM_OK, 7);
    ends('e', GUARDED, TM_OK, 7);
}

static void exec_is_noticed(void) {
    ends('x', OPTIMISTIC, TM_GONE, 0);
    ends('x', GUARDED, TM_OK, 0);
}

// What was opened before would show the old memory, which is gone: an empty picture of a program that is not.
static void exec_before_the_freeze(void) {
    for (int attached = 0; attached < 2; attached++) {
        struct held held;
        held_start(&held, "plain", 64, 16);
        int code = attached ? held_capture(&held, OPTIMISTIC)
                            : tm_source_create(held.pid, held.pidfd, &held.source, &held.error);
        CHECK(code == 0, "%s", held.error.what);
        held_do(&held, 'x');
        char byte = 0;
        CHECK(read(held.from, &byte, 1) == 1 && byte == 'r', "it did not execute itself");
        code = held_freeze(&held, OPTIMISTIC);
        CHECK(code == TM_GONE, "code %d: %s", code, held.error.what);
        well_and_free(&held);
    }
}

// ---- we are killed: it goes on as if nothing had happened

static void we_are_killed(const char *mode, uint64_t n, int how) {
    struct held held;
    held_start(&held, mode, n, n);
    unsigned seed = 1;
    for (int round = 0; round < 60; round++) {
        pid_t pid = fork();
        if (pid == 0)
            for (int i = 0;; i++) {
                if (held_freeze(&held, how)) continue;
                if (i % 2)
                    held_end(&held, how);
                else
                    tm_source_end(held.source, &held.error);
            }
        usleep((useconds_t)(rand_r(&seed) % 30000));
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid, "waitpid");
        CHECK(held_well(&held), "round %d", round);
    }
    well_and_free(&held);
}

static void we_are_killed_optimistic(void) { we_are_killed("stamp", 4096, OPTIMISTIC); }
static void we_are_killed_guarded(void) { we_are_killed("stamp", 4096, GUARDED); }
static void we_are_killed_over_births(void) { we_are_killed("spawn", 1024, GUARDED); }
static void we_are_killed_over_joins(void) { we_are_killed("join", 1024, OPTIMISTIC); }

static void killed_in_the_window(void) {
    struct held held;
    held_start(&held, "plain", HUNDREDS_OF_MB, HUNDREDS_OF_MB);
    CHECK(held_freeze(&held, OPTIMISTIC) == 0, "%s", held.error.what);
    kill(held.pid, SIGKILL);
    int code = held_end(&held, OPTIMISTIC);
    CHECK(code == 0 || code == TM_GONE, "code %d: %s", code, held.error.what);
    if (code == 0) all_captured(&held, HUNDREDS_OF_MB);
    int status = held_finish(&held);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %x", (unsigned)status);
}

static void first_thread_ends(void) {
    struct held held;
    held_start(&held, "leader", HUNDREDS_OF_MB, HUNDREDS_OF_MB);
    CHECK(held_freeze(&held, OPTIMISTIC) == 0, "%s", held.error.what);
    held_do(&held, 'l');
    int code = held_end(&held, OPTIMISTIC);
    CHECK(code == 0, "code %d: %s", code, held.error.what);
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    held_let_go(&held);
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK(after.tv_sec - before.tv_sec < 3, "letting go took %ld s", (long)(after.tv_sec - before.tv_sec));
    kill(held.pid, SIGKILL);
    held_finish(&held);
}

// ---- cancelled

static void cancelled(int how) {
    struct held held;
    held_start(&held, "stamp", 16384, 16384);
    for (int round = 0; round < 10; round++) {
        CHECK(held_freeze(&held, how) == 0, "%s", held.error.what);
        if (round % 2) {
            usleep((useconds_t)round * 300);
            CHECK(tm_source_end(held.source, &held.error) != 0, "an unfinished capture passed for a whole one");
        } else {
            held_let_go(&held);
        }
        CHECK(held_well(&held), "it stands still");
    }
    well_and_free(&held);
}

static void cancelled_optimistic(void) { cancelled(OPTIMISTIC); }
static void cancelled_guarded(void) { cancelled(GUARDED); }

// ---- threads

static void dying_threads(int how) {
    struct held held;
    held_start(&held, "join", 8192, 8192);
    for (int round = 0; round < 30 / SLOWER; round++) {
        CAPTURED(&held, how | VERIFY);
        CHECK(held_well(&held), "a join never returned, or a robust mutex did not tell");
    }
    well_and_free(&held);
}

static void dying_threads_optimistic(void) { dying_threads(OPTIMISTIC); }
static void dying_threads_guarded(void) { dying_threads(GUARDED); }

static void threads_come_and_go(void) {
    struct held held;
    held_start(&held, "spawn", 8192, 8192);
    for (int round = 0; round < 40 / SLOWER; round++) {
        CAPTURED(&held, (round % 2 ? GUARDED : OPTIMISTIC) | VERIFY);
        CHECK(held_well(&held), "it stands still");
    }
    well_and_free(&held);
}

static void many_threads(void) {
    struct held held;
    held_start(&held, "threads", 1000, 64);
    for (int how = OPTIMISTIC; how <= GUARDED; how++) {
        CAPTURED(&held, how | VERIFY);
        const struct tm_thread_state *threads;
        CHECK(tm_source_threads(held.source, &threads) == 1001, "threads");
    }
    well_and_free(&held);
}

static void crowd_on_the_same_pages(int how) {
    struct held held;
    held_start(&held, "crowd", 200, 8192);
    for (int round = 0; round < 5; round++) {
        CHECK(held_freeze(&held, how | VERIFY) == 0, "%s: %s", held.error.where, held.error.what);
        held_do(&held, 'g');
        int code = held_end(&held, how | VERIFY);
        CHECK(code == 0, "%s: %s", held.error.where, held.error.what);
        CHECK(held_well(&held), "it stands still");
    }
    well_and_free(&held);
}

static void crowd_optimistic(void) { crowd_on_the_same_pages(OPTIMISTIC); }
static void crowd_guarded(void) { crowd_on_the_same_pages(GUARDED); }

static void many_threads_free_at_once(void) {
    enum { THREADS = 600 };
    struct held held;
    held_start(&held, "free", THREADS, THREADS * 16 + 32768);
    CHECK(held_freeze(&held, GUARDED | VERIFY) == 0, "%s", held.error.what);
    held_do(&held, 'g');
    CHECK(held_end(&held, GUARDED | VERIFY) == 0, "%s", held.error.what);
    all_captured(&held, THREADS * 16);
    well_and_free(&held);
}

static void forked_children_are_no_threads(void) {
    struct held held;
    held_start(&held, "fork", HUNDREDS_OF_MB, HUNDREDS_OF_MB);
    for (int round = 0; round < 30 / SLOWER; round++) {
        CHECK(held_freeze(&held, OPTIMISTIC) == 0, "%s: %s", held.error.where, held.error.what);
        const struct tm_thread_state *threads;
        uint32_t n = tm_source_threads(held.source, &threads);
        CHECK(n == 2, "round %d: %u threads of 2", round, n);
        tm_source_end(held.source, &held.error);
    }
    well_and_free(&held);
}

// A child that was forked while the process held our userfaultfd for a moment would keep it open, and the memory armed, for ever.
static void forked_children_inherit_nothing(void) {
    struct held held;
    held_start(&held, "fork", 16, 16);
    for (int round = 0; round < 300 / SLOWER; round++) {
        CHECK(held_freeze(&held, OPTIMISTIC) == 0, "%s: %s", held.error.where, held.error.what);
        tm_source_end(held.source, &held.error);
        CHECK(!held_flag(&held, (uint64_t)SUBJECT, " uw"), "round %d: still registered after the end", round);
    }
    well_and_free(&held);
}

static void filter_of_one_thread(void) {
    struct held held;
    held_start(&held, "filter", 64, 64);
    for (int how = OPTIMISTIC; how <= GUARDED; how++) CAPTURED(&held, how);
    well_and_free(&held);
}

static void stack_of_a_coroutine(void) {
    struct held held;
    held_start(&held, "coroutine", 1024, 1024);
    CAPTURED(&held, VERIFY);
    uint64_t words[512];
    held_page(&held, (uint64_t)SUBJECT + 511 * PAGE, words);
    for (int i = 0; i < 512; i++) CHECK(words[i] == 0x5a5a5a5a5a5a5a5a, "word %d below the stack", i);
    const struct tm_thread_state *threads;
    CHECK(tm_source_threads(held.source, &threads) == 2, "threads");
    CHECK(!held_smaps(&held, (uint64_t)SUBJECT, "Swap:"), "region");
    well_and_free(&held);
}

static char state_of(struct held *held) {
    char path[64], line[256], state = 0;
    snprintf(path, sizeof path, "/proc/%d/status", held->pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file)) sscanf(line, "State: %c", &state);
    if (file) fclose(file);
    return state;
}

static void stopped_by_a_signal(void) {
    struct held held;
    held_start(&held, "threads", 20, 64);
    kill(held.pid, SIGSTOP);
    while (state_of(&held) != 'T') usleep(1000);
    for (int how = OPTIMISTIC; how <= GUARDED; how++) CAPTURED(&held, how | VERIFY);
    held_let_go(&held);
    for (int i = 0; i < 1000 && state_of(&held) != 'T'; i++) usleep(1000); // it may still wait for a CPU to stop on
    CHECK(state_of(&held) == 'T', "state %c", state_of(&held));
    kill(held.pid, SIGCONT);
    well_and_free(&held);
}

static void without_privileges(void) {
    struct held held;
    held_start(&held, "lowly", 1024, 1024);
    CHECK(held.dev_fd >= 0, "/dev/userfaultfd");
    for (int how = OPTIMISTIC; how <= GUARDED; how++) {
        CAPTURED(&held, how | VERIFY);
        all_captured(&held, 1024);
    }
    well_and_free(&held);
}

// ---- large tables

static void many_regions(void) {
    enum { REGIONS = 10000 / SLOWER };
    struct held held;
    held_start(&held, "regions", REGIONS, REGIONS * 4);
    CAPTURED(&held, VERIFY);
    for (uint64_t i = 0; i < REGIONS; i++) {
        uint64_t words[512];
        held_page(&held, (uint64_t)SUBJECT + (i * 4 + 1) * PAGE, words);
        CHECK(words[0] == i + 1, "region %llu", (unsigned long long)i);
    }
    well_and_free(&held);
}

static void sparse_terabytes(void) {
    enum { GIB = 4096 / SLOWER };
    struct held held;
    held_start(&held, "sparse", GIB, (uint64_t)GIB << 18);
    for (int how = OPTIMISTIC; how <= GUARDED; how++) {
        CAPTURED(&held, how);
        for (uint64_t i = 0; i < GIB; i++) {
            uint64_t words[512];
            held_page(&held, (uint64_t)SUBJECT + (i << 30) + i * 4096, words);
            CHECK(words[0] == i + 1, "page %llu", (unsigned long long)i);
        }
    }
    well_and_free(&held);
}

static void many_like_descriptors(void) {
    struct held held;
    held_start(&held, "events", 4000, 16);
    CAPTURED(&held, OPTIMISTIC);
    struct tm_frozen_times times;
    tm_source_times(held.source, &times);
    const struct tm_descriptor_state *list;
    uint32_t n = tm_source_descriptors(held.source, &list), own = 0;
    int first = -1;
    for (uint32_t i = 0; i < n; i++) {
        own += list[i].same_as == list[i].number;
        if (list[i].number == 0) first = list[i].same_as;
        if (list[i].number > 2 && (list[i].number - 3) % 10 == 0 && strstr(list[i].link, "pipe"))
            CHECK(list[i].same_as == 0, "%d is %d", list[i].number, list[i].same_as);
    }
    CHECK(first == 0 && own >= 3600 && own < 3610, "%u open files of %u descriptors", own, n);
    CHECK(times.probes < 2000000000, "%llu ms in the freeze", (unsigned long long)times.probes / 1000000);
    well_and_free(&held);
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    only = argc > 1 ? argv[1] : NULL;
    RUN(one_instant_optimistic, 60);
    RUN(one_instant_guarded, 60);
    RUN(huge_pages_stay_whole, 60);
    RUN(zero_pages, 60);
    RUN(content_without_access, 60);
    RUN(freed_is_lost, 120);
    RUN(freed_is_kept_under_guard, 120);
    RUN(children_harm_nothing, 120);
    RUN(exit_waits_for_the_capture, 60);
    RUN(exec_is_noticed, 60);
    RUN(exec_before_the_freeze, 60);
    RUN(we_are_killed_optimistic, 60);
    RUN(we_are_killed_guarded, 60);
    RUN(we_are_killed_over_births, 60);
    RUN(we_are_killed_over_joins, 60);
    RUN(killed_in_the_window, 60);
    RUN(first_thread_ends, 60);
    RUN(cancelled_optimistic, 60);
    RUN(cancelled_guarded, 60);
    RUN(dying_threads_optimistic, 60);
    RUN(dying_threads_guarded, 60);
    RUN(threads_come_and_go, 60);
    RUN(many_threads, 60);
    RUN(crowd_optimistic, 60);
    RUN(crowd_guarded, 60);
    RUN(many_threads_free_at_once, 60);
    RUN(forked_children_are_no_threads, 60);
    RUN(forked_children_inherit_nothing, 60);
    RUN(filter_of_one_thread, 60);
    RUN(stack_of_a_coroutine, 60);
    RUN(stopped_by_a_signal, 60);
    RUN(without_privileges, 60);
    RUN(many_regions, 60);
    RUN(sparse_terabytes, 60);
    RUN(many_like_descriptors, 60);
    return failures != 0;
}
