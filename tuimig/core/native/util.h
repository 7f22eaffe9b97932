// Internal helpers of the engine, shared by its C files and no part of its face: filling the error shape, time,
// named threads. Nothing here keeps state.
#ifndef TM_UTIL_H
#define TM_UTIL_H
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "error.h"

#define TM_PAGE_SHIFT 12
#define TM_PAGE_SIZE 4096ul

// Fills *error (may be null) and returns code. Address and tid are cleared; set them after the call where known.
__attribute__((format(printf, 5, 6))) int tm_error_set(struct tm_error *error, int code, int err, const char *where,
                                                       const char *fmt, ...);

// The code that an errno stands for, where the call itself gives it no special meaning.
int tm_error_code(int err);

// As tm_error_set with the current errno and the code that it stands for.
#define tm_error_errno(error, where, ...) tm_error_set((error), tm_error_code(errno), errno, (where), __VA_ARGS__)

// Starts a joinable thread with all signals blocked, so that they go to the threads of the embedding program.
// The name is cut to 15 characters. Returns 0 or an errno.
int tm_thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *argument);

enum { TM_GENTLE = 10 };      // the niceness of work that nobody waits for
int tm_thread_nice(int nice); // of the calling thread; 0 or an errno

static inline uint64_t tm_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t tm_page_floor(uint64_t address) { return address & ~(uint64_t)(TM_PAGE_SIZE - 1); }

static inline uint64_t tm_page_ceil(uint64_t address) { return tm_page_floor(address + TM_PAGE_SIZE - 1); }

#endif
