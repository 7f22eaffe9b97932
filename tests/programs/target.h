// What every test target shares: a control socket that takes one line and answers one, a readiness handshake, and a
// place where the first problem is kept. Header only; each target is one file and one program.
#ifndef TARGET_H
#define TARGET_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MUST(call)                                                                          \
    do {                                                                                    \
        if ((call) == -1) {                                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, strerror(errno)); \
            exit(70);                                                                       \
        }                                                                                   \
    } while (0)

// ---- problems: counted, the first one kept in words

struct problems {
    _Atomic uint64_t count;
    atomic_flag taken;
    char first[400];
};

static struct problems problems = {.taken = ATOMIC_FLAG_INIT};

static inline void problem(const char *format, ...) {
    if (!atomic_flag_test_and_set(&problems.taken)) {
        va_list list;
        va_start(list, format);
        vsnprintf(problems.first, sizeof problems.first, format, list);
        va_end(list);
        for (char *c = problems.first; *c; c++) {
            if (*c == '"' || *c == '\n' || *c == '\\') {
                *c = '\'';
            }
        }
    }
    atomic_fetch_add(&problems.count, 1);
}

// ---- time

static inline uint64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000U + (uint64_t)t.tv_nsec;
}

static inline void pause_us(uint64_t us) {
    if (us) {
        struct timespec t = {(time_t)(us / 1000000), (long)(us % 1000000) * 1000};
        while (clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t) == EINTR) {}
    }
}

// ---- a small random generator with its state in the caller's memory (so that it is part of the picture)

static inline uint64_t scramble(uint64_t x) {
    x += 0x9e3779b97f4a7c15U;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
}

static inline uint64_t draw(uint64_t *state) { return scramble((*state)++); }

// ---- control

static inline int control_open(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    unlink(path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    MUST(listener);
    MUST(bind(listener, (struct sockaddr *)&address, sizeof address));
    MUST(chmod(path, 0777));
    MUST(listen(listener, 16));
    return listener;
}

// Tells the harness, on the descriptor named by READY_FD, that everything stands.
static inline void ready(void) {
    const char *text = getenv("READY_FD");
    if (text) {
        int fd = atoi(text);
        if (write(fd, "ready\n", 6) != 6) {
            exit(71);
        }
        close(fd);
    }
}

typedef void answer_fn(const char *command, char *out, size_t size);

// Serves for ever: one line in, one line out, then the connection is closed (so that none is open between commands).
static inline void control_serve(int listener, answer_fn *answer) {
    static char out[1 << 18];
    for (;;) {
        int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (peer < 0) {
            problem("accept4 returned errno %d", errno);
            continue;
        }
        char command[256];
        ssize_t n = read(peer, command, sizeof command - 1);
        if (n > 0) {
            command[n] = 0;
            command[strcspn(command, "\n")] = 0;
            if (strcmp(command, "stop") == 0) {
                _exit(0);
            }
            answer(command, out, sizeof out - 2);
            strcat(out, "\n");
            size_t length = strlen(out);
            for (size_t done = 0; done < length;) {
                ssize_t w = write(peer, out + done, length - done);
                if (w <= 0) {
                    break;
                }
                done += (size_t)w;
            }
        }
        close(peer);
    }
}

// ---- arguments: --name value

static inline const char *option(int argc, char **argv, const char *name, const char *other) {
    for (int i = 1; i + 1 < argc; i++) {
        if (strcmp(argv[i], name) == 0) {
            return argv[i + 1];
        }
    }
    return other;
}

static inline uint64_t number(int argc, char **argv, const char *name, uint64_t other) {
    const char *text = option(argc, argv, name, NULL);
    return text ? strtoull(text, NULL, 0) : other;
}

#endif
