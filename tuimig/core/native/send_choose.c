// Which pages go next: what is there and nobody has been given yet, the urgent ones first. Before T0 a page may be stored
// again, and is given again then: the same stream gives it each time, so that the last one is also the last to arrive.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sender_internal.h"

#define LANE_SHIFT 10 // pages in a row that are one stream's, before T0

// What the spool has by now; more may come.
static uint64_t spool_end(const struct tm_sender *sender) {
    uint64_t pages = tm_spool_pages(sender->spool);
    return pages < sender->n_pages ? pages : sender->n_pages;
}

// The next run in [from, end) that is in `wanted` (null: any), there, and not given to anybody. It is ours when this
// returns 1.
static int claim(struct tm_sender *sender, const uint64_t *wanted, uint64_t from, uint64_t end, uint64_t *first,
                 uint64_t *n) {
    const uint64_t *present = tm_spool_present(sender->spool);
    uint64_t *given = tm_spool_given(sender->spool);
    for (uint64_t page = from; page < end; page++) {
        page = tm_bits_next(wanted ? wanted : present, page, end);
        if (page == end) {
            return 0;
        }
        if (!tm_bits_test(present, page)) {
            uint64_t there = tm_bits_next(present, page, end);
            page = there < end ? there - 1 : end - 1;
            continue;
        }
        if (tm_bits_test(given, page)) {
            page = tm_bits_next_clear(given, page, end) - 1;
            continue;
        }
        if (!tm_bits_set(given, page)) {
            continue;
        }
        *first = page;
        *n = 1;
        while (*n < TM_FRAME_PAGES_MOST && page + *n < end && (!wanted || tm_bits_test(wanted, page + *n)) &&
               tm_bits_test(present, page + *n) && tm_bits_set(given, page + *n)) {
            ++*n;
        }
        return 1;
    }
    return 0;
}

// ---- from T0 on

int choose_expected(struct outlet *outlet, uint64_t *first, uint64_t *n) {
    struct tm_sender *sender = outlet->sender;
    uint64_t pages = spool_end(sender);
    int found = claim(sender, sender->urgent, 0, pages, first, n);
    outlet->urgent = found;
    if (!found && __atomic_load_n(&sender->urgent_only, __ATOMIC_ACQUIRE)) {
        return 0;
    }
    if (!found) {
        found = claim(sender, sender->expected, outlet->cursor, pages, first, n) ||
                claim(sender, sender->expected, 0, outlet->cursor, first, n);
        outlet->cursor = found ? *first + *n : outlet->cursor;
    }
    if (found) {
        tm_count(&sender->progress.sent, *n);
    }
    return found;
}

// ---- before T0

// What has never been given counts against the most that the other side takes before T0. Returns how many may go.
static uint64_t may_give(struct tm_sender *sender, uint64_t first, uint64_t n) {
    for (uint64_t page = first; page < first + n; page++) {
        if (tm_bits_test(sender->expected, page)) {
            continue;
        }
        if (__atomic_fetch_add(&sender->progress.sent, 1, __ATOMIC_RELAXED) >= sender->early_most) {
            __atomic_fetch_sub(&sender->progress.sent, 1, __ATOMIC_RELAXED);
            tm_bits_clear_range(tm_spool_given(sender->spool), page, first + n - page);
            __atomic_store_n(&sender->early_full, 1, __ATOMIC_RELEASE);
            return page - first;
        }
        tm_bits_set(sender->expected, page);
    }
    return n;
}

int choose_early(struct outlet *outlet, uint64_t *first, uint64_t *n) {
    struct tm_sender *sender = outlet->sender;
    outlet->urgent = 0;
    uint64_t end = spool_end(sender), stripe = UINT64_C(1) << LANE_SHIFT;
    uint32_t lanes = sender->options.n_streams ? sender->options.n_streams : 1;
    uint64_t stripes = (end + stripe - 1) >> LANE_SHIFT, at = outlet->cursor >> LANE_SHIFT;
    for (uint64_t i = 0; i < stripes; i++, at++) {
        at = at < stripes ? at : 0;
        if (at % lanes != outlet->lane) {
            continue;
        }
        uint64_t from = at << LANE_SHIFT, to = from + stripe < end ? from + stripe : end;
        const uint64_t *wanted = __atomic_load_n(&sender->early_full, __ATOMIC_ACQUIRE) ? sender->expected : NULL;
        if (!claim(sender, wanted, from, to, first, n)) {
            continue;
        }
        outlet->cursor = from;
        *n = may_give(sender, *first, *n);
        if (*n) {
            return 1;
        }
    }
    return 0;
}

void tm_sender_early(struct tm_sender *sender, uint64_t most) {
    sender->early_most = most;
    sender->early_full = 0;
    __atomic_store_n(&sender->stage, SENDER_EARLY, __ATOMIC_SEQ_CST);
}

uint64_t tm_sender_backlog(const struct tm_sender *sender) {
    const uint64_t *present = tm_spool_present(sender->spool), *given = tm_spool_given(sender->spool);
    int full = __atomic_load_n(&sender->early_full, __ATOMIC_ACQUIRE); // then only what has gone once
    uint64_t words = present ? tm_bits_words(spool_end(sender)) : 0, pages = 0;
    for (uint64_t i = 0; i < words; i++) {
        uint64_t there = __atomic_load_n(&present[i], __ATOMIC_RELAXED);
        there &= full ? __atomic_load_n(&sender->expected[i], __ATOMIC_RELAXED) : UINT64_MAX;
        pages += (uint64_t)__builtin_popcountll(there & ~__atomic_load_n(&given[i], __ATOMIC_RELAXED));
    }
    return pages;
}

int tm_sender_halt(struct tm_sender *sender, uint32_t timeout_ms) {
    __atomic_store_n(&sender->stage, SENDER_HALTED, __ATOMIC_SEQ_CST);
    uint64_t until = tm_now_ns() + timeout_ms * UINT64_C(1000000);
    for (;;) {
        int quiet = 1, lost;
        pthread_mutex_lock(&sender->lock);
        for (uint32_t i = 0; i < sender->n_outlets; i++) {
            const struct outlet *outlet = &sender->outlets[i];
            quiet &= __atomic_load_n(&outlet->n_sent, __ATOMIC_SEQ_CST) ==
                     __atomic_load_n(&outlet->n_confirmed, __ATOMIC_SEQ_CST);
        }
        lost = sender->progress.lost != 0;
        pthread_mutex_unlock(&sender->lock);
        if (quiet || lost || tm_now_ns() >= until) {
            return quiet && !lost;
        }
        usleep(200);
    }
}

// ---- T0

static int mark(const struct tm_sender *sender, uint64_t *bits, const struct tm_run *runs, uint64_t n, uint64_t *count,
                struct tm_error *error) {
    for (uint64_t i = 0; i < n; i++) {
        if (runs[i].first > sender->n_pages || runs[i].n > sender->n_pages - runs[i].first) {
            return tm_error_set(error, TM_DAMAGED, 0, "stream", "pages outside of the spool");
        }
        tm_bits_set_range(bits, runs[i].first, runs[i].n);
        *count += runs[i].n;
    }
    return TM_OK;
}

static int keep(struct tm_sender *sender, uint64_t page, uint64_t n, uint64_t *room) {
    if (sender->n_kept == *room) {
        *room = *room ? *room * 2 : 256;
        struct tm_run *more = realloc(sender->kept, *room * sizeof *more);
        if (!more) {
            return ENOMEM;
        }
        sender->kept = more;
    }
    sender->kept[sender->n_kept++] = (struct tm_run){page, n};
    sender->progress.sent += n;
    return 0;
}

// Of the expected pages, those that the other side has as they are; nothing else counts as given.
static int keep_given(struct tm_sender *sender, struct tm_error *error) {
    uint64_t *given = tm_spool_given(sender->spool), room = 0, pages = spool_end(sender);
    uint64_t words = tm_bits_words(pages);
    for (uint64_t i = 0; i < words; i++) {
        if (given[i]) {
            __atomic_fetch_and(&given[i], sender->expected[i], __ATOMIC_ACQ_REL);
        }
    }
    for (uint64_t page = 0; (page = tm_bits_next(given, page, pages)) < pages;) {
        uint64_t end = tm_bits_next_clear(given, page, pages);
        if (keep(sender, page, end - page, &room)) {
            return tm_error_set(error, TM_NOMEM, ENOMEM, "realloc", "no memory for the list of pages that were sent");
        }
        page = end;
    }
    return TM_OK;
}

int tm_sender_expect(struct tm_sender *sender, struct tm_source *source, const struct tm_run *expected,
                     uint64_t n_expected, const struct tm_run *urgent, uint64_t n_urgent, struct tm_error *error) {
    if (sender->early_most) {
        memset(sender->expected, 0, tm_bits_words(spool_end(sender)) * sizeof *sender->expected);
    }
    uint64_t ignored = 0;
    sender->progress.expected = sender->progress.sent = 0;
    int code = mark(sender, sender->expected, expected, n_expected, &sender->progress.expected, error);
    code = code ? code : mark(sender, sender->urgent, urgent, n_urgent, &ignored, error);
    code = code || !sender->early_most ? code : keep_given(sender, error);
    if (code) {
        return code;
    }
    pthread_mutex_lock(&sender->lock);
    sender->source = source;
    pthread_mutex_unlock(&sender->lock);
    __atomic_store_n(&sender->stage, SENDER_EXPECTED, __ATOMIC_SEQ_CST);
    return TM_OK;
}

uint64_t tm_sender_kept(const struct tm_sender *sender, const struct tm_run **out) {
    *out = sender->kept;
    return sender->n_kept;
}

int tm_sender_had(struct tm_sender *sender, const struct tm_run *runs, uint64_t n, struct tm_error *error) {
    uint64_t *given = tm_spool_given(sender->spool);
    memset(given, 0, tm_bits_words(spool_end(sender)) * sizeof *given);
    uint64_t had = 0;
    int code = mark(sender, given, runs, n, &had, error);
    if (sender_stage(sender) == SENDER_EXPECTED) {
        sender->progress.sent = had;
    }
    return code;
}
