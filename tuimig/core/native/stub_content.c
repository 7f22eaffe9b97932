// Writes stored content before the copy runs: through /proc/PID/mem, which reaches pages of any protection, or into the
// file behind a shared mapping. Pages without a sum are left as the kernel gives them: zero, or the mapped file's.
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "stub_internal.h"
#include "util.h"

enum { PIECE_PAGES = 256 };

static int write_run(struct tm_spool *spool, int fd, uint64_t place, uint64_t first, uint64_t n_pages, uint8_t *buffer,
                     struct tm_error *error) {
    int code = tm_spool_get(spool, first, buffer, n_pages, error);
    if (code) {
        return code;
    }
    for (uint64_t done = 0; done < n_pages * TM_PAGE_SIZE;) {
        ssize_t got = pwrite(fd, buffer + done, n_pages * TM_PAGE_SIZE - done, (off_t)(place + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            code = tm_error_errno(error, "pwrite", "cannot write the content of a region");
            error->address = place + done;
            return code;
        }
        done += (uint64_t)got;
    }
    return 0;
}

int tm_stub_write(struct tm_stub *stub, struct tm_spool *spool, const struct tm_stub_content *content,
                  uint32_t n_content, struct tm_error *error) {
    const uint32_t *sums = tm_spool_sums(spool);
    uint8_t *buffer = malloc(PIECE_PAGES * TM_PAGE_SIZE);
    if (!buffer) {
        return tm_error_set(error, TM_NOMEM, ENOMEM, "malloc", "no memory to write content");
    }
    int code = 0;
    for (uint32_t i = 0; i < n_content && !code; i++) {
        const struct tm_stub_content *c = &content[i];
        int fd = c->fd >= 0 ? c->fd : stub->mem_fd;
        for (uint64_t page = 0; page < c->n_pages && !code;) {
            uint64_t run = 0;
            while (run < PIECE_PAGES && page + run < c->n_pages && sums[c->first_page + page + run]) {
                run++;
            }
            if (run) {
                code = write_run(spool, fd, c->address + page * TM_PAGE_SIZE, c->first_page + page, run, buffer, error);
            }
            page += run ? run : 1;
        }
    }
    free(buffer);
    return code;
}
