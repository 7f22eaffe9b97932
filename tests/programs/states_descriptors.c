// States behind descriptors: what they hold, how they are shared, and whether they work afterwards.
#include "states.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>

// ---- pipes

static int pipe_ends[2], packet_ends[2], empty_ends[2];

static void pipes_make(void) {
    MUST(pipe2(pipe_ends, O_NONBLOCK));
    MUST(fcntl(pipe_ends[1], F_SETPIPE_SZ, 131072));
    char text[3000];
    memset(text, 'p', sizeof text);
    text[2999] = 'e';
    MUST(write(pipe_ends[1], text, sizeof text));
    MUST(pipe2(packet_ends, O_DIRECT | O_NONBLOCK | O_CLOEXEC));
    MUST(write(packet_ends[1], "first", 5));
    MUST(write(packet_ends[1], "second", 6));
    MUST(pipe(empty_ends));
}

static void pipes_check(void) {
    char text[4000];
    EXPECT(fcntl(pipe_ends[0], F_GETPIPE_SZ) == 131072, "capacity %d", fcntl(pipe_ends[0], F_GETPIPE_SZ));
    EXPECT(fcntl(pipe_ends[0], F_GETFL) & O_NONBLOCK, "O_NONBLOCK is lost");
    ssize_t n = read(pipe_ends[0], text, sizeof text);
    EXPECT(n == 3000 && text[0] == 'p' && text[2999] == 'e', "read gave %zd", n);
    EXPECT(read(pipe_ends[0], text, 1) == -1 && errno == EAGAIN, "there is more in it");
    n = read(packet_ends[0], text, sizeof text);
    EXPECT(n == 5 && memcmp(text, "first", 5) == 0, "the first packet has %zd bytes", n);
    n = read(packet_ends[0], text, sizeof text);
    EXPECT(n == 6 && memcmp(text, "second", 6) == 0, "the second packet has %zd bytes", n);
    EXPECT(write(empty_ends[1], "x", 1) == 1 && read(empty_ends[0], text, 10) == 1, "the empty pipe does not work");
    close(empty_ends[1]);
    EXPECT(read(empty_ends[0], text, 10) == 0, "no end of file once the writer is closed");
}

// ---- socket pairs

static int stream_pair[2], datagram_pair[2], half_pair[2];

static void socketpairs_make(void) {
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, stream_pair));
    MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, datagram_pair));
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, half_pair));
    MUST(write(stream_pair[0], "to one", 6));
    MUST(write(stream_pair[1], "to zero!", 8));
    MUST(write(half_pair[0], "last words", 10));
    MUST(shutdown(half_pair[0], SHUT_WR));
}

static void socketpairs_check(void) {
    char text[64];
    EXPECT(read(stream_pair[1], text, 64) == 6 && memcmp(text, "to one", 6) == 0, "content for one is wrong");
    EXPECT(read(stream_pair[0], text, 64) == 8 && memcmp(text, "to zero!", 8) == 0, "content for zero is wrong");
    EXPECT(write(stream_pair[0], "again", 5) == 5 && read(stream_pair[1], text, 64) == 5, "the pair is not connected");
    EXPECT(write(datagram_pair[0], "one", 3) == 3 && write(datagram_pair[0], "second", 6) == 6,
           "datagrams cannot be sent");
    EXPECT(read(datagram_pair[1], text, 64) == 3 && read(datagram_pair[1], text, 64) == 6, "datagrams run together");
    EXPECT(read(half_pair[1], text, 64) == 10, "what was written before the shutdown is lost");
    EXPECT(read(half_pair[1], text, 64) == 0, "the shutdown is lost");
    EXPECT(write(half_pair[1], "x", 1) == 1 && read(half_pair[0], text, 64) == 1, "its other direction is lost");
    int type = 0;
    socklen_t size = sizeof type;
    getsockopt(datagram_pair[0], SOL_SOCKET, SO_TYPE, &type, &size);
    EXPECT(type == SOCK_DGRAM, "type %d", type);
}

// ---- files: offset, flags, sharing of one open file by several numbers

static int file_fd, file_dup, file_other, append_fd, directory_fd, null_fd, random_fd;

static void files_make(void) {
    char path[512];
    snprintf(path, sizeof path, "%s/data", states_directory);
    file_fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    MUST(file_fd);
    MUST(write(file_fd, "0123456789abcdef", 16));
    MUST(lseek(file_fd, 5, SEEK_SET));
    file_dup = dup(file_fd);
    MUST(dup3(file_fd, 777, O_CLOEXEC));
    file_other = open(path, O_RDONLY | O_CLOEXEC);
    MUST(lseek(file_other, 11, SEEK_SET));
    snprintf(path, sizeof path, "%s/log", states_directory);
    append_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_TRUNC, 0600);
    directory_fd = open(states_directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    null_fd = open("/dev/null", O_RDWR);
    random_fd = open("/dev/urandom", O_RDONLY | O_NONBLOCK);
    MUST(append_fd);
    MUST(directory_fd);
    MUST(null_fd);
    MUST(random_fd);
}

static void files_check(void) {
    char text[8] = "";
    EXPECT(read(file_fd, text, 1) == 1 && text[0] == '5', "the offset is wrong: %s", text);
    EXPECT(read(file_dup, text, 1) == 1 && text[0] == '6', "the dup does not share the offset: %s", text);
    EXPECT(read(777, text, 1) == 1 && text[0] == '7', "the dup at 777 does not share the offset: %s", text);
    EXPECT(read(file_other, text, 1) == 1 && text[0] == 'b', "the second open shares an offset: %s", text);
    EXPECT(fcntl(777, F_GETFD) == FD_CLOEXEC && fcntl(file_fd, F_GETFD) == 0, "close-on-exec is wrong");
    EXPECT((fcntl(file_fd, F_GETFL) & O_ACCMODE) == O_RDWR, "the access mode is wrong");
    EXPECT(fcntl(append_fd, F_GETFL) & O_APPEND, "O_APPEND is lost");
    EXPECT(write(append_fd, "line\n", 5) == 5, "the log cannot be written");
    EXPECT(openat(directory_fd, ".", O_PATH | O_CLOEXEC) >= 0, "the directory is gone");
    EXPECT(read(null_fd, text, 1) == 0 && write(null_fd, "x", 1) == 1, "/dev/null is not itself");
    EXPECT(read(random_fd, text, 8) == 8 && (fcntl(random_fd, F_GETFL) & O_NONBLOCK), "/dev/urandom is not itself");
    EXPECT(fcntl(778, F_GETFD) == -1 && errno == EBADF, "a descriptor that was not there");
}

// ---- eventfd, timerfd, signalfd, and an epoll over them

static int event_fd, semaphore_fd, timer_fd, far_timer_fd, signal_fd, epoll_fd, watched[2];
static uint64_t timer_due_ns;

static void events_make(void) {
    event_fd = eventfd(5, EFD_NONBLOCK);
    semaphore_fd = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    far_timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    timer_due_ns = now_ns(CLOCK_MONOTONIC) + 3000000000U;
    struct itimerspec t = {.it_value = {(time_t)(timer_due_ns / 1000000000U), (long)(timer_due_ns % 1000000000U)},
                           .it_interval = {0, 250000000}};
    MUST(timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &t, NULL));
    struct itimerspec far = {.it_value = {5000, 0}, .it_interval = {7, 0}};
    MUST(timerfd_settime(far_timer_fd, 0, &far, NULL));
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGWINCH);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal_fd = signalfd(-1, &set, SFD_NONBLOCK);
    MUST(signal_fd);
    MUST(pipe2(watched, O_NONBLOCK));
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0xabcdef0102030405U};
    MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, watched[0], &event));
    event = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.u64 = 2};
    MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &event));
    event = (struct epoll_event){.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 3};
    MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, signal_fd, &event));
}

// Edge-triggered events come once: what is found while another is looked for is remembered.
// An event may come while another is waited for, and edges come once: what was seen is kept.
static int epoll_finds(uint64_t data, int timeout_ms) {
    static uint64_t seen[8]; // of each data value once
    static unsigned n_seen;
    uint64_t end = now_ns(CLOCK_MONOTONIC) + (uint64_t)timeout_ms * 1000000;
    for (;;) {
        for (unsigned i = 0; i < n_seen; i++) {
            if (seen[i] == data) {
                return 1;
            }
        }
        struct epoll_event events[8];
        int n = epoll_wait(epoll_fd, events, 8, 20);
        for (int i = 0; i < n; i++) {
            unsigned k = 0;
            while (k < n_seen && seen[k] != events[i].data.u64) {
                k++;
            }
            if (k == n_seen && n_seen < 8) {
                seen[n_seen++] = events[i].data.u64;
            }
        }
        if (now_ns(CLOCK_MONOTONIC) > end) {
            return 0;
        }
    }
}

static void events_check(void) {
    uint64_t value = 0;
    EXPECT(read(event_fd, &value, 8) == 8 && value == 5, "eventfd count %lu", value);
    EXPECT(read(semaphore_fd, &value, 8) == 8 && value == 1, "semaphore eventfd read %lu", value);
    EXPECT(read(semaphore_fd, &value, 8) == 8 && read(semaphore_fd, &value, 8) == 8, "semaphore count was not 3");
    EXPECT(read(semaphore_fd, &value, 8) == -1, "semaphore count was more than 3");
    struct itimerspec t;
    MUST(timerfd_gettime(far_timer_fd, &t));
    EXPECT(t.it_interval.tv_sec == 7 && t.it_value.tv_sec > 3000 && t.it_value.tv_sec <= 5000, "far timer: %ld s",
           t.it_value.tv_sec);
    EXPECT(write(watched[1], "x", 1) == 1 && epoll_finds(0xabcdef0102030405U, 500), "epoll does not report the pipe");
    raise(SIGWINCH);
    EXPECT(epoll_finds(3, 500), "epoll does not report the signalfd");
    struct signalfd_siginfo info;
    EXPECT(read(signal_fd, &info, sizeof info) == sizeof info && info.ssi_signo == SIGWINCH, "signalfd is wrong");
    EXPECT(epoll_finds(2, 5000), "epoll does not report the timer");
    uint64_t now = now_ns(CLOCK_MONOTONIC);
    EXPECT(now >= timer_due_ns, "the timer fired %lu us early", (timer_due_ns - now) / 1000);
    EXPECT(read(timer_fd, &value, 8) == 8 && value >= 1, "no ticks");
    EXPECT(value <= (now - timer_due_ns) / 250000000 + 1, "%lu ticks are too many", value);
}

// ---- no descriptor left to be had

static void full_make(void) {
    struct rlimit limit = {3, 3};
    MUST(setrlimit(RLIMIT_NOFILE, &limit));
}

static void full_check(void) { EXPECT(dup(0) == -1 && errno == EMFILE, "a descriptor could be had"); }

// ---- what cannot be copied, and must be refused by name

static int queued_pair[2];

static void datagrams_make(void) { // how many there are cannot be seen from outside
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, queued_pair));
    MUST(write(queued_pair[0], "first", 5));
    MUST(write(queued_pair[0], "second", 6));
}

static void datagrams_check(void) {
    char text[64];
    EXPECT(read(queued_pair[1], text, 64) == 5 && read(queued_pair[1], text, 64) == 6, "a datagram is gone");
}

static int ring_fd;

static void uring_make(void) {
    char parameters[120] = {0};
    ring_fd = (int)syscall(SYS_io_uring_setup, 4, parameters);
    if (ring_fd < 0) {
        exit(77); // not there, or not allowed: the test skips
    }
}

static void uring_check(void) { EXPECT(fcntl(ring_fd, F_GETFD) >= 0, "the ring is gone"); }

static unsigned long aio_context;

static void aio_make(void) {
    if (syscall(SYS_io_setup, 8, &aio_context) != 0) {
        exit(77);
    }
}

static void aio_check(void) {
    EXPECT(syscall(SYS_io_getevents, aio_context, 0, 0, NULL, NULL) == 0, "the context is gone");
}

struct state descriptor_states[] = {
    {.name = "pipes", .make = pipes_make, .check = pipes_check},
    {.name = "socketpairs", .make = socketpairs_make, .check = socketpairs_check},
    {.name = "files", .make = files_make, .check = files_check},
    {.name = "events", .make = events_make, .check = events_check},
    {.name = "descriptors_full", .make = full_make, .check = full_check, .only_named = 1},
    {.name = "datagrams", .make = datagrams_make, .check = datagrams_check, .only_named = 1},
    {.name = "uring", .make = uring_make, .check = uring_check, .only_named = 1},
    {.name = "aio", .make = aio_make, .check = aio_check, .only_named = 1},
    {.name = NULL},
};
