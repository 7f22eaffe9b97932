// What the files of the source side share. Nobody else includes this.
// Ownership: the tracer thread owns `threads` and every ptrace call; the capture threads own page states by compare-and-swap;
// everything else is written before the capture threads see the attempt.
#ifndef TM_SOURCE_INTERNAL_H
#define TM_SOURCE_INTERNAL_H
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>

#include "kernel.h"
#include "source.h"
#include "util.h"

enum { TM_XSTATE_MOST = 16384, TM_CALL_BUFFER = 1024 };

// One byte a page of a protected region (design, section 3). The high bit says that it is part of a huge page.
enum page_state {
    PAGE_NONE = 0,
    PAGE_PROTECTED = 1,
    PAGE_CLAIMED = 2,
    PAGE_COPIED = 3,
    PAGE_LOST = 4,
    PAGE_HUGE = 0x80
};

// ---- tracee.c: threads of the target, as the tracer holds them

struct thread {
    pid_t tid;
    bool seized;
    bool stopped; // in a ptrace stop that has been taken note of
    bool group;   // that stop is a group stop
    bool exiting; // at or beyond PTRACE_EVENT_EXIT
    bool held;    // kept in its stop until a capture request is done
    bool foreign; // shares the memory, is not of the thread group (vfork child)
    uint64_t clear_child_tid;
    struct user_regs_struct regs;
};

struct threads {
    struct thread *at;
    uint32_t n;
    uint32_t capacity;
};

enum stop_kind {
    STOP_TRAP,   // PTRACE_EVENT_STOP by interrupt, or of a new thread
    STOP_GROUP,  // group stop
    STOP_SIGNAL, // signal delivery; not reaped
    STOP_CALL,   // system call entry or exit
    STOP_EXIT,   // PTRACE_EVENT_EXIT
    STOP_CLONE,  // clone, fork or vfork of the caller
    STOP_EXEC,
    STOP_DEAD,
};

struct stop {
    pid_t tid;
    enum stop_kind kind;
    int signal;
    int event;
};

struct tm_source;

struct thread *threads_find(struct threads *list, pid_t tid);
struct thread *threads_add(struct threads *list, pid_t tid);
void threads_remove(struct threads *list, pid_t tid);

// tid -1: any thread of ours. 1: a stop, 0: none (no_hang), -1: nothing to wait for, -2: interrupted.
int stop_wait(pid_t tid, bool no_hang, struct stop *out);
bool thread_in_group(const struct tm_source *source, pid_t tid);
bool process_shares_memory(const struct tm_source *source, pid_t pid);
int thread_seize(pid_t tid, unsigned long options);
int thread_continue(const struct thread *thread, bool to_call, int signal);
// Stop every thread of the process, new ones included, before the deadline.
int thread_stop_one(struct thread *thread, uint64_t deadline_ns, struct tm_error *error);
int threads_stop_all(struct tm_source *source, unsigned long options, uint64_t deadline_ns, struct tm_error *error);
// Let go of all, whatever state they are in.
void threads_detach_all(struct tm_source *source);
int thread_read_regs(struct thread *thread, struct tm_error *error);
void thread_mend_call(pid_t tid, struct user_regs_struct *regs);

// ---- inject.c

struct gadgets {
    uint64_t syscall_ret;
    uint64_t sigreturn;
    uint64_t store_ret; // `mov %rax, (%rbx); pop %rbx; ret`; 0: there is none
};

struct injection {
    struct tm_source *source;
    struct thread *thread;
    struct user_regs_struct work; // registers during the injection
    uint64_t mask;
    uint64_t buffer;  // in the target, TM_CALL_BUFFER bytes
    uint64_t fpstate; // in the target: its extended state
    bool begun;
    bool at_call;
};

int gadgets_find(int pid, struct gadgets *out, struct tm_error *error);
// The process still executes the program that it did when the source was made, and its code is where it was.
int gadgets_check(const struct tm_source *source, struct tm_error *error);
// TM_DEADLINE: its stack has no room, or may not be one, and there is no scratch mapping.
int inject_begin(struct injection *in, struct tm_source *source, struct thread *thread, struct tm_error *error);
int inject_prime(struct injection *in, long nr, const uint64_t args[6], struct tm_error *error);
int inject_call(struct injection *in, long nr, const uint64_t args[6], int64_t *ret, struct tm_error *error);
int inject_end(struct injection *in, struct tm_error *error);

// ---- chain.c: many calls of one thread with one stop
enum { CHAIN_MOST = 96 };
struct chain {
    struct injection in;
    const struct tm_probe *probes[CHAIN_MOST];
    struct tm_answer *answers[CHAIN_MOST];
    uint32_t out_at[CHAIN_MOST];
    uint32_t n, out_size;
    bool launched;
    uint64_t base; // in the target
};
bool chain_suits(const struct tm_source *source, const struct tm_probe *probe);
bool chain_fits(const struct tm_source *source, const struct thread *thread);
bool chain_add(struct chain *chain, const struct tm_probe *probe, struct tm_answer *answer); // false: it is full
uint64_t chain_room(const struct chain *chain);                                              // bytes of stack
int chain_launch(struct chain *chain, struct tm_error *error);
int chain_finish(struct chain *chain, struct tm_error *error); // what a call did not answer stays unanswered
// As inject_begin, with so much more room below; TM_DEADLINE also where only the scratch mapping would do.
int inject_begin_with(struct injection *in, struct tm_source *source, struct thread *thread, uint64_t room,
                      struct tm_error *error);

// A mapping in the target, made by a thread that has a stack, for those that have none. All threads are stopped meanwhile.
int scratch_make(struct tm_source *source, struct tm_error *error);
void scratch_drop(struct tm_source *source);
// Leaves nothing in the target, whenever we die. The seize options of the thread are changed by it.
int inject_userfaultfds(struct injection *in, int dev_fd, int *out, uint32_t n, struct tm_error *error);

// ---- memory.c

struct extent {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct arena_block;
struct arena {
    struct arena_block *blocks;
};
void *arena_take(struct arena *arena, size_t size); // zeroed, 16 aligned; null: no memory
void arena_free(struct arena *arena);

int target_read(const struct tm_source *source, uint64_t address, void *out, size_t size); // 0 or errno
// Calls back for each run of pages with (flags & any) and none of `none`; `report`: categories wanted back.
typedef int (*extent_fn)(void *context, const struct extent *extent);
int target_scan(const struct tm_source *source, uint64_t start, uint64_t end, uint64_t any, uint64_t none,
                uint64_t report, extent_fn each, void *context, struct tm_error *error);
// As `what` says, but for range and vector.
int target_scan_as(const struct tm_source *source, uint64_t start, uint64_t end, const struct pm_scan_arg *what,
                   extent_fn each, void *context, struct tm_error *error);
// True where every page of the range is populated and still protected.
bool target_protected(const struct tm_source *source, uint64_t start, uint64_t end);

// ---- regions.c

struct region {
    struct tm_region_state face; // first: the face is an array of these copied out
    uint64_t first_page;         // spool index of the region's first page
    uint8_t *state;              // a byte a page, null where not protected
    uint64_t state_size;
    atomic_uint_least32_t faults;
    atomic_uint_least64_t done;
    uint64_t dirty;    // pages found written in the last round
    bool changed_only; // private file: only its anonymous pages
    bool precopied;    // copied in rounds, and what was dirty inside the freeze: nothing is left for the window
};

struct piece { // of a region, or of some that follow it
    uint32_t region;
    uint64_t start;
    uint64_t end;
};

int regions_read(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error);
void regions_free(struct tm_source *source);
uint32_t region_index(const struct tm_source *source, uint64_t address);
struct region *region_at(const struct tm_source *source, uint64_t address);
// Several workers may find it, each in a part of the region.
static inline void region_has_huge(struct region *region) { __atomic_store_n(&region->face.huge, 1, __ATOMIC_RELAXED); }
// Guard pages cannot be written down yet: an error that says so.
int region_guarded(const struct tm_region_state *face, uint64_t address, struct tm_error *error);

// ---- zones.c: places in the spool by address, before T0
// A byte a page: what the rounds know of it, in how many rounds in a row it was dirty, and the last of these (both modulo 8).
enum { TRACK_MASK = 3, TRACK_COUNT_SHIFT = 2, TRACK_COUNT_MOST = 7, TRACK_ROUND_SHIFT = 5, TRACK_ROUND_MOST = 7 };
enum track_state {
    TRACK_NONE = 0,
    TRACK_COPIED = 1,  // read after it was protected
    TRACK_HOT = 2,     // dirty all the time: left to the end
    TRACK_DROPPED = 3, // what its place holds is of no use
};
struct zone {
    uint64_t start, end;
    uint64_t first_page;
    uint8_t *state;
};
struct zones {
    struct zone *at;
    uint32_t n, capacity;
    uint64_t pages; // of the spool, given out so far
};
struct zone *zone_of(const struct tm_source *source, uint64_t start, uint64_t end); // null: not wholly inside of one
int zones_cover(struct tm_source *source, struct tm_error *error);                  // a place for every region
void zones_free(struct tm_source *source);

// ---- rounds.c: copying while the target runs
struct rounds;
bool rounds_kernel_can(void);
bool rounds_quick_scan(void);
bool region_tracked(const struct tm_source *source, const struct region *region);
void rounds_forget(struct tm_source *source, uint64_t start, uint64_t end); // all of it counts as written
void rounds_free(struct tm_source *source);
int rounds_go_on(struct tm_source *source, const struct tm_freeze_plan *plan, uint32_t slice_ms, struct tm_round *out,
                 struct tm_error *error);
void rounds_closing(struct tm_source *source); // nothing is registered any more
int rounds_give_up(struct tm_source *source, uint64_t pages, uint64_t *given_up, struct tm_error *error);

// ---- register.c: registering while the target runs, in short stops. Only the tracer thread.
struct extents {
    struct extent *at;
    uint32_t n, capacity;
};
void extents_add(struct extents *list, uint64_t start, uint64_t end, uint64_t categories);
void extents_free(struct extents *list);
bool open_gently(int uffd, uint64_t start, uint64_t end, bool events_are_read);
int short_stop_begin(struct tm_source *source, uint64_t *began_ns, struct tm_error *error);
void short_stop_end(struct tm_source *source, uint64_t began_ns);
struct extents mappings(struct tm_source *source); // as they are at this moment; extents_free it
void missing_only(int uffd, uint64_t start, uint64_t end);
void track_register(struct tm_source *source);
uint64_t track_uncovered(const struct tm_source *source);
int track_drop(struct tm_source *source, struct tm_error *error);
bool track_is_open(const struct tm_source *source, uint64_t start, uint64_t end);
void release_prepare(struct tm_source *source);
bool release_stop(struct tm_source *source, uint64_t *began_ns);             // for release_all, where it is worth it
void release_all(struct tm_source *source, bool stopped, uint64_t began_ns); // closes both descriptors

// ---- precopy.c: what T0 makes of the rounds
struct dirty_run {
    uint64_t address, page, n;
};
struct dirty {
    struct dirty_run *runs;
    uint32_t n, capacity;
    uint64_t pages;
};
void precopy_make_way(struct tm_source *source); // inside the freeze, before anything is stored
// The pieces whose proof is wanted; the proof of one of them.
int precopy_list(struct tm_source *source, struct tm_error *error);
int precopy_prove(struct tm_source *source, const struct piece *piece, struct tm_error *error);
int precopy_take(struct tm_source *source, struct tm_error *error); // what is dirty
void precopy_stored(struct tm_source *source, uint64_t page, uint64_t n);
int precopy_tidy(struct tm_source *source, struct tm_error *error); // after the thaw, before eager_store

// ---- probe.c
int state_read_threads(struct tm_source *source, struct tm_error *error);
int state_make_calls(struct tm_source *source, struct tm_error *error);
void state_read_outside(struct tm_source *source); // files and queues
int state_read_descriptors(struct tm_source *source, struct tm_error *error);
int file_read_whole(struct arena *arena, const char *path, const uint8_t **data, uint64_t *size); // 0 or errno

// ---- eager.c: what is copied inside the freeze
struct eager_piece {
    uint64_t first_page;
    uint64_t n_pages;
    const uint8_t *data;
    bool changed;
};
int eager_list(struct tm_source *source, struct tm_error *error); // the pieces that are to be copied; one of them
int eager_copy(struct tm_source *source, const struct piece *piece, struct tm_error *error);
// Private pages that are read together; `page` is their place in the spool. Begins with the source alone, ends with a flush.
enum { EAGER_BATCH = 512 };
struct eager_batch {
    struct tm_source *source;
    uint32_t n;
    uint64_t size;
    uint64_t pages[EAGER_BATCH];
    const struct region *regions[EAGER_BATCH];
    struct iovec remote[EAGER_BATCH];
};
int eager_add(struct eager_batch *batch, const struct region *region, uint64_t address, uint64_t page, uint64_t size,
              struct tm_error *error);
int eager_flush(struct eager_batch *batch, struct tm_error *error);
int eager_store(struct tm_source *source, struct tm_error *error); // after the thaw
void eager_free(struct tm_source *source);
int eager_prepare(struct tm_source *source, uint64_t estimate, struct tm_error *error);

// ---- capture.c
int capture_prepare(struct tm_source *source, struct tm_error *error); // before the freeze: threads
int capture_arm(struct tm_source *source, struct tm_error *error);     // inside it
void capture_start(struct tm_source *source);                          // at T0
int capture_page_now(struct tm_source *source, uint64_t address); // from the tracer: captured and open when it returns
bool capture_needs(const struct tm_source *source, uint64_t start, uint64_t end);
void capture_fail(struct tm_source *source, const struct tm_error *error);
int capture_quiesce(struct tm_source *source); // every event up to now has been seen
void capture_stop(struct tm_source *source);   // threads joined, ranges unregistered
int verify_hash(struct tm_source *source, struct tm_error *error);

enum capture_phase { PHASE_SLEEP, PHASE_READY, PHASE_JOB, PHASE_SWEEP, PHASE_QUIT };
// In pieces that end at multiples of `most`, a power of two. 0 or ENOMEM.
int capture_piece_add(struct tm_source *source, uint32_t region, uint64_t start, uint64_t end, uint64_t most);
// Claim what is still to be captured of [start, end) and capture it. A request waits for pages in other hands.
enum capture_by { BY_SWEEP, BY_REQUEST, BY_HANDLER };
int capture_range(struct tm_source *source, uint64_t start, uint64_t end, enum capture_by by, uint8_t *buffer);
void capture_check_done(struct tm_source *source);

// Inside the freeze, jobs 0 to n - 1 are shared with the workers: from the start on they work, at the finish the tracer does too.
typedef void job_fn(struct tm_source *source, uint32_t index, uint8_t *buffer);
void jobs_start(struct tm_source *source, job_fn *job, uint32_t n);
void jobs_finish(struct tm_source *source, uint8_t *buffer); // returns when all are done
void jobs_run(struct tm_source *source, job_fn *job, uint32_t n, uint8_t *buffer);

uint64_t capture_claim(struct region *region, uint64_t first, uint64_t most);
bool capture_huge_block(const struct region *region, uint64_t page, uint64_t *first, uint64_t *n);
// Claimed pages: read, prove, release, store. `reads_events`: the caller is the handler.
int capture_run(struct tm_source *source, struct region *region, uint64_t first, uint64_t n, uint8_t *buffer,
                bool reads_events);
int capture_release_retry(struct tm_source *source, uint64_t start, uint64_t end, bool reads_events);

// ---- handler.c
void *handler_main(void *source);
void handler_read_events(struct tm_source *source); // only from the handler's thread
// ---- sweep.c
void *worker_main(void *source);

// ---- guard.c
void guard_step(struct tm_source *source); // one stop of the window; blocks until there is one or a kick comes
void guard_release_held(struct tm_source *source);

struct request { // a range that a stopped thread waits for
    uint64_t start;
    uint64_t end;
    pid_t tid;
};

enum { WORKERS_MOST = 4 };

struct tm_source {
    pid_t pid;
    int pidfd;
    int mem_fd;
    int pagemap_fd;
    int uffd;

    // tracer thread and its one command at a time
    pthread_t tracer;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool tracer_running, busy, quit;
    int (*command)(struct tm_source *, void *, struct tm_error *);
    void *argument;
    struct tm_error *command_error;
    int command_result;

    struct threads threads;
    struct gadgets gadgets;
    unsigned long trace_options; // of every thread that is seized
    bool filtered;               // some thread has a seccomp filter
    bool no_suspend;             // we may not suspend seccomp filters
    uint64_t guard_category;     // PAGE_IS_GUARD, where the kernel tells
    uint64_t scratch;
    pid_t scratch_maker;
    bool guarded;
    bool held;               // the target stays stopped
    atomic_int eager_stored; // the eager pages are in the spool
    atomic_bool window;      // T0 has been; threads run under the guard
    atomic_bool target_gone;

    // the attempt
    const struct tm_freeze_plan *plan;
    struct tm_spool *spool;
    struct arena arena;
    struct region *regions;
    uint32_t n_regions;
    const uint8_t *maps; // the text they are from
    uint64_t maps_size;
    struct tm_region_state *region_faces;
    struct tm_thread_state *thread_faces;
    uint32_t n_threads;
    struct tm_descriptor_state *descriptors;
    uint32_t n_descriptors;
    const uint8_t *shared_pending;
    uint32_t n_shared_pending;
    struct tm_answer *answers; // n_probes * n_threads
    uint32_t n_probes;
    struct tm_frozen_times times;
    uint64_t spool_pages;

    // pre-copy
    int track_uffd;  // async; -1: there is none
    bool quick_scan; // a scan for what is written reports what is absent too
    struct zones zones;
    struct rounds *rounds;
    struct extent *given_up; // regions that end in the window
    uint32_t n_given_up;
    struct extents registered, opened;
    struct dirty dirty;
    atomic_uint_least64_t precopied;

    // inside the freeze
    atomic_uint_least64_t eager_ns, proof_ns; // of all threads together

    // eager
    uint8_t *eager_buffer;
    pthread_mutex_t eager_lock; // of what follows, while the workers copy
    uint64_t eager_size, eager_used;
    struct eager_piece *eager_pieces;
    uint32_t n_eager, eager_capacity;

    // capture
    pthread_t handler, workers[WORKERS_MOST];
    uint32_t n_workers;
    bool capture_threads;
    struct tm_ring *ring;
    struct piece *pieces; // what is armed and swept, or copied and proved
    uint32_t n_pieces, pieces_capacity;
    atomic_uint next_piece;
    atomic_uint_least64_t last_fault_ns;
    bool may_hurry;   // our threads may have a priority
    bool few_cpus;    // the sweep gives way to the handler while faults keep coming
    atomic_int phase; // enum capture_phase
    void (*job)(struct tm_source *, uint32_t index, uint8_t *buffer);
    atomic_uint n_jobs, next_job, job_active;
    int wake_fd;
    struct handler_queue *queue; // the handler's own
    atomic_uint_least64_t total, done, wp_faults, swept, zero, fault_pages, guard_stops, eager_pages, events, verified;
    atomic_uint_least64_t quiesce_asked, quiesce_done;
    atomic_int state; // enum tm_source_state
    pthread_mutex_t failure_lock;
    struct tm_error failure;
    uint32_t *verify_sums;
    uint64_t verify_size;

    // guarded calls waiting for a range; the tracer adds, workers take
    pthread_mutex_t request_lock;
    pthread_cond_t work;
    struct request *requests; // a ring with room for all that are held
    pid_t *released;
    uint32_t requests_capacity, first_request, n_held, n_released;
    atomic_uint n_requests;
    atomic_bool kick_wanted;
};

void source_kick(struct tm_source *source);
int freeze_by_tracer(struct tm_source *source, void *plan, struct tm_error *error); // freeze.c
// Has the tracer thread do it, and waits until it has.
int on_tracer(struct tm_source *source, int (*command)(struct tm_source *, void *, struct tm_error *), void *argument,
              struct tm_error *error);

#endif
