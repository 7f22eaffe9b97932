// Counts for pictures: page states of the source, populated pages of a copy. Reads only, by relaxed loads: a picture may be
// some pages behind.
#include <errno.h>
#include <sys/ioctl.h>

#include "cells.h"
#include "checksum.h"
#include "source_internal.h"

enum { EXTENTS = 512 };

static void count_states(const struct region *region, uint64_t first, uint64_t last, const uint32_t *sums,
                         struct tm_cell *cell) {
    for (uint64_t page = first; page < last; page++) {
        uint8_t state = __atomic_load_n(&region->state[page], __ATOMIC_RELAXED) & (uint8_t)~PAGE_HUGE;
        if (state == PAGE_NONE) continue;
        cell->total++;
        if (state != PAGE_COPIED) continue;
        cell->done++;
        cell->zero += __atomic_load_n(&sums[region->first_page + page], __ATOMIC_RELAXED) <= TM_SUM_ZERO;
    }
}

// What is copied inside the freeze has no states: what is stored of it is all there is.
static void count_stored(const struct region *region, uint64_t first, uint64_t last, const uint32_t *sums,
                         struct tm_cell *cell) {
    for (uint64_t page = first; page < last; page++) {
        uint32_t sum = __atomic_load_n(&sums[region->first_page + page], __ATOMIC_RELAXED);
        if (sum == TM_SUM_HOLE) continue;
        cell->total++;
        cell->done++;
        cell->zero += sum == TM_SUM_ZERO;
    }
}

// Before T0 a page counts as done while its copy is not known to be stale.
static void count_rounds(const struct tm_source *source, const struct region *region, uint64_t start, uint64_t end,
                         const uint32_t *sums, struct tm_cell *cell) {
    const struct zone *zone = zone_of(source, region->face.start, region->face.end);
    if (!zone) return;
    uint64_t last = (end - zone->start) >> TM_PAGE_SHIFT;
    for (uint64_t page = (start - zone->start) >> TM_PAGE_SHIFT; page < last; page++) {
        uint8_t state = zone->state[page];
        if (!state) continue;
        cell->total++;
        if ((state & TRACK_MASK) != TRACK_COPIED) continue;
        cell->done++;
        cell->zero += __atomic_load_n(&sums[zone->first_page + page], __ATOMIC_RELAXED) <= TM_SUM_ZERO;
    }
}

void tm_source_cells(const struct tm_source *source, const struct tm_span *spans, uint32_t n, struct tm_cell *cells) {
    const uint32_t *sums = source->spool ? tm_spool_sums(source->spool) : NULL;
    bool before = source->rounds && atomic_load(&source->state) == TM_IDLE;
    if (!sums || (!before && atomic_load(&source->state) == TM_IDLE)) return;
    uint32_t index = 0;
    for (uint32_t i = 0; i < n; i++) {
        while (index < source->n_regions && source->regions[index].face.end <= spans[i].start) index++;
        for (uint32_t at = index; at < source->n_regions && source->regions[at].face.start < spans[i].end; at++) {
            const struct region *region = &source->regions[at];
            if (region->face.slot == UINT64_MAX) continue;
            uint64_t start = spans[i].start > region->face.start ? spans[i].start : region->face.start;
            uint64_t end = spans[i].end < region->face.end ? spans[i].end : region->face.end;
            if (before) {
                count_rounds(source, region, start, end, sums, &cells[spans[i].cell]);
                continue;
            }
            uint64_t first = (start - region->face.start) >> TM_PAGE_SHIFT;
            uint64_t last = (end - region->face.start) >> TM_PAGE_SHIFT;
            if (region->first_page + last > tm_spool_pages(source->spool)) continue;
            if (region->state)
                count_states(region, first, last, sums, &cells[spans[i].cell]);
            else
                count_stored(region, first, last, sums, &cells[spans[i].cell]);
        }
    }
}

int tm_present_cells(int pagemap_fd, const struct tm_span *spans, uint32_t n, struct tm_cell *cells,
                     struct tm_error *error) {
    struct page_region found[EXTENTS];
    for (uint32_t i = 0; i < n; i++) {
        struct pm_scan_arg scan = {
            .size = sizeof scan,
            .start = spans[i].start,
            .end = spans[i].end,
            .vec = (uint64_t)(uintptr_t)found,
            .vec_len = EXTENTS,
            .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            .return_mask = PAGE_IS_PRESENT,
        };
        while (scan.start < scan.end) {
            int got = ioctl(pagemap_fd, PAGEMAP_SCAN, &scan);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return tm_error_errno(error, "PAGEMAP_SCAN", "the copy's pages could not be counted");
            for (int at = 0; at < got; at++)
                cells[spans[i].cell].done += (found[at].end - found[at].start) >> TM_PAGE_SHIFT;
            if (scan.walk_end <= scan.start) break;
            scan.start = scan.walk_end;
        }
    }
    return TM_OK;
}
