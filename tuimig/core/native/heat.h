// Which regions of a running target are being written: a measurement of its own, between tm_source_attach (with
// TM_TRACK_ASYNC) and tm_source_destroy. Two short stops; nothing is captured.
#ifndef TM_HEAT_H
#define TM_HEAT_H
#include "source.h"

struct tm_heat {      // one range of private anonymous memory
    uint64_t start;   // in: an address in it; out: where the mapping begins
    uint64_t end;     // out
    uint64_t written; // pages, out
    int32_t watched;  // 0: the kernel would not register it
    int32_t pad;
};

// Protect what is there. TM_PRIVILEGE: the kernel lacks what this needs.
int tm_source_heat_begin(struct tm_source *source, struct tm_heat *ranges, uint32_t n, struct tm_error *error);
// Count what was written since, and let go of the ranges.
int tm_source_heat_end(struct tm_source *source, struct tm_heat *ranges, uint32_t n, struct tm_error *error);

#endif
