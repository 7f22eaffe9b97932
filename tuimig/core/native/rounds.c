// Pre-copy: rounds of copying while the target runs. Each round finds what was written since the last one, protects it again
// and reads it, in this order: what is written after it was protected shows as written in the next scan. So nothing depends
// on events, and what the target frees, moves or maps anew shows as absent or as written.
//
// The tracking is the kernel's (UFFD_FEATURE_WP_ASYNC): it resolves a write fault by itself and marks the page as written.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "source_internal.h"

#define SCAN_SIZE (32ull << 20)
#define BUFFER_SIZE (2ull << 20)
enum { RUNS_MOST = 512, EXTENTS = 512, HOT_AFTER = 3, STOPS_MOST = 4 };
#define UNCOVERED_MOST (4ull << 20)

struct run { // pages that lie in a row in the target and in the spool
    uint64_t address, page, n;
    uint8_t *state;
};

struct rounds {
    uint8_t *buffer;
    struct run runs[RUNS_MOST];
    uint32_t n_runs;
    uint64_t used;
    uint64_t *hot, *hot_before; // addresses of pages that are left to the end
    uint64_t n_hot, n_hot_before, hot_capacity, hot_before_capacity;
    uint32_t number;
    bool under_way, closing;
    struct extents written; // by region; the categories are pages
    uint64_t at;            // how far the round has come
    uint64_t began_ns;
    struct tm_round shown;
};

// ---------------------------------------------------------------- what the kernel can do

// Memory of our own below two page tables, tracked, with a written and protected page at the begin of each half.
#define TRIAL_HALF (2ull << 20)
struct trial {
    uint8_t *mapped, *at, *end;
    int uffd, pagemap;
};

static bool trial_begin(struct trial *trial) {
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    trial->mapped = mmap(NULL, 3 * TRIAL_HALF, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    trial->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */);
    trial->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    trial->end = trial->mapped + 3 * TRIAL_HALF;
    if (trial->mapped == MAP_FAILED || trial->uffd < 0 || trial->pagemap < 0) return false;
    trial->at = (uint8_t *)(((uintptr_t)trial->mapped + TRIAL_HALF - 1) & ~(TRIAL_HALF - 1));
    madvise(trial->at, 2 * TRIAL_HALF, MADV_NOHUGEPAGE);
    trial->at[0] = trial->at[TRIAL_HALF] = 1;
    struct uffdio_register range = {.range = {(uintptr_t)trial->at, 2 * TRIAL_HALF}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(trial->uffd, UFFDIO_API, &api) || ioctl(trial->uffd, UFFDIO_REGISTER, &range)) return false;
    for (uint64_t i = 0; i < 2; i++) {
        struct uffdio_writeprotect arm = {.range = {(uintptr_t)trial->at + i * TRIAL_HALF, TM_PAGE_SIZE},
                                          .mode = UFFDIO_WRITEPROTECT_MODE_WP};
        if (ioctl(trial->uffd, UFFDIO_WRITEPROTECT, &arm)) return false;
    }
    return true;
}

static void trial_end(const struct trial *trial) {
    if (trial->pagemap >= 0) close(trial->pagemap);
    if (trial->uffd >= 0) close(trial->uffd);
    if (trial->mapped != MAP_FAILED) munmap(trial->mapped, (size_t)(trial->end - trial->mapped));
}

static bool trial_reports(const struct trial *trial, uint64_t offset, uint64_t mask) {
    struct page_region found[1];
    uint64_t start = (uintptr_t)trial->at + offset;
    struct pm_scan_arg arg = {
        .size = sizeof arg,
        .start = start,
        .end = start + TM_PAGE_SIZE,
        .vec = (uintptr_t)found,
        .vec_len = 1,
        .category_mask = mask,
        .return_mask = PAGE_IS_WRITTEN,
    };
    return ioctl(trial->pagemap, PAGEMAP_SCAN, &arg) == 1;
}

// Whether the protection of pages that mremap moves is taken away along with their registration. If not (before Linux 6.13)
// what was moved would pass for what was read at its new place.
bool rounds_kernel_can(void) {
    struct trial trial;
    bool can = trial_begin(&trial);
    if (can) {
        uint8_t *to = trial.at + TRIAL_HALF;
        can = mremap(trial.at, TM_PAGE_SIZE, TM_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to &&
              trial_reports(&trial, TRIAL_HALF, PAGE_IS_WRITTEN | PAGE_IS_PRESENT);
    }
    trial_end(&trial);
    return can;
}

// Another thread's mapping may come into its way.
static bool trial_shrink_and_grow(struct trial *trial) {
    uint8_t *half = trial->at + TRIAL_HALF, *whole = half + TRIAL_HALF;
    munmap(half, (size_t)(trial->end - half));
    trial->end = half;
    if (mremap(trial->at, TRIAL_HALF, 2 * TRIAL_HALF, 0) != trial->at) return false;
    trial->end = whole;
    return true;
}

// Whether a scan for what is written alone, which the kernel has a short way for, reports what has been freed: a page, and,
// when a mapping has shrunk and grown again, memory that has no page table any more.
bool rounds_quick_scan(void) {
    struct trial trial;
    bool can = trial_begin(&trial) && !trial_reports(&trial, 0, PAGE_IS_WRITTEN) &&
               !trial_reports(&trial, TRIAL_HALF, PAGE_IS_WRITTEN) &&
               madvise(trial.at, TM_PAGE_SIZE, MADV_DONTNEED) == 0 && trial_reports(&trial, 0, PAGE_IS_WRITTEN) &&
               trial_shrink_and_grow(&trial) && trial_reports(&trial, TRIAL_HALF, PAGE_IS_WRITTEN);
    trial_end(&trial);
    return can;
}

// ---------------------------------------------------------------- ranges that end in the window

static bool is_given_up(const struct tm_source *source, const struct tm_region_state *face) {
    for (uint32_t i = 0; i < source->n_given_up; i++)
        if (face->start < source->given_up[i].end && source->given_up[i].start < face->end) return true;
    return false;
}

bool region_tracked(const struct tm_source *source, const struct region *region) {
    return source->rounds && region->face.treatment == TM_PROTECTED && !is_given_up(source, &region->face);
}

void rounds_forget(struct tm_source *source, uint64_t start, uint64_t end) {
    if (source->track_uffd < 0) return;
    for (uint32_t i = region_index(source, start); i < source->n_regions; i++) {
        const struct tm_region_state *face = &source->regions[i].face;
        if (face->start >= end) break;
        if (region_tracked(source, &source->regions[i])) open_gently(source->track_uffd, face->start, face->end, false);
    }
}

static int give_up(struct tm_source *source, const struct extent *region) {
    struct extent *more = realloc(source->given_up, (source->n_given_up + 1) * sizeof *more);
    if (!more) return ENOMEM;
    source->given_up = more;
    more[source->n_given_up++] = (struct extent){region->start, region->end, 0};
    return 0;
}

int rounds_give_up(struct tm_source *source, uint64_t pages, uint64_t *given_up, struct tm_error *error) {
    *given_up = 0;
    if (!source->rounds) return tm_error_set(error, TM_SYS, EINVAL, "pre-copy", "no round has been made");
    for (;;) {
        uint64_t sum = 0;
        struct extent *worst = NULL;
        for (uint32_t i = 0; i < source->rounds->written.n; i++) {
            struct extent *region = &source->rounds->written.at[i];
            sum += region->categories;
            if (!worst || region->categories > worst->categories) worst = region;
        }
        if (sum <= pages || !worst) break;
        if (give_up(source, worst)) return tm_error_set(error, TM_NOMEM, ENOMEM, "realloc", "no memory");
        *given_up += worst->end - worst->start;
        worst->categories = 0;
    }
    return source->n_given_up ? track_drop(source, error) : TM_OK;
}

// ---------------------------------------------------------------- reading

static int run_store(struct tm_source *source, const struct run *run, const uint8_t *data, struct tm_error *error) {
    uint64_t zero = 0;
    int code = tm_spool_put(source->spool, run->page, data, run->n, &zero, error);
    source->rounds->shown.zero += zero;
    source->rounds->shown.copied += run->n;
    return code;
}

// One by one, where reading them all in one call met something. What cannot be read is not there any more, or will be read
// at T0.
static int runs_read_slowly(struct tm_source *source, struct tm_error *error) {
    struct rounds *rounds = source->rounds;
    for (uint32_t i = 0; i < rounds->n_runs; i++) {
        struct run *run = &rounds->runs[i];
        int err = target_read(source, run->address, rounds->buffer, run->n << TM_PAGE_SHIFT);
        if (err == ESRCH) return tm_error_set(error, TM_GONE, err, "process_vm_readv", "the process has ended");
        if (err) {
            for (uint64_t k = 0; k < run->n; k++)
                run->state[k] = (uint8_t)((run->state[k] & ~TRACK_MASK) | TRACK_DROPPED);
            continue;
        }
        int code = run_store(source, run, rounds->buffer, error);
        if (code) return code;
    }
    return TM_OK;
}

static int runs_flush(struct tm_source *source, struct tm_error *error) {
    struct rounds *rounds = source->rounds;
    if (!rounds->n_runs) return TM_OK;
    uint64_t begin = tm_now_ns();
    struct iovec remote[RUNS_MOST];
    for (uint32_t i = 0; i < rounds->n_runs; i++)
        remote[i] = (struct iovec){(void *)(uintptr_t)rounds->runs[i].address, rounds->runs[i].n << TM_PAGE_SHIFT};
    struct iovec local = {rounds->buffer, rounds->used};
    ssize_t got = process_vm_readv(source->pid, &local, 1, remote, rounds->n_runs, 0);
    int code = TM_OK;
    if (got == (ssize_t)rounds->used) {
        const uint8_t *data = rounds->buffer;
        for (uint32_t i = 0; !code && i < rounds->n_runs; i++) {
            code = run_store(source, &rounds->runs[i], data, error);
            data += rounds->runs[i].n << TM_PAGE_SHIFT;
        }
    } else {
        code = runs_read_slowly(source, error);
    }
    rounds->n_runs = 0;
    rounds->used = 0;
    rounds->shown.copy_ns += tm_now_ns() - begin;
    return code;
}

static int run_add(struct tm_source *source, struct run run, struct tm_error *error) {
    struct rounds *rounds = source->rounds;
    for (uint64_t k = 0; k < run.n; k++)
        run.state[k] = (uint8_t)((run.state[k] & ~TRACK_MASK) | TRACK_COPIED); // unless reading it fails
    while (run.n) {
        uint64_t room = (BUFFER_SIZE - rounds->used) >> TM_PAGE_SHIFT;
        uint64_t n = run.n < room ? run.n : room;
        rounds->runs[rounds->n_runs++] = (struct run){run.address, run.page, n, run.state};
        rounds->used += n << TM_PAGE_SHIFT;
        if (rounds->n_runs == RUNS_MOST || rounds->used == BUFFER_SIZE) {
            int code = runs_flush(source, error);
            if (code) return code;
        }
        run.address += n << TM_PAGE_SHIFT;
        run.page += n;
        run.state += n;
        run.n -= n;
    }
    return TM_OK;
}

// ---------------------------------------------------------------- hot pages

static int hot_add(struct rounds *rounds, uint64_t address, struct tm_error *error) {
    if (rounds->n_hot == rounds->hot_capacity) {
        uint64_t capacity = rounds->hot_capacity ? rounds->hot_capacity * 2 : 1024;
        uint64_t *more = realloc(rounds->hot, capacity * sizeof *more);
        if (!more) return tm_error_set(error, TM_NOMEM, ENOMEM, "realloc", "no memory for the list of hot pages");
        rounds->hot = more;
        rounds->hot_capacity = capacity;
    }
    rounds->hot[rounds->n_hot++] = address;
    return TM_OK;
}

// Written again: in how many rounds in a row. True: it is left to the end.
static bool heat(uint8_t *state, uint32_t number) {
    uint8_t last = (uint8_t)(*state >> TRACK_ROUND_SHIFT), count = (*state >> TRACK_COUNT_SHIFT) & TRACK_COUNT_MOST;
    uint8_t now = (uint8_t)(number & TRACK_ROUND_MOST);
    bool in_a_row = (*state & TRACK_MASK) != TRACK_NONE && last == ((number - 1) & TRACK_ROUND_MOST);
    count = !in_a_row ? 0 : count < TRACK_COUNT_MOST ? (uint8_t)(count + 1) : count;
    bool hot = count >= HOT_AFTER;
    *state = (uint8_t)(now << TRACK_ROUND_SHIFT | count << TRACK_COUNT_SHIFT | (hot ? TRACK_HOT : TRACK_NONE));
    return hot;
}

// Hot pages that were not written in this round have cooled: they have been protected since the last one.
static int cooled_read(struct tm_source *source, struct tm_error *error) {
    struct rounds *rounds = source->rounds;
    uint8_t now = (uint8_t)(rounds->number & TRACK_ROUND_MOST);
    int code = TM_OK;
    for (uint64_t i = 0; !code && i < rounds->n_hot_before; i++) {
        uint64_t address = rounds->hot_before[i];
        struct zone *zone = zone_of(source, address, address + TM_PAGE_SIZE);
        if (!zone) continue;
        uint64_t page = (address - zone->start) >> TM_PAGE_SHIFT;
        if ((zone->state[page] & TRACK_MASK) != TRACK_HOT || zone->state[page] >> TRACK_ROUND_SHIFT == now) continue;
        code = run_add(source, (struct run){address, zone->first_page + page, 1, zone->state + page}, error);
    }
    return code ? code : runs_flush(source, error);
}

// ---------------------------------------------------------------- a round

static int extent_take(struct tm_source *source, struct region *region, const struct zone *zone, uint64_t start,
                       uint64_t end, struct tm_error *error) {
    struct rounds *rounds = source->rounds;
    uint64_t n = (end - start) >> TM_PAGE_SHIFT, first = (start - zone->start) >> TM_PAGE_SHIFT;
    rounds->shown.dirty += n;
    region->dirty += n;
    for (uint64_t i = 0; i < n;) {
        uint64_t run = 0;
        bool hot = false;
        while (i + run < n && !(hot = heat(&zone->state[first + i + run], rounds->number))) run++;
        int code = TM_OK;
        if (run)
            code = run_add(
                source,
                (struct run){start + (i << TM_PAGE_SHIFT), zone->first_page + first + i, run, zone->state + first + i},
                error);
        i += run;
        if (!code && hot) {
            code = hot_add(rounds, start + (i << TM_PAGE_SHIFT), error);
            i++;
        }
        if (code) return code;
    }
    return TM_OK;
}

// Find what was written, and protect it, in one step of the kernel; then read it.
static int piece_round(struct tm_source *source, struct region *region, uint64_t start, uint64_t end,
                       struct tm_error *error) {
    struct zone *zone = zone_of(source, region->face.start, region->face.end);
    if (!zone) return TM_OK;
    struct page_region found[EXTENTS];
    while (start < end) {
        struct pm_scan_arg arg = {
            .size = sizeof arg,
            .flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            .start = start,
            .end = end,
            .vec = (uintptr_t)found,
            .vec_len = EXTENTS,
            .category_inverted = PAGE_IS_PFNZERO,
            .category_mask = PAGE_IS_WRITTEN | PAGE_IS_PFNZERO,
            .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            .return_mask = PAGE_IS_WRITTEN,
        };
        uint64_t begin = tm_now_ns();
        int n = ioctl(source->pagemap_fd, PAGEMAP_SCAN, &arg);
        source->rounds->shown.scan_ns += tm_now_ns() - begin;
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EPERM) return TM_OK; // not registered (any more): all of it counts as written at T0
        if (n < 0) return tm_error_errno(error, "PAGEMAP_SCAN", "cannot scan the page tables");
        int code = TM_OK;
        for (int i = 0; !code && i < n; i++)
            code = extent_take(source, region, zone, found[i].start, found[i].end, error);
        if (code) return code;
        if (arg.walk_end <= start) return tm_error_set(error, TM_SYS, 0, "PAGEMAP_SCAN", "a scan does not come on");
        start = arg.walk_end;
    }
    return TM_OK;
}

// The regions as they are, and what is new of them registered if it is much: the target is stopped for that.
static int regions_track(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error) {
    if (source->rounds->number > 0) {
        int code = regions_read(source, plan, error);
        bool enough = source->rounds->closing || source->times.n_stops >= STOPS_MOST;
        if (code || enough || track_uncovered(source) < UNCOVERED_MOST) return code;
    }
    uint64_t began;
    int code = short_stop_begin(source, &began, error);
    if (code) return code == TM_DEADLINE && source->rounds->number > 0 ? TM_OK : code; // then it is copied at T0
    code = regions_read(source, plan, error);
    if (!code) track_register(source);
    short_stop_end(source, began);
    return code;
}

// While the target runs it goes before us, until a freeze is near. Where we could not come back from a lower priority we keep
// ours.
static void be_gentle(bool on) {
    if (tm_thread_nice(-1) == 0) tm_thread_nice(on ? TM_GENTLE : 0);
}

static int round_begin(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error) {
    struct rounds *rounds = source->rounds;
    if (!rounds) {
        rounds = calloc(1, sizeof *rounds);
        if (!rounds) return tm_error_set(error, TM_NOMEM, ENOMEM, "calloc", "no memory for pre-copy");
        source->rounds = rounds;
        be_gentle(true);
        rounds->buffer = mmap(NULL, BUFFER_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (rounds->buffer == MAP_FAILED) {
            rounds->buffer = NULL;
            return tm_error_errno(error, "mmap", "no memory for pre-copy");
        }
        source->plan = plan;
        source->spool = plan->spool;
    }
    regions_free(source);
    arena_free(&source->arena);
    source->n_threads = source->n_descriptors = source->n_probes = source->n_shared_pending = 0;
    int code = regions_track(source, plan, error);
    if (!code) code = zones_cover(source, error);
    if (!code) code = tm_spool_grow(source->spool, source->zones.pages, error);
    if (code) return code;
    uint64_t now = tm_now_ns();
    uint64_t since = rounds->began_ns ? now - rounds->began_ns : 0;
    rounds->shown = (struct tm_round){.number = (int32_t)rounds->number, .since_ns = since};
    rounds->began_ns = now;
    rounds->at = 0;
    rounds->under_way = true;
    for (uint32_t i = 0; i < source->registered.n; i++)
        rounds->shown.tracked += source->registered.at[i].end - source->registered.at[i].start;
    return TM_OK;
}

// How much of each region is written, over the rounds: the last one may have been a quiet moment.
static void writes_remember(struct tm_source *source) {
    struct extents before = source->rounds->number > 1 ? source->rounds->written : (struct extents){0}, now = {0};
    if (source->rounds->number <= 1) extents_free(&source->rounds->written);
    for (uint32_t i = 0; i < source->n_regions; i++) {
        const struct region *region = &source->regions[i];
        uint64_t dirty = region->dirty; // of the first round: any of it may be written
        for (uint32_t k = 0; k < before.n; k++)
            if (before.at[k].start < region->face.end && region->face.start < before.at[k].end) {
                uint64_t fading = before.at[k].categories - before.at[k].categories / 4;
                if (fading > dirty) dirty = fading;
            }
        if (region_tracked(source, region) && dirty) extents_add(&now, region->face.start, region->face.end, dirty);
    }
    extents_free(&before);
    source->rounds->written = now;
}

static int round_end(struct tm_source *source, struct tm_error *error) {
    struct rounds *rounds = source->rounds;
    writes_remember(source);
    int code = runs_flush(source, error);
    if (!code) code = cooled_read(source, error);
    if (code) return code;
    uint64_t *spare = rounds->hot_before, spare_capacity = rounds->hot_before_capacity;
    rounds->hot_before = rounds->hot;
    rounds->hot_before_capacity = rounds->hot_capacity;
    rounds->n_hot_before = rounds->n_hot;
    rounds->hot = spare;
    rounds->hot_capacity = spare_capacity;
    rounds->n_hot = 0;
    rounds->shown.hot = rounds->n_hot_before;
    rounds->shown.complete = 1;
    rounds->under_way = false;
    rounds->number++;
    return TM_OK;
}

void rounds_closing(struct tm_source *source) {
    be_gentle(false);
    if (source->rounds) source->rounds->closing = true;
}

int rounds_go_on(struct tm_source *source, const struct tm_freeze_plan *plan, uint32_t slice_ms, struct tm_round *out,
                 struct tm_error *error) {
    if (source->track_uffd < 0) return tm_error_set(error, TM_SYS, EINVAL, "pre-copy", "nothing tracks its writes");
    uint64_t begin = tm_now_ns(), until = slice_ms ? begin + slice_ms * 1000000ull : UINT64_MAX;
    int code = source->rounds && source->rounds->under_way ? TM_OK : round_begin(source, plan, error);
    if (code) return code;
    struct rounds *rounds = source->rounds;
    bool all = true;
    for (uint32_t i = region_index(source, rounds->at); all && i < source->n_regions; i++) {
        struct region *region = &source->regions[i];
        uint64_t at = rounds->at > region->face.start ? rounds->at : region->face.start;
        for (; all && region_tracked(source, region) && at < region->face.end; rounds->at = at) {
            uint64_t end = (at & ~(SCAN_SIZE - 1)) + SCAN_SIZE;
            if (end > region->face.end) end = region->face.end;
            code = piece_round(source, region, at, end, error);
            if (code) return code;
            at = end;
            all = tm_now_ns() < until;
        }
        if (all) rounds->at = region->face.end;
    }
    if (all) code = round_end(source, error);
    rounds->shown.total_ns += tm_now_ns() - begin;
    *out = rounds->shown;
    return code;
}

void rounds_free(struct tm_source *source) {
    struct rounds *rounds = source->rounds;
    free(source->given_up);
    source->given_up = NULL;
    source->n_given_up = 0;
    zones_free(source);
    if (!rounds) return;
    if (rounds->buffer) munmap(rounds->buffer, BUFFER_SIZE);
    extents_free(&rounds->written);
    free(rounds->hot);
    free(rounds->hot_before);
    free(rounds);
    source->rounds = NULL;
}
