// The destination's end of the page streams: a thread a stream reads frames, checks them, places their pages in the spool's
// file and sets the present bits that the filler goes by. Demands go up on the demand stream. It lives through the loss of
// its streams: those who wait go on waiting until new ones have come, or somebody else decides.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "bits.h"
#include "checksum.h"
#include "stream_internal.h"

enum { PAYLOAD = TM_FRAME_PAGES_MOST * 4096, T0_TICK_MS = 1 };

struct intake { // one stream
    struct tm_arrival *arrival;
    int in, out, kind, index;
    pthread_t thread;
    int running;
};

struct tm_arrival {
    struct tm_spool *spool;
    uint64_t n_pages;
    uint64_t *expected;
    uint64_t *claimed; // behind the expected ones: some stream places it, or has; before T0: it has come once
    size_t bits_bytes; // of either
    uint32_t epoch;
    int early;                // T0 is not yet; atomic
    uint64_t early_most;      // pages that may come before it
    uint64_t early_end;       // none has come from here on; atomic
    pthread_rwlock_t placing; // held while an early frame is placed; its end is T0
    int quit_fd, event_fd;
    pthread_mutex_t lock; // streams, the demand stream's descriptor, waiters
    pthread_cond_t came;
    struct intake intakes[TM_STREAMS];
    uint32_t n_intakes;
    int demand_out;
    uint32_t generation;
    struct tm_stream_progress progress;
    struct tm_error result;
    struct tm_histogram trips;
};

// ---- one frame

static void say_came(struct tm_arrival *arrival) {
    eventfd_write(arrival->event_fd, 1);
    pthread_mutex_lock(&arrival->lock);
    pthread_cond_broadcast(&arrival->came);
    pthread_mutex_unlock(&arrival->lock);
}

static int breaks(struct tm_error *error, const char *rule, uint64_t page) {
    tm_error_set(error, TM_DAMAGED, 0, "stream", "the source breaks the protocol: %s, page %llu", rule,
                 (unsigned long long)page);
    return TM_DAMAGED;
}

static int is_early(const struct tm_arrival *arrival) { return __atomic_load_n(&arrival->early, __ATOMIC_ACQUIRE); }

static int check_pages(const struct tm_arrival *arrival, const struct tm_frame *frame, const uint32_t *sums,
                       uint64_t *content, struct tm_error *error) {
    *content = 0;
    for (uint64_t i = 0; i < frame->n_pages; i++) {
        if (frame->type == TM_FRAME_PAGES && !tm_bits_test(arrival->expected, frame->first + i)) {
            return breaks(error, "a page that belongs nowhere", frame->first + i);
        }
        *content += sums[i] > TM_SUM_ZERO;
    }
    uint64_t bytes = *content * TM_PAGE_SIZE;
    if (frame->encoding == TM_RAW ? frame->bytes != bytes : frame->bytes == 0 || frame->bytes >= bytes) {
        return breaks(error, "a payload of the wrong size", frame->first);
    }
    return TM_OK;
}

// Reads the payload; *pages: its pages, somewhere in the buffer.
static int read_content(struct intake *intake, const struct tm_frame *frame, uint64_t content, char *buffer,
                        const char **pages, struct tm_error *error) {
    struct tm_arrival *arrival = intake->arrival;
    int code = tm_io_read(intake->in, arrival->quit_fd, buffer, frame->bytes, error);
    *pages = buffer;
    if (code || frame->encoding == TM_RAW) {
        return code;
    }
    char *unpacked = buffer + PAYLOAD;
    if (!tm_unpack(frame->encoding, buffer, frame->bytes, unpacked, content << TM_PAGE_SHIFT)) {
        return breaks(error, "a payload that cannot be unpacked", frame->first);
    }
    *pages = unpacked;
    tm_count(&arrival->progress.packed_bytes, frame->bytes);
    tm_count(&arrival->progress.unpacked_bytes, content << TM_PAGE_SHIFT);
    return TM_OK;
}

// Each page is placed by the stream that claims it first: what the filler may be reading is never written again, and two
// streams that bring the same page do not write it at once.
static int place(struct tm_arrival *arrival, const struct tm_frame *frame, const uint32_t *sums, const char *from,
                 uint64_t *fresh, struct tm_error *error) {
    uint64_t ours = 0;
    for (uint64_t i = 0; i < frame->n_pages; i++) {
        ours |= (uint64_t)tm_bits_set(arrival->claimed, frame->first + i) << i;
    }
    return tm_spool_place(arrival->spool, frame->first, frame->n_pages, sums, ours, from, 0, fresh, error);
}

// Before T0: a page that has come already comes again when it has changed.
static int place_early(struct tm_arrival *arrival, const struct tm_frame *frame, const uint32_t *sums, const char *from,
                       uint64_t *fresh, struct tm_error *error) {
    pthread_rwlock_rdlock(&arrival->placing);
    int code = is_early(arrival) ? TM_OK : breaks(error, "a page of before T0 after it", frame->first);
    if (!code && __atomic_load_n(&arrival->progress.sent, __ATOMIC_RELAXED) > arrival->early_most) {
        code = breaks(error, "more pages than were announced", frame->first);
    }
    uint64_t again = 0;
    if (!code) {
        code = tm_spool_place(arrival->spool, frame->first, frame->n_pages, sums, UINT64_MAX, from, 1, &again, error);
    }
    for (uint64_t i = 0; !code && i < frame->n_pages; i++) {
        *fresh += (uint64_t)tm_bits_set(arrival->claimed, frame->first + i);
    }
    uint64_t end = frame->first + frame->n_pages, before = __atomic_load_n(&arrival->early_end, __ATOMIC_RELAXED);
    while (!code && before < end &&
           !__atomic_compare_exchange_n(&arrival->early_end, &before, end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    pthread_rwlock_unlock(&arrival->placing);
    return code;
}

// What belongs to T0 may come over a stream before what is expected has come over another connection.
static int await_t0(struct tm_arrival *arrival, struct tm_error *error) {
    while (is_early(arrival)) {
        if (tm_io_wait(arrival->quit_fd, arrival->quit_fd, T0_TICK_MS) < 0) {
            return tm_error_set(error, TM_CANCELLED, 0, "stream", "the stream was ended");
        }
    }
    return TM_OK;
}

static void note_trip(struct tm_arrival *arrival, uint64_t since_ns) {
    uint64_t now = tm_now_ns();
    if (since_ns == 0 || since_ns > now) { // the cookie came back from the other side
        return;
    }
    uint64_t took = now - since_ns;
    int power = 63 - __builtin_clzll(took | 1);
    pthread_mutex_lock(&arrival->lock);
    arrival->trips.bucket[power < 32 ? power : 31]++;
    arrival->trips.count++;
    arrival->trips.max_ns = took > arrival->trips.max_ns ? took : arrival->trips.max_ns;
    pthread_mutex_unlock(&arrival->lock);
}

static int take_pages(struct intake *intake, const struct tm_frame *frame, char *buffer, struct tm_error *error) {
    struct tm_arrival *arrival = intake->arrival;
    uint32_t sums[TM_FRAME_PAGES_MOST];
    int code = tm_io_read(intake->in, arrival->quit_fd, sums, frame->n_pages * sizeof *sums, error);
    if (code) {
        return code;
    }
    if (frame->epoch != arrival->epoch) { // of an attempt that was given up
        return tm_io_read(intake->in, arrival->quit_fd, buffer, frame->bytes, error);
    }
    uint64_t content, fresh = 0;
    const char *pages;
    int early = frame->type == TM_FRAME_EARLY;
    if (early && intake->kind == TM_STREAM_DEMAND) {
        return breaks(error, "a page that nobody asked for", frame->first);
    }
    code = early ? TM_OK : await_t0(arrival, error);
    uint64_t room = __atomic_load_n(&arrival->n_pages, __ATOMIC_RELAXED);
    if (!code && (frame->first >= room || frame->n_pages > room - frame->first)) {
        return breaks(error, "a page outside of the spool", frame->first);
    }
    if (!code) {
        code = check_pages(arrival, frame, sums, &content, error);
    }
    if (!code) {
        code = read_content(intake, frame, content, buffer, &pages, error);
    }
    if (!code) {
        code = early ? place_early(arrival, frame, sums, pages, &fresh, error)
                     : place(arrival, frame, sums, pages, &fresh, error);
    }
    if (code) {
        return code;
    }
    uint64_t bytes = sizeof *frame + frame->n_pages * sizeof *sums + frame->bytes;
    tm_count(&arrival->progress.sent, fresh);
    tm_count(&arrival->progress.bytes, bytes);
    tm_count(&arrival->progress.stream_bytes[intake->index], bytes);
    tm_count(&arrival->progress.zero_pages, frame->n_pages - content);
    if (intake->kind == TM_STREAM_DEMAND) {
        tm_count(&arrival->progress.demand_pages, fresh);
        note_trip(arrival, frame->cookie);
    }
    if (!early) {
        say_came(arrival);
    }
    return TM_OK;
}

// Until the stream ends, which is always for a reason.
static int serve(struct intake *intake, char *buffer, struct tm_error *error) {
    struct tm_arrival *arrival = intake->arrival;
    for (;;) {
        struct tm_frame frame;
        int code = tm_frame_read(intake->in, arrival->quit_fd, &frame, error);
        if (code) {
            return code;
        }
        if (frame.type == TM_FRAME_DONE) {
            continue;
        }
        if (frame.type != TM_FRAME_PAGES && frame.type != TM_FRAME_EARLY) {
            return breaks(error, "a frame that goes the other way", 0);
        }
        code = take_pages(intake, &frame, buffer, error);
        if (!code && intake->kind == TM_STREAM_PAGES) {
            struct tm_frame got = {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_GOT, .epoch = frame.epoch};
            got.cookie = frame.cookie;
            code = tm_io_write(intake->out, arrival->quit_fd, &got, sizeof got, error);
        }
        if (code) {
            return code;
        }
    }
}

static int serve_with_buffer(struct intake *intake, struct tm_error *error) {
    char *buffer = malloc((size_t)PAYLOAD * 2);
    int code = buffer ? serve(intake, buffer, error)
                      : tm_error_set(error, TM_NOMEM, ENOMEM, "malloc", "no memory for a stream's buffer");
    free(buffer);
    return code;
}

int tm_arrival_take(struct tm_arrival *arrival, int in, int out, int kind, struct tm_error *error) {
    struct intake intake = {.arrival = arrival, .in = in, .out = out, .kind = kind};
    return serve_with_buffer(&intake, error);
}

static void *intake_main(void *argument) {
    struct intake *intake = argument;
    struct tm_arrival *arrival = intake->arrival;
    struct tm_error error = {0};
    int code = serve_with_buffer(intake, &error);
    pthread_mutex_lock(&arrival->lock);
    if (intake->kind == TM_STREAM_DEMAND && arrival->demand_out == intake->out) {
        arrival->demand_out = -1;
    }
    if (code != TM_CANCELLED) {
        if (arrival->progress.lost++ == 0) {
            arrival->result = error;
            arrival->progress.code = code;
        }
    }
    pthread_cond_broadcast(&arrival->came);
    pthread_mutex_unlock(&arrival->lock);
    return NULL;
}

// ---- demands

int tm_arrival_ask(struct tm_arrival *arrival, uint64_t first, uint64_t n) {
    struct tm_frame want = {.magic = TM_FRAME_MAGIC,
                            .type = TM_FRAME_WANT,
                            .n_pages = (uint16_t)(n < TM_WANT_MOST ? n : TM_WANT_MOST),
                            .epoch = arrival->epoch,
                            .first = first,
                            .cookie = tm_now_ns()};
    pthread_mutex_lock(&arrival->lock);
    // Smaller than what any socket or pipe takes in one piece: all or nothing.
    int asked = arrival->demand_out >= 0 && write(arrival->demand_out, &want, sizeof want) == (ssize_t)sizeof want;
    pthread_mutex_unlock(&arrival->lock);
    if (asked) {
        tm_count(&arrival->progress.demand_requests, 1);
    }
    return asked;
}

int tm_arrival_require(struct tm_arrival *arrival, uint64_t first, uint64_t n, uint32_t timeout_ms) {
    const uint64_t *present = tm_spool_present(arrival->spool);
    struct timespec until;
    uint64_t until_ns = tm_now_ns() + timeout_ms * UINT64_C(1000000);
    until.tv_sec = (time_t)(until_ns / 1000000000u);
    until.tv_nsec = (long)(until_ns % 1000000000u);
    uint64_t asked_for = UINT64_MAX, end = first + n < arrival->n_pages ? first + n : arrival->n_pages;
    for (uint64_t page = first;;) {
        page = tm_bits_next(arrival->expected, page, end);
        if (page >= end) {
            return 1;
        }
        if (tm_bits_test(present, page)) {
            page++;
            continue;
        }
        if (asked_for != page && n <= TM_WANT_MOST) { // what is more comes by itself, and would come twice
            uint64_t run = tm_bits_next_clear(arrival->expected, page, end);
            uint64_t there = tm_bits_next(present, page, run);
            if (there == page) { // it has just come
                continue;
            }
            tm_arrival_ask(arrival, page, there - page);
            asked_for = page;
        }
        pthread_mutex_lock(&arrival->lock);
        int late = 0;
        while (!tm_bits_test(present, page) && !late) {
            late = pthread_cond_timedwait(&arrival->came, &arrival->lock, &until) == ETIMEDOUT;
        }
        pthread_mutex_unlock(&arrival->lock);
        if (!tm_bits_test(present, page)) {
            return 0;
        }
    }
}

// ---- what the filler sees

const uint64_t *tm_arrival_expected(const struct tm_arrival *arrival) { return arrival->expected; }

const uint64_t *tm_arrival_there(const struct tm_arrival *arrival) { return tm_spool_present(arrival->spool); }

int tm_arrival_fd(const struct tm_arrival *arrival) { return arrival->event_fd; }

uint32_t tm_arrival_generation(const struct tm_arrival *arrival) {
    return __atomic_load_n(&arrival->generation, __ATOMIC_ACQUIRE);
}

// ---- life

static int mark(uint64_t *bits, uint64_t n_pages, const struct tm_run *runs, uint64_t n, uint64_t *count,
                struct tm_error *error) {
    for (uint64_t i = 0; i < n; i++) {
        uint64_t end = i ? runs[i - 1].first + runs[i - 1].n : 0;
        if (runs[i].n == 0 || runs[i].first < end || runs[i].first >= n_pages || runs[i].n > n_pages - runs[i].first) {
            return breaks(error, "expected pages out of order or outside of the spool", runs[i].first);
        }
        tm_bits_set_range(bits, runs[i].first, runs[i].n);
        *count += runs[i].n;
    }
    return TM_OK;
}

// What is kept is expected, and there; the rest of what came early goes.
static int keep(struct tm_arrival *arrival, struct tm_error *error) {
    const uint64_t *present = tm_spool_present(arrival->spool);
    uint64_t pages = arrival->early_end;
    for (uint64_t i = 0; i < tm_bits_words(pages); i++) {
        if (arrival->claimed[i] & ~(arrival->expected[i] & present[i])) {
            return breaks(error, "a page that is said to have come has not", i * 64);
        }
    }
    for (uint64_t page = 0; (page = tm_bits_next(present, page, pages)) < pages;) {
        if (tm_bits_test(arrival->claimed, page)) {
            page = tm_bits_next_clear(arrival->claimed, page, pages);
            continue;
        }
        uint64_t end = tm_bits_next(arrival->claimed, page, tm_bits_next_clear(present, page, pages));
        int code = tm_spool_clear(arrival->spool, page, end - page, error);
        if (code) {
            return code;
        }
        page = end;
    }
    return TM_OK;
}

int tm_arrival_expect(struct tm_arrival *arrival, uint64_t n_pages, const struct tm_run *expected, uint64_t n_expected,
                      const struct tm_run *kept, uint64_t n_kept, struct tm_error *error) {
    uint64_t n = 0, there = 0;
    pthread_rwlock_wrlock(&arrival->placing);
    int code = is_early(arrival) ? TM_OK : breaks(error, "it has said what will come", 0);
    if (!code && n_pages > tm_spool_pages(arrival->spool)) {
        code = breaks(error, "more pages than were announced", n_pages);
    }
    if (!code && n_kept && kept[n_kept - 1].first + kept[n_kept - 1].n > arrival->early_end) {
        code = breaks(error, "a page that is said to have come has not", kept[n_kept - 1].first);
    }
    memset(arrival->claimed, 0, code ? 0 : tm_bits_words(arrival->early_end) * sizeof *arrival->claimed);
    code = code ? code : mark(arrival->expected, n_pages, expected, n_expected, &n, error);
    code = code ? code : mark(arrival->claimed, n_pages, kept, n_kept, &there, error);
    code = code ? code : keep(arrival, error);
    code = code ? code : tm_spool_cut(arrival->spool, n_pages, error);
    if (!code) {
        arrival->progress.expected = n;
        arrival->progress.sent = there;
        __atomic_store_n(&arrival->n_pages, n_pages, __ATOMIC_RELAXED);
        __atomic_store_n(&arrival->early, 0, __ATOMIC_RELEASE);
    }
    pthread_rwlock_unlock(&arrival->placing);
    return code;
}

int tm_arrival_create(struct tm_spool *spool, uint64_t early_most, uint32_t epoch, struct tm_arrival **out,
                      struct tm_error *error) {
    struct tm_arrival *arrival = calloc(1, sizeof *arrival);
    if (!arrival) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "calloc", "no memory");
    }
    arrival->spool = spool;
    arrival->n_pages = tm_spool_pages(spool);
    arrival->epoch = epoch;
    arrival->early = 1;
    arrival->early_most = early_most;
    arrival->demand_out = -1;
    pthread_rwlock_init(&arrival->placing, NULL);
    pthread_mutex_init(&arrival->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&arrival->came, &monotonic);
    pthread_condattr_destroy(&monotonic);
    arrival->quit_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    arrival->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    arrival->bits_bytes = tm_page_ceil(tm_bits_words(arrival->n_pages) * sizeof(uint64_t) + 1);
    char *bits =
        mmap(NULL, 2 * arrival->bits_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int code = TM_OK;
    if (arrival->quit_fd < 0 || arrival->event_fd < 0 || bits == MAP_FAILED) {
        code = tm_error_errno(error, "mmap", "no memory for the pages that are to come");
    }
    if (bits != MAP_FAILED) {
        arrival->expected = (uint64_t *)(void *)bits;
        arrival->claimed = (uint64_t *)(void *)(bits + arrival->bits_bytes);
    }
    if (code) {
        tm_arrival_destroy(arrival);
        return code;
    }
    *out = arrival;
    return TM_OK;
}

int tm_arrival_stream(struct tm_arrival *arrival, int in, int out, int kind, struct tm_error *error) {
    int code = TM_OK;
    pthread_mutex_lock(&arrival->lock);
    struct intake *intake = &arrival->intakes[arrival->n_intakes];
    if (arrival->n_intakes == TM_STREAMS) {
        code = tm_error_set(error, TM_SYS, EMFILE, "stream", "there are too many streams");
    } else if (tm_io_prepare(in, out)) {
        code = tm_error_errno(error, "fcntl", "a stream's descriptor cannot be used");
    } else {
        *intake = (struct intake){.arrival = arrival, .in = in, .out = out, .kind = kind};
        intake->index = (int)arrival->n_intakes;
        int err = tm_thread_start(&intake->thread, "tuimig-recv", intake_main, intake);
        code = err ? tm_error_set(error, TM_SYS, err, "pthread_create", "a stream cannot start") : TM_OK;
    }
    if (!code) {
        intake->running = 1;
        arrival->n_intakes++;
        arrival->progress.n_streams = arrival->n_intakes;
        if (kind == TM_STREAM_DEMAND) {
            arrival->demand_out = out;
            __atomic_fetch_add(&arrival->generation, 1, __ATOMIC_ACQ_REL);
        }
    }
    pthread_mutex_unlock(&arrival->lock);
    if (code) {
        close(in);
        if (out != in) {
            close(out);
        }
        return code;
    }
    eventfd_write(arrival->event_fd, 1);
    return TM_OK;
}

void tm_arrival_quit(struct tm_arrival *arrival) { eventfd_write(arrival->quit_fd, 1); }

void tm_arrival_stop(struct tm_arrival *arrival) {
    tm_arrival_quit(arrival);
    for (uint32_t i = 0; i < arrival->n_intakes; i++) {
        if (arrival->intakes[i].running) {
            pthread_join(arrival->intakes[i].thread, NULL);
        }
    }
    pthread_mutex_lock(&arrival->lock);
    for (uint32_t i = 0; i < arrival->n_intakes; i++) {
        struct intake *intake = &arrival->intakes[i];
        close(intake->in);
        if (intake->out != intake->in) {
            close(intake->out);
        }
    }
    arrival->n_intakes = 0;
    arrival->demand_out = -1;
    arrival->progress.lost = 0;
    arrival->progress.code = 0;
    pthread_mutex_unlock(&arrival->lock);
    eventfd_t ignored;
    eventfd_read(arrival->quit_fd, &ignored);
}

void tm_arrival_progress(struct tm_arrival *arrival, struct tm_stream_progress *out) {
    pthread_mutex_lock(&arrival->lock);
    tm_progress_read(&arrival->progress, out);
    pthread_mutex_unlock(&arrival->lock);
}

void tm_arrival_result(struct tm_arrival *arrival, struct tm_error *error) {
    pthread_mutex_lock(&arrival->lock);
    *error = arrival->result;
    pthread_mutex_unlock(&arrival->lock);
}

uint64_t tm_arrival_present(struct tm_arrival *arrival, struct tm_run *out, uint64_t most) {
    const uint64_t *present = tm_spool_present(arrival->spool);
    uint64_t n = 0;
    for (uint64_t page = 0;;) {
        page = tm_bits_next(present, page, arrival->n_pages);
        if (page == arrival->n_pages) {
            return n;
        }
        uint64_t end = tm_bits_next_clear(present, page, arrival->n_pages);
        if (n < most) {
            out[n] = (struct tm_run){page, end - page};
        }
        n++;
        page = end;
    }
}

void tm_arrival_round_trips(struct tm_arrival *arrival, struct tm_histogram *out) {
    pthread_mutex_lock(&arrival->lock);
    *out = arrival->trips;
    pthread_mutex_unlock(&arrival->lock);
}

void tm_arrival_destroy(struct tm_arrival *arrival) {
    if (!arrival) {
        return;
    }
    if (arrival->quit_fd >= 0) {
        tm_arrival_stop(arrival);
        close(arrival->quit_fd);
    }
    if (arrival->event_fd >= 0) {
        close(arrival->event_fd);
    }
    if (arrival->expected) {
        munmap(arrival->expected, 2 * arrival->bits_bytes);
    }
    pthread_rwlock_destroy(&arrival->placing);
    pthread_mutex_destroy(&arrival->lock);
    pthread_cond_destroy(&arrival->came);
    free(arrival);
}
