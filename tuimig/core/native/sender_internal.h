// Internal to the source's end of the page streams.
#ifndef TM_SENDER_INTERNAL_H
#define TM_SENDER_INTERNAL_H
#include "bits.h"
#include "stream_internal.h"

enum { WINDOW_MOST = 64, WINDOW_FIRST = 4 };

struct outlet { // one stream
    struct tm_sender *sender;
    int in, out, kind, index;
    uint32_t lane; // among the page streams
    pthread_t thread;
    int running;
    uint64_t cursor;
    struct tm_run on_way[WINDOW_MOST]; // not confirmed, in order; before T0
    uint64_t n_sent, n_confirmed;      // frames; atomic
    uint32_t window;
    uint64_t least_ns; // a frame's quickest round trip
    uint64_t paced_ns; // nothing before this moment, for the bandwidth
    int urgent;        // what it gives now is waited for
    int told_done;
};

enum sender_stage {
    SENDER_EARLY,   // T0 is not yet: whatever the spool holds is given, and given again when it changes
    SENDER_HALTED,  // nothing is given
    SENDER_EXPECTED // each expected page is given once
};

struct tm_sender {
    struct tm_spool *spool;
    int file;
    uint64_t n_pages;            // room, for pages that may come yet
    uint64_t *expected, *urgent; // one mapping; before T0 `expected` holds what was ever given
    size_t bits_bytes;
    uint64_t early_most;
    int early_full;      // so many have been given; atomic
    struct tm_run *kept; // expected pages that had been given before T0
    uint64_t n_kept;
    struct tm_sender_options options;
    int quit_fd;
    int stage;            // enum sender_stage; atomic
    int urgent_only;      // atomic: all else waits
    pthread_mutex_t lock; // streams, source, result
    struct tm_source *source;
    struct outlet outlets[TM_STREAMS];
    uint32_t n_outlets;
    struct tm_stream_progress progress;
    struct tm_error result;
};

static inline int sender_stage(const struct tm_sender *sender) {
    return __atomic_load_n(&sender->stage, __ATOMIC_SEQ_CST);
}

// ---- send_choose.c: the next pages for a page stream. 1: they are its to give.
int choose_expected(struct outlet *outlet, uint64_t *first, uint64_t *n);
int choose_early(struct outlet *outlet, uint64_t *first, uint64_t *n);

#endif
