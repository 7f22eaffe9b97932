// Internal: the few userfaultfd operations of the filler, with their outcomes told apart. No state.
#ifndef TM_UFFD_H
#define TM_UFFD_H
#include <stdint.h>

#include "kernel.h"

#ifndef UFFDIO_POISON // Linux 6.6
#define _UFFDIO_POISON (0x08)
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)
#endif

// The filler follows everything a copy can do to missing memory; the thread id is for the fault records.
#define TM_FILL_FEATURES                                                                                         \
    (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | \
     UFFD_FEATURE_THREAD_ID)

enum tm_uffd_outcome {
    TM_UFFD_DONE,
    TM_UFFD_PRESENT,  // the page is there already
    TM_UFFD_CHANGING, // an event waits to be read first
    TM_UFFD_UNMAPPED, // not, or not wholly, in one registered mapping
    TM_UFFD_DEAD,     // the memory is gone: its process ended or executes another program
    TM_UFFD_FAILED,   // errno tells
    TM_UFFD_ABSENT,   // the filler's own: the page has not come from upstream yet
};

// Anything but TM_UFFD_CHANGING and TM_UFFD_DEAD proves that no event was outstanding at that moment.
// *done: pages placed before the one that the outcome is about.
enum tm_uffd_outcome tm_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t pages, uint64_t *done);
enum tm_uffd_outcome tm_uffd_zero(int uffd, uint64_t to);
enum tm_uffd_outcome tm_uffd_poison(int uffd, uint64_t to);
// Changes nothing: TM_UFFD_CHANGING, TM_UFFD_DEAD or TM_UFFD_DONE.
enum tm_uffd_outcome tm_uffd_probe(int uffd);
void tm_uffd_wake(int uffd, uint64_t address, uint64_t bytes);

#endif
