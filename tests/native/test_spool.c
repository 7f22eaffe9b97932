// Sums, the spool and the fault ring.
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "checksum.h"
#include "harness.h"
#include "ring.h"
#include "spool.h"
#include "util.h"

#define PAGE 4096ul

static int make_file(void) {
    int fd = (int)syscall(SYS_memfd_create, "spool", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(fd >= 0, "memfd");
    return fd;
}

static struct tm_spool *make_spool(int fd, uint64_t n_pages, int writable) {
    struct tm_spool *spool = NULL;
    CHECK_OK(tm_spool_create(fd, n_pages, writable, &spool, why));
    return spool;
}

static void fill_page(unsigned char *page, unsigned seed) {
    for (unsigned long i = 0; i < PAGE; i++) {
        page[i] = (unsigned char)rand_r(&seed);
    }
}

static uint64_t stored_bytes(int fd) {
    struct stat status;
    CHECK(fstat(fd, &status) == 0, "fstat");
    return (uint64_t)status.st_blocks * 512;
}

// ---- sums

static uint32_t crc32c_by_bits(const unsigned char *page) {
    uint32_t crc = ~0u;
    for (unsigned long i = 0; i < PAGE; i++) {
        crc ^= page[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        }
    }
    return ~crc;
}

static void sums_are_crc32c(void) {
    static unsigned char page[PAGE];
    for (unsigned seed = 0; seed < 300; seed++) {
        fill_page(page, seed);
        CHECK(tm_crc32c_page(page) == crc32c_by_bits(page), "seed %u", seed);
        CHECK(tm_page_sum(page) == crc32c_by_bits(page), "seed %u", seed);
    }
    memset(page, 0, PAGE);
    CHECK(tm_page_sum(page) == TM_SUM_HOLE && tm_crc32c_page(page) == crc32c_by_bits(page), "zero page");
}

static void one_byte_is_seen_anywhere(void) {
    static unsigned char page[PAGE];
    for (unsigned long i = 0; i < PAGE; i++) {
        page[i] = 1;
        CHECK(!tm_page_is_zero(page) && tm_page_sum(page) > TM_SUM_ZERO, "byte %lu", i);
        page[i] = 0;
    }
    CHECK(tm_page_is_zero(page), "zero page");
}

// Pages whose CRC32C is one of the two values that have a meaning. The last word that gives it is found by running the
// checksum backwards.
static void make_page_with_crc(unsigned char *page, uint32_t wanted) {
    fill_page(page, 7);
    uint32_t state = ~0u;
    for (unsigned long i = 0; i < PAGE - 4; i++) {
        state ^= page[i];
        for (int bit = 0; bit < 8; bit++) {
            state = state >> 1 ^ (state & 1 ? 0x82f63b78u : 0);
        }
    }
    uint32_t back = ~wanted;
    for (int bit = 0; bit < 32; bit++) {
        back = back & 0x80000000u ? (back ^ 0x82f63b78u) << 1 | 1 : back << 1;
    }
    back ^= state;
    memcpy(page + PAGE - 4, &back, 4);
    CHECK(crc32c_by_bits(page) == wanted, "the test's own arithmetic");
}

static void meaningful_sums_are_avoided(void) {
    static unsigned char page[PAGE], got[PAGE];
    int fd = make_file();
    struct tm_spool *spool = make_spool(fd, 2, 1);
    for (uint32_t wanted = 0; wanted < 2; wanted++) {
        make_page_with_crc(page, wanted);
        CHECK(tm_page_sum(page) == UINT32_MAX - wanted, "crc %u", wanted);
        CHECK_OK(tm_spool_put(spool, wanted, page, 1, NULL, why));
        CHECK_OK(tm_spool_get(spool, wanted, got, 1, why));
        CHECK(memcmp(page, got, PAGE) == 0, "crc %u", wanted);
    }
    tm_spool_destroy(spool);
    close(fd);
}

// ---- the spool

static void pages_come_back(void) {
    enum { N = 1000 };
    unsigned char *data = calloc(N, PAGE), *got = calloc(N, PAGE);
    for (unsigned i = 0; i < N; i++) {
        if (i % 5 && i % 7) {
            fill_page(data + i * PAGE, i);
        }
    }
    int fd = make_file();
    struct tm_spool *spool = make_spool(fd, N, 1);
    uint64_t zero = 0;
    for (unsigned at = 0; at < N; at += 100) { // in any order
        unsigned first = (at + 300) % N;
        CHECK_OK(tm_spool_put(spool, first, data + first * PAGE, 100, &zero, why));
    }
    CHECK(zero == 200 + 143 - 29, "%lu zero pages", zero);
    CHECK_OK(tm_spool_get(spool, 0, got, N, why));
    CHECK(memcmp(data, got, N * PAGE) == 0, "content");
    CHECK(stored_bytes(fd) == (N - zero) * PAGE, "zero pages are no holes");
    struct stat status;
    CHECK(fstat(fd, &status) == 0 && status.st_size == N * PAGE, "size");
    for (unsigned i = 0; i < N; i++) {
        CHECK((tm_spool_sums(spool)[i] == 0) == tm_page_is_zero(data + i * PAGE), "sum of page %u", i);
    }
    tm_spool_destroy(spool);
    close(fd);
    free(data);
    free(got);
}

static void stored_again_as_zero_is_a_hole(void) {
    static unsigned char page[PAGE];
    int fd = make_file();
    struct tm_spool *spool = make_spool(fd, 8, 1);
    fill_page(page, 1);
    CHECK_OK(tm_spool_put(spool, 3, page, 1, NULL, why));
    CHECK(stored_bytes(fd) == PAGE, "stored");
    memset(page, 0, PAGE);
    CHECK_OK(tm_spool_put(spool, 3, page, 1, NULL, why));
    CHECK(stored_bytes(fd) == 0 && tm_spool_sums(spool)[3] == 0, "still stored");
    memset(page, 1, PAGE);
    CHECK_OK(tm_spool_get(spool, 3, page, 1, why));
    CHECK(tm_page_is_zero(page), "content");
    tm_spool_sums(spool)[3] = TM_SUM_ZERO; // a zero page that is content
    memset(page, 1, PAGE);
    CHECK_OK(tm_spool_get(spool, 3, page, 1, why));
    CHECK(tm_page_is_zero(page), "content");
    tm_spool_destroy(spool);
    close(fd);
}

static void every_flipped_bit_is_found(void) {
    static unsigned char pages[8 * PAGE], got[8 * PAGE];
    int fd = make_file();
    struct tm_spool *spool = make_spool(fd, 8, 1);
    for (unsigned i = 0; i < 8; i++) {
        fill_page(pages + i * PAGE, i);
    }
    CHECK_OK(tm_spool_put(spool, 0, pages, 8, NULL, why));
    for (unsigned long at = 0; at < 8 * PAGE; at += 37) {
        unsigned char byte = pages[at] ^ (unsigned char)(1 << at % 8);
        CHECK(pwrite(fd, &byte, 1, (off_t)at) == 1, "pwrite");
        struct tm_error error;
        CHECK(tm_spool_get(spool, 0, got, 8, &error) == TM_DAMAGED && error.address == at / PAGE, "byte %lu", at);
        CHECK(pwrite(fd, &pages[at], 1, (off_t)at) == 1, "pwrite");
    }
    CHECK_OK(tm_spool_get(spool, 0, got, 8, why));
    CHECK(ftruncate(fd, 6 * PAGE + 100) == 0, "ftruncate");
    struct tm_error error;
    CHECK(tm_spool_get(spool, 0, got, 8, &error) == TM_DAMAGED && error.address == 6, "cut");
    struct tm_spool *other = NULL;
    CHECK(tm_spool_create(fd, 8, 0, &other, &error) == TM_DAMAGED, "cut file opened");
    tm_spool_destroy(spool);
    close(fd);
}

static void grows(void) {
    static unsigned char page[PAGE], got[PAGE];
    int fd = make_file();
    struct tm_spool *spool = make_spool(fd, 0, 1);
    CHECK(tm_spool_pages(spool) == 0, "empty");
    fill_page(page, 1);
    struct tm_error error;
    CHECK(tm_spool_put(spool, 0, page, 1, NULL, &error) == TM_SYS && error.err == ERANGE, "outside");
    for (uint64_t n = 1; n < 1u << 22; n *= 4) {
        CHECK_OK(tm_spool_grow(spool, n, why));
        CHECK_OK(tm_spool_put(spool, n - 1, page, 1, NULL, why));
    }
    for (uint64_t n = 1; n < 1u << 22; n *= 4) {
        CHECK_OK(tm_spool_get(spool, n - 1, got, 1, why));
        CHECK(memcmp(page, got, PAGE) == 0, "page %lu", n - 1);
    }
    CHECK(tm_spool_grow(spool, UINT64_MAX, &error) == TM_FULL, "too many");
    CHECK(tm_spool_get(spool, UINT64_MAX, got, 2, &error) == TM_SYS, "outside");
    tm_spool_destroy(spool);
    close(fd);
}

static void read_only_is_not_written(void) {
    static unsigned char page[PAGE] = {1};
    int fd = make_file();
    CHECK(ftruncate(fd, PAGE) == 0, "ftruncate");
    struct tm_spool *spool = make_spool(fd, 1, 0);
    struct tm_error error;
    CHECK(tm_spool_put(spool, 0, page, 1, NULL, &error) == TM_SYS && error.err == EBADF, "written");
    tm_spool_destroy(spool);
    close(fd);
}

// ---- no room

static void full_file_is_told(void) {
    static unsigned char pages[64 * PAGE];
    memset(pages, 1, sizeof pages);
    char name[] = "/tmp/tuimig-spool-XXXXXX";
    int fd = mkstemp(name);
    CHECK(fd >= 0 && unlink(name) == 0, "mkstemp");
    struct tm_spool *spool = make_spool(fd, 64, 1);
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {.rlim_cur = 10 * PAGE + 100, .rlim_max = RLIM_INFINITY}; // a page is written in part
    CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0, "getrlimit");
    limit.rlim_cur = 10 * PAGE + 100;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0, "setrlimit");
    struct tm_error error;
    CHECK(tm_spool_put(spool, 0, pages, 64, NULL, &error) == TM_FULL && error.err == EFBIG, "%s", error.what);
    CHECK(tm_spool_put(spool, 0, pages, 10, NULL, &error) == TM_OK, "%s", error.what);
    struct tm_spool *larger = NULL;
    CHECK(tm_spool_create(fd, 100, 1, &larger, &error) == TM_FULL, "grown beyond the limit");
    tm_spool_destroy(spool);
    close(fd);
}

static void full_disk_is_told(void) {
    static unsigned char pages[512 * PAGE];
    memset(pages, 1, sizeof pages);
    // A file system of one megabyte, seen by nobody else and gone with its descriptors.
    int context = (int)syscall(SYS_fsopen, "tmpfs", 1 /* FSOPEN_CLOEXEC */);
    if (context < 0) {
        CHECK(errno == EPERM, "fsopen");
        fprintf(stderr, "full_disk_is_told: skipped, not allowed to mount\n");
        return;
    }
    CHECK(syscall(SYS_fsconfig, context, 1 /* SET_STRING */, "size", "1m", 0) == 0, "fsconfig");
    CHECK(syscall(SYS_fsconfig, context, 6 /* CMD_CREATE */, NULL, NULL, 0) == 0, "fsconfig");
    int mount = (int)syscall(SYS_fsmount, context, 1 /* FSMOUNT_CLOEXEC */, 0);
    CHECK(mount >= 0, "fsmount");
    int fd = openat(mount, "pages", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0, "openat");
    struct tm_spool *spool = make_spool(fd, 512, 1); // holes cost nothing
    struct tm_error error;
    CHECK(tm_spool_put(spool, 0, pages, 512, NULL, &error) == TM_FULL && error.err == ENOSPC, "%s", error.what);
    CHECK(strstr(error.where, "pwrite") != NULL, "%s", error.where);
    tm_spool_destroy(spool);
    close(fd);
    close(mount);
    close(context);
}

// ---- threads

struct job {
    struct tm_spool *spool;
    unsigned thread;
};

enum { THREADS = 4, EACH = 400 };

static void *put_pages(void *argument) {
    const struct job *job = argument;
    unsigned char page[PAGE];
    for (unsigned i = 0; i < EACH; i++) {
        unsigned at = i * THREADS + job->thread;
        memset(page, 0, PAGE);
        if (at % 3) {
            fill_page(page, at);
        }
        CHECK_OK(tm_spool_put(job->spool, at, page, 1, NULL, why));
    }
    return NULL;
}

static void threads_put_at_once(void) {
    int fd = make_file();
    struct tm_spool *spool = make_spool(fd, THREADS * EACH, 1);
    pthread_t threads[THREADS];
    struct job jobs[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        jobs[i] = (struct job){spool, i};
        CHECK(tm_thread_start(&threads[i], "a-name-that-is-too-long", put_pages, &jobs[i]) == 0, "thread");
    }
    for (unsigned i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0, "join");
    }
    unsigned char page[PAGE], got[PAGE];
    for (unsigned i = 0; i < THREADS * EACH; i++) {
        memset(page, 0, PAGE);
        if (i % 3) {
            fill_page(page, i);
        }
        CHECK_OK(tm_spool_get(spool, i, got, 1, why));
        CHECK(memcmp(page, got, PAGE) == 0, "page %u", i);
    }
    tm_spool_destroy(spool);
    close(fd);
}

enum { RECORDS = 200000 };

static void *push_records(void *argument) {
    for (uint32_t i = 0; i < RECORDS; i++) {
        struct tm_fault fault = {.address = i, .time_ns = i * 3ul, .latency_ns = i, .tid = (int32_t)i};
        tm_ring_push(argument, &fault);
    }
    return NULL;
}

static void ring_of_two_threads(void) {
    struct tm_ring *ring = tm_ring_create(100);
    static struct tm_fault got[77];
    pthread_t producer;
    CHECK(pthread_create(&producer, NULL, push_records, ring) == 0, "thread");
    uint64_t seen = 0, next = 0;
    struct tm_histogram histogram;
    do {
        tm_ring_histogram(ring, &histogram); // before the drain: then nothing can come after the last
        uint32_t n = tm_ring_drain(ring, got, 77);
        for (uint32_t i = 0; i < n; i++) {
            CHECK(
                got[i].address >= next && got[i].time_ns == got[i].address * 3 && got[i].tid == (int32_t)got[i].address,
                "a torn record");
            next = got[i].address + 1;
        }
        seen += n;
        if (n == 0 && histogram.count == RECORDS && seen + tm_ring_dropped(ring) == RECORDS) {
            break;
        }
    } while (1);
    CHECK(pthread_join(producer, NULL) == 0, "join");
    CHECK(seen >= 128, "%lu records seen", seen);
    uint64_t total = 0;
    for (int i = 0; i < 32; i++) {
        total += histogram.bucket[i];
    }
    CHECK(total == RECORDS && histogram.max_ns == RECORDS - 1, "histogram");
    CHECK(histogram.bucket[0] == 2 && histogram.bucket[10] == 1024, "buckets");
    tm_ring_destroy(ring);
}

static void full_ring_drops_and_counts(void) {
    struct tm_ring *ring = tm_ring_create(5); // 8
    struct tm_fault fault = {0}, got[16];
    for (uint32_t i = 0; i < 20; i++) {
        fault.address = i;
        tm_ring_push(ring, &fault);
    }
    CHECK(tm_ring_dropped(ring) == 12, "dropped");
    CHECK(tm_ring_drain(ring, got, 16) == 8 && got[0].address == 0 && got[7].address == 7, "drained");
    CHECK(tm_ring_drain(ring, got, 16) == 0, "drained twice");
    tm_ring_push(ring, &fault);
    CHECK(tm_ring_drain(ring, got, 16) == 1, "works again");
    tm_ring_destroy(ring);
}

int main(int argc, char **argv) {
    (void)argc;
    only = argv[1];
    RUN(sums_are_crc32c, 60);
    RUN(one_byte_is_seen_anywhere, 60);
    RUN(meaningful_sums_are_avoided, 60);
    RUN(pages_come_back, 60);
    RUN(stored_again_as_zero_is_a_hole, 60);
    RUN(every_flipped_bit_is_found, 60);
    RUN(grows, 60);
    RUN(read_only_is_not_written, 60);
    RUN(full_file_is_told, 60);
    RUN(full_disk_is_told, 60);
    RUN(threads_put_at_once, 60);
    RUN(ring_of_two_threads, 60);
    RUN(full_ring_drops_and_counts, 60);
    return failures != 0;
}
