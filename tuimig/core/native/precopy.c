// Pre-copy at T0: which pages of the rounds are still valid, and what has to be copied inside the freeze.
//
// The proof is positive: a page's copy counts only if the page is present (or swapped out), still protected, and was read
// after it was protected. All else is absent, hence zero, or is copied now.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "source_internal.h"

#define PIECE_SIZE (32ull << 20)
#define EACH_BYTE 0x0101010101010101ull

struct taken { // what one scan works on
    struct tm_source *source;
    struct region *region;
    const struct zone *zone; // null: the region has no place from before
    uint64_t at, quick_at;   // up to here everything is accounted for
    uint64_t valid;
    struct tm_error *error;
};

static int dirty_add(struct tm_source *source, uint64_t address, uint64_t page, uint64_t n) {
    pthread_mutex_lock(&source->failure_lock);
    struct dirty *dirty = &source->dirty;
    int err = 0;
    if (dirty->n == dirty->capacity) {
        uint32_t capacity = dirty->capacity ? dirty->capacity * 2 : 4096;
        struct dirty_run *more = realloc(dirty->runs, capacity * sizeof *more);
        if (more) {
            dirty->runs = more;
            dirty->capacity = capacity;
        } else {
            err = ENOMEM;
        }
    }
    if (!err) {
        dirty->runs[dirty->n++] = (struct dirty_run){address, page, n};
        dirty->pages += n;
    }
    pthread_mutex_unlock(&source->failure_lock);
    return err;
}

static int found_dirty(struct taken *taken, uint64_t start, uint64_t end) {
    uint64_t page = taken->region->first_page + ((start - taken->region->face.start) >> TM_PAGE_SHIFT);
    if (dirty_add(taken->source, start, page, (end - start) >> TM_PAGE_SHIFT))
        return tm_error_set(taken->error, TM_NOMEM, ENOMEM, "realloc", "no memory for the list of dirty pages");
    return TM_OK;
}

// How many pages from `from` on have a valid copy; many states at a time.
static uint64_t copied_run(const uint8_t *state, uint64_t from, uint64_t n) {
    uint64_t i = from;
    for (uint64_t some[4]; i + sizeof some <= n; i += sizeof some) {
        memcpy(some, state + i, sizeof some);
        uint64_t other = 0;
        for (int k = 0; k < 4; k++) other |= (some[k] & EACH_BYTE * TRACK_MASK) ^ EACH_BYTE * TRACK_COPIED;
        if (other) break;
    }
    while (i < n && (state[i] & TRACK_MASK) == TRACK_COPIED) i++;
    return i - from;
}

// Present and protected: valid where it was read since, else copied now.
static int found_protected(struct taken *taken, uint64_t start, uint64_t end) {
    if (start >= end) return TM_OK;
    if (!taken->zone) return found_dirty(taken, start, end);
    const uint8_t *state = taken->zone->state + ((start - taken->zone->start) >> TM_PAGE_SHIFT);
    uint64_t n = (end - start) >> TM_PAGE_SHIFT;
    for (uint64_t i = 0; i < n;) {
        uint64_t run = copied_run(state, i, n);
        taken->valid += run;
        i += run;
        uint64_t from = i;
        while (i < n && (state[i] & TRACK_MASK) != TRACK_COPIED) i++;
        if (i == from) continue;
        int code = found_dirty(taken, start + (from << TM_PAGE_SHIFT), start + (i << TM_PAGE_SHIFT));
        if (code) return code;
    }
    return TM_OK;
}

static void found_absent(const struct taken *taken, uint64_t start, uint64_t end) {
    if (!taken->zone) return;
    uint8_t *state = taken->zone->state + ((start - taken->zone->start) >> TM_PAGE_SHIFT);
    uint64_t n = (end - start) >> TM_PAGE_SHIFT;
    for (uint64_t i = 0; i < n; i++)
        if (state[i]) state[i] = TRACK_DROPPED;
}

// Of each page that is not (present and protected).
static int found(void *context, const struct extent *extent) {
    struct taken *taken = context;
    int code = found_protected(taken, taken->at, extent->start);
    taken->at = extent->end;
    if (code) return code;
    if (extent->categories & PAGE_IS_GUARD) return region_guarded(&taken->region->face, extent->start, taken->error);
    bool there = extent->categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED);
    if (!there || (extent->categories & PAGE_IS_PFNZERO)) {
        found_absent(taken, extent->start, extent->end);
        return TM_OK;
    }
    if (!(extent->categories & PAGE_IS_WRITTEN)) return found_protected(taken, extent->start, extent->end); // swapped
    if (extent->categories & PAGE_IS_HUGE) region_has_huge(taken->region);
    return found_dirty(taken, extent->start, extent->end);
}

// Page by page, from what the kernel tells of each.
static int prove_slowly(struct taken *taken, uint64_t start, uint64_t end) {
    // Absent or written: what does not match is present and protected.
    const struct pm_scan_arg what = {
        .category_inverted = PAGE_IS_PRESENT,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
        .return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_WRITTEN | PAGE_IS_PFNZERO | PAGE_IS_HUGE |
                       taken->source->guard_category,
    };
    taken->at = start;
    int code = target_scan_as(taken->source, start, end, &what, found, taken, taken->error);
    return code ? code : found_protected(taken, taken->at, end);
}

// What a quick scan does not report is present and protected, or has been absent since before it was armed.
static int unreported(struct taken *taken, uint64_t start, uint64_t end) {
    const uint8_t *state = taken->zone->state + ((start - taken->zone->start) >> TM_PAGE_SHIFT);
    uint64_t n = (end - start) >> TM_PAGE_SHIFT;
    for (uint64_t i = 0; i < n;) {
        uint64_t run = copied_run(state, i, n), from = i + run;
        taken->valid += run;
        for (i = from; i < n && (state[i] & TRACK_MASK) != TRACK_COPIED;) i++;
        if (i == from) continue;
        int code = prove_slowly(taken, start + (from << TM_PAGE_SHIFT), start + (i << TM_PAGE_SHIFT));
        if (code) return code;
    }
    return TM_OK;
}

static int quickly_found(void *context, const struct extent *extent) {
    struct taken *taken = context;
    uint64_t from = taken->quick_at;
    taken->quick_at = extent->end;
    int code = unreported(taken, from, extent->start);
    return code ? code : prove_slowly(taken, extent->start, extent->end);
}

// The kernel's short way, twice as fast: only what is written, or absent (rounds_quick_scan). A new mapping is refused.
static int prove_quickly(struct taken *taken, uint64_t start, uint64_t end) {
    struct page_region found[256];
    taken->quick_at = start;
    for (uint64_t at = start; at < end;) {
        struct pm_scan_arg arg = {
            .size = sizeof arg,
            .flags = PM_SCAN_CHECK_WPASYNC,
            .start = at,
            .end = end,
            .vec = (uintptr_t)found,
            .vec_len = sizeof found / sizeof *found,
            .category_mask = PAGE_IS_WRITTEN,
            .return_mask = PAGE_IS_WRITTEN,
        };
        int n = ioctl(taken->source->pagemap_fd, PAGEMAP_SCAN, &arg);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 || arg.walk_end <= at) return prove_slowly(taken, taken->quick_at, end);
        for (int i = 0; i < n; i++) {
            int code = quickly_found(taken, &(struct extent){found[i].start, found[i].end, 0});
            if (code) return code;
        }
        at = arg.walk_end;
    }
    return unreported(taken, taken->quick_at, end);
}

int precopy_prove(struct tm_source *source, const struct piece *piece, struct tm_error *error) {
    struct region *region = &source->regions[piece->region];
    struct taken taken = {.source = source,
                          .region = region,
                          .zone = zone_of(source, region->face.start, region->face.end),
                          .error = error};
    bool quickly = taken.zone && source->quick_scan;
    int code =
        quickly ? prove_quickly(&taken, piece->start, piece->end) : prove_slowly(&taken, piece->start, piece->end);
    atomic_fetch_add(&source->total, taken.valid);
    atomic_fetch_add(&source->done, taken.valid);
    atomic_fetch_add(&source->precopied, taken.valid);
    return code;
}

static int dirty_order(const void *left, const void *right) {
    const struct dirty_run *a = left, *b = right;
    return a->address < b->address ? -1 : a->address > b->address;
}

static int dirty_copy(struct tm_source *source, struct tm_error *error) {
    struct dirty *dirty = &source->dirty;
    struct eager_batch batch = {.source = source};
    if (dirty->n) qsort(dirty->runs, dirty->n, sizeof *dirty->runs, dirty_order);
    int code = TM_OK;
    for (uint32_t i = 0; !code && i < dirty->n; i++) {
        const struct dirty_run *run = &dirty->runs[i];
        code =
            eager_add(&batch, region_at(source, run->address), run->address, run->page, run->n << TM_PAGE_SHIFT, error);
    }
    return code ? code : eager_flush(&batch, error);
}

// What an eager region holds is copied anyway; what the rounds had read of its addresses goes.
static void eager_drop(struct tm_source *source, const struct region *region) {
    struct zone *zone = zone_of(source, region->face.start, region->face.end);
    if (!zone) return;
    uint8_t *state = zone->state + ((region->face.start - zone->start) >> TM_PAGE_SHIFT);
    for (uint64_t i = 0; i < (region->face.end - region->face.start) >> TM_PAGE_SHIFT; i++)
        if (state[i]) state[i] = TRACK_DROPPED;
}

// Before anything is stored at T0. What is left to the window is stored after it: nobody may take an older copy for it.
void precopy_make_way(struct tm_source *source) {
    for (uint32_t i = 0; source->rounds && i < source->n_regions; i++) {
        const struct region *region = &source->regions[i];
        const struct tm_region_state *face = &region->face;
        if (face->treatment == TM_EAGER) eager_drop(source, region);
        if (face->treatment == TM_PROTECTED && !region_tracked(source, region))
            tm_spool_forget(source->spool, region->first_page, (face->end - face->start) >> TM_PAGE_SHIFT);
    }
}

// A page that is stored at T0 is not to be cleared.
void precopy_stored(struct tm_source *source, uint64_t page, uint64_t n) {
    for (uint32_t i = 0; i < source->zones.n; i++) {
        const struct zone *zone = &source->zones.at[i];
        uint64_t pages = (zone->end - zone->start) >> TM_PAGE_SHIFT;
        if (page < zone->first_page || page >= zone->first_page + pages) continue;
        memset(zone->state + (page - zone->first_page), TRACK_COPIED, n);
        return;
    }
}

int precopy_list(struct tm_source *source, struct tm_error *error) {
    source->dirty.n = 0;
    source->dirty.pages = 0;
    for (uint32_t i = 0; source->rounds && i < source->n_regions; i++) {
        struct region *region = &source->regions[i];
        if (!region_tracked(source, region)) continue;
        region->precopied = true;
        if (capture_piece_add(source, i, region->face.start, region->face.end, PIECE_SIZE))
            return tm_error_set(error, TM_NOMEM, 0, "realloc", "no memory for the list of pieces");
    }
    return TM_OK;
}

int precopy_take(struct tm_source *source, struct tm_error *error) {
    if (!source->rounds) return TM_OK;
    if (source->plan->dirty_most && source->dirty.pages > source->plan->dirty_most)
        return tm_error_set(error, TM_DEADLINE, 0, "pre-copy",
                            "%lu pages were written at the end, more than fit the freeze",
                            (unsigned long)source->dirty.pages);
    return dirty_copy(source, error);
}

// Whether the page's copy from before T0 has no place in the picture.
static bool is_stale(const struct zone *zone, const struct region *region, uint64_t address, uint8_t state) {
    if ((state & TRACK_MASK) == TRACK_NONE) return false;
    if ((state & TRACK_MASK) == TRACK_DROPPED || !region || region->face.treatment == TM_NONE) return true;
    if (region->face.start < zone->start || region->face.end > zone->end) return true; // it has another place
    if (region->precopied || region->face.treatment == TM_EAGER) return false;
    // In the window: what was not there at T0 is nobody else's to store.
    if (!region->state) return true;
    const uint8_t *now = &region->state[(address - region->face.start) >> TM_PAGE_SHIFT];
    return __atomic_load_n(now, __ATOMIC_RELAXED) == PAGE_NONE;
}

// Whether nothing is stale of the eight pages from `page` on, as can be told at a glance.
static bool all_sound(const struct zone *zone, const struct region *region, uint64_t page) {
    uint64_t eight, address = zone->start + (page << TM_PAGE_SHIFT);
    memcpy(&eight, zone->state + page, sizeof eight);
    if (!eight) return true;
    if ((eight & EACH_BYTE * TRACK_MASK) != EACH_BYTE * TRACK_COPIED || !region) return false;
    const struct tm_region_state *face = &region->face;
    return face->start >= zone->start && face->end <= zone->end && face->start <= address &&
           address + (sizeof eight << TM_PAGE_SHIFT) <= face->end && face->treatment != TM_NONE &&
           (region->precopied || face->treatment == TM_EAGER);
}

// After the thaw: places of pages that are zero at T0, or belong to nothing any more, become holes.
int precopy_tidy(struct tm_source *source, struct tm_error *error) {
    for (uint32_t i = 0; i < source->zones.n; i++) {
        const struct zone *zone = &source->zones.at[i];
        uint64_t pages = (zone->end - zone->start) >> TM_PAGE_SHIFT, from = 0, n = 0;
        const struct region *region = NULL;
        for (uint64_t page = 0; page <= pages; page++) {
            uint64_t address = zone->start + (page << TM_PAGE_SHIFT);
            if (!n && page + 8 <= pages && all_sound(zone, region, page)) {
                page += 7;
                continue;
            }
            bool stale = false;
            if (page < pages && zone->state[page]) {
                if (!region || address >= region->face.end || address < region->face.start)
                    region = region_at(source, address);
                stale = is_stale(zone, region, address, zone->state[page]);
            }
            if (stale) {
                if (!n) from = page;
                n++;
                continue;
            }
            if (n) {
                int code = tm_spool_clear(source->spool, zone->first_page + from, n, error);
                if (code) return code;
                n = 0;
            }
        }
    }
    return TM_OK;
}
