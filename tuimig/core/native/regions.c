// The target's regions: /proc/PID/maps as it is in a round or inside the freeze, with the policy applied. The plan decides
// for what it knew; what appeared since takes the treatment of what it overlaps, else that of its class, else that of its
// size.
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "source_internal.h"

static bool starts(const char *text, const char *with) { return strncmp(text, with, strlen(with)) == 0; }

static bool ends(const char *text, const char *with) {
    size_t n = strlen(text), m = strlen(with);
    return n >= m && strcmp(text + n - m, with) == 0;
}

static int kind_of(const char *perms, uint64_t inode, const char *path) {
    bool shared = perms[3] == 's', deleted = ends(path, " (deleted)");
    if (path[0] == '[') {
        if (strcmp(path, "[heap]") == 0) return TM_HEAP;
        if (strcmp(path, "[stack]") == 0) return TM_STACK;
        if (starts(path, "[anon_shmem:")) return TM_SHARED_ANON;
        if (starts(path, "[anon:") || starts(path, "[stack:")) return TM_ANON;
        if (starts(path, "[v")) return TM_KERNEL;
        return TM_DEVICE;
    }
    if (path[0] == 0 && inode == 0) return shared ? TM_DEVICE : TM_ANON;
    if (starts(path, "/SYSV") || starts(path, "anon_inode:") || starts(path, "/[aio]")) return TM_DEVICE;
    if (shared) {
        if (starts(path, "/dev/zero") || starts(path, "/memfd:") || deleted) return TM_SHARED_ANON;
        return starts(path, "/dev/") && !starts(path, "/dev/shm/") ? TM_DEVICE : TM_SHARED_FILE;
    }
    if (deleted) return TM_DELETED;
    if (starts(path, "/dev/") && !starts(path, "/dev/shm/") && !starts(path, "/dev/zero")) return TM_DEVICE;
    return TM_FILE;
}

static bool protectable(int kind) { return kind == TM_HEAP || kind == TM_STACK || kind == TM_ANON; }

// The plan's range that overlaps the region; an exact start wins.
static int planned_range(const struct tm_freeze_plan *plan, const struct tm_region_state *region) {
    uint32_t low = 0, high = plan->n_ranges;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (plan->ranges[middle].end <= region->start)
            low = middle + 1;
        else
            high = middle;
    }
    return low < plan->n_ranges && plan->ranges[low].start < region->end ? (int)low : -1;
}

static void treat(const struct tm_freeze_plan *plan, struct region *region) {
    struct tm_region_state *face = &region->face;
    face->planned = planned_range(plan, face);
    if (face->kind == TM_KERNEL || face->kind == TM_SHARED_FILE || face->kind == TM_DEVICE) {
        face->treatment = TM_NONE;
        return;
    }
    region->changed_only = face->kind == TM_FILE;
    face->treatment = TM_EAGER;
    if (!protectable(face->kind)) return;
    if (face->planned >= 0) {
        face->treatment = plan->ranges[face->planned].treatment == TM_PROTECTED ? TM_PROTECTED : TM_EAGER;
        return;
    }
    int by_class = plan->class_treatment[face->kind];
    if (by_class >= 0)
        face->treatment = by_class;
    else
        face->treatment = face->end - face->start < plan->eager_below ? TM_EAGER : TM_PROTECTED;
}

// One line of maps: `start-end perms offset major:minor inode   path`. False: not a line.
static bool line_parse(struct tm_source *source, char *line, struct tm_region_state *out) {
    unsigned long start, end, offset, inode;
    unsigned major, minor;
    char perms[8] = {0};
    int path_at = 0;
    if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu %n", &start, &end, perms, &offset, &major, &minor, &inode, &path_at) <
        7)
        return false;
    const char *path = line + path_at;
    size_t size = strlen(path) + 1;
    char *kept = arena_take(&source->arena, size);
    if (!kept) return false;
    memcpy(kept, path, size);
    *out = (struct tm_region_state){
        .start = start,
        .end = end,
        .offset = offset,
        .inode = inode,
        .dev_major = major,
        .dev_minor = minor,
        .kind = kind_of(perms, inode, kept),
        .slot = UINT64_MAX,
        .planned = -1,
        .path = kept,
    };
    memcpy(out->perms, perms, 5);
    return true;
}

// Where pre-copy gave it a place, there; else behind all others.
static void place(struct tm_source *source, struct region *region) {
    const struct tm_region_state *face = &region->face;
    const struct zone *zone = zone_of(source, face->start, face->end);
    if (zone) {
        region->first_page = zone->first_page + ((face->start - zone->start) >> TM_PAGE_SHIFT);
    } else {
        region->first_page = source->spool_pages;
        source->spool_pages += (face->end - face->start) >> TM_PAGE_SHIFT;
    }
    region->face.slot = region->first_page << TM_PAGE_SHIFT;
}

static int regions_parse(struct tm_source *source, const char *path, const uint8_t *text, uint64_t size,
                         struct tm_error *error) {
    regions_free(source);
    uint32_t lines = 0;
    for (uint64_t i = 0; i < size; i++) lines += text[i] == '\n';
    source->regions = calloc(lines + 1, sizeof *source->regions);
    source->region_faces = calloc(lines + 1, sizeof *source->region_faces);
    char *at = arena_take(&source->arena, size + 1); // to be cut into lines
    if (!source->regions || !source->region_faces || !at)
        return tm_error_set(error, TM_NOMEM, 0, "calloc", "no memory");
    memcpy(at, text, size);
    at[size] = 0;
    for (char *newline; source->n_regions < lines && (newline = strchr(at, '\n')); at = newline + 1) {
        *newline = 0;
        if (!line_parse(source, at, &source->regions[source->n_regions].face))
            return tm_error_set(error, TM_SYS, 0, "read", "a line of %s was not understood", path);
        source->n_regions++;
    }
    source->maps = text;
    source->maps_size = size;
    return TM_OK;
}

static void states_free(struct tm_source *source) {
    for (uint32_t i = 0; i < source->n_regions; i++)
        if (source->regions[i].state) munmap(source->regions[i].state, source->regions[i].state_size);
    source->spool_pages = source->zones.pages;
}

// The same text: what it says is kept, and nothing else.
static void regions_renew(struct tm_source *source) {
    states_free(source);
    for (uint32_t i = 0; i < source->n_regions; i++) {
        struct region *region = &source->regions[i];
        struct tm_region_state face = region->face;
        face.slot = UINT64_MAX;
        face.planned = -1;
        face.treatment = TM_NONE;
        face.huge = 0;
        face.tracked = 0;
        *region = (struct region){.face = face};
    }
}

// plan null: only the layout is wanted. What was read right before, as a freeze does, is compared and not parsed again.
int regions_read(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/maps", source->pid);
    const uint8_t *text;
    uint64_t size;
    int err = file_read_whole(&source->arena, path, &text, &size);
    if (err)
        return tm_error_set(error, err == ESRCH ? TM_GONE : tm_error_code(err), err, "read", "cannot read %s", path);
    if (size == 0) return tm_error_set(error, TM_GONE, 0, "read", "the process has ended");
    int code = TM_OK;
    if (source->maps && source->maps_size == size && memcmp(source->maps, text, size) == 0)
        regions_renew(source);
    else
        code = regions_parse(source, path, text, size, error);
    for (uint32_t i = 0; !code && plan && i < source->n_regions; i++) {
        struct region *region = &source->regions[i];
        treat(plan, region);
        if (region->face.kind == TM_DEVICE && region->face.planned < 0)
            return tm_error_set(error, TM_UNSUPPORTED, 0, "maps",
                                "region %lx-%lx %.60s appeared and cannot be migrated",
                                (unsigned long)region->face.start, (unsigned long)region->face.end, region->face.path);
        if (region->face.treatment != TM_NONE) place(source, region);
    }
    return code;
}

void regions_free(struct tm_source *source) {
    states_free(source);
    free(source->regions);
    free(source->region_faces);
    source->regions = NULL;
    source->region_faces = NULL;
    source->n_regions = 0;
    source->maps = NULL;
}

// The first region that ends above the address; n_regions where there is none.
uint32_t region_index(const struct tm_source *source, uint64_t address) {
    uint32_t low = 0, high = source->n_regions;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (source->regions[middle].face.end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct region *region_at(const struct tm_source *source, uint64_t address) {
    uint32_t index = region_index(source, address);
    if (index < source->n_regions && source->regions[index].face.start <= address) return &source->regions[index];
    return NULL;
}

int region_guarded(const struct tm_region_state *face, uint64_t address, struct tm_error *error) {
    tm_error_set(error, TM_UNSUPPORTED, 0, "PAGEMAP_SCAN", "region %lx-%lx has guard pages (MADV_GUARD_INSTALL)",
                 (unsigned long)face->start, (unsigned long)face->end);
    if (error) error->address = address;
    return TM_UNSUPPORTED;
}
