// A demand for pages of a running capture: they are captured at once, in the thread of the demand, as a guarded call's
// worker would do it. The handler of write-protect faults is a thread of its own and is never held up by it.
#include <stdlib.h>

#include "source_internal.h"
#include "stream_internal.h"

struct runs {
    struct tm_run *out;
    uint64_t most, n;
    struct tm_run last;
};

static void add_run(struct runs *runs, uint64_t first, uint64_t n) {
    if (runs->last.n && runs->last.first + runs->last.n == first) {
        runs->last.n += n;
        return;
    }
    if (runs->last.n) {
        if (runs->n < runs->most) runs->out[runs->n] = runs->last;
        runs->n++;
    }
    runs->last = (struct tm_run){first, n};
}

// What is stored is told by its sum, what is still to be captured by its state.
static void add_region(struct runs *runs, const struct region *region, const uint32_t *sums, const uint8_t *state) {
    uint64_t pages = (region->face.end - region->face.start) >> TM_PAGE_SHIFT;
    for (uint64_t page = 0; page < pages;) {
        while (page < pages && (sums ? sums[page] == 0 : state[page] == 0)) page++;
        uint64_t from = page;
        while (page < pages && (sums ? sums[page] != 0 : state[page] != 0)) page++;
        if (page > from) add_run(runs, region->first_page + from, page - from);
    }
}

static int by_place(const void *left, const void *right) {
    const struct region *a = *(const struct region *const *)left, *b = *(const struct region *const *)right;
    return a->first_page < b->first_page ? -1 : a->first_page > b->first_page;
}

// Regions with pages in the spool, in the order of these; the caller frees them.
static const struct region **regions_by_place(const struct tm_source *source, uint32_t *n) {
    const struct region **regions = malloc((source->n_regions + 1) * sizeof *regions);
    *n = 0;
    for (uint32_t i = 0; regions && i < source->n_regions; i++)
        if (source->regions[i].face.slot != UINT64_MAX) regions[(*n)++] = &source->regions[i];
    if (regions) qsort(regions, *n, sizeof *regions, by_place);
    return regions;
}

uint64_t tm_source_content(struct tm_source *source, int eager_only, struct tm_run *out, uint64_t most) {
    const uint32_t *sums = tm_spool_sums(source->spool);
    struct runs runs = {.out = out, .most = most};
    uint32_t n_regions;
    const struct region **regions = regions_by_place(source, &n_regions);
    if (!regions) return UINT64_MAX;
    for (uint32_t i = 0; i < n_regions; i++) {
        const struct region *region = regions[i];
        bool eager = region->face.treatment == TM_EAGER, stored = eager || region->precopied;
        if (!eager && (eager_only || !(region->precopied || region->state))) continue;
        add_region(&runs, region, stored ? sums + region->first_page : NULL, region->state);
    }
    free(regions);
    if (runs.last.n) {
        if (runs.n < most) out[runs.n] = runs.last;
        runs.n++;
    }
    return runs.n;
}

// The region whose place in the spool holds the page; null where none does.
static const struct region *region_of_page(const struct tm_source *source, uint64_t page) {
    for (uint32_t i = 0; i < source->n_regions; i++) {
        const struct region *region = &source->regions[i];
        uint64_t pages = (region->face.end - region->face.start) >> TM_PAGE_SHIFT;
        if (region->face.slot != UINT64_MAX && page >= region->first_page && page - region->first_page < pages)
            return region;
    }
    return NULL;
}

int tm_source_capture_pages(struct tm_source *source, uint64_t first, uint64_t n, uint8_t *buffer) {
    while (n) {
        const struct region *region = region_of_page(source, first);
        if (!region) return TM_OK;
        uint64_t offset = first - region->first_page;
        uint64_t left = ((region->face.end - region->face.start) >> TM_PAGE_SHIFT) - offset;
        uint64_t take = n < left ? n : left;
        uint64_t start = region->face.start + (offset << TM_PAGE_SHIFT);
        int code = capture_range(source, start, start + (take << TM_PAGE_SHIFT), BY_REQUEST, buffer);
        if (code) return code;
        capture_check_done(source);
        first += take;
        n -= take;
    }
    return TM_OK;
}
