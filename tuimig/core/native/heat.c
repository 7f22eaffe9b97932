// Heat: which pages of a running target are written within some time. Tracked by the kernel (WP_ASYNC): a write costs the
// target a microsecond once a page, nothing waits, nothing is read of its memory. All is undone at the end, or by our death.
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "heat.h"
#include "source_internal.h"

enum { EXTENTS = 512 };

// Scans a range for pages that are there and were written; with `arm` they are protected again in the same step.
static int scan(struct tm_source *source, uint64_t start, uint64_t end, bool arm, uint64_t *written,
                struct tm_error *error) {
    struct page_region found[EXTENTS];
    while (start < end) {
        struct pm_scan_arg arg = {
            .size = sizeof arg,
            .flags = arm ? PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC : 0,
            .start = start,
            .end = end,
            .vec = (uintptr_t)found,
            .vec_len = EXTENTS,
            .category_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT,
            .return_mask = PAGE_IS_WRITTEN,
        };
        int n = ioctl(source->pagemap_fd, PAGEMAP_SCAN, &arg);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EPERM || errno == ENOMEM)) return TM_OK; // it has changed since: no part of the picture
        if (n < 0) return tm_error_errno(error, "PAGEMAP_SCAN", "cannot scan the page tables");
        for (int i = 0; i < n; i++) *written += (found[i].end - found[i].start) >> TM_PAGE_SHIFT;
        if (arg.walk_end <= start) return tm_error_set(error, TM_SYS, 0, "PAGEMAP_SCAN", "a scan does not come on");
        start = arg.walk_end;
    }
    return TM_OK;
}

struct heat_request {
    struct tm_heat *ranges;
    uint32_t n;
};

static const struct extent *mapping_at(const struct extents *list, uint64_t address) {
    for (uint32_t i = 0; i < list->n; i++)
        if (list->at[i].start <= address && address < list->at[i].end) return &list->at[i];
    return NULL;
}

// All threads are stopped: a range that ended inside a mapping would split it.
static int begin(struct tm_source *source, void *argument, struct tm_error *error) {
    const struct heat_request *request = argument;
    uint64_t began;
    int code = short_stop_begin(source, &began, error);
    if (code) return code;
    struct extents now = mappings(source);
    for (uint32_t i = 0; i < request->n; i++) {
        struct tm_heat *range = &request->ranges[i];
        const struct extent *mapping = mapping_at(&now, range->start);
        range->watched = 0;
        if (!mapping) continue;
        range->start = mapping->start;
        range->end = mapping->end;
        struct uffdio_register arg = {.range = {range->start, range->end - range->start},
                                      .mode = UFFDIO_REGISTER_MODE_WP};
        range->watched = ioctl(source->track_uffd, UFFDIO_REGISTER, &arg) == 0;
    }
    extents_free(&now);
    short_stop_end(source, began);
    return TM_OK;
}

int tm_source_heat_begin(struct tm_source *source, struct tm_heat *ranges, uint32_t n, struct tm_error *error) {
    if (source->track_uffd < 0)
        return tm_error_set(error, TM_PRIVILEGE, 0, "userfaultfd", "this kernel cannot track writes (WP_ASYNC)");
    struct heat_request request = {ranges, n};
    int code = on_tracer(source, begin, &request, error);
    for (uint32_t i = 0; !code && i < n; i++) {
        uint64_t armed = 0;
        if (ranges[i].watched) code = scan(source, ranges[i].start, ranges[i].end, true, &armed, error);
    }
    return code;
}

// As in register.c: opened while the target runs, let go of in a short stop.
static int end(struct tm_source *source, void *argument, struct tm_error *error) {
    const struct heat_request *request = argument;
    for (uint32_t i = 0; i < request->n; i++)
        if (request->ranges[i].watched)
            open_gently(source->track_uffd, request->ranges[i].start, request->ranges[i].end, false);
    uint64_t began;
    bool stopped = short_stop_begin(source, &began, error) == TM_OK;
    struct extents now = mappings(source);
    for (uint32_t i = 0; stopped && i < request->n; i++) {
        const struct tm_heat *range = &request->ranges[i];
        const struct extent *mapping = mapping_at(&now, range->start);
        if (!range->watched || !mapping || mapping->start != range->start || mapping->end != range->end) continue;
        if (track_is_open(source, range->start, range->end)) missing_only(source->track_uffd, range->start, range->end);
    }
    extents_free(&now);
    close(source->track_uffd);
    source->track_uffd = -1;
    if (stopped) short_stop_end(source, began);
    return TM_OK;
}

int tm_source_heat_end(struct tm_source *source, struct tm_heat *ranges, uint32_t n, struct tm_error *error) {
    int code = TM_OK;
    for (uint32_t i = 0; !code && i < n; i++) {
        ranges[i].written = 0;
        if (ranges[i].watched) code = scan(source, ranges[i].start, ranges[i].end, false, &ranges[i].written, error);
    }
    struct heat_request request = {ranges, n};
    struct tm_error ignored;
    on_tracer(source, end, &request, code ? &ignored : error);
    return code;
}
