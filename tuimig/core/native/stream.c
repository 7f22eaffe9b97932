// Reading and writing of stream descriptors that can be ended at any moment, and the header of a frame.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include "stream_internal.h"

_Static_assert(sizeof(struct tm_frame) == 32, "a frame's header has a fixed form");

enum { PIPE_BYTES = 1 << 20 };

int tm_io_prepare(int in, int out) {
    int fds[2] = {in, out};
    for (int i = 0; i < 2; i++) {
        int flags = fcntl(fds[i], F_GETFL);
        if (flags < 0 || fcntl(fds[i], F_SETFL, flags | O_NONBLOCK)) {
            return -1;
        }
        fcntl(fds[i], F_SETPIPE_SZ, PIPE_BYTES); // where it is a pipe and we may
    }
    return 0;
}

static int lost(struct tm_error *error, const char *call) {
    return tm_error_set(error, TM_SYS, errno, call, "the connection was lost");
}

// TM_OK: try again.
static int wait_for(int fd, short what, int quit_fd, struct tm_error *error) {
    struct pollfd set[2] = {{fd, what, 0}, {quit_fd, POLLIN, 0}};
    while (poll(set, 2, -1) < 0) {
        if (errno != EINTR) {
            return lost(error, "poll");
        }
    }
    return set[1].revents ? tm_error_set(error, TM_CANCELLED, 0, "stream", "the stream was ended") : TM_OK;
}

int tm_io_wait(int fd, int quit_fd, int timeout_ms) {
    struct pollfd set[2] = {{fd, POLLIN, 0}, {quit_fd, POLLIN, 0}};
    int ready = poll(set, 2, timeout_ms);
    return ready > 0 && set[1].revents ? -1 : ready > 0;
}

int tm_io_read(int fd, int quit_fd, void *data, size_t bytes, struct tm_error *error) {
    for (char *to = data; bytes;) {
        ssize_t got = read(fd, to, bytes);
        if (got > 0) {
            to += got;
            bytes -= (size_t)got;
            continue;
        }
        if (got == 0) {
            return tm_error_set(error, TM_SYS, 0, "read", "the other side closed the connection");
        }
        if (errno == EFAULT) { // the spool's file takes no more
            return tm_error_set(error, TM_FULL, ENOSPC, "read", "no memory for the pages that come");
        }
        if (errno != EAGAIN && errno != EINTR) {
            return lost(error, "read");
        }
        int code = errno == EAGAIN ? wait_for(fd, POLLIN, quit_fd, error) : TM_OK;
        if (code) {
            return code;
        }
    }
    return TM_OK;
}

int tm_io_write(int fd, int quit_fd, const void *data, size_t bytes, struct tm_error *error) {
    for (const char *from = data; bytes;) {
        ssize_t put = write(fd, from, bytes);
        if (put > 0) {
            from += put;
            bytes -= (size_t)put;
            continue;
        }
        if (put < 0 && errno != EAGAIN && errno != EINTR) {
            return lost(error, "write");
        }
        int code = wait_for(fd, POLLOUT, quit_fd, error);
        if (code) {
            return code;
        }
    }
    return TM_OK;
}

int tm_io_send_file(int fd, int quit_fd, int file, off_t at, size_t bytes, struct tm_error *error) {
    while (bytes) {
        ssize_t put = sendfile(fd, file, &at, bytes);
        if (put > 0) {
            bytes -= (size_t)put;
            continue;
        }
        if (put == 0) {
            return tm_error_set(error, TM_DAMAGED, 0, "sendfile", "the spool was cut");
        }
        if (errno != EAGAIN && errno != EINTR) {
            return lost(error, "sendfile");
        }
        int code = wait_for(fd, POLLOUT, quit_fd, error);
        if (code) {
            return code;
        }
    }
    return TM_OK;
}

int tm_frame_read(int fd, int quit_fd, struct tm_frame *frame, struct tm_error *error) {
    int code = tm_io_read(fd, quit_fd, frame, sizeof *frame, error);
    if (code) {
        return code;
    }
    int content = frame->type == TM_FRAME_PAGES || frame->type == TM_FRAME_EARLY;
    int pages = content || frame->type == TM_FRAME_WANT;
    if (frame->magic != TM_FRAME_MAGIC || frame->type < TM_FRAME_PAGES || frame->type > TM_FRAME_EARLY ||
        frame->encoding > TM_ZSTD || frame->n_pages > TM_FRAME_PAGES_MOST || (pages && frame->n_pages == 0) ||
        (!content && frame->bytes) || frame->bytes > frame->n_pages * TM_PAGE_SIZE) {
        return tm_error_set(error, TM_DAMAGED, 0, "stream", "what came is no frame of this protocol");
    }
    return TM_OK;
}
