// The userfaultfd operations of the filler: partial results completed, errnos turned into outcomes. No state.
#include <errno.h>
#include <sys/ioctl.h>

#include "uffd.h"
#include "util.h"

enum tm_uffd_outcome tm_uffd_probe(int uffd) {
    // Nothing is protected, so nothing changes; but this call looks for outstanding events before all else.
    struct uffdio_writeprotect unprotect = {.range = {.start = 1u << 20, .len = TM_PAGE_SIZE}};
    if (ioctl(uffd, UFFDIO_WRITEPROTECT, &unprotect) == 0) {
        return TM_UFFD_DONE;
    }
    return errno == EAGAIN ? TM_UFFD_CHANGING : errno == ESRCH ? TM_UFFD_DEAD : TM_UFFD_DONE;
}

static enum tm_uffd_outcome outcome_of_errno(int uffd) {
    switch (errno) {
        case EAGAIN:
            return TM_UFFD_CHANGING;
        case EEXIST:
            return TM_UFFD_PRESENT;
        case ENOENT: {
            // The kernel looks for the mapping before it looks for events: it may have moved away just now.
            enum tm_uffd_outcome now = tm_uffd_probe(uffd);
            return now == TM_UFFD_DONE ? TM_UFFD_UNMAPPED : now;
        }
        case ESRCH:
            return TM_UFFD_DEAD;
        default:
            return TM_UFFD_FAILED;
    }
}

enum tm_uffd_outcome tm_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t pages, uint64_t *done) {
    *done = 0;
    while (*done < pages) {
        uint64_t offset = *done << TM_PAGE_SHIFT;
        struct uffdio_copy copy = {
            .dst = to + offset,
            .src = (uint64_t)(uintptr_t)from + offset,
            .len = (pages - *done) << TM_PAGE_SHIFT,
        };
        if (ioctl(uffd, UFFDIO_COPY, &copy) == 0) {
            *done = pages;
        } else if (copy.copy > 0) { // EAGAIN here only says that it was not all
            *done += (uint64_t)copy.copy >> TM_PAGE_SHIFT;
        } else {
            return outcome_of_errno(uffd);
        }
    }
    return TM_UFFD_DONE;
}

enum tm_uffd_outcome tm_uffd_zero(int uffd, uint64_t to) {
    struct uffdio_zeropage zero = {.range = {.start = to, .len = TM_PAGE_SIZE}};
    return ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0 ? TM_UFFD_DONE : outcome_of_errno(uffd);
}

enum tm_uffd_outcome tm_uffd_poison(int uffd, uint64_t to) {
    struct uffdio_poison poison = {.range = {.start = to, .len = TM_PAGE_SIZE}};
    return ioctl(uffd, UFFDIO_POISON, &poison) == 0 ? TM_UFFD_DONE : outcome_of_errno(uffd);
}

void tm_uffd_wake(int uffd, uint64_t address, uint64_t bytes) {
    struct uffdio_range range = {.start = address, .len = bytes};
    ioctl(uffd, UFFDIO_WAKE, &range); // fails only for memory that is gone, where nobody waits
}
