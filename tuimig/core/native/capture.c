// Copy-on-write capture: registering and arming inside the freeze, and the one routine by which a page's T0 content is
// claimed, read, proved, released and stored. Faults (handler.c), the sweep (sweep.c) and the tracer all go through it.
//
// Proof: after its content was read, the page must still be populated and protected. Only we take protection away, so what
// was read is what was there at T0. An address range that another armed range was moved onto would pass that test: while such
// a move is under way the kernel answers UFFDIO_WRITEPROTECT with EAGAIN, and its REMAP event fails the attempt.
#include "source_internal.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define PIECE_SIZE (8ull << 20)
#define HUGE_SIZE (2ull << 20)
#define READ_SIZE (256ull << 10)

enum { RUN_SMALL = 64, RUN_HUGE = 512 };

static uint8_t plain(uint8_t state) { return state & (uint8_t)~PAGE_HUGE; }

static uint8_t state_load(const uint8_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

static bool claim(uint8_t *at) {
    uint8_t old = state_load(at);
    return plain(old) == PAGE_PROTECTED &&
           __atomic_compare_exchange_n(at, &old, (uint8_t)((old & PAGE_HUGE) | PAGE_CLAIMED), false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

static void settle(uint8_t *at, uint64_t n, uint8_t state) {
    for (uint64_t i = 0; i < n; i++) __atomic_store_n(&at[i], state, __ATOMIC_RELEASE);
}

void capture_fail(struct tm_source *source, const struct tm_error *error) {
    pthread_mutex_lock(&source->failure_lock);
    int state = atomic_load(&source->state);
    if (state == TM_CAPTURING || state == TM_CAPTURED) {
        source->failure = *error;
        atomic_store(&source->state, TM_FAILED);
    }
    pthread_mutex_unlock(&source->failure_lock);
    source_kick(source);
}

void capture_check_done(struct tm_source *source) {
    int capturing = TM_CAPTURING;
    if (atomic_load(&source->done) >= atomic_load(&source->total) &&
        atomic_compare_exchange_strong(&source->state, &capturing, TM_CAPTURED))
        source_kick(source);
}

// Take the protection away and wake who waits. EAGAIN: an event is on its way, its reader is the handler.
static int release(struct tm_source *source, uint64_t start, uint64_t end) {
    struct uffdio_writeprotect arg = {.range = {start, end - start}, .mode = 0};
    for (;;) {
        if (ioctl(source->uffd, UFFDIO_WRITEPROTECT, &arg) == 0) return 0;
        if (errno == EINTR) continue;
        return errno;
    }
}

static void lost(struct tm_source *source, uint64_t address, int err, const char *where) {
    struct tm_error error;
    const struct region *region = region_at(source, address);
    if (err == ESRCH)
        tm_error_set(&error, TM_GONE, err, where, "the process ended before all of its memory was captured");
    else
        tm_error_set(&error, TM_LOST, err, where,
                     "a page of T0 in region %lx-%lx %.40s was lost before it was captured",
                     region ? (unsigned long)region->face.start : 0, region ? (unsigned long)region->face.end : 0,
                     region ? region->face.path : "");
    error.address = address;
    capture_fail(source, &error);
}

int capture_release_retry(struct tm_source *source, uint64_t start, uint64_t end, bool reads_events) {
    for (;;) {
        int err = release(source, start, end);
        if (err == ENOENT && end - start > TM_PAGE_SIZE) { // a new mapping lies between: nobody has been woken
            for (; start < end; start += TM_PAGE_SIZE)
                capture_release_retry(source, start, start + TM_PAGE_SIZE, reads_events);
            return ENOENT;
        }
        if (err != EAGAIN) return err;
        if (reads_events)
            handler_read_events(source);
        else
            sched_yield();
        if (atomic_load(&source->phase) == PHASE_QUIT) return 0;
    }
}

int capture_run(struct tm_source *source, struct region *region, uint64_t first, uint64_t n, uint8_t *buffer,
                bool reads_events) {
    uint64_t start = region->face.start + (first << TM_PAGE_SHIFT), end = start + (n << TM_PAGE_SHIFT);
    int err = 0;
    for (uint64_t at = start; !err && at < end; at += READ_SIZE) {
        uint64_t size = end - at < READ_SIZE ? end - at : READ_SIZE;
        err = target_read(source, at, buffer + (at - start), size);
    }
    bool proved = !err && (source->held || target_protected(source, start, end));
    // Whatever comes of it, who waits goes on; its memory is more important than ours.
    int released = source->held ? 0 : capture_release_retry(source, start, end, reads_events);
    if (!proved || (released != 0 && released != ENOENT)) {
        settle(region->state + first, n, PAGE_LOST);
        lost(source, start, err ? err : released, err ? "process_vm_readv" : "PAGEMAP_SCAN");
        return TM_LOST;
    }
    struct tm_error error;
    uint64_t zero = 0;
    if (tm_spool_put(source->spool, region->first_page + first, buffer, n, &zero, &error)) {
        settle(region->state + first, n, PAGE_LOST);
        capture_fail(source, &error);
        return error.code;
    }
    settle(region->state + first, n, PAGE_COPIED);
    atomic_fetch_add_explicit(&source->zero, zero, memory_order_relaxed);
    atomic_fetch_add_explicit(&region->done, n, memory_order_relaxed);
    atomic_fetch_add(&source->done, n);
    return TM_OK;
}

// Claim pages of [first, most) from `first` on as long as they are to be captured. A huge page goes whole: half of it
// unprotected would split it for good.
uint64_t capture_claim(struct region *region, uint64_t first, uint64_t most) {
    uint64_t n = 0;
    while (first + n < most && claim(&region->state[first + n])) n++;
    return n;
}

bool capture_huge_block(const struct region *region, uint64_t page, uint64_t *first, uint64_t *n) {
    if (!(state_load(&region->state[page]) & PAGE_HUGE)) return false;
    uint64_t address = region->face.start + (page << TM_PAGE_SHIFT), block = address & ~(HUGE_SIZE - 1);
    uint64_t end = block + HUGE_SIZE;
    if (block < region->face.start) block = region->face.start;
    if (end > region->face.end) end = region->face.end;
    *first = (block - region->face.start) >> TM_PAGE_SHIFT;
    *n = (end - block) >> TM_PAGE_SHIFT;
    return true;
}

int capture_range(struct tm_source *source, uint64_t start, uint64_t end, enum capture_by by, uint8_t *buffer) {
    uint64_t swept = 0;
    for (uint32_t i = region_index(source, start); i < source->n_regions; i++) {
        struct region *region = &source->regions[i];
        if (region->face.start >= end || atomic_load(&source->state) != TM_CAPTURING) break;
        if (!region->state) continue;
        uint64_t page = start > region->face.start ? (start - region->face.start) >> TM_PAGE_SHIFT : 0;
        uint64_t last = ((end < region->face.end ? end : region->face.end) - region->face.start) >> TM_PAGE_SHIFT;
        while (page < last && atomic_load(&source->state) == TM_CAPTURING) {
            uint8_t state = plain(state_load(&region->state[page]));
            if (state == PAGE_CLAIMED && by == BY_REQUEST) {
                sched_yield();
                continue;
            }
            if (state != PAGE_PROTECTED) {
                page++;
                continue;
            }
            uint64_t first = page, most = page + RUN_SMALL < last ? page + RUN_SMALL : last, n;
            if (capture_huge_block(region, page, &first, &n)) {
                most = first + n;
                if (first < page && plain(state_load(&region->state[first])) != PAGE_PROTECTED) first = page;
            }
            n = capture_claim(region, first, most);
            if (n == 0) continue;
            if (capture_run(source, region, first, n, buffer, by == BY_HANDLER)) return TM_LOST;
            swept += n;
            page = first + n;
        }
    }
    atomic_fetch_add(&source->swept, swept);
    return TM_OK;
}

bool capture_needs(const struct tm_source *source, uint64_t start, uint64_t end) {
    for (uint32_t i = region_index(source, start); i < source->n_regions; i++) {
        const struct region *region = &source->regions[i];
        if (region->face.start >= end) break;
        if (!region->state) continue;
        uint64_t page = start > region->face.start ? (start - region->face.start) >> TM_PAGE_SHIFT : 0;
        uint64_t last = ((end < region->face.end ? end : region->face.end) - region->face.start) >> TM_PAGE_SHIFT;
        for (; page < last; page++) {
            uint8_t state = plain(state_load(&region->state[page]));
            if (state == PAGE_PROTECTED || state == PAGE_CLAIMED) return true;
        }
    }
    return false;
}

// From the tracer, at a thread's exit: the kernel would refuse the fault, so the page is opened before.
int capture_page_now(struct tm_source *source, uint64_t address) {
    struct region *region = region_at(source, address);
    if (!region || !region->state) return TM_OK;
    uint64_t page = (address - region->face.start) >> TM_PAGE_SHIFT;
    for (;;) {
        uint8_t state = plain(state_load(&region->state[page]));
        if (state == PAGE_CLAIMED && atomic_load(&source->state) == TM_CAPTURING) {
            sched_yield();
            continue;
        }
        if (state != PAGE_PROTECTED) { // a zero page that was armed along, or one that could not be released
            capture_release_retry(source, tm_page_floor(address), tm_page_floor(address) + TM_PAGE_SIZE, false);
            return TM_OK;
        }
        if (!claim(&region->state[page])) continue;
        uint8_t buffer[TM_PAGE_SIZE];
        return capture_run(source, region, page, 1, buffer, false);
    }
}

// ---------------------------------------------------------------- inside the freeze

int capture_piece_add(struct tm_source *source, uint32_t region, uint64_t start, uint64_t end, uint64_t most) {
    while (start < end) {
        uint64_t stop = (start & ~(most - 1)) + most;
        if (stop > end) stop = end;
        struct piece *last = source->n_pieces ? &source->pieces[source->n_pieces - 1] : NULL;
        // Small gaps are armed along: nothing is there to be armed, and a call costs more.
        if (last && last->region == region && start - last->end < HUGE_SIZE && stop - last->start <= most) {
            last->end = stop;
        } else {
            if (source->n_pieces == source->pieces_capacity) {
                uint32_t capacity = source->pieces_capacity ? source->pieces_capacity * 2 : 1024;
                struct piece *more = realloc(source->pieces, capacity * sizeof *more);
                if (!more) return ENOMEM;
                source->pieces = more;
                source->pieces_capacity = capacity;
            }
            source->pieces[source->n_pieces++] = (struct piece){region, start, stop};
        }
        start = stop;
    }
    return 0;
}

static int track_extent(void *context, const struct extent *extent) {
    struct tm_source *source = ((void **)context)[0];
    struct region *region = ((void **)context)[1];
    struct tm_error *error = ((void **)context)[2];
    if (extent->categories & PAGE_IS_GUARD) return region_guarded(&region->face, extent->start, error);
    uint64_t pages = (region->face.end - region->face.start) >> TM_PAGE_SHIFT;
    if (!region->state) {
        void *at = mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return tm_error_errno(error, "mmap", "no memory for page states");
        region->state = at;
        region->state_size = pages;
    }
    bool huge = extent->categories & PAGE_IS_HUGE;
    uint64_t first = (extent->start - region->face.start) >> TM_PAGE_SHIFT;
    uint64_t n = (extent->end - extent->start) >> TM_PAGE_SHIFT;
    memset(region->state + first, PAGE_PROTECTED | (huge ? PAGE_HUGE : 0), n);
    if (huge) region->face.huge = 1;
    region->face.tracked += n;
    atomic_fetch_add(&source->total, n);
    if (capture_piece_add(source, (uint32_t)(region - source->regions), extent->start, extent->end, PIECE_SIZE))
        return tm_error_set(error, TM_NOMEM, 0, "realloc", "no memory for the list of pieces");
    return TM_OK;
}

static int region_register(struct tm_source *source, const struct region *region, struct tm_error *error) {
    struct uffdio_register arg = {
        .range = {region->face.start, region->face.end - region->face.start},
        .mode = UFFDIO_REGISTER_MODE_WP,
    };
    if (ioctl(source->uffd, UFFDIO_REGISTER, &arg) == 0) return TM_OK;
    int err = errno;
    tm_error_set(error, err == EBUSY || err == EINVAL ? TM_UNSUPPORTED : tm_error_code(err), err, "UFFDIO_REGISTER",
                 "region %lx-%lx cannot be write-protected; make it eager (--eager %lx-%lx)",
                 (unsigned long)region->face.start, (unsigned long)region->face.end, (unsigned long)region->face.start,
                 (unsigned long)region->face.end);
    if (error) error->address = region->face.start;
    return error ? error->code : TM_SYS;
}

static void arm_piece(struct tm_source *source, uint32_t index, uint8_t *buffer) {
    (void)buffer;
    const struct piece *piece = &source->pieces[index];
    struct uffdio_writeprotect arg = {.range = {piece->start, piece->end - piece->start},
                                      .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    while (ioctl(source->uffd, UFFDIO_WRITEPROTECT, &arg)) {
        if (errno == EINTR || errno == EAGAIN) continue;
        struct tm_error error;
        tm_error_errno(&error, "UFFDIO_WRITEPROTECT", "cannot write-protect %lx-%lx", (unsigned long)piece->start,
                       (unsigned long)piece->end);
        error.address = piece->start;
        capture_fail(source, &error);
        return;
    }
}

// Two steps: what is populated decides what is tracked (the rest is zero at T0 and needs no capture), then arm it, shared with
// the workers.
int capture_arm(struct tm_source *source, struct tm_error *error) {
    uint64_t begin = tm_now_ns();
    for (uint32_t i = 0; i < source->n_regions; i++) {
        struct region *region = &source->regions[i];
        if (region->face.treatment != TM_PROTECTED || region->precopied) continue;
        void *context[3] = {source, region, error};
        int code = target_scan(source, region->face.start, region->face.end, PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                               PAGE_IS_PFNZERO, PAGE_IS_HUGE | source->guard_category, track_extent, context, error);
        if (!code && region->state && !source->held) code = region_register(source, region, error);
        if (code) return code;
    }
    source->times.scan = tm_now_ns() - begin;
    begin = tm_now_ns();
    if (!source->held) jobs_run(source, arm_piece, source->n_pieces, NULL);
    source->times.arm = tm_now_ns() - begin;
    if (atomic_load(&source->state) == TM_FAILED) {
        *error = source->failure;
        return error->code;
    }
    return TM_OK;
}

// ---------------------------------------------------------------- verify: hash at T0, compare at the end

static int hash_extent(void *context, const struct extent *extent) {
    struct tm_source *source = ((void **)context)[0];
    const struct region *region = ((void **)context)[1];
    uint8_t *buffer = ((void **)context)[2];
    if (region->changed_only && (extent->categories & PAGE_IS_FILE)) return 0;
    for (uint64_t at = extent->start; at < extent->end; at += READ_SIZE) {
        uint64_t size = extent->end - at < READ_SIZE ? extent->end - at : READ_SIZE;
        int err = target_read(source, at, buffer, size);
        if (err) {
            lost(source, at, err, "process_vm_readv");
            return err;
        }
        uint64_t page = region->first_page + ((at - region->face.start) >> TM_PAGE_SHIFT);
        for (uint64_t i = 0; i < size >> TM_PAGE_SHIFT; i++)
            source->verify_sums[page + i] = tm_page_sum(buffer + (i << TM_PAGE_SHIFT));
        atomic_fetch_add(&source->verified, size >> TM_PAGE_SHIFT);
    }
    return 0;
}

static void hash_piece(struct tm_source *source, uint32_t index, uint8_t *buffer) {
    const struct piece *piece = &source->pieces[index];
    void *context[3] = {source, &source->regions[piece->region], buffer};
    target_scan(source, piece->start, piece->end, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_PFNZERO, PAGE_IS_FILE,
                hash_extent, context, NULL);
}

int verify_hash(struct tm_source *source, struct tm_error *error) {
    source->verify_size = source->spool_pages * sizeof(uint32_t) + 1;
    void *at =
        mmap(NULL, source->verify_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return tm_error_errno(error, "mmap", "no memory for the page hashes");
    source->verify_sums = at;
    uint8_t *buffer = malloc(READ_SIZE);
    if (!buffer) return tm_error_set(error, TM_NOMEM, 0, "malloc", "no memory");
    jobs_run(source, hash_piece, source->n_pieces, buffer);
    for (uint32_t i = 0; i < source->n_regions; i++) {
        struct region *region = &source->regions[i];
        bool scanned = (region->face.treatment == TM_EAGER || region->precopied) &&
                       region->face.kind != TM_SHARED_ANON && region->face.kind != TM_DELETED;
        if (!scanned) continue;
        void *context[3] = {source, region, buffer};
        target_scan(source, region->face.start, region->face.end, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_PFNZERO,
                    PAGE_IS_FILE, hash_extent, context, NULL);
    }
    free(buffer);
    if (atomic_load(&source->state) == TM_FAILED) {
        *error = source->failure;
        return error->code;
    }
    return TM_OK;
}

// ---------------------------------------------------------------- start and stop

int capture_prepare(struct tm_source *source, struct tm_error *error) {
    atomic_store(&source->phase, PHASE_READY);
    atomic_store(&source->state, TM_CAPTURING);
    source->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (source->wake_fd < 0) return tm_error_errno(error, "eventfd", "cannot start the capture");
    int err = tm_thread_start(&source->handler, "tm-fault", handler_main, source);
    if (err) return tm_error_set(error, TM_NOMEM, err, "pthread_create", "cannot start the capture");
    source->capture_threads = true;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    uint32_t wanted = cpus < 2 ? 1 : cpus > WORKERS_MOST ? WORKERS_MOST : 2;
    for (source->n_workers = 0; source->n_workers < wanted; source->n_workers++) {
        err = tm_thread_start(&source->workers[source->n_workers], "tm-sweep", worker_main, source);
        if (err && source->n_workers == 0)
            return tm_error_set(error, TM_NOMEM, err, "pthread_create", "cannot start the capture");
        if (err) break;
    }
    return TM_OK;
}

static void phase_set(struct tm_source *source, int phase) {
    pthread_mutex_lock(&source->request_lock);
    atomic_store(&source->phase, phase);
    pthread_cond_broadcast(&source->work);
    pthread_mutex_unlock(&source->request_lock);
    uint64_t one = 1;
    if (source->wake_fd >= 0 && write(source->wake_fd, &one, sizeof one) < 0 && errno != EAGAIN) return;
}

void capture_start(struct tm_source *source) { phase_set(source, PHASE_SWEEP); }

int capture_quiesce(struct tm_source *source) {
    uint64_t ticket = atomic_fetch_add(&source->quiesce_asked, 1) + 1;
    uint64_t one = 1;
    if (write(source->wake_fd, &one, sizeof one) < 0 && errno != EAGAIN) return errno;
    while (atomic_load(&source->quiesce_done) < ticket) usleep(50);
    return 0;
}

void capture_stop(struct tm_source *source) {
    // With the handler still there: a thread that waits until somebody has read its event cannot be stopped.
    uint64_t began = 0;
    bool stopped = release_stop(source, &began);
    if (source->capture_threads) {
        phase_set(source, PHASE_QUIT);
        pthread_join(source->handler, NULL);
        for (uint32_t i = 0; i < source->n_workers; i++) pthread_join(source->workers[i], NULL);
        source->capture_threads = false;
    }
    release_all(source, stopped, began); // and whoever waits in a fault or an event
    rounds_free(source);
    if (source->wake_fd >= 0) close(source->wake_fd);
    source->wake_fd = -1;
    atomic_store(&source->phase, PHASE_SLEEP);
    source->n_pieces = 0;
}
