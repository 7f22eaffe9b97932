// Places in the spool that are given before T0: by address, with room to grow. A zone is an interval of the target's addresses
// whose pages have their places in a row, so that regions may grow, shrink, split and merge inside it between two rounds.
// What does not fit into its zone any more gets a new one, and is read again.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "source_internal.h"

#define NEIGHBOUR (16ull << 20) // regions so near to each other share a zone
#define SLACK_LEAST (8ull << 20)
#define SLACK_MOST (1ull << 30)
#define LOWEST 0x10000ull
#define HIGHEST 0x7ffffffff000ull

static uint32_t zone_index(const struct zones *zones, uint64_t address) { // the first that ends above it
    uint32_t low = 0, high = zones->n;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (zones->at[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct zone *zone_of(const struct tm_source *source, uint64_t start, uint64_t end) {
    const struct zones *zones = &source->zones;
    uint32_t index = zone_index(zones, start);
    if (index == zones->n) return NULL;
    struct zone *zone = &zones->at[index];
    return zone->start <= start && end <= zone->end ? zone : NULL;
}

static void zone_remove(struct zones *zones, uint32_t index) {
    struct zone *zone = &zones->at[index];
    munmap(zone->state, (zone->end - zone->start) >> TM_PAGE_SHIFT);
    memmove(zone, zone + 1, (zones->n - index - 1) * sizeof *zone);
    zones->n--;
}

static int zone_add(struct tm_source *source, uint64_t start, uint64_t end, struct tm_error *error) {
    struct zones *zones = &source->zones;
    if (zones->n == zones->capacity) {
        uint32_t capacity = zones->capacity ? zones->capacity * 2 : 32;
        struct zone *more = realloc(zones->at, capacity * sizeof *more);
        if (!more) return tm_error_set(error, TM_NOMEM, 0, "realloc", "no memory for the places of pages");
        zones->at = more;
        zones->capacity = capacity;
    }
    uint64_t pages = (end - start) >> TM_PAGE_SHIFT;
    void *state = mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (state == MAP_FAILED) return tm_error_errno(error, "mmap", "no memory for page states");
    uint32_t index = zone_index(zones, start);
    memmove(&zones->at[index + 1], &zones->at[index], (zones->n - index) * sizeof *zones->at);
    zones->at[index] = (struct zone){start, end, zones->pages, state};
    zones->n++;
    zones->pages += pages;
    return TM_OK;
}

static bool placed(const struct tm_source *source, const struct region *region) {
    const struct tm_region_state *face = &region->face;
    return face->treatment == TM_NONE || zone_of(source, face->start, face->end);
}

// From region `first` on: regions without a place that lie near to each other.
static int cluster_place(struct tm_source *source, uint32_t first, struct tm_error *error) {
    struct zones *zones = &source->zones;
    uint64_t start = source->regions[first].face.start, end = source->regions[first].face.end;
    uint32_t next = first + 1;
    for (; next < source->n_regions; next++) {
        const struct tm_region_state *face = &source->regions[next].face;
        if (face->treatment == TM_NONE) continue;
        if (face->start - end > NEIGHBOUR || placed(source, &source->regions[next])) break;
        end = face->end;
    }
    uint32_t above = zone_index(zones, start);
    uint64_t low = above > 0 ? zones->at[above - 1].end : LOWEST;
    uint64_t high = above < zones->n ? zones->at[above].start : HIGHEST;
    if (next < source->n_regions) { // its own zone is made after this one
        uint64_t half = end + tm_page_floor((source->regions[next].face.start - end) / 2);
        if (half < high) high = half;
    }
    uint64_t slack = tm_page_floor((end - start) / 4);
    slack = slack < SLACK_LEAST ? SLACK_LEAST : slack > SLACK_MOST ? SLACK_MOST : slack;
    uint64_t from = start > low && start - low > slack ? start - slack : start < low ? start : low;
    uint64_t to = high > end && high - end > slack ? end + slack : high < end ? end : high;
    return zone_add(source, from, to, error);
}

// A region that has outgrown its zone: the zones that it touches are given up, and what was read of them too.
static void outgrown_drop(struct tm_source *source, const struct region *region, int *code, struct tm_error *error) {
    struct zones *zones = &source->zones;
    uint32_t index = zone_index(zones, region->face.start);
    while (index < zones->n && zones->at[index].start < region->face.end) {
        const struct zone *zone = &zones->at[index];
        rounds_forget(source, zone->start, zone->end);
        *code = tm_spool_clear(source->spool, zone->first_page, (zone->end - zone->start) >> TM_PAGE_SHIFT, error);
        if (*code) return;
        zone_remove(zones, index);
    }
}

int zones_cover(struct tm_source *source, struct tm_error *error) {
    int code = TM_OK;
    for (uint32_t i = 0; !code && i < source->n_regions; i++)
        if (!placed(source, &source->regions[i])) outgrown_drop(source, &source->regions[i], &code, error);
    for (uint32_t i = 0; !code && i < source->n_regions; i++)
        if (!placed(source, &source->regions[i])) code = cluster_place(source, i, error);
    return code;
}

void zones_free(struct tm_source *source) {
    while (source->zones.n) zone_remove(&source->zones, source->zones.n - 1);
    free(source->zones.at);
    source->zones = (struct zones){0};
}
