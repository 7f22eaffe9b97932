// The fault handler: one thread that serves write-protect faults and reads events. It stays awake for a short while after the
// last fault, because a sleeping handler costs the writer three times as much, and sweeps in small steps meanwhile; then it
// sleeps in poll.
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "source_internal.h"

#define SPIN_NS 150000u
#define STORM_NS 25000u
#define NEAR (64ull << 10)
#define SWEEP_STEP (32ull << 10)

enum { QUEUE = 1024, BATCH = 16, WAITING = 64, RUN_LEAST = 1, RUN_MOST = 16, HUGE_BUFFER = 2 << 20 };

struct queued {
    struct uffd_msg message;
    uint64_t time_ns;
};

struct waiting { // a fault on a page that the sweep has in hand: it is woken by the sweep
    struct tm_fault record;
    const uint8_t *state;
};

struct handler_queue {
    struct queued *faults; // a ring: read while looking for events, served in order; each thread can have one here
    uint32_t capacity, head, n;
    struct waiting *waiting;
    uint32_t waiting_capacity, n_waiting;
    uint64_t last_end; // where the last fault's service ended
    uint32_t run;      // pages served a fault, by locality
    uint8_t *buffer;
    uint64_t piece_at, piece_end; // what it sweeps between two faults
};

static void event_seen(struct tm_source *source, const struct uffd_msg *message) {
    atomic_fetch_add(&source->events, 1);
    if (source->guarded) return; // what is in a call's way was captured at its entry
    uint64_t start, end;
    const char *what;
    if (message->event == UFFD_EVENT_REMAP) {
        start = message->arg.remap.from;
        end = start + message->arg.remap.len;
        what = "mremap";
        // What was moved there may be armed and would pass for the old content: any tracked page there is in doubt.
        uint64_t to = message->arg.remap.to, to_end = to + message->arg.remap.len;
        for (uint32_t i = 0; i < source->n_regions; i++)
            if (source->regions[i].state && source->regions[i].face.start < to_end &&
                source->regions[i].face.end > to) {
                start = to;
                end = to_end;
                goto lost;
            }
    } else {
        start = message->arg.remove.start;
        end = message->arg.remove.end;
        what = message->event == UFFD_EVENT_UNMAP ? "munmap" : "madvise";
    }
    if (!capture_needs(source, start, end)) return;
lost:;
    struct tm_error error;
    tm_error_set(&error, TM_LOST, 0, what, "the process freed %lx-%lx before it was captured", (unsigned long)start,
                 (unsigned long)end);
    error.address = start;
    capture_fail(source, &error);
}

static void record(struct tm_source *source, uint64_t time_ns, uint64_t address, int tid, int region, uint64_t pages) {
    struct tm_fault fault = {
        .time_ns = time_ns,
        .address = address,
        .latency_ns = (uint32_t)(tm_now_ns() - time_ns),
        .tid = tid,
        .region = region,
        .pages = (uint16_t)pages,
        .kind = TM_FAULT_WP,
    };
    tm_ring_push(source->ring, &fault);
}

// Faults near the last ones make the next service larger, others smaller, down to the page alone: scattered writers want to go
// on soon.
static void adapt(struct handler_queue *queue, uint64_t address) {
    bool near = address + NEAR >= queue->last_end && address <= queue->last_end + NEAR;
    if (near && queue->run < RUN_MOST) queue->run *= 2;
    if (!near && queue->run > RUN_LEAST) queue->run /= 2;
}

// An event that is not read because there is no room for faults would keep its thread, and our release, waiting for ever.
static bool queue_room(struct handler_queue *queue) {
    if (queue->n + BATCH <= queue->capacity) return true;
    struct queued *more = malloc(2ull * queue->capacity * sizeof *more);
    if (!more) return false;
    for (uint32_t i = 0; i < queue->n; i++) more[i] = queue->faults[(queue->head + i) % queue->capacity];
    free(queue->faults);
    queue->faults = more;
    queue->capacity *= 2;
    queue->head = 0;
    return true;
}

static bool waiting_room(struct handler_queue *queue) {
    if (queue->n_waiting < queue->waiting_capacity) return true;
    struct waiting *more = realloc(queue->waiting, 2ull * queue->waiting_capacity * sizeof *more);
    if (!more) return false;
    queue->waiting = more;
    queue->waiting_capacity *= 2;
    return true;
}

static bool page_in_hand(const uint8_t *state) {
    return (__atomic_load_n(state, __ATOMIC_ACQUIRE) & (uint8_t)~PAGE_HUGE) == PAGE_CLAIMED;
}

static void serve(struct tm_source *source, const struct uffd_msg *message, uint64_t time_ns) {
    struct handler_queue *queue = source->queue;
    uint64_t address = tm_page_floor(message->arg.pagefault.address);
    int tid = (int)message->arg.pagefault.feat.ptid;
    atomic_fetch_add_explicit(&source->wp_faults, 1, memory_order_relaxed);
    struct region *region = region_at(source, address);
    if (!region ||
        !region->state) { // moved by mremap; the event has failed the attempt, or the page was captured before
        capture_release_retry(source, address, address + TM_PAGE_SIZE, true);
        return;
    }
    int index = (int)(region - source->regions);
    atomic_fetch_add_explicit(&region->faults, 1, memory_order_relaxed);
    adapt(queue, address);
    uint64_t page = (address - region->face.start) >> TM_PAGE_SHIFT, first, n;
    uint64_t pages = (region->face.end - region->face.start) >> TM_PAGE_SHIFT;
    if (!capture_huge_block(region, page, &first, &n)) {
        first = page & ~(uint64_t)(queue->run - 1);
        n = queue->run < pages - first ? queue->run : pages - first;
    }
    uint64_t last = first + n;
    uint64_t got = capture_claim(region, page, last);
    if (got == 0) {
        const uint8_t *state = &region->state[page];
        if (page_in_hand(state) && waiting_room(queue)) {
            struct waiting *slot = &queue->waiting[queue->n_waiting++];
            slot->state = state;
            slot->record = (struct tm_fault){time_ns, address, 0, tid, index, 0, TM_FAULT_WP};
            return;
        }
        while (page_in_hand(state)) handler_read_events(source); // never release what is being read
        // Nothing to save any more (or the message came twice).
        capture_release_retry(source, address, address + TM_PAGE_SIZE, true);
        record(source, time_ns, address, tid, index, 0);
        return;
    }
    // Backwards too, so that the whole aligned block goes at once.
    while (page > first && capture_claim(region, page - 1, page)) {
        page--;
        got++;
    }
    capture_run(source, region, page, got, queue->buffer, true);
    atomic_fetch_add_explicit(&source->fault_pages, got, memory_order_relaxed);
    queue->last_end = region->face.start + ((page + got) << TM_PAGE_SHIFT);
    record(source, time_ns, address, tid, index, got);
    capture_check_done(source);
}

// Reads what is there. Faults are queued, events handled at once. Returns how many messages came.
static int read_messages(struct tm_source *source) {
    struct handler_queue *queue = source->queue;
    if (!queue_room(queue)) return 0;
    struct uffd_msg messages[BATCH];
    ssize_t size = read(source->uffd, messages, sizeof messages);
    if (size <= 0) return 0;
    int n = (int)((size_t)size / sizeof *messages);
    uint64_t time_ns = tm_now_ns();
    for (int i = 0; i < n; i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT) {
            event_seen(source, &messages[i]);
            continue;
        }
        queue->faults[(queue->head + queue->n++) % queue->capacity] = (struct queued){messages[i], time_ns};
    }
    return n;
}

void handler_read_events(struct tm_source *source) {
    if (read_messages(source) == 0) sched_yield();
}

static void waiting_check(struct tm_source *source) {
    struct handler_queue *queue = source->queue;
    for (uint32_t i = 0; i < queue->n_waiting;) {
        struct waiting *slot = &queue->waiting[i];
        uint8_t state = __atomic_load_n(slot->state, __ATOMIC_ACQUIRE) & (uint8_t)~PAGE_HUGE;
        if (state == PAGE_CLAIMED) {
            i++;
            continue;
        }
        if (state == PAGE_LOST)
            capture_release_retry(source, slot->record.address, slot->record.address + TM_PAGE_SIZE, true);
        slot->record.latency_ns = (uint32_t)(tm_now_ns() - slot->record.time_ns);
        tm_ring_push(source->ring, &slot->record);
        *slot = queue->waiting[--queue->n_waiting];
    }
}

static void sleep_until_wanted(struct tm_source *source) {
    struct pollfd set[2] = {{source->uffd, POLLIN, 0}, {source->wake_fd, POLLIN, 0}};
    // A page in the sweep's hands is looked at again soon, for the record's sake only.
    if (poll(set, 2, source->queue->n_waiting ? 1 : -1) > 0 && (set[1].revents & POLLIN)) {
        uint64_t ignored;
        if (read(source->wake_fd, &ignored, sizeof ignored) < 0) return;
    }
}

// Instead of only spinning for the next fault: a little of the sweep. False: nothing is left to take.
static bool sweep_a_little(struct tm_source *source, bool take_more) {
    struct handler_queue *queue = source->queue;
    if (queue->piece_at >= queue->piece_end) {
        if (!take_more || atomic_load(&source->phase) != PHASE_SWEEP) return false;
        if (atomic_load(&source->next_piece) >= source->n_pieces) return false;
        uint32_t index = atomic_fetch_add(&source->next_piece, 1);
        if (index >= source->n_pieces) return false;
        queue->piece_at = source->pieces[index].start;
        queue->piece_end = source->pieces[index].end;
    }
    uint64_t end = queue->piece_at + SWEEP_STEP < queue->piece_end ? queue->piece_at + SWEEP_STEP : queue->piece_end;
    capture_range(source, queue->piece_at, end, BY_HANDLER, queue->buffer);
    queue->piece_at = end;
    capture_check_done(source);
    return true;
}

static void queue_destroy(struct handler_queue *queue) {
    if (!queue) return;
    free(queue->buffer);
    free(queue->faults);
    free(queue->waiting);
    free(queue);
}

static struct handler_queue *queue_create(void) {
    struct handler_queue *queue = calloc(1, sizeof *queue);
    if (!queue) return NULL;
    queue->capacity = QUEUE;
    queue->waiting_capacity = WAITING;
    queue->run = RUN_LEAST;
    queue->buffer = aligned_alloc(TM_PAGE_SIZE, HUGE_BUFFER);
    queue->faults = calloc(QUEUE, sizeof *queue->faults);
    queue->waiting = calloc(WAITING, sizeof *queue->waiting);
    if (queue->buffer && queue->faults && queue->waiting) return queue;
    queue_destroy(queue);
    return NULL;
}

void *handler_main(void *argument) {
    struct tm_source *source = argument;
    struct handler_queue *queue = queue_create();
    if (!queue) {
        struct tm_error error;
        tm_error_set(&error, TM_NOMEM, ENOMEM, "malloc", "no memory for the fault handler");
        capture_fail(source, &error);
        return NULL;
    }
    source->queue = queue;
    uint64_t last = 0;
    while (atomic_load(&source->phase) != PHASE_QUIT) {
        uint64_t asked = atomic_load(&source->quiesce_asked);
        int n = read_messages(source);
        if (n > 0 || queue->n > 0) {
            while (queue->n > 0) {
                struct queued next = queue->faults[queue->head];
                queue->head = (queue->head + 1) % queue->capacity;
                queue->n--;
                serve(source, &next.message, next.time_ns);
                waiting_check(source);
            }
            if (n < BATCH) atomic_store(&source->quiesce_done, asked); // that was all there was
            last = tm_now_ns();
            atomic_store_explicit(&source->last_fault_ns, last, memory_order_relaxed);
            continue;
        }
        atomic_store(&source->quiesce_done, asked);
        waiting_check(source);
        uint64_t since = tm_now_ns() - last;
        bool soon = since < SPIN_NS;
        // In a storm the next fault is there before a step of the sweep would be done.
        if ((!soon || since > STORM_NS) && sweep_a_little(source, soon)) continue;
        if (soon)
            __builtin_ia32_pause();
        else
            sleep_until_wanted(source);
    }
    source->queue = NULL;
    queue_destroy(queue);
    return NULL;
}
