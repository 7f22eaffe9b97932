// Internal to the filler: what its files share. One server thread owns all of it but the reader's slots, so that no
// event can come between looking up a page's address and filling it, and no lock is needed.
#ifndef TM_FILL_INTERNAL_H
#define TM_FILL_INTERNAL_H
#include <pthread.h>
#include <stddef.h>

#include "bits.h"
#include "fill.h"
#include "stream_internal.h"
#include "uffd.h"

// ---- fill_space.c: one memory (the copy's or a child's) and where in it the spool's pages belong

struct tm_extent {
    uint64_t start, end; // addresses
    uint64_t page;       // spool page at start
    int32_t region;
    int32_t fresh; // moved here since the last moment without outstanding events
};

struct tm_extents {
    struct tm_extent *at; // by address, without overlap (ghosts: in any order)
    uint32_t n, room;
};

struct tm_waiter {
    uint64_t address;
    uint64_t time_ns; // when its message was read
    int32_t tid;
    uint32_t asked; // generation of the demand stream that the page was asked on, 0: not yet
};

struct tm_space {
    int uffd; // -1: closed
    int child;
    int dead; // its process ended, or executes another program
    struct tm_extents extents;
    // Runs of missing pages unmapped or moved away since the last moment without outstanding events. Two threads' events
    // can be read in the other order than they happened: a child forked before still has them where they were.
    struct tm_extents ghosts;
    uint64_t *settled; // a bit a spool page: nothing more to do for it here
    uint64_t n_pages;  // of the spool
    uint64_t left;     // pages not settled
    uint64_t gone;     // settled because they lie nowhere any more
    struct tm_waiter *waiters;
    uint32_t n_waiters, waiters_room;
    uint64_t expected; // spool page after the last one that was filled on demand
    uint64_t window;   // pages to fill on the next fault
};

struct tm_space *tm_space_create(int uffd, uint64_t n_pages);
struct tm_space *tm_space_fork(const struct tm_space *parent, int uffd);
// Closes its userfaultfd, the only one: the kernel then takes all registrations away at once. One by one they would split
// mappings that have grown, and mremap over such a split fails.
void tm_space_destroy(struct tm_space *space);
int tm_space_add(struct tm_space *space, struct tm_extent extent); // 0: no memory, as in all below
const struct tm_extent *tm_space_at(const struct tm_space *space, uint64_t address);
const struct tm_extent *tm_space_of_page(const struct tm_space *space, uint64_t page);
int tm_space_removed(struct tm_space *space, uint64_t start, uint64_t end);  // reads as zero now
int tm_space_unmapped(struct tm_space *space, uint64_t start, uint64_t end); // is not there any more
int tm_space_moved(struct tm_space *space, uint64_t from, uint64_t to, uint64_t bytes);
int tm_space_forget(struct tm_space *space, uint64_t start, uint64_t end); // not there; its pages may be elsewhere
void tm_space_quiet(struct tm_space *space);                               // no event is outstanding
void tm_space_want(struct tm_space *space, uint64_t first, uint64_t n);
void tm_space_settle(struct tm_space *space, uint64_t page);
int tm_space_is_settled(const struct tm_space *space, uint64_t page);
uint64_t tm_space_next_wanted(const struct tm_space *space, uint64_t page, uint64_t end);  // end: none
uint64_t tm_space_next_settled(const struct tm_space *space, uint64_t page, uint64_t end); // end: none

// ---- fill_read.c: reads and checks pages ahead of the background fill

// Small enough to stay in the cache between reading, checking and filling.
enum { TM_PIECE_PAGES = 64, TM_PIECES = 8 };

struct tm_piece {
    uint64_t first, n;
    char *data;
    uint64_t bad[TM_PIECE_PAGES / 64]; // a bit a page: could not be read as it was stored
    struct tm_error error;             // of the first of them
    int state;                         // owned by the server, wanted, ready
};

struct tm_reader {
    struct tm_spool *spool;
    int checked; // its pages were checked when they came, and lie in memory: they are read at once, by no thread
    struct tm_piece piece[TM_PIECES];
    uint32_t next_wanted, next_ready; // counts, modulo TM_PIECES
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int quit;
    int running;
    int gentle;
    int ready_fd; // eventfd for the server's poll
    pthread_t thread;
};

int tm_reader_create(struct tm_reader *reader, struct tm_spool *spool, struct tm_error *error);
int tm_reader_start(struct tm_reader *reader, int gentle, struct tm_error *error); // gentle: nobody waits for it
void tm_reader_destroy(struct tm_reader *reader);
int tm_reader_is_full(struct tm_reader *reader); // all pieces are in use
void tm_reader_want(struct tm_reader *reader, uint64_t first, uint64_t n);
struct tm_piece *tm_reader_ready(struct tm_reader *reader, int wait); // the oldest wanted, null: not yet
void tm_reader_release(struct tm_reader *reader);                     // the piece that was ready
int tm_piece_is_bad(const struct tm_piece *piece, uint64_t page);

// ---- fill_guard.c: the guardian

struct tm_guard_control;

struct tm_guardian {
    struct tm_guard_control *control; // shared with it
    int pidfd;                        // of the guardian; -1: none
    int pid;
    int parent_pidfd, wake_fd;
};

int tm_guardian_create(struct tm_guardian *guardian, int uffd, int copy_pidfd, struct tm_error *error);
int tm_guardian_start(struct tm_guardian *guardian, struct tm_error *error);
void tm_guardian_copy_complete(struct tm_guardian *guardian); // the copy itself needs no care any more
void tm_guardian_dismiss(struct tm_guardian *guardian);       // all is in: it ends, and is reaped
void tm_guardian_take_over(struct tm_guardian *guardian);     // serve what is left by poison
int tm_guardian_reap(struct tm_guardian *guardian);           // 1: it had ended
void tm_guardian_destroy(struct tm_guardian *guardian);

// ---- fill.c, fill_serve.c

struct tm_fill {
    struct tm_spool *spool;
    struct tm_arrival *arrival; // null: all is in the spool
    const uint32_t *sums;
    uint64_t n_pages; // of the spool
    uint32_t options;
    struct tm_fill_region *regions; // by first_page
    uint32_t n_regions;
    int copy_pidfd;
    int quit_fd;
    char *demand; // buffer of TM_DEMAND_PAGES
    struct tm_space **spaces;
    uint32_t n_spaces, spaces_room;
    uint32_t cursor_region; // background fill goes round
    uint64_t cursor_page;
    struct tm_reader reader;
    struct tm_guardian guardian;
    struct tm_ring *ring;
    struct tm_fill_progress progress; // written by the server, by relaxed atomic stores
    struct tm_error result;           // valid once progress.ended
    uint64_t last_fault_ns;
    int copy_filled;
    struct tm_space *huge; // where the copy's pages lay when it was complete
    int lethal;            // failed: missing pages are poisoned when touched
    int copy_over;         // the copy's own space is let go
    int copy_ended;        // its process is
    int cancel, quit;      // asked by another thread
    int poison;            // likewise: what has not come never will
    int started, guarded;
    pthread_t server;
    pthread_mutex_t lock;
    pthread_cond_t ended;
};

enum { TM_DEMAND_PAGES = 16, TM_DEMAND_LEAST = 4, TM_STEP_PAGES = 16 };

static inline void tm_fill_count(uint64_t *counter, uint64_t by) { // one writer
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + by, __ATOMIC_RELAXED);
}

// Whether the page's content is in the spool.
static inline int tm_fill_has(const struct tm_fill *fill, uint64_t page) {
    return !fill->arrival || tm_bits_test(tm_arrival_there(fill->arrival), page);
}

// fill_serve.c
void *tm_fill_serve(void *fill); // the server thread
// One step of background fill. Anything but TM_OK: the fill has failed.
int tm_fill_step(struct tm_fill *fill, int wait, int *worked, struct tm_error *error);
// Answer one fault. *pages: filled; *zero: by a zero page.
// *asked: of the waiter, see there; TM_UFFD_ABSENT: the page is on its way.
int tm_fill_fault(struct tm_fill *fill, struct tm_space *space, uint64_t address, uint32_t *asked, uint64_t *pages,
                  int *zero, enum tm_uffd_outcome *outcome, struct tm_error *error);

// fill.c
void tm_fill_copy_over(struct tm_fill *fill, const struct tm_space *copy); // the copy's own space is let go
void tm_fill_finish(struct tm_fill *fill);                                 // the server is done
void tm_fill_end(struct tm_fill *fill, const struct tm_error *result);     // tell those who wait; first call counts

#endif
