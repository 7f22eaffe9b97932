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
    atomic_store(&source->total, 0);
    atomic_store(&source->done, 0);
    atomic_store(&source->wp_faults, 0);
    atomic_store(&source->swept, 0);
    atomic_store(&source->zero, 0);
    atomic_store(&source->fault_pages, 0);
    atomic_store(&source->guard_stops, 0);
    atomic_store(&source->eager_pages, 0);
    atomic_store(&source->events, 0);
    atomic_store(&source->verified, 0);
    atomic_store(&source->precopied, 0);
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

static int step_probes(struct tm_source *source, struct tm_error *error) {
    return state_run_probes(source, source->plan, error);
}

static void schedule(const struct tm_source *source, int policy, bool tracer) {
    struct sched_param param = {.sched_priority = policy == SCHED_RR ? 1 : 0};
    if (tracer) pthread_setschedparam(source->tracer, policy, &param); // first: others would take its CPU
    for (uint32_t i = 0; i < source->n_workers; i++) pthread_setschedparam(source->workers[i], policy, &param);
}

// While the target stands still, whoever works on that goes before others on a busy machine; where we may. Not while the
// target itself has something to do.
static void hurry(const struct tm_source *source, bool on) {
    if (source->may_hurry) schedule(source, on ? SCHED_RR : SCHED_OTHER, true);
}

static bool try_hurry(const struct tm_source *source) {
    struct sched_param rr = {.sched_priority = 1}, other = {0};
    bool may = pthread_setschedparam(source->workers[0], SCHED_RR, &rr) == 0;
    pthread_setschedparam(source->workers[0], SCHED_OTHER, &other);
    return may;
}

// ---------------------------------------------------------------- beside the injected calls

static void touch(struct tm_source *source, uint64_t address) {
    struct region *region = region_at(source, address);
    if (region) region->touched = true;
}

// Injected calls write below the stacks, and the kernel into what a thread has registered with it when it lets it run.
static void mark_touched(struct tm_source *source) {
    for (uint32_t i = 0; i < source->n_threads; i++) {
        const struct thread *thread = &source->threads.at[i];
        touch(source, thread->regs.rsp);
        touch(source, thread->regs.fs_base);
        touch(source, source->thread_faces[i].rseq_pointer);
    }
}

static void job_beside(struct tm_source *source, uint32_t index, uint8_t *buffer) {
    if (index > 0) {
        precopy_prove(source, index - 1, buffer);
        return;
    }
    struct tm_error error;
    if (eager_copy(source, false, &error)) capture_fail(source, &error);
}

// The workers take what the calls do not touch meanwhile, and give way to the threads that make these.
static int beside_begin(struct tm_source *source, struct tm_error *error) {
    mark_touched(source);
    precopy_make_way(source);
    int code = precopy_list(source, false, error);
    if (code) return code;
    if (source->may_hurry) schedule(source, SCHED_IDLE, false);
    jobs_start(source, job_beside, source->n_pieces + 1);
    return TM_OK;
}

static int beside_end(struct tm_source *source, struct tm_error *error) {
    hurry(source, true);
    jobs_finish(source, NULL);
    source->n_pieces = 0;
    if (atomic_load(&source->state) != TM_FAILED) return TM_OK;
    *error = source->failure;
    return error->code;
}

static int step_eager(struct tm_source *source, struct tm_error *error) { return eager_copy(source, true, error); }

// What is read of the process itself; the jobs beside are over when it returns.
static int frozen_state(struct tm_source *source, struct tm_error *error) {
    struct tm_frozen_times *times = &source->times;
    int code = part(&times->threads, state_read_threads, source, error);
    if (!code) code = beside_begin(source, error);
    if (code) return code;
    code = step_probes(source, error);
    if (!code) code = part(&times->descriptors, state_read_descriptors, source, error);
    struct tm_error ignored;
    int beside = part(&times->beside, beside_end, source, code ? &ignored : error);
    return code ? code : beside;
}

static int frozen_work(struct tm_source *source, struct tm_error *error) {
    struct tm_frozen_times *times = &source->times;
    int code = gadgets_check(source, error);
    if (!code) code = part(&times->maps, step_regions, source, error);
    if (!code) code = frozen_state(source, error);
    if (!code) code = part(&times->eager, step_eager, source, error);
    if (!code) code = precopy_take(source, error);
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
    for (int i = 0; source->rounds && i < CLOSING_MOST; i++) {
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
    atomic_store(&source->total, 0);
    atomic_store(&source->done, 0);
    atomic_store(&source->eager_pages, 0);
}

static int freeze_once(struct tm_source *source, bool *again, struct tm_error *error) {
    int code = closing_rounds(source, error);
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
    int code = eager_prepare(source, plan->eager_estimate + (plan->dirty_most << TM_PAGE_SHIFT), error);
    if (!code) code = capture_prepare(source, error);
    source->may_hurry = !code && try_hurry(source);
    source->filtered = any_filter(source);
    rounds_closing(source);
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
