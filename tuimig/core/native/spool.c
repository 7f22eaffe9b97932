// The spool: pages at fixed places of one sparse file, written by several threads, each page with its sum.
// Owns the table of sums (an anonymous mapping, so that untouched parts cost nothing), not the file.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checksum.h"
#include "bits.h"
#include "spool.h"
#include "util.h"

#define MOST_PAGES (UINT64_C(1) << 40) // keeps every byte offset and table size far from overflow
#define ROOM_LEAST (UINT64_C(1) << 26) // pages, of a tracked spool: addresses, not memory

struct tm_spool {
    int fd;
    int writable;
    uint64_t n_pages;
    uint32_t *sums;
    size_t sums_bytes; // mapped length
    int tracked;
    uint64_t *present, *given; // a bit a page, one mapping
    size_t bits_bytes;         // of either
};

uint32_t tm_page_sum(const void *page) {
    if (tm_page_is_zero(page)) {
        return TM_SUM_HOLE;
    }
    uint32_t crc = tm_crc32c_page(page);
    return crc > TM_SUM_ZERO ? crc : UINT32_MAX - crc; // 0 and 1 have a meaning of their own
}

static uint32_t sum_load(const uint32_t *sum) { return __atomic_load_n(sum, __ATOMIC_RELAXED); }

static void sum_store(uint32_t *sum, uint32_t value) {
    if (sum_load(sum) != value) { // an unneeded write would make the table's page resident
        __atomic_store_n(sum, value, __ATOMIC_RELAXED);
    }
}

// The tables of a tracked spool have readers, so they stay where they are: they are made large at once.
static uint64_t table_pages(const struct tm_spool *spool, uint64_t n_pages) {
    uint64_t room = 4 * n_pages > ROOM_LEAST ? 4 * n_pages : ROOM_LEAST;
    return spool->tracked ? room : n_pages;
}

static int map_bits(struct tm_spool *spool, uint64_t n_pages, struct tm_error *error) {
    size_t bytes = tm_page_ceil(tm_bits_words(n_pages) * sizeof *spool->present);
    void *bits = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bits == MAP_FAILED) {
        return tm_error_set(error, TM_NOMEM, errno, "mmap", "no memory to keep track of %llu pages",
                            (unsigned long long)n_pages);
    }
    spool->given = (uint64_t *)(void *)((char *)bits + bytes);
    spool->bits_bytes = bytes;
    __atomic_store_n(&spool->present, bits, __ATOMIC_RELEASE);
    return TM_OK;
}

static int grow_sums(struct tm_spool *spool, uint64_t n_pages, struct tm_error *error) {
    if (tm_page_ceil(n_pages * sizeof *spool->sums) <= spool->sums_bytes) {
        return TM_OK;
    }
    if (spool->tracked && spool->sums_bytes) {
        return tm_error_set(error, TM_FULL, EFBIG, "grow spool",
                            "%llu pages are more than there is room for beside readers", (unsigned long long)n_pages);
    }
    size_t bytes = tm_page_ceil(table_pages(spool, n_pages) * sizeof *spool->sums);
    void *sums = spool->sums_bytes
                     ? mremap(spool->sums, spool->sums_bytes, bytes, MREMAP_MAYMOVE)
                     : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (sums == MAP_FAILED) {
        return tm_error_set(error, TM_NOMEM, errno, spool->sums_bytes ? "mremap" : "mmap",
                            "no memory for the sums of %llu pages", (unsigned long long)n_pages);
    }
    spool->sums = sums;
    spool->sums_bytes = bytes;
    return TM_OK;
}

int tm_spool_grow(struct tm_spool *spool, uint64_t n_pages, struct tm_error *error) {
    if (n_pages <= spool->n_pages) {
        return TM_OK;
    }
    if (n_pages > MOST_PAGES) {
        return tm_error_set(error, TM_FULL, EFBIG, "grow spool", "%llu pages are more than a spool can hold",
                            (unsigned long long)n_pages);
    }
    if (spool->writable) {
        if (ftruncate(spool->fd, (off_t)(n_pages << TM_PAGE_SHIFT))) {
            return tm_error_errno(error, "ftruncate", "the spool cannot grow to %llu pages",
                                  (unsigned long long)n_pages);
        }
    } else {
        struct stat status;
        if (fstat(spool->fd, &status)) {
            return tm_error_errno(error, "fstat", "the size of the spool is not known");
        }
        if ((uint64_t)status.st_size < n_pages << TM_PAGE_SHIFT) {
            return tm_error_set(error, TM_DAMAGED, 0, "open spool", "the spool was cut: it has %llu bytes, not %llu",
                                (unsigned long long)status.st_size, (unsigned long long)n_pages << TM_PAGE_SHIFT);
        }
    }
    int failed = grow_sums(spool, n_pages, error);
    if (!failed && spool->tracked && !spool->present) {
        failed = map_bits(spool, tm_spool_room(spool), error);
    }
    if (failed) {
        return failed;
    }
    __atomic_store_n(&spool->n_pages, n_pages, __ATOMIC_RELEASE);
    return TM_OK;
}

int tm_spool_cut(struct tm_spool *spool, uint64_t n_pages, struct tm_error *error) {
    if (n_pages >= spool->n_pages) {
        return TM_OK;
    }
    if (ftruncate(spool->fd, (off_t)(n_pages << TM_PAGE_SHIFT))) {
        return tm_error_errno(error, "ftruncate", "the spool cannot be cut");
    }
    __atomic_store_n(&spool->n_pages, n_pages, __ATOMIC_RELEASE);
    return TM_OK;
}

int tm_spool_create(int pages_fd, uint64_t n_pages, int writable, struct tm_spool **out, struct tm_error *error) {
    struct tm_spool *spool = calloc(1, sizeof *spool);
    if (!spool) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "create spool", "no memory");
    }
    spool->fd = pages_fd;
    spool->writable = writable;
    int failed = tm_spool_grow(spool, n_pages, error);
    if (failed) {
        tm_spool_destroy(spool);
        return failed;
    }
    *out = spool;
    return TM_OK;
}

void tm_spool_destroy(struct tm_spool *spool) {
    if (!spool) {
        return;
    }
    if (spool->sums_bytes) {
        munmap(spool->sums, spool->sums_bytes);
    }
    if (spool->bits_bytes) {
        munmap(spool->present, 2 * spool->bits_bytes);
    }
    free(spool);
}

uint64_t tm_spool_stored(const struct tm_spool *spool) {
    uint64_t stored = 0;
    for (uint64_t i = 0; i < spool->n_pages; i++) {
        stored += sum_load(&spool->sums[i]) != TM_SUM_HOLE;
    }
    return stored;
}

uint32_t *tm_spool_sums(struct tm_spool *spool) { return spool->sums; }

uint64_t tm_spool_pages(const struct tm_spool *spool) { return __atomic_load_n(&spool->n_pages, __ATOMIC_ACQUIRE); }

uint64_t tm_spool_room(const struct tm_spool *spool) { return spool->sums_bytes / sizeof *spool->sums; }

int tm_spool_file(const struct tm_spool *spool) { return spool->fd; }

static int in_range(const struct tm_spool *spool, uint64_t first, uint64_t n_pages, struct tm_error *error) {
    if (first > spool->n_pages || n_pages > spool->n_pages - first) {
        return tm_error_set(error, TM_SYS, ERANGE, "spool", "pages %llu+%llu lie outside of a spool of %llu",
                            (unsigned long long)first, (unsigned long long)n_pages, (unsigned long long)spool->n_pages);
    }
    return TM_OK;
}

static int write_run(struct tm_spool *spool, uint64_t first, const char *data, uint64_t n_pages,
                     struct tm_error *error) {
    size_t left = n_pages << TM_PAGE_SHIFT;
    off_t at = (off_t)(first << TM_PAGE_SHIFT);
    while (left) {
        ssize_t wrote = pwrite(spool->fd, data, left, at);
        if (wrote < 0 && errno == EINTR) {
            continue;
        }
        if (wrote <= 0) {
            int err = wrote ? errno : ENOSPC;
            return tm_error_set(error, tm_error_code(err), err, "pwrite", "%llu pages could not be stored",
                                (unsigned long long)n_pages);
        }
        data += wrote;
        left -= (size_t)wrote;
        at += wrote;
    }
    return TM_OK;
}

// A page that was stored before and is zero now becomes a hole again.
static int make_hole(struct tm_spool *spool, uint64_t page, uint64_t n, struct tm_error *error) {
    if (fallocate(spool->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page << TM_PAGE_SHIFT),
                  (off_t)(n << TM_PAGE_SHIFT)) == 0) {
        return TM_OK;
    }
    if (errno != EOPNOTSUPP) {
        return tm_error_errno(error, "fallocate", "a page could not be made a hole");
    }
    static const char zeros[TM_PAGE_SIZE];
    int failed = TM_OK;
    for (uint64_t i = 0; !failed && i < n; i++) {
        failed = write_run(spool, page + i, zeros, 1, error);
    }
    return failed;
}

int tm_spool_clear(struct tm_spool *spool, uint64_t first, uint64_t n_pages, struct tm_error *error) {
    int failed = in_range(spool, first, n_pages, error);
    if (!failed && n_pages) {
        failed = make_hole(spool, first, n_pages, error);
    }
    for (uint64_t i = 0; !failed && i < n_pages; i++) {
        sum_store(&spool->sums[first + i], TM_SUM_HOLE);
    }
    if (!failed && n_pages) {
        tm_spool_forget(spool, first, n_pages);
    }
    return failed;
}

void tm_spool_forget(struct tm_spool *spool, uint64_t first, uint64_t n_pages) {
    if (spool->present) {
        tm_bits_clear_range(spool->present, first, n_pages);
        tm_bits_clear_range(spool->given, first, n_pages);
    }
}

int tm_spool_put(struct tm_spool *spool, uint64_t first, const void *data, uint64_t n_pages, uint64_t *zero,
                 struct tm_error *error) {
    int failed = in_range(spool, first, n_pages, error);
    if (failed) {
        return failed;
    }
    if (!spool->writable) {
        return tm_error_set(error, TM_SYS, EBADF, "spool", "the spool was opened for reading only");
    }
    const char *pages = data;
    uint64_t zeros = 0;
    for (uint64_t i = 0; i < n_pages;) {
        uint64_t run = 0; // pages from i on that are not zero
        while (i + run < n_pages) {
            uint32_t sum = tm_page_sum(pages + ((i + run) << TM_PAGE_SHIFT));
            if (sum == TM_SUM_HOLE) {
                break;
            }
            sum_store(&spool->sums[first + i + run], sum);
            run++;
        }
        if (run) {
            failed = write_run(spool, first + i, pages + (i << TM_PAGE_SHIFT), run, error);
            if (failed) {
                return failed;
            }
            i += run;
        }
        if (i < n_pages) { // the run ended at a zero page
            uint32_t *sum = &spool->sums[first + i];
            if (sum_load(sum) > TM_SUM_ZERO) {
                failed = make_hole(spool, first + i, 1, error);
                if (failed) {
                    return failed;
                }
            }
            sum_store(sum, TM_SUM_HOLE);
            zeros++;
            i++;
        }
    }
    if (spool->present) {
        // Who was given what was here before is given it again; clearing is a barrier: who gives from now on reads all of it.
        tm_bits_clear_range(spool->given, first, n_pages);
        tm_bits_set_range(spool->present, first, n_pages);
    }
    if (zero) {
        *zero += zeros;
    }
    return TM_OK;
}

// ---- pages that come from elsewhere

int tm_spool_track(struct tm_spool *spool, struct tm_error *error) {
    spool->tracked = 1;
    return spool->n_pages ? map_bits(spool, tm_spool_room(spool), error) : TM_OK;
}

uint64_t *tm_spool_present(const struct tm_spool *spool) { return __atomic_load_n(&spool->present, __ATOMIC_ACQUIRE); }

uint64_t *tm_spool_given(const struct tm_spool *spool) { return spool->given; }

// One run of pages whose content lies in a row: stored, then there.
static int place_run(struct tm_spool *spool, uint64_t first, uint64_t n_pages, const uint32_t *sums, const char *data,
                     uint64_t *fresh, struct tm_error *error) {
    int failed = n_pages ? write_run(spool, first, data, n_pages, error) : TM_OK;
    for (uint64_t i = 0; i < n_pages && !failed; i++) {
        sum_store(&spool->sums[first + i], sums[i]);
        *fresh += (uint64_t)tm_bits_set(spool->present, first + i);
    }
    return failed;
}

static int place_zero(struct tm_spool *spool, uint64_t page, uint32_t sum, uint64_t *fresh, struct tm_error *error) {
    int failed = sum_load(&spool->sums[page]) > TM_SUM_ZERO ? make_hole(spool, page, 1, error) : TM_OK;
    if (!failed) {
        sum_store(&spool->sums[page], sum);
        *fresh += (uint64_t)tm_bits_set(spool->present, page);
    }
    return failed;
}

int tm_spool_place(struct tm_spool *spool, uint64_t first, uint64_t n_pages, const uint32_t *sums, uint64_t wanted,
                   const char *data, int may_tear, uint64_t *fresh, struct tm_error *error) {
    int failed = in_range(spool, first, n_pages, error);
    uint64_t from = 0, run = 0; // the run that is gathered, and its content
    const char *content = data;
    for (uint64_t i = 0; i < n_pages && !failed; i++) {
        int has_content = sums[i] > TM_SUM_ZERO, takes = (int)(wanted >> i & 1);
        if (takes && has_content && tm_page_sum(data) != sums[i]) {
            takes = 0;
            if (may_tear) { // of an older one nothing may stay either
                failed = tm_spool_clear(spool, first + i, 1, error);
            } else {
                failed = tm_error_set(error, TM_DAMAGED, 0, "checksum", "page %llu is not what was sent",
                                      (unsigned long long)(first + i));
            }
        }
        if (takes && has_content) {
            from = run ? from : i;
            content = run ? content : data;
            run++;
        } else if (!failed) {
            failed = place_run(spool, first + from, run, sums + from, content, fresh, error);
            run = 0;
        }
        if (takes && !has_content && !failed) {
            failed = place_zero(spool, first + i, sums[i], fresh, error);
        }
        data += has_content ? TM_PAGE_SIZE : 0;
    }
    return failed ? failed : place_run(spool, first + from, run, sums + from, content, fresh, error);
}

static int read_run(struct tm_spool *spool, uint64_t first, char *data, uint64_t n_pages, struct tm_error *error) {
    size_t left = n_pages << TM_PAGE_SHIFT;
    off_t at = (off_t)(first << TM_PAGE_SHIFT);
    while (left) {
        ssize_t got = pread(spool->fd, data, left, at);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return tm_error_errno(error, "pread", "stored pages could not be read");
        }
        if (got == 0) {
            tm_error_set(error, TM_DAMAGED, 0, "pread", "the spool ends before page %llu",
                         (unsigned long long)at >> TM_PAGE_SHIFT);
            if (error) {
                error->address = (uint64_t)at >> TM_PAGE_SHIFT;
            }
            return TM_DAMAGED;
        }
        data += got;
        left -= (size_t)got;
        at += got;
    }
    return TM_OK;
}

static int get(struct tm_spool *spool, uint64_t first, void *data, uint64_t n_pages, int checked,
               struct tm_error *error) {
    int failed = in_range(spool, first, n_pages, error);
    if (failed) {
        return failed;
    }
    const uint32_t *sums = spool->sums + first;
    for (uint64_t i = 0; i < n_pages;) {
        char *at = (char *)data + (i << TM_PAGE_SHIFT);
        if (sum_load(&sums[i]) <= TM_SUM_ZERO) {
            memset(at, 0, TM_PAGE_SIZE);
            i++;
            continue;
        }
        uint64_t run = 1;
        while (i + run < n_pages && sum_load(&sums[i + run]) > TM_SUM_ZERO) {
            run++;
        }
        failed = read_run(spool, first + i, at, run, error);
        if (failed) {
            return failed;
        }
        for (uint64_t end = i + run; i < end; i++, at += TM_PAGE_SIZE) {
            if (!checked && tm_page_sum(at) != sum_load(&sums[i])) {
                tm_error_set(error, TM_DAMAGED, 0, "checksum", "page %llu is not what was stored",
                             (unsigned long long)(first + i));
                if (error) {
                    error->address = first + i;
                }
                return TM_DAMAGED;
            }
        }
    }
    return TM_OK;
}

int tm_spool_get(struct tm_spool *spool, uint64_t first, void *data, uint64_t n_pages, struct tm_error *error) {
    return get(spool, first, data, n_pages, 0, error);
}

int tm_spool_get_checked(struct tm_spool *spool, uint64_t first, void *data, uint64_t n_pages, struct tm_error *error) {
    return get(spool, first, data, n_pages, 1, error);
}
