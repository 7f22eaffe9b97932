// The source's end of the page streams. A page thread gives what the spool holds and nobody has been given yet, the urgent
// pages first; the demand thread answers demands on a stream of its own. At most a window of frames is on its way on a
// page stream, and the window shrinks when they begin to queue on the line, so that a demand never waits behind many.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checksum.h"
#include "sender_internal.h"

#define QUEUE_NS 3000000u // time a frame may wait on the line beyond the least it needs
#define HUGE_BLOCK (2ul << 20)
enum { AGAIN_MS = 1, PAYLOAD = TM_FRAME_PAGES_MOST * 4096 };

struct room { // a thread's buffers
    char frame[sizeof(struct tm_frame) + TM_FRAME_PAGES_MOST * sizeof(uint32_t) + PAYLOAD];
    char pages[PAYLOAD];
};

// ---- one frame of pages

static size_t head(const struct tm_sender *sender, uint8_t type, uint64_t first, uint64_t n, char *out,
                   uint64_t *content) {
    struct tm_frame *frame = (struct tm_frame *)(void *)out;
    uint32_t *sums = (uint32_t *)(void *)(out + sizeof *frame);
    *frame = (struct tm_frame){
        .magic = TM_FRAME_MAGIC, .type = type, .n_pages = (uint16_t)n, .epoch = sender->options.epoch, .first = first};
    const uint32_t *stored = tm_spool_sums(sender->spool);
    *content = 0;
    for (uint64_t i = 0; i < n; i++) {
        sums[i] = __atomic_load_n(&stored[first + i], __ATOMIC_RELAXED);
        *content += sums[i] > TM_SUM_ZERO;
    }
    frame->bytes = (uint32_t)(*content << TM_PAGE_SHIFT);
    return sizeof *frame + n * sizeof *sums;
}

// The content of the pages with a sum, one after the other.
static int gather(const struct tm_sender *sender, uint64_t first, uint64_t n, const uint32_t *sums, char *to,
                  struct tm_error *error) {
    for (uint64_t i = 0; i < n;) {
        uint64_t run = 0;
        while (i + run < n && sums[i + run] > TM_SUM_ZERO) {
            run++;
        }
        size_t left = run << TM_PAGE_SHIFT;
        off_t at = (off_t)((first + i) << TM_PAGE_SHIFT);
        while (left) {
            ssize_t got = pread(sender->file, to, left, at);
            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got <= 0) {
                return tm_error_set(error, TM_SYS, got ? errno : EIO, "pread", "captured pages could not be read");
            }
            to += got;
            at += got;
            left -= (size_t)got;
        }
        i += run ? run : 1;
    }
    return TM_OK;
}

static int send_runs(const struct outlet *outlet, uint64_t first, uint64_t n, const uint32_t *sums,
                     struct tm_error *error) {
    const struct tm_sender *sender = outlet->sender;
    for (uint64_t i = 0; i < n;) {
        uint64_t run = 0;
        while (i + run < n && sums[i + run] > TM_SUM_ZERO) {
            run++;
        }
        int code = run ? tm_io_send_file(outlet->out, sender->quit_fd, sender->file,
                                         (off_t)((first + i) << TM_PAGE_SHIFT), run << TM_PAGE_SHIFT, error)
                       : TM_OK;
        if (code) {
            return code;
        }
        i += run ? run : 1;
    }
    return TM_OK;
}

static int send_pages(struct outlet *outlet, uint8_t type, uint64_t first, uint64_t n, uint64_t cookie,
                      struct room *room, struct tm_error *error) {
    struct tm_sender *sender = outlet->sender;
    struct tm_frame *frame = (struct tm_frame *)(void *)room->frame;
    const uint32_t *sums = (const uint32_t *)(const void *)(room->frame + sizeof *frame);
    uint64_t content;
    size_t bytes = head(sender, type, first, n, room->frame, &content);
    frame->cookie = cookie;
    int code = TM_OK, whole = outlet->kind == TM_STREAM_DEMAND; // small: better in one piece
    if (sender->options.encoding != TM_RAW && content) {
        code = gather(sender, first, n, sums, room->pages, error);
        size_t packed = code ? 0
                             : tm_pack(sender->options.encoding, room->pages, content << TM_PAGE_SHIFT,
                                       room->frame + bytes, sizeof room->frame - bytes);
        if (packed) {
            tm_count(&sender->progress.packed_bytes, packed);
            tm_count(&sender->progress.unpacked_bytes, content << TM_PAGE_SHIFT);
            frame->encoding = (uint8_t)sender->options.encoding;
            frame->bytes = (uint32_t)packed;
            bytes += packed;
        }
        whole |= packed != 0;
    }
    if (!code && whole && frame->encoding == TM_RAW) {
        code = gather(sender, first, n, sums, room->frame + bytes, error);
        bytes += frame->bytes;
    }
    if (!code) {
        code = tm_io_write(outlet->out, sender->quit_fd, room->frame, bytes, error);
    }
    if (!code && !whole) {
        code = send_runs(outlet, first, n, sums, error);
        bytes += frame->bytes;
    }
    if (code) {
        return code;
    }
    tm_count(&sender->progress.zero_pages, n - content);
    tm_count(&sender->progress.bytes, bytes);
    tm_count(&sender->progress.stream_bytes[outlet->index], bytes);
    if (outlet->kind == TM_STREAM_DEMAND) {
        uint64_t fresh = 0, *given = tm_spool_given(sender->spool);
        for (uint64_t i = 0; i < n; i++) {
            fresh += (uint64_t)tm_bits_set(given, first + i);
        }
        tm_count(&sender->progress.sent, fresh);
        tm_count(&sender->progress.demand_pages, n);
    }
    return TM_OK;
}

// ---- the page streams

static uint64_t in_flight(const struct outlet *outlet) { return outlet->n_sent - outlet->n_confirmed; }

static void got_one(struct outlet *outlet, uint64_t cookie) {
    uint64_t took = tm_now_ns() - cookie;
    if (in_flight(outlet)) {
        __atomic_fetch_add(&outlet->n_confirmed, 1, __ATOMIC_SEQ_CST);
    }
    if (outlet->least_ns == 0 || took < outlet->least_ns) {
        outlet->least_ns = took;
    }
    if (took < outlet->least_ns + QUEUE_NS) {
        outlet->window += outlet->window < WINDOW_MOST ? 1 : 0;
    } else if (took > outlet->least_ns + 2ull * QUEUE_NS && outlet->window > 1) {
        outlet->window--;
    }
}

// Takes confirmations; waits for one at most timeout_ms.
static int take_got(struct outlet *outlet, int timeout_ms, struct tm_error *error) {
    const struct tm_sender *sender = outlet->sender;
    for (;;) {
        int ready = tm_io_wait(outlet->in, sender->quit_fd, timeout_ms);
        if (ready < 0) {
            return tm_error_set(error, TM_CANCELLED, 0, "stream", "the stream was ended");
        }
        if (ready == 0) {
            return TM_OK;
        }
        struct tm_frame frame;
        int code = tm_frame_read(outlet->in, sender->quit_fd, &frame, error);
        if (code) {
            return code;
        }
        if (frame.type != TM_FRAME_GOT) {
            return tm_error_set(error, TM_DAMAGED, 0, "stream", "the destination breaks the protocol");
        }
        if (frame.epoch == sender->options.epoch) {
            got_one(outlet, frame.cookie);
        }
        timeout_ms = 0;
    }
}

// Milliseconds to wait before the next frame may go.
static int pace(struct outlet *outlet, uint64_t bytes) {
    const struct tm_sender_options *options = &outlet->sender->options;
    if (options->bandwidth == 0) {
        return 0;
    }
    uint64_t share = options->bandwidth / (options->n_streams ? options->n_streams : 1), now = tm_now_ns();
    if (outlet->paced_ns < now) {
        outlet->paced_ns = now;
    }
    outlet->paced_ns += (uint64_t)((double)bytes * 1e9 / (double)(share ? share : 1));
    return (int)((outlet->paced_ns - now) / 1000000u);
}

static int wait_paced(struct outlet *outlet, int ms, struct tm_error *error) {
    uint64_t until = tm_now_ns() + (uint64_t)ms * 1000000u;
    int code = TM_OK;
    for (uint64_t now = tm_now_ns(); !code && now < until; now = tm_now_ns()) {
        code = take_got(outlet, (int)((until - now) / 1000000u) + 1, error);
    }
    return code;
}

// A frame of pages that this stream is to give, if there are any.
static int give_next(struct outlet *outlet, struct room *room, int *gave, struct tm_error *error) {
    struct tm_sender *sender = outlet->sender;
    struct tm_run *run = &outlet->on_way[outlet->n_sent % WINDOW_MOST];
    __atomic_fetch_add(&outlet->n_sent, 1, __ATOMIC_SEQ_CST); // first: who halts us sees that we may be about to give
    int stage = sender_stage(sender);
    int found = stage == SENDER_EXPECTED ? choose_expected(outlet, &run->first, &run->n)
                : stage == SENDER_EARLY  ? choose_early(outlet, &run->first, &run->n)
                                         : 0;
    *gave = found;
    if (!found) {
        __atomic_fetch_sub(&outlet->n_sent, 1, __ATOMIC_SEQ_CST);
        return TM_OK;
    }
    uint8_t type = stage == SENDER_EARLY ? TM_FRAME_EARLY : TM_FRAME_PAGES;
    int code = send_pages(outlet, type, run->first, run->n, tm_now_ns(), room, error);
    int ms = code || outlet->urgent ? 0 : pace(outlet, run->n << TM_PAGE_SHIFT);
    return ms ? wait_paced(outlet, ms, error) : code;
}

static int give(struct outlet *outlet, struct room *room, struct tm_error *error) {
    struct tm_sender *sender = outlet->sender;
    int gave, code = take_got(outlet, 0, error);
    while (!code && in_flight(outlet) >= outlet->window) {
        code = take_got(outlet, -1, error);
    }
    if (!code) {
        code = give_next(outlet, room, &gave, error);
    }
    if (code || gave) {
        return code;
    }
    if (sender_stage(sender) != SENDER_EXPECTED) {
        return take_got(outlet, AGAIN_MS, error);
    }
    int all = __atomic_load_n(&sender->progress.sent, __ATOMIC_RELAXED) >= sender->progress.expected;
    if (all && !outlet->told_done) {
        struct tm_frame done = {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_DONE, .epoch = sender->options.epoch};
        outlet->told_done = 1;
        return tm_io_write(outlet->out, sender->quit_fd, &done, sizeof done, error);
    }
    return take_got(outlet, all ? -1 : AGAIN_MS, error);
}

// ---- the demand stream

static int answer(struct outlet *outlet, const struct tm_frame *want, struct room *room, uint8_t *capture,
                  struct tm_error *error) {
    struct tm_sender *sender = outlet->sender;
    uint64_t first = want->first, n = want->n_pages;
    if (sender_stage(sender) != SENDER_EXPECTED || first >= sender->n_pages || n > sender->n_pages - first ||
        tm_bits_next_clear(sender->expected, first, first + n) != first + n) {
        return tm_error_set(error, TM_DAMAGED, 0, "stream", "the destination asks for pages that there are not");
    }
    const uint64_t *present = tm_spool_present(sender->spool);
    tm_count(&sender->progress.demand_requests, 1);
    if (tm_bits_next_clear(present, first, first + n) != first + n) {
        pthread_mutex_lock(&sender->lock);
        if (sender->source) {
            tm_source_capture_pages(sender->source, first, n, capture); // a failure is the capture's own to tell
        }
        pthread_mutex_unlock(&sender->lock);
    }
    for (uint64_t at = first; at < first + n;) {
        at = tm_bits_next(present, at, first + n);
        uint64_t end = tm_bits_next_clear(present, at, first + n);
        int code = end > at ? send_pages(outlet, TM_FRAME_PAGES, at, end - at, want->cookie, room, error) : TM_OK;
        if (code) {
            return code;
        }
        at = end;
    }
    return TM_OK;
}

static int serve_demands(struct outlet *outlet, struct room *room, struct tm_error *error) {
    uint8_t *capture = aligned_alloc(TM_PAGE_SIZE, HUGE_BLOCK);
    int code = capture ? TM_OK : tm_error_set(error, TM_NOMEM, ENOMEM, "malloc", "no memory for demands");
    while (!code) {
        struct tm_frame want;
        code = tm_frame_read(outlet->in, outlet->sender->quit_fd, &want, error);
        if (!code && want.type != TM_FRAME_WANT) {
            code = tm_error_set(error, TM_DAMAGED, 0, "stream", "the destination breaks the protocol");
        }
        if (!code && want.epoch == outlet->sender->options.epoch) {
            code = answer(outlet, &want, room, capture, error);
        }
    }
    free(capture);
    return code;
}

static void *outlet_main(void *argument) {
    struct outlet *outlet = argument;
    struct tm_sender *sender = outlet->sender;
    struct tm_error error = {0};
    struct room *room = malloc(sizeof *room);
    int code = room ? TM_OK : tm_error_set(&error, TM_NOMEM, ENOMEM, "malloc", "no memory for a stream's buffers");
    if (!code && outlet->kind == TM_STREAM_DEMAND) {
        code = serve_demands(outlet, room, &error);
    }
    while (!code) {
        code = give(outlet, room, &error);
    }
    free(room);
    if (code != TM_CANCELLED) {
        pthread_mutex_lock(&sender->lock);
        if (sender->progress.lost++ == 0) {
            sender->result = error;
            sender->progress.code = code;
        }
        pthread_mutex_unlock(&sender->lock);
    }
    return NULL;
}

// ---- life

int tm_sender_create(struct tm_spool *spool, const struct tm_sender_options *options, struct tm_sender **out,
                     struct tm_error *error) {
    int code = tm_encoding_check(options->encoding, error);
    if (code) {
        return code;
    }
    struct tm_sender *sender = calloc(1, sizeof *sender);
    if (!sender) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "calloc", "no memory");
    }
    pthread_mutex_init(&sender->lock, NULL);
    sender->spool = spool;
    sender->file = tm_spool_file(spool);
    sender->n_pages = tm_spool_room(spool);
    sender->options = *options;
    sender->stage = SENDER_HALTED;
    sender->quit_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    size_t each = tm_page_ceil(tm_bits_words(sender->n_pages) * sizeof(uint64_t) + 1);
    sender->bits_bytes = 2 * each;
    void *bits =
        mmap(NULL, sender->bits_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (sender->quit_fd < 0 || bits == MAP_FAILED) {
        code = tm_error_errno(error, "mmap", "no memory to send %llu pages", (unsigned long long)sender->n_pages);
        sender->bits_bytes = 0;
        tm_sender_destroy(sender);
        return code;
    }
    sender->expected = bits;
    sender->urgent = sender->expected + each / sizeof(uint64_t);
    *out = sender;
    return TM_OK;
}

int tm_sender_stream(struct tm_sender *sender, int in, int out, int kind, struct tm_error *error) {
    int code = TM_OK;
    pthread_mutex_lock(&sender->lock);
    struct outlet *outlet = &sender->outlets[sender->n_outlets];
    if (sender->n_outlets == TM_STREAMS) {
        code = tm_error_set(error, TM_SYS, EMFILE, "stream", "there are too many streams");
    } else if (tm_io_prepare(in, out)) {
        code = tm_error_errno(error, "fcntl", "a stream's descriptor cannot be used");
    } else {
        *outlet = (struct outlet){.sender = sender, .in = in, .out = out, .kind = kind, .window = WINDOW_FIRST};
        outlet->index = (int)sender->n_outlets;
        for (uint32_t i = 0; i < sender->n_outlets; i++) {
            outlet->lane += sender->outlets[i].kind == TM_STREAM_PAGES;
        }
        const char *name = kind == TM_STREAM_DEMAND ? "tuimig-demand" : "tuimig-send";
        int err = tm_thread_start(&outlet->thread, name, outlet_main, outlet);
        code = err ? tm_error_set(error, TM_SYS, err, "pthread_create", "a stream cannot start") : TM_OK;
    }
    if (!code) {
        outlet->running = 1;
        sender->n_outlets++;
        sender->progress.n_streams = sender->n_outlets;
    } else {
        close(in);
        if (out != in) {
            close(out);
        }
    }
    pthread_mutex_unlock(&sender->lock);
    return code;
}

void tm_sender_urgent_only(struct tm_sender *sender, int only) {
    __atomic_store_n(&sender->urgent_only, only, __ATOMIC_RELEASE);
}

void tm_sender_source_over(struct tm_sender *sender) {
    pthread_mutex_lock(&sender->lock);
    sender->source = NULL;
    pthread_mutex_unlock(&sender->lock);
}

// What went over a stream before T0 and was not confirmed goes again.
static void take_back(struct outlet *outlet) {
    if (outlet->kind != TM_STREAM_PAGES || sender_stage(outlet->sender) == SENDER_EXPECTED) {
        return;
    }
    for (uint64_t i = outlet->n_confirmed; i < outlet->n_sent; i++) {
        const struct tm_run *run = &outlet->on_way[i % WINDOW_MOST];
        tm_bits_clear_range(tm_spool_given(outlet->sender->spool), run->first, run->n);
    }
}

void tm_sender_stop(struct tm_sender *sender) {
    eventfd_write(sender->quit_fd, 1);
    for (uint32_t i = 0; i < sender->n_outlets; i++) {
        struct outlet *outlet = &sender->outlets[i];
        if (outlet->running) {
            pthread_join(outlet->thread, NULL);
        }
        take_back(outlet);
        close(outlet->in);
        if (outlet->out != outlet->in) {
            close(outlet->out);
        }
    }
    pthread_mutex_lock(&sender->lock);
    sender->n_outlets = 0;
    sender->progress.lost = 0;
    sender->progress.code = 0;
    pthread_mutex_unlock(&sender->lock);
    eventfd_t ignored;
    eventfd_read(sender->quit_fd, &ignored);
}

void tm_sender_progress(struct tm_sender *sender, struct tm_stream_progress *out) {
    pthread_mutex_lock(&sender->lock);
    tm_progress_read(&sender->progress, out);
    pthread_mutex_unlock(&sender->lock);
}

void tm_sender_result(struct tm_sender *sender, struct tm_error *error) {
    pthread_mutex_lock(&sender->lock);
    *error = sender->result;
    pthread_mutex_unlock(&sender->lock);
}

void tm_sender_destroy(struct tm_sender *sender) {
    if (!sender) {
        return;
    }
    if (sender->quit_fd >= 0) {
        tm_sender_stop(sender);
        close(sender->quit_fd);
    }
    if (sender->bits_bytes) {
        munmap(sender->expected, sender->bits_bytes);
    }
    pthread_mutex_destroy(&sender->lock);
    free(sender->kept);
    free(sender);
}
