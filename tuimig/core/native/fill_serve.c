// The server thread of the filler: reads messages, follows events, answers faults first and fills in the background in
// small steps between them. It alone touches the spaces. A page is looked up and filled with no message read in between,
// and the kernel refuses to fill while an event is unread, so a page never lands where it does not belong any more.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "checksum.h"
#include "fill_internal.h"
#include "util.h"

#define SPIN_NS 100000u        // after the last fault the next one is likely near
#define CHANGING_WAIT_NS 20000 // an event was read, its thread has not gone on yet
#define GUARDIAN_WATCH 4096u   // rounds of the loop

enum { MESSAGES = 32, POISON_STEP = 512 };

// ---- events

static int add_space(struct tm_fill *fill, struct tm_space *space) {
    if (fill->n_spaces == fill->spaces_room) {
        uint32_t room = fill->spaces_room ? fill->spaces_room * 2 : 8;
        struct tm_space **grown = realloc(fill->spaces, room * sizeof(struct tm_space *));
        if (!grown) {
            return 0;
        }
        fill->spaces = grown;
        fill->spaces_room = room;
    }
    fill->spaces[fill->n_spaces++] = space;
    return 1;
}

static int follow_fork(struct tm_fill *fill, const struct tm_space *parent, int uffd) {
    fcntl(uffd, F_SETFD, FD_CLOEXEC);
    fcntl(uffd, F_SETFL, O_RDWR | O_NONBLOCK);
    struct tm_space *child = tm_space_fork(parent, uffd);
    if (!child || !add_space(fill, child)) {
        return 0; // uffd stays open: closed, the child would read zeros
    }
    tm_fill_count(&fill->progress.children, 1);
    return 1;
}

static int follow(struct tm_fill *fill, struct tm_space *space, const struct uffd_msg *message) {
    if (message->event == UFFD_EVENT_FORK) {
        return follow_fork(fill, space, (int)message->arg.fork.ufd);
    }
    tm_fill_count(&fill->progress.events, 1);
    switch (message->event) {
        case UFFD_EVENT_REMOVE:
            return tm_space_removed(space, message->arg.remove.start, message->arg.remove.end);
        case UFFD_EVENT_UNMAP:
            return tm_space_unmapped(space, message->arg.remove.start, message->arg.remove.end);
        case UFFD_EVENT_REMAP:
            return tm_space_moved(space, message->arg.remap.from, message->arg.remap.to, message->arg.remap.len);
        default:
            return 0;
    }
}

static int queue_fault(struct tm_space *space, const struct uffd_msg *message, uint64_t now_ns) {
    if (space->n_waiters == space->waiters_room) {
        uint32_t room = space->waiters_room ? space->waiters_room * 2 : 16;
        struct tm_waiter *grown = realloc(space->waiters, room * sizeof *grown);
        if (!grown) {
            return 0;
        }
        space->waiters = grown;
        space->waiters_room = room;
    }
    space->waiters[space->n_waiters++] = (struct tm_waiter){
        .address = message->arg.pagefault.address,
        .time_ns = now_ns,
        .tid = (int32_t)message->arg.pagefault.feat.ptid,
    };
    return 1;
}

// Reads all that is there. Faults are only queued: the events among the messages come first.
static int receive(struct tm_fill *fill, struct tm_space *space, int *worked, struct tm_error *error) {
    struct uffd_msg messages[MESSAGES];
    for (;;) {
        ssize_t bytes = read(space->uffd, messages, sizeof messages);
        if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) {
            return TM_OK;
        }
        if (bytes < 0 && (errno == EMFILE || errno == ENFILE)) {
            return TM_OK; // no room for a child's descriptor: the fork waits until other children are done
        }
        if (bytes <= 0) {
            return tm_error_errno(error, "read userfaultfd", "the copy's faults cannot be read");
        }
        *worked = 1;
        uint64_t now_ns = tm_now_ns();
        size_t n = (size_t)bytes / sizeof messages[0];
        for (size_t i = 0; i < n; i++) {
            int ok = messages[i].event == UFFD_EVENT_PAGEFAULT ? queue_fault(space, &messages[i], now_ns)
                                                               : follow(fill, space, &messages[i]);
            if (!ok) {
                return tm_error_set(error, TM_NOMEM, ENOMEM, "userfaultfd event", "event %d cannot be followed",
                                    messages[i].event);
            }
        }
        if (n < MESSAGES) {
            return TM_OK;
        }
    }
}

// ---- pages

static void count_filled(struct tm_fill *fill, struct tm_space *space, uint64_t first, uint64_t n, uint64_t *counter) {
    for (uint64_t i = 0; i < n; i++) {
        tm_space_settle(space, first + i);
    }
    tm_fill_count(counter, n);
    if (space->child) {
        tm_fill_count(&fill->progress.child_pages, n);
    }
}

static int fill_failed(struct tm_error *error, uint64_t address) {
    int err = errno;
    tm_error_set(error, err == ENOMEM ? TM_NOMEM : TM_SYS, err, "UFFDIO_COPY", "a page of the copy cannot be filled");
    if (error) {
        error->address = address;
    }
    return err == ENOMEM ? TM_NOMEM : TM_SYS;
}

// A stored page that is not what was stored must not be seen: the one who touches it gets SIGBUS, or the copy ends.
static int damaged(struct tm_fill *fill, struct tm_space *space, uint64_t page, uint64_t address,
                   const struct tm_error *found, enum tm_uffd_outcome *outcome, struct tm_error *error) {
    if (fill->options & TM_FILL_POISON) {
        *outcome = tm_uffd_poison(space->uffd, address);
        if (*outcome != TM_UFFD_FAILED) {
            if (*outcome != TM_UFFD_CHANGING) {
                tm_space_settle(space, page);
                tm_fill_count(&fill->progress.damaged, 1);
            }
            return TM_OK;
        }
    }
    tm_fill_count(&fill->progress.damaged, 1);
    if (error) {
        *error = *found;
        error->code = TM_DAMAGED;
        error->address = address;
    }
    return TM_DAMAGED;
}

// The pages to fill with `page`: more at a time where faults go on one after the other.
static void choose_run(struct tm_space *space, const struct tm_extent *extent, uint64_t page, uint64_t *low,
                       uint64_t *high) {
    if (page == space->expected) {
        space->window = space->window < TM_DEMAND_PAGES / 2 ? space->window * 2 : TM_DEMAND_PAGES;
    } else {
        space->window = TM_DEMAND_LEAST;
    }
    uint64_t end = extent->page + ((extent->end - extent->start) >> TM_PAGE_SHIFT);
    uint64_t block = page / space->window * space->window;
    end = end < block + space->window ? end : block + space->window;
    *high = tm_space_next_settled(space, page, end);
    *low = page;
    while (*low > extent->page && *low > block && !tm_space_is_settled(space, *low - 1)) {
        --*low;
    }
    space->expected = *high;
}

// Asks upstream once, for what is missing of [low, high) from `page` on.
static void ask_for(struct tm_fill *fill, uint64_t page, uint64_t high, uint32_t *asked) {
    uint32_t generation = tm_arrival_generation(fill->arrival);
    uint64_t end = tm_bits_next(tm_arrival_there(fill->arrival), page, high);
    end = tm_bits_next_clear(tm_arrival_expected(fill->arrival), page, end);
    if (*asked != generation && tm_arrival_ask(fill->arrival, page, end - page)) {
        *asked = generation;
    }
}

// What there is around a page that has come: what was asked for with it, most likely.
static void there_around(const struct tm_fill *fill, const struct tm_space *space, const struct tm_extent *extent,
                         uint64_t page, uint64_t *low, uint64_t *high) {
    uint64_t end = extent->page + ((extent->end - extent->start) >> TM_PAGE_SHIFT);
    end = *high < end ? *high : end;
    end = tm_space_next_settled(space, page, end);
    *high = tm_bits_next_clear(tm_arrival_there(fill->arrival), page, end);
    uint64_t most = page;
    while (most > *low && tm_fill_has(fill, most - 1)) {
        most--;
    }
    *low = most;
}

static int fill_wanted(struct tm_fill *fill, struct tm_space *space, const struct tm_extent *extent, uint64_t page,
                       uint32_t *asked, uint64_t *pages, enum tm_uffd_outcome *outcome, struct tm_error *error) {
    uint64_t low = page, high = page + TM_DEMAND_PAGES;
    if (*asked == 0) {
        choose_run(space, extent, page, &low, &high);
    }
    if (fill->arrival) {
        if (!tm_fill_has(fill, page)) {
            ask_for(fill, page, high, asked);
            *outcome = TM_UFFD_ABSENT;
            return TM_OK;
        }
        there_around(fill, space, extent, page, &low, &high);
    }
    struct tm_error found;
    if (tm_spool_get(fill->spool, low, fill->demand, high - low, &found) != TM_OK) {
        low = page;
        high = page + 1;
        if (tm_spool_get(fill->spool, low, fill->demand, 1, &found) != TM_OK) {
            return damaged(fill, space, page, extent->start + ((page - extent->page) << TM_PAGE_SHIFT), &found, outcome,
                           error);
        }
    }
    uint64_t base = low;
    while (low < high) {
        uint64_t done, to = extent->start + ((low - extent->page) << TM_PAGE_SHIFT);
        *outcome = tm_uffd_copy(space->uffd, to, fill->demand + ((low - base) << TM_PAGE_SHIFT), high - low, &done);
        count_filled(fill, space, low, done, &fill->progress.demand_pages);
        *pages += done;
        low += done;
        if (*outcome == TM_UFFD_PRESENT) {
            tm_space_settle(space, low++);
        } else if (*outcome == TM_UFFD_UNMAPPED && !tm_space_is_settled(space, page) &&
                   (low != page || high != page + 1)) {
            low = page; // the run crosses the end of a mapping
            high = page + 1;
        } else {
            break;
        }
    }
    if (tm_space_is_settled(space, page) && *outcome != TM_UFFD_DEAD) {
        *outcome = TM_UFFD_DONE;
    }
    return *outcome == TM_UFFD_FAILED ? fill_failed(error, extent->start + ((page - extent->page) << TM_PAGE_SHIFT))
                                      : TM_OK;
}

int tm_fill_fault(struct tm_fill *fill, struct tm_space *space, uint64_t address, uint32_t *asked, uint64_t *pages,
                  int *zero, enum tm_uffd_outcome *outcome, struct tm_error *error) {
    address = tm_page_floor(address);
    *pages = 0;
    *zero = 0;
    int failed = TM_OK;
    const struct tm_extent *extent = tm_space_at(space, address);
    uint64_t page = extent ? extent->page + ((address - extent->start) >> TM_PAGE_SHIFT) : 0;
    if (extent && !tm_space_is_settled(space, page)) {
        failed = fill_wanted(fill, space, extent, page, asked, pages, outcome, error);
    } else {
        // Holes, what was freed, what grew. Also what was filled and is missing again: discarded by a call that sends no
        // event (MADV_GUARD_INSTALL), and zero since.
        *outcome = tm_uffd_zero(space->uffd, address);
        *zero = *outcome == TM_UFFD_DONE;
        if (extent && page == space->expected) {
            space->expected++; // a hole does not end a walk through memory
        }
        failed = *outcome == TM_UFFD_FAILED ? fill_failed(error, address) : TM_OK;
    }
    if (!failed && *outcome != TM_UFFD_CHANGING && *outcome != TM_UFFD_DEAD && *outcome != TM_UFFD_ABSENT) {
        tm_space_quiet(space);
        tm_uffd_wake(space->uffd, address, TM_PAGE_SIZE); // it may wait although the page was there already
    }
    return failed;
}

// ---- background

static int wanted_anywhere(const struct tm_fill *fill, uint64_t page) {
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        if (!tm_space_is_settled(fill->spaces[i], page)) {
            return 1;
        }
    }
    return 0;
}

static uint64_t next_wanted_anywhere(const struct tm_fill *fill, uint64_t page, uint64_t end) {
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        end = tm_space_next_wanted(fill->spaces[i], page, end);
    }
    return end;
}

// The next window of stored pages that some space still wants; goes round.
static int next_window(struct tm_fill *fill, uint64_t *first, uint64_t *n) {
    for (uint32_t tried = 0; tried <= fill->n_regions && fill->n_regions; tried++) {
        const struct tm_fill_region *region = &fill->regions[fill->cursor_region];
        uint64_t end = region->first_page + ((region->end - region->start) >> TM_PAGE_SHIFT);
        uint64_t page = fill->cursor_page > region->first_page ? fill->cursor_page : region->first_page;
        page = page < end ? next_wanted_anywhere(fill, page, end) : end;
        uint64_t there = end;
        if (fill->arrival && page < end) {
            const uint64_t *present = tm_arrival_there(fill->arrival);
            while (page < end && !tm_bits_test(present, page)) {
                page = next_wanted_anywhere(fill, tm_bits_next(present, page, end), end);
            }
            there = tm_bits_next_clear(present, page, end);
        }
        if (page < end) {
            uint64_t last = there - page > TM_PIECE_PAGES ? page + TM_PIECE_PAGES - 1 : there - 1;
            while (!wanted_anywhere(fill, last)) {
                last--;
            }
            *first = page;
            *n = last + 1 - page;
            fill->cursor_page = last + 1;
            return 1;
        }
        fill->cursor_region = (fill->cursor_region + 1) % fill->n_regions;
        fill->cursor_page = 0;
    }
    return 0;
}

// Fill one run of the piece in one space. *outcome tells of the first page after what was filled.
static int place_run(struct tm_fill *fill, struct tm_space *space, const struct tm_piece *piece, uint64_t page,
                     enum tm_uffd_outcome *outcome, struct tm_error *error) {
    const struct tm_extent *extent = tm_space_of_page(space, page);
    if (!extent) {
        tm_space_settle(space, page);
        space->gone++;
        *outcome = TM_UFFD_DONE;
        return TM_OK;
    }
    uint64_t to = extent->start + ((page - extent->page) << TM_PAGE_SHIFT);
    if (fill->arrival && fill->sums[page] <= TM_SUM_ZERO) { // reads as zero without our doing
        uint64_t zero = page + 1;
        while (zero < piece->first + piece->n && fill->sums[zero] <= TM_SUM_ZERO && tm_fill_has(fill, zero) &&
               !tm_space_is_settled(space, zero)) {
            zero++;
        }
        count_filled(fill, space, page, zero - page, &fill->progress.background_pages);
        *outcome = TM_UFFD_PRESENT;
        return TM_OK;
    }
    if (tm_piece_is_bad(piece, page)) {
        return damaged(fill, space, page, to, &piece->error, outcome, error);
    }
    uint64_t end = extent->page + ((extent->end - extent->start) >> TM_PAGE_SHIFT);
    end = end < page + TM_STEP_PAGES ? end : page + TM_STEP_PAGES;
    end = end < piece->first + piece->n ? end : piece->first + piece->n;
    end = tm_space_next_settled(space, page, end);
    uint64_t sound = page + 1;
    while (sound < end && !tm_piece_is_bad(piece, sound)) {
        sound++;
    }
    const char *data = piece->data + ((page - piece->first) << TM_PAGE_SHIFT);
    uint64_t done;
    *outcome = tm_uffd_copy(space->uffd, to, data, sound - page, &done);
    if (*outcome == TM_UFFD_UNMAPPED && done == 0 && sound - page > 1) { // the run crosses the end of a mapping
        *outcome = tm_uffd_copy(space->uffd, to, data, 1, &done);
    }
    if (*outcome == TM_UFFD_FAILED) {
        return fill_failed(error, to + (done << TM_PAGE_SHIFT));
    }
    count_filled(fill, space, page, done, &fill->progress.background_pages);
    if (*outcome == TM_UFFD_PRESENT) {
        tm_space_settle(space, page + done);
    } else if (*outcome == TM_UFFD_UNMAPPED && done == 0 && !tm_space_forget(space, to, to + TM_PAGE_SIZE)) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "fill", "no memory to follow the copy");
    }
    if (*outcome != TM_UFFD_CHANGING && *outcome != TM_UFFD_DEAD) {
        tm_space_quiet(space);
    }
    return TM_OK;
}

int tm_fill_step(struct tm_fill *fill, int wait, int *worked, struct tm_error *error) {
    uint64_t first, n;
    while (!tm_reader_is_full(&fill->reader) && next_window(fill, &first, &n)) {
        tm_reader_want(&fill->reader, first, n);
    }
    const struct tm_piece *piece = tm_reader_ready(&fill->reader, wait);
    if (!piece) {
        return TM_OK;
    }
    int wanted = 0;
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        struct tm_space *space = fill->spaces[i];
        uint64_t page = tm_space_next_wanted(space, piece->first, piece->first + piece->n);
        if (page == piece->first + piece->n) {
            continue;
        }
        wanted = 1;
        enum tm_uffd_outcome outcome;
        int failed = place_run(fill, space, piece, page, &outcome, error);
        if (failed) {
            return failed;
        }
        if (outcome == TM_UFFD_DEAD) {
            space->dead = 1;
        } else if (outcome != TM_UFFD_CHANGING) {
            *worked = 1;
            return TM_OK;
        }
    }
    if (!wanted) {
        tm_reader_release(&fill->reader);
        *worked = 1;
    }
    return TM_OK;
}

// ---- faults

static void record(struct tm_fill *fill, const struct tm_space *space, const struct tm_waiter *waiter, uint64_t pages,
                   int zero) {
    const struct tm_extent *extent = tm_space_at(space, waiter->address);
    fill->last_fault_ns = tm_now_ns();
    uint64_t latency_ns = fill->last_fault_ns - waiter->time_ns;
    struct tm_fault fault = {
        .time_ns = waiter->time_ns,
        .address = waiter->address,
        .latency_ns = latency_ns > UINT32_MAX ? UINT32_MAX : (uint32_t)latency_ns,
        .tid = waiter->tid,
        .region = extent ? extent->region : -1,
        .pages = (uint16_t)pages,
        .kind = TM_FAULT_MISSING,
    };
    tm_ring_push(fill->ring, &fault);
    tm_fill_count(&fill->progress.demand_faults, 1);
    tm_fill_count(&fill->progress.zero_faults, zero ? 1 : 0);
}

static int answer(struct tm_fill *fill, struct tm_space *space, struct tm_waiter *waiter, enum tm_uffd_outcome *outcome,
                  struct tm_error *error) {
    if (fill->lethal) {
        *outcome = tm_uffd_poison(space->uffd, tm_page_floor(waiter->address));
        if (*outcome != TM_UFFD_CHANGING) {
            tm_uffd_wake(space->uffd, tm_page_floor(waiter->address), TM_PAGE_SIZE);
        }
        return TM_OK;
    }
    uint64_t pages;
    int zero;
    int failed = tm_fill_fault(fill, space, waiter->address, &waiter->asked, &pages, &zero, outcome, error);
    if (!failed && *outcome != TM_UFFD_CHANGING && *outcome != TM_UFFD_ABSENT) {
        record(fill, space, waiter, pages, zero);
    }
    return failed;
}

// Answers what waits; what has to wait for an event stays queued.
static int answer_all(struct tm_fill *fill, struct tm_space *space, int *worked, int *changing,
                      struct tm_error *error) {
    uint32_t kept = 0, i = 0;
    int failed = TM_OK;
    for (; i < space->n_waiters && !failed && !space->dead; i++) {
        enum tm_uffd_outcome outcome;
        struct tm_waiter waiter = space->waiters[i];
        failed = answer(fill, space, &waiter, &outcome, error);
        if (failed || outcome == TM_UFFD_CHANGING || outcome == TM_UFFD_ABSENT) {
            space->waiters[kept++] = waiter;
            *changing |= outcome != TM_UFFD_ABSENT;
        } else {
            *worked = 1;
            space->dead = outcome == TM_UFFD_DEAD;
        }
    }
    for (; i < space->n_waiters; i++) {
        space->waiters[kept++] = space->waiters[i];
    }
    space->n_waiters = kept;
    return failed;
}

// ---- the loop

static void publish(struct tm_fill *fill, const struct tm_space *space) {
    if (!space->child) {
        uint64_t filled = fill->progress.pages - space->left - space->gone;
        __atomic_store_n(&fill->progress.gone, space->gone, __ATOMIC_RELAXED);
        __atomic_store_n(&fill->progress.filled, filled, __ATOMIC_RELAXED);
    }
}

// Lets go of spaces that are complete or gone.
static void sweep_spaces(struct tm_fill *fill) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        struct tm_space *space = fill->spaces[i];
        publish(fill, space);
        int over = space->dead;
        if (!over && (space->left == 0 || fill->lethal)) {
            // Not while an event is outstanding: a child forked a moment ago may want pages that are settled here.
            enum tm_uffd_outcome outcome = tm_uffd_probe(space->uffd);
            over = outcome == TM_UFFD_DEAD ||
                   (outcome != TM_UFFD_CHANGING && space->left == 0 && space->n_waiters == 0 && !fill->lethal);
        }
        if (!over) {
            fill->spaces[kept++] = space;
            continue;
        }
        if (!space->child) {
            tm_fill_copy_over(fill, space);
        }
        tm_space_destroy(space);
    }
    fill->n_spaces = kept;
}

static void fail(struct tm_fill *fill, const struct tm_error *error) {
    if (fill->lethal) {
        return;
    }
    fill->lethal = 1;
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        if (!fill->spaces[i]->child) {
            syscall(SYS_pidfd_send_signal, fill->copy_pidfd, SIGKILL, NULL, 0);
        }
    }
    tm_fill_end(fill, error);
}

// Ghosts are to live no longer than the doubt: soon after the last event nothing is outstanding.
static void forget_ghosts(struct tm_fill *fill, int *changing) {
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        struct tm_space *space = fill->spaces[i];
        if (space->ghosts.n == 0) {
            continue;
        }
        if (tm_uffd_probe(space->uffd) == TM_UFFD_CHANGING) {
            *changing = 1;
        } else {
            tm_space_quiet(space);
        }
    }
}

// Sleeps until there is something to do. 0: no memory for the poll set.
static int idle(struct tm_fill *fill, int changing) {
    enum { FIXED = 5 };
    struct pollfd *set = calloc(FIXED + fill->n_spaces, sizeof *set);
    if (!set) {
        return 0;
    }
    int fixed[FIXED] = {fill->quit_fd, fill->reader.ready_fd, fill->copy_pidfd, fill->guardian.pidfd,
                        fill->arrival ? tm_arrival_fd(fill->arrival) : -1};
    for (int i = 0; i < FIXED; i++) {
        set[i] = (struct pollfd){.fd = fixed[i], .events = POLLIN};
    }
    if (fill->copy_ended) {
        set[2].fd = -1; // it would be reported for ever
    }
    for (uint32_t i = 0; i < fill->n_spaces; i++) {
        set[FIXED + i] = (struct pollfd){.fd = fill->spaces[i]->uffd, .events = POLLIN};
    }
    struct timespec brief = {.tv_nsec = CHANGING_WAIT_NS};
    struct timespec probe = {.tv_nsec = 200000000}; // the end of a child shows only when it is asked for
    // Upstream: a demand that could not be sent is tried again.
    int by_asking = fill->arrival || fill->lethal || fill->n_spaces > 1 || fill->copy_over || fill->copy_ended;
    ppoll(set, FIXED + fill->n_spaces, changing ? &brief : by_asking ? &probe : NULL, NULL);
    eventfd_t ignored;
    eventfd_read(fill->reader.ready_fd, &ignored);
    eventfd_read(fill->quit_fd, &ignored);
    if (fill->arrival) {
        eventfd_read(tm_arrival_fd(fill->arrival), &ignored);
    }
    fill->copy_ended |= set[2].revents != 0;
    if (fill->copy_ended || by_asking) {
        for (uint32_t i = 0; i < fill->n_spaces; i++) {
            struct tm_space *space = fill->spaces[i];
            space->dead |= tm_uffd_probe(space->uffd) == TM_UFFD_DEAD;
        }
    }
    free(set);
    return 1;
}

// A guardian that was killed is replaced: both must be gone at once for the descriptors to be closed.
static int keep_guardian(struct tm_fill *fill, struct tm_error *error) {
    if (!fill->guarded || !tm_guardian_reap(&fill->guardian)) {
        return TM_OK;
    }
    tm_fill_count(&fill->progress.guardians, 1);
    return tm_guardian_start(&fill->guardian, error);
}

// A step at a time of what has not come and never will.
static void poison_missing(struct tm_fill *fill, int *worked, int *changing) {
    for (uint32_t i = 0; i < fill->n_spaces && fill->arrival; i++) {
        struct tm_space *space = fill->spaces[i];
        uint32_t done = 0;
        for (uint64_t page = 0; done < POISON_STEP && !space->dead; page++) {
            page = tm_space_next_wanted(space, page, fill->n_pages);
            if (page == fill->n_pages) {
                break;
            }
            if (tm_fill_has(fill, page)) {
                continue;
            }
            const struct tm_extent *extent = tm_space_of_page(space, page);
            enum tm_uffd_outcome outcome =
                extent ? tm_uffd_poison(space->uffd, extent->start + ((page - extent->page) << TM_PAGE_SHIFT))
                       : TM_UFFD_DONE;
            if (outcome == TM_UFFD_CHANGING) {
                *changing = 1;
                break;
            }
            space->dead |= outcome == TM_UFFD_DEAD;
            if (outcome == TM_UFFD_FAILED) { // a kernel without it: who touches the page must not read zeros
                __atomic_store_n(&fill->cancel, 1, __ATOMIC_RELEASE);
                return;
            }
            tm_space_settle(space, page);
            tm_fill_count(&fill->progress.poisoned, space->child ? 0 : 1);
            *worked = 1;
            done++;
        }
    }
}

static int round_of_service(struct tm_fill *fill, int *worked, int *changing, struct tm_error *error) {
    int failed = TM_OK;
    for (uint32_t i = 0; i < fill->n_spaces && !failed; i++) { // a fork makes the list longer
        struct tm_space *space = fill->spaces[i];
        failed = receive(fill, space, worked, error);
        if (!failed && space->n_waiters) {
            failed = answer_all(fill, space, worked, changing, error);
        }
    }
    forget_ghosts(fill, changing);
    if (!failed && __atomic_load_n(&fill->poison, __ATOMIC_ACQUIRE)) {
        poison_missing(fill, worked, changing);
    }
    sweep_spaces(fill);
    if (!failed && fill->n_spaces && !fill->lethal && !(fill->options & TM_FILL_ON_DEMAND)) {
        failed = tm_fill_step(fill, 0, worked, error);
        if (!failed && !*worked && tm_reader_ready(&fill->reader, 0)) {
            *changing = 1;
        }
    }
    return failed;
}

void *tm_fill_serve(void *argument) {
    struct tm_fill *fill = argument;
    for (uint32_t rounds = 0; !__atomic_load_n(&fill->quit, __ATOMIC_ACQUIRE); rounds++) {
        struct tm_error error = {0};
        int worked = 0, changing = 0;
        int failed = round_of_service(fill, &worked, &changing, &error);
        if (!failed && !fill->lethal && __atomic_load_n(&fill->cancel, __ATOMIC_ACQUIRE) && fill->n_spaces) {
            failed = tm_error_set(&error, TM_CANCELLED, 0, "fill", "the fill was given up; the copy was killed");
        }
        if (!failed && (rounds % GUARDIAN_WATCH == 0 || !worked)) {
            failed = keep_guardian(fill, &error);
        }
        if (failed) {
            fail(fill, &error);
            changing = fill->lethal;
        }
        if (fill->n_spaces == 0) {
            break;
        }
        if (!worked && (changing || tm_now_ns() - fill->last_fault_ns > SPIN_NS) && !idle(fill, changing)) {
            tm_error_set(&error, TM_NOMEM, ENOMEM, "poll", "no memory to wait for faults");
            fail(fill, &error);
        }
    }
    tm_fill_finish(fill);
    return NULL;
}
