// A client of Redis that is not in the way: some connections, each with one SET of a random key under way at any time,
// and how long every answer took. `begin` starts, `end` stops and tells.
#include "target.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>

enum { CLIENTS_MAX = 64, TOOK_MAX = 32 << 20, VALUE_MAX = 1 << 16, REQUEST_MAX = VALUE_MAX + 128 };

struct client {
    int fd;
    uint64_t sent_ns;
    size_t got; // bytes of the answer
};

static struct {
    struct client clients[CLIENTS_MAX];
    uint64_t n_clients, keys, value, port, random;
    uint32_t *took_ns;
    uint64_t n_took;
    uint64_t elapsed_ns;
    _Atomic int over;
    pthread_t thread;
} load;

static const char OK[] = "+OK\r\n";

static void set(struct client *client) {
    static char request[REQUEST_MAX];
    char key[32];
    int key_size = snprintf(key, sizeof key, "key:%lu", draw(&load.random) % load.keys);
    int head = snprintf(request, sizeof request, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%lu\r\n", key_size, key, load.value);
    memset(request + head, 'x', load.value);
    memcpy(request + head + load.value, "\r\n", 2);
    size_t size = (size_t)head + load.value + 2;
    client->got = 0;
    client->sent_ns = now_ns(CLOCK_MONOTONIC);
    for (size_t done = 0; done < size;) {
        ssize_t n = write(client->fd, request + done, size - done);
        MUST(n);
        done += (size_t)n;
    }
}

// True once the answer is whole.
static int answered(struct client *client) {
    char text[sizeof OK];
    ssize_t n = read(client->fd, text, sizeof OK - 1 - client->got);
    if (n <= 0 || memcmp(text, OK + client->got, (size_t)n) != 0) {
        problem("an answer is not OK: read returned %ld, errno %d", n, errno);
        return 0;
    }
    client->got += (size_t)n;
    return client->got == sizeof OK - 1;
}

static void *run(void *unused) {
    (void)unused;
    struct pollfd polled[CLIENTS_MAX];
    for (uint64_t i = 0; i < load.n_clients; i++) {
        polled[i] = (struct pollfd){.fd = load.clients[i].fd, .events = POLLIN};
    }
    uint64_t begin = now_ns(CLOCK_MONOTONIC);
    for (uint64_t i = 0; i < load.n_clients; i++) {
        set(&load.clients[i]);
    }
    uint64_t waiting = load.n_clients;
    while (waiting && !atomic_load(&problems.count)) {
        MUST(poll(polled, load.n_clients, -1));
        for (uint64_t i = 0; i < load.n_clients; i++) {
            struct client *client = &load.clients[i];
            if (!polled[i].revents || !answered(client)) {
                continue;
            }
            uint64_t took = now_ns(CLOCK_MONOTONIC) - client->sent_ns;
            if (load.n_took < TOOK_MAX) {
                load.took_ns[load.n_took++] = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
            }
            if (atomic_load(&load.over)) {
                waiting--;
            } else {
                set(client);
            }
        }
    }
    load.elapsed_ns = now_ns(CLOCK_MONOTONIC) - begin;
    return NULL;
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double at_ms(double part) {
    uint64_t i = (uint64_t)(part * (double)load.n_took);
    return load.n_took ? (double)load.took_ns[i < load.n_took ? i : load.n_took - 1] / 1e6 : 0;
}

static void answer(const char *command, char *out, size_t size) {
    if (strcmp(command, "begin") == 0) {
        load.n_took = 0;
        atomic_store(&load.over, 0);
        MUST(pthread_create(&load.thread, NULL, run, NULL) ? -1 : 0);
        snprintf(out, size, "{}");
    } else if (strcmp(command, "end") == 0) {
        atomic_store(&load.over, 1);
        pthread_join(load.thread, NULL);
        qsort(load.took_ns, load.n_took, sizeof *load.took_ns, by_size);
        snprintf(out, size,
                 "{\"per_second\": %f, \"p50_ms\": %f, \"p99_ms\": %f, \"p999_ms\": %f, \"max_ms\": %f, "
                 "\"problems\": %lu, \"first\": \"%s\"}",
                 (double)load.n_took * 1e9 / (double)load.elapsed_ns, at_ms(0.5), at_ms(0.99), at_ms(0.999), at_ms(1),
                 atomic_load(&problems.count), problems.first);
    } else {
        snprintf(out, size, "{\"error\": \"no such command\"}");
    }
}

int main(int argc, char **argv) {
    load.port = number(argc, argv, "--port", 6379);
    load.n_clients = number(argc, argv, "--clients", 4);
    load.keys = number(argc, argv, "--keys", 50000);
    load.value = number(argc, argv, "--value", 4000);
    if (load.n_clients > CLIENTS_MAX || load.value > VALUE_MAX) {
        fprintf(stderr, "at most %d clients, %d bytes\n", CLIENTS_MAX, VALUE_MAX);
        return 64;
    }
    load.took_ns = malloc(TOOK_MAX * sizeof *load.took_ns);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)load.port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (uint64_t i = 0; i < load.n_clients; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
        MUST(fd);
        MUST(connect(fd, (struct sockaddr *)&address, sizeof address));
        MUST(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one));
        load.clients[i].fd = fd;
    }
    int listener = control_open(option(argc, argv, "--control", "/tmp/load.control"));
    ready();
    control_serve(listener, answer);
}
