// The target of test_source: never built with a sanitizer, whose shadow memory is no ordinary memory to capture. Writers
// as in writers.h; with an argument another thread also does what loses pages of T0. Ends when its standard input does,
// with status 0 if its own memory is as it should be.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "writers.h"

struct writer {
    pthread_t thread;
    unsigned number;
    int *over;
    int wrote;
};

static uint64_t *pages_of(unsigned writer) {
    return (uint64_t *)(WRITERS_BASE + writer * WRITERS_PAGES * WRITERS_PAGE); // NOLINT
}

static void *write_on(void *argument) {
    struct writer *writer = argument;
    uint64_t *pages = pages_of(writer->number);
    for (uint64_t n = 1; !__atomic_load_n(writer->over, __ATOMIC_RELAXED); n++) {
        uint64_t *page = pages + writers_page(writer->number, n) * 512;
        __atomic_store_n(page, n, __ATOMIC_SEQ_CST);
        __atomic_store_n(page + WRITERS_LAST, n, __ATOMIC_SEQ_CST);
        __atomic_store_n(&writer->wrote, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

// Memory that is full when it is freed: a picture that misses a page of it has lost that page.
static void *free_on(void *argument) {
    const struct writer *writer = argument;
    enum { BYTES = 4 << 20 };
    while (!__atomic_load_n(writer->over, __ATOMIC_RELAXED)) {
        char *block = mmap((void *)(WRITERS_BASE + (1ul << 30)), BYTES, PROT_READ | PROT_WRITE, // NOLINT
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(block, 5, BYTES);
        usleep(2000);
        madvise(block, BYTES / 2, MADV_DONTNEED);
        munmap(block, BYTES);
    }
    return NULL;
}

int main(int argc, char **argv) {
    (void)argv;
    int over = 0;
    struct writer writers[WRITERS + 1];
    size_t bytes = WRITERS * WRITERS_PAGES * WRITERS_PAGE;
    if (mmap((void *)WRITERS_BASE, bytes, PROT_READ | PROT_WRITE, // NOLINT
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED) {
        return 3;
    }
    for (size_t at = 0; at < bytes; at += WRITERS_PAGE) { // all of it is there from the start
        *(volatile char *)(WRITERS_BASE + at) = 0;        // NOLINT
    }
    unsigned n = WRITERS + (argc > 1 ? 1 : 0);
    for (unsigned i = 0; i < n; i++) {
        writers[i] = (struct writer){.number = i, .over = &over};
        if (pthread_create(&writers[i].thread, NULL, i < WRITERS ? write_on : free_on, &writers[i])) {
            return 4;
        }
    }
    for (unsigned i = 0; i < WRITERS; i++) {
        while (!__atomic_load_n(&writers[i].wrote, __ATOMIC_RELAXED)) {
            usleep(100);
        }
    }
    char byte;
    if (write(1, "r", 1) != 1 || read(0, &byte, 1) != 0) {
        return 5;
    }
    __atomic_store_n(&over, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < n; i++) {
        pthread_join(writers[i].thread, NULL);
    }
    for (unsigned i = 0; i < WRITERS; i++) {
        uint64_t upto;
        if (writers_check(i, pages_of(i), &upto) || upto == 0) {
            return 6;
        }
    }
    return 0;
}
