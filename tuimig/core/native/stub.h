// The destination's hands: make a stub process with the copy's id, descriptors and attributes, then turn it into the copy by
// system calls injected through a scratch range of its memory, and let it run. ptrace belongs to the thread that spawned
// it: every call must come from that thread. If it dies before the release, the stub dies too.
#ifndef TM_STUB_H
#define TM_STUB_H
#include "error.h"
#include "spool.h"

struct tm_stub;

enum {
    TM_STUB_SCRATCH = 65536, // bytes of scratch: a page of code, then data and the stack of injected calls
    TM_STUB_DATA = 12288,    // most bytes of data of one injected call
};

// One system call of the rebuild. Where bit i of `pointers` is set, args[i] is an offset into `data`.
struct tm_call {
    int64_t nr;
    uint64_t args[6];
    const void *data;
    uint32_t size; // bytes of data
    uint32_t pointers;
    int32_t allow[6]; // errnos that are no failure; 0: none
    int32_t tid;      // host id of the thread to inject it into; 0: the leader
    int32_t pad;
    int64_t ret; // out: the call's value, or -errno
};

// Our descriptor `fd` becomes `number` in the copy. Places are in order of their numbers; `staging` numbers are used by no
// place, as no place's fd, and by no other staging.
struct tm_stub_place {
    int32_t number;
    int32_t fd;
    int32_t staging;
    int32_t cloexec;
};

struct tm_stub_spec {
    int32_t pid;              // the copy's id in its innermost PID namespace
    int32_t new_namespace;    // 1: in a PID namespace of its own, with a /proc of its own
    int32_t init_fd;          // the program tuimig-init, executed as that namespace's first process; unused for pid 1
    int32_t uffd_number;      // descriptor of the stub's userfaultfd while it is built
    uint64_t uffd_features;   // of UFFDIO_API; 0: no userfaultfd wanted
    const char *time_offsets; // text for timens_offsets; null: the clocks as they are
    uint64_t scratch;         // TM_STUB_SCRATCH bytes there must be free in our layout and in the copy's
    const struct tm_stub_place *places;
    uint32_t n_places;
    uint32_t n_setup;
    struct tm_call *setup; // made by the stub itself after placement
};

struct tm_stub_info {
    int32_t pid; // as this process sees it
    int32_t pidfd;
    int32_t init_pid; // 0: none
    int32_t init_pidfd;
    int32_t uffd;          // ours, of the stub's memory; -1: none
    int32_t time_errno;    // why the time offsets were refused; 0: they were not
    uint32_t xstate_size;  // bytes of an xstate image on this processor
    uint32_t failed_setup; // index of the setup call that failed, where spawn failed for that
    uint64_t first_ns;     // CLOCK_MONOTONIC just before the copy's first instruction, after tm_stub_release
};

// Content to be written before the copy runs: the pages with a sum among n_pages at first_page, to `address` of the
// stub's memory, or of the file fd where that is not -1.
struct tm_stub_content {
    uint64_t address;
    uint64_t first_page;
    uint64_t n_pages;
    int32_t fd;
    int32_t pad;
};

// Final state of one thread.
struct tm_stub_image {
    int32_t tid; // host id
    uint32_t regs_size;
    uint32_t xstate_size;
    uint32_t pad;
    const void *regs; // struct user_regs_struct
    const void *xstate;
    uint64_t sigmask;
};

// On failure everything made is ended. *info is filled as far as it is known. The descriptors in it belong to the stub.
int tm_stub_spawn(const struct tm_stub_spec *spec, struct tm_stub **out, struct tm_stub_info *info,
                  struct tm_error *error);
void tm_stub_info(const struct tm_stub *stub, struct tm_stub_info *info);
int tm_stub_take_uffd(struct tm_stub *stub); // from now on the caller's to close; -1: there is none

// Inject calls in order; stops at the first failure, whose index is in *failed.
int tm_stub_calls(struct tm_stub *stub, struct tm_call *calls, uint32_t n_calls, uint32_t *failed,
                  struct tm_error *error);

// Start a further thread with this id in the copy's namespace; it stays stopped.
int tm_stub_thread(struct tm_stub *stub, int32_t tid, int32_t *host_tid, struct tm_error *error);

int tm_stub_write(struct tm_stub *stub, struct tm_spool *spool, const struct tm_stub_content *content,
                  uint32_t n_content, struct tm_error *error);

// Unmap the scratch, set every thread's final state and let all run. The stub is the copy from then on.
int tm_stub_release(struct tm_stub *stub, const struct tm_stub_image *images, uint32_t n_images,
                    struct tm_error *error);

// Run all the stub's threads, and this one, on one processor (injected calls are six times faster so), or where they
// ran before.
void tm_stub_pin(struct tm_stub *stub, int together);

// End what was built and free it. After tm_stub_release: only free it, the copy runs on.
void tm_stub_destroy(struct tm_stub *stub);

#endif
