// Fault records on their way to Python, and the latency histogram. One producer thread a ring; when it is full
// records are dropped and counted, never waited for.
#ifndef TM_RING_H
#define TM_RING_H
#include <stdint.h>

enum tm_fault_kind { TM_FAULT_WP = 1, TM_FAULT_MISSING = 2 };

struct tm_fault {
    uint64_t time_ns; // CLOCK_MONOTONIC when the message was read
    uint64_t address;
    uint32_t latency_ns; // message read to thread woken
    int32_t tid;
    int32_t region; // index, -1 where none
    uint16_t pages;
    uint16_t kind; // enum tm_fault_kind
};

struct tm_histogram {
    uint64_t bucket[32]; // bucket[i]: latencies in [2^i, 2^(i+1)) ns
    uint64_t count;
    uint64_t max_ns;
};

struct tm_ring;

struct tm_ring *tm_ring_create(uint32_t capacity); // rounded up to a power of two; null: no memory
void tm_ring_destroy(struct tm_ring *ring);
void tm_ring_push(struct tm_ring *ring, const struct tm_fault *fault); // also counts it in the histogram
uint32_t tm_ring_drain(struct tm_ring *ring, struct tm_fault *out, uint32_t most);
uint64_t tm_ring_dropped(const struct tm_ring *ring);
void tm_ring_histogram(const struct tm_ring *ring, struct tm_histogram *out);

#endif
