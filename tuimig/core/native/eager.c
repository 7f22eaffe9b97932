// What is copied while the target is stopped: small regions, changed pages of private files, shared memory. It goes into a
// buffer that was made and touched before the freeze, and from there into the spool after the thaw.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "source_internal.h"

enum { ZERO_CONTENT_SUM = 1, TOGETHER = 16 };
#define EAGER_MOST (24ull << 20) // beyond it pages go into the spool at once
#define EAGER_SLACK (2ull << 20)
#define DIRECT_PIECE (1ull << 20)
#define BATCH_SIZE (1ull << 20)
#define PIECE_SIZE (16ull << 20)
#define NEAR (2ull << 20)
#define WHOLE (1ull << 63) // not in pieces

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

// Of the buffer; null where it is full.
static uint8_t *reserve(struct tm_source *source, uint64_t size) {
    uint8_t *at = NULL;
    pthread_mutex_lock(&source->eager_lock);
    if (source->eager_used + size <= source->eager_size) {
        at = source->eager_buffer + source->eager_used;
        source->eager_used += size;
    }
    pthread_mutex_unlock(&source->eager_lock);
    return at;
}

static int piece_add(struct tm_source *source, struct eager_piece piece, struct tm_error *error) {
    pthread_mutex_lock(&source->eager_lock);
    bool room = source->n_eager < source->eager_capacity;
    if (!room) {
        uint32_t capacity = source->eager_capacity ? source->eager_capacity * 2 : 256;
        struct eager_piece *more = realloc(source->eager_pieces, capacity * sizeof *more);
        room = more != NULL;
        if (room) {
            source->eager_pieces = more;
            source->eager_capacity = capacity;
        }
    }
    if (room) source->eager_pieces[source->n_eager++] = piece;
    pthread_mutex_unlock(&source->eager_lock);
    return room ? TM_OK : tm_error_set(error, TM_NOMEM, 0, "realloc", "no memory for the eager pages");
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

static int read_into(const struct eager_context *context, uint64_t at, uint8_t *to, uint64_t size) {
    int err = context->read(context->source, context->fd, at, to, size);
    if (!err) return TM_OK;
    int code = tm_error_set(context->error, err == ESRCH ? TM_GONE : TM_SYS, err, "process_vm_readv",
                            "cannot read region %lx-%lx", (unsigned long)context->region->face.start,
                            (unsigned long)context->region->face.end);
    if (context->error) context->error->address = at;
    return code;
}

static void count(struct tm_source *source, uint64_t size) {
    atomic_fetch_add(&source->eager_pages, size >> TM_PAGE_SHIFT);
    atomic_fetch_add(&source->total, size >> TM_PAGE_SHIFT);
}

// What lies in the buffer.
static int keep(const struct eager_context *context, uint64_t first_page, const uint8_t *data, uint64_t size) {
    count(context->source, size);
    const struct eager_piece piece = {first_page, size >> TM_PAGE_SHIFT, data, context->region->changed_only};
    return piece_add(context->source, piece, context->error);
}

static int take_into(const struct eager_context *context, uint64_t at, uint64_t first_page, uint8_t *to,
                     uint64_t size) {
    int code = read_into(context, at, to, size);
    return code ? code : keep(context, first_page, to, size);
}

// Where the buffer is full: into the spool at once.
static int take_directly(const struct eager_context *context, uint64_t at, uint64_t first_page, uint64_t size) {
    struct tm_source *source = context->source;
    uint8_t *to = malloc(size < DIRECT_PIECE ? size : DIRECT_PIECE);
    int code = to ? TM_OK : tm_error_set(context->error, TM_NOMEM, 0, "malloc", "no memory for the eager pages");
    while (!code && size > 0) {
        uint64_t part = size < DIRECT_PIECE ? size : DIRECT_PIECE, n = part >> TM_PAGE_SHIFT;
        code = read_into(context, at, to, part);
        if (!code)
            code =
                store(source, &(struct eager_piece){first_page, n, to, context->region->changed_only}, context->error);
        if (code) break;
        precopy_stored(source, first_page, n);
        count(source, part);
        atomic_fetch_add(&source->done, n);
        at += part;
        first_page += n;
        size -= part;
    }
    free(to);
    return code;
}

// `at`: what the reader is asked for; first_page: where it goes in the spool.
static int take(const struct eager_context *context, uint64_t at, uint64_t first_page, uint64_t size) {
    uint8_t *to = reserve(context->source, size);
    return to ? take_into(context, at, first_page, to, size) : take_directly(context, at, first_page, size);
}

// ---------------------------------------------------------------- private pages, many in one call

int eager_flush(struct eager_batch *batch, struct tm_error *error) {
    struct tm_source *source = batch->source;
    if (!batch->n) return TM_OK;
    uint8_t *data = reserve(source, batch->size);
    struct iovec local = {data, batch->size};
    bool all = data && process_vm_readv(source->pid, &local, 1, batch->remote, batch->n, 0) == (ssize_t)batch->size;
    int code = TM_OK;
    for (uint32_t i = 0; !code && i < batch->n; i++) {
        uint64_t at = (uintptr_t)batch->remote[i].iov_base, size = batch->remote[i].iov_len;
        struct eager_context context = {source, batch->regions[i], read_memory, -1, error};
        if (!data)
            code = take(&context, at, batch->pages[i], size);
        else if (all)
            code = keep(&context, batch->pages[i], data, size);
        else
            code = take_into(&context, at, batch->pages[i], data, size);
        if (data) data += size;
    }
    batch->n = 0;
    batch->size = 0;
    return code;
}

int eager_add(struct eager_batch *batch, const struct region *region, uint64_t address, uint64_t page, uint64_t size,
              struct tm_error *error) {
    if (batch->n == EAGER_BATCH || batch->size >= BATCH_SIZE) {
        int code = eager_flush(batch, error);
        if (code) return code;
    }
    batch->remote[batch->n] = (struct iovec){(void *)(uintptr_t)address, size};
    batch->pages[batch->n] = page;
    batch->regions[batch->n++] = region;
    batch->size += size;
    return TM_OK;
}

struct private_context {
    struct eager_batch batch;
    struct tm_error *error;
};

// Of neighbouring regions: an extent may go over several.
static int take_extent(void *context_, const struct extent *extent) {
    struct private_context *context = context_;
    struct tm_source *source = context->batch.source;
    int code = TM_OK;
    for (uint64_t at = extent->start, end; !code && at < extent->end; at = end) {
        struct region *region = region_at(source, at);
        if (!region) { // somebody who shares its memory has mapped it since
            tm_error_set(context->error, TM_SYS, 0, "PAGEMAP_SCAN", "a page is in no region of its maps");
            if (context->error) context->error->address = at;
            return TM_SYS;
        }
        end = extent->end < region->face.end ? extent->end : region->face.end;
        if (extent->categories & PAGE_IS_GUARD) return region_guarded(&region->face, at, context->error);
        if (region->changed_only && (extent->categories & PAGE_IS_FILE)) continue;
        if (extent->categories & PAGE_IS_HUGE) region_has_huge(region);
        uint64_t page = region->first_page + ((at - region->face.start) >> TM_PAGE_SHIFT);
        code = eager_add(&context->batch, region, at, page, end - at, context->error);
    }
    return code;
}

static bool is_private(const struct region *region) {
    return region->face.treatment == TM_EAGER && region->face.kind != TM_SHARED_ANON && region->face.kind != TM_DELETED;
}

static int take_private(struct tm_source *source, const struct piece *piece, struct tm_error *error) {
    struct private_context context = {.batch = {.source = source}, .error = error};
    int code = target_scan(source, piece->start, piece->end, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_PFNZERO,
                           PAGE_IS_FILE | PAGE_IS_HUGE | source->guard_category, take_extent, &context, error);
    return code ? code : eager_flush(&context.batch, error);
}

// ---------------------------------------------------------------- what is not of this process alone

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

// ---------------------------------------------------------------- by pieces, which the workers share

static bool follows(const struct region *left, const struct region *right) {
    return is_private(right) && right->face.start - left->face.end < NEAR;
}

// One scan for some that follow each other.
int eager_list(struct tm_source *source, struct tm_error *error) {
    int err = 0;
    for (uint32_t i = 0, last; !err && i < source->n_regions; i = last + 1) {
        const struct tm_region_state *face = &source->regions[i].face;
        last = i;
        if (face->treatment != TM_EAGER) continue;
        bool private = is_private(&source->regions[i]);
        while (private && last - i < TOGETHER && last + 1 < source->n_regions &&
               follows(&source->regions[last], &source->regions[last + 1]))
            last++;
        err = capture_piece_add(source, i, face->start, source->regions[last].face.end, private ? PIECE_SIZE : WHOLE);
    }
    return err ? tm_error_set(error, TM_NOMEM, 0, "realloc", "no memory for the list of pieces") : TM_OK;
}

int eager_copy(struct tm_source *source, const struct piece *piece, struct tm_error *error) {
    const struct region *region = &source->regions[piece->region];
    if (is_private(region)) return take_private(source, piece, error);
    struct eager_context context = {source, region, read_memory, -1, error};
    return region->face.kind == TM_SHARED_ANON ? take_shared(&context) : take_deleted(&context);
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
