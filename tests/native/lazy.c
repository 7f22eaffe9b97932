// See lazy.h.
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "harness.h"
#include "lazy.h"
#include "uffd.h"

uint64_t lazy_word(uint64_t page, uint64_t word) {
    if (page % 7 == 3) {
        return 0;
    }
    uint64_t x = (page * 512 + word + 1) * 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}

int lazy_page_is(const char *at, uint64_t page) {
    const uint64_t *words = (const uint64_t *)(const void *)at;
    for (uint64_t i = 0; i < 512; i++) {
        if (words[i] != lazy_word(page, i)) {
            return 0;
        }
    }
    return 1;
}

int lazy_page_is_zero(const char *at) {
    const uint64_t *words = (const uint64_t *)(const void *)at;
    for (uint64_t i = 0; i < 512; i++) {
        if (words[i]) {
            return 0;
        }
    }
    return 1;
}

static void store(struct lazy *lazy) {
    lazy->pages_fd = (int)syscall(SYS_memfd_create, "spool", MFD_CLOEXEC);
    CHECK(lazy->pages_fd >= 0, "memfd");
    CHECK_OK(tm_spool_create(lazy->pages_fd, lazy->n_pages, 1, &lazy->spool, why));
    static uint64_t words[64 * 512];
    for (uint64_t page = 0; page < lazy->n_pages; page += 64) {
        uint64_t n = lazy->n_pages - page < 64 ? lazy->n_pages - page : 64;
        for (uint64_t i = 0; i < n * 512; i++) {
            words[i] = lazy_word(page + i / 512, i % 512);
        }
        CHECK_OK(tm_spool_put(lazy->spool, page, words, n, NULL, why));
    }
}

void lazy_make(struct lazy *lazy, uint64_t n_pages, int growsdown, lazy_body *body) {
    memset(lazy, 0, sizeof *lazy);
    lazy->n_pages = n_pages;
    store(lazy);
    int told[2];
    CHECK(pipe(lazy->go) == 0 && pipe(told) == 0, "pipe");
    pid_t parent = getpid();
    fflush(NULL);
    lazy->pid = fork();
    CHECK(lazy->pid >= 0, "fork");
    if (lazy->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        CHECK(getppid() == parent, "the test is gone");
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | (growsdown ? MAP_GROWSDOWN : 0);
        CHECK(mmap(BASE, n_pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == BASE, "mmap");
        int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
        struct uffdio_api api = {.api = UFFD_API, .features = tm_fill_features()};
        CHECK(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0, "userfaultfd");
        CHECK(write(told[1], &uffd, sizeof uffd) == sizeof uffd, "pipe");
        close(lazy->go[1]);
        char byte;
        if (read(lazy->go[0], &byte, 1) != 1) {
            _exit(98);
        }
        close(uffd); // or the filler could never let go of this memory
        prctl(PR_SET_PDEATHSIG, 0);
        body(n_pages);
        _exit(0);
    }
    int theirs;
    close(told[1]);
    CHECK(read(told[0], &theirs, sizeof theirs) == sizeof theirs, "the child did not start");
    close(told[0]);
    close(lazy->go[0]);
    lazy->pidfd = (int)syscall(SYS_pidfd_open, lazy->pid, 0);
    lazy->uffd = (int)syscall(SYS_pidfd_getfd, lazy->pidfd, theirs, 0);
    CHECK(lazy->uffd >= 0, "pidfd_getfd");
}

void lazy_fill(struct lazy *lazy, uint32_t options) {
    // Two regions, so that one ends in the middle: [0, half) and [half, n).
    uint64_t half = lazy->n_pages / 2;
    struct tm_fill_region regions[2] = {
        {.start = (uint64_t)(uintptr_t)BASE, .end = (uint64_t)(uintptr_t)BASE + half * PAGE, .region = 5},
        {.start = (uint64_t)(uintptr_t)BASE + half * PAGE,
         .end = (uint64_t)(uintptr_t)BASE + lazy->n_pages * PAGE,
         .first_page = half,
         .region = 6},
    };
    CHECK_OK(tm_fill_create(lazy->uffd, lazy->pidfd, lazy->spool, regions, 2, options, &lazy->fill, why));
}

void lazy_run(struct lazy *lazy) {
    CHECK_OK(tm_fill_start(lazy->fill, why));
    CHECK(write(lazy->go[1], "g", 1) == 1, "pipe");
}

int lazy_wait(struct lazy *lazy) {
    int status = 0;
    CHECK(waitpid(lazy->pid, &status, 0) == lazy->pid, "waitpid");
    return status;
}

void lazy_free(struct lazy *lazy) {
    tm_fill_destroy(lazy->fill);
    tm_spool_destroy(lazy->spool);
    close(lazy->pages_fd);
    close(lazy->pidfd);
    close(lazy->go[1]);
    // Nothing of ours may be left, neither running nor as a zombie.
    CHECK(waitpid(-1, NULL, WNOHANG | __WALL) < 0 && errno == ECHILD, "a child is left");
}
