// Page streams between a source and a destination, in threads of their own. The sender gives what its spool holds and
// answers demands first, on a stream of their own; the arrival writes what comes into its spool, whose present bitmap the
// lazy filler goes by, and hands the filler's demands up. What is read from a stream is untrusted: every frame is
// bounded and checked against the expected pages (before T0: against their number) before anything is done with it.
#ifndef TM_STREAM_H
#define TM_STREAM_H
#include "error.h"
#include "ring.h"
#include "source.h"
#include "spool.h"

enum tm_encoding { TM_RAW = 0, TM_LZ4 = 1, TM_ZSTD = 2 };

enum tm_stream_kind { TM_STREAM_PAGES = 0, TM_STREAM_DEMAND = 1 };

enum { TM_STREAMS = 32 }; // most streams of a sender or an arrival, closed ones included

struct tm_run { // pages of the spool
    uint64_t first;
    uint64_t n;
};

struct tm_stream_progress {
    uint64_t expected;        // pages with content, of the whole transfer
    uint64_t sent;            // sender: pages given at least once; arrival: pages that are there; before T0 as well
    uint64_t bytes;           // on the wire, headers included, the streams' sum
    uint64_t demand_requests; // asked (arrival) or answered (sender)
    uint64_t demand_pages;
    uint64_t zero_pages;     // of `sent`, those without payload
    uint64_t packed_bytes;   // payload after compression, of compressed frames
    uint64_t unpacked_bytes; // the same before it
    uint64_t stream_bytes[32];
    uint32_t n_streams;
    int32_t lost; // streams that ended without being asked to
    int32_t code; // why the first of them did: TM_DAMAGED, the other side breaks the rules; TM_SYS, the connection
};

// ---- the source's end

// Of a freeze whose eager pages are stored: the runs of pages with content, ascending; fills at most `most` of them and
// returns how many there are; UINT64_MAX: no memory.
uint64_t tm_source_content(struct tm_source *source, int eager_only, struct tm_run *out, uint64_t most);

struct tm_sender;

struct tm_sender_options {
    uint32_t epoch;     // of the attempt; frames of another one are passed over
    int32_t encoding;   // enum tm_encoding
    uint64_t bandwidth; // bytes a second of all page streams but for urgent pages, 0: no limit
    uint32_t n_streams; // that share the bandwidth
};

// spool: tracked; it has pages, or room for them. Nothing is given until it is told what.
int tm_sender_create(struct tm_spool *spool, const struct tm_sender_options *options, struct tm_sender **out,
                     struct tm_error *error);
// Before T0: give what the spool holds, and again what is stored again; at most `most` different pages.
void tm_sender_early(struct tm_sender *sender, uint64_t most);
uint64_t tm_sender_backlog(const struct tm_sender *sender); // pages that are there and not given
// Give nothing more, and wait for the confirmation of what was given. 1: the other side has all of it.
int tm_sender_halt(struct tm_sender *sender, uint32_t timeout_ms);
// T0. expected: the pages that are or will be there; urgent: those of them that go first. source: captures what is asked
// for; may be null: everything is in the spool then. Of what was given early, expected pages stay given.
int tm_sender_expect(struct tm_sender *sender, struct tm_source *source, const struct tm_run *expected,
                     uint64_t n_expected, const struct tm_run *urgent, uint64_t n_urgent, struct tm_error *error);
// Those, in runs; valid as long as the sender.
uint64_t tm_sender_kept(const struct tm_sender *sender, const struct tm_run **out);
// Pages that the other side has already (instead of all that were given before).
int tm_sender_had(struct tm_sender *sender, const struct tm_run *runs, uint64_t n, struct tm_error *error);
// Starts serving a connection; the descriptors are taken over, also on failure. in and out may be the same number.
int tm_sender_stream(struct tm_sender *sender, int in, int out, int kind, struct tm_error *error);
// While `only`, no page goes but urgent ones and those that are asked for: they have the line and both hosts to themselves.
void tm_sender_urgent_only(struct tm_sender *sender, int only);
// The source is let go of: everything is in the spool from now on.
void tm_sender_source_over(struct tm_sender *sender);
// Ends all streams. The sender can take new ones; what was sent and not confirmed must be told by tm_sender_had.
void tm_sender_stop(struct tm_sender *sender);
void tm_sender_progress(struct tm_sender *sender, struct tm_stream_progress *out);
void tm_sender_result(struct tm_sender *sender, struct tm_error *error); // why the first stream was lost
void tm_sender_destroy(struct tm_sender *sender);

// ---- the destination's end

struct tm_arrival;

// spool: tracked and writable. early_most: so many different pages may come before it is told what to expect.
int tm_arrival_create(struct tm_spool *spool, uint64_t early_most, uint32_t epoch, struct tm_arrival **out,
                      struct tm_error *error);
// T0, once: the spool is cut to n_pages. expected: the pages that will come, ascending; kept: those of them that came early
// and are valid. All else that came early goes. TM_DAMAGED: the lists are none, or a kept page is not there.
int tm_arrival_expect(struct tm_arrival *arrival, uint64_t n_pages, const struct tm_run *expected, uint64_t n_expected,
                      const struct tm_run *kept, uint64_t n_kept, struct tm_error *error);
int tm_arrival_stream(struct tm_arrival *arrival, int in, int out, int kind, struct tm_error *error);
void tm_arrival_stop(struct tm_arrival *arrival); // ends all streams; it can take new ones
// Wait until the expected pages of a range are there, asking for them. 1: they are, 0: not yet.
int tm_arrival_require(struct tm_arrival *arrival, uint64_t first, uint64_t n, uint32_t timeout_ms);
void tm_arrival_progress(struct tm_arrival *arrival, struct tm_stream_progress *out);
void tm_arrival_result(struct tm_arrival *arrival, struct tm_error *error);
// Runs of expected pages that are there, ascending; fills at most `most` of them and returns how many there are.
uint64_t tm_arrival_present(struct tm_arrival *arrival, struct tm_run *out, uint64_t most);
void tm_arrival_round_trips(struct tm_arrival *arrival, struct tm_histogram *out); // asked to arrived
void tm_arrival_destroy(struct tm_arrival *arrival);

// Whether this host can compress so: TM_OK, or the library that is missing.
int tm_encoding_check(int encoding, struct tm_error *error);

#endif
