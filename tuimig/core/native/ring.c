// Fault records: a fixed ring with one producer thread and one consumer thread, and a histogram that anyone may read.
// Owned by whoever created it. The producer never waits: what does not fit is counted and dropped.
#include <stdlib.h>
#include <string.h>

#include "ring.h"
#include "util.h"

#define CACHE_LINE 64

struct tm_ring {
    _Alignas(CACHE_LINE) uint64_t head; // next to write; written by the producer
    uint64_t dropped;
    struct tm_histogram histogram;
    _Alignas(CACHE_LINE) uint64_t tail; // next to read; written by the consumer
    uint64_t mask;
    struct tm_fault *slot;
};

struct tm_ring *tm_ring_create(uint32_t capacity) {
    uint64_t slots = 1;
    while (slots < capacity) {
        slots *= 2;
    }
    struct tm_ring *ring = aligned_alloc(CACHE_LINE, sizeof *ring); // sizeof is a multiple of the alignment
    if (!ring) {
        return NULL;
    }
    memset(ring, 0, sizeof *ring);
    ring->mask = slots - 1;
    ring->slot = calloc(slots, sizeof *ring->slot);
    if (!ring->slot) {
        free(ring);
        return NULL;
    }
    return ring;
}

void tm_ring_destroy(struct tm_ring *ring) {
    if (ring) {
        free(ring->slot);
        free(ring);
    }
}

// One writer only, so a plain load and an atomic store make a torn-free counter without a locked instruction.
static void bump(uint64_t *counter) {
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
}

static void count_latency(struct tm_histogram *histogram, uint32_t latency_ns) {
    unsigned bucket = latency_ns > 1 ? 31u - (unsigned)__builtin_clz(latency_ns) : 0u;
    bump(&histogram->bucket[bucket]);
    bump(&histogram->count);
    if (latency_ns > __atomic_load_n(&histogram->max_ns, __ATOMIC_RELAXED)) {
        __atomic_store_n(&histogram->max_ns, latency_ns, __ATOMIC_RELAXED);
    }
}

void tm_ring_push(struct tm_ring *ring, const struct tm_fault *fault) {
    count_latency(&ring->histogram, fault->latency_ns);
    uint64_t head = __atomic_load_n(&ring->head, __ATOMIC_RELAXED);
    if (head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) > ring->mask) {
        bump(&ring->dropped);
        return;
    }
    ring->slot[head & ring->mask] = *fault;
    __atomic_store_n(&ring->head, head + 1, __ATOMIC_RELEASE);
}

uint32_t tm_ring_drain(struct tm_ring *ring, struct tm_fault *out, uint32_t most) {
    uint64_t tail = __atomic_load_n(&ring->tail, __ATOMIC_RELAXED);
    uint64_t ready = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) - tail;
    uint32_t count = ready < most ? (uint32_t)ready : most;
    for (uint32_t i = 0; i < count; i++) {
        out[i] = ring->slot[(tail + i) & ring->mask];
    }
    __atomic_store_n(&ring->tail, tail + count, __ATOMIC_RELEASE);
    return count;
}

uint64_t tm_ring_dropped(const struct tm_ring *ring) { return __atomic_load_n(&ring->dropped, __ATOMIC_RELAXED); }

void tm_ring_histogram(const struct tm_ring *ring, struct tm_histogram *out) {
    for (int i = 0; i < 32; i++) {
        out->bucket[i] = __atomic_load_n(&ring->histogram.bucket[i], __ATOMIC_RELAXED);
    }
    out->count = __atomic_load_n(&ring->histogram.count, __ATOMIC_RELAXED);
    out->max_ns = __atomic_load_n(&ring->histogram.max_ns, __ATOMIC_RELAXED);
}
