// One memory that is being filled: where in it the spool's pages belong, and which of them need nothing more. Follows
// what its process frees, unmaps, moves and forks. Owned by the filler's server thread.
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fill_internal.h"
#include "util.h"

#define WORD_BITS 64u

static uint64_t max_of(uint64_t a, uint64_t b) { return a > b ? a : b; }

static uint64_t min_of(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t pages_of(uint64_t bytes) { return bytes >> TM_PAGE_SHIFT; }

static uint64_t words(uint64_t pages) { return (pages + WORD_BITS - 1) / WORD_BITS; }

// ---- which pages are settled

int tm_space_is_settled(const struct tm_space *space, uint64_t page) {
    return (int)(space->settled[page / WORD_BITS] >> (page % WORD_BITS) & 1);
}

void tm_space_settle(struct tm_space *space, uint64_t page) {
    if (!tm_space_is_settled(space, page)) {
        space->settled[page / WORD_BITS] |= UINT64_C(1) << (page % WORD_BITS);
        space->left--;
    }
}

void tm_space_want(struct tm_space *space, uint64_t first, uint64_t n) {
    for (uint64_t at = first; at < first + n;) {
        uint64_t take = min_of(WORD_BITS - at % WORD_BITS, first + n - at);
        uint64_t mask = (take == WORD_BITS ? UINT64_MAX : (UINT64_C(1) << take) - 1) << (at % WORD_BITS);
        uint64_t *word = &space->settled[at / WORD_BITS];
        space->left += (uint64_t)__builtin_popcountll(*word & mask);
        *word &= ~mask;
        at += take;
    }
}

// First page in [page, end) whose bit, after the inversion by `invert`, is set.
static uint64_t next_bit(const struct tm_space *space, uint64_t page, uint64_t end, uint64_t invert) {
    while (page < end) {
        uint64_t word = (space->settled[page / WORD_BITS] ^ invert) >> (page % WORD_BITS);
        if (word) {
            return min_of(page + (uint64_t)__builtin_ctzll(word), end);
        }
        page = (page / WORD_BITS + 1) * WORD_BITS;
    }
    return end;
}

uint64_t tm_space_next_wanted(const struct tm_space *space, uint64_t page, uint64_t end) {
    return next_bit(space, page, end, UINT64_MAX);
}

uint64_t tm_space_next_settled(const struct tm_space *space, uint64_t page, uint64_t end) {
    return next_bit(space, page, end, 0);
}

// ---- extents

static int insert(struct tm_extents *list, uint32_t index, struct tm_extent extent) {
    if (list->n == list->room) {
        uint32_t room = list->room ? list->room * 2 : 16;
        struct tm_extent *grown = realloc(list->at, room * sizeof *grown);
        if (!grown) {
            return 0;
        }
        list->at = grown;
        list->room = room;
    }
    memmove(&list->at[index + 1], &list->at[index], (list->n - index) * sizeof extent);
    list->at[index] = extent;
    list->n++;
    return 1;
}

static void erase(struct tm_extents *list, uint32_t index) {
    list->n--;
    memmove(&list->at[index], &list->at[index + 1], (list->n - index) * sizeof *list->at);
}

// Index of the first extent that ends after address.
static uint32_t first_after(const struct tm_extents *list, uint64_t address) {
    uint32_t low = 0, high = list->n;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (list->at[middle].end <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

int tm_space_add(struct tm_space *space, struct tm_extent extent) {
    return insert(&space->extents, first_after(&space->extents, extent.start), extent);
}

const struct tm_extent *tm_space_at(const struct tm_space *space, uint64_t address) {
    uint32_t i = first_after(&space->extents, address);
    return i < space->extents.n && space->extents.at[i].start <= address ? &space->extents.at[i] : NULL;
}

const struct tm_extent *tm_space_of_page(const struct tm_space *space, uint64_t page) {
    for (uint32_t i = 0; i < space->extents.n; i++) {
        const struct tm_extent *extent = &space->extents.at[i];
        if (page >= extent->page && page - extent->page < pages_of(extent->end - extent->start)) {
            return extent;
        }
    }
    return NULL;
}

// The part of extent within [start, end), which it overlaps.
static struct tm_extent part_of(struct tm_extent extent, uint64_t start, uint64_t end) {
    uint64_t low = max_of(extent.start, start);
    extent.page += pages_of(low - extent.start);
    extent.start = low;
    extent.end = min_of(extent.end, end);
    return extent;
}

// Take [start, end) out of the table. What was there goes to `taken`, if given. Fresh extents stay where keep_fresh is.
static int cut(struct tm_space *space, uint64_t start, uint64_t end, int keep_fresh, struct tm_extents *taken) {
    struct tm_extents *list = &space->extents;
    uint32_t i = first_after(list, start);
    while (i < list->n && list->at[i].start < end) {
        struct tm_extent whole = list->at[i];
        if (keep_fresh && whole.fresh) {
            i++;
            continue;
        }
        if (taken && !insert(taken, taken->n, part_of(whole, start, end))) {
            return 0;
        }
        erase(list, i);
        if (whole.start < start && !insert(list, i++, part_of(whole, whole.start, start))) {
            return 0;
        }
        if (whole.end > end && !insert(list, i++, part_of(whole, end, whole.end))) {
            return 0;
        }
    }
    return 1;
}

// Remember the missing pages of an extent as they are now.
static int haunt(struct tm_space *space, const struct tm_extent *extent) {
    uint64_t end = extent->page + pages_of(extent->end - extent->start);
    uint64_t page = tm_space_next_wanted(space, extent->page, end);
    while (page < end) {
        uint64_t stop = tm_space_next_settled(space, page, end);
        struct tm_extent run = *extent;
        run.start = extent->start + ((page - extent->page) << TM_PAGE_SHIFT);
        run.end = extent->start + ((stop - extent->page) << TM_PAGE_SHIFT);
        run.page = page;
        if (!insert(&space->ghosts, space->ghosts.n, run)) {
            return 0;
        }
        page = tm_space_next_wanted(space, stop, end);
    }
    return 1;
}

// Its pages lie nowhere any more.
static void settle_extent(struct tm_space *space, const struct tm_extent *extent) {
    uint64_t end = extent->page + pages_of(extent->end - extent->start);
    for (uint64_t page = tm_space_next_wanted(space, extent->page, end); page < end;
         page = tm_space_next_wanted(space, page, end)) {
        tm_space_settle(space, page);
        space->gone++;
    }
}

static int drop(struct tm_space *space, uint64_t start, uint64_t end, int unmapped) {
    struct tm_extents taken = {0};
    int ok = cut(space, start, end, unmapped, &taken);
    for (uint32_t i = 0; i < taken.n; i++) {
        ok = ok && (!unmapped || haunt(space, &taken.at[i]));
        settle_extent(space, &taken.at[i]);
    }
    free(taken.at);
    return ok;
}

int tm_space_removed(struct tm_space *space, uint64_t start, uint64_t end) { return drop(space, start, end, 0); }

int tm_space_unmapped(struct tm_space *space, uint64_t start, uint64_t end) {
    // What was moved there a moment ago may have come after this: then it is still there, and if it is not, filling
    // will find that out.
    return drop(space, start, end, 1);
}

int tm_space_forget(struct tm_space *space, uint64_t start, uint64_t end) { return cut(space, start, end, 0, NULL); }

// Something else lies there now.
static int lay_ghosts(struct tm_space *space, uint64_t start, uint64_t end) {
    struct tm_extents before = space->ghosts;
    space->ghosts = (struct tm_extents){0};
    int ok = 1;
    for (uint32_t i = 0; i < before.n; i++) {
        struct tm_extent ghost = before.at[i];
        if (ghost.start < start) {
            ok = ok && insert(&space->ghosts, space->ghosts.n, part_of(ghost, ghost.start, min_of(ghost.end, start)));
        }
        if (ghost.end > end) {
            ok = ok && insert(&space->ghosts, space->ghosts.n, part_of(ghost, max_of(ghost.start, end), ghost.end));
        }
    }
    free(before.at);
    return ok;
}

int tm_space_moved(struct tm_space *space, uint64_t from, uint64_t to, uint64_t bytes) {
    struct tm_extents taken = {0};
    int ok = cut(space, from, from + bytes, 0, &taken) && drop(space, to, to + bytes, 0) &&
             (space->ghosts.n == 0 || lay_ghosts(space, to, to + bytes));
    for (uint32_t i = 0; ok && i < taken.n; i++) {
        struct tm_extent moved = taken.at[i];
        ok = haunt(space, &moved);
        moved.start = moved.start - from + to;
        moved.end = moved.end - from + to;
        moved.fresh = 1;
        ok = ok && tm_space_add(space, moved);
    }
    free(taken.at);
    return ok;
}

void tm_space_quiet(struct tm_space *space) {
    if (space->ghosts.n == 0) {
        return; // nothing is fresh without a ghost but what was filled before it moved
    }
    space->ghosts.n = 0;
    for (uint32_t i = 0; i < space->extents.n; i++) {
        space->extents.at[i].fresh = 0;
    }
}

// ---- whole spaces

struct tm_space *tm_space_create(int uffd, uint64_t n_pages) {
    struct tm_space *space = calloc(1, sizeof *space);
    if (!space) {
        return NULL;
    }
    space->uffd = uffd;
    space->n_pages = n_pages;
    space->window = TM_DEMAND_LEAST;
    space->expected = UINT64_MAX;
    space->settled = malloc(words(n_pages) * sizeof *space->settled + 1);
    if (!space->settled) {
        free(space);
        return NULL;
    }
    memset(space->settled, 0xff, words(n_pages) * sizeof *space->settled);
    return space;
}

// Add those parts of an extent that no other covers.
static int add_where_free(struct tm_space *space, struct tm_extent extent) {
    uint64_t start = extent.start;
    while (start < extent.end) {
        uint32_t i = first_after(&space->extents, start);
        uint64_t stop = extent.end;
        if (i < space->extents.n) {
            struct tm_extent other = space->extents.at[i];
            if (other.start <= start) {
                start = other.end;
                continue;
            }
            stop = min_of(stop, other.start);
        }
        struct tm_extent part = part_of(extent, start, stop);
        tm_space_want(space, part.page, pages_of(part.end - part.start));
        if (!tm_space_add(space, part)) {
            return 0;
        }
        start = stop;
    }
    return 1;
}

struct tm_space *tm_space_fork(const struct tm_space *parent, int uffd) {
    struct tm_space *space = tm_space_create(uffd, parent->n_pages);
    if (!space) {
        return NULL;
    }
    space->child = 1;
    space->left = parent->left;
    memcpy(space->settled, parent->settled, words(parent->n_pages) * sizeof *space->settled);
    int ok = 1;
    for (uint32_t i = 0; ok && i < parent->extents.n; i++) {
        ok = insert(&space->extents, i, parent->extents.at[i]);
    }
    for (uint32_t i = 0; ok && i < parent->ghosts.n; i++) {
        ok = add_where_free(space, parent->ghosts.at[i]);
    }
    if (!ok) {
        space->uffd = -1; // the caller still has it
        tm_space_destroy(space);
        return NULL;
    }
    return space;
}

void tm_space_destroy(struct tm_space *space) {
    if (!space) {
        return;
    }
    if (space->uffd >= 0) {
        close(space->uffd);
    }
    free(space->extents.at);
    free(space->ghosts.at);
    free(space->settled);
    free(space->waiters);
    free(space);
}
