// The order of a freeze: what is done while the target stands still, and T0.
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <time.h>
#include <unistd.h>

#include "source_internal.h"

enum { CPUS_FOR_ALL = 4 };
enum { CLOSING_MOST = 4, CLOSING_ENOUGH = 64, FREEZES_MOST = 3 };

static const unsigned long WINDOW_OPTIONS =
    PTRACE_O_TRACEEXIT | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC;

static uint64_t clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

// What a freeze itself counts.
static void counts_reset(struct tm_source *source) {
    atomic_store(&source->total, 0);
    atomic_store(&source->done, 0);
    atomic_store(&source->zero, 0);
    atomic_store(&source->eager_pages, 0);
    atomic_store(&source->precopied, 0);
}

static void attempt_reset(struct tm_source *source, const struct tm_freeze_plan *plan) {
    regions_free(source);
    arena_free(&source->arena);
    source->n_threads = source->n_descriptors = source->n_probes = source->n_shared_pending = 0;
    source->plan = plan;
    source->spool = plan->spool;
    source->guarded = plan->guarded;
    source->held = plan->hold;
    atomic_store(&source->eager_stored, 0);
    source->n_pieces = 0;
    source->n_requests = source->first_request = source->n_released = source->n_held = 0;
    atomic_store(&source->next_piece, 0);
    atomic_store(&source->last_fault_ns, 0);
    source->few_cpus = sysconf(_SC_NPROCESSORS_ONLN) < CPUS_FOR_ALL;
    counts_reset(source);
    atomic_store(&source->wp_faults, 0);
    atomic_store(&source->swept, 0);
    atomic_store(&source->fault_pages, 0);
    atomic_store(&source->guard_stops, 0);
    atomic_store(&source->events, 0);
    atomic_store(&source->verified, 0);
    if (source->verify_sums) munmap(source->verify_sums, source->verify_size);
    source->verify_sums = NULL;
}

// One part of the freeze, timed.
static int part(uint64_t *into, int (*step)(struct tm_source *, struct tm_error *), struct tm_source *source,
                struct tm_error *error) {
    uint64_t begin = tm_now_ns();
    int code = step(source, error);
    *into += tm_now_ns() - begin;
    return code;
}

static int step_regions(struct tm_source *source, struct tm_error *error) {
    int code = regions_read(source, source->plan, error);
    return code ? code : tm_spool_grow(source->spool, source->spool_pages, error);
}

static int step_outside(struct tm_source *source, struct tm_error *error) {
    (void)error;
    state_read_outside(source);
    return TM_OK;
}

// While the target stands still, whoever works on that goes before others on a busy machine; where we may. Not while the
// target itself has something to do.
static void hurry(const struct tm_source *source, bool on) {
    if (!source->may_hurry) return;
    int policy = on ? SCHED_RR : SCHED_OTHER;
    struct sched_param param = {.sched_priority = on ? 1 : 0};
    pthread_setschedparam(source->tracer, policy, &param); // first: others would take its CPU
    for (uint32_t i = 0; i < source->n_workers; i++) pthread_setschedparam(source->workers[i], policy, &param);
}

static bool try_hurry(const struct tm_source *source) {
    struct sched_param rr = {.sched_priority = 1}, other = {0};
    bool may = pthread_setschedparam(source->workers[0], SCHED_RR, &rr) == 0;
    pthread_setschedparam(source->workers[0], SCHED_OTHER, &other);
    return may;
}

static void job_memory(struct tm_source *source, uint32_t index, uint8_t *buffer) {
    (void)buffer;
    const struct piece *piece = &source->pieces[index];
    bool eager = source->regions[piece->region].face.treatment == TM_EAGER;
    uint64_t begin = tm_now_ns();
    struct tm_error error = {0};
    if (eager ? eager_copy(source, piece, &error) : precopy_prove(source, piece, &error)) capture_fail(source, &error);
    atomic_fetch_add(eager ? &source->eager_ns : &source->proof_ns, tm_now_ns() - begin);
}

// From here on the target's threads do nothing, so the CPUs are ours. Not before: workers would delay injected calls, since a
// low priority does not keep them from running first, and a call may wait for the lock of the memory map that a scan holds.
static int memory_begin(struct tm_source *source, struct tm_error *error) {
    precopy_make_way(source);
    int code = eager_list(source, error);
    if (!code) code = precopy_list(source, error);
    if (code) return code;
    atomic_store(&source->eager_ns, 0);
    atomic_store(&source->proof_ns, 0);
    hurry(source, true);
    jobs_start(source, job_memory, source->n_pieces);
    return TM_OK;
}

// What it was waited for goes to each kind of work by its part in it.
static int memory_end(struct tm_source *source, struct tm_error *error) {
    uint64_t begin = tm_now_ns();
    jobs_finish(source, NULL);
    source->n_pieces = 0;
    double waited = (double)(tm_now_ns() - begin);
    double eager = (double)atomic_load(&source->eager_ns), proof = (double)atomic_load(&source->proof_ns);
    source->times.eager = (uint64_t)(waited * eager / (eager + proof + 1));
    source->times.proof = (uint64_t)(waited * proof / (eager + proof + 1));
    if (atomic_load(&source->state) != TM_FAILED) return TM_OK;
    *error = source->failure;
    return error->code;
}

// What is read of the process itself; the workers copy and prove its memory as soon as they may.
static int frozen_state(struct tm_source *source, struct tm_error *error) {
    struct tm_frozen_times *times = &source->times;
    int code = part(&times->threads, state_read_threads, source, error);
    if (!code) code = part(&times->calls, state_make_calls, source, error);
    if (!code) code = memory_begin(source, error);
    if (code) return code;
    code = part(&times->probes, step_outside, source, error);
    if (!code) code = part(&times->descriptors, state_read_descriptors, source, error);
    struct tm_error ignored;
    int memory = memory_end(source, code ? &ignored : error);
    return code ? code : memory;
}

static int frozen_work(struct tm_source *source, struct tm_error *error) {
    struct tm_frozen_times *times = &source->times;
    int code = gadgets_check(source, error);
    if (!code) code = part(&times->maps, step_regions, source, error);
    if (!code) code = frozen_state(source, error);
    if (!code) code = part(&times->dirty, precopy_take, source, error);
    if (!code) code = capture_arm(source, error);
    if (!code && source->plan->verify) code = part(&times->verify, verify_hash, source, error);
    hurry(source, false);
    times->t0_monotonic = clock_ns(CLOCK_MONOTONIC);
    times->t0_boottime = clock_ns(CLOCK_BOOTTIME);
    times->t0_realtime = clock_ns(CLOCK_REALTIME);
    return code;
}

static void thaw(struct tm_source *source) {
    uint64_t begin = tm_now_ns();
    atomic_store(&source->window, true);
    for (uint32_t i = 0; i < source->threads.n; i++) {
        struct thread *thread = &source->threads.at[i];
        thread->stopped = false;
        thread_continue(thread, source->guarded, 0);
    }
    source->times.thaw = tm_now_ns() - begin;
}

// Nothing is left to be captured: the threads are let go of right away.
static void thaw_for_good(struct tm_source *source) {
    uint64_t begin = tm_now_ns();
    threads_detach_all(source);
    source->times.thaw = tm_now_ns() - begin;
}

static bool window_needed(const struct tm_source *source) {
    for (uint32_t i = 0; i < source->n_regions; i++)
        if (source->regions[i].state) return true;
    return false;
}

// What has been written while the freeze was prepared, and while that was read: until it is little, or does not get less.
static int closing_rounds(struct tm_source *source, struct tm_error *error) {
    uint64_t before = UINT64_MAX;
    for (int i = 0; i < CLOSING_MOST; i++) {
        struct tm_round round;
        int code = rounds_go_on(source, source->plan, 0, &round, error);
        if (code) return code;
        if (i > 0 && source->plan->dirty_most && round.dirty > source->plan->dirty_most)
            return tm_error_set(error, TM_DEADLINE, 0, "pre-copy",
                                "%lu pages were written at the end, more than fit the freeze",
                                (unsigned long)round.dirty);
        if (round.dirty < CLOSING_ENOUGH || round.dirty > before / 2) break;
        before = round.dirty;
    }
    return TM_OK;
}

// A thread under a filter runs injected calls one by one: what is left of a chain, were we to die, might offend the filter.
static bool any_filter(const struct tm_source *source) {
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/task", source->pid);
    DIR *dir = opendir(path);
    bool found = false;
    for (struct dirent *entry; dir && !found && (entry = readdir(dir));) {
        pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
        snprintf(path, sizeof path, "/proc/%d/task/%d/status", source->pid, tid);
        FILE *file = tid > 0 ? fopen(path, "re") : NULL;
        int mode = 0;
        while (file && fgets(line, sizeof line, file))
            if (sscanf(line, "Seccomp: %d", &mode) == 1) break;
        if (file) fclose(file);
        found = mode != 0;
    }
    if (dir) closedir(dir);
    return found;
}

// Again, when it is not to be: in the same attempt, without what was found out in the stop before.
static void frozen_undo(struct tm_source *source) {
    threads_detach_all(source);
    uint64_t places = source->zones.pages; // what lies above them may get other pages in another try
    if (source->rounds && tm_spool_pages(source->spool) > places)
        tm_spool_clear(source->spool, places, tm_spool_pages(source->spool) - places, NULL);
    source->n_threads = source->n_descriptors = source->n_probes = source->n_shared_pending = 0;
    source->n_pieces = 0;
    source->eager_used = source->n_eager = 0;
    counts_reset(source);
}

static int freeze_once(struct tm_source *source, bool *again, struct tm_error *error) {
    int code = source->rounds ? closing_rounds(source, error) : regions_read(source, NULL, error);
    if (code) return code;
    *again = source->rounds != NULL; // what the rounds have read is worth another try
    struct tm_frozen_times *times = &source->times;
    *times =
        (struct tm_frozen_times){.stops = times->stops, .n_stops = times->n_stops}; // of the rounds, and of other tries
    uint64_t begin = tm_now_ns();
    code = threads_stop_all(source, WINDOW_OPTIONS, begin + source->plan->deadline_us * 1000ull, error);
    times->stop = tm_now_ns() - begin;
    if (!code) code = frozen_work(source, error);
    if (code)
        frozen_undo(source);
    else if (!source->held && window_needed(source))
        thaw(source);
    else if (!source->held)
        thaw_for_good(source);
    uint64_t took = tm_now_ns() - begin;
    if (code) {
        times->stops += took;
        times->n_stops++;
    } else {
        times->frozen = took;
    }
    return code;
}

int freeze_by_tracer(struct tm_source *source, void *argument, struct tm_error *error) {
    const struct tm_freeze_plan *plan = argument;
    if (source->capture_threads) return tm_error_set(error, TM_SYS, EBUSY, "freeze", "the last attempt was not ended");
    attempt_reset(source, plan);
    rounds_closing(source); // before threads are started: they inherit the niceness
    int code = eager_prepare(source, plan->eager_estimate + (plan->dirty_most << TM_PAGE_SHIFT), error);
    if (!code) code = capture_prepare(source, error);
    source->may_hurry = !code && try_hurry(source);
    source->filtered = any_filter(source);
    for (int i = 0; !code && i < FREEZES_MOST; i++) {
        bool again = false;
        code = freeze_once(source, &again, error);
        if (code != TM_DEADLINE || !again || i + 1 == FREEZES_MOST) break;
        code = TM_OK;
    }
    if (code) {
        struct tm_error failure = *error;
        capture_fail(source, &failure);
        capture_stop(source);
        threads_detach_all(source);
        eager_free(source);
        return code;
    }
    capture_start(source);
    return TM_OK;
}
