// Reads stored pages and checks their sums ahead of the background fill, so that a slow disk never keeps the server
// from a fault. A thread of its own; pieces pass between it and the server in order, under one lock.
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fill_internal.h"
#include "util.h"

enum { PIECE_FREE, PIECE_WANTED, PIECE_READY };

#define PIECE_BYTES (TM_PIECE_PAGES * TM_PAGE_SIZE)

int tm_reader_create(struct tm_reader *reader, struct tm_spool *spool, struct tm_error *error) {
    memset(reader, 0, sizeof *reader);
    reader->spool = spool;
    pthread_mutex_init(&reader->lock, NULL);
    pthread_cond_init(&reader->changed, NULL);
    reader->ready_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (reader->ready_fd < 0) {
        return tm_error_errno(error, "eventfd", "the filler's reader cannot start");
    }
    char *data = mmap(NULL, PIECE_BYTES * TM_PIECES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
        return tm_error_set(error, TM_NOMEM, errno, "mmap", "no memory to read stored pages");
    }
    for (int i = 0; i < TM_PIECES; i++) {
        reader->piece[i].data = data + (size_t)i * PIECE_BYTES;
    }
    return TM_OK;
}

int tm_piece_is_bad(const struct tm_piece *piece, uint64_t page) {
    uint64_t bit = page - piece->first;
    return (int)(piece->bad[bit / 64] >> (bit % 64) & 1);
}

static int get(const struct tm_reader *reader, uint64_t first, char *data, uint64_t n, struct tm_error *error) {
    return reader->checked ? tm_spool_get_checked(reader->spool, first, data, n, error)
                           : tm_spool_get(reader->spool, first, data, n, error);
}

static void read_piece(struct tm_reader *reader, struct tm_piece *piece) {
    memset(piece->bad, 0, sizeof piece->bad);
    if (get(reader, piece->first, piece->data, piece->n, &piece->error) == TM_OK) {
        return;
    }
    int first = 1; // one by one, to lose no sound page to a damaged neighbour
    for (uint64_t i = 0; i < piece->n; i++) {
        struct tm_error error;
        if (get(reader, piece->first + i, piece->data + i * TM_PAGE_SIZE, 1, &error) != TM_OK) {
            piece->bad[i / 64] |= UINT64_C(1) << (i % 64);
            if (first) {
                piece->error = error;
                first = 0;
            }
        }
    }
}

static void *reader_thread(void *argument) {
    struct tm_reader *reader = argument;
    uint32_t next = 0;
    if (reader->gentle) {
        tm_thread_nice(TM_GENTLE);
    }
    pthread_mutex_lock(&reader->lock);
    for (;;) {
        struct tm_piece *piece = &reader->piece[next];
        while (!reader->quit && piece->state != PIECE_WANTED) {
            pthread_cond_wait(&reader->changed, &reader->lock);
        }
        if (reader->quit) {
            break;
        }
        pthread_mutex_unlock(&reader->lock);
        read_piece(reader, piece);
        pthread_mutex_lock(&reader->lock);
        piece->state = PIECE_READY;
        pthread_cond_broadcast(&reader->changed);
        eventfd_write(reader->ready_fd, 1);
        next = (next + 1) % TM_PIECES;
    }
    pthread_mutex_unlock(&reader->lock);
    return NULL;
}

int tm_reader_start(struct tm_reader *reader, int gentle, struct tm_error *error) {
    if (reader->running || reader->checked) {
        return TM_OK;
    }
    reader->gentle = gentle;
    int failed = tm_thread_start(&reader->thread, "tuimig-read", reader_thread, reader);
    if (failed) {
        return tm_error_set(error, TM_SYS, failed, "pthread_create", "the filler's reader cannot start");
    }
    reader->running = 1;
    return TM_OK;
}

void tm_reader_destroy(struct tm_reader *reader) {
    if (reader->running) {
        pthread_mutex_lock(&reader->lock);
        reader->quit = 1;
        pthread_cond_broadcast(&reader->changed);
        pthread_mutex_unlock(&reader->lock);
        pthread_join(reader->thread, NULL);
    }
    if (reader->ready_fd >= 0) {
        close(reader->ready_fd);
    }
    if (reader->piece[0].data) {
        munmap(reader->piece[0].data, PIECE_BYTES * TM_PIECES);
    }
    pthread_mutex_destroy(&reader->lock);
    pthread_cond_destroy(&reader->changed);
}

int tm_reader_is_full(struct tm_reader *reader) {
    pthread_mutex_lock(&reader->lock);
    int full = reader->piece[reader->next_wanted].state != PIECE_FREE;
    full |= reader->checked && reader->next_wanted != reader->next_ready; // one at a time, which stays in the cache
    pthread_mutex_unlock(&reader->lock);
    return full;
}

void tm_reader_want(struct tm_reader *reader, uint64_t first, uint64_t n) {
    struct tm_piece *piece = &reader->piece[reader->next_wanted];
    pthread_mutex_lock(&reader->lock);
    piece->first = first;
    piece->n = n;
    if (reader->checked) {
        piece->data = reader->piece[0].data;
        read_piece(reader, piece);
    }
    piece->state = reader->checked ? PIECE_READY : PIECE_WANTED;
    reader->next_wanted = (reader->next_wanted + 1) % TM_PIECES;
    pthread_cond_broadcast(&reader->changed);
    pthread_mutex_unlock(&reader->lock);
}

struct tm_piece *tm_reader_ready(struct tm_reader *reader, int wait) {
    struct tm_piece *piece = &reader->piece[reader->next_ready];
    pthread_mutex_lock(&reader->lock);
    while (wait && piece->state == PIECE_WANTED) {
        pthread_cond_wait(&reader->changed, &reader->lock);
    }
    int ready = piece->state == PIECE_READY;
    pthread_mutex_unlock(&reader->lock);
    return ready ? piece : NULL;
}

void tm_reader_release(struct tm_reader *reader) {
    struct tm_piece *piece = &reader->piece[reader->next_ready];
    pthread_mutex_lock(&reader->lock);
    piece->state = PIECE_FREE;
    pthread_mutex_unlock(&reader->lock);
    reader->next_ready = (reader->next_ready + 1) % TM_PIECES;
}
