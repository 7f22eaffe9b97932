// Registering with userfaultfd, and its end, for a target that runs. The kernel splits a mapping where a range that is
// registered ends inside it, and the target's own mremap across the split would fail. So ranges are registered only while all
// threads are stopped and the mappings are known exactly; these stops are short, and counted.
//
// The end: unregistering, and closing, go over all page tables with the memory lock held for writing, 8 ms a gigabyte and
// more. They do not for mappings that are registered for missing pages only, and changing the mode costs nothing. So all pages
// are opened in small steps while the target runs; then, in one stop, the mode is changed and the descriptors are closed.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "source_internal.h"

#define STEP (2ull << 20)
#define BIG (16ull << 20)          // smaller mappings are no matter
#define WORTH_A_STOP (64ull << 20) // of big ones together
#define STOP_NS 20000000u
enum { STOPS_TRIED = 5, BACK_OFF_US = 10000 };

void extents_add(struct extents *list, uint64_t start, uint64_t end, uint64_t categories) {
    if (list->n == list->capacity) {
        uint32_t capacity = list->capacity ? list->capacity * 2 : 64;
        struct extent *more = realloc(list->at, capacity * sizeof *more);
        if (!more) return; // one less is only slower
        list->at = more;
        list->capacity = capacity;
    }
    list->at[list->n++] = (struct extent){start, end, categories};
}

void extents_free(struct extents *list) {
    free(list->at);
    *list = (struct extents){0};
}

static bool extents_hold(const struct extents *list, uint64_t start, uint64_t end) {
    for (uint32_t i = 0; i < list->n; i++)
        if (list->at[i].start <= start && end <= list->at[i].end) return true;
    return false;
}

static bool extents_touch(const struct extents *list, uint64_t start, uint64_t end) {
    for (uint32_t i = 0; i < list->n; i++)
        if (list->at[i].start < end && start < list->at[i].end) return true;
    return false;
}

// The mappings as they are at this moment.
struct extents mappings(struct tm_source *source) {
    struct extents list = {0};
    struct arena arena = {0};
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/maps", source->pid);
    const uint8_t *text;
    uint64_t size;
    if (file_read_whole(&arena, path, &text, &size) == 0) {
        for (const char *at = (const char *)text; at && *at; at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL) {
            uint64_t start, end;
            if (sscanf(at, "%lx-%lx", &start, &end) == 2) extents_add(&list, start, end, 0);
        }
    }
    arena_free(&arena);
    return list;
}

// False: not registered with it, or in the middle of a change.
bool open_gently(int uffd, uint64_t start, uint64_t end, bool events_are_read) {
    for (uint64_t at = start; at < end; at += STEP) {
        struct uffdio_writeprotect arg = {.range = {at, end - at < STEP ? end - at : STEP}};
        while (ioctl(uffd, UFFDIO_WRITEPROTECT, &arg))
            if (errno != EINTR && !(errno == EAGAIN && events_are_read)) return false;
    }
    return true;
}

int short_stop_begin(struct tm_source *source, uint64_t *began_ns, struct tm_error *error) {
    uint64_t most =
        source->plan && source->plan->deadline_us * 1000ull > STOP_NS ? source->plan->deadline_us * 1000ull : STOP_NS;
    int code = TM_DEADLINE;
    for (useconds_t i = 0; code == TM_DEADLINE && i < STOPS_TRIED; i++) {
        usleep(i * BACK_OFF_US);
        *began_ns = tm_now_ns();
        code = threads_stop_all(source, source->window ? source->trace_options : 0, *began_ns + most, error);
        if (code) short_stop_end(source, *began_ns);
    }
    return code;
}

void short_stop_end(struct tm_source *source, uint64_t began_ns) {
    threads_detach_all(source);
    source->times.stops += tm_now_ns() - began_ns;
    source->times.n_stops++;
}

// All threads are stopped, and the regions have just been read.
void track_register(struct tm_source *source) {
    source->registered.n = 0;
    for (uint32_t i = 0; i < source->n_regions; i++) {
        const struct region *region = &source->regions[i];
        if (!region_tracked(source, region)) continue;
        // What is refused cannot be protected; it counts as written.
        struct uffdio_register arg = {.range = {region->face.start, region->face.end - region->face.start},
                                      .mode = UFFDIO_REGISTER_MODE_WP};
        if (ioctl(source->track_uffd, UFFDIO_REGISTER, &arg) == 0)
            extents_add(&source->registered, region->face.start, region->face.end, 0);
    }
}

// Bytes that are to be tracked and are not registered.
uint64_t track_uncovered(const struct tm_source *source) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < source->n_regions; i++) {
        const struct tm_region_state *face = &source->regions[i].face;
        if (region_tracked(source, &source->regions[i]) && !extents_hold(&source->registered, face->start, face->end))
            bytes += face->end - face->start;
    }
    return bytes;
}

void missing_only(int uffd, uint64_t start, uint64_t end) {
    struct uffdio_register arg = {.range = {start, end - start}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (uffd >= 0) ioctl(uffd, UFFDIO_REGISTER, &arg);
}

// The given up regions leave the tracking: they are armed with the other descriptor at T0.
int track_drop(struct tm_source *source, struct tm_error *error) {
    struct extents dropped = {source->given_up, source->n_given_up, source->n_given_up};
    for (uint32_t i = 0; i < dropped.n; i++)
        open_gently(source->track_uffd, dropped.at[i].start, dropped.at[i].end, false);
    uint64_t began;
    int code = short_stop_begin(source, &began, error);
    if (code) return code;
    struct extents now = mappings(source);
    for (uint32_t i = 0; i < now.n; i++) {
        if (!extents_touch(&dropped, now.at[i].start, now.at[i].end)) continue;
        uint64_t start = now.at[i].start, end = now.at[i].end;
        // What came to lie there in the meantime may still be protected: this goes over its page tables, and opens it.
        bool clean = extents_hold(&dropped, start, end) && track_is_open(source, start, end);
        if (clean) missing_only(source->track_uffd, start, end);
        struct uffdio_range range = {start, end - start};
        ioctl(source->track_uffd, UFFDIO_UNREGISTER, &range);
    }
    extents_free(&now);
    short_stop_end(source, began);
    return TM_OK;
}

static int any_found(void *context, const struct extent *extent) {
    (void)context;
    (void)extent;
    return 1;
}

// No page of it is protected, and none will be: nobody protects any more.
bool track_is_open(const struct tm_source *source, uint64_t start, uint64_t end) {
    return target_scan(source, start, end, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PAGE_IS_WRITTEN,
                       any_found, NULL, NULL) == TM_OK;
}

// While the target runs, and the handler reads its events. Afterwards release_all may close without a long lock.
void release_prepare(struct tm_source *source) {
    source->opened.n = 0;
    struct extents now = mappings(source);
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < now.n; i++) {
        uint64_t start = now.at[i].start, end = now.at[i].end;
        struct region *region = region_at(source, start);
        if (end - start < BIG || !region) continue;
        bool tracked = source->track_uffd >= 0 && region_tracked(source, region);
        int uffd = tracked ? source->track_uffd : source->uffd;
        if (!tracked && !region->state) continue;
        if (!open_gently(uffd, start, end, !tracked) || !track_is_open(source, start, end)) continue;
        extents_add(&source->opened, start, end, 0);
        bytes += end - start;
    }
    if (bytes < WORTH_A_STOP) source->opened.n = 0;
    extents_free(&now);
}

bool release_stop(struct tm_source *source, uint64_t *began_ns) {
    return source->opened.n && short_stop_begin(source, began_ns, NULL) == TM_OK;
}

void release_all(struct tm_source *source, bool stopped, uint64_t began_ns) {
    uint64_t begin = tm_now_ns();
    if (stopped) {
        struct extents now = mappings(source);
        for (uint32_t i = 0; i < now.n; i++) {
            if (!extents_hold(&source->opened, now.at[i].start, now.at[i].end)) continue;
            missing_only(source->uffd, now.at[i].start, now.at[i].end); // of one of them; the other answers EBUSY
            missing_only(source->track_uffd, now.at[i].start, now.at[i].end);
        }
        extents_free(&now);
    }
    if (source->uffd >= 0) close(source->uffd);
    if (source->track_uffd >= 0) close(source->track_uffd);
    source->uffd = source->track_uffd = -1;
    if (stopped) short_stop_end(source, began_ns);
    source->opened.n = 0;
    source->registered.n = 0;
    source->times.release = tm_now_ns() - begin;
}
