// The pieces of the target's own code that injected calls run on: `syscall; ret`, what a signal handler returns to, and, where
// there is one, the end of a function that stores rax.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "source_internal.h"

static bool find_bytes(const uint8_t *text, size_t size, const void *what, size_t n, size_t *at) {
    const uint8_t *hit = memmem(text, size, what, n);
    if (hit) *at = (size_t)(hit - text);
    return hit != NULL;
}

static const uint8_t call[] = {0x0f, 0x05, 0xc3};
static const uint8_t long_return[] = {0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05};
static const uint8_t short_return[] = {0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05};

static const uint8_t store[] = {0x48, 0x89, 0x03, 0x5b, 0xc3};

static bool found_all(const struct gadgets *found) {
    return found->syscall_ret && found->sigreturn && found->store_ret;
}

static void gadgets_look_in(int pid, uint64_t start, uint64_t end, uint8_t *text, size_t room, struct gadgets *out) {
    for (uint64_t at = start; at < end && !found_all(out); at += room - 16) {
        size_t size = end - at < room ? end - at : room, hit;
        struct iovec local = {text, size}, remote = {(void *)(uintptr_t)at, size};
        ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);
        if (got <= 0) return;
        if (!out->syscall_ret && find_bytes(text, (size_t)got, call, sizeof call, &hit)) out->syscall_ret = at + hit;
        if (!out->sigreturn && (find_bytes(text, (size_t)got, long_return, sizeof long_return, &hit) ||
                                find_bytes(text, (size_t)got, short_return, sizeof short_return, &hit)))
            out->sigreturn = at + hit;
        if (!out->store_ret && find_bytes(text, (size_t)got, store, sizeof store, &hit)) out->store_ret = at + hit;
    }
}

int gadgets_find(int pid, struct gadgets *out, struct tm_error *error) {
    enum { ROOM = 1 << 18 };
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    FILE *file = fopen(path, "re");
    if (!file) return tm_error_errno(error, "open", "cannot read %s", path);
    uint8_t *text = malloc(ROOM);
    *out = (struct gadgets){0};
    // The third one is wanted, not needed: only the mapping that has the last of the others is searched to its end for it.
    while (text && fgets(line, sizeof line, file) && !(out->syscall_ret && out->sigreturn)) {
        unsigned long start, end;
        char perms[8];
        // Code of a file: what a compiler at run time has made may change at any moment.
        if (sscanf(line, "%lx-%lx %7s", &start, &end, perms) == 3 && perms[0] == 'r' && perms[2] == 'x' &&
            strchr(line, '/'))
            gadgets_look_in(pid, start, end, text, ROOM, out);
    }
    free(text);
    fclose(file);
    if (!text) return tm_error_set(error, TM_NOMEM, 0, "malloc", "no memory");
    if (!out->syscall_ret || !out->sigreturn)
        return tm_error_set(error, TM_UNSUPPORTED, 0, "process_vm_readv",
                            "its code holds no `syscall; ret` or no sigreturn, so no call can be injected safely");
    return TM_OK;
}

// Read through the descriptor that was opened with the source: it belongs to the memory that the process had then.
int gadgets_check(const struct tm_source *source, struct tm_error *error) {
    uint8_t at_call[sizeof call], at_return[sizeof long_return], at_store[sizeof store];
    const struct gadgets *gadgets = &source->gadgets;
    ssize_t got = pread(source->mem_fd, at_call, sizeof at_call, (off_t)gadgets->syscall_ret);
    if (got == 0) return tm_error_set(error, TM_GONE, 0, "read", "the process has ended or executes another program");
    bool same = got == sizeof at_call &&
                pread(source->mem_fd, at_return, sizeof at_return, (off_t)gadgets->sigreturn) == sizeof at_return &&
                memcmp(at_call, call, sizeof call) == 0 &&
                (memcmp(at_return, long_return, sizeof long_return) == 0 ||
                 memcmp(at_return, short_return, sizeof short_return) == 0);
    if (same && gadgets->store_ret)
        same = pread(source->mem_fd, at_store, sizeof at_store, (off_t)gadgets->store_ret) == sizeof at_store &&
               memcmp(at_store, store, sizeof store) == 0;
    return same ? TM_OK : tm_error_set(error, TM_DEADLINE, 0, "read", "the process has moved its code");
}
