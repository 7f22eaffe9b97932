// The target's memory as we see it from outside: reading it, scanning its page tables; and the arena that holds what one
// freeze collected.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "source_internal.h"

struct arena_block {
    struct arena_block *next;
    size_t size, used;
    _Alignas(16) uint8_t data[];
};

void *arena_take(struct arena *arena, size_t size) {
    size = (size + 15) & ~(size_t)15;
    struct arena_block *block = arena->blocks;
    if (!block || block->size - block->used < size) {
        size_t room = size > 65536 - sizeof *block ? size : 65536 - sizeof *block;
        block = calloc(1, sizeof *block + room);
        if (!block) return NULL;
        block->size = room;
        block->next = arena->blocks;
        arena->blocks = block;
    }
    void *out = block->data + block->used;
    block->used += size;
    return out;
}

void arena_free(struct arena *arena) {
    while (arena->blocks) {
        struct arena_block *next = arena->blocks->next;
        free(arena->blocks);
        arena->blocks = next;
    }
}

// process_vm_readv refuses PROT_NONE, and a process whose first thread has ended; /proc/PID/mem, which ptrace access opens,
// does not.
int target_read(const struct tm_source *source, uint64_t address, void *out, size_t size) {
    uint8_t *to = out;
    while (size > 0) {
        struct iovec local = {to, size};
        struct iovec remote = {(void *)(uintptr_t)address, size};
        ssize_t got = process_vm_readv(source->pid, &local, 1, &remote, 1, 0);
        if (got <= 0) {
            if (got < 0 && errno != EFAULT && errno != EIO && errno != ESRCH) return errno;
            size_t piece = size < TM_PAGE_SIZE ? size : TM_PAGE_SIZE - (address & (TM_PAGE_SIZE - 1));
            if (piece > size) piece = size;
            got = pread(source->mem_fd, to, piece, (off_t)address);
            if (got < 0) return errno;
            if (got == 0) return ESRCH; // its memory is gone
        }
        to += got;
        address += (uint64_t)got;
        size -= (size_t)got;
    }
    return 0;
}

int target_scan(const struct tm_source *source, uint64_t start, uint64_t end, uint64_t any, uint64_t none,
                uint64_t report, extent_fn each, void *context, struct tm_error *error) {
    const struct pm_scan_arg what = {
        .category_inverted = none,
        .category_mask = none,
        .category_anyof_mask = any,
        .return_mask = report,
    };
    return target_scan_as(source, start, end, &what, each, context, error);
}

int target_scan_as(const struct tm_source *source, uint64_t start, uint64_t end, const struct pm_scan_arg *what,
                   extent_fn each, void *context, struct tm_error *error) {
    struct page_region found[512];
    while (start < end) {
        struct pm_scan_arg arg = *what;
        arg.size = sizeof arg;
        arg.start = start;
        arg.end = end;
        arg.vec = (uintptr_t)found;
        arg.vec_len = sizeof found / sizeof *found;
        int n = ioctl(source->pagemap_fd, PAGEMAP_SCAN, &arg);
        if (n < 0) {
            if (errno == EINTR) continue;
            int code = tm_error_errno(error, "PAGEMAP_SCAN", "cannot scan the page tables");
            if (error) error->address = start;
            return code;
        }
        for (int i = 0; i < n; i++) {
            struct extent extent = {found[i].start, found[i].end, found[i].categories};
            int stop = each(context, &extent);
            if (stop) return stop;
        }
        if (arg.walk_end <= start) return tm_error_set(error, TM_SYS, 0, "PAGEMAP_SCAN", "a scan does not come on");
        start = arg.walk_end;
    }
    return TM_OK;
}

// A page that is populated and still protected has not changed since it was armed: only we take the protection away.
bool target_protected(const struct tm_source *source, uint64_t start, uint64_t end) {
    while (start < end) {
        struct page_region found[4];
        struct pm_scan_arg arg = {
            .size = sizeof arg,
            .start = start,
            .end = end,
            .vec = (uintptr_t)found,
            .vec_len = 4,
            .category_inverted = PAGE_IS_WRITTEN,
            .category_mask = PAGE_IS_WRITTEN,
            .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            .return_mask = PAGE_IS_WRITTEN, // never set in a match: neighbours merge
        };
        int n = ioctl(source->pagemap_fd, PAGEMAP_SCAN, &arg);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0 || found[0].start != start) return false;
        start = found[0].end;
    }
    return true;
}
