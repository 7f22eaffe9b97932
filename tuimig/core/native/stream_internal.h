// Internal to the page streams: the form of a frame, reading and writing that can be ended, compression.
#ifndef TM_STREAM_INTERNAL_H
#define TM_STREAM_INTERNAL_H
#include <pthread.h>
#include <stddef.h>
#include <sys/types.h>

#include "stream.h"
#include "util.h"

#define TM_FRAME_MAGIC 0x47504d54u // "TMPG", little endian like all of it

enum { TM_FRAME_PAGES_MOST = 64, TM_WANT_MOST = 64 };

enum tm_frame_type {
    TM_FRAME_PAGES = 1, // sums follow, then the payload: the pages with a sum above 1
    TM_FRAME_WANT = 2,  // to the source: these pages first
    TM_FRAME_GOT = 3,   // to the source: a frame of pages of a page stream was taken
    TM_FRAME_DONE = 4,  // to the destination: all expected pages were given
    TM_FRAME_EARLY = 5, // as PAGES, before T0: a page may come again
};

struct tm_frame {
    uint32_t magic;
    uint8_t type;
    uint8_t encoding;
    uint16_t n_pages;
    uint32_t epoch;
    uint32_t bytes; // of the payload
    uint64_t first;
    uint64_t cookie; // WANT's, given back with the pages; GOT's, of the frame that was taken
};

// ---- stream.c. All return TM_OK, TM_CANCELLED (quit), or TM_SYS with the error filled; descriptors do not block.
int tm_io_prepare(int in, int out);
int tm_io_read(int fd, int quit_fd, void *data, size_t bytes, struct tm_error *error);
int tm_io_write(int fd, int quit_fd, const void *data, size_t bytes, struct tm_error *error);
int tm_io_send_file(int fd, int quit_fd, int file, off_t at, size_t bytes, struct tm_error *error);
// 1: readable, 0: time is over, -1: quit.
int tm_io_wait(int fd, int quit_fd, int timeout_ms);
// One frame header, checked for what any frame must be. TM_DAMAGED: it is none.
int tm_frame_read(int fd, int quit_fd, struct tm_frame *frame, struct tm_error *error);

// ---- pack.c
// Returns the packed size, 0: it does not pay.
size_t tm_pack(int encoding, const void *from, size_t bytes, void *to, size_t room);
// 1: exactly `bytes` came out.
int tm_unpack(int encoding, const void *from, size_t packed, void *to, size_t bytes);

// ---- arrival.c, for the filler
const uint64_t *tm_arrival_expected(const struct tm_arrival *arrival);
const uint64_t *tm_arrival_there(const struct tm_arrival *arrival);
int tm_arrival_fd(const struct tm_arrival *arrival); // eventfd: something has come, or a stream has
// Changes with every new demand stream: what was asked before must be asked again.
uint32_t tm_arrival_generation(const struct tm_arrival *arrival);
void tm_arrival_quit(struct tm_arrival *arrival); // whoever waits in a stream's thread gives up
int tm_arrival_take(struct tm_arrival *arrival, int in, int out, int kind, struct tm_error *error); // in this thread
int tm_arrival_ask(struct tm_arrival *arrival, uint64_t first, uint64_t n); // never blocks; 1: asked

// ---- send_capture.c: pages of a running capture
int tm_source_capture_pages(struct tm_source *source, uint64_t first, uint64_t n, uint8_t *buffer);

static inline void tm_count(uint64_t *counter, uint64_t by) { __atomic_fetch_add(counter, by, __ATOMIC_RELAXED); }

// The counters as they are, while others count; the rest of it under the lock of whoever has it.
static inline void tm_progress_read(const struct tm_stream_progress *from, struct tm_stream_progress *out) {
    typedef uint64_t __attribute__((may_alias)) word;
    const word *words = (const word *)(const void *)from;
    word *to = (word *)(void *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++) {
        to[i] = __atomic_load_n(&words[i], __ATOMIC_RELAXED);
    }
}

#endif
