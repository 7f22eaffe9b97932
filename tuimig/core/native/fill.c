// The filler's life: made, asked for pages before the copy runs, started, watched, ended. Owned by the destination
// session; everything that happens to pages is in fill_serve.c.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "checksum.h"
#include "fill_internal.h"
#include "util.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // Linux 6.1
#endif

#define HUGE_BYTES (2ul << 20)
#define KILLED_S 2
#define EXIT_MS 100 // between the end of a process's memory and its end

uint64_t tm_fill_features(void) { return TM_FILL_FEATURES; }

// ---- creation

static int check_regions(const struct tm_fill *fill, struct tm_error *error) {
    for (uint32_t i = 0; i < fill->n_regions; i++) {
        const struct tm_fill_region *region = &fill->regions[i];
        uint64_t pages = (region->end - region->start) >> TM_PAGE_SHIFT;
        if (region->start % TM_PAGE_SIZE || region->end % TM_PAGE_SIZE || region->start >= region->end ||
            region->first_page > fill->n_pages || pages > fill->n_pages - region->first_page ||
            (i &&
             region->first_page < region[-1].first_page + ((region[-1].end - region[-1].start) >> TM_PAGE_SHIFT))) {
            tm_error_set(error, TM_SYS, EINVAL, "fill", "region %d has no place of its own in the spool",
                         region->region);
            if (error) {
                error->address = region->start;
            }
            return TM_SYS;
        }
    }
    return TM_OK;
}

static int by_first_page(const void *a, const void *b) {
    const struct tm_fill_region *one = a, *other = b;
    return one->first_page < other->first_page ? -1 : one->first_page > other->first_page;
}

// From `page` on: the next run of pages with content, before `end`. Returns 0 where there is none.
static uint64_t next_content(const struct tm_fill *fill, uint64_t *page, uint64_t end) {
    uint64_t from = *page, to;
    if (fill->arrival) {
        const uint64_t *expected = tm_arrival_expected(fill->arrival);
        from = tm_bits_next(expected, from, end);
        to = tm_bits_next_clear(expected, from, end);
    } else {
        while (from < end && fill->sums[from] <= TM_SUM_ZERO) {
            from++;
        }
        for (to = from; to < end && fill->sums[to] > TM_SUM_ZERO;) {
            to++;
        }
    }
    *page = from;
    return to - from;
}

static int add_region(struct tm_fill *fill, struct tm_space *space, const struct tm_fill_region *region) {
    struct tm_extent extent = {
        .start = region->start, .end = region->end, .page = region->first_page, .region = region->region};
    uint64_t page = region->first_page, end = page + ((region->end - region->start) >> TM_PAGE_SHIFT);
    for (uint64_t n; (n = next_content(fill, &page, end)); page += n) {
        tm_space_want(space, page, n);
    }
    return tm_space_add(space, extent);
}

static int register_region(int uffd, const struct tm_fill_region *region, struct tm_error *error) {
    struct uffdio_register missing = {
        .range = {.start = region->start, .len = region->end - region->start},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (ioctl(uffd, UFFDIO_REGISTER, &missing) == 0) {
        return TM_OK;
    }
    int code = tm_error_errno(error, "UFFDIO_REGISTER", "region %d cannot be filled lazily", region->region);
    if (error) {
        error->address = region->start;
    }
    return code;
}

static int prepare(struct tm_fill *fill, int uffd, int pidfd, const struct tm_fill_region *regions, uint32_t n_regions,
                   struct tm_error *error) {
    fill->demand = malloc(TM_DEMAND_PAGES * TM_PAGE_SIZE);
    fill->regions = malloc(n_regions * sizeof *regions + 1);
    fill->spaces = calloc(8, sizeof(struct tm_space *));
    fill->ring = tm_ring_create(4096);
    struct tm_space *space = tm_space_create(-1, fill->n_pages);
    if (!fill->demand || !fill->regions || !fill->spaces || !fill->ring || !space) {
        tm_space_destroy(space);
        return tm_error_set(error, TM_NOMEM, ENOMEM, "fill", "no memory for the filler");
    }
    fill->spaces_room = 8;
    fill->spaces[fill->n_spaces++] = space;
    if (n_regions) {
        memcpy(fill->regions, regions, n_regions * sizeof *regions);
        qsort(fill->regions, n_regions, sizeof *regions, by_first_page);
    }
    fill->n_regions = n_regions;
    fill->copy_pidfd = fcntl(pidfd, F_DUPFD_CLOEXEC, 3);
    fill->quit_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fill->copy_pidfd < 0 || fill->quit_fd < 0) {
        return tm_error_errno(error, "fcntl", "the filler cannot watch the copy");
    }
    int failed = check_regions(fill, error);
    for (uint32_t i = 0; i < n_regions && !failed; i++) {
        failed = add_region(fill, space, &fill->regions[i])
                     ? register_region(uffd, &fill->regions[i], error)
                     : tm_error_set(error, TM_NOMEM, ENOMEM, "fill", "no memory for the filler");
    }
    fill->progress.pages = space->left;
    if (!failed && fcntl(uffd, F_SETFL, O_RDWR | O_NONBLOCK)) {
        failed = tm_error_errno(error, "fcntl", "the copy's userfaultfd cannot be polled");
    }
    if (!failed) {
        failed = tm_guardian_create(&fill->guardian, uffd, fill->copy_pidfd, error);
    }
    if (!failed) {
        space->uffd = uffd;
    }
    return failed;
}

int tm_fill_create(int uffd, int pidfd, struct tm_spool *spool, const struct tm_fill_region *regions,
                   uint32_t n_regions, uint32_t options, struct tm_fill **out, struct tm_error *error) {
    return tm_fill_create_arriving(uffd, pidfd, spool, NULL, regions, n_regions, options, out, error);
}

int tm_fill_create_arriving(int uffd, int pidfd, struct tm_spool *spool, struct tm_arrival *arrival,
                            const struct tm_fill_region *regions, uint32_t n_regions, uint32_t options,
                            struct tm_fill **out, struct tm_error *error) {
    struct tm_fill *fill = calloc(1, sizeof *fill);
    if (!fill) {
        close(uffd);
        return tm_error_set(error, TM_NOMEM, ENOMEM, "fill", "no memory for the filler");
    }
    fill->spool = spool;
    fill->arrival = arrival;
    fill->sums = tm_spool_sums(spool);
    fill->n_pages = tm_spool_pages(spool);
    fill->options = options;
    fill->copy_pidfd = fill->quit_fd = -1;
    pthread_mutex_init(&fill->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&fill->ended, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int failed = tm_reader_create(&fill->reader, spool, error);
    fill->reader.checked = arrival != NULL;
    if (!failed) {
        failed = prepare(fill, uffd, pidfd, regions, n_regions, error);
    }
    if (failed) {
        if (fill->n_spaces == 0 || fill->spaces[0]->uffd < 0) {
            close(uffd);
        }
        tm_fill_destroy(fill);
        return failed;
    }
    *out = fill;
    return TM_OK;
}

// ---- before the copy runs

int tm_fill_now(struct tm_fill *fill, const uint64_t *addresses, uint32_t n, struct tm_error *error) {
    for (uint32_t i = 0; i < n && fill->n_spaces; i++) {
        uint64_t pages;
        int zero;
        enum tm_uffd_outcome outcome;
        uint32_t asked = 0;
        int failed = tm_fill_fault(fill, fill->spaces[0], addresses[i], &asked, &pages, &zero, &outcome, error);
        if (failed) {
            return failed;
        }
        if (outcome == TM_UFFD_CHANGING || outcome == TM_UFFD_DEAD || outcome == TM_UFFD_ABSENT) {
            tm_error_set(error, outcome == TM_UFFD_DEAD ? TM_GONE : TM_SYS, 0, "fill", "%s",
                         outcome == TM_UFFD_ABSENT ? "a page has not come yet" : "the copy is not standing still");
            if (error) {
                error->address = addresses[i];
            }
            return outcome == TM_UFFD_DEAD ? TM_GONE : TM_SYS;
        }
    }
    return TM_OK;
}

int tm_fill_all(struct tm_fill *fill, struct tm_error *error) {
    struct tm_space *space = fill->n_spaces ? fill->spaces[0] : NULL;
    int failed = space ? tm_reader_start(&fill->reader, 0, error) : TM_OK;
    while (space && !failed && space->left) {
        int worked = 0;
        failed = tm_fill_step(fill, 1, &worked, error);
        if (!failed && (space->dead || !worked)) {
            failed = tm_error_set(error, space->dead ? TM_GONE : TM_SYS, 0, "fill",
                                  "the copy did not stand still while it was filled");
        }
    }
    if (space && !failed) {
        tm_fill_copy_over(fill, space);
        tm_space_destroy(space);
        fill->n_spaces = 0;
    }
    return failed;
}

int tm_fill_start(struct tm_fill *fill, struct tm_error *error) {
    __atomic_store_n(&fill->progress.start_ns, tm_now_ns(), __ATOMIC_RELAXED);
    if (fill->n_spaces == 0) {
        tm_fill_finish(fill);
        return TM_OK;
    }
    int failed = TM_OK;
    if (!(fill->options & TM_FILL_ON_DEMAND)) {
        failed = tm_reader_start(&fill->reader, 1, error);
    }
    if (!failed && !(fill->options & TM_FILL_NO_GUARDIAN)) {
        failed = tm_guardian_start(&fill->guardian, error);
        fill->guarded = !failed;
        tm_fill_count(&fill->progress.guardians, fill->guarded ? 1 : 0);
    }
    if (!failed) {
        int err = tm_thread_start(&fill->server, "tuimig-fill", tm_fill_serve, fill);
        failed = err ? tm_error_set(error, TM_SYS, err, "pthread_create", "the filler cannot start") : TM_OK;
    }
    fill->started = !failed;
    return failed;
}

// ---- the end

static void collapse(struct tm_fill *fill, const struct tm_space *copy) {
    for (uint32_t i = 0; i < copy->extents.n; i++) {
        const struct tm_extent *extent = &copy->extents.at[i];
        for (uint32_t j = 0; j < fill->n_regions; j++) {
            uint64_t start = (extent->start + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
            uint64_t end = extent->end / HUGE_BYTES * HUGE_BYTES;
            if (fill->regions[j].region == extent->region && fill->regions[j].flags & TM_FILL_HUGE && start < end) {
                struct iovec range = {.iov_base = (void *)(uintptr_t)start, .iov_len = end - start}; // NOLINT
                // Only a matter of speed for the copy: where there is no huge page to be had it goes on without.
                syscall(SYS_process_madvise, fill->copy_pidfd, &range, 1, MADV_COLLAPSE, 0);
            }
        }
    }
}

void tm_fill_copy_over(struct tm_fill *fill, const struct tm_space *copy) {
    fill->copy_over = 1;
    fill->copy_filled = copy->left == 0 && !copy->dead;
    __atomic_store_n(&fill->progress.gone, copy->gone, __ATOMIC_RELAXED);
    __atomic_store_n(&fill->progress.filled, fill->progress.pages - copy->left - copy->gone, __ATOMIC_RELAXED);
    tm_guardian_copy_complete(&fill->guardian);
    if (fill->copy_filled && fill->huge == NULL) {
        fill->huge = tm_space_create(-1, 0);
        for (uint32_t i = 0; fill->huge && i < copy->extents.n; i++) {
            tm_space_add(fill->huge, copy->extents.at[i]);
        }
    }
}

void tm_fill_end(struct tm_fill *fill, const struct tm_error *result) {
    pthread_mutex_lock(&fill->lock);
    if (!fill->progress.ended) {
        fill->result = *result;
        __atomic_store_n(&fill->progress.code, result->code, __ATOMIC_RELAXED);
        __atomic_store_n(&fill->progress.ended, 1, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&fill->ended);
    }
    pthread_mutex_unlock(&fill->lock);
}

void tm_fill_finish(struct tm_fill *fill) {
    if (fill->n_spaces) {
        return; // told to quit; destroy decides
    }
    if (!fill->lethal) {
        __atomic_store_n(&fill->progress.end_ns, tm_now_ns(), __ATOMIC_RELAXED);
    }
    struct tm_error result = {0};
    struct pollfd copy = {.fd = fill->copy_pidfd, .events = POLLIN};
    if (!fill->copy_filled && poll(&copy, 1, EXIT_MS) == 1) {
        tm_error_set(&result, TM_GONE, 0, "fill", "the copy ended before all its pages were in");
    }
    if (fill->copy_filled && fill->huge) {
        collapse(fill, fill->huge);
    }
    if (fill->guarded) {
        tm_guardian_dismiss(&fill->guardian);
    }
    tm_fill_end(fill, &result);
}

void tm_fill_progress(const struct tm_fill *fill, struct tm_fill_progress *out) {
    const struct tm_fill_progress *in = &fill->progress;
    out->ended = __atomic_load_n(&in->ended, __ATOMIC_ACQUIRE);
    out->code = __atomic_load_n(&in->code, __ATOMIC_RELAXED);
    const uint64_t *from = (const uint64_t *)in;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < offsetof(struct tm_fill_progress, ended) / sizeof *from; i++) {
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    }
}

struct tm_ring *tm_fill_ring(struct tm_fill *fill) {
    return fill->ring;
}

int tm_fill_wait(struct tm_fill *fill, int timeout_ms) {
    uint64_t until_ns = tm_now_ns() + (uint64_t)(timeout_ms < 0 ? 0 : timeout_ms) * 1000000u;
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u)};
    pthread_mutex_lock(&fill->lock);
    int failed = 0;
    while (!fill->progress.ended && failed != ETIMEDOUT) {
        failed = timeout_ms < 0 ? pthread_cond_wait(&fill->ended, &fill->lock)
                                : pthread_cond_timedwait(&fill->ended, &fill->lock, &until);
    }
    int ended = fill->progress.ended;
    pthread_mutex_unlock(&fill->lock);
    return ended;
}

int tm_fill_result(const struct tm_fill *fill, struct tm_error *error) {
    if (!__atomic_load_n(&fill->progress.ended, __ATOMIC_ACQUIRE)) {
        return tm_error_set(error, TM_SYS, EAGAIN, "fill", "it has not ended");
    }
    if (error) {
        *error = fill->result;
    }
    return fill->result.code;
}

void tm_fill_poison_missing(struct tm_fill *fill) {
    __atomic_store_n(&fill->poison, 1, __ATOMIC_RELEASE);
    eventfd_write(fill->quit_fd, 1);
}

void tm_fill_cancel(struct tm_fill *fill) {
    __atomic_store_n(&fill->cancel, 1, __ATOMIC_RELEASE);
    eventfd_write(fill->quit_fd, 1);
}

void tm_fill_destroy(struct tm_fill *fill) {
    if (!fill) {
        return;
    }
    if (fill->started) {
        tm_fill_cancel(fill);
        tm_fill_wait(fill, -1);
        // After a kill it ends by itself; children that live on would keep it.
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += KILLED_S;
        if (pthread_timedjoin_np(fill->server, NULL, &until)) {
            __atomic_store_n(&fill->quit, 1, __ATOMIC_RELEASE);
            eventfd_write(fill->quit_fd, 1);
            pthread_join(fill->server, NULL);
        }
    }
    tm_reader_destroy(&fill->reader);
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        if (fill->started && fill->guarded) {
            fill->spaces[i]->uffd = -1; // the guardian's now
        }
        tm_space_destroy(fill->spaces[i]);
    }
    if (fill->n_spaces && fill->started && fill->guarded) {
        tm_guardian_take_over(&fill->guardian);
    } else {
        tm_guardian_destroy(&fill->guardian);
    }
    tm_space_destroy(fill->huge);
    free(fill->spaces);
    free(fill->regions);
    free(fill->demand);
    tm_ring_destroy(fill->ring);
    int fds[] = {fill->quit_fd, fill->copy_pidfd};
    for (int i = 0; i < 2; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    pthread_mutex_destroy(&fill->lock);
    pthread_cond_destroy(&fill->ended);
    free(fill);
}
