// The source side: hold a running process, freeze it for T0, capture its memory copy-on-write while it runs on.
// One tm_source a target. Every call may be made from any one thread at a time; ptrace itself happens on a thread of the
// engine's own. Killing this process at any moment leaves the target running as if nothing had happened.
#ifndef TM_SOURCE_H
#define TM_SOURCE_H
#include "ring.h"
#include "spool.h"

struct tm_source;

enum tm_treatment { TM_NONE = 0, TM_EAGER = 1, TM_PROTECTED = 2 };

enum tm_track { TM_TRACK_NONE = 0, TM_TRACK_ASYNC = 1, TM_TRACK_SYNC = 2 };

struct tm_round {      // one round of pre-copy, or as far as it has come
    uint64_t tracked;  // bytes of address space
    uint64_t dirty;    // pages written since they were read; in the first round all that is populated
    uint64_t copied;   // pages
    uint64_t hot;      // pages dirty in every round: left to the end
    uint64_t zero;     // of those copied
    uint64_t since_ns; // from the last round's begin to this one's
    uint64_t scan_ns;
    uint64_t copy_ns;
    uint64_t total_ns;
    int32_t number; // from 0
    int32_t complete;
};

enum tm_kind { // values are model.Kind in order
    TM_HEAP = 0,
    TM_STACK = 1,
    TM_ANON = 2,
    TM_FILE = 3,
    TM_DELETED = 4,
    TM_SHARED_ANON = 5,
    TM_SHARED_FILE = 6,
    TM_KERNEL = 7,
    TM_DEVICE = 8,
};

// What the policy said of one range. Ascending, not overlapping. What appears between the look and the freeze takes the
// treatment of the range it overlaps, else that of its class, else that of its size.
struct tm_range {
    uint64_t start;
    uint64_t end;
    int32_t treatment;
    int32_t pad;
};

enum tm_probe_kind {
    TM_PROBE_CALL = 1,
    TM_PROBE_CALL_EACH = 2,
    TM_PROBE_FILE = 3,
    TM_PROBE_TEE = 4,
    TM_PROBE_PEEK = 5
};

struct tm_probe {
    int32_t kind; // enum tm_probe_kind
    int32_t nr;
    uint64_t args[6]; // UINT64_MAX: address of the call's buffer
    int32_t fd;
    uint32_t data_size;  // put in the buffer first
    uint32_t out_size;   // bytes wanted back; CALL: at most 1024
    const char *path;    // FILE
    const uint8_t *data; // data_size bytes
};

struct tm_answer {
    int64_t ret; // the call's value, or -errno
    const uint8_t *data;
    uint64_t size;
    int32_t given; // by a chain of calls; else it is asked by itself
};

struct tm_freeze_plan {
    const struct tm_range *ranges;
    uint32_t n_ranges;
    uint32_t n_probes;
    const struct tm_probe *probes;
    uint64_t eager_below;       // bytes
    int32_t class_treatment[3]; // heap, stack, anon; -1: no rule
    int32_t guarded;            // under system call stops
    int32_t verify;             // hash every page inside the freeze
    int32_t hold;               // no thaw: it stays stopped until the end, and nothing needs protection
    uint32_t deadline_us;       // for stopping all threads
    uint64_t eager_estimate;    // bytes expected to be copied inside the freeze
    uint64_t dirty_most;        // pages that may be left for it after pre-copy; 0: any number
    struct tm_spool *spool;     // must outlive the attempt
};

struct tm_thread_state {
    int32_t tid; // host
    uint32_t xstate_size;
    uint8_t regs[216]; // struct user_regs_struct
    const uint8_t *xstate;
    uint64_t sigmask;
    uint64_t robust_head;
    uint64_t robust_len;
    uint64_t rseq_pointer;
    uint32_t rseq_size;
    uint32_t rseq_signature;
    uint32_t rseq_flags;
    uint32_t n_pending;
    const uint8_t *pending; // n_pending siginfo images of 128 bytes, the thread's own queue
    char comm[20];
};

struct tm_region_state {
    uint64_t start;
    uint64_t end;
    uint64_t offset; // in the file
    uint64_t inode;
    uint32_t dev_major;
    uint32_t dev_minor;
    char perms[8];
    int32_t kind;      // enum tm_kind
    int32_t treatment; // enum tm_treatment
    uint64_t slot;     // byte offset in the spool, UINT64_MAX: none
    uint64_t tracked;  // pages captured after T0
    int32_t planned;   // index of the plan's range it came from, -1: appeared since
    int32_t huge;      // has transparent huge pages
    const char *path;
};

struct tm_descriptor_state {
    int32_t number;
    int32_t same_as; // lowest number with the same open file description
    const char *link;
    const char *info; // fdinfo's text
};

struct tm_frozen_times { // nanoseconds; t0 on CLOCK_MONOTONIC, the rest durations of the freeze's parts
    uint64_t t0_monotonic;
    uint64_t t0_boottime;
    uint64_t t0_realtime;
    uint64_t frozen; // first interrupt to last continue
    uint64_t stop;
    uint64_t threads;
    uint64_t calls;  // injected
    uint64_t probes; // files and queues
    uint64_t descriptors;
    uint64_t maps;
    uint64_t eager; // copying, as far as it was waited for
    uint64_t proof; // which copies of the rounds are valid, likewise
    uint64_t dirty; // copying what is not
    uint64_t scan;
    uint64_t arm;
    uint64_t verify;
    uint64_t thaw;
    uint64_t release; // after the capture: the descriptors are closed
    uint64_t stops;   // short stops outside of the freeze, to register and unregister
    uint64_t n_stops;
};

struct tm_source_progress {
    uint64_t pages_total; // content: eager and tracked
    uint64_t pages_done;
    uint64_t wp_faults;
    uint64_t swept_pages;
    uint64_t zero_pages;
    uint64_t fault_pages;
    uint64_t guard_stops;
    uint64_t eager_pages;
    uint64_t events;
    uint64_t verified_pages;
    uint64_t precopied_pages; // valid copies of the rounds at T0
    uint64_t dirty_pages;     // copied inside the freeze since they were not
    int32_t state;            // enum tm_source_state
    int32_t eager_stored;     // 1: the eager pages are in the spool
};

enum tm_source_state { TM_IDLE = 0, TM_CAPTURING = 1, TM_CAPTURED = 2, TM_FAILED = 3 };

// Look for what injection needs, pin the identity by pidfd (kept by the caller), start the tracer thread.
int tm_source_create(int32_t pid, int pidfd, struct tm_source **out, struct tm_error *error);
// Ends whatever goes on (as tm_source_end with failure) and frees everything. The target runs on.
void tm_source_destroy(struct tm_source *source);

// One short stop of one thread: make a userfaultfd of the target's memory and take it. dev_fd: an open /dev/userfaultfd for
// targets that may not make one themselves, or -1. track: what is to follow its writes before T0; *tracked: what does.
int tm_source_attach(struct tm_source *source, int dev_fd, int32_t track, int32_t *tracked, struct tm_error *error);

// A slice of a round of pre-copy, about so long (0: all of it): copies what was written since the last round, while the target
// runs. The first begins with everything. The plan's ranges and its spool must outlive the attempt.
int tm_source_round(struct tm_source *source, const struct tm_freeze_plan *plan, uint32_t slice_ms,
                    struct tm_round *out, struct tm_error *error);
// Let the regions that are written most end in the window after T0, so that in the last round at most `pages` were dirty in the
// others. *given_up: their bytes.
int tm_source_give_up(struct tm_source *source, uint64_t pages, uint64_t *given_up, struct tm_error *error);

// Freeze, T0, thaw; capture goes on in the engine's threads. May be called again after tm_source_end.
int tm_source_freeze(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error);

// Results of the last freeze; valid until the next freeze or destroy.
uint32_t tm_source_threads(const struct tm_source *source, const struct tm_thread_state **out);
uint32_t tm_source_regions(const struct tm_source *source, const struct tm_region_state **out);
uint32_t tm_source_descriptors(const struct tm_source *source, const struct tm_descriptor_state **out);
uint32_t tm_source_shared_pending(const struct tm_source *source, const uint8_t **out);
const struct tm_answer *tm_source_answer(const struct tm_source *source, uint32_t probe, uint32_t thread);
void tm_source_times(const struct tm_source *source, struct tm_frozen_times *out);

void tm_source_progress(const struct tm_source *source, struct tm_source_progress *out);
struct tm_ring *tm_source_ring(struct tm_source *source);
// Fault counts by region: out[i] for region i of the last freeze.
void tm_source_region_faults(const struct tm_source *source, uint32_t *out, uint32_t n);
void tm_source_region_done(const struct tm_source *source, uint64_t *out, uint32_t n);

// Wait until captured or failed, at most timeout_ms. 0 and state in progress; or the failure.
int tm_source_wait(struct tm_source *source, uint32_t timeout_ms, struct tm_error *error);

// End the attempt: last checks (where it was captured), unregister, let go of every thread. 0 only if every page was captured
// exactly. The userfaultfd is kept for another attempt.
int tm_source_end(struct tm_source *source, struct tm_error *error);

// With verify, after tm_source_end: compares what was captured with what was hashed at T0.
int tm_source_verify(struct tm_source *source, struct tm_error *error);

#endif
