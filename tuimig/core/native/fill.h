// The lazy filler: brings a copy's pages in from the spool, those it touches first, and follows the copy while it does:
// its forks, and what it unmaps, frees and moves. A guardian process sees to it that the copy never reads zeros where
// data belongs, even if the process that fills is killed. One thread calls; the filler's own threads do the work.
#ifndef TM_FILL_H
#define TM_FILL_H
#include "error.h"
#include "ring.h"
#include "spool.h"

struct tm_fill;

enum {
    TM_FILL_HUGE = 1,        // region flag: collapse into huge pages once filled
    TM_FILL_POISON = 1,      // option: a damaged page is poisoned (SIGBUS when touched); else the copy is killed
    TM_FILL_ON_DEMAND = 2,   // option: no background fill (tests)
    TM_FILL_NO_GUARDIAN = 4, // option: tests
};

struct tm_arrival; // stream.h

struct tm_fill_region {
    uint64_t start; // in the copy's memory, page aligned; private anonymous
    uint64_t end;
    uint64_t first_page; // page index in the spool
    int32_t region;      // index for fault records
    uint32_t flags;      // enum TM_FILL_HUGE
};

// Counters, readable at any time. Pages with content only: zero pages need no fill.
struct tm_fill_progress {
    uint64_t pages;            // to fill in the copy itself
    uint64_t filled;           // of these, by whatever way
    uint64_t gone;             // of these, freed by the copy before they were filled
    uint64_t demand_faults;    // served, in the copy and the children it forks
    uint64_t demand_pages;     // filled by them
    uint64_t zero_faults;      // of the faults, those answered by a zero page
    uint64_t background_pages; // filled in the background, in the copy and its children
    uint64_t child_pages;      // filled in children
    uint64_t children;         // forked while pages were missing
    uint64_t events;           // REMOVE, UNMAP, REMAP followed
    uint64_t damaged;          // stored pages that are not what was stored
    uint64_t guardians;        // started; more than one: one was killed
    uint64_t poisoned;         // pages that will never come
    uint64_t start_ns;         // CLOCK_MONOTONIC, 0: not started
    uint64_t end_ns;           // last page in, in the copy and in all its children; 0: not yet
    int32_t ended;             // 1: nothing more will be filled; tm_fill_result tells why
    int32_t code;              // enum tm_code once ended
};

// Registers the regions MISSING. uffd: of the copy's memory, made with TM_FILL_FEATURES (uffd.h); it is taken over, and is
// closed on failure too. pidfd: the copy's process, stays the caller's. The spool must outlive the filler.
int tm_fill_create(int uffd, int pidfd, struct tm_spool *spool, const struct tm_fill_region *regions,
                   uint32_t n_regions, uint32_t options, struct tm_fill **out, struct tm_error *error);

// The same for a spool that is still being written by an arrival, which must outlive the filler too: pages that have not
// come are asked for when they are touched, and filled when they are there.
int tm_fill_create_arriving(int uffd, int pidfd, struct tm_spool *spool, struct tm_arrival *arrival,
                            const struct tm_fill_region *regions, uint32_t n_regions, uint32_t options,
                            struct tm_fill **out, struct tm_error *error);

// No more pages will come: those that are missing are poisoned, whoever touches them gets SIGBUS. `poisoned` counts them.
void tm_fill_poison_missing(struct tm_fill *fill);

// Features to ask of UFFDIO_API for the uffd above.
uint64_t tm_fill_features(void);

// Before the copy runs: fill the pages at these addresses (others than registered ones are passed over), or all.
int tm_fill_now(struct tm_fill *fill, const uint64_t *addresses, uint32_t n, struct tm_error *error);
int tm_fill_all(struct tm_fill *fill, struct tm_error *error);

// Start guardian and threads. The copy may run once this has returned TM_OK.
int tm_fill_start(struct tm_fill *fill, struct tm_error *error);

void tm_fill_progress(const struct tm_fill *fill, struct tm_fill_progress *out);
struct tm_ring *tm_fill_ring(struct tm_fill *fill); // fault records; one consumer

// 1: ended within the time (negative: no limit), 0: not yet.
int tm_fill_wait(struct tm_fill *fill, int timeout_ms);

// Once ended: TM_OK, all is in or is not needed any more (the copy executes another program); TM_GONE, the copy ended
// first; TM_DAMAGED, TM_CANCELLED, ...: the copy was killed, since it cannot live without its pages.
int tm_fill_result(const struct tm_fill *fill, struct tm_error *error);

// Give up: the copy is killed if a page is missing; its children are where they touch a missing page (SIGBUS).
void tm_fill_cancel(struct tm_fill *fill);

// Cancels if not ended, joins, frees. Children that are not filled stay in the care of the guardian.
void tm_fill_destroy(struct tm_fill *fill);

#endif
