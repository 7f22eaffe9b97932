// The face of the source side: the tracer thread that owns ptrace and takes one command at a time.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <dirent.h>
#include <unistd.h>

#include "source_internal.h"

#define ATTACH_STOP_NS 100000000u
enum { RING_CAPACITY = 1 << 16, ZERO_CONTENT = 1 };

// ---------------------------------------------------------------- the tracer thread

static int kick_signal(void) { return SIGRTMAX - 1; }

static void kicked(int signal) { (void)signal; } // only there to end a wait with EINTR

void source_kick(struct tm_source *source) {
    atomic_store(&source->kick_wanted, true);
    if (source->tracer_running) pthread_kill(source->tracer, kick_signal());
}

// Each stop of the target sends its tracer SIGCHLD: blocked, it would wait for another thread of ours and wake that one, in the
// midst of a freeze; else it is dropped where nobody handles it.
static void signals_unblock(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, kick_signal());
    sigaddset(&set, SIGCHLD);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static void *tracer_main(void *argument) {
    struct tm_source *source = argument;
    signals_unblock();
    pthread_mutex_lock(&source->lock);
    for (;;) {
        if (source->command) {
            int (*command)(struct tm_source *, void *, struct tm_error *) = source->command;
            pthread_mutex_unlock(&source->lock);
            int result = command(source, source->argument, source->command_error);
            pthread_mutex_lock(&source->lock);
            source->command = NULL;
            source->command_result = result;
            pthread_cond_broadcast(&source->changed);
        } else if (source->quit) {
            break;
        } else if (atomic_load(&source->window)) {
            pthread_mutex_unlock(&source->lock);
            guard_step(source);
            pthread_mutex_lock(&source->lock);
        } else {
            pthread_cond_wait(&source->changed, &source->lock);
        }
    }
    pthread_mutex_unlock(&source->lock);
    return NULL;
}

// A kick may fall between the tracer's look and its wait; so it is repeated until the command is taken.
static void wait_kicking(struct tm_source *source) {
    while (source->command) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 1000000;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        if (atomic_load(&source->window)) pthread_kill(source->tracer, kick_signal());
        pthread_cond_timedwait(&source->changed, &source->lock, &until);
    }
}

int on_tracer(struct tm_source *source, int (*command)(struct tm_source *, void *, struct tm_error *), void *argument,
              struct tm_error *error) {
    struct tm_error ignored;
    pthread_mutex_lock(&source->lock);
    source->command_error = error ? error : &ignored;
    *source->command_error = (struct tm_error){0};
    source->argument = argument;
    source->command = command;
    pthread_cond_broadcast(&source->changed);
    wait_kicking(source);
    int result = source->command_result;
    pthread_mutex_unlock(&source->lock);
    return result;
}

static int open_proc(struct tm_source *source, const char *name, int *fd, struct tm_error *error) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", source->pid, name);
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd >= 0) return TM_OK;
    return tm_error_set(error, errno == ENOENT ? TM_GONE : tm_error_code(errno), errno, "open", "cannot open %s", path);
}

static void categories_probe(struct tm_source *source) {
    struct pm_scan_arg arg = {.size = sizeof arg, .return_mask = PAGE_IS_GUARD};
    if (ioctl(source->pagemap_fd, PAGEMAP_SCAN, &arg) == 0) source->guard_category = PAGE_IS_GUARD;
}

int tm_source_create(int32_t pid, int pidfd, struct tm_source **out, struct tm_error *error) {
    struct tm_source *source = calloc(1, sizeof *source);
    if (!source) return tm_error_set(error, TM_NOMEM, ENOMEM, "calloc", "no memory");
    source->pid = pid;
    source->pidfd = pidfd;
    source->uffd = source->track_uffd = source->wake_fd = source->mem_fd = source->pagemap_fd = -1;
    pthread_mutex_init(&source->lock, NULL);
    pthread_cond_init(&source->changed, NULL);
    pthread_mutex_init(&source->failure_lock, NULL);
    pthread_mutex_init(&source->eager_lock, NULL);
    pthread_mutex_init(&source->request_lock, NULL);
    pthread_cond_init(&source->work, NULL);
    int code = open_proc(source, "mem", &source->mem_fd, error);
    if (!code) code = open_proc(source, "pagemap", &source->pagemap_fd, error);
    if (!code) code = gadgets_find(pid, &source->gadgets, error);
    if (!code) {
        categories_probe(source);
        source->ring = tm_ring_create(RING_CAPACITY);
        if (!source->ring) code = tm_error_set(error, TM_NOMEM, ENOMEM, "malloc", "no memory for the fault log");
    }
    if (!code) {
        struct sigaction action = {.sa_handler = kicked};
        sigaction(kick_signal(), &action, NULL);
        int err = tm_thread_start(&source->tracer, "tm-trace", tracer_main, source);
        source->tracer_running = !err;
        if (err) code = tm_error_set(error, TM_NOMEM, err, "pthread_create", "cannot start the tracer");
    }
    if (code) {
        tm_source_destroy(source);
        return code;
    }
    *out = source;
    return TM_OK;
}

void tm_source_destroy(struct tm_source *source) {
    if (!source) return;
    if (source->tracer_running) {
        tm_source_end(source, NULL);
        pthread_mutex_lock(&source->lock);
        source->quit = true;
        pthread_cond_broadcast(&source->changed);
        pthread_mutex_unlock(&source->lock);
        pthread_join(source->tracer, NULL);
    }
    if (source->mem_fd >= 0) close(source->mem_fd);
    if (source->pagemap_fd >= 0) close(source->pagemap_fd);
    if (source->uffd >= 0) close(source->uffd);
    if (source->track_uffd >= 0) close(source->track_uffd);
    rounds_free(source);
    extents_free(&source->registered);
    extents_free(&source->opened);
    free(source->dirty.runs);
    eager_free(source);
    regions_free(source);
    arena_free(&source->arena);
    tm_ring_destroy(source->ring);
    free(source->threads.at);
    free(source->pieces);
    free(source->requests);
    free(source->released);
    if (source->verify_sums) munmap(source->verify_sums, source->verify_size);
    pthread_mutex_destroy(&source->lock);
    pthread_cond_destroy(&source->changed);
    pthread_mutex_destroy(&source->failure_lock);
    pthread_mutex_destroy(&source->eager_lock);
    pthread_mutex_destroy(&source->request_lock);
    pthread_cond_destroy(&source->work);
    free(source);
}

// ---------------------------------------------------------------- attach

struct attach_request {
    int dev_fd;
    int32_t track;
};

static int api_enable(struct tm_source *source, struct tm_error *error) {
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_EVENT_REMAP |
                    UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP,
    };
    if (ioctl(source->uffd, UFFDIO_API, &api))
        return tm_error_set(error, TM_PRIVILEGE, errno, "UFFDIO_API",
                            "this kernel cannot write-protect by userfaultfd");
    return TM_OK;
}

// The descriptor for tracking is no loss where the kernel does not have the feature.
static void track_enable(struct tm_source *source) {
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_ASYNC};
    if (source->track_uffd < 0) return;
    source->quick_scan = rounds_quick_scan();
    if (ioctl(source->track_uffd, UFFDIO_API, &api) == 0 && rounds_kernel_can()) return;
    close(source->track_uffd);
    source->track_uffd = -1;
}

static int attach_by(struct tm_source *source, pid_t tid, const struct attach_request *request,
                     struct tm_error *error) {
    source->trace_options = PTRACE_O_TRACESYSGOOD;
    int err = thread_seize(tid, 0);
    if (err)
        return tm_error_set(error, err == ESRCH ? TM_GONE : TM_PRIVILEGE, err, "PTRACE_SEIZE",
                            "cannot attach to thread %d", tid);
    struct thread *thread = threads_add(&source->threads, tid);
    if (!thread) return tm_error_set(error, TM_NOMEM, ENOMEM, "realloc", "no memory");
    thread->seized = true;
    int code = thread_stop_one(thread, tm_now_ns() + ATTACH_STOP_NS, error);
    if (!code) code = gadgets_check(source, error);
    if (!code) {
        struct injection in;
        code = inject_begin(&in, source, thread, error);
        int made[2] = {-1, -1};
        if (!code) code = inject_userfaultfds(&in, request->dev_fd, made, request->track ? 2 : 1, error);
        source->uffd = made[0];
        source->track_uffd = made[1];
        int end = inject_end(&in, code ? NULL : error);
        if (!code) code = end;
    }
    threads_detach_all(source);
    return code;
}

// Any thread will do: the first that stops and has room on its stack.
static int attach(struct tm_source *source, void *argument, struct tm_error *error) {
    const struct attach_request *request = argument;
    source->times = (struct tm_frozen_times){0};
    int code = regions_read(source, NULL, error);
    if (code) return code;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", source->pid);
    DIR *dir = opendir(path);
    if (!dir) return tm_error_set(error, TM_GONE, errno, "opendir", "the process has ended");
    code = TM_DEADLINE;
    for (struct dirent *entry; (code == TM_DEADLINE || code == TM_GONE) && (entry = readdir(dir));) {
        pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (tid > 0)
            code = attach_by(source, tid, request, error); // one that has just ended says nothing of the others
    }
    closedir(dir);
    if (!code) code = api_enable(source, error);
    if (!code) track_enable(source);
    return code;
}

int tm_source_attach(struct tm_source *source, int dev_fd, int32_t track, int32_t *tracked, struct tm_error *error) {
    struct attach_request request = {dev_fd, track};
    int code = on_tracer(source, attach, &request, error);
    *tracked = source->track_uffd >= 0 ? TM_TRACK_ASYNC : TM_TRACK_NONE;
    return code;
}

// ---------------------------------------------------------------- rounds

struct round_request {
    const struct tm_freeze_plan *plan;
    uint32_t slice_ms;
    struct tm_round *out;
    uint64_t pages, *given_up;
};

static int round_go_on(struct tm_source *source, void *argument, struct tm_error *error) {
    const struct round_request *request = argument;
    return rounds_go_on(source, request->plan, request->slice_ms, request->out, error);
}

int tm_source_round(struct tm_source *source, const struct tm_freeze_plan *plan, uint32_t slice_ms,
                    struct tm_round *out, struct tm_error *error) {
    struct round_request request = {.plan = plan, .slice_ms = slice_ms, .out = out};
    return on_tracer(source, round_go_on, &request, error);
}

static int give_up(struct tm_source *source, void *argument, struct tm_error *error) {
    const struct round_request *request = argument;
    return rounds_give_up(source, request->pages, request->given_up, error);
}

int tm_source_give_up(struct tm_source *source, uint64_t pages, uint64_t *given_up, struct tm_error *error) {
    struct round_request request = {.pages = pages, .given_up = given_up};
    return on_tracer(source, give_up, &request, error);
}

// ---------------------------------------------------------------- freeze

int tm_source_freeze(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error) {
    return on_tracer(source, freeze_by_tracer, (void *)(uintptr_t)plan, error);
}

// ---------------------------------------------------------------- end

static int end(struct tm_source *source, void *argument, struct tm_error *error) {
    (void)argument;
    int code = TM_CANCELLED;
    if (atomic_load(&source->state) == TM_CAPTURED && source->capture_threads) {
        capture_quiesce(source); // a move onto captured ground would be known now
        code = TM_OK;
    }
    if (code) {
        struct tm_error failure;
        tm_error_set(&failure, TM_CANCELLED, 0, "", "the capture was cancelled");
        capture_fail(source, &failure); // keeps an earlier one
    }
    if (atomic_load(&source->state) == TM_FAILED) {
        *error = source->failure;
        code = error->code;
    }
    guard_release_held(source);
    if (!code) release_prepare(source);
    capture_stop(source);
    threads_detach_all(source);
    eager_free(source);
    atomic_store(&source->window, false);
    return code;
}

int tm_source_end(struct tm_source *source, struct tm_error *error) { return on_tracer(source, end, NULL, error); }

int tm_source_wait(struct tm_source *source, uint32_t timeout_ms, struct tm_error *error) {
    uint64_t until = tm_now_ns() + timeout_ms * 1000000ull;
    while (atomic_load(&source->state) == TM_CAPTURING && tm_now_ns() < until) {
        if (atomic_load(&source->kick_wanted)) source_kick(source);
        usleep(500);
    }
    if (atomic_load(&source->state) != TM_FAILED) return TM_OK;
    if (error) *error = source->failure;
    return source->failure.code;
}

int tm_source_verify(struct tm_source *source, struct tm_error *error) {
    if (!source->verify_sums) return tm_error_set(error, TM_SYS, EINVAL, "verify", "nothing was hashed at T0");
    const uint32_t *sums = tm_spool_sums(source->spool);
    for (uint32_t i = 0; i < source->n_regions; i++) {
        const struct region *region = &source->regions[i];
        bool hashed = region->state || region->precopied ||
                      (region->face.treatment == TM_EAGER && region->face.kind != TM_SHARED_ANON &&
                       region->face.kind != TM_DELETED);
        if (!hashed) continue;
        uint64_t pages = (region->face.end - region->face.start) >> TM_PAGE_SHIFT;
        for (uint64_t page = 0; page < pages; page++) {
            uint32_t stored = sums[region->first_page + page];
            if (stored == ZERO_CONTENT) stored = 0;
            if (stored == source->verify_sums[region->first_page + page]) continue;
            tm_error_set(error, TM_LOST, 0, "verify",
                         "the captured page %lx of region %lx-%lx is not what it was at T0",
                         (unsigned long)(region->face.start + (page << TM_PAGE_SHIFT)),
                         (unsigned long)region->face.start, (unsigned long)region->face.end);
            if (error) error->address = region->face.start + (page << TM_PAGE_SHIFT);
            return TM_LOST;
        }
    }
    return TM_OK;
}

// ---------------------------------------------------------------- results

uint32_t tm_source_threads(const struct tm_source *source, const struct tm_thread_state **out) {
    *out = source->thread_faces;
    return source->n_threads;
}

uint32_t tm_source_regions(const struct tm_source *source, const struct tm_region_state **out) {
    for (uint32_t i = 0; i < source->n_regions; i++) source->region_faces[i] = source->regions[i].face;
    *out = source->region_faces;
    return source->n_regions;
}

uint32_t tm_source_descriptors(const struct tm_source *source, const struct tm_descriptor_state **out) {
    *out = source->descriptors;
    return source->n_descriptors;
}

uint32_t tm_source_shared_pending(const struct tm_source *source, const uint8_t **out) {
    *out = source->shared_pending;
    return source->n_shared_pending;
}

const struct tm_answer *tm_source_answer(const struct tm_source *source, uint32_t probe, uint32_t thread) {
    if (probe >= source->n_probes || thread >= source->n_threads) return NULL;
    return &source->answers[(size_t)probe * source->n_threads + thread];
}

void tm_source_times(const struct tm_source *source, struct tm_frozen_times *out) { *out = source->times; }

void tm_source_progress(const struct tm_source *source, struct tm_source_progress *out) {
    *out = (struct tm_source_progress){
        .pages_total = atomic_load(&source->total),
        .pages_done = atomic_load(&source->done),
        .wp_faults = atomic_load(&source->wp_faults),
        .swept_pages = atomic_load(&source->swept),
        .zero_pages = atomic_load(&source->zero),
        .fault_pages = atomic_load(&source->fault_pages),
        .guard_stops = atomic_load(&source->guard_stops),
        .eager_pages = atomic_load(&source->eager_pages),
        .events = atomic_load(&source->events),
        .verified_pages = atomic_load(&source->verified),
        .precopied_pages = atomic_load(&source->precopied),
        .dirty_pages = source->dirty.pages,
        .state = atomic_load(&source->state),
        .eager_stored = atomic_load(&source->eager_stored),
    };
}

struct tm_ring *tm_source_ring(struct tm_source *source) {
    return source->ring;
}

void tm_source_region_faults(const struct tm_source *source, uint32_t *out, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) out[i] = i < source->n_regions ? atomic_load(&source->regions[i].faults) : 0;
}

void tm_source_region_done(const struct tm_source *source, uint64_t *out, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) out[i] = i < source->n_regions ? atomic_load(&source->regions[i].done) : 0;
}
