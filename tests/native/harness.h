// A small test harness: CHECK says where and why and ends the test; every test runs in a process of its own, so that one
// that hangs or crashes is told apart from the others. RUN prints one line a test.
#ifndef TM_HARNESS_H
#define TM_HARNESS_H
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition, ...)                                                                           \
    do {                                                                                                \
        if (!(condition)) {                                                                             \
            int errno_ = errno;                                                                         \
            fprintf(stderr, "%s:%d: %s is false (errno %d): ", __FILE__, __LINE__, #condition, errno_); \
            fprintf(stderr, __VA_ARGS__);                                                               \
            fputc('\n', stderr);                                                                        \
            _exit(99);                                                                                  \
        }                                                                                               \
    } while (0)

// `call` names its error argument `why`.
#define CHECK_OK(call)                                                          \
    do {                                                                        \
        struct tm_error error_;                                                 \
        memset(&error_, 0, sizeof error_);                                      \
        struct tm_error *why = &error_;                                         \
        int code_ = (call);                                                     \
        CHECK(code_ == 0, "code %d: %s: %s", code_, error_.where, error_.what); \
    } while (0)

// How many times slower a sanitizer makes what is looked after: sizes and rounds shrink by it.
#if defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1, SLOWER = 3 };
#elif defined(__SANITIZE_ADDRESS__)
enum { SANITIZED = 1, SLOWER = 2 };
#else
enum { SANITIZED = 0, SLOWER = 1 };
#endif

static int failures;
static const char *only; // run this test alone

__attribute__((unused)) static void run_test(const char *name, void (*test)(void), unsigned seconds) {
    if (only && strcmp(only, name)) {
        return;
    }
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(seconds);
        test();
        exit(0);
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        printf("ok   %s\n", name);
    } else {
        failures++;
        if (WIFSIGNALED(status)) {
            printf("FAIL %s: %s\n", name, WTERMSIG(status) == SIGALRM ? "took too long" : strsignal(WTERMSIG(status)));
        } else {
            printf("FAIL %s: status %d\n", name, WEXITSTATUS(status));
        }
    }
    fflush(stdout);
}

#define RUN(test, seconds) run_test(#test, test, seconds)

#endif
