// The workers: they share what is to be done with memory inside the freeze, then sweep what nobody has touched, and capture
// first what a thread held by the guard waits for.
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "source_internal.h"

enum { WORK_BUFFER = 2 << 20, GIVE_WAY_US = 200, KICK_AGAIN_US = 100, LOWEST = 19 };
#define FAULTS_KEEP_COMING_NS 500000u

void jobs_start(struct tm_source *source, job_fn *job, uint32_t n) {
    pthread_mutex_lock(&source->request_lock);
    source->job = job;
    atomic_store(&source->n_jobs, n);
    atomic_store(&source->next_job, 0);
    atomic_store(&source->phase, PHASE_JOB);
    if (n > 0) pthread_cond_broadcast(&source->work);
    pthread_mutex_unlock(&source->request_lock);
}

static void jobs_take(struct tm_source *source, job_fn *job, uint8_t *buffer) {
    for (uint32_t i; (i = atomic_fetch_add(&source->next_job, 1)) < atomic_load(&source->n_jobs);)
        job(source, i, buffer);
}

void jobs_finish(struct tm_source *source, uint8_t *buffer) {
    jobs_take(source, source->job, buffer);
    pthread_mutex_lock(&source->request_lock);
    source->job = NULL;
    atomic_store(&source->phase, PHASE_READY);
    pthread_mutex_unlock(&source->request_lock);
    while (atomic_load(&source->job_active)) __builtin_ia32_pause();
}

void jobs_run(struct tm_source *source, job_fn *job, uint32_t n, uint8_t *buffer) {
    jobs_start(source, job, n);
    jobs_finish(source, buffer);
}

static void job_help(struct tm_source *source, uint8_t *buffer) {
    pthread_mutex_lock(&source->request_lock);
    job_fn *job = source->job;
    if (job) atomic_fetch_add(&source->job_active, 1);
    pthread_mutex_unlock(&source->request_lock);
    if (!job) return;
    jobs_take(source, job, buffer);
    atomic_fetch_sub(&source->job_active, 1);
}

// Inside the freeze the tracer and its injected calls need the CPUs.
static bool idle(struct tm_source *source) {
    int phase = atomic_load(&source->phase);
    return phase == PHASE_READY ||
           (phase == PHASE_JOB && atomic_load(&source->next_job) >= atomic_load(&source->n_jobs));
}

static void sleep_while_idle(struct tm_source *source) {
    pthread_mutex_lock(&source->request_lock);
    while (idle(source)) pthread_cond_wait(&source->work, &source->request_lock);
    pthread_mutex_unlock(&source->request_lock);
}

static bool request_take(struct tm_source *source, struct request *out) {
    pthread_mutex_lock(&source->request_lock);
    bool any = source->n_requests > 0;
    if (any) {
        *out = source->requests[source->first_request];
        source->first_request = (source->first_request + 1) % source->requests_capacity;
        source->n_requests--;
    }
    pthread_mutex_unlock(&source->request_lock);
    return any;
}

static void requests_serve(struct tm_source *source, uint8_t *buffer) {
    struct request request;
    while (request_take(source, &request)) {
        capture_range(source, request.start, request.end, BY_REQUEST, buffer);
        capture_check_done(source);
        pthread_mutex_lock(&source->request_lock);
        source->released[source->n_released++] = request.tid; // there is a place for each that is held
        pthread_mutex_unlock(&source->request_lock);
        source_kick(source);
    }
    if (atomic_load(&source->kick_wanted)) source_kick(source);
}

// While faults keep coming on a small machine, a sweep of our own would take the CPU from the writer or the handler; the
// handler sweeps between two faults then.
static void give_way(struct tm_source *source) {
    while (source->few_cpus && tm_now_ns() - atomic_load(&source->last_fault_ns) < FAULTS_KEEP_COMING_NS &&
           atomic_load(&source->state) == TM_CAPTURING && atomic_load(&source->phase) == PHASE_SWEEP &&
           source->n_requests == 0)
        usleep(GIVE_WAY_US);
}

static void sweep(struct tm_source *source, uint8_t *buffer) {
    for (uint32_t i; (i = atomic_fetch_add(&source->next_piece, 1)) < source->n_pieces;) {
        const struct piece *piece = &source->pieces[i];
        for (uint64_t at = piece->start; at < piece->end; at += WORK_BUFFER) {
            give_way(source);
            requests_serve(source, buffer);
            if (atomic_load(&source->state) != TM_CAPTURING || atomic_load(&source->phase) != PHASE_SWEEP) return;
            uint64_t end = (at & ~(uint64_t)(WORK_BUFFER - 1)) + WORK_BUFFER;
            at &= ~(uint64_t)(WORK_BUFFER - 1);
            uint64_t from = at < piece->start ? piece->start : at;
            capture_range(source, from, end < piece->end ? end : piece->end, BY_SWEEP, buffer);
        }
        capture_check_done(source);
    }
}

static void eager_first(struct tm_source *source) {
    struct tm_error error;
    if (eager_store(source, &error))
        capture_fail(source, &error);
    else
        atomic_store(&source->eager_stored, 1);
    eager_free(source);
    capture_check_done(source);
}

// Only the first worker: what the freeze copied goes into the spool after the thaw.
static bool is_first(const struct tm_source *source) { return pthread_equal(pthread_self(), source->workers[0]); }

void *worker_main(void *argument) {
    struct tm_source *source = argument;
    uint8_t *buffer = aligned_alloc(TM_PAGE_SIZE, WORK_BUFFER);
    if (!buffer) {
        struct tm_error error;
        tm_error_set(&error, TM_NOMEM, ENOMEM, "malloc", "no memory for the sweep");
        capture_fail(source, &error);
        return NULL;
    }
    bool swept = false;
    for (;;) {
        int phase = atomic_load(&source->phase);
        if (phase == PHASE_QUIT) break;
        if (idle(source)) {
            sleep_while_idle(source);
        } else if (phase == PHASE_JOB) {
            job_help(source, buffer);
        } else {
            if (!swept) {
                // Who stands still writes to nothing, so nobody waits for the sweep: whoever builds the copy goes first.
                if (source->held) tm_thread_nice(LOWEST);
                if (is_first(source)) eager_first(source);
                sweep(source, buffer);
                swept = true;
            }
            requests_serve(source, buffer);
            if (atomic_load(&source->kick_wanted)) { // the last kick fell between the tracer's look and its wait
                usleep(KICK_AGAIN_US);
                continue;
            }
            pthread_mutex_lock(&source->request_lock);
            if (source->n_requests == 0 && atomic_load(&source->phase) == PHASE_SWEEP)
                pthread_cond_wait(&source->work, &source->request_lock);
            pthread_mutex_unlock(&source->request_lock);
        }
    }
    free(buffer);
    return NULL;
}
