// What is copied while the target is stopped: small regions, changed pages of private files, shared memory. It goes into a
// buffer that was made and touched before the freeze, and from there into the spool after the thaw.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "source_internal.h"

enum { ZERO_CONTENT_SUM = 1 };
#define EAGER_MOST (24ull << 20) // beyond it pages go into the spool at once
#define EAGER_SLACK (2ull << 20)
#define DIRECT_PIECE (1ull << 20)

int eager_prepare(struct tm_source *source, uint64_t estimate, struct tm_error *error) {
    uint64_t size = estimate + estimate / 4 + EAGER_SLACK;
    if (size > EAGER_MOST) size = EAGER_MOST;
    size = tm_page_ceil(size);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED) return tm_error_errno(error, "mmap", "no memory for the eager pages");
    source->eager_buffer = at;
    source->eager_size = size;
    source->eager_used = 0;
    source->n_eager = 0;
    return TM_OK;
}

void eager_free(struct tm_source *source) {
    if (source->eager_buffer) munmap(source->eager_buffer, source->eager_size);
    source->eager_buffer = NULL;
    free(source->eager_pieces);
    source->eager_pieces = NULL;
    source->eager_capacity = source->n_eager = 0;
}

static int store(struct tm_source *source, const struct eager_piece *piece, struct tm_error *error) {
    uint64_t zero = 0;
    int code = tm_spool_put(source->spool, piece->first_page, piece->data, piece->n_pages, &zero, error);
    if (code) return code;
    if (piece->changed) { // the file has other bytes there: zero is content, not absence
        uint32_t *sums = tm_spool_sums(source->spool);
        for (uint64_t i = 0; i < piece->n_pages; i++)
            if (sums[piece->first_page + i] == 0) sums[piece->first_page + i] = ZERO_CONTENT_SUM;
    }
    atomic_fetch_add(&source->zero, zero);
    return TM_OK;
}

static int piece_add(struct tm_source *source, struct eager_piece piece, struct tm_error *error) {
    if (source->n_eager == source->eager_capacity) {
        uint32_t capacity = source->eager_capacity ? source->eager_capacity * 2 : 256;
        struct eager_piece *more = realloc(source->eager_pieces, capacity * sizeof *more);
        if (!more) return tm_error_set(error, TM_NOMEM, 0, "realloc", "no memory for the eager pages");
        source->eager_pieces = more;
        source->eager_capacity = capacity;
    }
    source->eager_pieces[source->n_eager++] = piece;
    return TM_OK;
}

typedef int (*reader)(const struct tm_source *source, int fd, uint64_t at, void *out, size_t size);

static int read_memory(const struct tm_source *source, int fd, uint64_t at, void *out, size_t size) {
    (void)fd;
    return target_read(source, at, out, size);
}

static int read_file(const struct tm_source *source, int fd, uint64_t at, void *out, size_t size) {
    (void)source;
    for (size_t used = 0; used < size;) {
        ssize_t got = pread(fd, (uint8_t *)out + used, size - used, (off_t)(at + used));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) { // beyond the end of the object: nothing is there
            memset((uint8_t *)out + used, 0, size - used);
            return 0;
        }
        used += (size_t)got;
    }
    return 0;
}

struct eager_context {
    struct tm_source *source;
    const struct region *region;
    reader read;
    int fd;
    struct tm_error *error;
};

// `at`: what the reader is asked for; first_page: where it goes in the spool.
static int take(struct eager_context *context, uint64_t at, uint64_t first_page, uint64_t size) {
    struct tm_source *source = context->source;
    while (size > 0) {
        bool direct = source->eager_used + size > source->eager_size;
        uint64_t part = direct && size > DIRECT_PIECE ? DIRECT_PIECE : size;
        uint8_t *to = direct ? malloc(part) : source->eager_buffer + source->eager_used;
        if (!to) return tm_error_set(context->error, TM_NOMEM, 0, "malloc", "no memory for the eager pages");
        int err = context->read(source, context->fd, at, to, part);
        int code = TM_OK;
        struct eager_piece piece = {first_page, part >> TM_PAGE_SHIFT, to, context->region->changed_only};
        if (err) {
            code = tm_error_set(context->error, err == ESRCH ? TM_GONE : TM_SYS, err, "process_vm_readv",
                                "cannot read region %lx-%lx", (unsigned long)context->region->face.start,
                                (unsigned long)context->region->face.end);
            if (context->error) context->error->address = at;
        } else if (direct) {
            code = store(source, &piece, context->error);
            precopy_stored(source, piece.first_page, piece.n_pages);
        } else {
            code = piece_add(source, piece, context->error);
            source->eager_used += part;
        }
        if (direct) free(to);
        if (code) return code;
        atomic_fetch_add(&source->eager_pages, part >> TM_PAGE_SHIFT);
        if (direct) atomic_fetch_add(&source->done, part >> TM_PAGE_SHIFT);
        atomic_fetch_add(&source->total, part >> TM_PAGE_SHIFT);
        at += part;
        first_page += part >> TM_PAGE_SHIFT;
        size -= part;
    }
    return TM_OK;
}

int eager_take(struct tm_source *source, const struct region *region, uint64_t address, uint64_t page, uint64_t size,
               struct tm_error *error) {
    struct eager_context context = {source, region, read_memory, -1, error};
    return take(&context, address, page, size);
}

static int take_extent(void *context_, const struct extent *extent) {
    struct eager_context *context = context_;
    const struct region *region = context->region;
    if (extent->categories & PAGE_IS_GUARD) return region_guarded(&region->face, extent->start, context->error);
    if (region->changed_only && (extent->categories & PAGE_IS_FILE)) return TM_OK;
    if (extent->categories & PAGE_IS_HUGE) context->source->regions[region - context->source->regions].face.huge = 1;
    uint64_t page = region->first_page + ((extent->start - region->face.start) >> TM_PAGE_SHIFT);
    return take(context, extent->start, page, extent->end - extent->start);
}

// Shared memory: an empty page table entry says nothing about the content, so it is read through its file.
static int take_shared(struct eager_context *context) {
    struct tm_source *source = context->source;
    const struct tm_region_state *face = &context->region->face;
    char path[96];
    snprintf(path, sizeof path, "/proc/%d/map_files/%lx-%lx", source->pid, (unsigned long)face->start,
             (unsigned long)face->end);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return tm_error_errno(context->error, "open", "cannot open %s", path);
    context->fd = fd;
    context->read = read_file;
    uint64_t end = face->offset + (face->end - face->start), at = face->offset;
    int code = TM_OK;
    while (!code && at < end) {
        off_t data = lseek(fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO) break; // a hole to its end
        uint64_t from = data < 0 ? at : (uint64_t)data, to = end;
        if (data >= 0) {
            off_t hole = lseek(fd, data, SEEK_HOLE);
            if (hole > 0 && (uint64_t)hole < end) to = tm_page_ceil((uint64_t)hole);
        }
        from = tm_page_floor(from);
        if (from >= end) break;
        code = take(context, from, context->region->first_page + ((from - face->offset) >> TM_PAGE_SHIFT), to - from);
        at = to;
    }
    close(fd);
    return code;
}

// A private mapping of a file that is gone: every page up to the file's end is content.
static int take_deleted(struct eager_context *context) {
    const struct tm_region_state *face = &context->region->face;
    for (uint64_t at = face->start; at < face->end; at += TM_PAGE_SIZE) {
        uint8_t probe;
        if (target_read(context->source, at, &probe, 1)) break; // beyond the end of the file
        int code = take(context, at, context->region->first_page + ((at - face->start) >> TM_PAGE_SHIFT), TM_PAGE_SIZE);
        if (code) return code;
    }
    return TM_OK;
}

int eager_copy(struct tm_source *source, bool touched, struct tm_error *error) {
    for (uint32_t i = 0; i < source->n_regions; i++) {
        const struct region *region = &source->regions[i];
        if (region->face.treatment != TM_EAGER || region->touched != touched) continue;
        struct eager_context context = {source, region, read_memory, -1, error};
        int code;
        if (region->face.kind == TM_SHARED_ANON)
            code = take_shared(&context);
        else if (region->face.kind == TM_DELETED)
            code = take_deleted(&context);
        else
            code = target_scan(source, region->face.start, region->face.end, PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                               PAGE_IS_PFNZERO, PAGE_IS_FILE | PAGE_IS_HUGE | source->guard_category, take_extent,
                               &context, error);
        if (code) return code;
    }
    return TM_OK;
}

int eager_store(struct tm_source *source, struct tm_error *error) {
    int tidied = precopy_tidy(source, error);
    if (tidied) return tidied;
    for (uint32_t i = 0; i < source->n_eager; i++) {
        int code = store(source, &source->eager_pieces[i], error);
        if (code) return code;
        atomic_fetch_add(&source->done, source->eager_pieces[i].n_pages);
    }
    return TM_OK;
}
